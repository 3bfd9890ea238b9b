"""effc.energy: the table of a 45 nm process, a published claim, and sums by hand; exact but for floating point."""

from dataclasses import replace

import numpy as np
import pytest

from effc.capture import from_proto
from effc.cost import Cost, cost
from effc.energy import ADD, DRAM, MULTIPLY, SRAM, joules, mac_joules, on_target
from effc.predict import MEASURED, Estimate, Prediction
from effc.target import Target, find
from effc.traffic import Moved
from tests import networks
from tests.networks import Net


def target(cache: int) -> Target:
    return replace(find("onnxruntime-avx2"), cache=cache)


def test_the_table_is_that_of_the_paper():
    """Han et al., "Learning both weights and connections", NIPS 2015, figure 1, and its DRAM over add: 6400."""
    assert (ADD["int32"], ADD["float32"], MULTIPLY["int32"], MULTIPLY["float32"]) == (0.1, 0.9, 3.1, 3.7)
    assert (SRAM, DRAM) == (5, 640) and DRAM / ADD["int32"] == pytest.approx(6400)


def test_a_billion_connections_at_20_hertz_take_12_8_watts():
    """The paper's claim for fetching float32 weights from DRAM alone."""
    fetched = joules(0, "float32", Moved(weights=4 * 10**9), cache=0)
    assert 20 * fetched == pytest.approx(12.8, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("dtype", "picojoules"),
    [
        ("float32", 3.7 + 0.9),
        ("float16", 1.1 + 0.4),
        ("bfloat16", 1.1 + 0.4),
        ("int8", 0.2 + 0.1),  # accumulated in 32 bits
        ("int4", 0.2 + 0.1),
        ("int16", 3.1 + 0.1),
        ("float64", 3.7 + 0.9),
        ("float8e4m3fn", 1.1 + 0.4),
    ],
)
def test_a_multiply_accumulate(dtype, picojoules):
    assert mac_joules(dtype) == pytest.approx(picojoules * 1e-12, rel=1e-12, abs=0)


def test_an_activation_that_fits_the_cache_stays_there():
    some = Moved(weights=400, tensors=((100, 100), (40, 4000)))
    work = 1000 * 4.6
    for cache, picojoules in ((4000, 400 * 160 + 140 * 1.25), (100, (400 + 40) * 160 + 100 * 1.25), (0, 540 * 160)):
        assert joules(1000, "float32", some, cache) == pytest.approx((work + picojoules) * 1e-12, rel=1e-12, abs=0)


def test_energy_of_a_network_by_hand():
    """plain at batch 1: all activations fit 8 MB, none fits 0 bytes."""
    model = from_proto(networks.plain())
    bare = cost(model)
    for cache, each in ((2**23, 1.25), (0, 160.0)):
        found = on_target(model, target(cache))
        by_hand = bare.total.macs * 4.6 + bare.total.weight_bytes * 160 + bare.total.activation_bytes * each
        assert found.total.energy == pytest.approx(by_hand * 1e-12, rel=1e-9, abs=0)
        assert replace(found.total, energy=0.0) == bare.total
        conv = found.nodes["node_conv2"]
        assert conv.energy == pytest.approx(
            (36 * 16 * 72 * 4.6 + 4 * (16 * 72 + 16) * 160 + 4 * (8 * 144 + 16 * 36) * each) * 1e-12, rel=1e-9, abs=0
        )
    assert cost(model).total.energy == 0.0


def test_weights_come_once_an_inference_whatever_the_batch():
    model = from_proto(networks.mlp())
    one, many = (on_target(model, target(2**23), batch=batch).total for batch in (1, 64))
    weights = one.weight_bytes * 160e-12
    assert many.energy - weights == pytest.approx(64 * (one.energy - weights), rel=1e-9, abs=0)


def product(weight: type | None, *, codes: bool = False) -> Net:
    """One product of [1, 256] by [256, 256], its weight float or codes, its data codes or not."""
    net = Net("product", opset=21)
    x = net.input("x", [1, 256])
    one = net.weight("one", np.float32(1))
    if codes:
        x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, one, name="q"), one, name="dq_x")
    if weight is None:
        w = net.weight("w", net.random(256, 256))
    else:
        w = net.node("DequantizeLinear", net.weight("w", np.zeros((256, 256), weight)), one, name="dq_w")
    net.output(net.node("MatMul", x, w, name="product"), [1, 256])
    return net


def test_codes_save_traffic_and_integer_products_work_as_well():
    macs = 256 * 256
    spent = {
        key: on_target(from_proto(product(weight, codes=codes).model()), target(2**23))
        for key, weight, codes in (("float", None, False), ("weight", np.int8, False), ("both", np.int8, True))
    }
    floats, weight_only, integer = (found.nodes["node_product"].energy for found in spent.values())
    assert floats == pytest.approx((macs * 4.6 + 4 * macs * 160 + 2048 * 1.25) * 1e-12, rel=1e-9, abs=0)
    assert weight_only == pytest.approx(
        (macs * 4.6 + 2048 * 1.25) * 1e-12, rel=1e-9, abs=0
    )  # its weight stands at dq_w
    assert integer == pytest.approx((macs * 0.3 + 2048 * 1.25) * 1e-12, rel=1e-9, abs=0)
    assert spent["weight"].nodes["node_dq_w"].energy == pytest.approx((macs + 4) * 160e-12, rel=1e-9, abs=0)


def test_a_prediction_tells_what_fuses_and_how_long_it_takes():
    model = from_proto(networks.plain())
    fused = {"node_bn1": "node_conv1", "node_relu2": "node_conv1"}
    times = {node.name: Estimate(1e-6, 0.1, MEASURED) for node in model.graph if node.name not in fused}
    prediction = Prediction(Estimate(2e-5, 0.1, MEASURED), times, fused)
    found, bare = (on_target(model, target(0), prediction=p) for p in (prediction, None))
    assert found.nodes["node_conv1"].activation_bytes == 4 * 3 * 144
    assert found.nodes["node_bn1"].activation_bytes == 0
    assert found.nodes["node_relu2"].activation_bytes == 4 * 8 * 144
    saved = bare.total.activation_bytes - found.total.activation_bytes
    assert saved == 4 * 4 * 8 * 144  # two tensors, each written once and read once
    assert bare.total.energy - found.total.energy == pytest.approx(saved * 160e-12, rel=1e-9, abs=0)
    assert (found.nodes["node_conv1"].seconds, found.nodes["node_bn1"].seconds) == (1e-6, 0.0)
    assert (found.total.seconds, bare.total.seconds) == (2e-5, 0.0)  # all of an inference, more than its nodes


def test_what_is_unknown_stays_unknown():
    found = on_target(from_proto(networks.control()), target(2**23))
    assert found.unknown.keys() == {"node_swish", "node_choice"}
    assert found.nodes["node_choice"] == Cost()
