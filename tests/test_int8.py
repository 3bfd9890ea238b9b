"""effc.passes.int8: what is lowered and what is not, what onnxruntime makes of it, and how near to float it stays."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper, version_converter

import effc
import effc.predict
from effc import edit
from effc.capture import from_proto
from effc.contract import Context, Proposal, Skipped
from effc.cost import cost
from effc.data import open_data
from effc.evaluate import evaluate
from effc.passes.int8 import Int8
from effc.predict import MEASURED, Estimate
from effc.registry import backend
from effc.target import Target, find
from effc.verify import verify
from tests import networks
from tests.networks import Net, distance, feeds, run

WIDE = find("onnxruntime-avx512-vnni")  # 8-bit weights: compared without the runtime's kernels, which may saturate
NARROW = find("onnxruntime-avx2")  # 7-bit weights: right on every processor
SAMPLES = 24
RUNTIME = backend("onnxruntime")


class Lowered:
    """A network put through the pass, as the manager does it."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        step: Int8 | None = None,
        target: Target = WIDE,
        calibrated: bool = True,
        only: Callable[[str], bool] = lambda site: True,
    ) -> None:
        step = step or Int8()
        self.proto, self.before = proto, from_proto(proto)
        data = None
        if calibrated:
            data = open_data({"source": lambda: iter(calibration(proto))}).for_model(self.before)
        self.context = Context(self.before, target, RUNTIME, calibration=data)
        found = list(step.propose(self.before, self.context))
        self.proposals = [f for f in found if isinstance(f, Proposal)]
        self.sites = [p.site.removeprefix("node_") for p in self.proposals]
        self.skipped = {f.site.removeprefix("node_"): f.reason for f in found if isinstance(f, Skipped)}
        self.model = self.before.clone()
        chosen = [p for p in self.proposals if only(p.site)]
        if chosen:
            step.rewrite(self.model, chosen, self.context)
            edit.remove_unused(self.model)
            verify(self.model, self.before)
        self.after = self.model.proto()
        onnx.checker.check_model(self.after, full_check=True)

    def error(self, seed: int = 5) -> float:
        """Distance from float on inputs that were not seen, without the runtime's kernels."""
        inputs = feeds(self.proto, batch=8, seed=seed)
        return distance(run(self.proto, inputs), run(self.after, inputs))

    def seen(self, count: int = SAMPLES) -> float:
        """The same on the first calibration samples, whose range is covered: what is left is rounding."""
        parts = calibration(self.proto)[:count]
        inputs = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return distance(run(self.proto, inputs), run(self.after, inputs))

    def types(self) -> Counter[str]:
        return Counter(n.op_type for n in self.model.graph)


def calibration(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [{n: a[:1] for n, a in feeds(proto, batch=1, seed=100 + s).items()} for s in range(SAMPLES)]


def optimised(proto: onnx.ModelProto, folder: Path) -> tuple[Counter[str], Callable]:
    """onnxruntime's own graph of a model: its operators, and a function that runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    graph = onnx.load(folder / "optimised.onnx").graph
    kinds = Counter(n.op_type for n in graph.node)
    return kinds, lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def plain() -> onnx.ModelProto:
    net = Net("int8 plain")
    x = net.input("x", ["N", 3, 12, 12])
    x = net.relu(net.conv(x, 3, 16, 3, name="a", pads=[1] * 4, bias=True))
    x = net.relu(net.conv(x, 16, 32, 3, name="b", pads=[1] * 4, strides=[2, 2]))
    net.head(net.relu(net.conv(x, 32, 32, 3, name="c", bias=True)), 32)
    return net.model()


def residual() -> onnx.ModelProto:
    net = Net("int8 residual")
    x = net.input("x", ["N", 3, 12, 12])
    x = net.relu(net.conv(x, 3, 16, 3, name="stem", pads=[1] * 4, bias=True))
    for block in "ab":
        y = net.relu(net.conv(x, 16, 16, 3, name=f"{block}1", pads=[1] * 4, bias=True))
        y = net.conv(y, 16, 16, 3, name=f"{block}2", pads=[1] * 4, bias=True)
        x = net.relu(net.node("Add", y, x, name=f"{block}_add"))
    net.head(x, 16)
    return net.model()


def shortcut() -> onnx.ModelProto:
    """A shortcut of option A: every second position, channels of zero around."""
    net = Net("int8 shortcut")
    x = net.input("x", ["N", 3, 12, 12])
    x = net.relu(net.conv(x, 3, 16, 3, name="stem", pads=[1] * 4, bias=True))
    y = net.relu(net.conv(x, 16, 32, 3, name="a1", pads=[1] * 4, strides=[2, 2], bias=True))
    y = net.conv(y, 32, 32, 3, name="a2", pads=[1] * 4, bias=True)
    for axis in (2, 3):
        bounds = [net.weight(f"{n}{axis}", np.array([v])) for n, v in [("s", 0), ("e", 99), ("ax", axis), ("st", 2)]]
        x = net.node("Slice", x, *bounds, name=f"slice{axis}")
    x = net.node("Pad", x, net.weight("pads", np.array([0, 8, 0, 0, 0, 8, 0, 0])), name="pad")
    net.head(net.relu(net.node("Add", y, x, name="add")), 32)
    return net.model()


def depthwise() -> onnx.ModelProto:
    net = Net("int8 depthwise")
    bounds = net.weight("low", np.float32(0)), net.weight("high", np.float32(6))
    x = net.input("x", ["N", 3, 12, 12])
    x = net.node("Clip", net.conv(x, 3, 16, 3, name="stem", pads=[1] * 4, bias=True), *bounds)
    for index, (n, d, stride) in enumerate([(16, 32, 1), (32, 32, 2)]):
        x = net.conv(x, n, n, 3, name=f"dw{index}", pads=[1] * 4, strides=[stride] * 2, group=n, bias=True)
        x = net.node("Clip", x, *bounds)
        x = net.node("Clip", net.conv(x, n, d, 1, name=f"pw{index}", bias=True), *bounds)
    net.output(net.linear(net.node("ReduceMean", x, name="mean", axes=[2, 3], keepdims=0), 32, 5, name="fc"), ["N", 5])
    return net.model()


@pytest.mark.parametrize(
    ("make", "sites", "kinds"),
    [
        (plain, 4, {"QLinearConv": 3}),
        (residual, 6, {"QLinearConv": 5, "QLinearAdd": 2}),
        (shortcut, 4, {"QLinearConv": 3, "QLinearAdd": 1, "Slice": 2, "Pad": 2}),
        (depthwise, 6, {"QLinearConv": 5}),
    ],
)
def test_networks_run_in_integers_from_the_image_to_the_classes(make, sites, kinds, tmp_path):
    """Bounds: 8 bits stay within 3 % of float, 7 bits within 5 %; kernels round apart by 2 % at most."""
    proto = make()
    assert Lowered(proto).error() <= 0.03
    narrow = Lowered(proto, target=NARROW)
    assert len(narrow.sites) == sites and not narrow.skipped
    assert narrow.error() <= 0.05
    found, optimal = optimised(narrow.after, tmp_path)
    expected = {"QuantizeLinear": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1} | kinds
    assert {kind: found[kind] for kind in expected} == expected
    assert not found.keys() & {
        "DequantizeLinear",
        "Conv",
        "FusedConv",
        "Gemm",
        "Add",
        "GlobalAveragePool",
        "ReduceMean",
    }
    inputs = feeds(proto, batch=8, seed=6)
    assert distance(run(narrow.after, inputs), optimal(inputs)) <= 0.02
    deployment = RUNTIME.deployment(narrow.model, inputs)
    assert not deployment.fell_back and deployment.difference <= 0.02


@pytest.mark.parametrize("calibrator", ["minmax", "percentile", "entropy", "mse"])
def test_every_calibrator_serves(calibrator):
    assert Lowered(residual(), Int8(calibrator=calibrator)).error() <= 0.05


def conv(net: Net, x: str = "x", **attributes) -> str:
    return net.conv(x, 16, 16, 3, name="layer", **attributes)


def weightless(net: Net, op: str, shape: list[int]) -> None:
    net.output(net.node(op, "x", net.input("w", shape), name="layer"))


def constant_input(net: Net) -> None:
    net.weight("c", net.random(1, 16, 8, 8))
    net.output(net.node("Add", "x", conv(net, "c", pads=[1] * 4), name="sum"))


def dense(net: Net, c: np.ndarray | None = None, shape: tuple[int, ...] = (8, 8), op: str = "Gemm", **options) -> None:
    inputs = ["x", net.weight("w", net.random(*shape))] + ([] if c is None else [net.weight("c", c)])
    net.output(net.node(op, *inputs, name="layer", **options))


def computed_bias(net: Net) -> None:
    inputs = "x", net.weight("w", net.random(16, 16, 3, 3)), net.input("bias", [16])
    net.output(net.node("Conv", *inputs, name="layer"))


IMAGE, ROWS = ["N", 16, 8, 8], ["N", 8]
REFUSALS: dict[str, tuple[list, Callable[[Net], object]]] = {
    "its weight is no constant": (IMAGE, lambda n: weightless(n, "Conv", [16, 16, 3, 3])),
    "its right operand is no constant": (ROWS, lambda n: weightless(n, "MatMul", [8, 8])),
    "its input is a constant; simplify folds it": (IMAGE, constant_input),
    "its right operand has 3 axes; 2 are lowered": ([3, 8, 8], lambda n: dense(n, shape=(3, 8, 8), op="MatMul")),
    "its left operand is transposed": ([8, 8], lambda n: dense(n, transA=1)),
    "its third operand of shape (8, 1) is no bias along 8 outputs": (
        [8, 8], lambda n: dense(n, np.ones((8, 1), np.float32)),
    ),
    "its bias is no constant": (IMAGE, computed_bias),
    "a batch norm follows it: run fold-batchnorm first": (IMAGE, lambda n: n.output(n.norm(conv(n), 16, name="bn"))),
    "there is no fast integer kernel for 2 groups of 8 inputs; it stands before all layers that gain, and stays in"
    " float": (IMAGE, lambda n: n.output(conv(n, group=2))),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason):
    shape, draw = REFUSALS[reason]
    net = Net("refused")
    net.input("x", shape)
    draw(net)
    found = Lowered(net.model())
    assert not found.proposals and found.skipped == {"layer": reason}
    assert found.model.revision == found.before.revision


def test_refuses_other_floats():
    half = Lowered(networks.half())
    assert {*half.skipped.values()} == {"its weight is float16; float32 is lowered"} and not half.sites


def test_patterns_name_layers_to_keep():
    assert Lowered(residual(), Int8(keep_float=("*",))).sites == []
    found = Lowered(residual(), Int8(keep_float=("node_a1", "node_b?", "fc")))
    assert found.skipped == dict.fromkeys(["a1", "b1", "b2"], "keep_float names it")
    assert found.sites == ["stem", "a2", "fc"]
    assert found.error() <= 0.03


def test_convolutions_without_data_and_without_a_way_to_lift_them():
    net = Net("not lifted", opset=7)
    net.input("x", ["N", 16, 8, 8])
    statistics = [net.weight(name, np.ones((16, 6, 6), np.float32)) for name in "sbmv"]
    y = net.node("BatchNormalization", net.relu(conv(net)), *statistics, name="bn", spatial=0)
    net.output(y, ["N", 16, 6, 6])
    proto = net.model()
    model = from_proto(proto)
    (found,) = Int8().propose(model, Context(model, WIDE, RUNTIME))
    assert isinstance(found, Skipped) and found.site == "node_layer"
    assert found.reason.startswith("int8 needs opset 13: opset 7 could not be lifted to 13: ")
    assert Lowered(plain(), calibrated=False).skipped == dict.fromkeys(
        "abc", "a convolution needs calibration data: give --calibrate SPEC"
    )


def narrow_ends() -> onnx.ModelProto:
    """Too few channels for fast kernels at the start, in the middle and at the end."""
    net = Net("narrow ends")
    x = net.input("x", ["N", 3, 16, 16])
    x = net.relu(net.conv(x, 3, 8, 3, name="first", strides=[2, 2], pads=[1] * 4, bias=True))
    x = net.relu(net.conv(x, 8, 8, 3, name="second", group=8, pads=[1] * 4, bias=True))
    x = net.relu(net.conv(x, 8, 32, 1, name="fast1", bias=True))
    x = net.relu(net.conv(x, 32, 24, 3, name="middle", group=8, pads=[1] * 4, bias=True))
    x = net.relu(net.conv(x, 24, 32, 1, name="fast2", bias=True))
    net.output(net.conv(x, 32, 6, 1, name="last", bias=True), ["N", 6, 8, 8])
    return net.model()


def test_slow_layers_stay_in_float_at_the_ends_only(tmp_path):
    found = Lowered(narrow_ends(), target=NARROW)
    assert found.sites == ["fast1", "middle", "fast2"]
    few = "the integer kernel for {} is slow ({}); it stands {} all layers that gain, and stays in float"
    dense = "at least 16, a multiple of 4, is fast"
    assert found.skipped == {
        "first": few.format("8 outputs", dense, "before"),
        "second": few.format("8 depthwise channels", "a multiple of 16 is fast", "before"),
        "last": few.format("6 outputs", dense, "behind"),
    }
    assert found.error() <= 0.05
    kinds, optimal = optimised(found.after, tmp_path)
    assert kinds["QLinearConv"] == 3 and kinds["Conv"] + kinds["FusedConv"] == 3
    inputs = feeds(found.proto, batch=4, seed=8)
    assert distance(run(found.after, inputs), optimal(inputs)) <= 0.02


@pytest.mark.parametrize("middle", ["dw", "dense"])
def test_a_layer_kept_in_float_between_integers_is_left_in_float_by_the_runtime_too(middle, tmp_path):
    """Between a pair of DequantizeLinear and QuantizeLinear the runtime would quantise its weights by itself."""
    net = Net(f"between {middle}")
    x = net.input("x", ["N", 3, 12, 12])
    x = net.relu(net.conv(x, 3, 16, 3, name="a", pads=[1] * 4, bias=True))
    spread = np.exp(np.linspace(-6, 2, 16)).astype(np.float32)[:, None, None, None]
    x = net.conv(x, 16, 16, 3, name="kept", group=16 if middle == "dw" else 1, pads=[1] * 4, bias=True)
    net.weights["kept.weight"] *= spread  # one scale for all channels would ruin the small ones
    x = net.conv(net.relu(x), 16, 16, 1, name="c", bias=True)
    net.weights["c.weight"] /= spread.reshape(1, 16, 1, 1)
    net.head(net.relu(x), 16)
    found = Lowered(net.model(), Int8(keep_float=("node_kept",)), NARROW)
    assert found.skipped == {"kept": "keep_float names it"}
    kinds, optimal = optimised(found.after, tmp_path)
    assert kinds["QLinearConv"] == 2 and kinds["Conv"] + kinds["FusedConv"] == 1
    inputs = feeds(found.proto, batch=8, seed=8)
    assert distance(run(found.after, inputs), optimal(inputs)) <= 0.02
    (kept,) = [n for n in found.model.graph if n.name == "node_kept"]
    np.testing.assert_array_equal(found.model.constant(kept.inputs[1]), net.weights["kept.weight"])


def test_a_dense_layer_with_an_activation_runs_in_integers_before_a_layer_in_float(tmp_path):
    """Without codes behind both, the runtime fuses them in float, and decodes the weights at each inference."""
    net = Net("dense before float")
    x = net.relu(net.linear(net.input("x", ["N", 64]), 64, 48, name="a"))
    net.output(net.linear(x, 48, 10, name="kept"), ["N", 10])
    found = Lowered(net.model(), Int8(keep_float=("node_kept",), activations="static"), NARROW)
    kinds, optimal = optimised(found.after, tmp_path)
    assert kinds["QGemm"] == 1 and kinds["DequantizeLinear"] == 1  # what the layer in float reads
    inputs = feeds(found.proto, batch=8, seed=8)
    assert distance(run(found.after, inputs), optimal(inputs)) <= 0.02


def test_a_layer_that_stays_in_float_behind_codes_is_told_as_skipped():
    """Its own ledger entry has the reason, though it now reads what is decoded for it."""
    result = effc.optimize(
        residual(), "int8{keep_float=[node_a1]}", calibrate={"source": lambda: iter(calibration(residual()))},
        target_name=NARROW.name, measure=False,
    )  # fmt: skip
    entries = {e.node: e for e in result.history.passes[0].ledger}
    assert {*entries} == {n.name for n in from_proto(residual()).graph}
    assert (entries["node_a1"].status, entries["node_a1"].reason) == ("skipped", "keep_float names it")
    assert entries["node_a2"].status == "changed" and entries["node_a2"].setting == {"form": "static"}


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (5,), (1, 5)])
def test_dynamic_gemm(trans, bias, tmp_path):
    net = Net(f"dynamic {trans} {bias}")
    inputs = [net.input("x", ["N", 32]), net.weight("w", net.random(5, 32) if trans else net.random(32, 5))]
    inputs += [] if bias is None else [net.weight("c", np.asarray(net.random(*bias)))]
    net.output(net.node("Gemm", *inputs, name="fc", transB=trans, alpha=0.5, beta=3.0), ["N", 5])
    found = Lowered(net.model(), target=NARROW, calibrated=False)
    assert [p.setting for p in found.proposals] == [{"form": "dynamic"}] and found.proposals[0].damage is None
    assert found.error() <= 0.03
    kinds, optimal = optimised(found.after, tmp_path)
    assert kinds["DynamicQuantizeMatMul"] == 1 and not kinds.keys() & {"MatMulInteger", "DynamicQuantizeLinear", "Gemm"}
    x = feeds(found.proto, batch=8, seed=9)
    assert distance(run(found.after, x), optimal(x)) <= 0.01


def test_dynamic_products_of_a_transformer(tmp_path):
    found = Lowered(networks.transformer(), target=NARROW, calibrated=False)
    assert found.sites == ["q", "k", "v", "out"]
    assert {*found.skipped.values()} == {"its right operand is no constant"} and len(found.skipped) == 2
    assert found.error() <= 0.05
    kinds, _ = optimised(found.after, tmp_path)
    assert kinds["DynamicQuantizeMatMul"] + kinds["MatMulIntegerToFloat"] == 4 and not kinds["MatMulInteger"]


@pytest.mark.parametrize(
    ("activations", "dynamic"),
    [("auto", {"q", "k", "v", "out"}), ("dynamic", {"q", "k", "v", "out"}), ("static", set())],
)
def test_products_between_floats_take_ranges_as_they_run(activations, dynamic, tmp_path):
    found = Lowered(networks.transformer(), Int8(activations=activations), NARROW)
    assert {p.site.removeprefix("node_") for p in found.proposals if p.setting["form"] == "dynamic"} == dynamic
    assert found.sites == ["q", "k", "v", "out"] and all(p.damage > 0 for p in found.proposals)
    assert found.error() <= 0.05
    kinds, _ = optimised(found.after, tmp_path)
    assert bool(kinds["QuantizeLinear"]) == (activations == "static")


def test_products_that_codes_lead_to_keep_ranges_known_before():
    net = Net("chain")
    x = net.relu(net.linear(net.input("x", ["N", 32]), 32, 48, name="a"))
    x = net.node("Sigmoid", net.linear(x, 48, 32, name="b"))
    net.output(net.node("Exp", net.linear(net.node("Exp", x), 32, 8, name="c")), ["N", 8])
    found = Lowered(net.model(), Int8(), NARROW)
    assert {p.site: p.setting["form"] for p in found.proposals} == {
        "node_a": "static", "node_b": "static", "node_c": "dynamic"
    }  # fmt: skip
    assert found.error() <= 0.05


def test_damage_of_products_with_ranges_of_their_own():
    found = Lowered(networks.transformer(), target=NARROW)
    precise = [p for p in Int8().propose(found.before, replace(found.context, precise=True)) if isinstance(p, Proposal)]
    assert all(0 < p.damage < 0.01 for p in precise) and len(precise) == 4


def test_a_recipe_without_data_lowers_the_dense_layer_alone():
    result = effc.optimize(plain(), "int8", target_name=NARROW.name, measure=False)
    record = result.history.passes[0]
    assert record.skip_reasons["a convolution needs calibration data: give --calibrate SPEC"] == 3
    assert record.counts["changed"] == 1 and result.history.changed


def test_models_before_opset_13_are_lifted():
    net = Net("old", opset=9)
    x = net.input("x", ["N", 3, 8, 8])
    x = net.node("MaxPool", net.relu(net.conv(x, 3, 16, 3, name="a", bias=True)), name="max", kernel_shape=[2, 2])
    x = net.node("ReduceMean", x, name="mean", axes=[2, 3], keepdims=0)
    net.output(net.linear(x, 16, 5, name="fc"), ["N", 5])
    found = Lowered(net.model())
    assert found.sites == ["a", "fc"] and found.model.opset == 13 and found.before.opset == 9
    assert found.error() <= 0.03 and found.types()["GlobalAveragePool"] == 1


@pytest.mark.parametrize("opset", [13, 18, 22])
def test_opsets(opset, tmp_path):
    proto = version_converter.convert_version(depthwise(), opset)
    found = Lowered(proto, target=NARROW)
    assert len(found.sites) == 6 and found.error() <= 0.05
    kinds, _ = optimised(found.after, tmp_path)
    assert kinds["QLinearConv"] == 5 and not kinds["DequantizeLinear"]


@pytest.mark.parametrize("activation", [True, False])
def test_a_convolution_that_the_caller_reads(activation):
    net = Net(f"output {activation}")
    x = net.input("x", ["N", 16, 8, 8])
    y = net.conv(x, 16, 16, 3, name="a", bias=True)
    net.output(net.relu(y) if activation else y, ["N", 16, 6, 6])
    net.output(net.relu(net.conv(net.outputs[0].name, 16, 16, 3, name="b")), ["N", 16, 4, 4])
    found = Lowered(net.model(), Int8(calibrator="minmax"))
    assert found.sites == ["a", "b"] and found.seen() <= 0.03
    assert [o.name for o in found.after.graph.output] == [o.name for o in found.proto.graph.output]


def shared() -> onnx.ModelProto:
    net = Net("shared weights")
    x = net.input("x", ["N", 16, 8, 8])
    w = net.weight("w", net.random(16, 16, 3, 3, scale=0.1))
    x = net.relu(net.node("Conv", x, w, name="a", pads=[1] * 4))
    net.head(net.relu(net.node("Conv", x, w, name="b", pads=[1] * 4)), 16)
    return net.model()


def test_layers_that_share_a_weight():
    found = Lowered(shared())
    assert found.sites == ["a", "b", "fc"] and found.error() <= 0.03
    assert found.types()["Conv"] == 2 and "w" not in found.model.graph.initializers
    gains = [p.before.weight_bytes - p.after.weight_bytes for p in found.proposals]
    assert gains == [3 * 16 * 16 * 9, 0, 3 * 16 * 5]  # the weight is there once, so it is saved once
    one = Lowered(shared(), only=lambda site: site != "node_b")
    assert one.error() <= 0.03 and "w" in one.model.graph.initializers


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_padding_an_image_to_four_channels_changes_no_bit(channels, tmp_path):
    net = Net(f"image {channels}")
    x = net.input("x", ["N", channels, 9, 9])
    a = net.relu(net.conv(x, channels, 16, 3, name="a", pads=[1] * 4, bias=True))
    b = net.relu(net.conv(x, channels, 16, 5, name="b", pads=[2] * 4))  # two layers read the image
    net.head(net.node("Add", a, b, name="add"), 16)
    proto = net.model()
    bare = replace(NARROW, integer=replace(NARROW.integer, inputs_in=1))
    wide, narrow = (Lowered(proto, target=t) for t in (NARROW, bare))
    assert (wide.types()["Pad"], narrow.types()["Pad"]) == (2, 0)
    shape = wide.model.node("node_a").inputs[1].shape
    assert tuple(shape) == (16, -(-channels // 4) * 4, 3, 3)
    inputs = feeds(proto, batch=4, seed=3)
    for (name, x), y in zip(run(narrow.after, inputs).items(), run(wide.after, inputs).values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
    kinds, optimal = optimised(wide.after, tmp_path)
    assert kinds["QLinearConv"] == 2 and not kinds["DequantizeLinear"]
    (tmp_path / "bare").mkdir()
    plainly = optimised(narrow.after, tmp_path / "bare")[1]
    np.testing.assert_array_equal(optimal(inputs)["fc"], plainly(inputs)["fc"])


@pytest.mark.parametrize("group", [1, 16])
def test_a_corrected_bias_keeps_the_mean_output(group):
    """Of one layer on the calibration data; what is left is the rounding of activations and of the bias."""
    net = Net(f"bias {group}")
    x = net.relu(net.input("x", ["N", 16, 8, 8]))
    net.output(net.conv(x, 16, 16, 3, name="conv", group=group, pads=[1, 0, 1, 2], bias=True), ["N", 16, 8, 8])
    proto = net.model()
    inputs = {"x": np.concatenate([c["x"] for c in calibration(proto)])}
    before = run(proto, inputs)["conv"].astype(np.float64)

    def shift(**options) -> float:
        after = run(Lowered(proto, Int8(calibrator="minmax", **options), NARROW).after, inputs)["conv"]
        return float(np.sqrt(((after - before).mean(axis=(0, 2, 3)) ** 2).mean()))

    plainly = shift(rounding="nearest", bias_correction=False)
    assert shift(rounding="nearest", bias_correction=True) < 0.3 * plainly
    assert shift(rounding="balanced", bias_correction=False) < 0.7 * plainly
    assert shift(rounding="balanced", bias_correction=True) < 0.3 * plainly


def test_correction_makes_a_deep_network_nearer_to_float():
    plainly = Lowered(depthwise(), Int8(rounding="nearest", bias_correction=False), NARROW)
    corrected = Lowered(depthwise(), target=NARROW)
    assert np.mean([corrected.error(s) for s in range(4)]) < np.mean([plainly.error(s) for s in range(4)])


@pytest.mark.parametrize("target", [NARROW, WIDE])
def test_codes_keep_to_the_width_that_the_processor_takes(target):
    top = 63 if target is NARROW else 127
    for calibrated in (True, False):
        found = Lowered(residual(), target=target, calibrated=calibrated)
        codes = [v.const_value.numpy() for v in found.model.graph.initializers.values()]
        codes = [c for c in codes if c.dtype == np.int8 and c.ndim > 1]
        assert len(codes) == (6 if calibrated else 1)
        assert all(np.abs(c.astype(int)).max() == top for c in codes)


def test_the_form_that_kernels_take():
    """uint8 activations with one scale, int8 weights around zero with one a channel, int32 biases at their product."""
    model = Lowered(plain()).model
    node = model.node("node_b")
    x, w, b = (v.producer() for v in node.inputs)
    x_scale, x_zero = (model.constant(v) for v in x.inputs[1:])
    codes, scales, zeros = (model.constant(v) for v in w.inputs)
    integers, steps, none = (model.constant(v) for v in b.inputs)
    assert (x_scale.shape, x_zero.dtype, x_zero) == ((), np.uint8, 0)
    assert (codes.dtype, scales.shape, zeros.any()) == (np.int8, (32,), False) and w.attributes["axis"].value == 0
    assert integers.dtype == np.int32 and not none.any()
    np.testing.assert_array_equal(steps, x_scale * scales)
    fc = model.node("node_fc")
    assert "transB" not in fc.attributes and model.constant(fc.inputs[1].producer().inputs[0]).shape == (32, 5)
    assert fc.inputs[1].producer().attributes["axis"].value == 1


def pooled() -> onnx.ModelProto:
    """Operators between layers: pools, a gate, a concat, a resize, a transpose, two readers of a tensor."""
    net = Net("pooled")
    x = net.input("x", [2, 16, 12, 12])  # a fixed batch
    x = net.relu(net.conv(x, 16, 16, 3, name="a", pads=[1] * 4, bias=True))
    pool = net.node("AveragePool", x, name="avg", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    most = net.node("MaxPool", x, name="max", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    gate = net.node("Sigmoid", net.conv(pool, 16, 16, 1, name="gate", bias=True), name="sigmoid")
    x = net.node("Concat", net.node("Mul", gate, most, name="mul"), pool, name="cat", axis=1)
    scales = net.weight("scales", np.array([1, 1, 2, 2], np.float32))
    x = net.node("Resize", net.relu(net.conv(x, 32, 16, 3, name="b", pads=[1] * 4)), "", scales, name="up")
    x = net.node("LeakyRelu", net.conv(x, 16, 16, 3, name="c", bias=True), name="leaky", alpha=0.1)
    x = net.node("Transpose", x, name="last", perm=[0, 2, 3, 1])
    x = net.node("MatMul", x, net.weight("mm.w", net.random(16, 8, scale=0.3)), name="mm")
    net.output(net.node("Softmax", x, name="soft"), [2, 10, 10, 8])
    return net.model()


def test_operators_between_layers(tmp_path):
    found = Lowered(pooled(), target=NARROW)
    assert found.sites == ["a", "gate", "b", "c", "mm"]
    assert found.error() <= 0.08
    kinds, optimal = optimised(found.after, tmp_path)
    for kind, count in {"QLinearConv": 4, "QLinearMul": 1, "QLinearConcat": 1, "QLinearAveragePool": 1}.items():
        assert kinds[kind] == count, kinds
    assert not kinds["Conv"] + kinds["FusedConv"]
    inputs = feeds(found.proto, seed=8)
    assert distance(run(found.after, inputs), optimal(inputs)) <= 0.05


def test_averages_that_count_their_padding(tmp_path):
    net = Net("count padding")
    x = net.conv(net.input("x", ["N", 16, 9, 9]), 16, 16, 3, name="a", bias=True)  # no ReLU: zero is not code 0
    x = net.node("AveragePool", x, name="avg", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    net.output(net.conv(x, 16, 16, 1, name="b"), ["N", 16, 7, 7])
    found = Lowered(net.model(), target=NARROW)
    assert found.error() <= 0.05
    inputs = feeds(found.proto, batch=4, seed=8)
    assert distance(run(found.after, inputs), optimised(found.after, tmp_path)[1](inputs)) <= 0.02


@pytest.mark.parametrize("pads", [[0] * 4, [1] * 4, [0, 2, 1, 0]])
def test_averages_that_reach_beyond_what_they_count(pads, tmp_path):
    """onnxruntime's integer kernel counts what hangs over as padding; the mean over it all stays what ONNX says."""
    net = Net("over")
    x = net.relu(net.conv(net.input("x", ["N", 16, 10, 10]), 16, 16, 3, name="a", bias=True))
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "count_include_pad": 1, "pads": pads}
    x = net.node("AveragePool", x, name="avg", **window)
    net.output(net.conv(x, 16, 16, 1, name="b"), ["N", 16, "H", "W"])
    found = Lowered(net.model(), target=NARROW)
    assert found.error() <= 0.08
    kinds, optimal = optimised(found.after, tmp_path)
    assert kinds["QLinearAveragePool"] == 1
    inputs = feeds(found.proto, batch=4, seed=8)
    assert distance(run(found.after, inputs), optimal(inputs)) <= 0.02


def test_readers_that_no_kernel_of_ours_knows():
    """A foreign operator between layers, a branch that reads a coded tensor, and a Gemm that reads it transposed."""
    net = Net("readers")
    x = net.input("x", [8, 32])
    y = net.relu(net.linear(x, 32, 16, name="a"))
    net.nodes.append(helper.make_node("Gelu", [y], ["gelu"], name="node_gelu", domain="com.microsoft"))
    net.output(net.linear("gelu", 16, 5, name="b"), [8, 5])
    net.output(net.linear(y, 16, 5, name="c"), [8, 5])
    net.output(net.node("Gemm", y, net.weight("w", net.random(8, 6, scale=0.3)), name="turned", transA=1), [16, 6])
    mean = net.node("ReduceMean", x, name="mean", keepdims=0)
    decision = net.node("Less", mean, net.weight("far", np.float32(99)), name="decision")
    inner = net.weight("inner", net.random(16, 4, scale=0.3))
    branches = {
        key: helper.make_graph([node], key, [], [helper.make_tensor_value_info(key, 1, [8, 4])])
        for key, node in {
            "then_branch": helper.make_node("Gemm", [y, inner], ["then_branch"], name="inside"),
            "else_branch": helper.make_node("MatMul", [y, inner], ["else_branch"], name="outside"),
        }.items()
    }
    net.output(net.node("If", decision, name="choice", **branches), [8, 4])
    proto = net.model()
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = Lowered(proto, Int8(calibrator="minmax"), NARROW)
    assert found.sites == ["a", "b", "c"] and found.skipped == {"turned": "its left operand is transposed"}
    assert found.seen(8) <= 0.03


def test_fewer_layers_are_offered_from_the_start_on():
    found = Lowered(residual())
    offered = list(Int8().variants(found.before, found.proposals[::-1], found.context))
    assert [[p.site for p in v] for v in offered] == [[p.site for p in found.proposals[k:]] for k in (1, 2, 3)]
    dynamic = Lowered(residual(), calibrated=False)
    assert not list(Int8().variants(dynamic.before, dynamic.proposals, dynamic.context))


def test_predicted_costs_and_damages():
    found = Lowered(residual())
    costs = cost(found.before).nodes
    for p in found.proposals:
        weight = found.before.constant(found.before.node(p.site).inputs[1])
        before = costs[p.site]
        assert (p.before.macs, p.before.weight_bytes, p.before.parameters) == (
            before.macs, before.weight_bytes, before.parameters,
        )  # fmt: skip
        assert p.before.weight_bytes - p.after.weight_bytes == 3 * weight.size and p.after.macs == before.macs
        now = found.context.cost_of(found.before, [p.site])
        assert replace(p.before, seconds=0.0) == replace(now, seconds=0.0)
        assert p.before.seconds >= now.seconds * (1 - 1e-9)  # with the way to floats and back, where that counts
        assert 0.05 < p.after.energy / p.before.energy < 0.3  # 0.3 of 4.6 pJ a product, a quarter of the bytes
        assert p.damage is not None and 0 < p.damage < 1e-2
    narrow = {p.site: p.damage for p in Lowered(residual(), target=NARROW).proposals}
    assert all((narrow[p.site] or 0) > (p.damage or 0) for p in found.proposals)


@pytest.fixture
def timed(monkeypatch) -> dict[str, float]:
    """Microseconds of each kind of kernel, of convolutions by their outputs too; what is not named takes 1."""
    told: dict[str, float] = {}

    def fake(kernels, target, threads=1) -> list[Estimate]:
        names = [(f"{k.key} {k.dims.get('m', 0) * k.dims.get('g', 1):g}", k.key) for k in kernels]
        us = [next((told[name] for name in pair if name in told), 1.0) for pair in names]
        return [Estimate(1e-6 * t, 0.1, MEASURED) for t in us]

    monkeypatch.setattr(effc.predict, "estimate", fake)
    return told


KINDS = ("conv", "conv-image", "conv-pointwise", "gemm-row", "qconv", "qconv-patches", "qgemm-row")
WAYS = ("DequantizeLinear:int8", "QuantizeLinear")


def proposed(proto: onnx.ModelProto, kinds: tuple[str, ...], calibrated: bool = True) -> dict[str, Proposal]:
    target = replace(NARROW, kernels={1: dict.fromkeys(kinds)})
    found = Lowered(proto, target=target, calibrated=calibrated, only=lambda site: False)
    return {p.site.removeprefix("node_"): p for p in found.proposals}


def microseconds(found: dict[str, Proposal]) -> dict[str, tuple[float, float]]:
    costs = {site: (p.before, p.after) for site, p in found.items()}
    return {site: (round(1e6 * a.seconds, 3), round(1e6 * b.seconds, 3)) for site, (a, b) in costs.items()}


def test_seconds_of_a_layer_are_told_where_both_its_kernels_were_measured(timed):
    """A layer between integer ones could stay in float at the price of decoding (5 us) and coding (3 us) besides."""
    timed |= {"conv": 9, "conv-image": 12, "gemm-row": 4, "qconv": 2, "qgemm-row": 1.5, WAYS[0]: 5, WAYS[1]: 3}
    whole = microseconds(proposed(plain(), (*KINDS, *WAYS)))
    assert whole == {"a": (12, 2), "b": (9 + 8, 2), "c": (9 + 8, 2), "fc": (4, 1.5)}
    assert microseconds(proposed(plain(), KINDS))["b"] == (9, 2)  # the ways were not measured
    partly = microseconds(proposed(plain(), ("conv", "qconv", "gemm-row")))
    assert partly["b"] == (9, 2) and partly["a"] == (12, 0) and partly["fc"] == (4, 0)  # 0: not known
    assert {after for _, after in microseconds(proposed(plain(), ())).values()} == {0}
    dynamic = proposed(plain(), KINDS, calibrated=False)
    assert microseconds(dynamic) == {"fc": (4, 0)}
    assert dynamic["fc"].after.activation_bytes == dynamic["fc"].before.activation_bytes  # floats in and out


def kept(proto: onnx.ModelProto, kinds: tuple[str, ...], monkeypatch, **options) -> tuple[set[str], effc.Result]:
    target = replace(NARROW, kernels={1: dict.fromkeys(kinds)}, local=True)
    monkeypatch.setattr("effc.target.find", lambda name, **settings: target)
    result = effc.optimize(
        proto, "int8", calibrate={"source": lambda: iter(calibration(proto))}, measure=False, **options
    )
    entries = result.history.passes[0].ledger
    return {e.node.removeprefix("node_") for e in entries if e.op in ("Conv", "Gemm") and e.status == "changed"}, result


def test_a_layer_whose_integer_kernel_is_slower_stays_in_float_at_the_ends_only(timed, monkeypatch):
    """b would be slower too, but between integer layers decoding and coding cost more than it loses."""
    timed |= {
        "conv 32": 5,
        "conv-image": 3,
        "gemm-row": 4,
        "qconv 32": 7,
        "qconv 16": 9,
        "qgemm-row": 1,
        WAYS[0]: 2,
        WAYS[1]: 2,
    }
    timed["qconv-patches 16"] = 9
    done, result = kept(plain(), (*KINDS, *WAYS), monkeypatch, force=False)
    assert microseconds(proposed(plain(), (*KINDS, *WAYS)))["a"] == (3, 9)
    record = result.history.passes[0]
    reasons = {e.node: e.reason for e in record.ledger}
    assert reasons["node_a"] == "predicted not to pay: 3.0 us before, 9.0 us after"
    assert {"b", "c"} & done == set() and "fc" in done  # nothing that gains stands before them
    timed["qconv 16"] = 1
    done, result = kept(plain(), (*KINDS, *WAYS), monkeypatch)
    assert done == {"a", "b", "c", "fc"}
    timed |= {"qconv 32": 20}
    done, _ = kept(plain(), (*KINDS, *WAYS), monkeypatch)
    assert done == {"a", "fc"}
    assert kept(plain(), (*KINDS, *WAYS), monkeypatch, goal="size")[0] == {"a", "b", "c", "fc"}
    assert kept(plain(), (*KINDS, *WAYS), monkeypatch, force=True)[0] == {"a", "b", "c", "fc"}


def test_precise_damage_is_that_of_the_layer_alone():
    found = Lowered(residual())
    found.context.precise = True
    precise = {p.site: p.damage for p in Int8().propose(found.before, found.context) if isinstance(p, Proposal)}
    assert {*precise} == {p.site for p in found.proposals}
    alone = Lowered(residual(), Int8(rounding="balanced"), only=lambda site: site == "node_a1")  # the quick estimate
    sessions = {"float": RUNTIME.session(found.before), "alone": RUNTIME.session(alone.model)}
    data = found.context.calibration
    assert data is not None
    expected = evaluate(sessions, data, reference="float")["alone"].damage
    assert precise["node_a1"] == pytest.approx(expected, rel=1e-6) and expected > 0


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_size_is_reached_with_as_few_layers_as_it_takes(share):
    proto = residual()
    result = effc.optimize(
        proto, f"int8{{size={share}}}", calibrate={"source": lambda: iter(calibration(proto))},
        target_name=NARROW.name, measure=False,
    )  # fmt: skip
    record = result.history.passes[0]
    whole = record.cost_before.weight_bytes
    sizes = {p.site: p.before.weight_bytes - p.after.weight_bytes for p in Lowered(proto).proposals}
    saved = [sizes[site] for site, _ in record.chosen]
    assert sum(saved) >= (1 - share) * whole  # reached, by the pass's own count
    assert sum(saved) - min(saved) < (1 - share) * whole  # with nothing to spare
    assert 1 <= len(record.chosen) < len(sizes) or share == 0.4
    # Scales and biases of 32 bits come on top: 3 % of this small network.
    assert record.cost_after.weight_bytes <= (share + 0.03) * whole


MADE = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.test_int8 import Lowered, pooled
sys.stdout.buffer.write(Lowered(pooled()).after.SerializeToString())
"""


def test_two_processes_write_the_same_bytes():
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", MADE, root]
    runs = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 10_000
    assert onnx.load_from_string(runs[0]).graph.node


def test_weights_that_were_not_given_stay_untouched():
    proto = plain()
    found = Lowered(proto)
    before = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name, array in before.items():
        np.testing.assert_array_equal(found.before.constant(found.before.value(name)), array)


def test_a_tiny_weight_under_a_large_bias_does_not_overflow(tmp_path):
    proto = plain()
    for tensor in proto.graph.initializer:
        if tensor.name == "a.weight":
            array = numpy_helper.to_array(tensor).copy()
            array[3] = 1e-13
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        if tensor.name == "a.bias":
            array = numpy_helper.to_array(tensor).copy()
            array[3] = 2.5
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    found = Lowered(proto, target=NARROW)
    assert found.error() <= 0.05
    inputs = feeds(proto, batch=4, seed=4)
    assert distance(run(found.after, inputs), optimised(found.after, tmp_path)[1](inputs)) <= 0.02


def test_names_and_messages_are_plain():
    """Nothing but words in reasons: no reprs of objects."""
    for make in networks.NETWORKS.values():
        found = Lowered(make(), target=NARROW)
        assert all(re.fullmatch(r"[\x20-\x7e]+", r) and "<" not in r for r in found.skipped.values())
