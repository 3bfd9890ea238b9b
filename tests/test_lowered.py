"""effc.lowered: the kernel that onnxruntime runs for a layer once it is lowered, found by lowering it; costs."""

from dataclasses import replace

import numpy as np
import pytest

import effc
from effc.capture import from_proto
from effc.contract import Context
from effc.cost import Cost
from effc.kernels import Kernel, columns
from effc.lowered import blocks, detour, integer, integer_cost
from effc.model import Model
from effc.registry import backend
from effc.target import find
from effc.traffic import Moved
from tests import networks
from tests.networks import Net

RUNTIME = backend("onnxruntime")
NARROW = find("onnxruntime-avx2")


def kernel_of(model: Model, name: str) -> Kernel:
    found, stands_for = RUNTIME.kernels(model)
    return next(k for k in found if k.name == stands_for[name])


def lowered(net: Net, samples: int = 4) -> tuple[Model, Model]:
    """A network before and after int8."""
    proto = net.model()
    data = [networks.feeds(proto, batch=1, seed=s) for s in range(samples)]
    options = {"target_name": NARROW.name, "measure": False, "force": True}
    result = effc.optimize(proto, "int8", calibrate={"source": lambda: iter(data)}, **options)
    return from_proto(proto), result.model


LAYERS = {
    # name: inputs, outputs, group, taps, kind
    "dense": (16, 32, 1, 3, "qconv"),
    "pointwise": (32, 16, 1, 1, "qconv"),
    "few outputs": (16, 8, 1, 3, "qconv-patches"),
    "odd outputs": (16, 18, 1, 1, "qconv-patches"),
    "odd inputs": (18, 32, 1, 3, "qconv-patches"),
    "depthwise": (32, 32, 32, 3, "qconv-depthwise"),
    "odd depthwise": (24, 24, 24, 3, "qconv-depthwise-patches"),
    "grouped": (32, 32, 4, 3, "qconv-grouped"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_s_kernel_is_the_one_that_runs_once_it_is_lowered(name):
    """Between two layers with fast integer kernels, so that it is lowered whatever it is."""
    inputs, outputs, group, taps, kind = LAYERS[name]
    net = Net(name)
    x = net.relu(net.conv(net.input("x", [1, 16, 9, 9]), 16, 16, 1, name="first", bias=True))
    x = net.relu(net.conv(x, 16, inputs, 1, name="second", bias=True))
    x = net.relu(net.conv(x, inputs, outputs, taps, name="layer", group=group, pads=[taps // 2] * 4, bias=True))
    net.head(net.relu(net.conv(x, outputs, 32, 1, name="last", bias=True)), 32)
    before, after = lowered(net)
    weight = before.constant(before.node("node_layer").inputs[1]).shape
    told, runs = integer(kernel_of(before, "node_layer"), weight), kernel_of(after, "node_layer")
    assert told is not None and told.kind == runs.kind == kind
    assert (told.macs, told.dtype) == (runs.macs, runs.dtype) == (81 * outputs * inputs // group * taps**2, "int8")
    changing = {"moved", "around", "since", "near", "far", "made_near", "made_far"}  # biases and scales are not told
    assert {k: v for k, v in told.dims.items() if k not in changing} == {
        k: v for k, v in runs.dims.items() if k not in changing
    }
    assert told.moved == pytest.approx(runs.moved, rel=0.25)
    assert told.dims["near"] == pytest.approx(runs.dims["near"], rel=0.6)
    assert columns(told.dims) == columns(runs.dims)


def test_an_image_is_padded_to_the_channels_that_integer_kernels_like():
    net = Net("image")
    x = net.input("x", [1, 3, 12, 12])
    net.head(net.relu(net.conv(x, 3, 16, 3, name="layer", pads=[1] * 4, bias=True)), 16)
    before, after = lowered(net)
    found = kernel_of(before, "node_layer")
    padded, bare = integer(found, (16, 4, 3, 3)), integer(found, (16, 3, 3, 3))
    assert (padded.kind, bare.kind) == ("qconv", "qconv-patches")
    assert padded.macs == kernel_of(after, "node_layer").macs == 144 * 16 * 4 * 9


def test_a_dense_layer():
    net = Net("dense")
    x = net.input("x", [1, 32])
    net.output(net.linear(net.relu(net.linear(x, 32, 16, name="layer")), 16, 8, name="last"), [1, 8])
    before, after = lowered(net)
    told, runs = integer(kernel_of(before, "node_layer")), kernel_of(after, "node_layer")
    assert (told.kind, runs.kind) == ("qgemm-row", "qgemm-row") and told.macs == runs.macs == 512
    assert {k: told.dims[k] for k in "bmkn"} == {k: runs.dims[k] for k in "bmkn"}


DIMS = {"n": 1, "c": 16, "m": 32, "g": 1, "h": 8, "w": 8, "kh": 3, "kw": 3, "s": 2, "d": 1, "act": 1, "sum": 1}
PLACE = {"moved": 43008, "around": 86016, "since": 43008, "near": 4300.8, "far": 0, "made_near": 4300.8, "made_far": 0}
CONV = Kernel("k", "conv", ("y",), {**DIMS, **PLACE}, 64 * 32 * 144, 43008, "float32")


def test_what_is_a_kernel_of_its_own_in_integers_is_left_out():
    moved = 64 * 4 * 16 + 9 * 16 * 32 + 64 * 32  # of stride 2: an image four times as large; one byte a code
    told = integer(CONV)
    assert (told.kind, told.moved, told.dtype, told.macs, told.name) == ("qconv", moved, "int8", CONV.macs, "k")
    # A tenth of what was moved had left the near cache. Distances are a quarter: d / (d + N) = 1 / 10 becomes 1 / 37.
    near = pytest.approx(moved / 37)
    place = {"moved": moved, "around": 21504, "since": 10752, "near": near, "far": 0, "made_near": near, "made_far": 0}
    assert told.dims == {**CONV.dims, "act": 0, "sum": 0, **place}


@pytest.mark.parametrize(
    "other",
    [
        replace(CONV, dtype="int8"),
        replace(CONV, known=False, dims={}),
        replace(CONV, kind="Softmax", dims={"elements": 9}),
        replace(CONV, kind="gemm-pair", dims={"b": 2, "m": 3, "k": 4, "n": 5}),
        replace(CONV, kind="conv-integer", dtype="int8"),
    ],
)
def test_what_is_no_float_layer_has_no_integer_kernel(other):
    assert integer(other) is None


def test_the_way_to_floats_and_back():
    back, codes = detour(CONV)
    assert (back.key, codes.key) == ("DequantizeLinear:int8", "QuantizeLinear")
    assert (back.dims["elements"], codes.dims["elements"]) == (
        64 * 4 * 16,
        64 * 32,
    )  # stride 2: an image four times as large
    assert back.dims["moved"] == back.moved == 5 * 64 * 4 * 16 and back.dims["around"] == 21504
    assert (back.dims["run"], codes.dims["run"]) == (64 * 4 * 16, 64 * 32)
    product = Kernel("k", "gemm", (), {"b": 1, "m": 3, "k": 5, "n": 7, **PLACE}, 105, 1, "float32")
    assert [k.dims["elements"] for k in detour(product)] == [15, 21]


def test_kernels_on_the_way_are_described_as_those_that_run():
    """A convolution left in float between two that are lowered."""
    net = Net("between")
    x = net.relu(net.conv(net.input("x", [1, 16, 9, 9]), 16, 16, 1, name="first", bias=True))
    x = net.relu(net.conv(x, 16, 16, 3, name="layer", pads=[1] * 4, bias=True))
    net.head(net.relu(net.conv(x, 16, 32, 1, name="last", bias=True)), 32)
    proto = net.model()
    data = [networks.feeds(proto, batch=1, seed=s) for s in range(4)]
    found = effc.optimize(proto, "int8{keep_float=[node_layer]}", calibrate={"source": lambda: iter(data)},
                          target_name=NARROW.name, measure=False, force=True)  # fmt: skip
    runs = {k.key: k for k in RUNTIME.kernels(found.model)[0]}
    for told in detour(kernel_of(from_proto(proto), "node_layer")):
        assert columns(told.dims) == columns(runs[told.key].dims)
        assert {k: told.dims[k] for k in ("elements", "share", "window", "broadcast")} == {
            k: runs[told.key].dims[k] for k in ("elements", "share", "window", "broadcast")
        }


def test_costs_by_hand():
    """1000 products of 100 weights; what fits the cache is read there."""
    before = Cost(1000, 100, 400, 800, 1.0, 2.0)
    moved = Moved(400, ((200, 4000), (600, 600)))
    target = replace(NARROW, cache=1000)
    codes = integer_cost(before, moved, target, saved=300)
    assert (codes.macs, codes.parameters, codes.weight_bytes, codes.activation_bytes) == (1000, 100, 100, 200)
    # 0.3 pJ a product; a quarter of all bytes; 50 + 150 of activations, of whole tensors of 1000 and 150, fit
    assert codes.energy == pytest.approx((1000 * 0.3 + (100 * 640 + 200 * 5) / 4) * 1e-12, rel=1e-12)
    assert codes.seconds == 0.0
    floats = integer_cost(before, moved, target, saved=300, coded=False)
    assert floats.activation_bytes == 800
    assert floats.energy == pytest.approx((1000 * 0.3 + (100 + 200) * 160 + 600 * 5 / 4) * 1e-12, rel=1e-12)


def test_the_context_has_no_seconds_for_what_was_not_measured():
    context = Context(from_proto(networks.plain()), NARROW, RUNTIME)
    assert integer(CONV).key not in context.target.kernels.get(1, {})
    assert np.isfinite(context.seconds([integer(CONV)]))  # by its roofline, which says nothing about this processor


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 64), (2, 32)])
def test_a_dense_layer_s_kernel_is_the_one_that_runs_once_it_is_in_blocks(rows, bits, block):
    """Its kind and dimensions; bytes moved to 1 %, as zero points and biases are not told apart."""
    net = Net("blocks")
    x = net.node("MatMul", net.input("x", [rows, 256]), net.weight("w", net.random(256, 128)), name="layer")
    net.output(net.relu(x), [rows, 128])
    proto = net.model()
    options = {"target_name": NARROW.name, "measure": False, "goal": "size"}
    text = f"weight-only{{bits={bits}, block={block}, symmetric=true}}"
    after = effc.optimize(proto, text, **options).model
    (product,) = (node.name for node in after.graph if node.op_type == "MatMulNBits")
    wanted, found = kernel_of(after, product), blocks(kernel_of(from_proto(proto), "node_layer"), bits, block, 4)
    assert found is not None and found.kind == wanted.kind and found.macs == wanted.macs
    for name in ("b", "m", "k", "n", "bits", "block", "level"):
        assert found.dims[name] == wanted.dims[name], name
    assert found.moved == pytest.approx(wanted.moved, rel=0.01) and columns(found.dims) == columns(wanted.dims)
    assert blocks(found, bits, block, 4) is None
