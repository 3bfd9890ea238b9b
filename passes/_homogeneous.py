"""Which channels can be scaled, and where: f(s x) = s f(x) holds for all that stands between the layers.

Units are followed as in `effc.channels`, with one difference: a depthwise convolution makes new ones, as what it gives
can have another scale than what it gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.channel_trace import Trace, follow, laid
from effc.channels import Place
from effc.model import STANDARD_DOMAINS, Model, constant_tensor
from effc.placement import clip_bounds

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SUMS = ("Add", "Sub", "Sum", "Max", "Min", "Mean")
# x -> f(x) with f(s x) = s f(x) for s > 0, channel by channel
SINGLE = ("Relu", "LeakyRelu", "Identity", "Dropout", "Abs", "Neg", "MaxPool", "AveragePool", "GlobalAveragePool",
          "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceMin", "Resize", "Upsample", "Transpose", "Reshape",
          "Flatten", "Squeeze", "Unsqueeze", "Expand", "Concat", "Split", "Slice", "Gather", "Shape",
          "Size")  # fmt: skip


@dataclass(frozen=True)
class Scalable:
    """Units that may be scaled by any positive number, each by its own.

    Attributes:
        tensors: name of an activation -> (axis, unit of each index along it).
        places: where a weight is multiplied by the units' scales, or divided where it reads them.
        fixed: units that must stay, with the reason.
        bounds: unit -> (tensor before a Clip, its upper bound): it must stay below in both scales.
    """

    tensors: Mapping[str, tuple[int, np.ndarray]]
    places: Mapping[Place, np.ndarray]
    fixed: Mapping[int, str]
    bounds: Mapping[int, tuple[tuple[str, float], ...]]

    def places_of(self, weight: str) -> list[int]:
        """The units that a weight makes."""
        made = [units for place, units in self.places.items() if place.weight == weight and not place.reads]
        return np.unique(np.concatenate(made)).tolist() if made else []


def scalable(model: Model) -> Scalable:
    """The units of a model's main graph."""
    trace = Trace(model)
    reads: dict[Place, np.ndarray] = {}
    clips: list[tuple[str, float, np.ndarray]] = []
    for node in model.graph:
        if _depthwise(node):
            _follow_depthwise(trace, node, reads)
        else:
            follow(trace, node)
            if node.op_type == "Gemm" and _adds_unseen(trace, node):
                trace.pin(trace.of(node.outputs[0]), f"Gemm {node.name!r} adds what is no bias of its own")
            if obstacle := _obstacle(node):
                for value in node.inputs:
                    trace.pin(trace.of(value), obstacle)
            elif node.op_type == "Clip" and clip_bounds(node)[1] is not None:
                clips.append((node.inputs[0].name, clip_bounds(node)[1], trace.of(node.inputs[0])))
    for value in model.graph.outputs:
        trace.pin(trace.of(value), f"{value.name!r} is an output of the model")
    for name, units in trace.tensors.items():
        if sum(length > 1 for length in units.shape) > 1:
            trace.pin(units, f"{name!r} holds it along two axes")
    places = {Place(*key): units for key, units in trace.weights.items()} | reads
    _pin_others(model, trace, places)
    names, pinned = trace.united()
    tensors = {name: names[units] for name, units in trace.tensors.items() if (units >= 0).any()}
    bounds: dict[int, tuple[tuple[str, float], ...]] = {}
    for name, high, units in clips:
        for unit in np.unique(names[units[units >= 0]]).tolist():
            bounds[unit] = (*bounds.get(unit, ()), (name, high))
    return Scalable(
        {name: _line(units) for name, units in tensors.items()},
        {place: names[units] for place, units in places.items() if (units >= 0).any()},
        pinned,
        bounds,
    )


def _line(units: np.ndarray) -> tuple[int, np.ndarray]:
    axes = [axis for axis, length in enumerate(units.shape) if length > 1]
    return (axes[0] if axes else min(1, units.ndim - 1)), units.reshape(-1)


def _depthwise(node: ir.Node) -> bool:
    if node.op_type != "Conv" or node.domain not in STANDARD_DOMAINS or not node.inputs[1].is_initializer():
        return False
    shape = node.inputs[1].shape
    return node.attributes.get_int("group", 1) > 1 and shape is not None and shape[1] == 1


def _follow_depthwise(trace: Trace, node: ir.Node, reads: dict[Place, np.ndarray]) -> None:
    x, weight, *rest = node.inputs
    shape, inputs = trace.shape(weight), trace.of(x)
    groups = node.attributes.get_int("group", 1)
    if inputs.ndim < 2 or inputs.size != groups or inputs.shape[1] != groups:
        trace.pin(inputs, f"Conv {node.name!r} reads units along several axes")
    else:
        units = np.repeat(inputs.reshape(-1), shape[0] // groups)
        known = reads.setdefault(Place(weight.name, 0, True), units)
        trace.meet(known, units, f"{weight.name!r} is read by several nodes")
    made = trace.made(weight, 0, shape[0])
    if rest and rest[0] is not None:
        trace.weigh(rest[0], 0, made)
    trace.tensors[node.outputs[0].name] = laid(made, 1, len(shape))


def _adds_unseen(trace: Trace, node: ir.Node) -> bool:
    """Whether a Gemm's third operand is something else than one number for each output."""
    added = node.inputs[2] if len(node.inputs) > 2 else None
    return added is not None and not any(name == added.name for name, *_ in trace.weights)


def _obstacle(node: ir.Node) -> str | None:
    """Why what a node reads cannot be scaled, or None."""
    told = f"{node.op_type} {node.name!r}"
    if node.domain not in STANDARD_DOMAINS:
        return f"{told} is not understood"
    if node.op_type in LAYERS:
        return None if node.inputs[1].is_initializer() else f"{told} has no constant weight"
    if node.op_type in SUMS:
        constants = [constant_tensor(v) for v in node.inputs]
        lone = [t for t in constants if t is not None and t.size == 1 and np.any(t.numpy())]
        return f"{told} combines it with one number for all channels" if lone else None
    if node.op_type == "Clip":
        low = clip_bounds(node)[0]
        return None if low in (None, 0.0) or low == -np.inf else f"{told} cuts off at {low:g}"
    if node.op_type == "Pad":
        value = constant_tensor(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        zero = len(node.inputs) < 3 or node.inputs[2] is None or (value is not None and not np.any(value.numpy()))
        return (
            None if zero and not node.attributes.get_float("value", 0.0) else f"{told} adds a border that is not zero"
        )
    return None if node.op_type in SINGLE else f"{told} is no scaling of what it reads"


def _pin_others(model: Model, trace: Trace, places: Mapping[Place, np.ndarray]) -> None:
    """Weights that somebody else reads as well, or that are no float32."""
    for place, units in places.items():
        value = model.graph.initializers[place.weight]
        others = [n for n in value.consumers() if n.op_type not in (*LAYERS, *SUMS) or n.graph is not model.graph]
        if others or value.dtype != ir.DataType.FLOAT or value.is_graph_output():
            trace.pin(units, f"{place.weight!r} is read by others or is not float32")


def components(found: Scalable) -> Iterator[np.ndarray]:
    """Free units that share tensors, together, in the model's order."""
    last: dict[int, int] = {}

    def root(unit: int) -> int:
        while last.setdefault(unit, unit) != unit:
            last[unit] = unit = last[last[unit]]
        return unit

    for _, units in found.tensors.values():
        free = [u for u in dict.fromkeys(units.tolist()) if u >= 0 and u not in found.fixed]
        for unit in free[1:]:
            last[root(unit)] = root(free[0])
        if free:
            root(free[0])
    groups: dict[int, list[int]] = {}
    for unit in last:
        groups.setdefault(root(unit), []).append(unit)
    yield from (np.array(sorted(units)) for units in groups.values())
