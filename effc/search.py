"""Which of a pass's rewrites to give up, found out by trying: for speed on the runtime, for accuracy on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from effc.choose import by_worth, decisive
from effc.contract import Proposal
from effc.guard import Guard
from effc.history import StageRecord
from effc.model import Model
from effc.stages import Attempt

LOOKS = 8  # at all evaluation data, at most
WEAKER = 4  # smaller amounts of damage to look at where the best on the part does not hold on all data
FARTHEST = 10  # halves of doublings that an amount of damage is taken up or down
GAIN = 0.98  # a variant must be faster than this share of the plain attempt's time, beyond doubt


@dataclass
class Search:
    """Tries other choices for a stage of one pass.

    Attributes:
        make: carries the stage out with a given choice.
        sketch: the same for a choice that is only timed (`Pass.sketch`).
    """

    guard: Guard
    make: Callable[[list[Proposal]], Attempt]
    sketch: Callable[[list[Proposal]], Attempt]
    _weaker: Callable[[int], Attempt] | None = field(default=None, init=False)

    def quickest(self, before: Model, attempt: Attempt, variants: Sequence[Sequence[Proposal]]) -> Attempt:
        """The attempt, or that of the variants which is measured to be faster beyond doubt.

        Where nothing is timed, predictions of the whole models decide, if they rest on measured kernels. Where the
        attempt is foretold to be slower than the model before, so may all variants be: then none is looked at.
        """
        if not variants:
            return attempt
        tried = {str(number): self.sketch(list(variant)) for number, variant in enumerate(variants)}
        if self.guard.hopeless(before, attempt.model):
            tried = {name: a for name, a in tried.items() if not self.guard.hopeless(before, a.model)}
        ratios = self._measured(attempt, tried) if self.guard.times else self._predicted(attempt, tried)
        if not ratios or min(ratios.values()) >= GAIN:
            return attempt
        best = min(ratios, key=ratios.__getitem__)
        chosen = self.make(list(variants[int(best)]))
        how = "measured" if self.guard.times else "predicted to be"
        _explain(chosen, attempt, f"{how} faster with this layer in its old form ({ratios[best]:.2f}x of the time)")
        return chosen

    def _measured(self, attempt: Attempt, tried: Mapping[str, Attempt]) -> dict[str, float]:
        """The fastest one's share of the attempt's time, if that is beyond doubt."""
        if not tried:
            return {}
        measured = self.guard.race({"all": attempt.model, **{name: a.model for name, a in tried.items()}})
        best = min(tried, key=lambda name: measured[name].ratio)
        return {best: measured[best].ratio} if measured[best].faster else {}

    def _predicted(self, attempt: Attempt, tried: Mapping[str, Attempt]) -> dict[str, float]:
        found = {name: self.guard.predicted(attempt.model, a.model) for name, a in tried.items()}
        return {name: p.ratio for name, p in found.items() if p is not None and p.measured}

    def most_damage(
        self, limit: float, start: Attempt, amount: float, spend: Callable[[float], Attempt], *, upwards: bool
    ) -> Attempt:
        """The attempt that does most damage and holds a limit, on the part of the data that is kept for choosing.

        Amounts other than the first have to hold it by one standard error: the largest of many that seem to hold does
        so by luck in part.

        Args:
            limit: points that may be lost.
            start, amount: an attempt, and the damage that it spends.
            spend: the attempt that spends another amount.
            upwards: double the amount as long as the limit holds. Else it is only halved, where it does not.
        """

        tried = {0: start}  # by the doublings of the amount, in halves

        def spent(step: int) -> Attempt:
            if step not in tried:
                tried[step] = spend(amount * 2 ** (step / 2))
            return tried[step]

        def holds(step: int) -> bool:
            drop = self.guard.drop(spent(step).model)
            doubt = self.guard.drop_error(tried[step].model) if step else 0.0
            return drop is not None and drop + doubt <= limit

        rising, step = holds(0), 0
        if rising and not upwards:
            return start
        self.guard.chosen_on_part = True
        way = 2 if rising else -2
        while abs(step) < FARTHEST and holds(step + way) == rising:
            step += way
        best = step if rising else step + way
        if best in tried:
            best += holds(best + 1)
        found = tried.get(best, tried[min(tried)])  # where nothing holds, the least
        self._weaker = None if best not in tried else lambda number: spent(best - number)
        said = f"as much damage as holds a drop of {limit:g} points" if best in tried else (
            f"the least damage that was tried, which does not hold a drop of {limit:g} points"
        )  # fmt: skip
        for record in found.records:
            samples = self.guard.choosing_samples
            record.notes.append(f"{said}, of {len(tried)} amounts tried: chosen on {samples} samples")
        return found

    def weaker(self, limit: float, before: Model, attempt: Attempt, record: StageRecord) -> tuple[Attempt, StageRecord]:
        """Smaller amounts of damage than `most_damage` found, until one holds the limit on all evaluation data.

        Args:
            attempt, record: what it found, and how that failed; they are given back where no smaller one holds.
        """
        if self._weaker is None:
            return attempt, record
        for number in range(1, WEAKER + 1):
            candidate = self._weaker(number)
            if not candidate.changed:
                break
            judged = StageRecord(candidate.records, goals=record.goals)
            self.guard.judge(judged, before, candidate.model, True, limit)
            if judged.cause != "accuracy":
                for entry in judged.passes:
                    entry.notes.append(
                        f"{2 ** (-number / 2):.2g} of the damage that holds a drop of {limit:g} points on"
                        f" {self.guard.choosing_samples} samples: the first that does on all evaluation samples"
                    )
                return candidate, judged
        return attempt, record

    def within(
        self, limit: float, before: Model, full: Attempt, failed: StageRecord, precise: Sequence[Proposal]
    ) -> tuple[Attempt, StageRecord]:
        """Give rewrites up, worst trade of damage for gain first, until the limit holds.

        More and more are given up; what holds the limit on the data kept for choosing is then judged on all
        evaluation data, the one with the most rewrites first. No order is assumed to be perfect: on a few hundred
        samples a metric moves by chance as much as by a layer. So those that were given up are taken back one by one,
        best trade first, where the limit still holds.

        Args:
            limit: points that may be lost.
            full, failed: all rewrites, and the record of how they failed.
            precise: the pass's proposals with damage as well estimated as it can.
        """
        wanted = {(p.site, _setting(p)) for p in full.chosen[0]}
        offered = [p for p in precise if (p.site, _setting(p)) in wanted]
        order = by_worth(offered, decisive((*failed.goals, self.guard.goal)[0], offered))
        looks, kept = 0, order
        attempt, record = full, failed

        def judged(chosen: list[Proposal]) -> tuple[Attempt, StageRecord] | None:
            nonlocal looks
            if looks == LOOKS:
                return None
            candidate = self.make(chosen)
            drop = self.guard.drop(candidate.model)
            if drop is None or drop > limit:
                return None
            looks += 1
            _explain(candidate, full, f"given up to hold a drop of {limit:g} points")
            found = StageRecord(candidate.records, goals=failed.goals)
            self.guard.judge(found, before, candidate.model, True, limit)
            return candidate, found

        for count in _steps(len(order)):
            if (tried := judged(order[: len(order) - count])) is not None:
                attempt, record = tried
                kept = order[: len(order) - count]
                if record.cause != "accuracy" or looks == LOOKS:
                    break
        given_up = order[len(kept) : len(kept) + LOOKS] if record.cause != "accuracy" else []
        for p in given_up if len(given_up) > 1 else ():  # of one it is known already
            if (tried := judged([*kept, p])) is not None and tried[1].cause != "accuracy":
                (attempt, record), kept = tried, [*kept, p]
        self.guard.chosen_on_part = True
        stays = len(attempt.chosen[0]) if record is not failed else 0
        for entry in record.passes:
            entry.notes.append(
                f"{len(order) - stays} of {len(order)} rewrites were given up to hold a drop of {limit:g} points:"
                f" chosen on {self.guard.choosing_samples} samples, judged {looks + 1} times on all evaluation samples"
            )
        return attempt, record


def _steps(count: int) -> list[int]:
    """How many rewrites to give up, step by step: 1, 2, 3, 4, 6, 8, 12, 16, 24 ... and all but one."""
    steps, step = [], 1
    while step < count:
        steps += [step, step + step // 2] if step > 1 else [step]
        step *= 2
    return sorted({s for s in [*steps, count - 1] if 0 < s < count})


def _explain(attempt: Attempt, full: Attempt, reason: str) -> None:
    """Say in the ledger why what the full attempt changed was left alone, and what it left alone for what reason."""
    reasons: Mapping[str, str] = {e.node: e.reason for e in full.records[0].ledger if e.status == "skipped"}
    damages = {name: p.damage for p in full.chosen[0] for name in p.nodes}
    attempt.records[0].ledger = [
        entry
        if entry.status != "skipped"
        else replace(entry, reason=reasons[entry.node])
        if entry.node in reasons
        else replace(entry, reason=reason, damage=damages[entry.node])
        if entry.node in damages
        else entry
        for entry in attempt.records[0].ledger
    ]


def _setting(p: Proposal) -> str:
    return repr(sorted(p.setting.items()))
