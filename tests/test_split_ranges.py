"""effc.passes._split_ranges: when a tensor gets two halves of its range, that nothing else changes, what it brings."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from effc import api, edit
from effc.capture import from_proto
from effc.contract import Context
from effc.data import open_data
from effc.model import Model
from effc.passes import _split_ranges as split
from effc.quantize import affine
from effc.registry import backend
from effc.target import find
from tests.networks import Net, distance, run

RNG = np.random.default_rng(0)
X = np.abs(RNG.standard_normal((24, 3, 16, 16))).astype(np.float32)
KEEP = "int8{{keep_float=['node_stem'], split={}}}"

ALONE = "int8{{keep_float=['node_stem', 'node_c?', 'node_fc'], split={}}}"


def together(*, clip: bool = True, group: int = 1, shortcut: bool = False, width: int = 8) -> onnx.ModelProto:
    """Channels that are nearly alike, and a layer that takes differences of them: small sums of large numbers."""
    net = Net("together")
    x = net.input("x", ["N", 3, 16, 16])
    stem = np.float32(0.15) + net.random(width, 3, 3, 3, scale=0.01)
    x = net.node("Conv", x, net.weight("stem.weight", stem), name="stem", kernel_shape=[3, 3], pads=[1] * 4)
    bounds = [net.weight("low", np.float32(0)), net.weight("high", np.float32(6))]
    x = net.node("Clip", x, *bounds, name="cut") if clip else net.relu(x)
    weight = net.random(16, width // group, 1, 1)
    weight -= weight.mean(axis=1, keepdims=True)
    y = net.node("Conv", x, net.weight("pw.weight", weight), name="pw", kernel_shape=[1, 1], group=group)
    y = net.relu(y)
    for number in range(3):  # so that twice the products of `pw` are few
        y = net.relu(net.conv(y, 16, 16, 3, name=f"c{number}", pads=[1] * 4))
    if shortcut:
        y = net.node("Concat", x, y, axis=1)
    net.head(y, 16 + width if shortcut else 16)
    return net.model()


def lowered(proto: onnx.ModelProto, recipe: str, target: str = "onnxruntime-avx512-vnni") -> api.Result:
    return api.optimize(
        proto,
        recipe,
        calibrate={"source": {"x": X}},
        measure=False,
        force=True,
        target_name=target,
        foreign_target=True,
    )


def wide(model: Model) -> bool:
    return any(n.op_type == "Sub" for n in model.graph)


@pytest.mark.parametrize("clip", [True, False])
def test_codes_are_a_bit_finer_where_they_would_drown_the_layer(clip):
    """A bit is a factor of 4 in the noise of codes; what is left is rounding of the weights."""
    proto, squared = together(clip=clip), {}
    for wanted in ("false", "true"):
        result = lowered(proto, ALONE.format(wanted))
        assert wide(result.model) == (wanted == "true")
        (exact,), (found,) = (run(p, {"x": X}).values() for p in (proto, result.model.proto()))
        squared[wanted] = float(((found - exact) ** 2).sum() / (exact**2).sum())
    assert squared["true"] < 0.5 * squared["false"], squared


def test_the_note_names_the_tensor():
    result = lowered(together(), KEEP.format("true"))
    (note,) = [n for step in result.history.passes for n in step.notes if "halves" in n]
    assert note == "cut in two halves of the range, for one bit more"


def test_the_float_model_stays_what_it_is_up_to_the_bound():
    """clip(z, 0, 3) + clip(z - 3, 0, 3) is clip(z, 0, 6) up to a rounding of the difference."""
    proto = together()
    model = from_proto(proto)
    value = model.node("node_cut").outputs[0]
    split._split(model, value, [model.node("node_pw")], 6.0)
    edit.remove_unused(model)
    assert wide(model)
    assert distance(run(proto, {"x": 3 * X}), run(model.proto(), {"x": 3 * X})) < 1e-5


@pytest.mark.parametrize(
    ("options", "recipe", "target"),
    [
        ({"group": 2}, KEEP.format("true"), "onnxruntime-avx512-vnni"),  # channels of groups lie side by side
        ({"shortcut": True}, KEEP.format("true"), "onnxruntime-avx512-vnni"),  # others read the tensor
        ({"width": 16}, "int8", "onnxruntime-avx512-vnni"),  # made by an integer kernel, which hands out codes
        ({}, KEEP.format("true"), "tensorrt-a100"),  # signed codes
    ],
)
def test_other_tensors_stay_whole(options, recipe, target):
    assert not wide(lowered(together(**options), recipe, target).model)


def test_a_tensor_whose_codes_do_little_stays_whole(monkeypatch):
    monkeypatch.setattr(split, "NOISY", 10.0)
    assert not wide(lowered(together(), KEEP.format("true")).model)


def test_a_layer_of_many_products_is_not_doubled(monkeypatch):
    monkeypatch.setattr(split, "DEARER", 0.001)
    assert not wide(lowered(together(), KEEP.format("true")).model)


def test_noise_is_the_codes_share_of_the_variance():
    """Against rounding the tensor itself and counting what that does to the layer's output."""
    proto = together()
    model = from_proto(proto)
    value, reader = model.node("node_cut").outputs[0], model.node("node_pw")
    data = open_data({"source": {"x": X}}).for_model(model)
    context = Context(model, find("onnxruntime-avx512-vnni"), backend("onnxruntime"), calibration=data)
    told = split._noise(model, {value: [reader]}, {value: affine(0.0, 6.0)}, context)[value]
    seen = backend("onnxruntime").session(model, expose=["cut", "pw"]).run({"x": X})
    weight = reader.inputs[1].const_value.numpy()[:, :, 0, 0]
    error = np.einsum("oc,nchw->nohw", weight, np.rint(seen["cut"] * 255 / 6) * 6 / 255 - seen["cut"])
    inside = (seen["cut"] > 0) & (seen["cut"] < 6)
    assert inside.mean() > 0.8  # where it is cut off nothing is rounded
    wanted = (error**2).mean(axis=(0, 2, 3)).sum() / seen["pw"].var(axis=(0, 2, 3)).sum()
    assert told == pytest.approx(wanted, rel=0.3)
