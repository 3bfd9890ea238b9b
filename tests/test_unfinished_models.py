"""What passes need of a half-rewritten model: statistics beside the original, true shapes, branches of its nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from effc import edit
from effc.capture import from_proto
from effc.contract import Context
from effc.data import open_data
from effc.errors import BadInput, InvalidModel, PassFailed
from effc.model import Model, shape_tuple
from effc.registry import backend
from effc.statistics import Mean, Request
from effc.target import find
from effc.verify import verify
from tests.networks import Net, distance, feeds, run


@dataclass(frozen=True)
class Drift(Request):
    """Sum of |now - before| and the number of samples."""

    def start(self) -> _Drift:
        return _Drift()


class _Drift:
    def __init__(self) -> None:
        self.total, self.samples = 0.0, 0

    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        self.total += float(np.abs(values - beside[0]).sum())
        self.samples += len(values)

    def result(self) -> tuple[float, int]:
        return self.total, self.samples


def chain() -> onnx.ModelProto:
    """Conv 3 -> 8, ReLU, Conv 8 -> 4, ReLU, head; every inner shape is recorded."""
    net = Net("chain")
    x = net.input("input", ["N", 3, 8, 8])
    x = net.relu(net.conv(x, 3, 8, 3, name="conv1", pads=[1] * 4, bias=True))
    x = net.relu(net.conv(x, 8, 4, 3, name="conv2", pads=[1] * 4, bias=True))
    net.head(x, 4)
    return onnx.shape_inference.infer_shapes(net.model())


@pytest.fixture
def context() -> Context:
    samples = np.concatenate([feeds(chain(), seed=s)["input"] for s in range(4)])
    model = from_proto(chain())
    data = open_data({"source": lambda: iter([{"input": samples}])}).for_model(model)
    return Context(model, find("onnxruntime-avx2"), backend("onnxruntime"), calibration=data)


def recorded(model: Model) -> dict[str, tuple | None]:
    return {v.name: shape_tuple(v.shape) for node in model.graph for v in node.outputs}


def prune(model: Model, kept: int) -> None:
    """The first channels of conv1 and what conv2 reads of them."""
    for name in ("conv1.weight", "conv1.bias"):
        edit.set_initializer(model, model.value(name), model.constant(model.value(name))[:kept])
    weight = model.value("conv2.weight")
    edit.set_initializer(model, weight, model.constant(weight)[:, :kept])


def test_a_request_sees_the_same_samples_in_the_original(context):
    model = context.original.clone()
    weight = model.value("conv2.bias")
    edit.set_initializer(model, weight, model.constant(weight) + np.float32(0.5))
    wanted = [Drift(name, beside=name) for name in ("relu1", "conv2")]
    still, moved = (context.statistics(model, wanted)[r] for r in wanted)
    assert still == (0.0, 8)
    assert moved == (pytest.approx(0.5 * 8 * 4 * 8 * 8, rel=1e-5), 8)


def test_one_run_of_the_original_serves_both_sides(context, monkeypatch):
    sessions = []
    session = context.backend.session
    monkeypatch.setattr(type(context.backend), "session", lambda self, *a, **k: sessions.append(a) or session(*a, **k))
    found = context.statistics(context.original, [Drift("relu1", beside="relu1"), Mean("input")])
    assert found[Drift("relu1", beside="relu1")] == (0.0, 8)
    assert len(sessions) == 1


def test_statistics_run_no_further_than_they_need(context):
    model = context.original.clone()
    edit.set_attributes(model, model.node("node_fc"), transB=0)  # does not run any more
    assert context.statistics(model, [Mean("relu1")])[Mean("relu1")].shape == (8, 8, 8)


def test_cutting_leaves_inputs_and_drops_the_rest():
    model = from_proto(chain())
    revision, part = model.revision, edit.cut(model, ["relu1"])
    assert [n.op_type for n in part.graph] == ["Conv", "Relu"]
    assert set(part.graph.initializers) == {"conv1.weight", "conv1.bias"}
    assert [v.name for v in part.graph.inputs] == ["input"] and [v.name for v in part.graph.outputs] == ["relu1"]
    assert model.revision == revision and part.revision != revision
    with pytest.raises(BadInput, match="no tensor is called 'nowhere'"):
        edit.cut(model, ["nowhere"])


def test_a_weight_of_another_size_voids_the_shapes_recorded_behind_it():
    model = from_proto(chain())
    assert recorded(model)["conv1"] == ("N", 8, 8, 8)
    prune(model, 6)
    assert recorded(model)["conv1"] is None and recorded(model)["relu1"] is None
    assert recorded(model)["fc"] == ("N", 5)  # a promise to the caller
    verify(model, from_proto(chain()))
    assert model.shapes()["relu1"] == ("N", 6, 8, 8)
    run(model.proto(), feeds(chain()))


def test_a_weight_of_the_same_size_leaves_them():
    model = from_proto(chain())
    weight = model.value("conv1.weight")
    edit.set_initializer(model, weight, 2 * model.constant(weight))
    assert recorded(model)["conv1"] == ("N", 8, 8, 8)


def test_stale_shapes_of_a_pass_are_refused_and_those_of_a_file_are_not():
    model, before = from_proto(chain()), from_proto(chain())
    edit.set_attributes(model, model.node("node_conv1"), strides=[2, 2])
    with pytest.raises(InvalidModel, match=r"'conv1' is recorded as \('N', 8, 8, 8\) and is \('N', 8, 4, 4\)"):
        verify(model, before)
    verify(model, model.clone())
    edit.forget_shapes(model, model.node("node_conv1"))
    verify(model, before)


def exits(model: Model) -> ir.Node:
    """Where the mean input is above 0.1, the output is that of relu1's channels alone."""
    relu = model.node("node_relu1")
    x = relu.outputs[0]
    new = []

    def add(op: str, inputs: list, **attributes: object) -> ir.Value:
        new.append(edit.make_node(model, op, inputs, attributes, name=f"exit_{op}"))
        return new[-1].outputs[0]

    flat = add("Flatten", [add("GlobalAveragePool", [x])])
    head = edit.add_initializer(model, "exit.weight", np.linspace(-1, 1, 40, dtype=np.float32).reshape(8, 5))
    early = add("MatMul", [flat, head])
    mean = add("ReduceMean", [model.value("input")], keepdims=0)
    go = add("Greater", [mean, edit.add_initializer(model, "exit.threshold", np.float32(0.1))])
    edit.insert_after(model, relu, new)
    behind = [n for n in model.graph if n.name in ("node_conv2", "node_relu3", "node_pool", "node_flat", "node_fc")]
    return edit.make_conditional(model, behind, go, {model.value("fc"): early}, name="exit")


def test_nodes_become_the_branch_that_runs_only_when_needed():
    model, before = from_proto(chain()), from_proto(chain())
    choice = exits(model)
    edit.remove_unused(model)
    verify(model, before)
    onnx.checker.check_model(model.proto(), full_check=True)
    assert [n.op_type for n in model.graph][-1] == "If" and len(model.graph) == 8
    assert edit.origin_of(choice) == ("node_conv2", "node_relu3", "node_pool", "node_flat", "node_fc")
    assert [len(g.initializers) for g in model.ir.graphs()] == [8, 0, 0]  # captured, not copied
    inputs = feeds(chain())
    low, high = ({"input": inputs["input"] - 1}, {"input": inputs["input"] + 1})
    assert distance(run(before.proto(), low), run(model.proto(), low)) == 0
    assert distance(run(before.proto(), high), run(model.proto(), high)) > 0.1


def test_exits_nest_from_the_last_to_the_first():
    model, before = from_proto(chain()), from_proto(chain())
    inner = exits(model)
    go, early = inner.inputs[0], model.node("exit_MatMul").outputs[0]
    outer = edit.make_conditional(model, [inner], go, {inner.outputs[0]: early}, name="outer")
    edit.remove_unused(model)
    verify(model, before)
    assert outer.attributes["else_branch"].as_graph()[-1] is inner
    inputs = {"input": feeds(chain())["input"] - 1}
    assert distance(run(before.proto(), inputs), run(model.proto(), inputs)) == 0


def test_what_is_still_read_needs_something_in_its_place():
    model = from_proto(chain())
    revision, before = model.revision, model.proto().SerializeToString()
    with pytest.raises(PassFailed, match="'conv2' is still read, and nothing stands for it where the condition holds"):
        edit.make_conditional(model, [model.node("node_conv2")], model.value("input"), {}, name="exit")
    assert model.revision == revision and model.proto().SerializeToString() == before


@pytest.mark.parametrize("late", ["fc", "nowhere"])
def test_a_branch_reads_only_what_was_made_before_its_node(late):
    model = from_proto(chain())
    body = exits(model).attributes["else_branch"].as_graph()
    value = model.graph.outputs[0] if late == "fc" else ir.Value(name="nowhere")
    body[0].replace_input_with(0, value)
    with pytest.raises(InvalidModel, match=f"Conv 'node_conv2' reads '{late}', which nothing before it makes"):
        verify(model)
