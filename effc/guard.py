"""The guard: keeps what is right, accurate enough and pays, and says why it undoes the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from effc.choose import QUANTITIES, saving
from effc.contract import Progress, Proposal, no_progress
from effc.cost import cost
from effc.data import Data
from effc.evaluate import Score, evaluate
from effc.history import KEPT, UNDONE, Accuracy, PassRecord, StageRecord
from effc.measure import Latency, compare
from effc.model import Model
from effc.runtime import Backend

# Rounding to 8 bits in another order moves outputs by percents at most; a corrupted layer moves them by their size.
DEPLOYED_EXACT, DEPLOYED_LOSSY = 1e-3, 0.25


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
    _scores: dict[tuple[int, bool], dict[str, Score]] = field(default_factory=dict)

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
            if limit is not None and record.accuracy.drop > limit:
                record.status, record.cause = UNDONE, "accuracy"
                record.reason = f"{_points(record.accuracy)}, more than the {limit:g} allowed"
        if record.status == KEPT:
            self._pays(record, before, after)

    def _deployed(self, record: StageRecord, after: Model, lossy: bool) -> None:
        deployment = self.backend.deployment(after, self.feeds, self.threads)
        allowed = DEPLOYED_LOSSY if lossy or _quantised(after) else DEPLOYED_EXACT
        if deployment.difference is not None and not deployment.difference <= allowed:
            record.status, record.cause = UNDONE, "deployment"
            record.reason = (
                f"the runtime's optimised session differs from the same graph run plainly by"
                f" {deployment.difference:.2g} of the largest output, more than {allowed:g}: the runtime corrupts it"
            )

    def _pays(self, record: StageRecord, before: Model, after: Model) -> None:
        if self.goal != "latency":
            a, b = (getattr(cost(m, self.batch, self.dims).total, self.quantity) for m in (before, after))
            if b > a:
                self._reject(record, f"{self.goal} rose from {a:,} to {b:,}")
            return
        if not self.measure:
            record.unproven.append("latency was not measured")
            return
        record.latency = self.latency(before, after)
        if record.latency.slower:
            # Noise comes in bursts: what is undone was seen slower twice.
            again = self.latency(before, after, seed=self.seed + 1)
            if again.slower:
                self._reject(record, f"slower: {again.describe()}")
            record.latency = again

    def _reject(self, record: StageRecord, reason: str) -> None:
        if self.force:
            record.unproven.append(f"kept by force, though {reason}")
        else:
            record.status, record.cause, record.reason = UNDONE, "goal", reason

    def latency(self, before: Model, after: Model, seed: int | None = None) -> Latency:
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

    def accuracy(self, model: Model) -> Accuracy:
        """The metric on all evaluation data, beside the original's."""
        scores = self._evaluated(model, choosing=False)
        return Accuracy.of(scores["model"], scores["original"])

    def drop(self, model: Model, *, choosing: bool) -> float:
        """Points lost; `choosing`: on the part of the evaluation data that is kept for choosing."""
        scores = self._evaluated(model, choosing)
        return Accuracy.of(scores["model"], scores["original"]).drop

    @property
    def choosing_samples(self) -> int:
        return 0 if self.evaluation is None else len(self._part(True))

    def _part(self, choosing: bool) -> Data:
        if self.evaluation is None:
            raise ValueError("there are no evaluation data")
        return self.evaluation.split()[0] if choosing else self.evaluation

    def _evaluated(self, model: Model, choosing: bool) -> dict[str, Score]:
        key = (model.revision, choosing)
        if key not in self._scores:
            sessions = {"original": self.backend.session(self.original, threads=self.threads)}
            if model.revision != self.original.revision:
                sessions["model"] = self.backend.session(model, threads=self.threads)
            scores = evaluate(
                sessions,
                self._part(choosing).for_model(self.original),
                batch=self.original.batch,
                reference="original",
                progress=self.progress,
            )
            scores.setdefault("model", scores["original"])
            self._scores[key] = scores
        return self._scores[key]


def _points(accuracy: Accuracy) -> str:
    return (
        f"{accuracy.metric} falls by {accuracy.drop:.2f} points to {accuracy.points:.2f} on {accuracy.samples} samples"
    )


def _quantised(model: Model) -> bool:
    return any(True for _ in model.nodes("DequantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger"))
