"""effc.passes._observed: patches drawn from walks against what onnxruntime makes of them."""

from typing import Any

import numpy as np
import onnx
import pytest

from effc import edit
from effc.capture import from_proto
from effc.contract import Context
from effc.data import open_data
from effc.model import Model
from effc.passes import _observed
from effc.passes._observed import moments, observe
from effc.passes._reconstruction import Seen
from effc.passes._sites import Site, find
from effc.registry import backend
from effc.target import find as find_target
from effc.walk import Walk
from tests import networks
from tests.networks import NETWORKS, Net, feeds, run

RUNTIME = backend("onnxruntime")
CLOSE = 1e-5  # of float32 sums in another order, relative to the largest number


def batches(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [feeds(proto, 3, seed=1), feeds(proto, 2, seed=2)]


def walk(model: Model, proto: onnx.ModelProto, **options: Any) -> Walk:
    return Walk(model, RUNTIME, batches(proto), **options)


def site_of(proto: onnx.ModelProto, name: str) -> tuple[Model, Site]:
    model = from_proto(proto)
    site = find(model, model.node(f"node_{name}"), model.shapes(2))
    assert isinstance(site, Site), site
    return model, site


def seen_of(proto: onnx.ModelProto, name: str, **options: Any) -> tuple[Site, Seen]:
    model, site = site_of(proto, name)
    return site, observe(site, walk(model, proto), walk(model, proto), **options)


def rows(model: onnx.ModelProto, site: Site, name: str) -> np.ndarray:
    """A tensor by onnxruntime on the whole model, as [positions of all batches, N]."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    if name not in [o.name for o in model.graph.output]:
        shown.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    made = [run(shown, batch)[name] for batch in batches(model)]
    return np.concatenate([(m if site.dense else np.moveaxis(m, 1, -1)).reshape(-1, site.layer.outputs) for m in made])


def made_of(site: Site, patches: np.ndarray) -> np.ndarray:
    """What stands behind the layer and its norm."""
    own = np.zeros(site.layer.outputs) if site.bias is None else site.bias
    return patches.astype(np.float64) @ site.layer.matrix.T + site.scale * own + site.shift


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=CLOSE * np.abs(expected).max())


def odd(spatial: int, auto: str = "NOTSET") -> onnx.ModelProto:
    """Strides, dilations and pads that differ from side to side."""
    net = Net("odd")
    x = net.input("input", ["N", 3, 11, 12][: 2 + spatial])
    ways: dict[str, Any] = {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 0, 3]}
    if spatial == 1:
        ways = {"strides": [2], "dilations": [2], "pads": [3, 1]}
    if auto != "NOTSET":
        ways = {"strides": [2, 1], "auto_pad": auto}
    y = net.conv(x, 3, 7, (3, 4)[:spatial], name="layer", bias=True, **ways)
    net.output(net.relu(net.norm(y, 7, name="norm")))
    return net.model()


LAYERS = [
    *((odd(spatial), "layer") for spatial in (1, 2)),
    *((odd(2, auto), "layer") for auto in ("SAME_UPPER", "SAME_LOWER")),
    *((NETWORKS["plain"](), name) for name in ("conv1", "conv2", "conv3", "fc")),
    *((NETWORKS["residual"](), name) for name in ("b1_conv2", "b2_conv1", "b2_conv2")),
    *((NETWORKS["sound"](), name) for name in ("conv1", "conv2", "conv3")),
    *((NETWORKS["mlp"](), name) for name in ("fc1", "fc2", "fc3")),
    *((NETWORKS["transformer"](), name) for name in ("q", "out")),
]


@pytest.mark.parametrize(
    ("proto", "name"), LAYERS, ids=lambda value: value if isinstance(value, str) else value.graph.name
)
@pytest.mark.parametrize("most", [None, 60])
def test_patches_times_the_weight_are_what_the_layer_makes(
    proto: onnx.ModelProto, name: str, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most is not None:
        monkeypatch.setattr(_observed, "SAMPLES", most)
        monkeypatch.setattr(_observed, "EACH", 0)
    site, seen = seen_of(proto, name)
    close(made_of(site, seen.patches), seen.target)
    everywhere = rows(proto, site, site.end)
    if most is None or len(everywhere) <= most:
        close(seen.wanted, everywhere)  # every position, in order
    else:
        assert abs(len(seen.wanted) - most) <= 2  # each batch rounds
    assert (seen.patches.dtype, seen.wanted.dtype) == (np.float32, np.float32)


def test_patches_are_what_torch_unfolds() -> None:
    torch = pytest.importorskip("torch")
    proto = odd(2)
    _, seen = seen_of(proto, "layer")
    found = []
    for batch in batches(proto):
        padded = torch.nn.functional.pad(torch.from_numpy(batch["input"]), (2, 3, 1, 0))  # left, right, top, bottom
        columns = torch.nn.functional.unfold(padded, (3, 4), dilation=(1, 2), stride=(2, 1))
        found.append(columns.transpose(1, 2).reshape(-1, 3 * 3 * 4).numpy())
    np.testing.assert_array_equal(seen.patches, np.concatenate(found))


def test_positions_are_drawn_from_all_batches_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = networks.plain()
    monkeypatch.setattr(_observed, "SAMPLES", 100)
    monkeypatch.setattr(_observed, "EACH", 0)
    site, seen = seen_of(proto, "conv2")
    everywhere = rows(proto, site, "bn2")
    nearest = np.abs(seen.wanted[:, None] - everywhere).max(axis=2).argmin(axis=1)
    close(seen.wanted, everywhere[nearest])
    assert len(np.unique(nearest)) == len(nearest) == 100
    assert np.sum(nearest < 3 * 36) == 60  # images in the first batch by all images


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"SAMPLES": 50, "EACH": 0}, 50),
        ({"SAMPLES": 50, "EACH": 2}, 2 * 27),
        ({"SAMPLES": 500, "EACH": 8, "MOST_NUMBERS": 90 * 27}, 90),
        ({"SAMPLES": 500, "EACH": 8}, 500),
        ({}, 5 * 144),
    ],
)
def test_samples_are_bounded(limits: dict[str, int], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of conv1 hold 27 numbers; it makes 5 images of 144 positions."""
    for name, value in limits.items():
        monkeypatch.setattr(_observed, name, value)
    _, seen = seen_of(networks.plain(), "conv1")
    assert abs(len(seen.patches) - count) <= 1  # each of two batches rounds
    assert len(seen.patches) == len(seen.wanted)


def context(proto: onnx.ModelProto, seed: int = 0) -> Context:
    data = open_data({"source": lambda: iter(batches(proto))})
    model = from_proto(proto)
    return Context(model, find_target("onnxruntime-avx2"), RUNTIME, calibration=data, seed=seed)


@pytest.mark.parametrize(
    ("proto", "name"), LAYERS, ids=lambda value: value if isinstance(value, str) else value.graph.name
)
def test_moments_are_those_of_the_patches(proto: onnx.ModelProto, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_observed, "SAMPLES", 100)
    monkeypatch.setattr(_observed, "EACH", 0)
    model, site = site_of(proto, name)
    patches = seen_of(proto, name, seed=5)[1].patches.astype(np.float64)
    mean, covariance, _ = moments(site, walk(model, proto), context(proto, seed=5))
    expected = patches.mean(axis=0) * site.biased
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    ridge = covariance - (patches - expected).T @ (patches - expected) / len(patches)
    np.testing.assert_allclose(ridge, np.eye(len(ridge)) * ridge[0, 0], atol=1e-6 * np.abs(covariance).max())
    other, *_ = moments(site, walk(model, proto), context(proto, seed=6))
    assert len(patches) < 100 or not np.array_equal(other, mean)


def test_moments_are_computed_once_for_a_state_of_the_model() -> None:
    proto = networks.plain()
    model, site = site_of(proto, "conv1")
    at, started = context(proto), walk(model, proto)
    mean, covariance, _ = moments(site, started, at)
    again = moments(site, walk(model.clone(), proto), at)
    assert again[0] is mean and again[1] is covariance
    edit.set_initializer(model, model.value("conv1.weight"), site.node.inputs[1].const_value.numpy() * np.float32(2))
    assert moments(site, walk(model, proto), at)[1] is not covariance


def test_moments_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_observed, "KEPT", 8 * (27 + 27 * 27))  # those of conv1
    proto = networks.plain()
    model, first = site_of(proto, "conv1")
    second = find(model, model.node("node_conv2"), model.shapes(2))
    at = context(proto)
    one, two = (moments(site, walk(model, proto), at) for site in (first, second))
    assert moments(first, walk(model, proto), at)[1] is one[1]
    again = moments(second, walk(model, proto), at)
    assert again[1] is not two[1]
    np.testing.assert_array_equal(again[1], two[1])


def edited(proto: onnx.ModelProto, weight: str) -> onnx.ModelProto:
    model = from_proto(proto)
    value = model.value(weight)
    edit.set_initializer(model, value, (value.const_value.numpy() * np.float32(0.7) + np.float32(0.05)))
    return model.proto()


def test_inputs_and_shortcuts_come_from_one_model_and_what_is_wanted_from_another() -> None:
    original = networks.residual()
    drifted = edited(original, "stem.weight")
    model, site = site_of(drifted, "b1_conv2")
    seen = observe(site, walk(model, drifted), walk(from_proto(original), original))
    assert site.added == "relu2" and (seen.low, seen.high) == (0, np.inf)
    close(seen.wanted, rows(original, site, "b1_add"))
    assert seen.added is not None
    close(seen.added, rows(drifted, site, "relu2"))
    close(made_of(site, seen.patches), rows(drifted, site, "b1_bn2"))
    np.testing.assert_array_equal(seen.target, seen.wanted - seen.added)
    apart = np.abs(made_of(site, seen.patches) - seen.target).max()
    assert apart > 0.05 * np.abs(seen.target).max()  # the drift is seen


def test_bounds_of_the_activation_are_passed_on() -> None:
    proto = networks.depthwise()
    model, site = site_of(proto, "conv")
    one = [feeds(proto, 1, seed=seed) for seed in range(3)]
    seen = observe(site, Walk(model, RUNTIME, one), Walk(model, RUNTIME, one))
    assert (seen.low, seen.high, seen.activated, seen.added) == (0, 6, True, None)
    assert len(seen.patches) == 3 * 36
    assert not seen_of(networks.plain(), "fc")[1].activated
