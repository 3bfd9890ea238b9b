"""A kernel as a runtime runs it, and what its time depends on.

Three families: convolutions, matrix products, and the rest, which moves and maps elements. For each family `terms`
are the parts of a kernel's work, whose weighted sum is its time to first order, and `features` are what the rest of it
varies with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FREE = "free"  # kind of what only renames a tensor
CONVOLUTION = ("n", "c", "m", "g", "h", "w", "kh", "kw", "s", "d", "act", "sum")
MATRIX = ("b", "m", "k", "n")
ELEMENTS = ("elements", "share", "run", "window", "broadcast")
COMMON = ("moved", "around", "since", "near", "far", "made_near", "made_far")
# Distances, in bytes touched in between, beyond which something has left a core's own cache, and the one that cores
# share: soft steps.
NEAR, FAR = 1e6, 2e7


@dataclass(frozen=True)
class Kernel:
    """One node of a runtime's own graph.

    Attributes:
        name: of that node.
        kind: family of kernels that behave alike.
        outputs: names of what it makes, in the runtime's graph.
        dims: what its time depends on, by name. Convolutions: n images, c inputs and m outputs of each of g groups,
            h x w outputs, kernel kh x kw, stride s, dilation d, act (1: an activation beyond ReLU), sum (1: adds a
            tensor). Matrix products: b of [m, k] x [k, n]. Others: elements of the larger of input and output, share
            of them that comes out, run (elements worked on together), window, broadcast (0 or 1); rows and columns of
            what is transposed, rows (channels) of what changes its layout. All: moved (bytes in and out), around
            (bytes that go through the caches in a whole inference), since (those since the last kernel of its kind),
            near and far (bytes read that have left the near, and the far cache since they were touched last; see
            `left`), made_near and made_far (the same of the memory that it writes to).
        macs: multiply-accumulates; those of channels that a blocked layout pads count too.
        moved: bytes of its inputs, weights and outputs.
        dtype: type of the operands.
        known: False where shapes are not known, or it has a body of its own.
    """

    name: str
    kind: str
    outputs: tuple[str, ...]
    dims: Mapping[str, float]
    macs: int
    moved: int
    dtype: str
    known: bool = True

    @property
    def key(self) -> str:
        """What kernels are measured and fitted by: operators on elements behave by their width as well."""
        return self.kind if family(self.dims) != ELEMENTS or self.dtype == "float32" else f"{self.kind}:{self.dtype}"


# Kinds that behave much like another, for where only that one was measured.
LIKE = {
    "Sum": "Add", "Sub": "Add", "Max": "Add", "Min": "Add", "Where": "Add", "Div": "Mul", "Pow": "Mul",
    "LeakyRelu": "Relu", "PRelu": "Relu", "Clip": "Relu", "Abs": "Relu", "Neg": "Relu", "Cast": "Relu",
    "Sqrt": "Relu", "Reciprocal": "Relu", "Elu": "Sigmoid", "Exp": "Sigmoid", "Erf": "Sigmoid", "Tanh": "Sigmoid",
    "HardSigmoid": "Sigmoid", "FastGelu": "Gelu", "BiasGelu": "Gelu", "LogSoftmax": "Softmax",
    "ReduceMean": "GlobalAveragePool", "ReduceSum": "GlobalAveragePool",
    "InstanceNormalization": "BatchNormalization", "Gather": "Concat", "Split": "Concat", "Expand": "Concat",
    "Tile": "Concat", "SpaceToDepth": "Concat", "DepthToSpace": "Concat",
    "Upsample-doubled": "Resize-doubled", "Transpose-runs": "Transpose",
    "Resize-doubled": "Resize-nearest", "Upsample-nearest": "Resize-nearest", "Upsample-linear": "Resize-linear",
    "Resize-cubic": "Resize-linear", "blocked-Upsample-nearest": "Resize-doubled",
    "blocked-Upsample-linear": "Resize-linear", "blocked-AveragePool": "blocked-MaxPool", "blocked-Sum": "Add",
    "QLinearLeakyRelu": "QLinearSigmoid", "conv-grouped-blocked": "conv-plain-grouped", "qconv-nchw": "qconv",
    "qconv-patches-nchw": "qconv-patches", "qconv-depthwise-nchw": "qconv-depthwise",
    "qconv-depthwise-patches-nchw": "qconv-depthwise-patches", "qconv-grouped-nchw": "qconv-grouped",
    "qgemm-dynamic": "qgemm", "qgemm-float": "qgemm", "qgemm-pair": "qgemm", "qgemm-dynamic-row": "qgemm-row",
    "qgemm-float-row": "qgemm-row", "gemm-row": "gemm", "qgemm-row": "qgemm", "nbits-row": "nbits",
    "nbits-float-row": "nbits-float", "nbits-decoded-row": "nbits-decoded", "GatherBlockQuantized": "Concat",
}  # fmt: skip


def nbits_kind(bits: int, block: int, level: int) -> str:
    """Kind of a product with codes in blocks (MatMulNBits) on onnxruntime's CPU provider.

    At accuracy level 4 activations are rounded to 8 bits as it runs, with kernels for these widths and blocks. Else 4
    bits are decoded within the product, and other widths before it, as a whole, at every run: that is slow.
    """
    if level == 4 and (bits in (4, 8) or (bits == 2 and block in (32, 64, 128))):
        return "nbits"
    return "nbits-float" if bits == 4 else "nbits-decoded"


def family(dims: Mapping[str, float]) -> tuple[str, ...]:
    """The dimensions of a kernel's family."""
    return CONVOLUTION if "kh" in dims else MATRIX if "k" in dims else ELEMENTS


def columns(dims: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the numbers that describe a kernel, in order."""
    extra = tuple(name for name in ("bits", "block", "level", "rows", "columns") if name in dims)
    return (*family(dims), *extra, *COMMON)


def describe(dims: Mapping[str, float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Terms [j] and features [d] of a kernel whose weights take `size` bytes an element."""
    own = family(dims)
    if own == CONVOLUTION:
        return _convolution(dims, size)
    return _matrix(dims, size) if own == MATRIX else _elements(dims)


def left(distance: float) -> tuple[float, float]:
    """Shares of a tensor that have left the near and the far cache when so many bytes were touched in between."""
    return distance / (distance + NEAR), distance / (distance + FAR)


def _convolution(d: Mapping[str, float], size: int) -> tuple[np.ndarray, np.ndarray]:
    group, taps, pixels, rows = d["g"], d["kh"] * d["kw"], d["n"] * d["h"] * d["w"], d["n"] * d["h"]
    outputs, inputs, width = d["m"] * group, d["c"] * group, d["c"] * taps
    weights, tiles = outputs * width * size, math.ceil(outputs / 64)
    padded = _up(outputs, 16) if d["m"] == 1 else group * _up(d["m"], 16)
    read = pixels * inputs * d["s"] ** 2
    terms = [
        1, *left(d["since"]), *left(d["around"]), d["near"], d["far"],
        pixels * width * outputs,
        pixels * width * padded,  # whole vectors of outputs
        pixels * width * _up(outputs, 64),  # whole tiles of four vectors
        rows * _up(d["w"], 6) * width * padded,  # whole tiles of six pixels
        pixels * outputs, pixels * outputs * d["act"], pixels * outputs * d["sum"],
        read,
        read * tiles,  # each tile of outputs reads the image again
        pixels * width * group if taps > 1 or d["s"] > 1 else 0,  # gathered patches
        rows * d["kh"] * tiles * max(1, d["c"] / 16), rows * d["kh"] * d["c"] * tiles,  # calls, row by row
        rows * padded / 16,
        pixels * group, group,
        weights,
    ]  # fmt: skip
    logs = [d["n"], d["c"], outputs, d["h"], d["w"], taps, d["kw"], d["s"], group, d["around"] + 1e5, d["since"] + 1e5]
    features = [
        *(math.log(v) for v in logs), d["act"], d["sum"], float(d["d"] > 1),
        _up(outputs, 64) / outputs - 1, _up(d["w"], 6) / d["w"] - 1,
        float(outputs % 16 == 0), float(outputs % 4 == 0), float(inputs % 16 == 0), float(inputs % 4 == 0),
        *_away(d),
    ]  # fmt: skip
    return np.array(terms, float), np.array(features, float)


def _matrix(d: Mapping[str, float], size: float) -> tuple[np.ndarray, np.ndarray]:
    count, m, k, n = d["b"], d["m"], d["k"], d["n"]
    bits, block = d.get("bits", 8 * size), d.get("block", 32)
    weights = count * k * n * bits / 8
    terms = [
        1, *left(d["since"]), *left(d["around"]), d["near"], d["far"], count,
        count * m * k * n, count * m * k * _up(n, 16), count * _up(m, 12) * k * _up(n, 16),
        count * m * n, count * m * k,
        weights, k * n if m > 1 else 0,
    ]  # fmt: skip
    features = [
        *(math.log(v) for v in (count, m, k, n, bits, block, d["around"] + 1e5, d["since"] + 1e5)),
        _up(m, 12) / m - 1, _up(n, 16) / n - 1, float(k % 4 == 0), float(m == 1), d.get("level", 0), *_away(d),
    ]  # fmt: skip
    return np.array(terms, float), np.array(features, float)


def _elements(d: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    share = max(d["share"], 1 / d["elements"])  # an empty output takes as long as one number
    elements, made, moved = d["elements"], d["elements"] * share, d["moved"]
    terms = [
        1, *left(d["since"]), *left(d["around"]), d["near"], d["far"],
        elements, made, made * d["window"] if d["window"] > 1 else 0, elements / d["run"],
        moved * left(moved)[0], moved * left(moved)[1],
    ]  # fmt: skip
    rows, columns = d.get("rows", 1), d.get("columns", 1)
    logs = [elements, share, d["run"], d["window"], d["around"] + 1e5, d["since"] + 1e5, rows, columns]
    return np.array(terms, float), np.array([*(math.log(v) for v in logs), d["broadcast"], *_away(d)], float)


def _away(d: Mapping[str, float]) -> tuple[float, ...]:
    """Shares of what is moved that has to come from beyond the near, and the far cache."""
    moved = max(d["moved"], 1)
    return d["near"] / moved, d["far"] / moved, d["made_near"] / moved, d["made_far"] / moved


def _up(value: float, step: int) -> float:
    return -(-value // step) * step
