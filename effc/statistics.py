"""What calibration data do inside a model: ranges, histograms and means of tensors, streamed in bounded memory.

A request names a tensor and a kind of statistic; all requests of one state of a model are served by one run of the
data through the runtime. Nothing is kept of the activations themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from effc import edit
from effc.data import padded, unpadded
from effc.errors import BadInput
from effc.model import Model

if TYPE_CHECKING:
    from effc.contract import Context

BATCH_BYTES = 16 * 2**20  # activations of one batch, about
TINY = 1e-30  # the least extent that is told apart: float32 holds the inverse of its bins' width


class Accumulator(Protocol):
    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        """Take in one batch, first axis samples; `beside` for the same samples where the request names one."""
        ...

    def result(self) -> Any: ...


@dataclass(frozen=True)
class Request:
    """One statistic of one tensor, or of a pair. Subclasses say which and make its accumulator.

    `beside` names a tensor of the original model: passes that correct as they go look at what a layer now gets and at
    what it used to get, for the same samples.
    """

    tensor: str
    beside: str | None = field(default=None, kw_only=True)

    def start(self) -> Accumulator:
        raise TypeError(f"{type(self).__name__} says no way to accumulate")


@dataclass(frozen=True)
class Histogram(Request):
    """Distribution of a tensor's values -> `Bins`. Minimum and maximum are exact.

    `values`: at most so many values per sample, evenly spaced, enter the counts.
    """

    values: int = 16384

    def start(self) -> Accumulator:
        return _HistogramAccumulator(self.values)


@dataclass(frozen=True)
class Mean(Request):
    """Mean of a tensor over samples -> array of its shape without the first axis, or of its last axis alone.

    `features`: average over all axes but the last. Else the result is None when samples differ in shape.
    """

    features: bool = False

    def start(self) -> Accumulator:
        return _MeanAccumulator(self.features)


@dataclass(frozen=True)
class Extent(Request):
    """How far a tensor reaches along one axis -> `Extents`, a number for each index."""

    axis: int = 1

    def start(self) -> Accumulator:
        return _ExtentAccumulator(self.axis)


@dataclass(frozen=True)
class Extents:
    """Smallest, largest and mean squared value of each index along an axis."""

    minimum: np.ndarray
    maximum: np.ndarray
    power: np.ndarray


@dataclass(frozen=True)
class Bins:
    """A histogram: `counts[i]` values fell into [low + i * width, low + (i + 1) * width)."""

    counts: np.ndarray
    low: float
    width: float
    minimum: float
    maximum: float

    @property
    def centres(self) -> np.ndarray:
        return self.low + (np.arange(len(self.counts)) + 0.5) * self.width


class _HistogramAccumulator:
    """Bins lie at multiples of a width that doubles when the range grows: merging pairs is exact, one pass enough."""

    BINS = 4096

    def __init__(self, values: int) -> None:
        self.values = values
        self.width = 0.0
        self.first = 0
        self.counts = np.zeros(0, np.int64)
        self.minimum, self.maximum = math.inf, -math.inf

    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        if not values.size:
            return
        samples = values.shape[0] if values.ndim else 1
        flat = values.reshape(-1)
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise BadInput("the calibration data drive the model to NaN or infinity; check their preprocessing")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        extent = max(abs(self.minimum), abs(self.maximum))
        if not self.width:
            self.width = 2.0 ** math.ceil(math.log2(max(extent, TINY) / self.BINS))
        while extent / self.width > self.BINS:
            self._coarsen()
        stride = max(1, -(-flat.size // (self.values * samples)))
        if stride > 1 and stride % 2 == 0:
            stride += 1  # an even stride would see some columns of an image only
        scaled = flat[::stride] * np.float32(1 / self.width)
        indices = np.floor(scaled, out=scaled).astype(np.int32)
        self._add(indices)

    def _coarsen(self) -> None:
        self.width *= 2
        if not len(self.counts):
            return
        lead = self.first % 2
        widened = np.pad(self.counts, (lead, (lead + len(self.counts)) % 2))
        self.counts = widened.reshape(-1, 2).sum(axis=1)
        self.first = (self.first - lead) // 2

    def _add(self, indices: np.ndarray) -> None:
        low, high = int(indices.min()), int(indices.max())
        if not len(self.counts):
            self.first, self.counts = low, np.zeros(high - low + 1, np.int64)
        before, after = max(0, self.first - low), max(0, high - (self.first + len(self.counts) - 1))
        if before or after:
            self.counts = np.pad(self.counts, (before, after))
            self.first -= before
        indices -= self.first
        counted = np.bincount(indices, minlength=len(self.counts))
        self.counts += counted

    def result(self) -> Bins:
        return Bins(self.counts, self.first * self.width, self.width, self.minimum, self.maximum)


class _MeanAccumulator:
    def __init__(self, features: bool) -> None:
        self.features = features
        self.total: np.ndarray | None = None
        self.rows = 0
        self.alike = True

    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        if self.features:
            values = values.reshape(-1, values.shape[-1])
        total = values.sum(axis=0, dtype=np.float64)
        self.alike &= self.total is None or self.total.shape == total.shape
        if self.alike:
            self.total = total if self.total is None else self.total + total
            self.rows += values.shape[0]

    def result(self) -> np.ndarray | None:
        return self.total / self.rows if self.alike and self.total is not None and self.rows else None


class _ExtentAccumulator:
    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.found: list[np.ndarray] = []
        self.rows = 0

    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        others = tuple(i for i in range(values.ndim) if i != self.axis % values.ndim)
        rows = math.prod(values.shape[i] for i in others)
        if not rows:
            return
        low, high = values.min(axis=others), values.max(axis=others)
        power = np.square(values, dtype=np.float64).sum(axis=others)
        if self.rows:
            low, high = np.minimum(low, self.found[0]), np.maximum(high, self.found[1])
            power += self.found[2]
        self.found, self.rows = [low, high, power], self.rows + rows

    def result(self) -> Extents | None:
        if not self.rows:
            return None
        low, high, power = self.found
        return Extents(low, high, power / self.rows)


def collect(model: Model, requests: Iterable[Request], context: Context) -> dict[Request, Any]:
    """Run the calibration data once and serve all requests. Raises BadInput when there are no such data."""
    requests = list(requests)
    if context.calibration is None:
        raise BadInput("calibration data are needed: give --calibrate SPEC (Python: calibrate=...)")
    tensors = {r.tensor for r in requests}
    beside = {r.beside for r in requests if r.beside is not None}
    if model.revision == context.original.revision:
        here = there = _Probe(model, tensors | beside, context)
    else:
        here, there = _Probe(model, tensors, context), _Probe(context.original, beside, context)
    accumulators = {request: request.start() for request in requests}
    data = context.calibration.for_model(model)
    size = min(batch_size(model, tensors), batch_size(context.original, beside))
    advance = context.progress("calibrating", len(data))
    for batch in data.batches(size):
        count = len(next(iter(batch.feeds.values())))
        now = here.run(batch.feeds, count)
        before = now if there is here else there.run(batch.feeds, count)
        for request, accumulator in accumulators.items():
            pair = () if request.beside is None else (before[request.beside],)
            accumulator.update(now[request.tensor], *pair)
        advance(count)
    return {request: accumulator.result() for request, accumulator in accumulators.items()}


class _Probe:
    """Runs a model as far as some tensors need it."""

    def __init__(self, model: Model, tensors: Iterable[str], context: Context) -> None:
        inputs = {info.name for info in model.inputs}
        self.inputs = sorted(inputs & set(tensors))
        self.batch = model.batch
        inner = sorted(set(tensors) - inputs)
        self.session = context.backend.session(edit.cut(model, inner), threads=context.threads) if inner else None

    def run(self, feeds: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        found = {name: np.asarray(feeds[name]) for name in self.inputs}
        if self.session is None:
            return found
        if self.batch is None:
            return found | {name: np.asarray(output) for name, output in self.session.run(feeds).items()}
        return found | unpadded(self.session.run(padded(feeds, self.batch)), count, self.batch)


def batch_size(model: Model, tensors: Iterable[str]) -> int:
    """Samples a batch so that the exposed activations of one stay near BATCH_BYTES; a fixed batch is what it is."""
    if model.batch is not None:
        return model.batch
    shapes = model.shapes(batch=1)
    elements = sum(math.prod(s) for t in tensors if (s := shapes.get(t)) and all(isinstance(d, int) for d in s))
    return max(1, min(32, BATCH_BYTES // max(1, 4 * elements)))
