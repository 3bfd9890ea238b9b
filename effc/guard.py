"""The guard: keeps what is right, accurate enough and pays, and says why it undoes the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from effc.choose import QUANTITIES, saving
from effc.contract import Progress, Proposal, no_progress
from effc.cost import cost
from effc.data import Data
from effc.errors import BadInput
from effc.evaluate import Score, evaluate
from effc.history import KEPT, UNDONE, Accuracy, PassRecord, StageRecord
from effc.measure import Latency, compare, compare_many
from effc.model import Model
from effc.runtime import Backend
from effc.shapes import stored_size
from effc.verify import deployed_drift

# Rounding to 8 bits in another order moves outputs by percents at most; a corrupted layer moves them by their size.
DEPLOYED_EXACT, DEPLOYED_LOSSY = 1e-3, 0.25

SMALLER = 0.98  # share of the size that counts as a gain where time is the same
RACE_SECONDS = 1.5  # for each two models


@dataclass
class Guard:
    """Judges stages against the model before, and against the user's limits.

    Attributes:
        original: what accuracy is compared with.
        goal: "latency" (measured), "size" or "macs" (counted).
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
    def times(self) -> bool:
        """Whether latency decides and is measured."""
        return self.measure and self.goal == "latency"

    @property
    def quantity(self) -> str:
        """The attribute of `Cost` that predicts the goal."""
        return QUANTITIES.get(self.goal, "macs")

    def worthwhile(self, chosen: Sequence[Proposal], record: PassRecord) -> list[Proposal]:
        """Drop single rewrites that are predicted to make the goal worse; a pass's own reasons come before."""
        if self.force or self.goal not in QUANTITIES:
            return list(chosen)
        kept = [p for p in chosen if p.before is None or p.after is None or saving(p, self.quantity) >= 0]
        if len(kept) < len(chosen):
            record.notes.append(f"{len(chosen) - len(kept)} rewrites were predicted not to pay in {self.goal}")
        return kept

    def judge(self, record: StageRecord, before: Model, after: Model, lossy: bool, limit: float | None) -> None:
        """Decide a stage; writes status, reason, accuracy and latency into its record."""
        self._deployed(record, after, lossy)
        if record.status == KEPT and lossy and self.evaluation is not None:
            record.accuracy = self.accuracy(after)
            if limit is not None and _known_drop(record.accuracy) > limit:
                record.status, record.cause = UNDONE, "accuracy"
                record.reason = f"{_points(record.accuracy)}, more than the {limit:g} allowed"
        if record.status == KEPT:
            self._pays(record, before, after, lossy)

    def _deployed(self, record: StageRecord, after: Model, lossy: bool) -> None:
        if not (self.measure or lossy or quantised(after)):
            return  # plain float graphs have not been seen to suffer, and large ones take long to load
        gap = deployed_drift(after, self.feeds, self.backend, self.threads)
        allowed = DEPLOYED_LOSSY if lossy or quantised(after) else DEPLOYED_EXACT
        if not gap <= allowed:
            record.status, record.cause = UNDONE, "deployment"
            record.reason = (
                f"the runtime's optimised session differs from the same graph run plainly by"
                f" {gap:.2g} of the largest output, more than {allowed:g}: the runtime corrupts it"
            )

    def _pays(self, record: StageRecord, before: Model, after: Model, lossy: bool) -> None:
        if self.goal != "latency":
            a, b = (getattr(cost(m, self.batch, self.dims).total, self.quantity) for m in (before, after))
            if b > a:
                self._reject(record, f"{self.goal} rose from {a:,} to {b:,}")
            return
        if not self.measure:
            record.unproven.append("latency was not measured")
            return
        if has_branches(after) and not has_branches(before):
            record.unproven.append("latency and cost depend on the input: they were measured on one batch of samples")
        record.latency = self.latency(before, after)
        if record.latency.slower:
            # Noise comes in bursts: what is undone was seen slower twice.
            record.latency = self.latency(before, after, seed=self.seed + 1)
        if record.latency.slower:
            self._reject(record, f"slower: {record.latency.describe()}")
        elif lossy and not record.latency.faster and stored_size(after) > SMALLER * stored_size(before):
            self._reject(record, f"it gains neither time nor size: {record.latency.describe()}")

    def _reject(self, record: StageRecord, reason: str) -> None:
        if self.force:
            record.unproven.append(f"kept by force, though {reason}")
        else:
            record.status, record.cause, record.reason = UNDONE, "goal", reason

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
            sessions = {"original": self.backend.session(self.original, threads=self.threads)}
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


def has_branches(model: Model) -> bool:
    """Whether the main graph decides at run time what it computes."""
    return any(True for _ in model.nodes("If", "Loop"))


def quantised(model: Model) -> bool:
    """Whether the main graph holds integer codes, which runtimes rewrite most boldly."""
    return any(True for _ in model.nodes("DequantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger"))
