"""Measuring: statistics against known answers on a fake clock, order and budgets; nothing here asserts real time."""

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from scipy.stats import norm

import effc.measure as measure
from effc.backends.onnxruntime import OnnxRuntime
from effc.capture import from_proto
from effc.errors import BadInput
from effc.measure import Latency, compare, compare_many, random_feeds
from effc.model import Model

FEEDS = {"x": np.zeros((4, 1), np.float32)}


def of_two(runtime: Any, **options: Any) -> Latency:
    """Models of a fake runtime are mere names."""
    a: Any = "a"
    b: Any = "b"
    return compare(a, b, FEEDS, backend=runtime, **options)


class Clock:
    """Stands for the module `time`; sessions move it on."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        return self.now

    thread_time_ns = perf_counter_ns


class Runtime:
    """Sessions whose calls take a stated time: model name -> function of (set, call) in nanoseconds."""

    def __init__(self, clock: Clock, takes) -> None:
        self.clock, self.takes = clock, takes
        self.made: list[str] = []
        self.calls: list[str] = []

    def session(self, model, *, threads=1, optimize=True, expose=()):
        self.made.append(model)
        order, count = self.made.count(model) - 1, iter(range(10**9))

        def run(feeds):
            assert not gc.isenabled()
            self.calls.append(model)
            self.clock.now += int(self.takes[model](order, next(count)))
            return {}

        return SimpleNamespace(run=run)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_the_ratio_of_steady_models_is_exact(clock):
    runtime = Runtime(clock, {"a": lambda s, c: 2e6, "b": lambda s, c: 1e6})
    latency = of_two(runtime, seconds=1, pairs=4)
    assert (latency.before_ms, latency.after_ms, latency.ratio) == (2.0, 1.0, 0.5)
    assert (latency.low, latency.high, latency.threads, latency.batch) == (0.5, 0.5, 1, 4)
    assert latency.faster
    assert not latency.slower
    assert gc.isenabled()
    # A block lasts 5 ms: 3 calls of 2 ms, 5 of 1 ms; a round has two of each, and rounds fill a quarter second a set.
    assert latency.rounds == 4 * np.ceil(0.25e9 / (2 * (3 * 2e6 + 5 * 1e6)))


def test_models_run_forwards_and_backwards_and_take_turns_to_load_first(clock):
    runtime: Any = Runtime(clock, {name: lambda s, c: 6e6 for name in "abc"})
    names: Any = {name: name for name in "abc"}
    compare_many(names, FEEDS, backend=runtime, reference="a", seconds=0.1, pairs=2)
    assert runtime.made == list("abccba")
    warm_up, rounds = runtime.calls[:9], runtime.calls[9:21]
    assert warm_up == list("aaabbbccc")
    assert rounds == list("abccba") + list("cbaabc")


def test_speed_that_drifts_cancels(clock):
    """The machine gets slower throughout, by half in all: forwards and backwards, the ratio stays what it is."""

    def drifting(nanoseconds):
        return lambda s, c: nanoseconds * (1 + clock.now / 2e9)

    runtime = Runtime(clock, {"a": drifting(1e6), "b": drifting(1.1e6)})
    latency = of_two(runtime, seconds=1)
    assert latency.ratio == pytest.approx(1.1, rel=1e-3)


def test_interruptions_do_not_count(clock):
    """Every seventh call takes thirty times as long."""
    interrupted = {n: lambda s, c, n=n: n * (30 if c % 7 == 3 else 1) for n in (1e6, 1.05e6)}
    runtime = Runtime(clock, {"a": interrupted[1e6], "b": interrupted[1.05e6]})
    assert of_two(runtime, seconds=1).ratio == pytest.approx(1.05)


def test_bounds_of_independent_rounds_agree_with_theory():
    """The median of n normal numbers has the standard error sqrt(pi / 2) sigma / sqrt(n).

    Drawing sets, then rounds, counts the rounds' variance twice: sqrt(2) wider, on the safe side.
    """
    rng, sigma, sets, rounds = np.random.default_rng(0), 0.05, 20, 50
    widths, inside, trials = [], 0, 20
    for _ in range(trials):
        ratio, low, high = measure._bounds(list(1 + sigma * rng.standard_normal((sets, rounds))), rng)
        assert low <= ratio <= high
        widths.append(high - low)
        inside += low <= 1 <= high
    expected = 2 * norm.ppf(0.975) * np.sqrt(np.pi / 2) * sigma / np.sqrt(sets * rounds) * np.sqrt(2)
    assert np.mean(widths) == pytest.approx(expected, rel=0.15)
    assert inside >= trials - 2  # bounds sqrt(2) wider hold 99.4 % of the time


def test_bounds_widen_with_differences_between_sets():
    """Sets that differ by more than their rounds do: the bounds follow the sets, however many rounds there are."""
    rng = np.random.default_rng(0)
    sets = [1 + 0.05 * x + 0.001 * rng.standard_normal(1000) for x in rng.standard_normal(10)]
    _, low, high = measure._bounds(sets, rng)
    assert high - low > 0.03
    alone = measure._bounds([np.concatenate(sets)], rng)
    assert alone[2] - alone[1] < (high - low) / 5


def test_the_seed_fixes_the_bounds():
    sets = list(np.random.default_rng(1).normal(1, 0.1, (5, 20)))
    first, second, other = (measure._bounds(sets, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_slow_models_get_fewer_sets_and_some_rounds(clock):
    runtime = Runtime(clock, {"a": lambda s, c: 2e9, "b": lambda s, c: 2e9})
    latency = of_two(runtime, seconds=4, pairs=6)
    assert latency.rounds == 2 * measure.LEAST_ROUNDS
    assert runtime.made == ["a", "b", "b", "a"]


def test_wide_bounds_get_more_time_but_not_for_ever(clock):
    rng = np.random.default_rng(0)
    runtime = Runtime(clock, {n: lambda s, c: 20e6 * rng.lognormal(0, 0.5) for n in "ab"})
    latency = of_two(runtime, seconds=1, pairs=4)
    assert latency.high - latency.low > 2 * measure.WIDE
    assert 3 <= clock.now / 1e9 < 5  # three times the second asked for, warm-up and the last set beside


def test_only_certainty_is_called_slower_or_faster():
    def latency(low, high):
        return Latency(1, 1, (low + high) / 2, low, high, 100, 1, 1)

    verdicts = [(latency(*b).slower, latency(*b).faster) for b in ((1.03, 1.1), (1.01, 1.2), (0.9, 1.01), (0.8, 0.99))]
    assert verdicts == [(True, False), (False, False), (False, False), (False, True)]


def test_the_clock_is_the_threads_own_where_it_does_all_the_work():
    assert measure._clock(OnnxRuntime(), 1) is measure.time.thread_time_ns
    assert measure._clock(OnnxRuntime(), 2) is measure.time.perf_counter_ns
    other: Any = object()
    assert measure._clock(other, 1) is measure.time.perf_counter_ns


def test_an_unknown_reference_is_refused():
    models: Any = {"a": None, "b": None}
    runtime: Any = None
    with pytest.raises(BadInput, match="no model is called 'c'; there are a, b"):
        compare_many(models, FEEDS, backend=runtime, reference="c")


def test_progress_counts_sets(clock):
    told = []
    runtime = Runtime(clock, {n: lambda s, c: 1e6 for n in "ab"})

    def progress(what, total=None):
        told.append((what, total))
        return told.append

    of_two(runtime, seconds=1, pairs=3, progress=progress)
    assert told == [("measuring", 3), 1, 1, 1]


def model(**shapes) -> Model:
    """A model that adds nothing up: each input (name -> (type, shape)) passes through."""
    inputs = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in shapes.items()]
    outputs = [helper.make_tensor_value_info(f"{n}_out", t, s) for n, (t, s) in shapes.items()]
    nodes = [helper.make_node("Identity", [n], [f"{n}_out"]) for n in shapes]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_a_real_model_beside_itself():
    net = model(x=(TensorProto.FLOAT, ["N", 8]))
    latency = compare(net, net, random_feeds(net, 3), backend=OnnxRuntime(), seconds=0.05, pairs=2)
    assert latency.low <= latency.ratio <= latency.high
    assert latency.before_ms > 0
    assert latency.batch == 3


def test_random_feeds():
    net = model(
        x=(TensorProto.FLOAT, ["N", 3, "L"]),
        ids=(TensorProto.INT64, [None, "L"]),
        on=(TensorProto.BOOL, [64]),
        h=(TensorProto.FLOAT16, [1000]),
    )
    feeds = random_feeds(net, 5, {"L": 7})
    assert {n: (a.shape, a.dtype.name) for n, a in feeds.items()} == {
        "x": ((5, 3, 7), "float32"),
        "ids": ((5, 7), "int64"),
        "on": ((64,), "bool"),
        "h": ((1000,), "float16"),
    }
    assert set(np.unique(feeds["ids"])) == {0, 1}
    assert feeds["h"].astype(float).std() == pytest.approx(1, abs=0.15)
    again = random_feeds(net, 5, {"L": 7})
    assert all(np.array_equal(feeds[n], again[n]) for n in feeds)
    assert not np.array_equal(feeds["h"], random_feeds(net, 5, {"L": 7}, seed=1)["h"])


@pytest.mark.parametrize(
    ("shape", "dims", "text"),
    [
        ([1, 3], {}, "the model's batch is fixed at 1; --batch 32 cannot be measured"),
        (["N", "L"], {}, "axis 1 of input 'x' has the symbolic size 'L'; state it with --dim L=value"),
        (["N", None], {}, "axis 1 of input 'x' is dynamic and has no name; give it a size in the model"),
    ],
)
def test_sizes_that_are_not_known_are_refused(shape, dims, text):
    with pytest.raises(BadInput, match=text):
        random_feeds(model(x=(TensorProto.FLOAT, shape)), 32, dims)


def test_an_input_without_a_shape_is_refused():
    net = model(x=(TensorProto.FLOAT, ["N"]))
    net.graph.inputs[0].shape = None
    with pytest.raises(BadInput, match="input 'x' has no shape; state one in the model"):
        random_feeds(net)
