"""How good models are on data: task metrics, agreement with a reference, damage. One streamed run, side by side.

An output of rank 2 [N, C > 1] is taken for class scores: logits, or probabilities where the rows are non-negative and
sum to 1. Sums are float64; no outputs are kept. What a model gives that is NaN or infinite counts as wrong, its damage
as infinite; of the reference it is bad input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest

from effc.contract import Progress, no_progress
from effc.data import Batch, Data, padded, unpadded
from effc.dataspec import METRICS
from effc.errors import BadInput
from effc.runtime import Session
from effc.sources import load_function

SHARES = ("top1", "top5", "agreement")  # of samples; told in points, 100 times as large
LOWER_IS_BETTER = ("kl",)
SUM_TOLERANCE = 1e-3  # rows that sum to 1 within it, and have no negative number, hold probabilities
FLOOR = float(np.finfo(np.float32).tiny)  # a probability of 0 is one that a float32 softmax rounded to 0
BATCH = 32
Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Score:
    """How one model did. Errors of several outputs are averaged over the outputs.

    Attributes:
        metric: top1, top5, agreement (shares of samples), cosine, sqnr (dB: -10 lg |a - b|^2 / |a|^2),
            kl (nats a sample), or module:function.
        value: of the metric; sqnr without any error is infinite.
        samples: how many were run.
        agreement: share of samples whose class is the reference's, averaged over outputs; None without class scores.
        damage: mean KL divergence from the reference's softmax outputs in nats a sample; for outputs that are no
            class scores |a - b|^2 / |a|^2; averaged over outputs of the kind (class scores where there are any).
        per_sample: top1, top5, agreement: which samples are right, [samples] bool. These three look at the first
            output of class scores.
    """

    metric: str
    value: float
    samples: int
    agreement: float | None
    damage: float
    per_sample: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def points(self) -> float:
        """The value in the unit of `max_drop`: 100 x the share for top1, top5, agreement, else the metric's own."""
        return 100 * self.value if self.metric in SHARES else self.value

    @property
    def higher_is_better(self) -> bool:
        return self.metric not in LOWER_IS_BETTER


def paired_p(a: Score, b: Score) -> float:
    """Two-sided p value of the exact McNemar test: could a and b be equally often right, given where they differ?

    Source: McNemar, Psychometrika 12 (1947); exact binomial form on the discordant samples.

    Raises:
        BadInput: no samples were kept (the metric is none of top1, top5, agreement), or their numbers differ.
    """
    if a.per_sample is None or b.per_sample is None or len(a.per_sample) != len(b.per_sample):
        raise BadInput(
            f"a paired test of {a.metric} on {a.samples} and {b.metric} on {b.samples} samples: "
            f"it needs {', '.join(SHARES)} on the same samples"
        )
    only_a = int(np.sum(a.per_sample & ~b.per_sample))
    discordant = int(np.sum(a.per_sample != b.per_sample))
    return float(binomtest(only_a, discordant).pvalue) if discordant else 1.0


def evaluate(
    models: Mapping[str, Session],
    data: Data,
    *,
    batch: int | None = None,
    reference: str,
    metric: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Score]:
    """Run all models over the data, batch by batch, and score each.

    Args:
        models: sessions by name; they take the same feeds.
        data: bound to the model (`Data.for_model`).
        batch: the models' fixed batch, exactly that many samples are fed; None where the batch axis is free.
        reference: which of the models agreement and damage compare with: the original.
        metric: top1, top5, agreement, sqnr, cosine, kl, or module:function, which gets (outputs, labels or None, the
            reference's outputs) of each batch and returns a number for each sample; the higher, the better. None
            takes the data's metric, else top1 with labels, agreement for class scores, sqnr otherwise.

    Raises:
        BadInput: the metric needs labels or class scores that are not there, or a label is no class of the model.
    """
    folder = Path() if metric else data.folder  # a file.py:function is relative to where it was named
    metric = metric or data.metric
    done = progress("evaluating", None if data.streamed else len(data))
    tallies: dict[str, _Tally] = {}
    for part in data.batches(batch or BATCH):
        count = len(next(iter(part.feeds.values())))
        feeds = part.feeds if batch is None or count == batch else padded(part.feeds, batch)
        outputs = {name: unpadded(session.run(feeds), count, batch) for name, session in models.items()}
        if not tallies:
            known = _known_metric(metric, data, outputs[reference], count)
            function = None if known in METRICS else load_function(known, folder)
            tallies = {name: _Tally(known, function, data.name) for name in models}
        for name, tally in tallies.items():
            tally.add(outputs[name], outputs[reference], part, count)
        done(count)
    return {name: tally.score() for name, tally in tallies.items()}


def damage(models: Sequence[Outputs], reference: Sequence[Outputs]) -> float:
    """`Score.damage` of outputs that are at hand already, batch by batch, from the reference's."""
    tally = _Tally("kl", None, "")
    for outputs, wanted in zip(models, reference, strict=True):
        tally.add(outputs, wanted, Batch({}, None), len(next(iter(wanted.values()))))
    return tally.score().damage


def _known_metric(metric: str | None, data: Data, outputs: Outputs, count: int) -> str:
    scores = [name for name, output in outputs.items() if _are_scores(output) and len(output) == count]
    if metric is None:
        metric = ("top1" if data.labelled else "agreement") if scores else "sqnr"
    shapes = ", ".join(f"{name} {output.shape}" for name, output in outputs.items())
    if metric in ("top1", "top5") and not data.labelled:
        raise BadInput(f"metric {metric} needs labels, and data {data.name!r} have none: name them under labels")
    if metric in (*SHARES, "kl") and not scores:
        raise BadInput(f"metric {metric} needs class scores [N, C > 1], the model gives {shapes}: take sqnr or cosine")
    if metric not in METRICS and ":" not in metric:
        raise BadInput(f"metric {metric!r}: allowed are {', '.join(METRICS)}, module:function")
    return metric


def _are_scores(output: np.ndarray) -> bool:
    return output.ndim == 2 and output.shape[1] > 1 and output.dtype.kind not in "biuOSU"


class _Tally:
    """Sums of one model."""

    def __init__(self, metric: str, function: Callable | None, data: str) -> None:
        self.metric, self.function, self.data = metric, function, data
        self.samples = 0
        self.right: list[np.ndarray] = []  # top1, top5, agreement: one flag a sample
        self.total = 0.0  # of a custom metric's values
        self.same: dict[str, int] = {}  # class scores: rows of the reference's class, by output
        self.divergence: dict[str, float] = {}  # class scores: nats, by output
        self.rows: dict[str, int] = {}
        self.squares: dict[str, np.ndarray] = {}  # by output: |a|^2, |a - b|^2
        self.cosine: dict[str, list[float]] = {}  # by output: sum over samples, number of samples

    def add(self, outputs: Outputs, reference: Outputs, part: Batch, count: int) -> None:
        self.samples += count
        for name, a in reference.items():
            b = _alike(name, a, outputs)
            if _are_scores(a):
                self.rows[name] = self.rows.get(name, 0) + len(a)
                self.same[name] = self.same.get(name, 0) + int(np.sum(_class(b) == _class(a)))
                self.divergence[name] = self.divergence.get(name, 0.0) + float(divergence(a, b).sum())
            self._add_squares(name, *_numbers(name, a, b, len(a) if a.ndim and len(a) == count else 1))
        if self.function is not None:
            self._add_custom(self.function, outputs, reference, part, count)
        elif self.metric in SHARES:
            self.right.append(self._right(outputs, reference, part))

    def _add_squares(self, name: str, a: np.ndarray, b: np.ndarray) -> None:
        finite = np.asarray(np.isfinite(b).all(axis=1))
        b = np.where(finite[:, None], b, 0.0)
        aa, bb, ab = (np.sum(x * y, axis=1) for x, y in ((a, a), (b, b), (a, b)))
        error = np.where(finite, np.sum((a - b) ** 2, axis=1), np.inf)
        self.squares[name] = self.squares.get(name, 0.0) + np.array([aa.sum(), error.sum()])
        norms = np.sqrt(aa) * np.sqrt(bb)
        # Two zero vectors are the same; a zero and another one are not.
        cosine = np.divide(ab, norms, out=np.where(error == 0, 1.0, 0.0), where=norms > 0)
        held = self.cosine.setdefault(name, [0.0, 0])
        held[0], held[1] = held[0] + float(cosine.sum()), held[1] + len(cosine)

    def _right(self, outputs: Outputs, reference: Outputs, part: Batch) -> np.ndarray:
        name = next(name for name, output in reference.items() if _are_scores(output))
        scores = np.asarray(outputs[name], np.float64)
        if self.metric == "agreement":
            return _class(scores) == _class(reference[name])
        labels = class_labels(part.labels, scores.shape[1], self.data)
        if self.metric == "top1":
            return _class(scores) == labels
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        # Ties go to the lower class, as argmax has it.
        ahead = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < labels[:, None]))
        return (ahead.sum(axis=1) < 5) & np.isfinite(scores).all(axis=1)

    def _add_custom(self, function: Callable, outputs: Outputs, reference: Outputs, part: Batch, count: int) -> None:
        try:
            values = np.asarray(function(outputs, part.labels, reference), np.float64)
        except Exception as error:  # the user's own code, which may raise anything
            raise BadInput(f"metric {self.metric!r} raised {type(error).__name__}: {error}") from error
        if values.shape != (count,) or not np.isfinite(values).all():
            raise BadInput(f"metric {self.metric!r} returned {values.shape}: it must return {count} finite numbers")
        self.total += float(values.sum())

    def score(self) -> Score:
        score = Score(self.metric, 0.0, self.samples, self._agreement(), self._damage())
        if self.metric in SHARES:
            right = np.concatenate(self.right)
            return replace(score, value=float(right.mean()), per_sample=right)
        return replace(score, value=self._value())

    def _value(self) -> float:
        if self.metric == "kl":
            return self._damage()
        if self.metric == "cosine":
            return _mean(total / count for total, count in self.cosine.values())
        if self.metric == "sqnr":
            return _decibel(self._error())
        return self.total / self.samples

    def _agreement(self) -> float | None:
        return _mean(self.same[name] / self.rows[name] for name in self.rows) if self.rows else None

    def _damage(self) -> float:
        if self.rows:
            return _mean(self.divergence[name] / self.rows[name] for name in self.rows)
        return self._error()

    def _error(self) -> float:
        return _mean(_relative(*sums) for sums in self.squares.values())


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence KL(softmax a || softmax b) of each row, [N, C] -> [N], in nats and float64.

    Where the rows of `a` are probabilities already, both are taken as they are, but for `b` made to sum to 1 too.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite = np.asarray(np.isfinite(b).all(axis=1))
    b = np.where(finite[:, None], b, 0.0)
    log = _log_of_shares if are_probabilities(a) else _log_softmax
    p, q = log(a), log(b)
    # Rounding may leave a divergence of nothing just below zero.
    return np.where(finite, np.maximum(np.sum(np.exp(p) * (p - q), axis=1), 0.0), np.inf)


def are_probabilities(output: np.ndarray) -> bool:
    """Whether the rows of class scores [N, C > 1] are probabilities: not negative, and of sum 1."""
    if output.ndim != 2 or output.shape[1] < 2 or output.dtype.kind != "f":
        return False
    return bool((output >= 0).all() and (np.abs(output.sum(axis=1) - 1) < SUM_TOLERANCE).all())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return log_softmax(logits, axis=1)


def _log_of_shares(shares: np.ndarray) -> np.ndarray:
    shares = np.maximum(shares, FLOOR)
    return np.log(shares / shares.sum(axis=1, keepdims=True))


def _alike(name: str, a: np.ndarray, outputs: Outputs) -> np.ndarray:
    if name not in outputs or outputs[name].shape != a.shape:
        found = f"one of {outputs[name].shape}" if name in outputs else f"only {', '.join(outputs)}"
        raise BadInput(f"the reference has an output {name!r} of {a.shape}, a model beside it {found}: they must match")
    return outputs[name]


def _class(scores: np.ndarray) -> np.ndarray:
    """Class of each row, -1 where the row is not finite and so has none."""
    scores = np.asarray(scores, np.float64)
    return np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), -1)


def _numbers(name: str, a: np.ndarray, b: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [rows, ...]; of texts and the like it is only asked whether they are equal."""
    if a.dtype.kind in "OSU":
        a, b = np.ones(a.shape), (a == b).astype(np.float64)
    a, b = (np.asarray(x, np.float64).reshape(rows, -1) for x in (a, b))
    if not np.isfinite(a).all():
        raise BadInput(f"output {name!r} of the reference model holds NaN or infinity: nothing can be compared with it")
    return a, b


def class_labels(labels: np.ndarray | None, classes: int, data: str) -> np.ndarray:
    """[N] integers, each a class of the model. Raises BadInput, with the name of the data."""
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or not np.array_equal(labels, np.trunc(labels)):
        raise BadInput(f"labels of data {data!r} are {labels.dtype} {labels.shape}: needed is one integer a sample")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise BadInput(
            f"data {data!r} hold label {wrong[0]}, the model has classes 0 to {classes - 1}: "
            "count labels from 0, in the model's order"
        )
    return labels.astype(np.int64)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(sum(values) / len(values))


def _relative(signal: float, error: float) -> float:
    return float(error / signal) if signal else (math.inf if error else 0.0)


def _decibel(relative: float) -> float:
    """Signal to noise ratio in dB for a relative squared error."""
    return -10 * math.log10(relative) if 0 < relative < math.inf else math.copysign(math.inf, 0.5 - relative)
