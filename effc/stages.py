"""A recipe as stages: what the guard judges as one, and what carrying one out has made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from effc.choose import ACCURACY, JUDGED_BY
from effc.contract import Pass, Proposal, Repeat
from effc.history import KEPT, PassRecord, compose
from effc.model import Model

Offer = tuple[list[Proposal], dict[str, str]]


@dataclass
class Stage:
    """Consecutive passes that are kept or undone together."""

    passes: list[Pass]

    @property
    def lossy(self) -> bool:
        return any(not step.exact for step in self.passes)

    @property
    def searchable(self) -> bool:
        """One lossy pass and nothing that trains: its rewrites can be given up one by one to hold a limit."""
        return len(self.passes) == 1 and self.lossy and not self.only_recovers

    @property
    def spends_damage(self) -> bool:
        """One pass that stops when so much damage is done, and by no other budget: it can do more or less."""
        return self.searchable and "damage" in self.passes[0].budget() and not self.goals

    @property
    def only_recovers(self) -> bool:
        """It makes nothing cheaper, and is there for accuracy alone."""
        return all(step.recovers for step in self.passes)

    @property
    def goals(self) -> tuple[str, ...]:
        """What its passes say that it is judged by, by their budgets or by kind, each once; empty where they do not."""
        if self.only_recovers:
            return (ACCURACY,)
        budgets = (name for step in self.passes for name in step.budget())
        stated = tuple(dict.fromkeys(JUDGED_BY[name] for name in budgets if name in JUDGED_BY))
        kinds = [step.judged_by for step in self.passes if not step.recovers and not step.exact]
        return stated or (() if None in kinds else tuple(dict.fromkeys(kind for kind in kinds if kind is not None)))


@dataclass
class Attempt:
    """A stage carried out on a clone, as far as it has come.

    Attributes:
        node_map: node before -> nodes now.
        chosen: proposals that were made, pass by pass.
        offered: all there were, and site -> why there is none, pass by pass.
    """

    model: Model
    records: list[PassRecord]
    node_map: dict[str, tuple[str, ...]]
    chosen: list[list[Proposal]]
    offered: list[Offer]

    def after(
        self, model: Model, record: PassRecord, node_map: Mapping[str, tuple[str, ...]], chosen: list[Proposal],
        offered: Offer,
    ) -> Attempt:  # fmt: skip
        """With one pass more."""
        ways = compose(self.node_map, node_map)
        return Attempt(model, [*self.records, record], ways, [*self.chosen, chosen], [*self.offered, offered])

    @property
    def changed(self) -> bool:
        return any(record.status == KEPT for record in self.records)


def stages(passes: Sequence[Pass]) -> list[Stage]:
    """Split a recipe into what the guard judges as one."""
    planned: list[Stage] = []
    steps = list(passes)
    while steps:
        step = steps.pop(0)
        if isinstance(step, Repeat):
            planned.append(Stage(list(_unrolled([step]))))
            continue
        own = [step]
        if not step.exact and not step.recovers:
            until = next((i for i, s in enumerate(steps) if _recovers(s)), None)
            if until is not None:
                own += _unrolled(steps[: until + 1])
                del steps[: until + 1]
        planned.append(Stage(own))
    return planned


def _recovers(step: Pass) -> bool:
    return step.recovers or (isinstance(step, Repeat) and any(map(_recovers, step.passes)))


def _unrolled(passes: Sequence[Pass]) -> Iterator[Pass]:
    for step in passes:
        if isinstance(step, Repeat):
            for _ in range(step.steps):
                yield from _unrolled(step.passes)
        else:
            yield step
