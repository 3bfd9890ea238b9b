"""Means whose last windows reach beyond the image and its padding, spelled so that all kernels agree.

By ONNX a mean that counts the padding does not count what lies beyond it (ceil_mode); onnxruntime's integer kernel
does. Padding that is part of the image needs no flag, and without the flag they agree.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.model import Model


def pad_before(model: Model) -> None:
    """Give such means a padded image and no flag, in place, where their sizes are known; it must have opset 11."""
    for node in list(model.nodes("AveragePool")):
        given = node.attributes
        if not (given.get_int("ceil_mode", 0) and given.get_int("count_include_pad", 0)):
            continue
        pads = list(given.get_ints("pads", ()))
        if any(pads):
            if not _stays(model, node, pads):
                continue
            spatial = len(pads) // 2
            ends = np.array([0, 0, *pads[:spatial], 0, 0, *pads[spatial:]])
            sizes = edit.add_initializer(model, f"{node.name}_pads", ends)
            padding = edit.make_node(model, "Pad", [node.inputs[0], sizes], name=f"{node.name}_padding", origin=[node])
            edit.insert_before(model, node, [padding])
            edit.set_input(model, node, 0, padding.outputs[0])
        elif given.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        edit.set_attributes(model, node, count_include_pad=None, pads=None)


def _stays(model: Model, node: ir.Node, pads: list[int]) -> bool:
    """Whether no window begins in the padding at the end, where ONNX has none: in a padded image it would have."""
    shape = model.shapes(model.batch or 1).get(node.inputs[0].name)
    if shape is None or not all(isinstance(size, int) for size in shape[2:]):
        return False
    spatial, kernel = len(pads) // 2, node.attributes.get_ints("kernel_shape", ())
    ones = [1] * spatial
    steps, gaps = (node.attributes.get_ints(name, None) or ones for name in ("strides", "dilations"))
    for size, k, step, gap, begin, end in zip(
        shape[2:], kernel, steps, gaps, pads[:spatial], pads[spatial:], strict=True
    ):
        last = -(-(size + begin + end - gap * (k - 1) - 1) // step) * step
        if last >= size + begin:
            return False
    return True
