"""effc.graphsurgeon: nothing is lost on the way there and back, rewrites arrive, and what cannot be kept is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from pydantic import Field

import effc
from effc import edit, registry
from effc.capture import from_proto, load
from effc.contract import Skipped
from effc.errors import BadInput, PassFailed
from effc.graphsurgeon import graphsurgeon_pass, surgery
from effc.model import Model
from effc.recipe import build, describe, format_calls, options, parse
from effc.verify import verify
from tests import networks
from tests.networks import NETWORKS, Net, distance, feeds, run


@graphsurgeon_pass(name="relu6", exact=True, tolerance=0.0)
def relu6(
    graph: gs.Graph,
    *,
    bound: Annotated[float, Field(gt=0, description="upper bound to look for")] = 6.0,
    keep: tuple[str, ...] = (),
) -> list[Skipped]:
    """Min(Relu(x), 6) -> Clip(x, 0, 6)"""
    skipped = []
    for node in [n for n in graph.nodes if n.op == "Min" and n.i().op == "Relu"]:
        if node.name in keep:
            skipped.append(Skipped(node.name, "keep names it"))
        elif float(node.inputs[1].values) == bound:
            x, y = node.i().inputs[0], node.outputs[0]
            bounds = [gs.Constant(f"{node.name}_{i}", np.array(v, np.float32)) for i, v in enumerate((0, bound))]
            node.outputs.clear()
            graph.nodes.append(gs.Node("Clip", inputs=[x, *bounds], outputs=[y]))
    graph.cleanup().toposort()
    return skipped


def relu6_net() -> onnx.ModelProto:
    net = Net("relu6")
    x = net.input("input", ["N", 3, 8, 8])
    six, five = net.weight("six", np.float32(6)), net.weight("five", np.float32(5))
    for index, bound in enumerate((six, five)):
        x = net.conv(x, 3, 3, 3, name=f"conv{index}", pads=[1] * 4)
        x = net.node("Min", net.relu(x), bound, name=f"min{index}")
    net.output(x, ["N", 3, 8, 8])
    return net.model()


def bytes_of(model: Model) -> bytes:
    return model.proto().SerializeToString(deterministic=True)


def there_and_back(model: Model, change: Callable[[gs.Graph], object] = lambda graph: None) -> bool:
    """Whether the model is now, byte for byte, what it was."""
    before = bytes_of(model)
    with surgery(model) as graph:
        change(graph)
    verify(model)
    return bytes_of(model) == before


def look_at_everything(graph: gs.Graph) -> None:
    for g in (graph, *graph.subgraphs(recursive=True)):
        for node in g.nodes:
            for constant in (*node.inputs, *node.attrs.values()):
                if isinstance(constant, gs.Constant):
                    assert constant.values is not None


def add_and_remove(model: Model) -> None:
    """Forces the whole way back: a change, and the change undone."""
    with surgery(model) as graph:
        graph.nodes.append(gs.Node("Identity", inputs=[graph.outputs[0]], outputs=[gs.Variable("passing")]))
    assert model.graph[-1].outputs[0].name == "passing"
    with surgery(model) as graph:
        graph.nodes.pop().outputs.clear()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_function_that_does_nothing_leaves_the_model_alone(name):
    model = from_proto(NETWORKS[name]())
    revision = model.revision
    assert there_and_back(model, look_at_everything)
    assert model.revision == revision


@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_way_back_gives_the_same_bytes(name):
    model = from_proto(NETWORKS[name]())
    before = bytes_of(model)
    add_and_remove(model)
    assert bytes_of(model) == before


@pytest.mark.parametrize(
    "kind", ["INT4", "UINT4", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "STRING"]
)
def test_weights_of_every_type_keep_type_and_bits(kind):
    if kind == "STRING":
        weight = helper.make_tensor("w", TensorProto.STRING, [4], [b"a", b"b", b"c", b"d"])
    else:
        dtype = ir.DataType[kind].numpy()
        weight = ir.to_proto(ir.tensor(np.array([1, 2, 3, 1]).astype(dtype), name="w"))
    info = helper.make_tensor_value_info("y", weight.data_type, [4])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"], name="same")], "g", [], [info], [weight])
    model = from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert there_and_back(model, look_at_everything)

    def rename(graph: gs.Graph) -> None:
        weight = graph.nodes[0].inputs[0]
        graph.nodes[0].inputs[0] = gs.Constant("v", weight.values)  # numbers that passed through NumPy

    assert not there_and_back(model, rename)
    moved = model.graph.initializers["v"].const_value
    assert moved.dtype == ir.DataType[kind]
    assert stored(moved) == stored(ir.from_proto(weight))


def stored(tensor: ir.TensorProtocol) -> list | bytes:
    return tensor.numpy().tolist() if tensor.dtype == ir.DataType.STRING else tensor.tobytes()


def dressed() -> Model:
    """Metadata, doc strings, denotations and annotations wherever ONNX has a place for them."""
    proto = networks.control()
    proto.doc_string, proto.domain, proto.model_version, proto.producer_name = "a net", "some.where", 7, "someone"
    proto.metadata_props.add(key="author", value="someone")
    graph = proto.graph
    graph.doc_string = "its graph"
    graph.metadata_props.add(key="level", value="graph")
    for node in graph.node:
        node.doc_string = f"about {node.name}"
        node.metadata_props.add(key="pkg.module", value=f"net.{node.name}")
    graph.value_info.append(helper.make_tensor_value_info("conv1", TensorProto.FLOAT, ["N", 8, 12, 12], "inner"))
    graph.value_info[-1].metadata_props.add(key="level", value="value")
    graph.input[0].type.denotation = "IMAGE"
    graph.quantization_annotation.add(tensor_name="conv1").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="zero"
    )
    branch = next(n for n in graph.node if n.op_type == "If").attribute[0].g
    branch.doc_string = "a branch"
    branch.node[0].doc_string = "in a branch"
    return from_proto(proto)


def test_metadata_doc_strings_and_annotations_survive_a_change():
    model = dressed()
    before = bytes_of(model)
    assert b"in a branch" in before and b"SCALE_TENSOR" in before and b"pkg.module" in before
    add_and_remove(model)
    assert bytes_of(model) == before


def test_a_weight_that_branches_read_is_not_copied_into_them():
    model = from_proto(networks.control())

    def halve(graph: gs.Graph) -> None:
        choice = next(n for n in graph.nodes if n.op == "If")
        outside = choice.attrs["then_branch"].nodes[0].inputs[1]
        outside.values = outside.values / 2

    there_and_back(model, halve)
    assert [len(g.initializers) for g in model.ir.graphs()][1:] == [0, 0]
    expected = networks.control()
    for tensor in expected.graph.initializer:
        if tensor.name == "outside":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 2, "outside"))
    inputs = feeds(expected)
    assert distance(run(expected, inputs), run(model.proto(), inputs)) == 0


def test_attributes_that_graphsurgeon_leaves_out_are_put_back():
    body = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (optional(float[2]) y) { [pack] y = Optional (x) }""")
    body.graph.node[0].attribute.append(helper.make_attribute("type", body.graph.input[0].type))
    model = from_proto(body)
    before = bytes_of(model)
    add_and_remove(model)
    assert bytes_of(model) == before


def test_weights_outside_the_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    proto = networks.plain()
    onnx.save(proto, tmp_path / "plain.onnx", save_as_external_data=True, location="w", size_threshold=0)
    model = load(tmp_path / "plain.onnx")

    def never(self: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", never)
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", never)
    with surgery(model) as graph:
        node = next(n for n in graph.nodes if n.op == "Relu")
        node.op = "Sigmoid"
    monkeypatch.undo()
    assert isinstance(model.graph.initializers["conv1.weight"].const_value, ir.ExternalTensor)
    assert sum(n.op_type == "Sigmoid" for n in model.graph) == 1


def test_the_library_own_functions_work_on_the_stand_ins():
    model = from_proto(networks.old())
    before = run(model.proto())
    with surgery(model) as graph:
        graph.fold_constants().cleanup().toposort()
    verify(model)
    assert distance(before, run(model.proto())) == 0


def test_a_real_rewrite_gives_the_same_numbers_and_says_where_nodes_went():
    model = from_proto(relu6_net())
    before = run(model.proto())
    step = relu6()
    context = None
    step.rewrite(model, [effc.Proposal("graph")], context)
    verify(model)
    assert [n.op_type for n in model.graph] == ["Conv", "Clip", "Conv", "Relu", "Min"]
    assert set(edit.origin_of(model.graph[1])) == {"node_min0", "node_relu1"}
    assert distance(before, run(model.proto())) == 0


def test_such_a_pass_runs_in_a_recipe(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "pass_class", lambda name: {"relu6": relu6}[name])
    result = effc.optimize(relu6_net(), "relu6", measure=False)
    (record,) = result.history.passes
    assert record.status == "kept" and record.drift == 0
    assert {e.node: e.to for e in record.ledger if e.status == "changed"} == {
        "node_min0": ("Clip_min0",),
        "node_relu1": ("Clip_min0",),
    }
    kept = effc.optimize(relu6_net(), "relu6{keep=[node_min0, node_min1]}", measure=False).history.passes[0]
    assert kept.status == "unchanged"
    assert {e.reason for e in kept.ledger if e.node == "node_min0"} == {"keep names it"}
    assert effc.optimize(relu6_net(), "relu6{bound=7}", measure=False).history.passes[0].status == "unchanged"


def test_options_come_from_the_keyword_arguments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "pass_class", lambda name: {"relu6": relu6}[name])
    assert [(o.name, o.type_text, o.default, o.description) for o in options(relu6)] == [
        ("bound", "number > 0", "6.0", "upper bound to look for"),
        ("keep", "list of text", "[]", ""),
    ]
    (step,) = build(parse("relu6{bound=5, keep=[a]}"))
    assert step == relu6(bound=5.0, keep=("a",))
    assert format_calls([describe(step)]) == "relu6{bound=5.0, keep=[a]}"
    assert (relu6.name, relu6.exact, relu6.tolerance) == ("relu6", True, 0.0)
    assert relu6.__doc__ == "Min(Relu(x), 6) -> Clip(x, 0, 6)"
    with pytest.raises(BadInput, match="relu6: option bound=-1: allowed: number > 0"):
        build(parse("relu6{bound=-1}"))


def test_only_a_graph_and_described_keyword_arguments_are_taken():
    with pytest.raises(TypeError, match="f takes size: it may take one graph and, behind a"):

        @graphsurgeon_pass(name="f")
        def f(graph: gs.Graph, size: int = 1) -> None: ...


def drop_relu(graph: gs.Graph) -> None:
    relu = next(n for n in graph.nodes if n.op == "Relu")
    relu.i().outputs = relu.outputs
    relu.outputs.clear()
    graph.cleanup()


def test_a_node_may_take_over_the_output_of_another():
    model = from_proto(networks.plain())
    relu = next(n for n in model.graph if n.op_type == "Relu")
    there_and_back(model, drop_relu)
    norm = model.node("node_bn1")
    assert norm.outputs[0].name == relu.outputs[0].name
    assert edit.origin_of(norm) == ("node_bn1", relu.name)


def test_new_sub_graphs_and_new_domains_arrive():
    model = from_proto(networks.plain())

    def wrap(graph: gs.Graph) -> None:
        old = graph.outputs[0]
        made = old.inputs[0]
        made.outputs.clear()
        bodies = {}
        for name in ("then_branch", "else_branch"):
            out = gs.Variable(f"{name}_out", np.float32, ["N", 5])
            inner = gs.Node(made.op, name=f"{name}_fc", attrs=dict(made.attrs), inputs=list(made.inputs), outputs=[out])
            bodies[name] = gs.Graph([inner], [], [out], name=name)
        true = gs.Constant("true", np.array(True))
        graph.nodes.append(gs.Node("If", "choice", bodies, [true], [old]))
        graph.cleanup()

    before = run(model.proto())
    there_and_back(model, wrap)
    assert distance(before, run(model.proto())) == 0
    assert set(model.graph.initializers) >= {"fc.weight", "fc.bias", "true"}
    assert edit.origin_of(model.node("choice")) == ("node_fc",)
    with surgery(model) as graph:
        gelu = gs.Node("Gelu", inputs=[graph.inputs[0]], outputs=[gs.Variable("g")], domain="com.microsoft")
        graph.nodes.append(gelu)
    assert model.graph.opset_imports["com.microsoft"] == 1


def test_attributes_take_the_type_that_the_operator_states():
    model = from_proto(networks.plain())

    def leak(graph: gs.Graph) -> None:
        for node in graph.nodes:
            if node.op == "Relu":
                node.op, node.attrs = "LeakyRelu", {"alpha": 1}

    there_and_back(model, leak)
    assert {n.attributes["alpha"].type for n in model.nodes("LeakyRelu")} == {ir.AttributeType.FLOAT}
    run(model.proto())


def test_weights_of_another_size_void_the_recorded_shapes():
    proto = onnx.shape_inference.infer_shapes(networks.plain())
    model, before = from_proto(proto), from_proto(proto)

    def thin(graph: gs.Graph) -> None:
        for node in graph.nodes:
            if node.name == "node_fc":
                continue
            for constant in [t for t in node.inputs[1:] if isinstance(t, gs.Constant)]:
                constant.values = constant.values[:6]
                if constant.name == "conv3.weight" or constant.name == "conv2.weight":
                    constant.values = constant.values[:, :6]
            if node.name == "node_flat":
                fc = node.o()
                fc.inputs[1].values = fc.inputs[1].values[:, :6]

    there_and_back(model, thin)
    verify(model, before)
    run(model.proto())


def rename_input(graph: gs.Graph) -> None:
    graph.inputs[0].name = "other"


def drop_output(graph: gs.Graph) -> None:
    graph.outputs.clear()


def change_function(graph: gs.Graph) -> None:
    graph.functions[0].nodes[0].op = "Tanh"


def change_opset(graph: gs.Graph) -> None:
    graph.opset = 18


def two_constants(graph: gs.Graph) -> None:
    add = [gs.Constant("bias", np.full(1, v, np.float32)) for v in (1, 2)]
    for node, constant in zip(graph.nodes[:2], add, strict=True):
        node.inputs.append(constant)


def two_tensors(graph: gs.Graph) -> None:
    graph.nodes.append(gs.Node("Relu", "again", inputs=[graph.inputs[0]], outputs=[gs.Variable(graph.outputs[0].name)]))


def dangling(graph: gs.Graph) -> None:
    graph.nodes[-1].inputs[0] = gs.Variable("nowhere")


def nan(graph: gs.Graph) -> None:
    graph.nodes[0].inputs[1].values = graph.nodes[0].inputs[1].values * np.float32("nan")


def odd_attribute(graph: gs.Graph) -> None:
    graph.nodes[0].attrs["odd"] = object()


REFUSALS = [
    (rename_input, "the rewritten graph has the inputs"),
    (drop_output, "the rewritten graph has the outputs"),
    (change_function, "it changed a local function"),
    (change_opset, "which only effc.opset.lift_opset may"),
    (two_constants, "two constants with different numbers are called 'bias'"),
    (two_tensors, "two tensors are called"),
    (dangling, "reads 'nowhere', which nothing makes"),
    (nan, "would hold NaN"),
    (odd_attribute, "attribute odd=.* has no form in ONNX"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[c.__name__ for c, _ in REFUSALS])
def test_what_would_be_lost_is_refused_and_the_model_stays(change, message):
    model = from_proto(networks.control())
    before, revision = bytes_of(model), model.revision
    with pytest.raises(PassFailed, match=message), surgery(model) as graph:
        change(graph)
    assert bytes_of(model) == before and model.revision == revision


def test_a_text_that_is_no_utf8_is_refused():
    proto = networks.plain()
    proto.graph.node[0].attribute.append(helper.make_attribute("raw", b"\xff\xfe"))
    proto.graph.node[0].domain = "other"
    proto.opset_import.append(helper.make_opsetid("other", 1))
    with pytest.raises(PassFailed, match="no UTF-8"), surgery(from_proto(proto)):
        pass


def test_a_failing_function_is_named_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    @graphsurgeon_pass(name="breaks")
    def breaks(graph: gs.Graph) -> None:
        graph.nodes.clear()
        raise IndexError("no such node")

    model = from_proto(networks.plain())
    before = bytes_of(model)
    with pytest.raises(PassFailed, match="breaks: IndexError: no such node; leave this pass out"):
        effc.optimize(model, [breaks()], measure=False)
    assert bytes_of(model) == before
