"""Which weights before a tensor can take up scales of its channels, so that the tensor comes out scaled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effc.layers import constant_weight, output_axis
from effc.model import STANDARD_DOMAINS, constant_tensor

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity", "Dropout")  # f(s x) = s f(x) for s > 0

Absorber = tuple[ir.Value, int]  # a weight, and its axis that runs over the channels


def absorbers(value: ir.Value, readers: Sequence[ir.Node], channels: int) -> list[Absorber] | str:
    """Weights that scale the last axis of a tensor when they are scaled along an axis; or why there are none.

    Args:
        readers: the nodes that may see the tensor scaled; one more reader, and nothing can be done.
        channels: length of that axis; weights of another length are broadcast, and cannot take up its scales.
    """
    found = _before(value, readers)
    if not isinstance(found, str) and any(tensor.shape[axis] != channels for tensor, axis in found):
        return f"what makes {value.name!r} is broadcast to it"
    return found


def _before(value: ir.Value, readers: Sequence[ir.Node]) -> list[Absorber] | str:
    if value.is_graph_output():
        return f"{value.name!r} is an output"
    if others := [use.node for use in value.uses() if use.node not in readers]:
        return f"{others[0].op_type} {others[0].name!r} reads its input too"
    maker = value.producer()
    if maker is None:
        return "its input is one of the graph"
    if maker.domain not in STANDARD_DOMAINS and maker.op_type not in NORMS:
        return f"its input comes out of {maker.domain}.{maker.op_type}"
    if maker.op_type in NORMS:
        return _norm(maker)
    if maker.op_type in ("MatMul", "Gemm"):
        return _dense(maker)
    if maker.op_type in ("Add", "Mul"):
        return _sum(maker) if maker.op_type == "Add" else _product(maker)
    if maker.op_type in HOMOGENEOUS and value is maker.outputs[0]:
        return _before(maker.inputs[0], [maker])
    return f"scales cannot pass {maker.op_type} {maker.name!r}"


def _norm(node: ir.Node) -> list[Absorber] | str:
    given = [v for v in node.inputs[1:3] if v is not None]
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    axis = node.attributes.get_int("axis", -1)
    if axis != -1 and (rank is None or axis != rank - 1):
        return f"{node.name!r} normalises more than the last axis"
    if any(v is not None and v.uses() for v in node.outputs[1:]):
        return f"{node.name!r} has its statistics read"
    return _all([_vector(v) for v in given])


def _dense(node: ir.Node) -> list[Absorber] | str:
    weight = constant_weight(node)
    if weight is None or weight.ndim != 2:
        return f"{node.name!r} has no constant matrix for its weight"
    own = _single(node.inputs[1], output_axis(node, 2))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _all([own] if bias is None else [own, _vector(bias)])


def _sum(node: ir.Node) -> list[Absorber] | str:
    """A tensor and one constant for each channel."""
    for value, other in (node.inputs, node.inputs[::-1]):
        if constant_tensor(other) is not None:
            before = _before(value, [node])
            added = _vector(other)
            return before if isinstance(before, str) else _all([*before, added])
    return f"scales cannot pass the sum {node.name!r}"


def _product(node: ir.Node) -> list[Absorber] | str:
    """Either factor takes the scales."""
    factors = [v for v in node.inputs if v is not None]
    for value in factors:
        if constant_tensor(value) is not None and not isinstance(found := _vector(value), str):
            return [found]
    reason = f"scales cannot pass the product {node.name!r}"
    for value in factors:
        if constant_tensor(value) is None:
            found = _before(value, [node])
            if not isinstance(found, str):
                return found
            reason = found
    return reason


def _vector(value: ir.Value) -> Absorber | str:
    """A constant with a number for each channel, along its last axis."""
    tensor = constant_tensor(value)
    if tensor is None:
        return f"{value.name!r} is no constant"
    shape = tuple(tensor.shape.numpy())
    if not shape or shape[-1] == 1 or int(np.prod(shape)) != shape[-1]:
        return f"{value.name!r} has not one number a channel"
    return _single(value, len(shape) - 1)


def _single(value: ir.Value, axis: int) -> Absorber | str:
    """A float32 weight of the main graph that one node reads."""
    if not value.is_initializer():
        return f"{value.name!r} is no weight of the graph"
    if value.is_graph_input() or value.is_graph_output():
        return f"{value.name!r} is an input or output as well"
    if len(value.uses()) != 1:
        return f"{value.name!r} has other readers"
    if value.dtype != ir.DataType.FLOAT:
        return f"{value.name!r} is {value.dtype}; float32 is scaled"
    return value, axis


def _all(found: Sequence[Absorber | str]) -> list[Absorber] | str:
    refusal = next((each for each in found if isinstance(each, str)), None)
    return refusal if refusal is not None else [each for each in found if not isinstance(each, str)]
