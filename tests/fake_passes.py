"""Passes that do as they are told, for tests of what runs passes; and a classifier whose every layer is one class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.cost import Cost
from effc.model import Model
from tests.networks import Net

Change = Callable[[Model, Sequence[Proposal]], None]


@dataclass(frozen=True, init=False)
class Fake(Pass):
    """Does `change` to the model and notes each call in `log`. Not registered: for the manager only."""

    name: ClassVar[str] = "fake"
    macs: float | None = None
    size: float | None = None
    speedup: float | None = None
    energy: float | None = None
    max_drop: float | None = None

    def __init__(
        self,
        change: Change = lambda model, chosen: None,
        log: list | None = None,
        proposals: Sequence[Proposal | Skipped] = (Proposal("graph"),),
        max_drop: float | None = None,
        fewer: Sequence[Sequence[str]] = (),
        **budget: float | None,
    ) -> None:
        own = {"change": change, "log": [] if log is None else log, "proposals": proposals, "fewer": fewer}
        budgets = dict.fromkeys(("macs", "size", "speedup", "energy")) | {"max_drop": max_drop} | budget
        for name, value in (own | budgets).items():
            object.__setattr__(self, name, value)

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        self.log.append(("propose", context.precise))
        yield from self.proposals

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        self.log.append(("rewrite", tuple(p.site for p in chosen), tuple(p.name for p in context.later)))
        self.change(model, chosen)

    def variants(self, model: Model, chosen: Sequence[Proposal], context: Context) -> Iterator[Sequence[Proposal]]:
        """All that was chosen but for the sites named in `fewer`, which has an entry for each variant."""
        for without in self.fewer:
            yield [p for p in chosen if p.site not in without]


@dataclass(frozen=True, init=False)
class Exact(Fake):
    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5


@dataclass(frozen=True, init=False)
class Lossy(Fake):
    name: ClassVar[str] = "lossy"


@dataclass(frozen=True, init=False)
class Paced(Lossy):
    """Says of each MatMul that it can be made to take 0.75, 0.5 or 0.25 of its time and energy, at rising damage.

    A layer's first step costs least, those of later layers cost more.
    """

    name: ClassVar[str] = "paced"

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        for number, node in enumerate(model.nodes("MatMul"), start=1):
            before = context.cost_of(model, [node.name])
            for step, share in enumerate((0.75, 0.5, 0.25), start=1):
                after = replace(before, seconds=share * before.seconds, energy=share * before.energy)
                yield Proposal(node.name, (node.name,), {"share": share}, before, after, (number + 0.1) * step**2)


@dataclass(frozen=True, init=False)
class Recover(Fake):
    name: ClassVar[str] = "recover"
    recovers: ClassVar[bool] = True


def scaled(weight: str, factor: float) -> Change:
    """A change: one weight times a factor."""

    def change(model: Model, chosen: Sequence[Proposal]) -> None:
        value = model.value(weight)
        array = model.constant(value)
        edit.set_initializer(model, value, (array * np.float64(factor)).astype(array.dtype))

    return change


CLASSES = 6
COUNTS = (40, 2, 4, 8, 16, 30)  # samples of each class, of 100: what a class costs when its layer is emptied


def classifier() -> onnx.ModelProto:
    """x [N, 6] one-hot -> logits: the sum over MatMul_i(x, W_i), each of which scores class i alone."""
    net = Net("classifier")
    x = net.input("x", ["N", CLASSES])
    total = ""
    for i in range(CLASSES):
        weight = np.zeros((CLASSES, CLASSES), np.float32)
        weight[i, i] = 1
        y = net.node("MatMul", x, net.weight(f"w{i}", weight), name=f"class{i}")
        total = net.node("Add", total, y, name=f"sum{i}") if i else y
    net.output(total, ["N", CLASSES])
    return net.model()


def samples(order: Sequence[int] | None = None) -> dict:
    """A data spec of 100 one-hot samples that the classifier gets all right.

    Even and odd ones hold each class alike, unless `order` states the labels.
    """
    labels = np.repeat(np.arange(CLASSES), COUNTS) if order is None else np.asarray(order)
    x = np.eye(CLASSES, dtype=np.float32)[labels]
    return {"source": lambda: iter([{"x": x, "y": labels}]), "inputs": {"x": "x"}, "labels": "y", "metric": "top1"}


def emptied(max_drop: float | None = None, damages: Sequence[float] = COUNTS) -> Lossy:
    """A lossy pass that empties the layers it is let. COUNTS[i] of 100 samples then go wrong, but for class 0: of equal
    scores the first is the class."""
    costs = Cost(macs=CLASSES**2), Cost(macs=0)
    proposals = tuple(
        Proposal(f"node_class{i}", (f"node_class{i}",), {"empty": i}, *costs, damage=damages[i]) for i in range(CLASSES)
    )

    def change(model: Model, chosen: Sequence[Proposal]) -> None:
        for p in chosen:
            scaled(f"w{p.setting['empty']}", 0.0)(model, chosen)

    return Lossy(change, max_drop=max_drop, proposals=proposals)
