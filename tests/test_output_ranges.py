"""effc.passes._output_ranges: which range a tensor gets, by what NumPy makes of its codes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from effc import api
from effc.quantize import Affine
from tests.networks import Net

RNG = np.random.default_rng(0)
CHANNELS, SHARES = 16, np.linspace(1.0, 0.4, 25)
# Channels that move together, now and then far out.
TOGETHER = np.exp(0.8 * RNG.standard_normal((32, 1, 16, 16)))
X = (TOGETHER + 0.1 * RNG.standard_normal((32, CHANNELS, 16, 16))).astype(np.float32)
ALIKE = np.abs(RNG.standard_normal((32, CHANNELS)))  # adds up what is cut off
OPPOSED = ALIKE - ALIKE.mean(axis=1, keepdims=True)  # takes most of it off again


def reading(*weights: np.ndarray, pooled: bool = False) -> onnx.ModelProto:
    """1 x 1 convolutions of one tensor that is cut off at zero; pooled: a layer made it, and a pool lies between."""
    net = Net("reading")
    x = net.input("x", ["N", CHANNELS, 16, 16])
    if pooled:
        x = net.node("Conv", x, net.weight("same", np.eye(CHANNELS, dtype=np.float32)[:, :, None, None]), name="first")
    x = net.relu(x)
    x = net.node("MaxPool", x, kernel_shape=[1, 1], strides=[2, 2]) if pooled else x
    for number, weight in enumerate(weights):
        w = net.weight(f"w{number}", weight[:, :, None, None].astype(np.float32))
        net.output(net.node("Conv", x, w, name=f"conv{number}"))
    return net.model()


def range_of(
    proto: onnx.ModelProto, calibrator: str, target: str = "onnxruntime-avx512-vnni", x: np.ndarray = X, **more: str
) -> float:
    """The upper end of the codes that the last convolution reads."""
    options = ", ".join(f"{k}={v}" for k, v in {"calibrator": calibrator, "split": "false", **more}.items())
    result = api.optimize(
        proto, f"int8{{{options}}}", calibrate={"source": {"x": x}}, measure=False, force=True,
        target_name=target, foreign_target=True,
    )  # fmt: skip
    decoder = list(result.model.nodes("Conv"))[-1].inputs[0].producer()
    assert decoder.op_type == "DequantizeLinear"
    scale, zero = (result.model.constant(v) for v in decoder.inputs[1:])
    return Affine(scale, zero[()]).high


def lost(high: float, *weights: np.ndarray, codes: int = 255) -> float:
    """What the layers make of codes of [0, high], of the variance of what they should make; biases take up means."""
    step, x, total = high / codes, np.maximum(X, 0).astype(np.float64), 0.0
    error = np.clip(np.rint(x / step), 0, codes) * step - x
    for weight in weights:
        off, aim = (np.einsum("oc,nchw->onhw", weight, a).reshape(len(weight), -1) for a in (error, x))
        total += off.var(axis=1).sum() / aim.var(axis=1).sum()
    return total


@pytest.mark.parametrize("weights", [(ALIKE,), (OPPOSED,), (ALIKE, OPPOSED)])
def test_the_range_loses_least_of_what_layers_make(weights):
    """Of the ranges tried; to the rounding of scales to float32."""
    found, squared = (range_of(reading(*weights), c) for c in ("output", "mse"))
    options = {high: lost(high, *weights) for high in (*(float(X.max()) * SHARES), squared)}
    assert lost(found, *weights) == pytest.approx(min(options.values()), rel=1e-4)
    assert found == pytest.approx(min(options, key=options.get), rel=1e-4)


def test_what_readers_add_up_is_cut_off_later_than_what_they_take_off():
    alike, opposed = (range_of(reading(w), "output") for w in (ALIKE, OPPOSED))
    assert alike > 1.1 * opposed


def test_codes_are_followed_through_what_passes_them_on():
    """A pool hands the codes on: the range is chosen by what the layer makes behind it."""
    found, squared = (range_of(reading(OPPOSED, pooled=True), c) for c in ("output", "mse"))
    assert found < 0.9 * squared


def test_what_a_bias_takes_up_does_not_count():
    """Half of the channels are constants: cut off, all outputs shift alike."""
    x = np.minimum(np.abs(X), 1)
    x[:, ::2] = 4
    corrected, plain = (
        range_of(reading(ALIKE), "output", x=x, bias_correction=each, rounding="nearest") for each in ("true", "false")
    )
    assert plain == pytest.approx(4, rel=1e-3)
    assert corrected < 2


def test_signed_codes():
    found, squared = (range_of(reading(ALIKE), c, "tensorrt") for c in ("output", "mse"))
    assert lost(found, ALIKE, codes=127) <= lost(squared, ALIKE, codes=127) * (1 + 1e-6)
