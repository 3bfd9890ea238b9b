"""effc.passes._centred_ranges: when a tensor is moved, that nothing else changes, and what signed codes gain."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from effc import api
from effc.capture import from_proto
from effc.passes._centred_ranges import centre_ranges
from effc.placement import plan
from effc.quantize import affine
from effc.target import find
from tests.networks import Net, distance, run

WIDTH = 16  # integers are worth it from here on
X = np.random.default_rng(0).standard_normal((16, 4, 12, 12)).astype(np.float32)


def bounded(
    *, kernel: int = 1, pads: int = 0, auto_pad: str | None = None, relu: bool = False, twice: bool = False,
    shortcut: bool = False, group: int = 1, bias: bool = True,
) -> onnx.ModelProto:  # fmt: skip
    """A convolution cut off at 0 and 6, and what reads it."""
    net = Net("bounded")
    first = net.conv(net.input("x", ["N", 4, 12, 12]), 4, WIDTH, 3, name="first", pads=[1] * 4, bias=bias)
    ends = [net.weight("low", np.float32(0)), net.weight("high", np.float32(6))]
    x = net.relu(first) if relu else net.node("Clip", first, *ends, name="cut")
    more = {"auto_pad": auto_pad} if auto_pad else {"pads": [pads] * 4}
    y = net.conv(x, WIDTH, WIDTH, kernel, name="second", group=group, bias=bias, **more)
    if shortcut:
        y = net.node("Add", y, x)
    if twice:
        y = net.node("Add", y, net.conv(first, WIDTH, WIDTH, 1, name="third"))
    net.head(net.relu(y), WIDTH)
    return net.model()


def moved(proto: onnx.ModelProto) -> tuple[list[str], onnx.ModelProto]:
    model = from_proto(proto)
    kernels = find("tensorrt").integer
    placement = plan(model, [n.name for n in model.nodes("Conv")], kernels)
    names = centre_ranges(model, placement, {v: affine(-6.0, 6.0, signed=True) for v in placement.coded})
    return names, model.proto()


@pytest.mark.parametrize(
    "how",
    [{}, {"kernel": 3}, {"group": 4, "kernel": 3}, {"auto_pad": "VALID"}, {"auto_pad": "SAME_UPPER"}, {"bias": False}],
)
def test_a_moved_tensor_changes_no_output(how):
    proto = bounded(**how)
    names, after = moved(proto)
    assert names == ["cut"]
    assert distance(run(proto, {"x": X}), run(after, {"x": X})) < 1e-5
    made = from_proto(after)
    (clip,) = made.nodes("Clip")
    assert [float(made.constant(v)) for v in clip.inputs[1:]] == [-3.0, 3.0]
    assert clip.outputs[0].name != "cut"  # it no longer means what it did


@pytest.mark.parametrize(
    "how",
    [
        {"kernel": 3, "pads": 1},
        {"kernel": 3, "auto_pad": "SAME_UPPER"},
        {"relu": True},
        {"shortcut": True},
        {"twice": True},
    ],
)
def test_what_cannot_be_moved_stays(how):
    """Zeros around it, no bound, another reader of it or of what it is made of."""
    proto = bounded(**how)
    names, after = moved(proto)
    assert names == []
    assert distance(run(proto, {"x": X}), run(after, {"x": X})) == 0


def test_signed_codes_gain_a_bit():
    """The tensor's scale is halved, and what the layer makes of it comes closer; the weights' rounding stays."""
    lost, scales = {}, {}
    for wanted in ("false", "true"):
        result = api.optimize(
            bounded(), f"int8{{keep_float=['node_first', 'node_fc'], split={wanted}}}", calibrate={"source": {"x": X}},
            measure=False, force=True, target_name="tensorrt",
        )  # fmt: skip
        notes = [n for step in result.history.passes for n in step.notes if "lie around zero" in n]
        assert notes == (["cut moved to lie around zero, for one bit more"] if wanted == "true" else [])
        (exact,), (found,) = (run(p, {"x": X}).values() for p in (bounded(), result.model.proto()))
        lost[wanted] = float(((found - exact) ** 2).sum())
        (scale,) = (result.model.constant(n.inputs[1]) for n in result.model.nodes("QuantizeLinear"))
        scales[wanted] = float(scale)
    assert scales["true"] == pytest.approx(scales["false"] / 2, rel=0.1)
    assert lost["true"] < 0.8 * lost["false"]
