"""Units that are the same number everywhere, whatever a model is fed: `f(b_u)` behind filters of zeros.

They are followed through layers, functions of single numbers, norms, pools and whatever moves numbers about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from effc.channels import Channels, channels
from effc.layers import alpha, bias_array, constant_weight, output_axis
from effc.model import Model
from effc.table import OpTable

Known = Mapping[int, float]  # unit -> what it is at every position of a tensor, for any input


def constants(model: Model) -> dict[str, Known]:
    """Tensor -> units that are the same number at every position of it, whatever the inputs, and that number."""

    def compute() -> dict[str, Known]:
        flow = _Flow(model, channels(model), {})
        for node in model.graph:
            rule = _VALUES.find(node)
            for value, known in zip(node.outputs, rule(flow, node) if rule else (), strict=False):
                if known:
                    flow.values[value.name] = known
        return flow.values

    return model.cached("constant units", compute, for_clones=True)


def padded(node: ir.Node) -> bool:
    """Whether zeros may surround what a convolution or a pool reads."""
    if node.attributes.get_string("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        weight = constant_weight(node) if node.op_type == "Conv" else None
        kernel = node.attributes.get_ints("kernel_shape", () if weight is None else weight.shape[2:])
        return any(k > 1 for k in kernel)
    return any(node.attributes.get_ints("pads", ()))


def along(found: Channels, values: Mapping[str, Known], x: ir.Value, axis: int, count: int) -> np.ndarray:
    """[count] what a tensor is along one axis; NaN where that is not known, or it varies along others too."""
    units, known = found.tensors.get(x.name), values.get(x.name)
    if not known or units.size != units.shape[axis] or units.size != count:
        return np.full(count, np.nan)
    return _numbers(units, known).reshape(-1)


def _numbers(units: np.ndarray, known: Known) -> np.ndarray:
    return np.array([known.get(u, np.nan) for u in units.reshape(-1).tolist()], np.float64).reshape(units.shape)


def _by_unit(units: np.ndarray, numbers: np.ndarray) -> Known:
    """Units of which all numbers are known and the same."""
    units, numbers = units.reshape(-1), np.broadcast_to(numbers, units.shape).reshape(-1)
    found: dict[int, float] = {}
    for unit in np.unique(units[(units >= 0) & ~np.isnan(numbers)]).tolist():
        own = numbers[units == unit]
        if (own == own[0]).all():
            found[unit] = float(own[0])
    return found


@dataclass(frozen=True)
class _Flow:
    """What is known so far."""

    model: Model
    found: Channels
    values: dict[str, Known]

    def of(self, value: ir.Value | None) -> Known:
        return {} if value is None else self.values.get(value.name, {})

    def units(self, value: ir.Value) -> np.ndarray:
        return self.found.tensors.get(value.name, np.full((), -1))


Rule = Callable[[_Flow, ir.Node], list[Known]]
_VALUES: OpTable[Rule] = OpTable("constant units")


@_VALUES.rule("Conv", "Gemm", "MatMul")
def _layer(flow: _Flow, node: ir.Node) -> list[Known]:
    """Outputs whose weights are zero wherever inputs are not known; a known 0 is 0 in padding too."""
    weight, units = constant_weight(node), flow.units(node.outputs[0])
    if weight is None or units.size < 2 or node.attributes.get_int("transA", 0):
        return []
    if node.op_type != "Conv":
        if weight.ndim != 2:
            return []
        weight = weight if output_axis(node, 2) == 0 else weight.T
    taps, groups = tuple(range(2, weight.ndim)), node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    x = along(flow.found, flow.values, node.inputs[0], 1 if node.op_type == "Conv" else -1, inputs)
    if node.op_type == "Conv" and padded(node):
        x = np.where(x == 0, x, np.nan)
    x = np.repeat(x.reshape(groups, -1), outputs // groups, axis=0)  # [N, C / groups] as each output meets them
    weighs = (weight != 0).any(axis=taps)
    known = ~(weighs & np.isnan(x)).any(axis=1)
    if not known.any() or units.size != outputs:
        return []
    try:
        bias = bias_array(flow.model, node, outputs)
    except ValueError:
        return []
    made = (weight.sum(axis=taps, dtype=np.float64) * np.where(weighs, x, 0.0)).sum(axis=1) * alpha(node)
    made = made if bias is None else made + bias
    return [_by_unit(units, np.where(known, made, np.nan).reshape(units.shape))]


@_VALUES.rule("Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
              "Neg", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
              "ThresholdedRelu")  # fmt: skip
def _function(flow: _Flow, node: ir.Node) -> list[Known]:
    known, others = flow.of(node.inputs[0]), [flow.model.constant(v) for v in node.inputs[1:] if v is not None]
    if not known or any(other is None for other in others):
        return []
    numbers = [np.array(list(known.values()), np.float32), *others]
    feeds = dict(zip((v.name for v in node.inputs if v is not None), numbers, strict=True))
    try:
        made = np.asarray(_evaluated(node, feeds, flow.model.opset), np.float64)
    except Exception:  # onnx's reference raises anything where it has no implementation
        return []
    return [{u: y for u, y in zip(known, made.tolist(), strict=True) if np.isfinite(y)}]


def _evaluated(node: ir.Node, feeds: Mapping[str, np.ndarray], opset: int) -> np.ndarray:
    helper, name = onnx.helper, node.outputs[0].name
    kinds = {n: helper.np_dtype_to_tensor_dtype(x.dtype) for n, x in feeds.items()}
    inputs = [helper.make_tensor_value_info(n, kinds[n], x.shape) for n, x in feeds.items()]
    graph = helper.make_graph([ir.to_proto(node)], "f", inputs, [helper.make_empty_tensor_value_info(name)])
    imports = [helper.make_opsetid("", opset)]
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=imports)).run([name], feeds)[0]


_COMBINED = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
}


@_VALUES.rule(*_COMBINED)
def _combined(flow: _Flow, node: ir.Node) -> list[Known]:
    """Two tensors number by number, one of which may be a constant; nothing is left of what is multiplied with 0."""
    units = flow.units(node.outputs[0])
    if len(node.inputs) != 2 or units.size < 2:
        return []
    parts = []
    for value in node.inputs:
        array, known = flow.model.constant(value), flow.of(value)
        part = np.full((), np.nan) if array is None and not known else (
            np.asarray(array, np.float64) if array is not None else _numbers(flow.units(value), known)
        )  # fmt: skip
        try:
            fits = np.broadcast_shapes(part.shape, units.shape) == units.shape
        except ValueError:
            fits = False
        parts.append(part if fits else np.full((), np.nan))
    with np.errstate(all="ignore"):
        made = _COMBINED[node.op_type](*parts)
    if node.op_type == "Mul":
        made = np.where((parts[0] == 0) | (parts[1] == 0), 0.0, made)
    return [_by_unit(units, np.where(np.isfinite(made), made, np.nan))]


@_VALUES.rule("BatchNormalization")
def _norm(flow: _Flow, node: ir.Node) -> list[Known]:
    numbers = [flow.model.constant(v) for v in node.inputs[1:5]]
    if any(each is None for each in numbers) or node.attributes.get_int("training_mode", 0):
        return []
    scale, shift, mean, var = (each.astype(np.float64) for each in numbers)
    x = along(flow.found, flow.values, node.inputs[0], 1, len(scale))
    made = (x - mean) / np.sqrt(var + node.attributes.get_float("epsilon", 1e-5)) * scale + shift
    units = flow.units(node.outputs[0])
    made = np.where(scale == 0, shift, made)
    return [_by_unit(units, made.reshape(units.shape))] if units.size == len(scale) else []


@_VALUES.rule("Concat", "Dropout", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool",
              "ReduceMax", "ReduceMean", "ReduceMin", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
              "Unsqueeze")  # fmt: skip
def _moved(flow: _Flow, node: ir.Node) -> list[Known]:
    """What moves numbers, or takes the mean or an extreme of equal ones, leaves them as they are."""
    known: dict[int, float] = {}
    for value in node.inputs:
        known |= flow.of(value)
    if not known or (node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None):
        return []
    for value in node.inputs:
        if value is not None and value.name in flow.found.tensors:
            own = flow.of(value)
            here = set(np.unique(flow.units(value)).tolist())
            known = {u: c for u, c in known.items() if u not in here or own.get(u) == c}
    return [{u: c for u, c in known.items() if (flow.units(v) == u).any()} for v in node.outputs]


@_VALUES.rule("AveragePool")
def _averaged(flow: _Flow, node: ir.Node) -> list[Known]:
    counted = node.attributes.get_int("count_include_pad", 0) and (
        padded(node) or node.attributes.get_int("ceil_mode", 0)
    )
    return [{u: c for u, c in flow.of(node.inputs[0]).items() if c == 0 or not counted}]


@_VALUES.rule("Pad")
def _surrounded(flow: _Flow, node: ir.Node) -> list[Known]:
    """By zeros, or copies of what is there."""
    known = flow.of(node.inputs[0])
    if node.attributes.get_string("mode", "constant") != "constant":
        return [known]
    given = flow.model.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    none = not node.attributes.get_float("value", 0.0) and (
        len(node.inputs) < 3 or (given is not None and not given.any())
    )
    units = flow.units(node.outputs[0])
    return [{u: c for u, c in known.items() if c == 0 and none and (units == u).any()}]
