"""effc.backends.tensorrt: what is emitted keeps TensorRT's rules, and how near to float it stays on onnxruntime.

Tolerances are of max|a - b| / max|a| over outputs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

import effc
from effc import registry
from effc.capture import from_proto
from effc.errors import BadInput, EffcError
from effc.guard import quantised
from effc.history import KEPT
from effc.model import Model
from effc.verify import difference
from tests import networks
from tests.networks import Net, distance, feeds, run

TENSORRT, HALF = registry.backend("tensorrt"), registry.backend("tensorrt-fp16")
RECIPE = "simplify, fold-batchnorm, int8"
SAMPLES = 24


def samples(proto: onnx.ModelProto, count: int = SAMPLES) -> list[dict[str, np.ndarray]]:
    return [{n: a[:1] for n, a in feeds(proto, batch=1, seed=100 + s).items()} for s in range(count)]


def made(proto: onnx.ModelProto, passes: str = RECIPE, target: str = "tensorrt", **settings) -> effc.Result:
    data = {"source": lambda: iter(samples(proto))}
    settings.setdefault("calibrate", data)
    return effc.optimize(proto, passes, target_name=target, dims={"T": 6}, force=True, **settings)


def errors(model: Model) -> list[str]:
    return [str(f) for f in registry.checker("tensorrt").check(model) if f.error]


def types(model: Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


def maker(node: ir.Node, index: int) -> str:
    """Operator that makes an input; "" for weights and inputs of the model."""
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    return "" if producer is None else producer.op_type


def plain() -> onnx.ModelProto:
    net = Net("tensorrt plain")
    x = net.input("x", ["N", 16, 12, 12])
    x = net.relu(net.norm(net.conv(x, 16, 32, 3, name="a", pads=[1] * 4), 32, name="bn"))
    x = net.relu(net.conv(x, 32, 32, 3, name="b", pads=[1] * 4, strides=[2, 2], bias=True))
    net.head(net.relu(net.conv(x, 32, 32, 3, name="c", bias=True)), 32, classes=20)
    return net.model()


def residual() -> onnx.ModelProto:
    """A block with its input as the shortcut, and one with a projection."""
    net = Net("tensorrt residual")
    x = net.relu(net.conv(net.input("x", ["N", 3, 12, 12]), 3, 16, 3, name="stem", pads=[1] * 4, bias=True))
    for block, (n, d) in {"a": (16, 16), "b": (16, 32)}.items():
        y = net.relu(net.conv(x, n, d, 3, name=f"{block}1", pads=[1] * 4, bias=True))
        y = net.conv(y, d, d, 3, name=f"{block}2", pads=[1] * 4, bias=True)
        x = net.conv(x, n, d, 1, name="shortcut") if n != d else x
        x = net.relu(net.node("Add", y, x, name=f"{block}_add"))
    net.head(x, 32, classes=20)
    return net.model()


def pools() -> onnx.ModelProto:
    """Branches as in an Inception block: pools, convolutions and a Concat; one branch ends in floats."""
    net = Net("tensorrt pools")
    x = net.relu(net.conv(net.input("x", ["N", 16, 12, 12]), 16, 16, 3, name="stem", pads=[1] * 4, bias=True))
    a = net.relu(net.conv(x, 16, 16, 1, name="a", bias=True))
    b = net.node("MaxPool", x, name="max", kernel_shape=[3, 3], pads=[1] * 4)
    c = net.node("AveragePool", x, name="mean", kernel_shape=[3, 3], pads=[1] * 4)
    c = net.relu(net.conv(c, 16, 16, 1, name="c", bias=True))
    y = net.conv(net.node("Concat", a, b, c, name="cat", axis=1), 48, 32, 1, name="joined", bias=True)
    gate = net.node("Softmax", net.node("AveragePool", x, name="gate_pool", kernel_shape=[12, 12]), name="gate", axis=1)
    net.output(net.node("Flatten", gate), ["N", 16])
    net.head(net.relu(y), 32, classes=20)
    return net.model()


def upwards() -> onnx.ModelProto:
    net = Net("tensorrt upwards")
    x = net.relu(net.conv(net.input("x", ["N", 16, 6, 6]), 16, 32, 3, name="down", strides=[2, 2], pads=[1] * 4))
    x = net.relu(net.conv(x, 32, 16, 2, name="up", transposed=True, strides=[2, 2], bias=True))
    net.output(net.conv(x, 16, 16, 2, name="groups", transposed=True, group=4, strides=[2, 2]), ["N", 16, 12, 12])
    return net.model()


def dense() -> onnx.ModelProto:
    net = Net("tensorrt dense")
    x = net.relu(net.linear(net.input("x", ["N", 32]), 32, 48, name="fc1"))
    y = net.node("MatMul", x, net.weight("fc2.weight", net.random(48, 48, scale=0.2)), name="fc2")
    y = net.node("Add", y, net.weight("fc2.bias", net.random(48)), name="fc2_bias")
    x = net.node("Add", net.relu(y), x, name="skip")
    net.output(net.linear(x, 48, 20, name="fc3"), ["N", 20])
    return net.model()


WIDE: dict[str, tuple[Callable[[], onnx.ModelProto], set[str]]] = {
    "plain": (plain, {"a", "b", "c", "fc"}),
    "residual": (residual, {"a1", "a2", "b1", "b2", "shortcut", "fc"}),
    "pools": (pools, {"stem", "a", "c", "joined", "fc"}),
    "upwards": (upwards, {"down", "up"}),
    "dense": (dense, {"fc1", "fc2", "fc3"}),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_networks_keep_every_rule_and_stay_within_3_percent(name):
    """Advice included. On onnxruntime's optimised sessions, which have kernels for such codes, within 4 %."""
    make, layers = WIDE[name]
    proto = make()
    model = made(proto).model
    assert registry.checker("tensorrt").check(model) == ()
    quantised_layers = {n.name for n in model.graph if n.op_type in LAYERS and maker(n, 1) == "DequantizeLinear"}
    assert quantised_layers == {f"node_{layer}" for layer in layers}
    after = model.proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = feeds(proto, batch=4, seed=5)
    assert distance(run(proto, inputs), run(after, inputs)) <= 0.03
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(after.SerializeToString(), options, providers=["CPUExecutionProvider"])
    deployed = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
    assert distance(run(proto, inputs), deployed) <= 0.04


LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What is left in float there: layers of fewer than 16 channels. Largest distance on inputs that were not seen.
SMALL = dict.fromkeys(networks.NETWORKS, 0.04)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_small_networks_keep_the_rules_and_stay_near_to_float(name):
    proto = networks.NETWORKS[name]()
    model = made(proto).model
    assert errors(model) == []
    onnx.checker.check_model(model.proto(), full_check=True)
    inputs = feeds(proto, batch=1 if model.batch else 3, seed=5)
    assert distance(run(proto, inputs), run(model.proto(), inputs)) <= SMALL[name]


def test_residual_adds_read_the_convolution_and_the_coded_shortcut():
    model = made(residual()).model
    makers = {n.name: [maker(n, 0), maker(n, 1)] for n in model.nodes("Add")}
    assert makers == {"node_a_add": ["Conv", "DequantizeLinear"], "node_b_add": ["Conv", "DequantizeLinear"]}
    fused = {n.name: n.inputs[0].producer().name for n in model.nodes("Add")}
    assert fused == {"node_a_add": "node_a2", "node_b_add": "node_b2"}  # not the projection, which has fewer layers
    assert types(model)["QuantizeLinear"] == 6  # one a tensor: of a1, a2, b1 (and its shortcut), b2, shortcut, fc


def test_biases_stay_floats_and_codes_are_symmetric():
    model = made(residual()).model
    for layer in model.nodes("Conv", "Gemm"):
        bias = model.constant(layer.inputs[2])
        assert bias.dtype == np.float32
    for node in model.nodes("QuantizeLinear", "DequantizeLinear"):
        zero, scale = model.constant(node.inputs[2]), model.constant(node.inputs[1])
        assert zero.dtype == np.int8 and not zero.any() and (scale > 0).all() and zero.shape == scale.shape
    for node in model.nodes("QuantizeLinear"):
        assert model.constant(node.inputs[1]).shape == ()


def test_weights_are_within_half_a_step_along_the_right_axis():
    """Against the folded weights themselves."""
    for proto, axes in ((residual(), {"a1": 0, "fc": 1}), (upwards(), {"up": 1}), (dense(), {"fc2": 1, "fc1": 1})):
        model = made(proto, "int8{rounding=nearest,bias_correction=false}").model
        weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for name, axis in axes.items():
            decoder = model.node(f"node_{name}").inputs[1].producer()
            codes, scale = (model.constant(v) for v in decoder.inputs[:2])
            assert decoder.attributes.get_int("axis") == axis and scale.shape == (codes.shape[axis],)
            weight = weights[f"{name}.weight"]
            weight = weight.T if weight.shape != codes.shape or name == "fc1" else weight  # Gemm's, as K x N
            along = [-1 if i == axis else 1 for i in range(codes.ndim)]
            error = np.abs(codes * scale.reshape(along) - weight) / scale.reshape(along)
            assert error.max() <= 0.5 + 1e-4 and np.abs(codes).max() == 127


def test_no_output_is_quantised_and_float_readers_read_floats():
    model = made(pools()).model
    assert maker(model.node("node_gate"), 0) == "AveragePool"
    assert maker(model.node("node_gate_pool"), 0) == "Relu"  # what the other branches read as codes
    assert maker(model.node("node_mean"), 0) == "DequantizeLinear"  # an integer pool: its output is coded as well
    assert [n.op_type for n in model.node("node_mean").outputs[0].consumers()] == ["QuantizeLinear"]
    assert [maker(model.node("node_cat"), i) for i in range(3)] == ["Relu", "MaxPool", "Relu"]
    assert not any(v.producer().op_type in ("QuantizeLinear", "DequantizeLinear") for v in model.graph.outputs)


def test_a_layer_s_output_that_is_one_of_the_model_stays_float():
    net = Net("tensorrt two ends")
    x = net.conv(net.input("x", ["N", 16, 8, 8]), 16, 16, 1, name="a", bias=True)
    net.output(x, ["N", 16, 8, 8])
    net.output(net.conv(x, 16, 16, 1, name="b", bias=True), ["N", 16, 8, 8])
    model = made(net.model()).model
    assert errors(model) == [] and [v.producer().name for v in model.graph.outputs] == ["node_a", "node_b"]
    assert maker(model.node("node_b"), 0) == "DequantizeLinear"


def test_2_to_4_sparsity_is_kept():
    """By balanced rounding too, which turns weights near a tie but no zero."""
    proto = plain()
    for tensor in proto.graph.initializer:
        if tensor.name in ("a.weight", "b.weight", "c.weight"):
            array = numpy_helper.to_array(tensor).copy()
            order = np.argsort(np.abs(array.reshape(array.shape[0], -1, 4, 3, 3)), axis=2)
            np.put_along_axis(array.reshape(array.shape[0], -1, 4, 3, 3), order[:, :, :2], 0, axis=2)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    model = made(proto).model
    for name in "abc":
        codes = model.constant(model.node(f"node_{name}").inputs[1].producer().inputs[0])
        fours = (codes != 0).reshape(codes.shape[0], -1, 4, 3, 3).sum(axis=2)
        assert fours.max() == 2 and (fours == 2).mean() > 0.9
    assert errors(model) == []


def test_without_calibration_data_nothing_is_quantised():
    result = made(dense(), calibrate=None)
    reasons = {reason for record in result.history.passes for reason in record.skip_reasons}
    assert "tensorrt takes no scales that are found as it runs: give --calibrate SPEC" in reasons
    assert not quantised(result.model)


def test_narrow_layers_and_groups_are_left_with_a_reason():
    reasons = {e.node: e.reason for record in made(residual()).history.passes for e in record.ledger if e.reason}
    assert reasons["node_stem"] == "it has 3 inputs and 16 outputs; from 16 of each on integers are worth it there"
    reasons = {e.node: e.reason for record in made(upwards()).history.passes for e in record.ledger if e.reason}
    assert reasons["node_groups"] == "a transposed convolution of 4 groups stays in float"


class TestEmission:
    """Of models that were quantised elsewhere."""

    def quantised(self, scale: np.ndarray, integer_bias: bool) -> Model:
        net = Net("tensorrt given")
        x = net.input("x", ["N", 16, 8, 8])
        zero = net.weight("zero", np.zeros(scale.shape, np.int8))
        pair = net.weight("scale", scale.astype(np.float32)), zero
        axis = {"axis": 1} if scale.size > 1 else {}
        x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, *pair, **axis), *pair, name="dq", **axis)
        codes = net.weight("w", net.rng.integers(-127, 128, (16, 16, 1, 1)).astype(np.int8))
        scales = net.weight("ws", np.linspace(0.01, 0.02, 16, dtype=np.float32))
        weight = net.node("DequantizeLinear", codes, scales, net.weight("wz", np.zeros(16, np.int8)), axis=0)
        bias = net.weight("b", np.arange(-8, 8, dtype=np.int32) * 1000)
        if integer_bias:
            steps = net.weight("bs", (0.05 * np.linspace(0.01, 0.02, 16)).astype(np.float32))
            bias = net.node("DequantizeLinear", bias, steps, net.weight("bz", np.zeros(16, np.int32)), axis=0)
        else:
            bias = net.weight("bf", net.random(16))
        net.output(net.node("Conv", x, weight, bias, name="conv"), ["N", 16, 8, 8])
        return from_proto(net.model())

    @pytest.mark.parametrize("count", [1, 16])
    def test_biases_and_scales_take_the_form_that_is_taken(self, count):
        model = self.quantised(np.full(count, 0.05) if count > 1 else np.array(0.05), integer_bias=True)
        assert {f.number for f in registry.checker("tensorrt").check(model)} == ({2, 6} if count > 1 else {6})
        before = model.proto()
        TENSORRT.emit(model)
        assert errors(model) == []
        assert model.constant(model.node("node_conv").inputs[2]).dtype == np.float32
        assert model.constant(next(model.nodes("QuantizeLinear")).inputs[1]).shape == ()
        inputs = {"x": np.random.default_rng(0).standard_normal((2, 16, 8, 8), np.float32)}
        assert distance(run(before, inputs), run(model.proto(), inputs)) <= 1e-6
        revision = model.proto().SerializeToString()
        TENSORRT.emit(model)  # nothing is left to do
        assert model.proto().SerializeToString() == revision

    def test_what_no_lowering_mends_is_refused_by_its_rule(self):
        model = self.quantised(np.linspace(0.01, 0.05, 16), integer_bias=False)
        with pytest.raises(BadInput, match=r"is nothing for TensorRT: error: QuantizeLinear .* rule 2 .*16 scales"):
            TENSORRT.emit(model)
        with pytest.raises(BadInput, match=r"tensorrt cannot run.*|nothing for TensorRT"):
            effc.optimize(model, "simplify", target_name="tensorrt")

    def test_opsets(self):
        old = networks.old()
        old.opset_import[0].version = 8
        model = from_proto(old)
        TENSORRT.emit(model)
        assert model.opset == 9 and errors(model) == []
        net = Net("tensorrt new", opset=26)
        net.output(net.relu(net.input("x", ["N", 4])), ["N", 4])
        with pytest.raises(BadInput, match="is of opset 26; TensorRT takes 9 to 25: export it at one of these"):
            TENSORRT.emit(from_proto(net.model()))


def test_inner_tensors_are_those_of_the_model_as_it_is():
    model = from_proto(plain())
    inputs = feeds(plain(), batch=2)
    shown = HALF.session(model, expose=["bn"]).run(inputs)["bn"]
    assert shown.dtype == np.float32
    np.testing.assert_array_equal(shown, TENSORRT.session(model, expose=["bn"]).run(inputs)["bn"])


def float_types(model: Model) -> Counter[str]:
    return Counter(t.dtype.name for t in model.tensors() if t.dtype.is_floating_point())


@pytest.mark.parametrize("name", WIDE)
def test_in_float16_types_of_inputs_and_outputs_stay_and_numbers_within_3_percent(name):
    proto = WIDE[name][0]()
    model = made(proto, target="tensorrt-fp16").model
    assert errors(model) == [] and model.opset >= 19
    after = model.proto()
    onnx.checker.check_model(after, full_check=True)
    assert {i.type.tensor_type.elem_type for i in (*after.graph.input, *after.graph.output)} == {TensorProto.FLOAT}
    assert float_types(model).keys() == {"FLOAT16"}
    inputs = feeds(proto, batch=4, seed=5)
    assert distance(run(proto, inputs), run(after, inputs)) <= 0.03


@pytest.mark.parametrize("name", [n for n in networks.NETWORKS if n != "half"])
def test_float_networks_in_float16(name):
    """Rounding to 11 bits, layer by layer: within 1 %."""
    proto = networks.NETWORKS[name]()
    model = from_proto(proto)
    HALF.emit(model)
    assert errors(model) == []
    onnx.checker.check_model(model.proto(), full_check=True)
    inputs = feeds(proto, batch=1 if model.batch else 3)
    after = run(model.proto(), inputs)
    assert distance(run(proto, inputs), after) <= 0.01
    assert {v.dtype for v in after.values()} == {v.dtype for v in run(proto, inputs).values()}


def test_numbers_that_float16_does_not_hold():
    """A bias beyond 65504 keeps its layer in float32; a channel of tiny weights is coded anew."""
    proto = plain()
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "c.bias":
            array[0] = -1e5  # which the ReLU behind it takes away
        elif tensor.name == "b.weight":
            array[3] *= 1e-5
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    exact, model = (made(proto, target=t).model for t in ("tensorrt", "tensorrt-fp16"))
    assert errors(model) == []
    held = {n: model.constant(model.node(n).inputs[1].producer().inputs[1]) for n in ("node_b", "node_c")}
    assert held["node_b"].dtype == np.float16 and held["node_c"].dtype == np.float32
    assert held["node_b"].min() == np.float16(2.0**-17)
    before = exact.constant(exact.node("node_b").inputs[1].producer().inputs[1])
    assert 0 < before.min() < 2.0**-17
    inputs = feeds(proto, batch=2, seed=5)
    # Statistics and rounding differ, so that codes near a tie turn: within 2 %.
    assert distance(run(exact.proto(), inputs), run(model.proto(), inputs)) <= 0.02


class TestReport:
    def test_one_line_says_that_there_is_no_engine(self):
        history = made(plain()).history
        assert history.latency is None and history.predicted is None
        assert history.unproven[0] == TENSORRT.caveat and len(history.unproven) == 2  # and that accuracy is not known
        assert any("latency is not predicted: target 'tensorrt' has no figures" in note for note in history.notes)
        assert [s.latency for s in history.stages] == [None] * 3
        assert history.versions["tensorrt"].startswith("not installed; onnxruntime ")

    def test_latency_can_be_asked_of_nobody(self):
        for limit in ({"min_speedup": 1.1},):
            with pytest.raises(BadInput, match="no speed can be measured"):
                made(plain(), **limit)
        with pytest.raises(BadInput, match="this model's is not known"):
            made(plain(), "low-rank{speedup=2}")
        with pytest.raises(EffcError, match="not at hand"):
            TENSORRT.kernels(from_proto(plain()))

    def test_limits_on_accuracy_hold(self):
        """The labels are the original's own answers, so that a drop is what changed its mind."""
        proto = plain()
        inputs = feeds(proto, batch=256, seed=3)
        labels = run(proto, inputs)["fc"].argmax(axis=1)
        evaluate = {"source": lambda: iter([{**inputs, "y": labels}]), "labels": "y"}
        settings = {"target_name": "tensorrt", "evaluate": evaluate}
        settings["calibrate"] = {"source": lambda: iter(samples(proto))}
        kept = effc.optimize(proto, RECIPE, max_drop=50, **settings).history
        assert kept.stages[-1].status == KEPT and kept.final.accuracy.agreement > 0.8
        coarse = "fold-batchnorm, int8{calibrator=percentile, percentile=51, rounding=nearest}"
        spoilt = effc.optimize(proto, coarse, force=True, **settings).history
        assert spoilt.final.accuracy.drop > 5
        held = effc.optimize(proto, coarse, max_drop=5, **settings).history
        assert held.final.accuracy.drop <= 5

    def test_what_is_emitted_is_judged_by_what_the_original_means(self):
        """Nothing is kept of the recipe, and the file is in float16 all the same: that is not free of charge."""
        inputs = feeds(plain(), batch=64, seed=3)
        data = {"source": lambda: iter([inputs]), "metric": "kl"}
        history = made(plain(), "simplify", target="tensorrt-fp16", evaluate=data).history
        assert history.original.accuracy.damage == 0 and 0 < history.final.accuracy.damage < 1e-4
        assert made(plain(), "simplify", evaluate=data).history.final.accuracy.damage < 1e-10
        assert 0.5 <= history.final.size / history.original.size < 0.6

    def test_a_target_with_figures_is_predicted_by_its_roofline(self):
        history = made(plain(), target="tensorrt-a100").history
        assert history.predicted is not None and history.predicted.basis == "roofline"
        assert TENSORRT.caveat in history.unproven

    def test_size_can_be_the_goal(self):
        history = made(plain(), goal="size", max_size=0.5).history
        assert history.final.size <= 0.5 * history.original.size and history.stages[-1].status == KEPT


def test_the_written_file_is_what_was_judged(tmp_path):
    proto = residual()
    result = made(proto, target="tensorrt-fp16")
    path = effc.save(result.model, tmp_path / "m.onnx")
    inputs = feeds(proto, batch=2)
    assert difference(HALF.session(result.model).run(inputs), run(onnx.load(path), inputs)) <= 1e-6
    assert errors(effc.load(path)) == []
    with pytest.raises(BadInput, match="nothing for TensorRT"):
        effc.save(made(proto, target="onnxruntime-avx2", measure=False).model, path, backend=TENSORRT)
    assert errors(effc.load(effc.save(from_proto(proto), path, backend=HALF))) == []


def test_the_same_input_gives_the_same_bytes():
    first, second = (made(residual()).model.proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_a_float_layer_between_coded_ones_is_no_prey_of_onnxruntime():
    """Which would quantise the float weights of a layer between DQ and Q: here that layer reads floats."""
    model = made(residual(), f"{RECIPE}{{keep_float=[node_a2]}}").model
    assert errors(model) == [] and maker(model.node("node_a2"), 0) == "Relu"
    inputs = feeds(residual(), batch=2)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
    assert distance(run(model.proto(), inputs), found) <= 0.02


DATA = Path(os.environ.get("EFFC_DATA", "."))
REAL = {
    "resnet20-cifar10": ("cifar10-train.yaml{limit=128}", "cifar10-test.yaml{limit=500}", 1.5),
    "mobilenet_v1_025-imagenet": ("imagenet-500.yaml{limit=100}", "imagenet-500.yaml{start=100, limit=200}", 4.0),
}


@pytest.mark.models
@pytest.mark.parametrize("name", REAL)
def test_real_networks_lose_no_more_than_onnxruntime_s_form(name):
    """Points: chance on so few images is 1.3 for ResNet-20 and 3 for MobileNet."""
    calibrate, evaluate, chance = REAL[name]
    found = {}
    for target in ("tensorrt", "onnxruntime-avx512-vnni"):
        result = effc.optimize(
            DATA / "models" / f"{name}.onnx", RECIPE, calibrate=str(DATA / "data" / calibrate),
            evaluate=str(DATA / "data" / evaluate), target_name=target, measure=False, force=True,
        )  # fmt: skip
        found[target] = result.history.final.accuracy.drop
        if target == "tensorrt":
            assert errors(result.model) == [] and quantised(result.model)
    assert found["tensorrt"] <= found["onnxruntime-avx512-vnni"] + chance and found["tensorrt"] <= 1 + chance


@pytest.mark.models
def test_a_detector_of_opset_9():
    """Signal to noise over both outputs beyond 35 dB, on images that did not serve to calibrate."""
    spec = {"source": str(DATA / "data" / "imagenet-500"), "scale": 128, "mean": [127 / 128] * 3, "resize": [240, 320]}
    result = effc.optimize(
        DATA / "models" / "ultraface-rfb-320.onnx", RECIPE, calibrate=spec | {"limit": 24},
        evaluate=spec | {"start": 24, "limit": 16, "metric": "sqnr"}, target_name="tensorrt", force=True,
    )  # fmt: skip
    assert errors(result.model) == [] and quantised(result.model)
    assert result.history.final.accuracy.points > 35
