"""The pass manager: runs a recipe stage by stage, holds each to its promises, and keeps the record.

A stage is what the guard judges as one: a lossy pass up to and including the next that recovers, else a single pass.
A stage works on a clone; it is kept when it is right, accurate enough and pays, else the clone is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from effc import edit
from effc.choose import QUANTITIES, choose, decisive, spend_damage, unreached
from effc.contract import Context, Pass, Proposal, Skipped
from effc.cost import Cost, cost
from effc.errors import BadInput, EffcError, PassFailed
from effc.guard import Guard
from effc.history import KEPT, UNCHANGED, UNDONE, PassRecord, StageRecord, compose, ledger
from effc.model import Model, collection_paused
from effc.predict import MEASURED
from effc.recipe import describe, format_calls
from effc.search import Search
from effc.stages import Attempt, Offer, Stage, stages
from effc.verify import drift, rounding, verify


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
        self._after_stage: tuple[Pass, ...] = ()

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
        whole = True  # nothing was taken from the model so far
        for number, stage in enumerate(planned):
            remaining = remaining[len(stage.passes) :]
            self._after_stage = tuple(remaining)
            attempt, record = self._stage(stage, outcome.model, number)
            outcome.stages.append(record)
            if record.status == KEPT:
                outcome.model = attempt.model
                outcome.node_map = compose(outcome.node_map, attempt.node_map)
                whole = whole and (stage.only_recovers or not stage.lossy)
                if whole and stage.only_recovers:
                    self.context.original = attempt.model
        return outcome

    def _stage(self, stage: Stage, before: Model, number: int) -> tuple[Attempt, StageRecord]:
        if self.replay is not None:
            return self._replayed(stage, before, self.replay[number])
        attempt = self._attempt(stage, before)
        goals = stage.goals or (self.guard.goal,)
        record = StageRecord(attempt.records, goals=goals)
        limit = self._limit(stage)
        timed = Stage([step.sketch() for step in stage.passes])
        search = Search(self.guard, *(lambda chosen, s=s: self._attempt(s, before, [chosen]) for s in (stage, timed)))
        if limit is not None and stage.spends_damage:
            attempt = self._most_damage(stage, before, attempt, limit, search)
            record = StageRecord(attempt.records, goals=goals)
        if not attempt.changed:
            record.status = UNCHANGED
            return attempt, record
        if stage.searchable and goals == ("latency",):  # a variant may miss any other budget
            variants = [*self._everything(stage, attempt)]
            if self.guard.times:  # what a pass is in doubt of, predictions are too
                variants = [*stage.passes[0].variants(before, attempt.chosen[0], self.context), *variants]
            attempt = search.quickest(before, attempt, variants)
            record = StageRecord(attempt.records, goals=goals)
        with _Blaming(", ".join(dict.fromkeys(step.name for step in stage.passes))):
            self.guard.judge(record, before, attempt.model, stage.lossy, limit)
        if record.cause == "accuracy" and stage.spends_damage and limit is not None:
            attempt, record = search.weaker(limit, before, attempt, record)
        if record.cause == "accuracy" and stage.searchable and limit is not None:
            again = self._precise(stage.passes[0], before)
            attempt, record = search.within(limit, before, attempt, record, again)
        if self.guard.foresees(stage.lossy):
            record.passes[0].cost_before = self.context.costs(before).total
            record.passes[-1].cost_after = self.context.costs(attempt.model).total
        if record.status == UNDONE:
            for step in record.passes:
                step.status, step.reason = UNDONE, step.reason or record.reason
        return attempt, record

    def _everything(self, stage: Stage, attempt: Attempt) -> Iterator[list[Proposal]]:
        """All that a pass without a budget proposed, where some of it was predicted not to pay: the whole may."""
        (step,), (offered,) = stage.passes, attempt.offered
        whole = [] if step.budget().keys() - {"max_drop"} else choose(offered[0], {}, Cost())
        if len(whole) > len(attempt.chosen[0]):
            yield whole

    def _most_damage(self, stage: Stage, before: Model, attempt: Attempt, limit: float, search: Search) -> Attempt:
        """The stage with as much damage as the limit holds; more than its budget where the pass itself has a limit."""
        (step,), (offered,) = stage.passes, attempt.offered
        budget = step.budget()

        def spend(amount: float) -> Attempt:
            return self._attempt(Stage([replace(step, damage=amount)]), before, offered=offered)

        return search.most_damage(limit, attempt, budget["damage"], spend, upwards="max_drop" in budget)

    def _limit(self, stage: Stage) -> float | None:
        """Points that the stage may lose in all, from the original: the user's limit or a pass's own, if stricter."""
        own = [step.budget()["max_drop"] for step in stage.passes if "max_drop" in step.budget()]
        if own and self.guard.evaluation is None:
            raise BadInput("max_drop needs evaluation data: give --evaluate SPEC (Python: evaluate=...)")
        return min([*own, *([] if self.guard.max_drop is None else [self.guard.max_drop])], default=None)

    def _precise(self, step: Pass, before: Model) -> list[Proposal]:
        """The proposals again, with damage estimated as well as the pass can."""
        self.context.precise = True
        try:
            return self._proposals(step, before)[0]
        finally:
            self.context.precise = False

    def _replayed(self, stage: Stage, before: Model, told: StageRecord) -> tuple[Attempt, StageRecord]:
        names = [step.name for step in stage.passes]
        if names != [record.name for record in told.passes]:
            raise BadInput(f"the report to replay ran {[r.name for r in told.passes]} where the recipe has {names}")
        if told.status != KEPT:
            return Attempt(before, told.passes, {}, [], []), told
        chosen = [[Proposal(site, setting=setting) for site, setting in record.chosen] for record in told.passes]
        attempt = self._attempt(stage, before, chosen)
        record = StageRecord(attempt.records, KEPT, "", "replayed", told.latency, told.accuracy)
        record.predicted, record.goals = told.predicted, told.goals
        for step, then in zip(record.passes, told.passes, strict=True):
            step.cost_before, step.cost_after = then.cost_before, then.cost_after
        return attempt, record

    def _attempt(
        self,
        stage: Stage,
        before: Model,
        chosen: Sequence[Sequence[Proposal]] | None = None,
        offered: Offer | None = None,
    ) -> Attempt:
        """Carry a stage out.

        Args:
            chosen: what to do, pass by pass, in place of proposing and choosing.
            offered: what there is to choose from, in place of proposing; for a stage of one pass.
        """
        attempt = Attempt(before, [], {node.name: (node.name,) for node in before.graph}, [], [])
        for number, step in enumerate(stage.passes):
            self.context.later = (*stage.passes[number + 1 :], *self._after_stage)
            given = None if chosen is None else list(chosen[number])
            with collection_paused():
                attempt = self.apply(step, attempt, given, offered)
        return attempt

    def _proposals(self, step: Pass, model: Model) -> tuple[list[Proposal], dict[str, str]]:
        proposals, skipped = [], {}
        for item in step.propose(model, self.context):
            if isinstance(item, Skipped):
                skipped[item.site] = item.reason
            else:
                proposals.append(item)
        return proposals, skipped

    def apply(
        self, step: Pass, attempt: Attempt, chosen: list[Proposal] | None = None, offered: Offer | None = None
    ) -> Attempt:
        """One pass more, on a clone: propose, choose, rewrite, verify. The model stays where nothing changed."""
        started, model = time.perf_counter(), attempt.model
        record = PassRecord(step.name, format_calls([describe(step)]), step.exact)
        before_cost = cost(model, self.context.batch, self.context.dims).total
        record.cost_before = record.cost_after = before_cost
        unchanged = {node.name: (node.name,) for node in model.graph}
        skipped: dict[str, str] = {}
        with _Blaming(step.name):
            if chosen is None:
                offered = offered or self._proposals(step, model)
                chosen, left = self._chosen(step, offered[0], model, record)
                skipped = offered[1] | left
            clone = model.clone()
            for node in clone.graph:
                node.meta.pop(edit.ORIGIN, None)
            clone_revision = clone.revision
            if chosen:
                step.rewrite(clone, chosen, self.context)
                record.notes += self.context.heard()
                if clone.revision != clone_revision:
                    edit.remove_unused(clone)
                    verify(clone, model)
        record.chosen = [(p.site, dict(p.setting)) for p in chosen]
        record.ledger = ledger(model, clone, chosen, skipped, step)
        record.seconds = time.perf_counter() - started
        if not record.counts["changed"] and clone.revision == clone_revision:
            record.status, record.reason = UNCHANGED, _why_unchanged(record, chosen)
            return attempt.after(model, record, unchanged, [], offered or ([], {}))
        if step.exact:
            with _Blaming(step.name):
                record.drift = drift(model, clone, self.guard.feeds, self.context.backend)
            allowed = max(step.tolerance, rounding(model))
            if record.drift > allowed:
                record.status = UNDONE
                record.reason = f"outputs moved by {record.drift:.1e}, more than the {allowed:g} it promises"
                return attempt.after(model, record, unchanged, [], offered or ([], {}))
        record.cost_after = cost(clone, self.context.batch, self.context.dims).total
        record.seconds = time.perf_counter() - started
        return attempt.after(clone, record, _node_map(model, clone), chosen, offered or ([], {}))

    def _chosen(
        self, step: Pass, proposals: Sequence[Proposal], model: Model, record: PassRecord
    ) -> tuple[list[Proposal], dict[str, str]]:
        """The proposals to make, and node -> why its proposals were not taken."""
        budget = {name: value for name, value in step.budget().items() if name in QUANTITIES}
        total = self._whole(budget, model, record)
        goals = Stage([step]).goals or (self.guard.goal,)
        damage = step.budget().get("damage")
        chosen = choose(proposals, budget, total) if budget or damage is None else []
        spent = sum(p.damage or 0.0 for p in chosen)
        if damage is not None and (not budget or spent > damage):  # the stricter: other budgets are told to be missed
            chosen = spend_damage(proposals, damage, decisive(goals[0], proposals))
            budget["damage"] = damage
        chosen, dropped = self.guard.worthwhile(chosen, record, goals)
        for name, reached in unreached(chosen, budget, total).items():
            record.notes.append(f"{name}={budget[name]:g} is out of reach: {reached:.3g}, going by its proposals")
        done = {node for p in chosen for node in p.nodes}
        said = ", ".join(f"{name}={value:g}" for name, value in budget.items())
        idle = {node for p in proposals if budget for node in p.nodes if node not in done}
        why = "is spent before it" if "damage" in budget else "does without it"
        return chosen, dict.fromkeys(idle, f"the budget {said} {why}") | dropped

    def _whole(self, budget: Mapping[str, float], model: Model, record: PassRecord) -> Cost:
        """What a budget is a share of. Raises BadInput where the target's share in it is not known."""
        if not {"speedup", "energy"} & budget.keys():
            return record.cost_before
        total, prediction = self.context.costs(model).total, self.context.foresee(model)
        if "speedup" in budget:
            if prediction is None:
                raise BadInput("speedup= needs a predicted latency, and this model's is not known: leave it out")
            if prediction.total.basis != MEASURED:
                record.notes.append(f"speedup={budget['speedup']:g} is held by the {prediction.total.basis} alone")
        return total


class _Blaming:
    """Errors of a pass name the pass; what the user must mend passes through as it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, BadInput) or not isinstance(error, Exception):
            return
        said = str(error) if isinstance(error, EffcError) else f"{type(error).__name__}: {error}"
        raise PassFailed(f"{self.name}: {said}; leave this pass out") from error


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
