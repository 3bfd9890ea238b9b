"""effc.calibrate: a target from measured kernels, made up by a known law; the networks they are measured in; and one
that onnxruntime is measured for. Nothing here depends on how fast this machine is."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import effc.calibrate
from effc import target as targets
from effc.backends import _onnxruntime_plans as plans
from effc.backends import _onnxruntime_sequences as sequences
from effc.backends._onnxruntime_calibration import _roof
from effc.backends._onnxruntime_networks import Net
from effc.calibrate import MOST_ROWS, calibrate, last_cache
from effc.capture import from_proto
from effc.kernels import CONVOLUTION, ELEMENTS, MATRIX, Kernel, describe
from effc.measure import random_feeds
from effc.model import Model
from effc.predict import MEASURED, estimate, predict
from effc.quiet import Quiet
from effc.registry import backend
from effc.runtime import Timings
from effc.target import KERNEL_FLAGS, Roof, Target, calibrated_file, cpu_flags, find, processor
from effc.targetfile import from_json, to_json
from effc.verify import verify
from tests import networks
from tests.fake_kernels import ROOF, drawn, law, law_together, noisy

RUNTIME = backend("onnxruntime")
COUNTS = {"conv": 90, "qconv": 60, "gemm": 40, "Relu": 30, "Relu:int8": 30}
ALL = 4  # threads
NOISE = 0.02


class Fake:
    """A runtime whose kernels take what the law says, give or take 2 %; what it was asked for is kept."""

    name = "onnxruntime"

    def __init__(self, counts: dict[str, int] = COUNTS, together: Sequence[str] | None = None) -> None:
        rng = np.random.default_rng(1)
        self.kernels = [drawn(kind, rng) for kind, count in counts.items() for _ in range(count)]
        self.together = counts if together is None else together
        self.asked: list[tuple[int, float]] = []

    def version(self) -> str:
        return "1.2.3"

    def calibrate(self, threads: int, seconds: float, progress: Any) -> Timings:
        self.asked.append((threads, seconds))
        progress(f"with {threads}", 1)(1)
        rng, time = np.random.default_rng(threads), law if threads == 1 else law_together
        wanted = [k for k in self.kernels if threads == 1 or k.key in self.together]
        samples = [(k, noisy(time(k), rng, NOISE)) for k in wanted]
        return Timings(samples, replace(ROOF, bandwidth=threads * 1e10), 19, 20)


@pytest.fixture
def cores(monkeypatch):
    """Says how many this machine has."""

    def set_to(count: int) -> None:
        monkeypatch.setattr(effc.calibrate, "cores", lambda: count)

    set_to(ALL)
    return set_to


@pytest.fixture(scope="module")
def made() -> Target:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effc.calibrate, "cores", lambda: ALL)
        runtime: Any = Fake()
        return calibrate(runtime, seconds=10)


def off(target: Target, kernels: Sequence[Kernel], threads: int, time: Any) -> np.ndarray:
    found = estimate(kernels, target, threads)
    assert {e.basis for e in found} == {MEASURED}
    return np.array([abs(math.log(e.seconds * 1e6 / time(k))) for e, k in zip(found, kernels, strict=True)])


class TestFromALaw:
    @pytest.mark.parametrize(("threads", "time"), [(1, law), (ALL, law_together)])
    @pytest.mark.parametrize(
        ("kind", "half", "most"),
        [
            ("conv", 0.04, 0.2),
            ("qconv", 0.05, 0.25),
            ("gemm", 0.03, 0.1),
            ("Relu", 0.03, 0.08),
            ("Relu:int8", 0.03, 0.08),
        ],
    )
    def test_shapes_that_were_not_measured_are_told(self, made, kind, half, most, threads, time):
        """Half of them and 95 % of them within the stated shares, from samples with 2 % noise."""
        rng = np.random.default_rng(77)
        found = off(made, [drawn(kind, rng) for _ in range(150)], threads, time)
        assert np.median(found) < half and np.quantile(found, 0.95) < most

    def test_its_errors_are_about_right(self, made):
        """Of all kinds together, in units of what is stated: 1 on average, within a factor of two."""
        rng = np.random.default_rng(78)
        kernels = [drawn(kind, rng) for kind in COUNTS for _ in range(60)]
        stated = np.array([e.error for e in estimate(kernels, made)])
        assert 0.5 < np.sqrt(np.mean((off(made, kernels, 1, law) / stated) ** 2)) < 2

    def test_a_model_s_latency_is_the_law_s(self, made):
        """A dozen kernels as one model: within 5 %."""
        rng = np.random.default_rng(79)
        kernels = [drawn(kind, rng, f"k{i}") for i, kind in enumerate(list(COUNTS) * 3)]
        runtime: Any = SimpleNamespace(kernels=lambda *_: (kernels, {}))
        for threads, taken in ((1, law), (ALL, law_together)):
            found = predict(from_proto(networks.plain()), made, backend=runtime, threads=threads).total
            assert found.seconds == pytest.approx(ROOF.run_overhead + sum(map(taken, kernels)) * 1e-6, rel=0.05)
            assert found.error < 0.1 and found.basis == MEASURED


class TestTheTarget:
    def test_it_says_what_was_measured_where(self, made):
        assert (made.name, made.runtime, made.device, made.origin) == (
            "onnxruntime-calibrated", "onnxruntime", "cpu", targets.MEASURED
        )  # fmt: skip
        assert (made.processor, made.runtime_version) == (processor(), "1.2.3")
        assert made.source.startswith(f"measured on {date.today()} in ") and "effc calibrate-target" in made.source
        assert "of 20 networks" in made.source  # how many were disturbed
        assert made.local and made.flags == KERNEL_FLAGS & cpu_flags() and made.cache == last_cache()
        assert made.roofs == {1: replace(ROOF, bandwidth=1e10), ALL: replace(ROOF, bandwidth=4e10)}

    def test_the_time_is_shared_between_one_thread_and_all(self, cores):
        runtime: Any = Fake({"Relu": 12})
        calibrate(runtime, seconds=10)
        (one, alone), (every, together) = runtime.asked
        assert (one, every) == (1, ALL) and alone + together == pytest.approx(10) and alone > together

    def test_a_single_core_has_all_of_it(self, cores):
        cores(1)
        runtime: Any = Fake({"Relu": 12})
        found = calibrate(runtime, seconds=10)
        assert runtime.asked == [(1, 10)] and set(found.kernels) == set(found.roofs) == {1}

    def test_progress_is_told(self, cores):
        told = []
        runtime: Any = Fake({"Relu": 12})
        calibrate(runtime, seconds=10, progress=lambda what, total=None: told.append((what, total)) or (lambda n: None))
        assert told == [("with 1", 1), (f"with {ALL}", 1)]

    def test_tables_by_kind_and_width(self, made):
        assert {n: sorted(kinds) for n, kinds in made.kernels.items()} == {1: sorted(COUNTS), ALL: sorted(COUNTS)}
        for kind, count in COUNTS.items():
            alone, together = made.kernels[1][kind], made.kernels[ALL][kind]
            assert len(alone.rows) == len(together.rows) == count
            assert alone.columns[-1] == "us" and together.columns[-2:] == ("us_alone", "us")
            ends = {row[:-1]: row[-1] for row in alone.rows}
            assert all(ends[row[:-2]] == row[-2] for row in together.rows)  # beside what one thread took

    def test_what_was_not_measured_alone_is_no_ratio(self, cores):
        """And what was measured with one thread only has no table with all."""
        runtime: Any = Fake({"Relu": 20, "gemm": 20}, together=["gemm"])
        found = calibrate(runtime, seconds=10)
        assert (sorted(found.kernels[1]), sorted(found.kernels[ALL])) == (["Relu", "gemm"], ["gemm"])
        measure = runtime.calibrate
        extra = drawn("Relu", np.random.default_rng(5))

        def more(threads: int, *rest: Any) -> Timings:
            timings = measure(threads, *rest)
            return replace(timings, samples=[*timings.samples, (extra, 1.0)]) if threads > 1 else timings

        runtime.calibrate = more
        assert sorted(calibrate(runtime, seconds=10).kernels[ALL]) == ["gemm"]

    def test_a_shape_seen_more_than_once_has_the_median_alone(self, cores):
        some = drawn("Relu", np.random.default_rng(5))
        times = {1: [4.0, 6.0, 50.0], ALL: [3.0]}
        runtime: Any = Fake()
        runtime.calibrate = lambda threads, *_: Timings([(some, us) for us in times[threads]], ROOF)
        found = calibrate(runtime, seconds=10)
        assert [row[-2:] for row in found.kernels[ALL]["Relu"].rows] == [(6.0, 3.0)]
        assert [row[-1] for row in found.kernels[1]["Relu"].rows] == [4, 6, 50]

    @pytest.mark.parametrize(("kind", "family"), [("conv", CONVOLUTION), ("gemm", MATRIX), ("Relu", ELEMENTS)])
    def test_of_many_samples_some_of_all_sizes_are_kept(self, cores, monkeypatch, kind, family):
        """So many of a kind, the quickest and the slowest among them."""
        monkeypatch.setitem(MOST_ROWS, family, 9)
        cores(1)
        runtime: Any = Fake({kind: 100})
        rows = calibrate(runtime, seconds=10).kernels[1][kind].rows
        us = [row[-1] for row in rows]
        times = sorted(t for _, t in runtime.calibrate(1, 1.0, lambda *_: lambda n: None).samples)
        assert us == sorted(us) and len(us) == 9
        assert us == pytest.approx([times[round(place)] for place in np.linspace(0, 99, 9)])

    def test_without_a_sample_there_are_rooflines(self, cores):
        runtime: Any = Fake({})
        found = calibrate(runtime, seconds=10)
        assert found.kernels == {1: {}, ALL: {}} and from_json(to_json(found), "here").roofs == found.roofs

    def test_its_file(self, made, tmp_path):
        """Everything comes back; a person reads who measured it, when, on what."""
        text = to_json(made)
        assert to_json(from_json(text, "here")) == text
        raw = json.loads(text)
        assert list(raw)[:9] == [
            "effc_target", "name", "runtime", "device", "origin", "source", "processor", "runtime_version", "flags"
        ]  # fmt: skip
        assert raw["kernels"]["1"]["Relu"]["columns"][0] == "elements"
        assert len(raw["kernels"]["4"]["conv"]["rows"]) == COUNTS["conv"]
        file = tmp_path / "mine.json"
        file.write_text(text)
        assert find(str(file), version="1.2.3").local

    def test_the_last_cache_before_main_memory(self, monkeypatch, tmp_path):
        for index, size in enumerate(["32K", "1024K", "36M", "odd"]):
            (tmp_path / f"index{index}").mkdir()
            (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
        monkeypatch.setattr(effc.calibrate, "Path", lambda _: tmp_path)
        assert last_cache() == 36 << 20
        monkeypatch.setattr(effc.calibrate, "Path", lambda _: tmp_path / "none")
        assert last_cache() == 32 << 20


MAKERS = {
    f.__name__: f
    for f in (
        plans.family, plans.walk, plans.movements, plans.groups,
        sequences.dense, sequences.transformer, sequences.sequence,
    )
}  # fmt: skip


def modest(maker: Any, quantised: bool, count: int = 3) -> list[tuple[int, onnx.ModelProto, int]]:
    """The first seeds whose networks are quick to run, with the networks and their batches."""
    found = []
    for seed in range(40):
        proto, batch = maker(seed, quantised)
        (data,) = proto.graph.input
        shape = [d.dim_value or batch for d in data.type.tensor_type.shape.dim]
        if math.prod(shape) <= 100_000:
            found.append((seed, proto, batch))
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "quantised"])
@pytest.mark.parametrize("name", MAKERS)
class TestNetworks:
    """Those that kernels are measured in."""

    def test_they_run(self, name, quantised):
        """The checker and effc's own rules pass; onnxruntime runs them at the stated batch, and finite numbers come."""
        some = modest(MAKERS[name], quantised)
        assert len(some) == 3
        for seed, proto, batch in some:
            onnx.checker.check_model(proto, full_check=True)
            model = from_proto(proto)
            verify(model)
            assert model.batch in (None, batch), seed
            for optimize in (True, False):
                outputs = RUNTIME.session(model, optimize=optimize).run(random_feeds(model, batch))
                for array in outputs.values():
                    assert array.shape[0] == batch and np.isfinite(array).all() and np.ptp(array) > 0, seed

    def test_shapes_are_as_the_writer_says(self, name, quantised, monkeypatch):
        """Each tensor's, by onnx's own inference."""
        written: list[tuple[Net, onnx.ModelProto]] = []
        real = Net.model

        def model(self: Net) -> onnx.ModelProto:
            written.append((self, real(self)))
            return written[-1][1]

        monkeypatch.setattr(Net, "model", model)
        for _, proto, batch in modest(MAKERS[name], quantised):
            (own,) = (net.shapes for net, made in written if made is proto)
            shapes = from_proto(proto).shapes(batch)
            known = {k: s for k, s in shapes.items() if k in own and s is not None}  # of standard operators
            assert "input" in known and known == {k: own[k] for k in known}

    def test_their_kernels_can_be_told(self, name, quantised):
        """All of them have shapes, and describe themselves by finite numbers."""
        for seed, proto, batch in modest(MAKERS[name], quantised):
            found, stands = RUNTIME.kernels(from_proto(proto), batch)
            assert found and set(stands) == {node.name for node in proto.graph.node}
            for kernel in found:
                assert kernel.known, (seed, kernel)
                terms, features = describe(kernel.dims, 4)
                assert np.isfinite(terms).all() and np.isfinite(features).all() and (terms >= 0).all(), (seed, kernel)

    def test_a_seed_makes_the_same_network(self, name, quantised):
        first, second = (MAKERS[name](3, quantised)[0].SerializeToString(deterministic=True) for _ in range(2))
        other = MAKERS[name](4, quantised)[0].SerializeToString(deterministic=True)
        assert first == second != other


def test_quantised_networks_run_in_integers():
    """At least half of the products of each family with images: the rest is what onnxruntime leaves in float."""
    for name in ("family", "walk", "groups", "sequence"):
        for seed, proto, batch in modest(MAKERS[name], quantised=True):
            found, _ = RUNTIME.kernels(from_proto(proto), batch)
            codes = sum(k.macs for k in found if k.dtype == "int8")
            assert codes >= 0.5 * sum(k.macs for k in found), (name, seed)


@pytest.fixture(scope="module")
def real() -> Target:
    """Of onnxruntime on this machine, in about a second, however disturbed it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quiet, "now", lambda self: True)
        patch.setattr(effc.calibrate, "cores", lambda: min(2, targets.cores()))
        return calibrate(RUNTIME, seconds=1.0)


def test_the_roof_is_what_the_best_reach_and_no_outlier():
    """Of a hundred kernels that reach 1 to 100 multiply-accumulates a nanosecond the 98th part; no short ones."""
    conv = drawn("conv", np.random.default_rng(0))
    samples = [(replace(conv, macs=rate * 10**5), 100.0) for rate in range(1, 101)]
    samples += [(replace(conv, macs=10**9), 10.0), (replace(conv, dtype="int8", macs=4 * 10**6), 40.0)]
    watch: Any = SimpleNamespace(clock=time.perf_counter_ns, best=2e5)
    found = _roof(samples, 7.0, 1, watch)
    assert found.macs == {"float32": pytest.approx(98.02e9, rel=1e-4), "int8": pytest.approx(1e11)}
    assert (found.run_overhead, found.watch) == (pytest.approx(7e-6), pytest.approx(2e-4)) and found.bandwidth > 1e8


class TestThisMachine:
    def test_its_target_is_this_machine_s_from_then_on(self, real):
        text = to_json(real)
        assert to_json(from_json(text, "here")) == text
        calibrated_file().parent.mkdir(parents=True, exist_ok=True)
        calibrated_file().write_text(text)
        try:
            found = find()
        finally:
            calibrated_file().unlink()
        assert (found.name, found.origin, found.local) == ("onnxruntime-calibrated", targets.MEASURED, True)
        assert found.runtime_version == onnxruntime.__version__ and found.remark == ""
        assert find().name in targets.names()

    def test_its_roofs_are_rates(self, real):
        for roof in real.roofs.values():
            assert isinstance(roof, Roof) and roof.macs["float32"] > 0 and roof.bandwidth > 0
            assert roof.overhead > 0 and roof.run_overhead >= 0 and roof.watch > 0

    def test_kernels_of_both_types_were_measured(self, real):
        kinds = set(real.kernels[1])
        assert any(k.startswith("conv") for k in kinds) and "free" in kinds
        for samples in real.kernels[1].values():
            assert all(row[-1] > 0 for row in samples.rows)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_it_predicts(self, real, threads):
        """Something positive for every node of a model."""
        model: Model = from_proto(networks.residual())
        found = predict(model, real, backend=RUNTIME, threads=threads)
        assert set(found.nodes) | set(found.fused) == {node.name for node in model.graph}
        assert all(np.isfinite(e.seconds) and e.seconds > 0 for e in found.nodes.values())
        assert found.total.seconds > 0 and np.isfinite(found.total.error)
