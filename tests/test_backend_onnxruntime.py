"""The onnxruntime backend: sessions from memory and from files agree; what the runtime made of a model is told."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc import verify
from effc.backends.onnxruntime import OnnxRuntime, _split, newest_versions, session_options
from effc.capture import from_proto, load
from effc.errors import BadInput, EffcError
from effc.model import Model

RUNTIME = OnnxRuntime()
FLOAT = TensorProto.FLOAT


def proto(nodes, inputs, outputs, weights, opset=17, ir_version=8) -> onnx.ModelProto:
    """A model of float inputs and outputs (name -> shape); weights by name."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def convs(rng: np.random.Generator, activations=np.uint8, *, quantised=True, last="Relu", group=1) -> onnx.ModelProto:
    """Two 3x3 convolutions of 16 channels, `first` and `second`, in Q/DQ form.

    Args:
        activations: type of the codes.
        quantised: False leaves the output of `second` in float.
        last: the activation behind `second`, "" for none.
        group: of `second`, whose weights stay float if it is above 1.
    """
    nodes, weights = [], {}

    def pair(x: str, scale: float, zero: int) -> str:
        weights[f"{x}_s"], weights[f"{x}_z"] = np.float32(scale), activations(zero)
        nodes.append(helper.make_node("QuantizeLinear", [x, f"{x}_s", f"{x}_z"], [f"{x}_q"], name=f"Q_{x}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"{x}_q", f"{x}_s", f"{x}_z"], [f"{x}_d"], name=f"DQ_{x}"))
        return f"{x}_d"

    def conv(x: str, name: str, group: int = 1) -> str:
        w = rng.standard_normal((16, 16 // group, 3, 3)).astype(np.float32)
        if group == 1:
            scale = np.abs(w).max(axis=(1, 2, 3)) / 127
            weights[f"{name}_w"] = np.round(w / scale[:, None, None, None]).astype(np.int8)
            weights[f"{name}_ws"], weights[f"{name}_wz"] = scale, np.zeros(16, np.int8)
            inputs = [f"{name}_w", f"{name}_ws", f"{name}_wz"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_wd"], name=f"DQ_{name}_w", axis=0))
        else:
            # Channels of very different size: one scale for all of them cannot do
            weights[f"{name}_wd"] = w * np.logspace(-3, 0, 16, dtype=np.float32)[:, None, None, None]
        weights[f"{name}_b"] = rng.standard_normal(16).astype(np.float32) * 0.1
        inputs = [x, f"{name}_wd", f"{name}_b"]
        nodes.append(helper.make_node("Conv", inputs, [name], name=f"node_{name}", group=group, pads=[1] * 4))
        return name

    low = int(np.iinfo(activations).min)
    y = conv(pair("x", 4 / 127, low + 128), "first")
    nodes.append(helper.make_node("Relu", [y], ["r"], name="relu"))
    y = conv(pair("r", 0.15, low), "second", group)
    if last:
        nodes.append(helper.make_node(last, [y], ["a"], name="last"))
        y = "a"
    if quantised:
        y = pair(y, 1.2, low if last == "Relu" and activations is np.uint8 else low + 128)
    nodes.append(helper.make_node("MaxPool", [y], ["y"], name="pool", kernel_shape=[2, 2]))
    return proto(nodes, {"x": ["N", 16, 12, 12]}, {"y": ["N", 16, 11, 11]}, weights)


def inputs(rng: np.random.Generator, shape=(2, 16, 12, 12)) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal(shape).astype(np.float32)}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def difference(model: Model, feeds: dict[str, np.ndarray]) -> float:
    found = RUNTIME.deployment(model, feeds).difference
    assert found is not None
    return found


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("optimize", [True, False])
def test_memory_and_file_give_the_same_numbers(rng, tmp_path, optimize):
    net = convs(rng)
    onnx.save(net, tmp_path / "m.onnx")
    feeds = inputs(rng)
    inside = RUNTIME.session(from_proto(net), optimize=optimize).run(feeds)
    outside = RUNTIME.session(tmp_path / "m.onnx", optimize=optimize).run(feeds)
    assert same(inside, outside)  # bit for bit: it is the same graph


def test_in_memory_sessions_are_optimised_like_files(rng, tmp_path):
    net = convs(rng)
    onnx.save(net, tmp_path / "m.onnx")
    assert len(_split(from_proto(net))[1]) == 2  # both int8 weights are handed over apart, and still fuse
    assert RUNTIME.deployment(from_proto(net)) == RUNTIME.deployment(load(tmp_path / "m.onnx"))
    assert RUNTIME.deployment(from_proto(net)).fused["QLinearConv"] == 2


def test_mapped_weights_do_not_enter_the_message(rng, tmp_path):
    w = rng.standard_normal((300, 300)).astype(np.float32)
    net = proto([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 300]}, {"y": ["N", 300]}, {"w": w})
    onnx.save(net, tmp_path / "m.onnx", save_as_external_data=True, location="m.bin")
    message, weights = _split(load(tmp_path / "m.onnx"))
    assert message.ByteSize() < 1000
    x = rng.standard_normal((2, 300)).astype(np.float32)
    y = RUNTIME.session(load(tmp_path / "m.onnx")).run({"x": x})["y"]
    assert weights["w"].data_ptr()
    assert np.allclose(y, x @ w, atol=1e-3)


def test_weights_of_every_kind_reach_the_runtime(rng):
    """Types NumPy has not, a weight nobody reads, one read in a branch alone, one that is an output."""
    w = rng.standard_normal((40, 40)).astype(np.float32)
    brain = ir.Tensor(w.astype(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16, name="brain")
    info = helper.make_tensor_value_info
    then = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["t"])], "t", [], [info("t", FLOAT, [2, 40])])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "e", [], [info("e", FLOAT, [2, 40])])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
        helper.make_node("Cast", ["brain"], ["z"], to=FLOAT),
    ]
    net = proto(
        nodes, {"x": [2, 40]}, {"y": [2, 40], "z": [40, 40], "shown": [40, 40]}, {"w": w, "idle": w, "shown": w}
    )
    net.graph.initializer.append(ir.to_proto(brain))
    x = rng.standard_normal((2, 40)).astype(np.float32)
    result = RUNTIME.session(from_proto(net)).run({"x": x})
    assert np.allclose(result["y"], x @ w, atol=1e-4)
    assert np.array_equal(result["shown"], w)
    assert np.array_equal(result["z"], brain.numpy().astype(np.float32))
    assert difference(from_proto(net), {"x": x}) < 1e-5


def test_int4_weights_stay_in_the_message(rng):
    q = ir.Tensor(rng.integers(-8, 8, (64, 64)).astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="q")
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    net = proto(nodes, {"x": ["N", 64]}, {"y": ["N", 64]}, {"s": np.float32(0.5)}, opset=21, ir_version=10)
    net.graph.initializer.append(ir.to_proto(q))
    x = rng.standard_normal((3, 64)).astype(np.float32)
    y = RUNTIME.session(from_proto(net), optimize=False).run({"x": x})["y"]
    assert np.allclose(y, x @ (q.numpy().astype(np.float32) / 2), atol=1e-4)
    notes = RUNTIME.deployment(from_proto(net)).notes
    assert any("rounds activations to 8 bits" in note for note in notes)


def test_expose_returns_inner_tensors(rng):
    model = from_proto(convs(rng))
    feeds = inputs(rng)
    result = RUNTIME.session(model, expose=["r", "second", "y", "x_q", "x"]).run(feeds)
    assert list(result) == ["y", "r", "second", "x_q", "x"]
    assert result["r"].min() == 0
    assert result["x_q"].dtype == np.uint8
    assert np.array_equal(result["x"], feeds["x"])
    assert len(model.graph.outputs) == 1
    with pytest.raises(BadInput, match="no tensor is called 'nothing'"):
        RUNTIME.session(model, expose=["nothing"])


def test_errors_are_one_line_in_the_runtimes_words(rng, tmp_path):
    net = proto([helper.make_node("Relu", ["x"], ["y"], domain="no.such")], {"x": [1]}, {"y": [1]}, {})
    net.opset_import.append(helper.make_opsetid("no.such", 1))
    with pytest.raises(EffcError, match=r"does not load model: .*no\.such") as error:
        RUNTIME.session(from_proto(net))
    assert "\n" not in str(error.value)
    session = RUNTIME.session(from_proto(convs(rng)))
    with pytest.raises(EffcError, match="Got: 3 Expected: 16") as error:
        session.run({"x": np.zeros((1, 3, 12, 12), np.float32)})
    assert "\n" not in str(error.value)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(EffcError, match=r"does not load broken\.onnx"):
        RUNTIME.session(tmp_path / "broken.onnx")


@pytest.mark.parametrize(("given", "opset", "want"), [(3, 13, 7), (10, 13, 10), (8, 21, 10), (99, 17, None)])
def test_emit_sets_an_ir_version_the_runtime_reads(given, opset, want):
    net = proto([helper.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, {}, opset=opset)
    model = from_proto(net)
    model.ir.ir_version = given
    revision = model.revision
    RUNTIME.emit(model)
    assert model.ir.ir_version == (want or newest_versions()[1])
    assert (model.revision == revision) == (given == model.ir.ir_version)
    RUNTIME.session(model)


def test_emit_refuses_a_newer_opset():
    newest = newest_versions()[0]
    model = from_proto(proto([helper.make_node("Relu", ["x"], ["y"])], {"x": [1]}, {"y": [1]}, {}))
    model.ir.opset_imports[""] = newest + 1
    with pytest.raises(BadInput, match=f"is of opset {newest + 1}; onnxruntime .* runs up to {newest}"):
        RUNTIME.emit(model)


def test_a_quantised_network_runs_in_integers(rng):
    found = RUNTIME.deployment(from_proto(convs(rng)))
    assert found.fused["QLinearConv"] == 2
    assert not found.fell_back
    assert not found.notes
    assert found.difference is None
    assert (
        difference(from_proto(convs(rng)), inputs(rng)) < 0.02
    )  # a code or so of 255: integers are rounded once, floats twice


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantised": False}, "its output is not quantised, by MaxPool 'pool'"),
        ({"last": "HardSwish"}, "HardSwish before QuantizeLinear is not absorbed"),
        ({"activations": np.int8}, "Relu is not absorbed by QuantizeLinear to int8 unless the zero point is -128"),
    ],
)
def test_what_fell_back_is_named_with_its_reason(rng, options, reason):
    found = RUNTIME.deployment(from_proto(convs(rng, **options)))
    assert found.fused["QLinearConv"] == 1
    assert list(found.fell_back) == ["node_second"]
    assert reason in found.fell_back["node_second"]


def test_a_float_network_has_nothing_to_fall_back_from(rng):
    weights = {"w": rng.standard_normal((16, 16, 3, 3)).astype(np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), helper.make_node("Relu", ["c"], ["y"])]
    net = proto(nodes, {"x": ["N", 16, 12, 12]}, {"y": ["N", 16, 12, 12]}, weights)
    found = RUNTIME.deployment(from_proto(net))
    assert not found.fell_back
    assert not found.notes
    assert difference(from_proto(net), inputs(rng)) < 1e-5
    assert sum(n for kind, n in found.fused.items() if "Conv" in kind and "Relu" in kind) == 1


def test_weights_that_the_runtime_quantises_by_itself_are_revealed(rng):
    """A float depthwise convolution between Q/DQ: its weights get one scale for all channels, and the result shows."""
    net = from_proto(convs(rng, group=16))
    found = RUNTIME.deployment(net)
    assert any("float weights of node_second by itself" in note for note in found.notes)
    assert difference(net, inputs(rng)) > 2 * difference(from_proto(convs(rng)), inputs(rng))


def test_weights_dequantised_at_every_run_are_told(rng):
    w = rng.integers(-127, 127, (16, 16, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"]),
        helper.make_node("Conv", ["x", "wd"], ["y"], name="conv"),
    ]
    weights = {"w": w, "s": np.float32(0.01), "z": np.int8(0)}
    net = proto(nodes, {"x": ["N", 16, 12, 12]}, {"y": ["N", 16, 10, 10]}, weights)
    assert RUNTIME.deployment(from_proto(net)).notes == ("the weights of conv are dequantised at every run",)


@pytest.mark.models
def test_real_models_from_memory_and_from_files_agree():
    for path in sorted(Path(os.environ["EFFC_DATA"], "models").glob("*.onnx")):
        model: Model = load(path)
        shapes = {i.name: [d if isinstance(d, int) else 2 for d in i.shape or ()] for i in model.inputs}
        feeds = {n: np.random.default_rng(0).standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        a, b = RUNTIME.session(model).run(feeds), RUNTIME.session(path).run(feeds)
        # Files with weights among their inputs are optimised less, so the numbers may differ by rounding.
        assert verify.difference(a, b) < 1e-4, path.name
        assert difference(model, feeds) < 1e-4, path.name


@pytest.mark.parametrize("threads", [1, 2])
def test_workers_of_a_session_do_not_spin_between_inferences(threads):
    """Where two sessions take turns, those of one would hold the cores that the other's run on."""
    options = session_options(threads)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == threads
