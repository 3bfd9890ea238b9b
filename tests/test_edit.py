"""effc.edit: what each function does, and what it refuses before it writes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import parser

from effc import edit
from effc.capture import from_proto
from effc.errors import InvalidModel, PassFailed
from effc.model import Model
from tests import networks


@pytest.fixture
def model() -> Model:
    """x -> Relu a -> Sigmoid b -> Add (b, w) -> y, and z = Identity (a) as a second output."""
    return from_proto(
        parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 2] x) => (float[N, 2] y, float[N, 2] z) <float[2] w = {1.0, 2.0}> {
            [relu] a = Relu (x)
            [sigmoid] b = Sigmoid (a)
            [add] y = Add (b, w)
            [same] z = Identity (a)
        }""")
    )


def check(model: Model) -> onnx.ModelProto:
    proto = model.proto()
    onnx.checker.check_model(proto, full_check=True)
    return proto


def unchanged(model: Model, revision: int, before: bytes) -> bool:
    return model.revision == revision and model.proto().SerializeToString() == before


def state(model: Model) -> tuple[int, bytes]:
    return model.revision, model.proto().SerializeToString()


def test_fresh_names_are_new_everywhere_and_reserved():
    model = from_proto(networks.control())
    assert edit.fresh(model, "new") == "new"
    assert edit.fresh(model, "new") == "new_1"
    assert edit.fresh(model, "node_then_branch") == "node_then_branch_1"
    assert edit.fresh(model, "outside") == "outside_1"


def test_a_new_weight_gets_a_number_when_its_name_is_taken(model):
    value = edit.add_initializer(model, "w", np.zeros(2, np.float32))
    assert value.name == "w_1"
    assert set(model.graph.initializers) == {"w", "w_1"}


def test_weights_that_are_not_numbers_are_refused(model):
    before = state(model)
    bad = np.array([1, np.nan], np.float32)
    with pytest.raises(PassFailed, match="weight 'new' would hold NaN"):
        edit.add_initializer(model, "new", bad)
    with pytest.raises(PassFailed, match="weight 'w' would hold NaN"):
        edit.set_initializer(model, model.value("w"), bad)
    assert unchanged(model, *before)


def test_a_scalar_weight_has_no_axis(model):
    assert edit.add_initializer(model, "array", np.array(0.5)).shape == ()
    assert edit.add_initializer(model, "number", np.float32(0.5)).shape == ()


def test_setting_what_is_no_weight_is_refused(model):
    with pytest.raises(PassFailed, match="'a' is not a weight of the main graph"):
        edit.set_initializer(model, model.value("a"), np.zeros(2, np.float32))


def test_a_weight_takes_another_type_and_shape(model):
    revision = model.revision
    edit.set_initializer(model, model.value("w"), np.ones((1, 2), np.float32))
    assert model.revision > revision
    assert model.shapes()["w"] == (1, 2)
    check(model)


def test_replacing_keeps_names_and_notes_the_origin(model):
    old = model.node("sigmoid")
    half = edit.add_initializer(model, "half", np.float32(0.5))
    mul = edit.make_node(model, "Mul", [old.inputs[0], half], name="mul", origin=[])
    tanh = edit.make_node(model, "Tanh", [mul.outputs[0]], name="tanh")
    edit.replace(model, [old], [mul, tanh], {old.outputs[0]: tanh.outputs[0]})
    assert [n.name for n in model.graph] == ["relu", "mul", "tanh", "add", "same"]
    assert model.node("tanh").outputs[0].name == "b"
    assert edit.origin_of(model.node("mul")) == edit.origin_of(model.node("tanh")) == ("sigmoid",)
    check(model)


def test_replacing_refuses_what_is_still_read(model):
    before = state(model)
    with pytest.raises(PassFailed, match="'b' of 'sigmoid' is still read, and nothing replaces it"):
        edit.replace(model, [model.node("sigmoid")], [], {})
    assert unchanged(model, *before)


def test_replacing_an_output_by_a_tensor_that_stays_goes_through_identity(model):
    same = model.node("same")
    edit.replace(model, [same], [], {same.outputs[0]: model.value("a")})
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    check(model)


def test_nodes_of_another_graph_are_refused(model):
    other = model.clone()
    before = state(model)
    node = other.node("sigmoid")
    for attempt in (
        lambda: edit.insert_after(model, node, []),
        lambda: edit.insert_before(model, node, []),
        lambda: edit.replace(model, [node], [], {node.outputs[0]: model.value("a")}),
        lambda: edit.to_weights(model, node, {}),
    ):
        with pytest.raises(InvalidModel, match="node 'sigmoid' is not in the main graph"):
            attempt()
    assert unchanged(model, *before)


def test_bypass_joins_readers_to_the_source(model):
    edit.bypass(model, model.node("sigmoid"), model.value("a"))
    assert [v.name for v in model.node("add").inputs] == ["a", "w"]
    check(model)


def test_bypass_can_keep_the_name(model):
    edit.bypass(model, model.node("sigmoid"), model.value("a"), keep_name=True)
    assert [v.name for v in model.node("add").inputs] == ["b", "w"]
    assert [v.name for v in model.node("same").inputs] == ["b"]
    check(model)


def test_bypass_gives_the_name_of_a_graph_output_on(model):
    edit.bypass(model, model.node("same"), model.value("a"))
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert model.node("relu").outputs[0].name == "z"
    check(model)


def test_bypass_refuses_to_rename_inputs_weights_and_outputs(model):
    add, same = model.node("add"), model.node("same")
    for node, source in ((same, "x"), (same, "w"), (add, "z")):
        before = state(model)
        assert not edit.may_bypass(model, node, model.value(source))
        with pytest.raises(PassFailed, match=f"{node.name!r} cannot be taken out: {source!r} cannot stand for all"):
            edit.bypass(model, node, model.value(source))
        assert unchanged(model, *before)


def test_bypass_refuses_a_node_with_a_second_output_that_is_read():
    proto = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N] x) => (float[N] y, bool[N] m) { [drop] a, m = Dropout (x) y = Relu (a) }""")
    model = from_proto(proto)
    assert not edit.may_bypass(model, model.node("drop"), model.value("x"))


def test_weights_take_the_place_of_outputs(model):
    edit.to_weights(model, model.node("sigmoid"), {model.value("b"): np.ones(2, np.float32)})
    assert set(model.graph.initializers) == {"w", "b"}
    assert [v.name for v in model.node("add").inputs] == ["b", "w"]


def test_weights_refuse_the_place_of_graph_outputs_and_of_what_has_no_number(model):
    before = state(model)
    with pytest.raises(PassFailed, match="'z' of 'same' is still read, and no weight can take its place"):
        edit.to_weights(model, model.node("same"), {model.value("z"): np.ones(2, np.float32)})
    with pytest.raises(PassFailed, match="'b' of 'sigmoid'"):
        edit.to_weights(model, model.node("sigmoid"), {})
    with pytest.raises(PassFailed, match="NaN"):
        edit.to_weights(model, model.node("sigmoid"), {model.value("b"): np.full(2, np.nan)})
    assert unchanged(model, *before)


def test_discard_takes_only_what_nothing_reads(model):
    spare = edit.add_initializer(model, "spare", np.zeros(2, np.float32))
    edit.discard(model, [spare, model.value("w"), model.value("x"), None])
    assert set(model.graph.initializers) == {"w"}


def test_inputs_in_between_are_left_empty():
    model = from_proto(networks.depthwise())
    node = model.node("node_clip")
    edit.set_input(model, node, 1, None)
    assert [v and v.name for v in node.inputs] == ["bn", None, "high"]
    check(model)


def test_attributes_are_set_and_removed():
    model = from_proto(networks.plain())
    node = model.node("node_conv1")
    edit.set_attributes(model, node, pads=[0, 0, 0, 0], dilations=[1, 1], kernel_shape=None)
    assert list(node.attributes["pads"].value) == [0, 0, 0, 0]
    assert "kernel_shape" not in node.attributes
    check(model)


def test_an_edit_of_a_clone_is_not_seen_in_the_original(model):
    before = state(model)
    clone = model.clone()
    assert clone.revision == model.revision
    edit.set_initializer(clone, clone.value("w"), np.zeros(2, np.float32))
    edit.bypass(clone, clone.node("sigmoid"), clone.value("a"))
    assert unchanged(model, *before)
    assert clone.revision != model.revision


def test_removing_what_is_unused_also_drops_optional_outputs():
    proto = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 2, 2] y) <float[2] spare = {1.0, 2.0}> {
            y, indices = MaxPool <kernel_shape = [3, 3]> (x)
            dead = Relu (x)
            deader = Relu (dead)
        }""")
    model = from_proto(proto)
    assert edit.remove_unused(model) == 2
    assert [len(n.outputs) for n in model.graph] == [1]
    assert not model.graph.initializers
    revision = model.revision
    assert edit.remove_unused(model) == 0
    assert model.revision == revision


def test_another_graph_must_have_the_same_inputs_and_outputs(model):
    before = state(model)
    other = from_proto(networks.plain())
    with pytest.raises(PassFailed, match=r"the rewritten graph has the inputs \['input'\], the model had \['x'\]"):
        edit.substitute(model, other.ir)
    assert unchanged(model, *before)


def test_onnx_ir_passes_count_as_edits(model):
    from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass

    revision = model.revision
    assert not edit.apply(model, LiftConstantsToInitializersPass())
    assert model.revision == revision
    assert edit.apply(model, IdentityEliminationPass())
    assert model.revision > revision


def test_new_nodes_are_named_after_their_hint(model):
    node = edit.make_node(model, "Split", [model.value("x")], {"axis": 0}, name="relu", outputs=2, origin=["relu"])
    assert node.name == "relu_1"
    assert [v.name for v in node.outputs] == ["relu_1_output", "relu_1_output_1"]
    assert edit.origin_of(node) == ("relu",)
    assert isinstance(node.attributes["axis"], ir.Attr)
