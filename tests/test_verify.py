"""effc.verify: each rule of a valid model broken once, and when two models count as the same."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from effc import edit
from effc.capture import from_proto
from effc.errors import InvalidModel
from effc.model import Model
from effc.registry import backend
from effc.verify import RULES, difference, drift, equivalent, rounding, verify
from tests import networks
from tests.networks import NETWORKS, feeds


@pytest.fixture
def model() -> Model:
    return from_proto(
        parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1.0, 2.0}> {
            [relu] a = Relu (x)
            [add] y = Add (a, w)
        }""")
    )


def complaint(model: Model, before: Model | None = None) -> str:
    with pytest.raises(InvalidModel) as found:
        verify(model, before)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_are_valid(name):
    model = from_proto(NETWORKS[name]())
    verify(model, model.clone())


def test_two_tensors_of_one_name(model):
    model.node("relu").outputs[0].name = "w"
    assert complaint(model) == "every name is its own: two tensors are called 'w'"


def test_two_nodes_of_one_name(model):
    model.node("relu").name = "add"
    assert complaint(model) == "every name is its own: two nodes are called 'add'"


def test_a_tensor_that_nothing_makes(model):
    model.node("add").replace_input_with(0, ir.Value(name="ghost"))
    assert complaint(model) == (
        "every input is made before it is read: Add 'add' reads 'ghost', which nothing before it makes"
    )


def test_a_tensor_that_is_made_too_late(model):
    relu = model.node("relu")
    model.graph.remove(relu)
    model.graph.append(relu)
    assert "Add 'add' reads 'a', which nothing before it makes" in complaint(model)


def test_an_output_that_no_node_makes(model):
    model.graph.outputs[0] = ir.Value(name="ghost", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    assert complaint(model) == "every input is made before it is read: output 'ghost' is made by no node"


def test_a_weight_without_numbers(model):
    model.value("w").const_value = None
    assert complaint(model) == "every weight has numbers: weight 'w' has no numbers"


def test_a_weight_of_another_shape_than_it_says(model):
    model.value("w").shape = ir.Shape([3])
    assert complaint(model) == "every weight has numbers: weight 'w' says [3] and holds [2]"


def test_what_the_onnx_checker_refuses(model):
    edit.set_attributes(model, model.node("relu"), alpha=0.5)
    assert complaint(model).startswith("the onnx checker accepts it: Unrecognized attribute: alpha for operator Relu")


def test_every_rule_is_broken_above():
    assert [rule.__name__ for rule in RULES] == [
        "every_name_is_its_own",
        "every_input_is_made_before_it_is_read",
        "every_weight_has_numbers",
        "the_onnx_checker_accepts_it",
    ]


def test_inputs_and_outputs_stay_what_they_were(model):
    before = model.clone()
    model.graph.outputs[0].name = "z"
    assert complaint(model, before) == "the outputs changed: they were ['y'], now ['z']"
    verify(model)  # by itself it is valid
    other = before.clone()
    other.graph.inputs[0].shape = ir.Shape(["N", 3])
    assert complaint(other, before) == "'x' had the shape ('N', 2), now ('N', 3)"
    other = before.clone()
    other.graph.inputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    assert "the inputs changed" in complaint(other, before)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ([4.0, -8.0], [4.0, -6.0], 0.25),  # of the largest of a
        ([4.0, -6.0], [4.0, -8.0], 1 / 3),
        ([0.0, 0.0], [0.0, 0.5], 0.5),  # nothing to relate it to
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, INF], [1.5, INF], 0.5),
        ([1.0, NAN], [1.0, 1.0], INF),
        ([1.0, 1.0], [1.0, NAN], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([NAN, NAN], [NAN, NAN], 0.0),
        ([1.0, 2.0], [1.0, 2.0, 3.0], INF),
        ([], [], 0.0),
        ([3, 4], [3, 5], 0.25),
        ([True, False], [True, True], 1.0),
        (["a", "b"], ["a", "b"], 0.0),
        (["a", "b"], ["a", "c"], INF),
    ],
)
def test_difference_is_that_of_the_largest_element(a, b, found):
    assert difference({"y": np.array(a)}, {"y": np.array(b)}) == pytest.approx(found, abs=1e-12)


def test_difference_is_the_worst_over_outputs_and_does_not_wrap_around():
    a, b = {"y": np.ones(2), "z": np.uint8([0, 255])}, {"y": np.ones(2) * 1.1, "z": np.uint8([1, 255])}
    assert difference(a, b) == pytest.approx(0.1)


def test_equivalent_holds_to_its_tolerance():
    runtime, inputs = backend("onnxruntime"), feeds(networks.mlp())
    a = from_proto(networks.mlp())
    b = a.clone()
    assert drift(a, b, inputs, runtime) == 0
    bias = b.value("fc4.bias")
    edit.set_initializer(b, bias, b.constant(bias) + np.float32(0.01))
    moved = drift(a, b, inputs, runtime)
    largest = np.abs(runtime.session(a, optimize=False).run(inputs)["fc4"]).max()
    assert moved == pytest.approx(0.01 / largest, rel=1e-3)
    assert equivalent(a, b, inputs, 1.01 * moved, runtime)
    assert not equivalent(a, b, inputs, 0.99 * moved, runtime)


def test_a_sub_graph_reads_only_what_is_there():
    model = from_proto(networks.control())
    inner = next(iter(model.node("node_choice").attributes["then_branch"].as_graph()))
    assert inner.op_type == "Add"  # of a tensor of the main graph and a weight there
    inner.replace_input_with(1, ir.Value(name="ghost"))
    assert "Add 'node_then_branch' reads 'ghost', which nothing before it makes" in complaint(model)


def test_what_rounding_alone_may_move_is_that_of_the_coarsest_weight():
    assert rounding(from_proto(networks.plain())) == 0
    assert rounding(from_proto(networks.half())) == 4 * 2**-10
