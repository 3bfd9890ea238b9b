"""effc.passes.equalize: the function stays, ranges come together, codes lose less; what must not be scaled is not."""

import numpy as np
import onnx
import pytest

import effc
from effc.capture import from_proto
from effc.contract import Context, Proposal, Skipped
from effc.data import open_data
from effc.passes._equalization import Noise
from effc.passes._homogeneous import scalable
from effc.passes.equalize import Equalize
from effc.passes.int8 import Int8
from effc.registry import backend
from effc.target import find
from effc.verify import verify
from tests.networks import NETWORKS, Net, distance, feeds, run

TARGET = find("onnxruntime-avx2")


def uneven(activation: str = "Relu", spread: float = 1.5, bound: float = 6.0, group: int = 1) -> onnx.ModelProto:
    """Three convolutions and a dense layer whose hidden channels reach very unequally far."""
    net = Net(f"uneven {activation} {group}")
    x, before = net.input("x", ["N", 3, 8, 8]), np.ones(3)
    for name, n, d, g in (("a", 3, 16, 1), ("b", 16, 16, group), ("c", 16, 16, 1)):
        x = net.conv(x, n, d, 3, name=name, group=g, bias=True, pads=[1] * 4)
        scale = np.exp(net.rng.uniform(-spread, spread, d))
        weight, bias = net.weights[f"{name}.weight"], net.weights[f"{name}.bias"]
        weight = weight / (before[None, :, None, None] if g == 1 else before[:, None, None, None])
        net.weights[f"{name}.weight"] = (weight * scale[:, None, None, None]).astype(np.float32)
        net.weights[f"{name}.bias"] = (bias * scale).astype(np.float32)
        before = scale
        if activation == "Clip":
            low, high = net.weight(f"{name}.low", np.float32(0)), net.weight(f"{name}.high", np.float32(bound))
            x = net.node("Clip", x, low, high, name=f"{name}_act")
        else:
            x = net.node(activation, x, name=f"{name}_act")
    x = net.node("Flatten", net.node("GlobalAveragePool", x, name="pool"), name="flat")
    net.weight("fc.weight", net.random(10, 16) / before.astype(np.float32))
    net.output(net.node("Gemm", x, "fc.weight", name="fc", transB=1), ["N", 10])
    return net.model()


def calibration(proto: onnx.ModelProto) -> dict:
    return {"source": lambda: iter([feeds(proto, batch=4, seed=100 + seed) for seed in range(16)])}


def context(proto: onnx.ModelProto, calibrated: bool = True) -> Context:
    model = from_proto(proto)
    data = open_data(calibration(proto)).for_model(model) if calibrated else None
    return Context(model, TARGET, backend("onnxruntime"), calibration=data)


def equalized(proto: onnx.ModelProto, step: Equalize | None = None) -> tuple[effc.Model, list, list]:
    known, step = context(proto), step or Equalize()
    found = list(step.propose(known.original, known))
    model = known.original.clone()
    chosen = [f for f in found if isinstance(f, Proposal)]
    if chosen:
        step.rewrite(model, chosen, known)
        verify(model, known.original)
    return model, chosen, [f for f in found if isinstance(f, Skipped)]


@pytest.mark.parametrize(("activation", "group"), [("Relu", 1), ("Relu", 16), ("LeakyRelu", 1)])
def test_outputs_stay_and_channels_reach_equally_far(activation, group):
    proto = uneven(activation, group=group)
    model, chosen, _ = equalized(proto)
    assert [p.site for p in chosen] == ["a.weight", "b.weight", "c.weight"]
    onnx.checker.check_model(model.proto(), full_check=True)
    inputs = feeds(proto, batch=8, seed=1)
    assert distance(run(proto, inputs), run(model.proto(), inputs)) <= 1e-5
    for layer in ("b", "c"):
        before, after = (_reach(m, m.node(f"node_{layer}").inputs[0].name, inputs) for m in (from_proto(proto), model))
        assert after.max() / after.min() < 0.5 * before.max() / before.min()
    assert "a_act" not in {v.name for v in model.values()}  # no pass may take the scaled tensor for the original's


def _reach(model: effc.Model, tensor: str, inputs: dict) -> np.ndarray:
    proto = model.proto()
    proto.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return np.abs(run(proto, inputs)[tensor]).max(axis=(0, 2, 3))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("group", [1, 16])
def test_codes_lose_less(group, rounding):
    """Of channels a factor of up to 20 apart, int8 loses less than half when they were equalised."""
    proto = uneven(group=group)
    step, errors = Int8(rounding=rounding), []
    for model in (from_proto(proto), equalized(proto)[0]):
        known = Context(model, TARGET, backend("onnxruntime"), calibration=context(proto).calibration)
        chosen = [p for p in step.propose(model, known) if isinstance(p, Proposal)]
        coded = model.clone()
        step.rewrite(coded, chosen, known)
        inputs = feeds(proto, batch=16, seed=2)
        errors.append(distance(run(proto, inputs), run(coded.proto(), inputs)))
    assert errors[1] < 0.5 * errors[0]


def test_the_slope_is_that_of_the_noise():
    known = context(uneven())
    found = scalable(known.original)
    step = Equalize()
    logs, before, after = step._scales(known.original, found, known)
    assert sum(v for v, _ in after) < 0.5 * sum(v for v, _ in before)
    from effc.passes._equalization import requests

    asked = requests(known.original, found)
    extents = {name: known.statistics(known.original, [r])[r] for name, r in asked.items()}
    noise = Noise(known.original, found, extents)
    rng = np.random.default_rng(0)
    at, along = 0.3 * rng.standard_normal(len(logs)), rng.standard_normal(len(logs))
    h = 1e-5
    numeric = (sum(noise.terms(at + h * along)[0]) - sum(noise.terms(at - h * along)[0])) / (2 * h)
    assert noise.terms(at)[1] @ along == pytest.approx(numeric, rel=1e-4)


def test_through_a_clip_only_where_it_cuts_nothing_off():
    """Channels that reach the bound keep their scale, bit for bit; the others are scaled, and stay below it."""
    proto = uneven("Clip", spread=2.5, bound=4.0)
    kept, chosen, skipped = equalized(proto)
    assert (
        not chosen and all("below the bound of a Clip" in s.reason for s in skipped) and kept.proto() == proto_of(proto)
    )
    model, chosen, _ = equalized(proto, Equalize(margin=0.5))
    assert chosen
    inputs = calibration(proto)["source"]()
    for each in inputs:
        assert distance(run(proto, each), run(model.proto(), each)) <= 1e-5
    samples = {"x": np.concatenate([each["x"] for each in calibration(proto)["source"]()])}
    reach = _reach(from_proto(proto), "a", samples)
    was, made = (m.graph.initializers["a.weight"].const_value.numpy() for m in (from_proto(proto), model))
    high = np.maximum(run_of(proto, "a", samples).max(axis=(0, 2, 3)), 0)
    assert (high >= 4).any() and (high < 4 / 1.5).any()
    for channel in np.flatnonzero(high * 1.5 >= 4):
        assert np.array_equal(was[channel], made[channel])
    assert any(not np.array_equal(was[c], made[c]) for c in range(16)) and reach.shape == (16,)


def proto_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    return from_proto(proto).proto()


def run_of(proto: onnx.ModelProto, tensor: str, inputs: dict) -> np.ndarray:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return run(copy, inputs)[tensor]


@pytest.mark.parametrize("obstacle", ["Sigmoid", "Softplus", "scalar", "border", "clip"])
def test_what_is_no_scaling_stays(obstacle):
    net = Net(f"obstacle {obstacle}")
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 3, name="a", bias=True)
    if obstacle == "scalar":
        x = net.node("Add", x, net.weight("one", np.float32(1.0)), name="act")
    elif obstacle == "border":
        widths = net.weight("widths", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
        x = net.node("Pad", x, widths, net.weight("half", np.float32(0.5)), name="act")
    elif obstacle == "clip":
        x = net.node("Clip", x, net.weight("low", np.float32(-1)), name="act")
    else:
        x = net.node(obstacle, x, name="act")
    net.output(net.conv(x, 8, 4, 1, name="b"), ["N", 4, "H", "W"])
    found = scalable(from_proto(net.model()))
    assert not [u for u in found.places_of("a.weight") if u not in found.fixed]
    reasons = {found.fixed[u] for u in found.places_of("a.weight")}
    told = {"scalar": "one number for all channels", "border": "a border that is not zero", "clip": "cuts off at -1"}
    assert all(told.get(obstacle, "is no scaling of what it reads") in reason for reason in reasons)


def test_without_data_it_says_what_it_needs():
    known = context(uneven(), calibrated=False)
    found = list(Equalize().propose(known.original, known))
    assert found and all(isinstance(f, Skipped) and "give --calibrate" in f.reason for f in found)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_networks_of_all_kinds_compute_what_they_did(name):
    proto = NETWORKS[name]()
    result = effc.optimize(
        proto, "equalize{least=1}", calibrate=calibration(proto), measure=False, dims={"T": 6},
        target_name=TARGET.name,
    )  # fmt: skip
    record = result.history.passes[-1]
    assert record.status != "undone", record.reason
