"""effc.quiet: a machine whose speed is told, by a clock that only its work moves."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from effc import quiet
from effc.quiet import FIRST_LOOKS, LOOKS, SLOWER, SLOWER_TOGETHER, Quiet, lowest
from effc.registry import backend

LOOK, RUN = 200_000, 1_000_000  # nanoseconds of the small network, and of what is measured, undisturbed


class Machine:
    """Work takes `slow` times as long as it would; `after` so many looks, as often as stated, that changes.

    Attributes:
        now: nanoseconds since the beginning.
        looks, runs: how often the small network and the measured work ran.
    """

    def __init__(self) -> None:
        self.now = self.looks = self.runs = 0
        self.slow = 1.0
        self.asked: dict[str, Any] = {}
        self.plan: dict[int, float] = {}  # looks -> how slow from then on

    def clock(self) -> int:
        return self.now

    def session(self, model, *, threads: int):
        self.asked = {"model": model, "threads": threads}

        def run(feeds) -> None:
            self.looks += 1
            self.slow = self.plan.get(self.looks, self.slow)
            self.now += int(LOOK * self.slow)

        return SimpleNamespace(run=run)

    def run(self) -> None:
        self.runs += 1
        self.now += int(RUN * self.slow)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    """Patience is measured by its clock as well."""
    made = Machine()
    clocks = {"perf_counter": lambda: made.now / 1e9, "perf_counter_ns": made.clock, "thread_time_ns": made.clock}
    monkeypatch.setattr(quiet, "time", SimpleNamespace(**clocks))
    return made


def watch(machine: Any, threads: int = 1) -> Quiet:
    return Quiet(machine, threads, machine.clock)


def test_it_looks_long_enough_to_see_the_machine_at_its_best(machine):
    """Slow at first, at its own speed once in a while."""
    machine.slow = 2.0
    machine.plan = {FIRST_LOOKS // 2: 1.0, FIRST_LOOKS // 2 + 1: 2.0}
    found = watch(machine, threads=3)
    assert (found.best, machine.looks, machine.asked["threads"]) == (LOOK, FIRST_LOOKS, 3)
    assert not found.now()  # slow again


@pytest.mark.parametrize(("slow", "quiet"), [(1.0, True), (-0.01, True), (0.01, False), (3.0, False)])
@pytest.mark.parametrize(("threads", "bound"), [(1, SLOWER), (2, SLOWER_TOGETHER)])
def test_a_machine_is_disturbed_while_it_is_slower(machine, threads, bound, slow, quiet):
    """Small numbers are from the bound, which is wider where threads have to meet."""
    found = watch(machine, threads)
    slow += bound if slow < 1 else 0
    machine.slow = slow
    assert found.now() is quiet and found.best == LOOK
    machine.slow = 1.0
    assert found.now() is True


def test_one_quick_look_of_a_few_is_enough(machine):
    """A hiccup in the others says nothing."""
    found = watch(machine)
    machine.slow = 5.0
    machine.plan = {machine.looks + LOOKS - 1: 1.0, machine.looks + LOOKS: 5.0}
    assert found.now() is True


def test_a_machine_that_gets_quicker_is_held_to_that(machine):
    """Then its former speed counts as disturbed."""
    found = watch(machine)
    machine.slow = 0.8
    assert found.now() is True and found.best == int(0.8 * LOOK)
    machine.slow = 1.0
    assert found.now() is False


LIMITS: dict[str, Any] = {"seconds": 0.04, "fewest": 2, "most": 30, "patience": 1.0}


def runs(machine: Machine, **limits: float) -> tuple[list[int], list[int]]:
    return watch(machine).runs(machine.run, **LIMITS | limits)


def test_runs_of_an_undisturbed_machine_count_but_for_each_block_s_first(machine):
    """40 runs of a millisecond are wanted, and 30 are the most; blocks of 10 and one more that finds cold caches."""
    times, good = runs(machine)
    assert times == [RUN] * 36 and machine.runs == 36  # three to know how long one takes, three blocks of 11
    assert good == [i for i in range(3, 36) if i not in (3, 14, 25)]


def test_a_block_between_two_quiet_looks_counts_and_no_other(machine):
    """The machine slows down within the second block, and recovers within the fourth."""
    first = FIRST_LOOKS + LOOKS  # looks before the first block
    machine.plan = {first + LOOKS + 1: 2.0, first + 3 * LOOKS + 1: 1.0}
    times, good = runs(machine)
    assert {times[i] for i in good} == {RUN} and 2 * RUN in times
    blocks = sorted({(i - 3) // 11 for i in good})
    assert blocks == [0, 4, 5]  # between, one of a block's ends was slow
    assert len(good) == 30


@pytest.mark.parametrize(("work", "wanted"), [(0.0055, 6), (0.5, 0)])
def test_wishes_are_kept_within_limits(machine, work, wanted):
    """So many seconds of runs, at least `fewest` and at most `most` of them."""
    _, good = runs(machine, seconds=work, fewest=1, most=wanted or 7)
    assert len(good) >= (wanted or 7) and len(good) <= (wanted or 7) + 10


def test_long_runs_go_in_blocks_of_their_own(machine):
    """One that takes longer than a block is looked at before and after each time; the second of two counts."""
    slow = SimpleNamespace(run=lambda: setattr(machine, "now", machine.now + 50_000_000))
    times, good = watch(machine).runs(slow.run, **LIMITS | {"fewest": 2, "patience": 10.0})
    assert good == [4, 6] and len(times) == 7


def test_patience_ends(machine):
    """A machine that is never quiet: none of its runs counts, and it does not wait for ever."""
    found = watch(machine)
    machine.slow = 2.0
    started = machine.now
    times, good = found.runs(machine.run, **LIMITS | {"patience": 0.2})
    waited = (machine.now - started) / 1e9
    assert len(times) > 3 and 0.2 <= waited < 0.2 + 3 * 2 * RUN / 1e9 + 0.05
    assert not good or max(good) < len(times)


def test_others_load_only_ever_adds():
    """So the lower half of the runs that count tells; where none does, the least tenth of all."""
    assert lowest([1, 3, 100, 2], [0, 1, 2, 3]) == 1.5
    assert lowest([1, 3, 100, 2], [1, 2]) == 3 and lowest([1, 7], [1]) == 7
    assert lowest(range(30), []) == 1 and lowest([9, 5], []) == 5


def test_it_watches_a_real_runtime(monkeypatch):
    """Two convolutions in onnxruntime; whatever the machine does, it gives an answer."""
    monkeypatch.setattr(quiet, "FIRST_LOOKS", 3)
    found = Quiet(backend("onnxruntime"), 1)
    assert found.best > 0 and found.now() in (True, False)
    total = []
    times, good = found.runs(lambda: total.append(np.ones(100_000).sum()), seconds=0.0, fewest=1, most=2, patience=0.05)
    assert len(times) == len(total) >= 3 and min(times) > 0 and set(good) <= set(range(len(times)))
