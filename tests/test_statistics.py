"""effc.statistics: one pass over the data against NumPy on all of it at once, and against onnxruntime itself."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest

from effc import edit, statistics
from effc.capture import from_proto
from effc.contract import Context
from effc.data import open_data
from effc.errors import BadInput
from effc.model import Model
from effc.registry import backend
from effc.statistics import Bins, Histogram, Mean, Request, batch_size, collect
from effc.target import find
from tests import networks
from tests.networks import Net, feeds, run


def accumulated(request: Request, *batches: np.ndarray) -> Any:
    accumulator = request.start()
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result()


def growing(seed: int, scale: float = 1.0, offset: float = 0.0) -> list[np.ndarray]:
    """Batches whose range grows a thousandfold."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((8, 25)) * scale * 4**i + offset).astype(np.float32) for i in range(6)]


def same_as_numpy(bins: Bins, values: np.ndarray) -> None:
    edges = bins.low + np.arange(len(bins.counts) + 1) * bins.width
    expected, _ = np.histogram(values.astype(np.float64), bins=edges)
    np.testing.assert_array_equal(bins.counts, expected)
    assert bins.counts.sum() == values.size
    assert (bins.minimum, bins.maximum) == (values.min(), values.max())
    np.testing.assert_allclose(bins.centres, (edges[:-1] + edges[1:]) / 2, rtol=1e-12, atol=1e-12 * bins.width)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 3.0), (1.0, -5e3), (1e20, 0.0), (1e-20, 0.0)])
def test_histogram_is_numpys_at_the_final_width(scale, offset, order):
    batches = growing(0, scale, offset)[::order]
    bins = accumulated(Histogram("x"), *batches)
    same_as_numpy(bins, np.concatenate([b.ravel() for b in batches]))
    largest = max(-bins.minimum, bins.maximum)
    assert largest / 4096 <= bins.width < largest / 1024  # fine enough: at least 1024 bins on the longer side
    assert np.log2(bins.width) == round(np.log2(bins.width))


def test_histogram_does_not_depend_on_where_batches_end():
    values = np.concatenate(growing(1))
    whole = accumulated(Histogram("x"), values)
    for parts in (2, 6, 48):
        split = accumulated(Histogram("x"), *np.array_split(values, parts))
        assert (split.low, split.width) == (whole.low, whole.width)
        np.testing.assert_array_equal(split.counts, whole.counts)


def test_histogram_of_zeros_then_of_huge_numbers():
    huge = np.array([[-2e30, 3e30]], np.float32)
    bins = accumulated(Histogram("x"), np.zeros((3, 4), np.float32), huge)
    same_as_numpy(bins, np.append(np.zeros(12, np.float32), huge))


def test_histogram_of_zeros_alone():
    bins = accumulated(Histogram("x"), np.zeros((3, 4), np.float32))
    assert (bins.minimum, bins.maximum, bins.counts.tolist()) == (0.0, 0.0, [12])
    assert bins.low <= 0 < bins.low + bins.width


@pytest.mark.parametrize("size", [1000, 1024, 4096])
def test_no_more_than_the_stated_values_of_a_sample_are_counted_but_extremes_are_exact(size):
    values = np.random.default_rng(2).random((4, size), dtype=np.float32)
    values[1, 3], values[2, 5] = -7, 9  # neither stands where a stride begins
    bins = accumulated(Histogram("x", values=64), values)
    assert 4 * 64 // 2 <= bins.counts.sum() <= 4 * 64
    assert (bins.minimum, bins.maximum) == (-7, 9)


def test_strides_are_odd_so_that_every_column_of_an_image_is_seen():
    image = np.broadcast_to(np.arange(16, dtype=np.float32), (1, 16, 16))
    bins = accumulated(Histogram("x", values=64), image)
    seen = np.flatnonzero(bins.counts) * bins.width + bins.low
    assert {*np.floor(seen).astype(int)} == {*range(16)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_numbers_that_are_none_are_refused_in_any_batch(bad, place):
    batches = [np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)]
    batches[place][1, 2] = bad
    with pytest.raises(BadInput, match="the calibration data drive the model to NaN or infinity"):
        accumulated(Histogram("x"), *batches)


def test_mean_over_samples_and_over_features():
    rng = np.random.default_rng(3)
    batches = [rng.standard_normal((n, 5, 7)).astype(np.float32) + 100 for n in (4, 4, 1)]
    values = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(accumulated(Mean("x"), *batches), values.mean(axis=0), rtol=1e-12)
    found = accumulated(Mean("x", features=True), *batches)
    np.testing.assert_allclose(found, values.reshape(-1, 7).mean(axis=0), rtol=1e-12)


def test_mean_of_samples_of_unlike_shapes_is_none_but_for_their_features():
    batches = [np.full((2, 3, 4), 1.0), np.full((2, 9, 4), 2.0)]
    assert accumulated(Mean("x"), *batches) is None
    np.testing.assert_allclose(accumulated(Mean("x", features=True), *batches), (6 + 36) / 24, rtol=1e-12)


def test_nothing_seen():
    assert accumulated(Mean("x")) is None
    with pytest.raises(TypeError, match="Request says no way to accumulate"):
        Request("x").start()


class Counting:
    """onnxruntime, with the sizes of the batches that were run."""

    name = "counting"

    def __init__(self) -> None:
        self.sessions, self.ran = 0, []

    def session(self, model: Model, **options: Any) -> Any:
        self.sessions += 1
        session, ran = backend("onnxruntime").session(model, **options), self.ran

        class Noted:
            def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
                ran.append(len(next(iter(batch.values()))))
                return session.run(batch)

        return Noted()


def samples(proto: onnx.ModelProto, count: int) -> dict[str, np.ndarray]:
    """`count` samples for each input, whatever the model's batch."""
    parts = [feeds(proto, batch=1, seed=seed) for seed in range(count)]
    return {name: np.concatenate([p[name][:1] for p in parts]) for name in parts[0]}


def context_of(proto: onnx.ModelProto, count: int = 10) -> tuple[Model, Context, dict[str, np.ndarray], Counting]:
    arrays = samples(proto, count)
    model, runtime = from_proto(proto), Counting()
    data = open_data({"source": lambda: iter([arrays])}).for_model(model)
    return model, Context(model, find("onnxruntime-avx2"), runtime, calibration=data), arrays, runtime


def directly(proto: onnx.ModelProto, arrays: dict[str, np.ndarray], names: list[str], size: int) -> dict:
    """Inner tensors for all samples, by onnxruntime in batches of `size`, which must divide their number."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    exposed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    count = len(next(iter(arrays.values())))
    parts = [run(exposed, {n: a[i : i + size] for n, a in arrays.items()}) for i in range(0, count, size)]
    return {name: np.concatenate([p[name] for p in parts]) for name in names}


@pytest.mark.parametrize(
    ("network", "names", "size"),
    [("plain", ["conv1", "relu7"], 10), ("two_outputs", ["conv_left", "conv_right"], 10), ("depthwise", ["dw"], 1)],
)
def test_collecting_equals_running_the_model(network, names, size):
    """A histogram may put a value beside the reference's bin where two builds of a kernel round it apart."""
    proto = networks.NETWORKS[network]()
    model, context, arrays, _ = context_of(proto)
    names = [*names, proto.graph.input[0].name]
    found = collect(model, [r for n in names for r in (Histogram(n), Mean(n))], context)
    expected = directly(proto, arrays, names[:-1], size) | {names[-1]: arrays[names[-1]]}
    for name in names:
        values, bins = expected[name], found[Histogram(name)]
        scale = np.abs(values).max()
        np.testing.assert_allclose(found[Mean(name)], values.mean(axis=0), atol=1e-5 * scale)
        np.testing.assert_allclose([bins.minimum, bins.maximum], [values.min(), values.max()], atol=1e-5 * scale)
        assert bins.counts.sum() == values.size
        edges = bins.low + np.arange(len(bins.counts) + 1) * bins.width
        beside = np.abs(bins.counts - np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]).sum()
        assert beside <= 0.01 * values.size


def fixed(batch: int) -> onnx.ModelProto:
    net = Net("fixed")
    x = net.input("x", [batch, 3, 6, 6])
    net.output(net.relu(net.conv(x, 3, 4, 3, name="conv", bias=True)), [batch, 4, 4, 4])
    return net.model()


def test_a_partial_last_batch_of_a_fixed_batch_model_is_padded_and_not_counted():
    model, context, arrays, runtime = context_of(fixed(4))
    found = collect(model, [Mean("conv"), Histogram("conv")], context)
    padded = np.concatenate([arrays["x"], np.repeat(arrays["x"][-1:], 2, axis=0)])
    expected = directly(fixed(4), {"x": padded}, ["conv"], 4)["conv"]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found[Mean("conv")], expected[:10].mean(axis=0), atol=1e-6 * scale)
    assert np.abs(expected.mean(axis=0) - expected[:10].mean(axis=0)).max() > 1e-3 * scale  # counted, it would show
    assert found[Histogram("conv")].counts.sum() == 10 * 4 * 4 * 4
    assert runtime.ran == [4, 4, 4]


def test_one_run_serves_all_requests_and_a_second_none():
    model, context, _, runtime = context_of(networks.plain(), 40)
    first = context.statistics(model, [Mean("conv1"), Histogram("conv2"), Mean("conv1")])
    assert runtime.sessions == 1 and sum(runtime.ran) == 40
    again = context.statistics(model, [Histogram("conv2"), Mean("conv1")])
    assert runtime.sessions == 1 and all(again[r] is first[r] for r in again)
    assert context.statistics(model.clone(), [Mean("conv1")])[Mean("conv1")] is first[Mean("conv1")]
    context.statistics(model, [Mean("conv1"), Mean("conv3")])
    assert runtime.sessions == 2


def test_an_edit_makes_what_is_known_void():
    model, context, _, runtime = context_of(networks.plain())
    before = context.statistics(model, [Mean("conv1")])[Mean("conv1")]
    edited = model.clone()
    weight = edited.value("conv1.weight")
    edit.set_initializer(edited, weight, 3 * weight.const_value.numpy())
    after = context.statistics(edited, [Mean("conv1")])[Mean("conv1")]
    np.testing.assert_allclose(after, 3 * before, atol=1e-5 * np.abs(before).max())
    assert runtime.sessions == 2
    assert context.statistics(model, [Mean("conv1")])[Mean("conv1")] is before  # the original's stay known
    edit.set_initializer(edited, edited.value("conv1.weight"), np.zeros((8, 3, 3, 3), np.float32))
    assert not context.statistics(edited, [Mean("conv1")])[Mean("conv1")].any()


@dataclass(frozen=True)
class Shift(Request):
    """Mean difference from the tensor beside."""

    def start(self) -> Any:
        class Summing:
            total, rows = 0.0, 0

            def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
                self.total, self.rows = self.total + (values - beside[0]).sum(axis=0), self.rows + len(values)

            def result(self) -> Any:
                return self.total / self.rows

        return Summing()


def test_a_tensor_is_seen_beside_the_originals_for_the_same_samples():
    model, context, _, _ = context_of(networks.plain())
    edited = model.clone()
    bias = edited.value("conv3.bias")
    edit.set_initializer(edited, bias, edited.constant(bias) + np.float32(0.5))
    request = Shift("conv3", beside="conv3")
    np.testing.assert_allclose(collect(edited, [request], context)[request], 0.5, atol=1e-5)
    np.testing.assert_array_equal(collect(model, [request], context)[request], 0.0)


def test_without_data_or_for_a_tensor_that_is_not_there():
    model, context, _, _ = context_of(networks.plain())
    with pytest.raises(BadInput, match="no tensor is called 'nothing'"):
        collect(model, [Mean("nothing")], context)
    context.calibration = None
    with pytest.raises(BadInput, match=re.escape("calibration data are needed: give --calibrate SPEC")):
        context.statistics(model, [Mean("conv1")])


def test_batches_shrink_as_activations_grow(monkeypatch):
    model = from_proto(networks.plain())
    assert batch_size(model, ["conv1"]) == 32
    assert batch_size(from_proto(fixed(4)), ["conv"]) == 4
    monkeypatch.setattr(statistics, "BATCH_BYTES", 4 * 8 * 12 * 12 * 5)
    assert batch_size(model, ["conv1"]) == 5
    assert batch_size(model, ["conv1", "bn1"]) == 2
