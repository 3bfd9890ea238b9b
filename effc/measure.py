"""Latency on the real runtime: models measured side by side, so that what disturbs one disturbs the other.

The machine changes its speed while we look, and a session keeps the memory layout that it happened to get. Hence
several sets of fresh sessions, created in alternating order; in each set many short rounds in which every model runs
forwards and backwards (A B B A, then B A A B); and bounds from a bootstrap over both levels.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effc.contract import Progress, no_progress
from effc.errors import BadInput
from effc.model import Model
from effc.runtime import Backend, Session

BLOCK_NS = 5_000_000  # a block of calls lasts about this long, or one call
GROUP = 5  # the least of so many calls counts: what interrupts a call only ever adds
WARM_UP = 3  # calls; the first ones plan memory
LEAST_ROUNDS = 3  # in each set
WIDE = 0.015  # while the bounds are farther from the ratio than this, measuring goes on,
PATIENCE = 3.0  # up to so many times the time asked for
RESAMPLES = 1000
SLOWER = 1.02


@dataclass(frozen=True)
class Latency:
    """Latency of a model (after) beside that of another (before), in one run.

    Attributes:
        before_ms, after_ms: median time of one inference of the whole batch, in milliseconds.
        ratio: after / before, the median over rounds in which both ran; below 1 is faster.
        low, high: 95 % bootstrap bounds of the ratio.
        rounds: how many.
        threads: intra-op threads.
        batch: samples an inference.
    """

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    threads: int
    batch: int

    @property
    def slower(self) -> bool:
        """Beyond doubt: the lower bound of the ratio is above 1.02."""
        return self.low > SLOWER

    @property
    def faster(self) -> bool:
        """Beyond doubt: the upper bound of the ratio is below 1."""
        return self.high < 1

    def describe(self) -> str:
        """One clause for a report."""
        return (
            f"{self.after_ms:.3f} ms against {self.before_ms:.3f} ms, {self.ratio:.2f}x"
            f" [{self.low:.2f}, {self.high:.2f}] at batch {self.batch}"
        )


def compare(
    before: Model | Path,
    after: Model | Path,
    feeds: Mapping[str, np.ndarray],
    *,
    backend: Backend,
    threads: int = 1,
    seconds: float = 4.0,
    pairs: int = 6,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Latency:
    """Latency of `after` beside `before` on the same feeds; see `compare_many` for the arguments."""
    models = {"before": before, "after": after}
    return compare_many(
        models,
        feeds,
        backend=backend,
        reference="before",
        threads=threads,
        seconds=seconds,
        pairs=pairs,
        seed=seed,
        progress=progress,
    )["after"]


def compare_many(
    models: Mapping[str, Model | Path],
    feeds: Mapping[str, np.ndarray],
    *,
    backend: Backend,
    reference: str,
    threads: int = 1,
    seconds: float = 4.0,
    pairs: int = 6,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Latency]:
    """Latency of any number of models, interleaved, each beside the reference (whose own ratio is 1).

    Args:
        models: by name, in memory or as files; all take the same feeds.
        reference: name of the model that ratios refer to.
        seconds: time for each two models, by the clock that measures. Models whose rounds do not fit get fewer sets
            of sessions, then more time; bounds wider than 1.5 % either way get up to three times as much.
        pairs: sets of fresh sessions.
        seed: of the bootstrap.
    """
    if reference not in models:
        raise BadInput(f"no model is called {reference!r}; there are {', '.join(models)}")
    budget = int(seconds * max(len(models), 2) / 2 * 1e9)
    clock = _clock(backend, threads)
    done = progress("measuring", pairs)
    sets: list[np.ndarray] = []  # of each set: time [round, model] in nanoseconds
    spent, collecting = 0, gc.isenabled()
    gc.disable()
    try:
        while True:
            names = list(models) if len(sets) % 2 == 0 else list(models)[::-1]
            sessions = {name: backend.session(models[name], threads=threads) for name in names}
            ordered = [sessions[name] for name in models]
            times, took, planned = _measure_set(ordered, feeds, clock, budget, pairs)
            del sessions, ordered  # two sets at once would double the memory
            sets.append(times)
            spent += took
            done(1)
            if len(sets) >= planned:
                results = _summary(models, sets, reference, seed)
                worst = max(max(high - ratio, ratio - low) / ratio for ratio, low, high in results.values())
                if worst <= WIDE or spent > PATIENCE * budget:
                    break
    finally:
        if collecting:
            gc.enable()
    batch = next((a.shape[0] for a in feeds.values() if a.ndim), 1)
    medians = dict(zip(models, np.median(np.concatenate(sets), axis=0) / 1e6, strict=True))
    rounds = sum(len(times) for times in sets)
    return {
        name: Latency(float(medians[reference]), float(medians[name]), *bounds, rounds, threads, batch)
        for name, bounds in results.items()
    }


def _clock(backend: Backend, threads: int) -> Callable[[], int]:
    """Nanoseconds. Where the calling thread does all the work, its own processor time: others' load is not in it."""
    if threads == 1 and getattr(backend, "runs_in_caller", False):
        return time.thread_time_ns
    return time.perf_counter_ns


def _measure_set(
    sessions: Sequence[Session], feeds: Mapping[str, np.ndarray], clock: Callable[[], int], budget: int, pairs: int
) -> tuple[np.ndarray, int, int]:
    """Rounds with one set of sessions: their times, what they took in all, and how many sets the budget allows."""
    calls = []
    for session in sessions:
        least = min(_time(session, feeds, clock, WARM_UP))
        calls.append(min(math.ceil(BLOCK_NS / max(least, 1)), 10_000))
    rounds: list[np.ndarray] = []
    took, planned = 0, pairs
    while len(rounds) < LEAST_ROUNDS or took < budget / planned:
        order = [*range(len(sessions)), *reversed(range(len(sessions)))]
        if len(rounds) % 2:
            order = order[len(sessions) :] + order[: len(sessions)]
        sums = np.zeros(len(sessions))
        for index in order:
            times = _time(sessions[index], feeds, clock, calls[index])
            sums[index] += _least(times) / 2
            took += sum(times)
        rounds.append(sums)
        planned = max(2, min(pairs, budget * len(rounds) // max(LEAST_ROUNDS * took, 1)))
    return np.array(rounds), took, planned


def _time(session: Session, feeds: Mapping[str, np.ndarray], clock: Callable[[], int], calls: int) -> list[int]:
    times = []
    for _ in range(calls):
        start = clock()
        session.run(feeds)
        times.append(clock() - start)
    return times


def _least(times: Sequence[int]) -> float:
    """The median, over groups of a few calls, of the quickest in each."""
    return float(np.median([min(times[i : i + GROUP]) for i in range(0, len(times), GROUP)]))


def _summary(
    names: Mapping[str, object], sets: Sequence[np.ndarray], reference: str, seed: int
) -> dict[str, tuple[float, float, float]]:
    """(ratio, low, high) of each model to the reference."""
    column = list(names).index(reference)
    return {
        name: _bounds([s[:, index] / s[:, column] for s in sets], np.random.default_rng(seed))
        for index, name in enumerate(names)
    }


def _bounds(ratios: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[float, float, float]:
    """Median of all ratios with 95 % bounds: sets are drawn with replacement, then rounds within each."""
    medians = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        drawn = [ratios[i] for i in rng.integers(len(ratios), size=len(ratios))]
        medians[k] = np.median(np.concatenate([r[rng.integers(len(r), size=len(r))] for r in drawn]))
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(np.concatenate(ratios))), float(low), float(high)


def random_feeds(
    model: Model, batch: int = 1, dims: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs to measure with: normal floats, integers 0 or 1, random flags.

    Args:
        batch: size of a first axis that is dynamic.
        dims: sizes of other symbolic dimensions by name.

    Raises:
        BadInput: the batch is fixed at another size, or a dimension's size is not known.
    """
    if model.batch is not None and model.batch != batch:
        raise BadInput(f"the model's batch is fixed at {model.batch}; --batch {batch} cannot be measured")
    rng, sizes = np.random.default_rng(seed), dict(dims or {})
    for info in model.inputs:
        if info.shape and isinstance(info.shape[0], str):
            sizes.setdefault(info.shape[0], batch)
    feeds = {}
    for info in model.inputs:
        if info.shape is None:
            raise BadInput(f"input {info.name!r} has no shape; state one in the model")
        shape = [_size(info.name, axis, d, sizes, batch) for axis, d in enumerate(info.shape)]
        if info.dtype.kind in "iub":
            feeds[info.name] = rng.integers(0, 2, shape).astype(info.dtype)
        elif info.dtype.kind in "OSU":
            raise BadInput(f"input {info.name!r} takes strings, which cannot be made up")
        else:
            feeds[info.name] = rng.standard_normal(shape).astype(info.dtype)
    return feeds


def _size(name: str, axis: int, dim: int | str | None, sizes: Mapping[str, int], batch: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim is None:
        if axis == 0:
            return batch
        raise BadInput(f"axis {axis} of input {name!r} is dynamic and has no name; give it a size in the model")
    if dim not in sizes:
        raise BadInput(f"axis {axis} of input {name!r} has the symbolic size {dim!r}; state it with --dim {dim}=value")
    return sizes[dim]
