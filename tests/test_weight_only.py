"""effc.passes.weight_only: which matrices become codes, what the runtime makes of them, and how near they stay."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

import effc
import effc.predict
from effc import registry
from effc.capture import from_proto
from effc.contract import Context, Proposal, Skipped
from effc.cost import cost
from effc.data import open_data
from effc.errors import BadInput
from effc.passes._coded_forms import OPSETS
from effc.passes.weight_only import WeightOnly
from effc.predict import MEASURED, Estimate
from effc.registry import backend
from effc.target import find
from effc.verify import verify
from tests.networks import Net, distance, run

RUNTIME = backend("onnxruntime")
TARGET = find("onnxruntime-avx2")
WORDS = 2000


def sentences() -> onnx.ModelProto:
    """A table, dense layers of each kind behind it, and scores by the table itself, turned."""
    net = Net("weight-only sentences")
    ids = net.input("ids", ["N", "T"], np.int64)
    table = net.weight("table", net.random(WORDS, 64, scale=0.5))
    x = net.node("Gather", table, ids, name="look", axis=0)
    y = net.node("MatMul", x, net.weight("up.weight", net.random(64, 96, scale=0.2)), name="up")
    y = net.relu(net.node("Add", y, net.weight("up.bias", net.random(96, scale=0.2)), name="up_add"))
    y = net.node("MatMul", y, net.weight("down.weight", net.random(96, 64, scale=0.15)), name="down")
    x = net.node("Add", x, y, name="sum")
    x = net.node("ReduceMean", x, name="mean", axes=[1], keepdims=0)
    x = net.relu(net.linear(x, 64, 48, name="fc"))
    net.output(net.linear(x, 48, 6, name="head"), ["N", 6])
    return net.model()


def tied() -> onnx.ModelProto:
    """A table whose rows also score words, through a Transpose."""
    net = Net("weight-only tied")
    ids = net.input("ids", ["N", "T"], np.int64)
    table = net.weight("table", net.random(WORDS, 64, scale=0.5))
    x = net.node("Gather", table, ids, name="look", axis=0)
    x = net.relu(net.node("MatMul", x, net.weight("up.weight", net.random(64, 64, scale=0.2)), name="up"))
    turned = net.node("Transpose", table, name="turned", perm=[1, 0])
    net.output(net.node("MatMul", x, turned, name="score"), ["N", "T", WORDS])
    return net.model()


def words(seed: int = 0, count: int = 4) -> dict[str, np.ndarray]:
    """Frequent words come often, as in texts."""
    rng = np.random.default_rng(seed)
    return {"ids": np.minimum(rng.zipf(1.3, (count, 12)), WORDS - 1).astype(np.int64)}


class Coded:
    """A network put through the pass, as the manager does it."""

    def __init__(self, proto: onnx.ModelProto, calibrated: bool = True, target=TARGET, **options) -> None:
        step = WeightOnly(**options)
        self.proto, self.before = proto, from_proto(proto)
        data = None
        if calibrated:
            data = open_data({"source": lambda: (words(100 + s, 8) for s in range(8))}).for_model(self.before)
        self.context = Context(self.before, target, RUNTIME, calibration=data, dims={"T": 12})
        found = list(step.propose(self.before, self.context))
        self.proposals = [f for f in found if isinstance(f, Proposal)]
        self.sites = sorted(p.site.removeprefix("node_") for p in self.proposals)
        self.skipped = {f.site.removeprefix("node_"): f.reason for f in found if isinstance(f, Skipped)}
        self.model = self.before.clone()
        step.rewrite(self.model, self.proposals, self.context)
        effc.edit.remove_unused(self.model)
        verify(self.model, self.before)
        self.after = self.model.proto()
        onnx.checker.check_model(self.after)

    def error(self, seed: int = 5) -> float:
        """Relative squared error of the outputs on words that were not seen."""
        inputs = words(seed, 64)
        a, b = (next(iter(run(m, inputs).values())).astype(float) for m in (self.proto, self.after))
        return float(np.sum((a - b) ** 2) / np.sum(a**2))

    def types(self) -> Counter[str]:
        return Counter(node.op_type for node in self.model.graph)


def test_what_is_coded_and_what_is_left():
    found = Coded(sentences())
    assert found.sites == ["down", "fc", "head", "look", "up"] and not found.skipped
    types = found.types()
    assert (types["MatMulNBits"], types["GatherBlockQuantized"], types["Gather"], types["MatMul"]) == (4, 1, 0, 0)
    assert "up_add" not in {n.name.removeprefix("node_") for n in found.model.graph}  # part of the product
    assert found.model.ir.opset_imports["com.microsoft"] == 1
    assert not {"table", "up.weight", "fc.weight"} & set(found.model.graph.initializers)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "allowed"), [(8, 2e-4), (4, 1e-2), (2, 0.4)])
def test_outputs_stay_near(bits, allowed, symmetric):
    assert 0 < Coded(sentences(), bits=bits, symmetric=symmetric).error() <= allowed


def test_what_was_found_to_be_better_is():
    """Data over none, feedback over the nearest, fitted grids over covering ones, small blocks over large ones."""
    usual = Coded(sentences()).error()
    assert usual < 0.8 * Coded(sentences(), rounding="nearest").error()
    assert usual < 0.8 * Coded(sentences(), calibrated=False).error()
    assert usual < Coded(sentences(), block=64).error()
    plain = {"calibrated": False, "bits": 2}
    assert Coded(sentences(), **plain).error() < 0.9 * Coded(sentences(), **plain, scales="max").error()


def test_products_in_float_are_what_the_codes_say():
    """Against the same graph with decoded weights, to 1e-5; with 8-bit activations it is more than that."""
    for activations, low, high in (("float", 0, 1e-5), ("int8", 1e-4, 3e-2)):
        found = Coded(sentences(), activations=activations)
        session = RUNTIME.session(found.model)
        inputs = words(3)
        exact = RUNTIME.session(Coded(sentences(), activations="float").model, optimize=False).run(inputs)
        assert low <= distance(exact, session.run(inputs)) <= high
    levels = {n.attributes["accuracy_level"].value for n in found.model.graph if n.op_type == "MatMulNBits"}
    assert levels == {4}


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_nothing_is_turned_back_into_floats_when_it_is_loaded(tmp_path, bits):
    """The optimised graph has the same operators and is no larger than the file, to a tenth."""
    for form in ("matmulnbits", "dequantize"):
        found = Coded(sentences(), bits=bits, form=form)
        assert found.model.opset >= (OPSETS[bits] if form == "dequantize" else 1)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
        data = found.after.SerializeToString()
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        assert (tmp_path / "optimised.onnx").stat().st_size <= 1.1 * len(data) + 8192
        kinds = Counter(n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node)
        if form == "matmulnbits":
            assert (kinds["MatMulNBits"], kinds["GatherBlockQuantized"]) == (4, 1)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_plain_form_says_the_same(bits):
    """DequantizeLinear in blocks, run without the runtime's fusions: equal to float products of codes, to 1e-5."""
    plain, own = (Coded(sentences(), bits=bits, form=f) for f in ("dequantize", "matmulnbits"))
    inputs = words(3)
    assert {n.domain for n in plain.model.graph} == {""}
    a, b = (RUNTIME.session(m.model, optimize=False).run(inputs) for m in (own, plain))
    assert distance(a, b) <= 1e-5


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_table_that_also_scores_is_stored_once(bits):
    found = Coded(tied(), bits=bits)
    assert found.sites == ["score", "up"] and found.proposals[0].nodes == ("node_score", "node_look")
    assert len([name for name in found.model.graph.initializers if name.startswith("table")]) == 4  # a shape besides
    inputs = words(1)
    exact, session = (RUNTIME.session(found.model, optimize=o).run(inputs) for o in (False, True))
    assert distance(exact, session) <= 2e-2
    codes = sum(v.const_value.nbytes for n, v in found.model.graph.initializers.items() if n.startswith("table"))
    assert codes <= WORDS * 64 * bits / 8 + WORDS * 2 * 5 + 64
    plain = Coded(tied(), form="dequantize")
    assert set(plain.skipped) == {"score", "look"} and "would store it twice" in plain.skipped["look"]


def fake_target(times: dict[str, float], monkeypatch):
    """A target that has measured these kinds of kernels, and their microseconds."""

    def fake(kernels, target, threads=1) -> list[Estimate]:
        return [Estimate(1e-6 * times.get(k.key, 1.0), 0.1, MEASURED) for k in kernels]

    monkeypatch.setattr(effc.predict, "estimate", fake)
    return replace(TARGET, kernels={1: dict.fromkeys(times)}, local=True)


def test_seconds_are_told_where_both_kernels_were_measured_and_differ(monkeypatch):
    def told(times: dict[str, float], **options) -> set[tuple[float, float]]:
        target = fake_target(times, monkeypatch)
        found = Coded(sentences(), target=target, **options).proposals
        pairs = {(p.site, round(1e6 * p.before.seconds, 3), round(1e6 * p.after.seconds, 3)) for p in found}
        return {pair[1:] for pair in pairs if pair[0] == "node_down"}

    assert told({"gemm": 9.0, "nbits": 4.0}) == {(9.0, 4.0)}
    assert told({"gemm": 4.0, "nbits": 9.0}) == {(4.0, 9.0)}
    assert told({"gemm": 4.0, "nbits": 4.5}) == {(0.0, 0.0)}  # too close
    assert told({"gemm": 4.0, "nbits": 9.0}, bits=2) == {(0.0, 0.0)}  # not measured
    assert told({"gemm": 4.0}) == {(0.0, 0.0)}


def test_what_is_predicted_to_be_slower_stays_in_float_unless_bytes_are_asked_for(monkeypatch):
    target = fake_target({"gemm": 4.0, "nbits": 9.0, "gemm-row": 4.0, "nbits-row": 9.0}, monkeypatch)
    monkeypatch.setattr("effc.target.find", lambda name, **settings: target)
    kinds = [Counter(n.op_type for n in put("weight-only", goal=g).model.graph) for g in ("latency", "size")]
    assert [k["MatMulNBits"] for k in kinds] == [0, 4]


def test_refusals():
    net = Net("weight-only refusals")
    x = net.input("x", ["N", 64])
    ids = net.input("ids", ["N"], np.int64)
    w = net.weight("shared", net.random(64, 64, scale=0.1))
    net.output(net.node("MatMul", x, w, name="a"), ["N", 64])
    net.output(net.node("Mul", w, net.weight("two", np.float32(2)), name="b"), [64, 64])
    net.output(net.node("Gemm", x, net.weight("g", net.random(64, 40)), name="scaled", alpha=0.5), ["N", 40])
    net.output(net.node("Gemm", x, net.weight("k", net.random(64, 40)), x, name="added"), ["N", 40])
    net.output(net.node("Gather", net.weight("small", net.random(9, 8)), ids, name="tiny"), ["N", 8])
    net.output(net.node("MatMul", x, net.weight("thin", net.random(64, 40)), name="kept"), ["N", 40])
    net.output(net.node("MatMul", x, net.node("Transpose", x, name="t"), name="live"), ["N", "N"])
    one = net.node("MatMul", net.weight("c", net.random(2, 2)), net.weight("d", net.random(2, 2)), name="constant")
    net.output(one, [2, 2])
    net.output(net.node("MatMul", net.node("Slice", x, *bounds(net), name="cut"), net.weight("e", net.random(1, 64)),
                        name="no_gain"), ["N", 64])  # fmt: skip
    proto = net.model()
    model = from_proto(proto)
    context = Context(model, TARGET, RUNTIME)
    step = WeightOnly(keep_float=("node_ke*",))
    found = {f.site.removeprefix("node_"): f for f in step.propose(model, context)}
    reasons = {site: f.reason for site, f in found.items() if isinstance(f, Skipped)}
    assert reasons["a"] == "its weight is shared with 'node_b', which keeps it in float"
    assert reasons["b"] == "Mul 'node_b' reads its weight too"
    assert reasons["scaled"] == "it scales its product by alpha; 1 is put into blocks"
    assert reasons["added"] == "its bias is no constant"
    assert reasons["tiny"] == "its table takes 288 bytes: decoding its rows would cost more than it saves"
    assert reasons["kept"] == "keep_float names it"
    assert reasons["live"] == "its right operand is no constant"
    assert reasons["constant"] == "its input is a constant; simplify folds it"
    assert reasons["no_gain"] == "it takes 256 bytes, and in blocks of 4 bits with their scales 832"
    assert set(found) == set(reasons)


def bounds(net: Net) -> list[str]:
    return [net.weight(n, np.array([v])) for n, v in (("start", 0), ("end", 1), ("axis", 1))]


@pytest.mark.parametrize(
    ("options", "calibrated", "said"),
    [
        ({"rounding": "gptq"}, False, "rounding=gptq needs calibration data"),
        ({"form": "dequantize", "activations": "float"}, True, "lies with the session"),
    ],
)
def test_bad_options(options, calibrated, said):
    with pytest.raises(BadInput, match=said):
        Coded(sentences(), calibrated, **options)


def test_tensorrt_takes_plain_symmetric_codes():
    target = find("tensorrt-a100")
    with pytest.raises(BadInput, match="leave symmetric=false out"):
        Coded(sentences(), target=target, symmetric=False)
    with pytest.raises(BadInput, match="takes blocks of 64 or 128, not 32"):
        Coded(sentences(), target=target, block=32)
    with pytest.raises(BadInput, match="takes form=dequantize"):
        Coded(sentences(), target=target, form="matmulnbits")
    found = Coded(sentences(), target=target)
    assert found.types()["DequantizeLinear"] == 4 and found.skipped["look"] == "tensorrt-a100 looks up floats"
    assert all(len(n.inputs) == 2 for n in found.model.graph if n.op_type == "DequantizeLinear")


def test_costs_are_what_comes_out():
    found = Coded(sentences())
    before, after = cost(found.before, 2, {"T": 12}), cost(found.model, 2, {"T": 12})
    saved = sum(p.before.weight_bytes - p.after.weight_bytes for p in found.proposals)
    assert before.total.weight_bytes - after.total.weight_bytes == saved > 0.8 * before.total.weight_bytes
    assert after.total.macs == before.total.macs > 0 and not after.unknown
    assert after.nodes["node_fc_1"].parameters == 64 * 48 + 48
    assert after.nodes["node_look_1"].parameters == WORDS * 64
    # Without the float table's rows: codes of 24 rows, their scales and zero points.
    shapes = found.model.shapes(2, {"T": 12})
    assert shapes[found.model.node("node_look_1").outputs[0].name] == (2, 12, 64)
    assert shapes[found.model.node("node_up_1").outputs[0].name] == (2, 12, 96)


def test_damages_put_widths_in_order():
    one = Coded(sentences(), size=0.2, bits=2).proposals
    by_site = {site: [p for p in one if p.site == site] for site in {p.site for p in one}}
    for alternatives in by_site.values():
        assert [p.setting["bits"] for p in alternatives] == [2, 4, 8]
        damages = [p.damage for p in alternatives]
        assert damages[0] > damages[1] > damages[2] > 0
        sizes = [p.after.weight_bytes for p in alternatives]
        assert sizes[0] < sizes[1] < sizes[2]


def put(text: str, calibrated: bool = True, **options) -> effc.Result:
    data = {"source": lambda: (words(100 + s, 8) for s in range(8))} if calibrated else None
    settings = {"calibrate": data, "target_name": TARGET.name, "measure": False, "dims": {"T": 12}} | options
    return effc.optimize(sentences(), text, **settings)


@pytest.mark.parametrize("size", [0.2, 0.25])
def test_a_size_mixes_widths(size):
    result = put(f"weight-only{{size={size}, bits=2}}")
    record = result.history.passes[0]
    assert len({setting["bits"] for _, setting in record.chosen}) > 1
    assert record.cost_after.weight_bytes <= size * record.cost_before.weight_bytes
    assert result.history.stages[0].goals == ("size",)


def test_a_limit_on_accuracy_is_held_by_giving_matrices_up():
    held = {"source": lambda: (words(500 + s, 8) for s in range(24))}
    free = put("weight-only{bits=2, embeddings=false}", goal="size", evaluate=held)
    lost = free.history.stages[0].accuracy.drop
    assert lost > 2
    result = put(f"weight-only{{bits=2, embeddings=false, max_drop={0.85 * lost:g}}}", goal="size", evaluate=held)
    stage = result.history.stages[0]
    assert stage.status == "kept" and stage.accuracy.drop <= 0.85 * lost
    assert 0 < len(stage.passes[0].chosen) < len(free.history.passes[0].chosen)


def test_without_data_the_report_says_what_is_not_known():
    record = put("weight-only", calibrated=False, goal="size").history.passes[0]
    assert any("nothing about accuracy is known" in note for note in record.notes)
    assert any("rounds the activations" in note for note in record.notes)


def test_the_file_is_read_back(tmp_path):
    result = put("weight-only", goal="size")
    path = effc.save(result.model, tmp_path / "m.onnx")
    again = effc.load(path)
    assert not again.not_analysed()
    assert cost(again, 1, {"T": 12}).total == cost(result.model, 1, {"T": 12}).total
    inputs = words(9)
    assert distance(run(result.model.proto(), inputs), run(onnx.load(path), inputs)) == 0
    twice = effc.optimize(path, "weight-only", measure=False, goal="size", target_name=TARGET.name, dims={"T": 12})
    assert twice.history.passes[0].status == "unchanged"


def test_the_trainable_view_multiplies_the_same_codes():
    """Against the graph run plainly, to 1e-5; biases are trained, codes stay, and what is trained comes back."""
    pytest.importorskip("torch")
    import torch

    for proto, count in ((sentences(), 3), (tied(), 0)):
        found = Coded(proto)
        trainer = registry.trainer()
        view = trainer.view(found.model)
        inputs = words(2)
        (wanted,) = RUNTIME.session(found.model, optimize=False).run(inputs).values()
        made = view(torch.from_numpy(inputs["ids"]))
        assert np.abs(made.detach().numpy() - wanted).max() <= 1e-5 * np.abs(wanted).max()
        assert len(list(view.parameters())) == count
        made.square().sum().backward() if count else None
        if count:
            with torch.no_grad():
                for parameter in view.parameters():
                    assert parameter.grad is not None and parameter.grad.abs().max() > 0
                    parameter += 0.5
            trainer.write_back(view, found.model)
            (then,) = RUNTIME.session(found.model, optimize=False).run(inputs).values()
            again = view(torch.from_numpy(inputs["ids"])).detach().numpy()
            assert np.abs(again - then).max() <= 1e-5 * np.abs(then).max() and np.abs(then - wanted).max() > 0.1


def test_padding_does_not_count():
    """Rows that an input called a mask leaves out are not looked at: the codes are those of the words alone."""
    net = Net("weight-only mask")
    ids, mask = net.input("ids", ["N", "T"], np.int64), net.input("attention_mask", ["N", "T"], np.int64)
    x = net.node("Gather", net.weight("table", net.random(WORDS, 64)), ids, name="look", axis=0)
    kept = net.node("Cast", net.node("Unsqueeze", mask, net.weight("ax", np.array([2])), name="un"), name="c", to=1)
    x = net.node("MatMul", x, net.weight("up.weight", net.random(64, 64, scale=0.2)), name="up")
    net.output(net.node("Mul", x, kept, name="y"), ["N", "T", 64])
    model = from_proto(net.model())

    def codes(padding: int) -> np.ndarray:
        def made():
            for seed in range(8):
                real = words(seed, 8)["ids"]
                yield {
                    "ids": np.pad(real, ((0, 0), (0, padding)), constant_values=7),
                    "attention_mask": np.pad(np.ones_like(real), ((0, 0), (0, padding))),
                }

        context = Context(model, TARGET, RUNTIME, calibration=open_data({"source": made}).for_model(model))
        after, step = model.clone(), WeightOnly(embeddings=False)
        step.rewrite(after, [p for p in step.propose(model, context) if isinstance(p, Proposal)], context)
        return after.graph.initializers["up.weight_codes"].const_value.numpy()

    assert np.array_equal(codes(0), codes(20))


def test_the_same_twice():
    a, b = (Coded(sentences()).after.SerializeToString(deterministic=True) for _ in range(2))
    assert a == b


def test_weights_that_were_not_given_stay_untouched():
    proto = sentences()
    found = Coded(proto)
    for tensor in proto.graph.initializer:
        array = found.before.constant(found.before.value(tensor.name))
        np.testing.assert_array_equal(array, onnx.numpy_helper.to_array(tensor))


def test_a_layer_that_two_nodes_read_is_stored_once():
    net = Net("weight-only twice")
    x = net.input("x", ["N", 64])
    w = net.weight("w", net.random(64, 64, scale=0.2))
    x = net.relu(net.node("MatMul", x, w, name="first"))
    net.output(net.node("MatMul", x, w, name="second"), ["N", 64])
    proto = net.model()
    result = effc.optimize(proto, "weight-only", measure=False, goal="size", target_name=TARGET.name)
    products = [n for n in result.model.graph if n.op_type == "MatMulNBits"]
    assert len(products) == 2 and products[0].inputs[1] is products[1].inputs[1]
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
    assert distance(run(proto, inputs), run(result.model.proto(), inputs)) <= 0.2
