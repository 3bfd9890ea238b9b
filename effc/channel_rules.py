"""How units of channels run through layers and through operators that combine numbers; see `effc.channels`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc.channel_trace import FIXED, RULES, Map, Trace, laid, ranked
from effc.model import constant_tensor


def _along(trace: Trace, value: ir.Value, axis: int, count: int, node: ir.Node) -> Map:
    """The units [count] of a tensor along one axis, the only one that they may vary along."""
    units = trace.of(value)
    if not units.ndim:
        return np.full(count, FIXED)
    axis %= units.ndim
    if any(length > 1 for other, length in enumerate(units.shape) if other != axis):
        trace.pin(units, f"{node.op_type} {node.name!r} reads units along several axes")
        return np.full(count, FIXED)
    return np.broadcast_to(np.moveaxis(units, axis, -1).reshape(-1), (count,))


# --- layers with weights


@RULES.rule("Conv", "ConvTranspose")
def _conv(trace: Trace, node: ir.Node) -> Map | None:
    x, weight, *rest = node.inputs
    shape = trace.shape(weight)
    if not weight.is_initializer() or shape is None:
        return None
    groups, turned = node.attributes.get_int("group", 1), node.op_type == "ConvTranspose"
    inputs = shape[0] if turned else shape[1] * groups
    outputs = shape[1] * groups if turned else shape[0]
    ids = _along(trace, x, 1, inputs, node)
    if groups > 1 and outputs % groups == 0 and inputs == groups:  # depthwise
        made = np.repeat(ids, outputs // groups)
        trace.weigh(weight, 0, ids if turned else made)
        if turned and outputs > groups:
            trace.pin(ids, f"{node.op_type} {node.name!r} makes several outputs of each channel")
    else:
        _same_in_groups(trace, ids, groups)
        reads, makes = (0, 1) if turned else (1, 0)
        trace.weigh(weight, reads, ids if turned else ids[: inputs // groups], reads=True)
        if turned and groups > 1:
            trace.pin(ids, f"{node.op_type} {node.name!r} has groups")
            trace.pin(trace.made(weight, makes, outputs // groups), f"{node.op_type} {node.name!r} has groups")
            return laid(np.full(outputs, FIXED), 1, len(shape))
        made = trace.made(weight, makes, outputs)
        _same_in_groups(trace, made, groups)
    if rest and rest[0] is not None:
        trace.weigh(rest[0], 0, made)
    return laid(made, 1, len(shape))


def _same_in_groups(trace: Trace, units: Map, groups: int) -> None:
    """Each group keeps as many channels as the others, at the same places."""
    if groups > 1:
        rows = units.reshape(groups, -1)
        trace.meet(rows[1:], rows[:1], "a grouped convolution reads it beside what cannot be removed")


@RULES.rule("Gemm")
def _gemm(trace: Trace, node: ir.Node) -> Map | None:
    x, weight, *rest = node.inputs
    shape = trace.shape(weight)
    if not weight.is_initializer() or shape is None or node.attributes.get_int("transA", 0):
        return None
    reads, makes = (1, 0) if node.attributes.get_int("transB", 0) else (0, 1)
    trace.weigh(weight, reads, _along(trace, x, 1, shape[reads], node), reads=True)
    made = trace.made(weight, makes, shape[makes])
    if rest and rest[0] is not None and (bias := trace.shapes.get(rest[0].name)) and bias[-1] == shape[makes] > 1:
        trace.weigh(rest[0], len(bias) - 1, made)
    return made[None]


@RULES.rule("MatMul")
def _matmul(trace: Trace, node: ir.Node) -> Map | None:
    a, b = node.inputs
    shape = trace.shape(b)
    if b.is_initializer() and shape is not None and len(shape) == 2:
        trace.weigh(b, 0, _along(trace, a, -1, shape[0], node), reads=True)
        return laid(trace.made(b, 1, shape[1]), -1, max(len(trace.shapes.get(a.name) or ()), 1))
    if any(constant_tensor(v) is not None for v in (a, b)):
        return None
    return _product(trace, trace.of(a), trace.of(b), node)


def _product(trace: Trace, a: Map, b: Map, node: ir.Node) -> Map | None:
    """[..., i, k] by [..., k, j]: numbers along k are added up, so these go together; heads stay whole."""
    if min(a.ndim, b.ndim) < 2:
        return None
    rank = max(a.ndim, b.ndim)
    a, b = ranked(a, rank), ranked(b, rank)
    if any(length > 1 for length in (*a.shape[:-2], *b.shape[:-2])):
        whole = a[..., :1, :1]
        for part in (a, b):
            trace.meet(whole, part, f"{node.op_type} {node.name!r} takes heads as a whole")
        return np.broadcast_to(whole, (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), 1, 1))
    why = f"{node.op_type} {node.name!r} adds it up with what cannot be removed"
    if a.shape[-1] > 1 or b.shape[-2] > 1:
        trace.meet(a[..., :1, :].swapaxes(-1, -2), b[..., :, :1], why)
    rows, columns = a[..., :, :1], b[..., :1, :]
    if (a.shape[-2] > 1 and a.shape[-1] > 1) or (b.shape[-1] > 1 and b.shape[-2] > 1):
        trace.pin(a, why)
        trace.pin(b, why)
    if rows.shape[-2] > 1 and columns.shape[-1] > 1:
        return None
    return rows if rows.shape[-2] > 1 else columns if columns.shape[-1] > 1 else np.full((1,) * rank, FIXED)


@RULES.rule("LSTM", "GRU", "RNN")
def _recurrent(trace: Trace, node: ir.Node) -> list[Map]:
    shape = trace.shape(node.inputs[1])
    if shape is not None and node.inputs[1].is_initializer():
        trace.weigh(node.inputs[1], 2, _along(trace, node.inputs[0], -1, shape[2], node), reads=True)
    else:
        trace.pin(trace.of(node.inputs[0]), f"{node.op_type} {node.name!r} has no constant weights")
    return []


@RULES.rule("BatchNormalization", "InstanceNormalization")
def _norm(trace: Trace, node: ir.Node) -> Map:
    units = trace.of(node.inputs[0])
    for value in node.inputs[1:]:
        shape = trace.shape(value)
        if shape:
            trace.weigh(value, 0, _along(trace, node.inputs[0], 1, shape[0], node))
    return units


# --- number by number


@RULES.rule("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mean", "Sum", "Where", "PRelu", "Mod", "And", "Or", "Xor",
            "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitShift")  # fmt: skip
def _combined(trace: Trace, node: ir.Node) -> Map:
    rank = max(len(trace.shapes.get(v.name) or ()) for v in node.inputs if v is not None)
    return trace.joined(node.inputs, node, rank)


@RULES.rule("Abs", "Acos", "Asin", "Atan", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf",
            "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log",
            "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Softplus",
            "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu")  # fmt: skip
def _passed(trace: Trace, node: ir.Node) -> Map:
    return trace.of(node.inputs[0])


@RULES.rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _pooled(trace: Trace, node: ir.Node) -> Map | None:
    """Over positions; not over units."""
    units = trace.of(node.inputs[0])
    return None if any(length > 1 for length in units.shape[2:]) else units


@RULES.rule("QuantizeLinear", "DequantizeLinear")
def _coded(trace: Trace, node: ir.Node) -> Map | None:
    if constant_tensor(node.inputs[0]) is not None or (trace.shapes.get(node.inputs[1].name) or ()) not in ((), (1,)):
        return None
    return trace.of(node.inputs[0])


@RULES.rule("Resize", "Upsample", "DepthToSpace", "SpaceToDepth")
def _resized(trace: Trace, node: ir.Node) -> Map | None:
    before, after = (trace.shapes.get(v.name) for v in (node.inputs[0], node.outputs[0]))
    return _pooled(trace, node) if before and after and before[:2] == after[:2] else None


# --- along axes


@RULES.rule("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization", "GroupNormalization", "LRN",
            "LpNormalization", "MeanVarianceNormalization", "CumSum", "SimplifiedLayerNormalization")  # fmt: skip
def _together(trace: Trace, node: ir.Node) -> Map:
    """What depends on all numbers along some axes: those must not become fewer."""
    units = trace.of(node.inputs[0])
    rank = max(units.ndim, 1)
    if node.op_type in ("GroupNormalization", "LRN", "MeanVarianceNormalization", "CumSum"):
        axes = range(1, rank)
    else:
        last = -1 if trace.model.opset >= 13 or "Layer" in node.op_type else 1
        first = node.attributes.get_int("axis", last) % rank
        several = "Normalization" in node.op_type and node.op_type != "LpNormalization"
        flattening = trace.model.opset < 13 and node.op_type in ("Softmax", "LogSoftmax", "Hardmax")
        axes = range(first, rank) if several or flattening else [first]
    if any(units.ndim and units.shape[axis] > 1 for axis in axes):
        trace.pin(units, f"{node.op_type} {node.name!r} depends on how many there are")
    return units


@RULES.rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
            "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin")  # fmt: skip
def _reduced(trace: Trace, node: ir.Node) -> Map | None:
    units = trace.of(node.inputs[0])
    axes = _axes(trace, node, units.ndim)
    if axes is None:
        return None
    if any(units.shape[axis] > 1 for axis in axes) and node.op_type not in ("ReduceSum", "ReduceL1", "ReduceL2"):
        trace.pin(units, f"{node.op_type} {node.name!r} depends on how many there are")
    found = units
    for axis in axes:
        varies = found.shape[axis] > 1
        found = np.take(found, [0], axis)
        found = np.full_like(found, FIXED) if varies else found
    return found if node.attributes.get_int("keepdims", 1) else found.reshape(
        [length for axis, length in enumerate(found.shape) if axis not in axes]
    )  # fmt: skip


def _axes(trace: Trace, node: ir.Node, rank: int) -> list[int] | None:
    if node.op_type in ("ArgMax", "ArgMin"):
        return [node.attributes.get_int("axis", 0) % rank]
    if "axes" in node.attributes:
        return [axis % rank for axis in node.attributes.get_ints("axes")]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        tensor = constant_tensor(node.inputs[1])
        if tensor is None:
            return None
        if tensor.size:
            return [int(axis) % rank for axis in tensor.numpy().reshape(-1)]
    return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
