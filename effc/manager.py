"""The pass manager: runs a recipe stage by stage, holds each to its promises, and keeps the record.

A stage is what the guard judges as one: a lossy pass up to and including the next that recovers, else a single pass.
A stage works on a clone; it is kept when it is right, accurate enough and pays, else the clone is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from effc import edit
from effc.choose import by_worth, choose
from effc.contract import Context, Pass, Proposal, Repeat, Skipped
from effc.cost import cost
from effc.errors import BadInput, EffcError, InvalidModel, PassFailed
from effc.guard import Guard
from effc.history import KEPT, UNCHANGED, UNDONE, PassRecord, StageRecord, compose, ledger
from effc.model import Model
from effc.recipe import describe, format_calls
from effc.verify import drift, verify


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
        return len(self.passes) == 1 and self.lossy


@dataclass
class Attempt:
    """A stage carried out on a clone."""

    model: Model
    records: list[PassRecord]
    node_map: dict[str, tuple[str, ...]]
    chosen: list[list[Proposal]]

    @property
    def changed(self) -> bool:
        return any(record.status == KEPT for record in self.records)


@dataclass
class Outcome:
    """What a recipe made of a model."""

    model: Model
    stages: list[StageRecord] = field(default_factory=list)
    node_map: dict[str, tuple[str, ...]] = field(default_factory=dict)


class PassManager:
    """Runs passes over a model.

    Args:
        context: what passes may ask for.
        guard: judges each stage.
        replay: choices of an earlier run (stage by stage, from its report); nothing is judged again.
    """

    def __init__(self, context: Context, guard: Guard, replay: Sequence[StageRecord] | None = None) -> None:
        self.context = context
        self.guard = guard
        self.replay = replay

    def run(self, model: Model, passes: Sequence[Pass]) -> Outcome:
        """Carry out a recipe. The model given is never changed.

        Raises:
            BadInput: a pass lacks something only the user can give.
            PassFailed: a pass broke its contract; the message names it.
        """
        outcome = Outcome(model, node_map={node.name: (node.name,) for node in model.graph})
        planned = stages(passes)
        if self.replay is not None and len(self.replay) != len(planned):
            raise BadInput(f"the report to replay has {len(self.replay)} stages, the recipe {len(planned)}")
        remaining = [step for stage in planned for step in stage.passes]
        for number, stage in enumerate(planned):
            remaining = remaining[len(stage.passes) :]
            self.context.later = tuple(remaining)
            attempt, record = self._stage(stage, outcome.model, number)
            outcome.stages.append(record)
            if record.status == KEPT:
                outcome.model = attempt.model
                outcome.node_map = compose(outcome.node_map, attempt.node_map)
        return outcome

    def _stage(self, stage: Stage, before: Model, number: int) -> tuple[Attempt, StageRecord]:
        if self.replay is not None:
            return self._replayed(stage, before, self.replay[number])
        attempt = self._attempt(stage, before)
        record = StageRecord(attempt.records)
        if not attempt.changed:
            record.status = UNCHANGED
            return attempt, record
        limit = self._limit(stage)
        self.guard.judge(record, before, attempt.model, stage.lossy, limit)
        if record.cause == "accuracy" and stage.searchable and limit is not None:
            attempt, record = self._search(stage, before, attempt, record, limit)
        if record.status == UNDONE:
            for step in record.passes:
                step.status, step.reason = UNDONE, step.reason or record.reason
        return attempt, record

    def _limit(self, stage: Stage) -> float | None:
        """Points that the stage may lose in all, from the original: the user's limit or a pass's own, if stricter."""
        own = [step.budget()["max_drop"] for step in stage.passes if "max_drop" in step.budget()]
        if own and self.guard.evaluation is None:
            raise BadInput("max_drop needs evaluation data: give --evaluate SPEC (Python: evaluate=...)")
        return min([*own, *([] if self.guard.max_drop is None else [self.guard.max_drop])], default=None)

    def _search(
        self, stage: Stage, before: Model, full: Attempt, failed: StageRecord, limit: float
    ) -> tuple[Attempt, StageRecord]:
        """Give rewrites up, worst trade of damage for gain first, until the limit holds on data kept for choosing.

        Bisection assumes that the drop grows with the number of rewrites, which holds but for noise. What it finds is
        then judged on all evaluation data; when it fails there, half as many rewrites are tried, and so on.
        """
        step = stage.passes[0]
        self.context.precise = True
        try:
            again, skipped = self._proposals(step, before)
        finally:
            self.context.precise = False
        wanted = {(p.site, _key(p)) for p in full.chosen[0]}
        order = by_worth([p for p in again if (p.site, _key(p)) in wanted], self.guard.quantity)
        low, high = 0, len(order)
        attempt, record = full, failed
        while high - low > 1:
            middle = (low + high) // 2
            candidate = self._attempt(stage, before, [order[:middle]], skipped)
            if self.guard.drop(candidate.model, choosing=True) <= limit:
                low = middle
            else:
                high = middle
        looks = 1
        while low:
            attempt = self._attempt(stage, before, [order[:low]], skipped)
            record = StageRecord(attempt.records)
            looks += 1
            self.guard.judge(record, before, attempt.model, True, limit)
            if record.cause != "accuracy":
                break
            low //= 2
        note = (
            f"{len(order) - low} of {len(order)} rewrites were given up to hold a drop of {limit:g} points; chosen on"
            f" {self.guard.choosing_samples} samples, judged {looks} times on all evaluation samples"
        )
        for entry in record.passes:
            entry.notes.append(note)
        if record is not failed:
            given_up = {name: p for p in order[low:] for name in p.nodes}
            self._explain(record.passes[0], given_up, limit)
        return attempt, record

    @staticmethod
    def _explain(record: PassRecord, given_up: Mapping[str, Proposal], limit: float) -> None:
        record.ledger = [
            replace(entry, reason=f"given up to hold a drop of {limit:g} points", damage=given_up[entry.node].damage)
            if entry.status == "skipped" and entry.node in given_up
            else entry
            for entry in record.ledger
        ]

    def _replayed(self, stage: Stage, before: Model, told: StageRecord) -> tuple[Attempt, StageRecord]:
        names = [step.name for step in stage.passes]
        if names != [record.name for record in told.passes]:
            raise BadInput(f"the report to replay ran {[r.name for r in told.passes]} where the recipe has {names}")
        if told.status != KEPT:
            return Attempt(before, told.passes, {}, []), told
        chosen = [[Proposal(site, setting=setting) for site, setting in record.chosen] for record in told.passes]
        attempt = self._attempt(stage, before, chosen)
        record = StageRecord(attempt.records, KEPT, "", "replayed", told.latency, told.accuracy)
        return attempt, record

    def _attempt(
        self,
        stage: Stage,
        before: Model,
        chosen: Sequence[Sequence[Proposal]] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> Attempt:
        """Carry a stage out; `chosen` says what to do, pass by pass, in place of proposing and choosing."""
        model = before
        node_map = {node.name: (node.name,) for node in before.graph}
        records, done = [], []
        for number, step in enumerate(stage.passes):
            given = None if chosen is None else list(chosen[number])
            model, record, own, taken = self.apply(step, model, given, skipped)
            node_map = compose(node_map, own)
            records.append(record)
            done.append(taken)
        return Attempt(model, records, node_map, done)

    def _proposals(self, step: Pass, model: Model) -> tuple[list[Proposal], dict[str, str]]:
        proposals, skipped = [], {}
        for item in step.propose(model, self.context):
            if isinstance(item, Skipped):
                skipped[item.site] = item.reason
            else:
                proposals.append(item)
        return proposals, skipped

    def apply(
        self,
        step: Pass,
        model: Model,
        chosen: list[Proposal] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> tuple[Model, PassRecord, dict[str, tuple[str, ...]], list[Proposal]]:
        """One pass on a clone: propose, choose, rewrite, verify.

        Returns:
            the rewritten clone (or the model itself when nothing changed), the record, old-to-new node names, and
            the proposals that were made.
        """
        started = time.perf_counter()
        record = PassRecord(step.name, format_calls([describe(step)]), step.exact)
        before_cost = cost(model, self.context.batch, self.context.dims).total
        record.cost_before = record.cost_after = before_cost
        unchanged = {node.name: (node.name,) for node in model.graph}
        with _Blaming(step):
            if chosen is None:
                proposals, skipped = self._proposals(step, model)
                chosen = self.guard.worthwhile(choose(proposals, step.budget(), before_cost), record)
            clone = model.clone()
            for node in clone.graph:
                node.meta.pop(edit.ORIGIN, None)
            clone_revision = clone.revision
            if chosen:
                step.rewrite(clone, chosen, self.context)
                if clone.revision != clone_revision:
                    edit.remove_unused(clone)
                    verify(clone, model)
        record.chosen = [(p.site, dict(p.setting)) for p in chosen]
        record.ledger = ledger(model, clone, chosen, skipped or {}, step)
        record.seconds = time.perf_counter() - started
        if not record.counts["changed"] and clone.revision == clone_revision:
            record.status, record.reason = UNCHANGED, _why_unchanged(record, chosen)
            return model, record, unchanged, []
        if step.exact:
            record.drift = drift(model, clone, self.guard.feeds, self.context.backend)
            if record.drift > step.tolerance:
                record.status = UNDONE
                record.reason = f"outputs moved by {record.drift:.1e}, more than the {step.tolerance:g} it promises"
                return model, record, unchanged, []
        record.cost_after = cost(clone, self.context.batch, self.context.dims).total
        record.seconds = time.perf_counter() - started
        return clone, record, _node_map(model, clone), chosen


class _Blaming:
    """Errors of a pass name the pass; what the user must mend passes through as it is."""

    def __init__(self, step: Pass) -> None:
        self.step = step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (PassFailed, InvalidModel)):
            raise PassFailed(f"{self.step.name}: {error}; leave this pass out") from error
        if isinstance(error, Exception) and not isinstance(error, EffcError):
            raise PassFailed(f"{self.step.name}: {type(error).__name__}: {error}; leave this pass out") from error


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
            until = next((i for i, s in enumerate(steps) if s.recovers), None)
            if until is not None:
                own += _unrolled(steps[: until + 1])
                del steps[: until + 1]
        planned.append(Stage(own))
    return planned


def _unrolled(passes: Sequence[Pass]) -> Iterator[Pass]:
    for step in passes:
        if isinstance(step, Repeat):
            for _ in range(step.steps):
                yield from _unrolled(step.passes)
        else:
            yield step


def _key(p: Proposal) -> str:
    return repr(sorted(p.setting.items()))


def _node_map(before: Model, after: Model) -> dict[str, tuple[str, ...]]:
    heirs: dict[str, list[str]] = {node.name: [] for node in before.graph}
    for node in after.graph:
        for name in edit.origin_of(node):
            if name in heirs:
                heirs[name].append(node.name)
    return {name: tuple(to) for name, to in heirs.items()}


def _why_unchanged(record: PassRecord, chosen: Sequence[Proposal]) -> str:
    if record.reason:
        return record.reason
    if chosen:
        return "everything was in the wanted form already"
    reasons = {r: n for r, n in record.skip_reasons.items() if not r.startswith("nothing for ")}
    if reasons:
        return "every site was skipped: " + "; ".join(f"{reason} ({n})" for reason, n in list(reasons.items())[:3])
    return "the model has nothing for it"
