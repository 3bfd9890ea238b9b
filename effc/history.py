"""What was done to a model: one record from which the console, the JSON, the HTML page and a replay all come."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from pydantic import TypeAdapter, ValidationError

from effc.choose import GOALS, known
from effc.contract import Pass, Proposal
from effc.cost import Cost
from effc.edit import origin_of
from effc.errors import BadInput
from effc.evaluate import Score
from effc.measure import Latency
from effc.model import Model, constant_tensor
from effc.predict import MEASURED, Prediction

KEPT, UNDONE, UNCHANGED = "kept", "undone", "unchanged"
NO_GAIN = "predicted not to pay"  # so the reason for leaving a node alone begins; then come the figures
SURE = 2.0  # standard deviations


@dataclass(frozen=True)
class NodeRecord:
    """What a pass did to one node of the model before it.

    Attributes:
        status: "changed" (also: gone, when `to` is empty) or "skipped".
        to: names of the nodes that stand in its place.
        setting, gain, damage: of the proposal that changed it; gain as what -> (before, after), predicted.
        reason: why it was skipped.
    """

    node: str
    op: str
    status: str
    to: tuple[str, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)
    gain: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    damage: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Accuracy:
    """A metric on evaluation data; `points` is 100 x for top1, top5 and agreement, else the metric's own unit.

    A metric that is infinite for the original against itself (sqnr) has no drop, and no points there.
    """

    metric: str
    points: float | None
    samples: int
    drop: float | None
    agreement: float | None
    damage: float | None

    @classmethod
    def of(cls, score: Score, original: Score) -> Accuracy:
        sign = 1 if score.higher_is_better else -1
        points = score.points if math.isfinite(score.points) else None
        drop = sign * (original.points - score.points) + 0.0 if math.isfinite(original.points) else None
        damage = score.damage if math.isfinite(score.damage) else None
        return cls(score.metric, points, score.samples, drop, score.agreement, damage)


@dataclass(frozen=True)
class Predicted:
    """Latency of a model (after) beside that of another (before) as predicted for the target.

    Attributes:
        before_ms, after_ms: of one inference of the whole batch, in milliseconds.
        ratio: after / before; below 1 is faster.
        error: one standard deviation of the ratio. Errors of kernels that are the same in both cancel.
        basis: "measured" kernels in both, or the "roofline", a lower bound that says little about ratios.
    """

    before_ms: float
    after_ms: float
    ratio: float
    error: float
    basis: str

    @classmethod
    def of(cls, before: Prediction, after: Prediction) -> Predicted:
        """Set two predictions beside each other.

        What is taken away and what is added is as uncertain as its kind of kernel; kinds are independent.
        """
        a, b = before.total, after.total
        whole, ratio = a.seconds or 1.0, b.seconds / a.seconds if a.seconds else 1.0
        if before.parts or after.parts:
            none = (0.0, 0.0)
            pairs = [(before.parts.get(k, none), after.parts.get(k, none)) for k in {**before.parts, **after.parts}]
            error = math.sqrt(sum(((now - was) * max(e, f)) ** 2 for (was, e), (now, f) in pairs)) / whole
        else:
            error = ratio * math.hypot(a.error, b.error)
        basis = a.basis if a.basis != MEASURED else b.basis
        return cls(1e3 * float(a.seconds), 1e3 * float(b.seconds), float(ratio), float(error), basis)

    @property
    def measured(self) -> bool:
        """Whether both rest on measured kernels."""
        return self.basis == MEASURED

    @property
    def slower(self) -> bool:
        """Beyond doubt."""
        return self.measured and self.ratio - SURE * self.error > 1

    @property
    def sure(self) -> bool:
        """Whether the ratio is on one side of 1 beyond doubt."""
        return self.measured and abs(self.ratio - 1) > SURE * self.error

    def describe(self) -> str:
        """One clause for a report."""
        text = f"{self.after_ms:.3f} ms against {self.before_ms:.3f} ms, {self.ratio:.2f}x"
        return f"{text} +- {self.error:.2f}" if self.measured else f"{text} by the {self.basis} alone"


@dataclass
class PassRecord:
    """One pass: what it was asked, what it chose, what became of every node.

    Energy and seconds of `cost_before` and `cost_after` are predicted at the ends of stages; they are 0 elsewhere.
    """

    name: str
    recipe: str
    exact: bool
    status: str = KEPT
    reason: str = ""
    chosen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    ledger: list[NodeRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cost_before: Cost = field(default_factory=Cost)
    cost_after: Cost = field(default_factory=Cost)
    drift: float | None = None
    seconds: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        return Counter(entry.status for entry in self.ledger)

    @property
    def skip_reasons(self) -> Counter[str]:
        return Counter(entry.reason for entry in self.ledger if entry.status == "skipped")


@dataclass
class StageRecord:
    """What the guard judges as one: a lossy pass up to and including the next that recovers, else one pass.

    Attributes:
        cause: in a word what undid it: "deployment", "prediction", "accuracy" or "goal".
        latency, predicted: of the model after beside that before, measured and predicted.
        goals: what it was judged by: "latency", "size", "energy", "macs", "accuracy", "compressed size".
    """

    passes: list[PassRecord]
    status: str = KEPT
    cause: str = ""
    reason: str = ""
    latency: Latency | None = None
    accuracy: Accuracy | None = None
    unproven: list[str] = field(default_factory=list)
    predicted: Predicted | None = None
    goals: tuple[str, ...] = ()


@dataclass
class Snapshot:
    """A model in numbers. Size is that of the file in bytes; energy and seconds of the cost are predicted."""

    cost: Cost
    size: int
    nodes: int
    accuracy: Accuracy | None = None


@dataclass
class History:
    """Everything a report says. `origin` tells "measured" figures of the target from "published" ones."""

    model: str
    recipe: str
    target: str
    goal: str
    batch: int
    threads: int
    seed: int
    versions: dict[str, str]
    data: dict[str, str]
    original: Snapshot
    final: Snapshot
    stages: list[StageRecord] = field(default_factory=list)
    latency: Latency | None = None
    node_map: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)
    fell_back: dict[str, str] = field(default_factory=dict)
    deployed_difference: float | None = None
    notes: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    seconds: float = 0.0
    origin: str = ""
    predicted: Predicted | None = None

    @property
    def passes(self) -> list[PassRecord]:
        return [record for stage in self.stages for record in stage.passes]

    @property
    def changed(self) -> bool:
        """Whether anything of what was done was kept."""
        return any(record.status == KEPT for record in self.passes)

    def to_json(self) -> str:
        return _adapter().dump_json(self, indent=1).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> History:
        """Read a report back. Raises BadInput."""
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BadInput(f"this is no report of effc: {place}: {first['msg']}") from error


def _adapter() -> TypeAdapter[History]:
    return TypeAdapter(History)


def ledger(
    before: Model, after: Model, chosen: Sequence[Proposal], skipped: Mapping[str, str], step: Pass
) -> list[NodeRecord]:
    """What became of every node: found by comparing the graphs, told with the words of the proposals and refusals."""
    heirs: dict[str, list[str]] = {}
    now = {}
    for node in after.graph:
        now[node.name] = node
        for name in origin_of(node):
            heirs.setdefault(name, []).append(node.name)
    proposal_of = {name: p for p in chosen for name in p.nodes}
    unanalysed = before.not_analysed()
    records = []
    for node in before.graph:
        to = tuple(heirs.get(node.name, ()))
        if to == (node.name,) and _signature(node) == _signature(now[node.name]):
            reason = skipped.get(node.name) or unanalysed.get(node.name) or f"nothing for {step.name} to do"
            records.append(NodeRecord(node.name, node.op_type, "skipped", reason=reason))
            continue
        p = proposal_of.get(node.name)
        if p is None:
            records.append(NodeRecord(node.name, node.op_type, "changed", to))
        else:
            records.append(NodeRecord(node.name, node.op_type, "changed", to, dict(p.setting), _gain(p), p.damage))
    return records


def _signature(node: ir.Node) -> tuple:
    """Operator, attributes and weights. Names of activations do not count: a neighbour's change is not the node's."""
    # A clone shares tensors and attributes with its source, so identity tells whether they were exchanged.
    tensors = (constant_tensor(v) for v in node.inputs)
    weights = tuple(None if t is None else id(t) for t in tensors)
    attributes = tuple(sorted((k, _plain(a)) for k, a in node.attributes.items()))
    return node.domain, node.op_type, attributes, weights, len(node.outputs)


def _plain(attribute: ir.Attr) -> str:
    simple = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS)
    if attribute.is_ref() or attribute.type in (*simple, ir.AttributeType.STRING, ir.AttributeType.STRINGS):
        return repr(attribute.value)
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "graph"
    return str(id(attribute.value))


def _gain(p: Proposal) -> dict[str, tuple[float, float]]:
    if p.before is None or p.after is None:
        return {}
    pairs = {q: (getattr(p.before, q), getattr(p.after, q)) for q in GOALS.values() if known(p, q)}
    return {quantity: pair for quantity, pair in pairs.items() if pair[0] != pair[1]}


def compose(first: Mapping[str, Sequence[str]], then: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Old-to-new node names over two rewrites."""
    return {
        old: tuple(dict.fromkeys(final for middle in middles for final in then.get(middle, ())))
        for old, middles in first.items()
    }
