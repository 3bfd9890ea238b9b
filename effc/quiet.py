"""Whether this machine is at its own speed now: others' work beside ours may slow a core by half for a while.

A small network is timed again and again; while it takes longer than it does at best, what is measured is not true of
the machine. Ratios of models measured in turns need none of this; times that stand for themselves do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from effc.capture import from_proto
from effc.runtime import Backend

SLOWER = 1.04  # than the best, and the machine counts as disturbed;
SLOWER_TOGETHER = 1.15  # with more threads than one, whose meeting takes now more, now less
LOOKS, FIRST_LOOKS = 4, 400
BLOCK_SECONDS, MOST_IN_BLOCK = 0.01, 12  # of runs between two looks
# Shares of timings that count, for others' load only ever adds: of undisturbed runs, and where there were none.
LOWEST, LEAST = 0.5, 0.1


class Quiet:
    """A watch over the machine's speed.

    Args:
        threads: that the watched work runs with.
        clock: nanoseconds, the one that measures the work; None: that of the calling thread where it does all of it.

    Attributes:
        best: nanoseconds that the small network took at best.
    """

    def __init__(self, backend: Backend, threads: int, clock: Callable[[], int] | None = None) -> None:
        self.clock = clock or (time.thread_time_ns if threads == 1 else time.perf_counter_ns)
        self._session = backend.session(from_proto(_network()), threads=threads)
        self._slower = SLOWER if threads == 1 else SLOWER_TOGETHER
        self._feeds = {"x": np.ones((1, 32, 28, 28), np.float32)}
        self.best = min(self._look() for _ in range(FIRST_LOOKS))

    def now(self) -> bool:
        """Whether the machine is undisturbed right now; a look takes about a millisecond."""
        least = min(self._look() for _ in range(LOOKS))
        self.best = min(self.best, least)
        return least <= self._slower * self.best

    def runs(
        self, run: Callable[[], object], *, seconds: float, fewest: int, most: int, patience: float
    ) -> tuple[list[int], list[int]]:
        """Run something until enough of its runs were undisturbed.

        Args:
            run: what is timed.
            seconds, fewest, most: of undisturbed runs.
            patience: seconds after which it has to do with what there is.

        Returns:
            nanoseconds of every run, and the places of those that count: of blocks at whose both ends the machine was
            undisturbed, but for each block's first, which finds the caches full of other things. There may be none.
        """
        times = [self._time(run) for _ in range(3)]
        once = max(min(times), 1)
        in_block = int(np.clip(BLOCK_SECONDS * 1e9 / once, 1, MOST_IN_BLOCK)) + 1
        least = int(np.clip(seconds * 1e9 / once, fewest, most))
        good: list[int] = []
        started, before = time.perf_counter(), self.now()
        while len(good) < least and time.perf_counter() - started < patience:
            first = len(times)
            times += [self._time(run) for _ in range(in_block)]
            after = self.now()
            if before and after:
                good += range(first + 1, len(times))
            before = after
        return times, good

    def _time(self, run: Callable[[], object]) -> int:
        start = self.clock()
        run()
        return self.clock() - start

    def _look(self) -> int:
        return self._time(lambda: self._session.run(self._feeds))


def lowest(times: Sequence[float], good: Sequence[int]) -> float:
    """Mean of the lower half of the runs that count; of the least tenth of all where none does."""
    chosen, share = ([times[i] for i in good], LOWEST) if good else (times, LEAST)
    return float(np.mean(sorted(chosen)[: max(1, round(len(chosen) * share))]))


def _network():
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((32, 32, 3, 3), np.float32) * 0.06, f"w{i}") for i in "01"]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["y", "w1"], ["z"], pads=[1, 1, 1, 1]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32, 28, 28]) for name in "xz"]
    graph = helper.make_graph(nodes, "anchor", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
