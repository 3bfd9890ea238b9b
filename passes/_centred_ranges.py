"""A tensor between zero and a bound, moved to lie around zero: one bit more for codes that are signed.

    x = clip(W z + b, 0, h), V x + a  ->  x' = clip(W z + b - h/2, -h/2, h/2), V x' + a + V 1 h/2

Signed codes with zero point 0 leave half of them to numbers below zero, which a ReLU6 does not make. The same tensor
less half of its range uses all of them, and costs nothing: biases take up the shift before and behind. Where a reader
pads with zeros its sums would differ at the edges, so what such a layer reads stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.layers import bias_array, bias_value, constant_weight, only_reader, pads, set_bias
from effc.model import Model
from effc.placement import Placement, clip_bounds
from effc.quantize import Affine


def centre_ranges(model: Model, placement: Placement, ranges: Mapping[ir.Value, Affine]) -> list[str]:
    """Move tensors where all that reads them can take it, in the float model; their names."""
    found = []
    for value in [v for v in placement.coded if v in ranges]:
        if (maker := _maker(model, value)) is not None and _fit(model, value, placement):
            found.append(value.name or "")
            _move(model, value, maker, min(clip_bounds(value.producer())[1], ranges[value].high) / 2)
    return found


def _maker(model: Model, value: ir.Value) -> ir.Node | None:
    """The convolution behind whose outputs, and theirs alone, a Clip from zero to a bound makes a tensor; or None."""
    clip = value.producer()
    if clip is None or clip.op_type != "Clip" or clip_bounds(clip)[0] != 0 or clip_bounds(clip)[1] is None:
        return None
    maker = clip.inputs[0].producer()
    fits = maker is not None and _is_layer(model, maker) and only_reader(maker.outputs[0]) is clip
    return maker if fits and not value.is_graph_output() else None


def _fit(model: Model, value: ir.Value, placement: Placement) -> bool:
    """Whether all readers are convolutions in integers that see no padding."""
    return all(
        index == 0 and node in placement.integer and _is_layer(model, node) and not any(_pads(node))
        for node, index in value.uses()
    )


def _is_layer(model: Model, node: ir.Node) -> bool:
    """A convolution with constant weights, and a constant bias or none."""
    if node.op_type != "Conv" or not node.inputs[1].is_initializer() or (weight := constant_weight(node)) is None:
        return False
    try:
        bias_array(model, node, len(weight))
    except ValueError:
        return False
    return bias_value(node) is None or bias_value(node).is_initializer()


def _pads(node: ir.Node) -> list[int]:
    kernel = constant_weight(node).shape[2:]
    if node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME"):
        return [k - 1 for k in kernel]
    return pads(node, [1] * len(kernel), kernel)


def _move(model: Model, value: ir.Value, maker: ir.Node, shift: float) -> None:
    clip = value.producer()
    _add_to_bias(model, maker, np.full(len(constant_weight(maker)), -shift))
    for place, bound in enumerate(clip_bounds(clip), start=1):
        end = edit.add_initializer(model, f"{value.name}_{('min', 'max')[place - 1]}", np.float32(bound - shift))
        edit.set_input(model, clip, place, end)
    for node in value.consumers():
        weight = constant_weight(node).astype(np.float64)
        _add_to_bias(model, node, shift * weight.reshape(len(weight), -1).sum(axis=1))
    for moved in (maker.outputs[0], value):
        edit.rename(model, moved)


def _add_to_bias(model: Model, node: ir.Node, more: np.ndarray) -> None:
    bias = bias_array(model, node, len(more))
    set_bias(model, node, more if bias is None else bias + more)
