"""Where a model's time, energy and bytes go on a target: one record a layer, and two models set beside each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from effc.cost import Cost, operand_type
from effc.energy import on_target
from effc.errors import BadInput
from effc.model import Model
from effc.predict import Estimate, Prediction
from effc.target import Target
from effc.traffic import Moved, element_types, traffic

CHANGED, GONE, NEW, SAME = "changed", "gone", "new", "same"
NOT_ANALYSED = "not analysed: "  # so capture's notes begin that repeat what `unknown` says


@dataclass(frozen=True)
class Layer:
    """One node.

    Attributes:
        name, op: of the node.
        shape: of its first output, None where it is not known.
        cost: its own; activations that stay inside of its kernel move no bytes.
        kernel: cost of its whole kernel, nothing where it has none of its own.
        operands: type of the numbers that its kernel multiplies.
        intensity: multiply-accumulates a byte moved, of its whole kernel; None where it has none of its own.
        roofline: seconds that its kernel takes at the target's peaks.
        predicted: time of its kernel; None where it has no kernel of its own.
        share: of the model's predicted time.
        fused_into: leading node of the kernel that it became part of.
        fuses: operators of the nodes that became part of its kernel.
    """

    name: str
    op: str
    shape: tuple[int | str | None, ...] | None
    cost: Cost
    kernel: Cost = field(default_factory=Cost)
    operands: str = "float32"
    intensity: float | None = None
    roofline: float | None = None
    predicted: Estimate | None = None
    share: float | None = None
    fused_into: str | None = None
    fuses: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Predicted time, 0 where it has none of its own."""
        return 0.0 if self.predicted is None else self.predicted.seconds


@dataclass(frozen=True)
class Added:
    """What the runtime adds to the model's own nodes: a change of layout, a conversion, its own start."""

    name: str
    predicted: Estimate
    share: float


@dataclass(frozen=True)
class Inspection:
    """A model on a target.

    Attributes:
        model, target, origin: names, and whether the target's figures are "measured" or "published".
        batch, threads: at which all this holds.
        total: sum over the layers; its seconds are those of a whole inference.
        intensity: multiply-accumulates a byte moved.
        roofline: seconds of a whole inference at the target's peaks.
        predicted: time of a whole inference.
        layers: those that take most time first; nodes fused into others last.
        added: by the runtime, most time first.
        unknown: node -> why its cost is not known. The totals lack it.
        notes: what else is worth telling, one sentence each.
    """

    model: str
    target: str
    origin: str
    batch: int
    threads: int
    total: Cost
    intensity: float | None
    roofline: float
    predicted: Estimate
    layers: tuple[Layer, ...]
    added: tuple[Added, ...]
    unknown: Mapping[str, str]
    notes: tuple[str, ...]


def stated_batch(model: Model, batch: int | None, dims: Mapping[str, int]) -> int:
    """The batch to look at: the one given, else the model's own, else 1.

    Raises:
        BadInput: the model's batch is fixed at another size, a dimension has no size, or `dims` names one that is none.
    """
    if batch is not None and model.batch not in (None, batch):
        raise BadInput(f"the model's batch is fixed at {model.batch}; it cannot be inspected at --batch {batch}")
    symbols = {d: axis for info in model.inputs for axis, d in enumerate(info.shape or ()) if isinstance(d, str)}
    if strange := sorted(set(dims) - set(symbols)):
        there = (
            f"its dynamic dimensions are {', '.join(sorted(symbols))}" if symbols else "all its dimensions are fixed"
        )
        raise BadInput(f"the model has no dimension {strange[0]!r}; {there}")
    firsts = {info.shape[0] for info in model.inputs if info.shape}
    if open_ones := sorted(set(symbols) - firsts - set(dims)):
        raise BadInput(f"the dimension {open_ones[0]!r} is dynamic: state it with --dim {open_ones[0]}=value")
    first = next((info.shape[0] for info in model.inputs if info.shape), None)
    named = dims.get(first) if isinstance(first, str) else None
    if None not in (batch, named) and batch != named:
        raise BadInput(f"--dim {first}={named} and --batch {batch} give the batch two sizes; give one of them")
    return batch or named or model.batch or 1


def inspect(
    model: Model,
    target: Target,
    prediction: Prediction,
    *,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    threads: int = 1,
) -> Inspection:
    """Set the cost of each layer beside what the target takes for it.

    Args:
        prediction: of this model, target, batch and number of threads (`effc.predict.predict`).
    """
    costs = on_target(model, target, batch=batch, dims=dims, prediction=prediction)
    shapes, types = model.shapes(batch, dims), element_types(model)
    moved = traffic(model, batch, dims, prediction.fused)
    members: dict[str, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        members[prediction.fused.get(node.name) or node.name].append(node)
    whole = prediction.total.seconds
    roof = target.roof(threads)
    layers = []
    for node in model.graph:
        own = costs.nodes[node.name]
        shape = shapes.get(node.outputs[0].name) if node.outputs else None
        leader = prediction.fused.get(node.name) or None  # "" is a node of which nothing is left
        estimate = None if leader else prediction.nodes.get(node.name)
        nodes = [] if leader else members[node.name]
        kernel = sum((costs.nodes[n.name] for n in nodes), Cost())
        if estimate is None:
            layers.append(Layer(node.name, node.op_type, shape, own, kernel, fused_into=leader))
            continue
        moved_bytes = _bytes(moved[n.name] for n in nodes)
        operands = operand_type(node, types)
        layer = Layer(
            node.name,
            node.op_type,
            shape,
            own,
            kernel,
            operands=operands,
            intensity=_over(kernel.macs, moved_bytes),
            roofline=roof.seconds(kernel.macs, moved_bytes, operands),
            predicted=estimate,
            share=_over(estimate.seconds, whole),
            fuses=tuple(n.op_type for n in nodes if n is not node),
        )
        layers.append(layer)
    return Inspection(
        model=model.name,
        target=target.name,
        origin=target.origin,
        batch=batch,
        threads=threads,
        total=costs.total,
        intensity=_over(costs.total.macs, _bytes(moved.values())),
        roofline=sum(layer.roofline or 0.0 for layer in layers) + roof.run_overhead,
        predicted=prediction.total,
        layers=tuple(sorted(layers, key=_place)),
        added=tuple(_added(prediction)),
        unknown=costs.unknown,
        notes=tuple(_notes(model, target, prediction, threads)),
    )


def _bytes(moved: Iterable[Moved]) -> int:
    return sum(m.total for m in moved)


def _over(a: float, b: float) -> float | None:
    return a / b if b else None


def _place(layer: Layer) -> tuple[bool, bool, float]:
    return layer.fused_into is not None, layer.predicted is None, -layer.seconds


def _added(prediction: Prediction) -> list[Added]:
    whole = prediction.total.seconds
    found = dict(prediction.moved)
    rest = whole - sum(e.seconds for e in (*prediction.nodes.values(), *found.values()))
    if rest > 1e-6 * whole:  # more than rounding
        found["run overhead"] = Estimate(rest, prediction.total.error, prediction.total.basis)
    rows = [Added(name, e, _over(e.seconds, whole) or 0.0) for name, e in found.items()]
    return sorted(rows, key=lambda row: -row.predicted.seconds)


def _notes(model: Model, target: Target, prediction: Prediction, threads: int) -> list[str]:
    notes = [f"target {target.name}: {target.origin} figures" + (f", {target.source}" if target.source else "")]
    if target.remark:
        notes.append(target.remark)
    if threads not in target.roofs:
        known = ", ".join(map(str, sorted(target.roofs)))
        notes.append(f"the target knows {known} threads: the roofline of {threads} is that of the next of these below")
    notes += prediction.notes
    return notes + [note for note in model.notes if not note.startswith(NOT_ANALYSED)]


def grouped(unknown: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the nodes that it holds for."""
    nodes: dict[str, list[str]] = defaultdict(list)
    for name, reason in unknown.items():
        nodes[reason].append(name)
    return nodes


@dataclass(frozen=True)
class Total:
    """One quantity of two models; `unit` is SI, "" for counts."""

    name: str
    unit: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        return _over(self.b, self.a)


@dataclass(frozen=True)
class Pair:
    """A layer in two models, matched by name.

    Attributes:
        status: "changed", "gone" from the second model, "new" there, or the "same".
        seconds: predicted time in the second less that in the first.
    """

    name: str
    status: str
    a: Layer | None
    b: Layer | None
    seconds: float

    @property
    def macs(self) -> int:
        """Multiply-accumulates in the second less those in the first."""
        return (self.b.kernel.macs if self.b else 0) - (self.a.kernel.macs if self.a else 0)


@dataclass(frozen=True)
class Comparison:
    """Two models on one target; layers with the largest difference in predicted time first."""

    a: Inspection
    b: Inspection
    totals: tuple[Total, ...]
    layers: tuple[Pair, ...]


def compare(a: Inspection, b: Inspection) -> Comparison:
    """Set two models side by side."""
    totals = [
        Total("predicted", "s", a.predicted.seconds, b.predicted.seconds),
        Total("roofline", "s", a.roofline, b.roofline),
        Total("energy", "J", a.total.energy, b.total.energy),
        Total("MACs", "", a.total.macs, b.total.macs),
        Total("parameters", "", a.total.parameters, b.total.parameters),
        Total("weights", "B", a.total.weight_bytes, b.total.weight_bytes),
        Total("activations", "B", a.total.activation_bytes, b.total.activation_bytes),
        Total("nodes", "", len(a.layers), len(b.layers)),
    ]
    return Comparison(a, b, tuple(totals), tuple(_pairs(a.layers, b.layers)))


def _pairs(first: Sequence[Layer], second: Sequence[Layer]) -> list[Pair]:
    before, after = ({layer.name: layer for layer in layers} for layers in (first, second))
    pairs = []
    for name in dict.fromkeys((*before, *after)):
        a, b = before.get(name), after.get(name)
        status = NEW if a is None else GONE if b is None else SAME if _alike(a, b) else CHANGED
        pairs.append(Pair(name, status, a, b, (b.seconds if b else 0.0) - (a.seconds if a else 0.0)))
    return sorted(pairs, key=lambda pair: (-abs(pair.seconds), -abs(pair.macs), pair.status == SAME))


def _alike(a: Layer, b: Layer) -> bool:
    """What a user would call the same layer: shares of a whole that has changed do not count."""
    return all(
        getattr(a, key) == getattr(b, key)
        for key in ("op", "shape", "cost", "kernel", "operands", "fused_into", "fuses")
    )
