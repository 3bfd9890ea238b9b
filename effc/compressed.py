"""Bytes that weights take once a general compressor has been over them, as a zip of the file would: what zeros save."""

from __future__ import annotations

import zlib

from effc.model import Model

LEVEL = 6  # zlib's and zip's usual


def compressed_size(model: Model) -> int:
    """Sum over the weights of the main graph of their bytes after zlib (DEFLATE, RFC 1951), each by itself."""

    def compute() -> int:
        tensors = {id(t): t for v in model.graph.initializers.values() if (t := v.const_value) is not None}
        return sum(len(zlib.compress(t.tobytes(), LEVEL)) for t in tensors.values() if t.size)

    return model.cached("compressed size", compute, for_clones=True)
