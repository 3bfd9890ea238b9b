"""The guard: keeps what is right, accurate enough and pays, and says why it undoes the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import sem

from effc.choose import ACCURACY, COMPRESSED, GOALS, PREDICTED, pays
from effc.compressed import compressed_size
from effc.contract import Context, Progress, Proposal, no_progress
from effc.cost import Cost, cost
from effc.data import Data
from effc.errors import BadInput
from effc.evaluate import Score, evaluate
from effc.history import KEPT, NO_GAIN, UNDONE, Accuracy, PassRecord, Predicted, StageRecord
from effc.measure import Latency, compare, compare_many
from effc.model import Model
from effc.runtime import Backend, caveat
from effc.shapes import stored_size
from effc.verify import deployed_drift

# Rounding to 8 bits in another order moves outputs by percents at most; a corrupted layer moves them by their size.
DEPLOYED_EXACT, DEPLOYED_LOSSY = 1e-3, 0.25

SMALLER = 0.98  # share of the size that counts as a gain where time is the same
SAME = 1.005  # predicted ratio up to which time, or energy, is the same
UNITS = {"seconds": " us", "energy": " uJ", "weight_bytes": " bytes", "macs": " MACs"}
RACE_SECONDS = 1.5  # for each two models


@dataclass
class Guard:
    """Judges stages against the model before, and against the user's limits.

    Attributes:
        original: what accuracy is compared with.
        goal: "latency" (measured, or else predicted), "energy" (predicted), "size" or "macs" (counted).
        context: with it latency and energy are predicted on its target; None: neither is known.
        max_drop: points of the metric that may be lost in all; None without evaluation data or limit.
        measure: False: nothing is timed, and the record says "unproven".
        force: keep what does not pay.
        feeds: one batch of inputs, for timing and for comparing outputs.
        chosen_on_part: a part of the evaluation data served for choosing; what is reported comes from the rest.
    """

    original: Model
    backend: Backend
    feeds: Mapping[str, np.ndarray]
    goal: str = "latency"
    context: Context | None = None
    evaluation: Data | None = None
    max_drop: float | None = None
    force: bool = False
    measure: bool = True
    threads: int = 1
    batch: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    progress: Progress = no_progress
    chosen_on_part: bool = False
    _scores: dict[tuple[int, str], dict[str, Score]] = field(default_factory=dict)

    @property
    def clock(self) -> bool:
        """Whether models may be timed: that was asked for, and this machine is one of the target's devices."""
        return self.measure and (self.context is None or self.context.target.local)

    @property
    def times(self) -> bool:
        """Whether latency decides and is measured."""
        return self.clock and self.goal == "latency"

    def foresees(self, lossy: bool) -> bool:
        """Whether costs on the target are told at the ends of a stage: for large models only where they decide."""
        return self.context is not None and (lossy or self.goal != "latency" or not self.context.large)

    def worthwhile(
        self, chosen: Sequence[Proposal], record: PassRecord, goals: Sequence[str]
    ) -> tuple[list[Proposal], dict[str, str]]:
        """Drop single rewrites that are predicted to make things worse; a pass's own reasons come before.

        Returns:
            what is left, and node -> why it was left alone.
        """
        kept, dropped = list(chosen), []
        if not self.force:
            kept, dropped = ([p for p in chosen if pays(p, goals) == wanted] for wanted in (True, False))
        if dropped:
            record.notes.append(f"{len(dropped)} of {len(chosen)} rewrites: {NO_GAIN} in {' and '.join(goals)}")
        return kept, {node: f"{NO_GAIN}: {_figures(p, goals)}" for p in dropped for node in p.nodes or (p.site,)}

    def predicted(self, before: Model, after: Model) -> Predicted | None:
        """Predicted latency of two models; None where nothing is foreseen, or only the second decides as it runs."""
        if self.context is None or (has_branches(after) and not has_branches(before)):
            return None
        a, b = self.context.foresee(before), self.context.foresee(after)
        return None if a is None or b is None else Predicted.of(a, b)

    def hopeless(self, before: Model, after: Model) -> bool:
        """Whether a lossy rewrite need not be measured: it is predicted, beyond doubt, to be slower."""
        predicted = None if self.force else self.predicted(before, after)
        return predicted is not None and predicted.slower

    def judge(self, record: StageRecord, before: Model, after: Model, lossy: bool, limit: float | None) -> None:
        """Fill in latency, as predicted and measured, and accuracy, and set status and reason.

        Args:
            record: with its `goals` where budgets of its passes state them; else it is judged by the guard's own.
            limit: points that may be lost in all; None: accuracy is only reported.
        """
        record.goals = record.goals or (self.goal,)
        self._deployed(record, after, lossy)
        if record.status == KEPT and self.foresees(lossy):
            self._foreseen(record, before, after, lossy)
        if record.status == KEPT and self.evaluation is not None and lossy:
            record.accuracy = self.accuracy(after)
            if limit is not None and _known_drop(record.accuracy) > limit:
                record.status, record.cause = UNDONE, "accuracy"
                record.reason = f"{_points(record.accuracy)}, more than the {limit:g} allowed"
        for goal in record.goals:
            if record.status == KEPT:
                self._pays(record, goal, before, after, lossy)

    def _foreseen(self, record: StageRecord, before: Model, after: Model, lossy: bool) -> None:
        record.predicted = self.predicted(before, after)
        if lossy and "latency" in record.goals and record.predicted is not None and record.predicted.slower:
            self._reject(record, f"predicted to be slower: {record.predicted.describe()}", "prediction")

    def _deployed(self, record: StageRecord, after: Model, lossy: bool) -> None:
        if not (self.clock or lossy or quantised(after)):
            return  # plain float graphs have not been seen to suffer, and large ones take long to load
        gap = deployed_drift(after, self.feeds, self.backend, self.threads)
        allowed = DEPLOYED_LOSSY if lossy or quantised(after) else DEPLOYED_EXACT
        if not gap <= allowed:
            record.status, record.cause = UNDONE, "deployment"
            record.reason = (
                f"the runtime's optimised session differs from the same graph run plainly by"
                f" {gap:.2g} of the largest output, more than {allowed:g}: the runtime corrupts it"
            )

    def _pays(self, record: StageRecord, goal: str, before: Model, after: Model, lossy: bool) -> None:
        if goal == ACCURACY:
            self._more_accurate(record, before)
            return
        if goal == COMPRESSED:
            a, b = compressed_size(before), compressed_size(after)
            if b > SMALLER * a:
                self._reject(record, f"its weights do not compress better: {a:,} bytes before, {b:,} after")
            return
        if goal != "latency":
            quantity = GOALS[goal]
            a, b = (getattr(self._total(m), quantity) for m in (before, after))
            if b > a * (SAME if quantity in PREDICTED else 1):
                unit = UNITS[quantity] if quantity in PREDICTED else ""
                self._reject(record, f"{goal} rose from {_number(a, quantity)} to {_number(b, quantity)}{unit}")
            return
        if self.clock:
            self._measured(record, before, after, lossy)
        elif lossy and record.predicted is not None:
            self._decided(record, record.predicted, before, after)
        else:
            record.unproven.append(caveat(self.backend) or "latency was not measured")

    def _more_accurate(self, record: StageRecord, before: Model) -> None:
        if record.accuracy is None:
            record.unproven.append("training was judged on data held out of its own alone")
        elif (lost := _known_drop(record.accuracy) - _known_drop(self.accuracy(before))) > 0:
            self._reject(record, f"it trained {lost:.2f} points away", "accuracy")

    def _measured(self, record: StageRecord, before: Model, after: Model, lossy: bool) -> None:
        if has_branches(after) and not has_branches(before):
            record.unproven.append("latency and cost depend on the input: they were measured on one batch of samples")
        record.latency = self.latency(before, after)
        if record.latency.slower:
            # Noise comes in bursts: what is undone was seen slower twice.
            record.latency = self.latency(before, after, seed=self.seed + 1)
        if record.latency.slower:
            self._reject(record, f"slower: {record.latency.describe()}")
        elif lossy and not record.latency.faster and not _smaller(before, after):
            self._reject(record, f"it gains neither time nor size: {record.latency.describe()}")

    def _decided(self, record: StageRecord, predicted: Predicted, before: Model, after: Model) -> None:
        """By prediction alone, where nothing can be measured. The roofline does not decide: it is a lower bound."""
        if predicted.measured and predicted.ratio >= 1:
            if predicted.ratio >= SAME:
                self._reject(record, f"predicted to be slower: {predicted.describe()}", "prediction")
            elif not _smaller(before, after):
                self._reject(record, f"predicted to gain neither time nor size: {predicted.describe()}", "prediction")
        if record.status == KEPT:
            doubt = "" if predicted.sure or not predicted.measured else ", which may be no gain"
            record.unproven.append(f"predicted, not measured: {predicted.describe()}{doubt}")

    def _total(self, model: Model) -> Cost:
        if self.context is None:
            return cost(model, self.batch, self.dims).total
        return self.context.costs(model).total

    def _reject(self, record: StageRecord, reason: str, cause: str = "goal") -> None:
        if self.force:
            kept = f"kept by force, though {reason}"
            record.unproven += [] if kept in record.unproven else [kept]
        else:
            record.status, record.cause, record.reason = UNDONE, cause, reason

    def latency(self, before: Model | Path, after: Model, seed: int | None = None) -> Latency:
        """Interleaved latency of two models at the stated batch and threads."""
        return compare(
            before,
            after,
            self.feeds,
            backend=self.backend,
            threads=self.threads,
            seed=self.seed if seed is None else seed,
            progress=self.progress,
        )

    def race(self, models: Mapping[str, Model]) -> dict[str, Latency]:
        """Latency of several models in turns, beside the first."""
        return compare_many(
            models,
            self.feeds,
            backend=self.backend,
            reference=next(iter(models)),
            threads=self.threads,
            seconds=RACE_SECONDS,
            pairs=4,
            seed=self.seed,
            progress=self.progress,
        )

    def accuracy(self, model: Model) -> Accuracy:
        """The metric on all evaluation data, beside the original's."""
        return self._accuracy(model, "all")

    def reported(self, model: Model) -> Accuracy:
        """The metric on the evaluation data that no choice was made on."""
        return self._accuracy(model, "reporting" if self.chosen_on_part else "all")

    def drop(self, model: Model) -> float | None:
        """Points lost on the part of the evaluation data that is kept for choosing."""
        return self._accuracy(model, "choosing").drop

    def drop_error(self, model: Model) -> float:
        """One standard error of `drop`, in points, of pairs of answers; 0 where the metric is no share of samples."""
        scores = self._evaluated(model, "choosing")
        now, then = scores["model"].per_sample, scores["original"].per_sample
        if now is None or then is None or len(now) < 2:
            return 0.0
        return 100 * float(sem(now.astype(float) - then))

    @property
    def choosing_samples(self) -> int:
        return len(self._part("choosing"))

    def _part(self, part: str) -> Data:
        if self.evaluation is None:
            raise BadInput("accuracy needs evaluation data: give --evaluate SPEC (Python: evaluate=...)")
        if part == "all":
            return self.evaluation
        choosing, reporting = self.evaluation.split()
        return choosing if part == "choosing" else reporting

    def _accuracy(self, model: Model, part: str) -> Accuracy:
        scores = self._evaluated(model, part)
        accuracy = Accuracy.of(scores["model"], scores["original"])
        if self.max_drop is not None:
            _known_drop(accuracy)
        return accuracy

    def _evaluated(self, model: Model, part: str) -> dict[str, Score]:
        key = (model.revision, part)
        if key not in self._scores:
            # Where another runtime stands in, what is emitted is judged, by what the original itself means.
            plain = {"optimize": not caveat(self.backend)}
            sessions = {"original": self.backend.session(self.original, threads=self.threads, **plain)}
            if model.revision != self.original.revision:
                sessions["model"] = self.backend.session(model, threads=self.threads)
            # A branch goes one way for the whole batch: only at the deployed batch does it go as it will.
            batch = self.batch if has_branches(model) else self.original.batch
            scores = evaluate(sessions, self._part(part), batch=batch, reference="original", progress=self.progress)
            scores.setdefault("model", scores["original"])
            self._scores[key] = scores
        return self._scores[key]


def _known_drop(accuracy: Accuracy) -> float:
    if accuracy.drop is None:
        raise BadInput(
            f"{accuracy.metric} of the original against itself is infinite, so no drop can be held;"
            " set metric to agreement, cosine or kl"
        )
    return accuracy.drop


def _points(accuracy: Accuracy) -> str:
    reached = "no number" if accuracy.points is None else f"{accuracy.points:.2f}"
    return f"{accuracy.metric} is worse by {accuracy.drop:.2f} points, at {reached}, on {accuracy.samples} samples"


def _smaller(before: Model, after: Model) -> bool:
    return stored_size(after) <= SMALLER * stored_size(before)


def _figures(p: Proposal, goals: Sequence[str]) -> str:
    pairs = [(getattr(p.before, q), getattr(p.after, q), q) for q in map(GOALS.__getitem__, goals)]
    return ", ".join(f"{_number(a, q)}{UNITS[q]} before, {_number(b, q)}{UNITS[q]} after" for a, b, q in pairs)


def _number(value: float, quantity: str) -> str:
    if quantity not in PREDICTED:
        return f"{value:,}"
    return f"{1e6 * value:,.1f}" if value > 1e-6 else f"{1e6 * value:.2g}"


def has_branches(model: Model) -> bool:
    """Whether the main graph decides at run time what it computes."""
    return any(True for _ in model.nodes("If", "Loop"))


def quantised(model: Model) -> bool:
    """Whether the main graph holds integer codes, which runtimes rewrite most boldly."""
    return any(True for _ in model.nodes("DequantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger"))
