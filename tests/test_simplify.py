"""effc.passes.simplify: what it folds, what it leaves alone, and that the numbers stay."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from effc.capture import from_proto
from effc.contract import Proposal, Skipped
from effc.model import Model
from effc.passes.simplify import Simplify, simplify
from tests import networks
from tests.networks import NETWORKS, Net, distance, feeds, run


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model after the pass, checked, and equal to the model before it."""
    model = from_proto(proto)
    simplify(model)
    result = model.proto()
    onnx.checker.check_model(result, full_check=True)
    for batch in (1, 3):
        inputs = feeds(proto, batch)
        assert distance(run(proto, inputs), run(result, inputs)) <= Simplify.tolerance
    assert [v.name for v in model.graph.outputs] == [v.name for v in proto.graph.output]
    return result


def text(source: str) -> onnx.ModelProto:
    return parser.parse_model(source)


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def weights(proto: onnx.ModelProto) -> dict[str, list]:
    return {t.name: numpy_helper.to_array(t).tolist() for t in proto.graph.initializer}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_keeps_its_meaning_and_names(name):
    proto = NETWORKS[name]()
    result = simplified(proto)
    before = {node.name for node in from_proto(proto).graph}
    assert {node.name for node in result.graph.node} <= before
    assert len(simplified(result).graph.node) == len(result.graph.node)


@pytest.mark.parametrize(
    ("name", "left"), [("transformer", 18), ("old", 6), ("two_outputs", 6), ("plain", 11), ("control", 12)]
)
def test_number_of_nodes_left(name, left):
    assert len(simplified(NETWORKS[name]()).graph.node) == left


def test_a_flatten_spelled_at_length_becomes_one_reshape_with_a_dynamic_batch():
    result = simplified(networks.old())
    (reshape,) = [n for n in result.graph.node if n.op_type == "Reshape"]
    assert weights(result)[reshape.input[1]] == [0, -1]
    assert "Shape" not in ops(result)


def test_heads_of_a_dynamic_sequence_keep_both_dynamic_sizes():
    result = simplified(networks.transformer())
    shapes = [weights(result)[n.input[1]] for n in result.graph.node if n.op_type == "Reshape"]
    assert shapes == [[0, 0, 4, 4]] * 3 + [[0, 0, 16]]


def test_squeeze_concat_spelling_of_newer_exporters():
    result = simplified(
        text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3, 2, 2] x) => (float[N, 12] y) {
            shape = Shape <start = 0, end = 1> (x)
            size = Squeeze (shape)
            one = Constant <value_ints = [-1]> ()
            first = Reshape <allowzero = 0> (size, one)
            rest = Constant <value_ints = [12]> ()
            target = Concat <axis = 0> (first, rest)
            y = Reshape <allowzero = 1> (x, target)
        }""")
    )
    assert ops(result) == ["Reshape"]
    assert list(weights(result).values()) == [[0, 12]]
    assert not result.graph.node[0].attribute


def test_a_product_of_dynamic_sizes_is_inferred_only_beside_constants():
    result = simplified(
        text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, T, 6] x) => (float[M, 6] y, float[P, Q, 3] z) {
            shape = Shape (x)
            zero = Constant <value_ints = [0]> ()
            one = Constant <value_ints = [1]> ()
            n = Gather (shape, zero)
            t = Gather (shape, one)
            product = Mul (n, t)
            six = Constant <value_ints = [6]> ()
            flat = Concat <axis = 0> (product, six)
            y = Reshape (x, flat)
            two = Constant <value_ints = [2]> ()
            double = Mul (t, two)
            three = Constant <value_ints = [3]> ()
            other = Concat <axis = 0> (n, double, three)
            z = Reshape (x, other)
        }""")
    )
    targets = {n.output[0]: weights(result).get(n.input[1]) for n in result.graph.node if n.op_type == "Reshape"}
    # Beside a dynamic size that may be 0, -1 would be ambiguous: the second shape is still computed.
    assert targets == {"y": [-1, 6], "z": None}


def test_recorded_shapes_prove_nothing():
    proto = text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x) => (float[M, K] y) {
            a = Relu (x)
            target = Constant <value_ints = [1, 4]> ()
            b = Reshape (a, target)
            y = Relu (b)
        }""")
    proto.graph.value_info.append(helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1, 4]))
    model = from_proto(proto)
    simplify(model)
    assert [n.op_type for n in model.graph] == ["Relu", "Reshape", "Relu"]


NOTHING = [
    "b = Identity (a)",
    "b = Reshape (a, same)",
    "b = Reshape (a, copied)",
    "b = Expand (a, same)",
    "b = Expand (a, one)",
    "b = Transpose <perm = [0, 1, 2]> (a)",
    "b = Cast <to = 1> (a)",
    "b = Pad (a, no_pads)",
    "b = Slice (a, start, big)",
    "b = Slice (a, start, big, start)",
    "b = Tile (a, ones)",
    "b = Concat <axis = 1> (a)",
    "b = Sum (a)",
    "b = Dropout (a)",
    "b = Dropout (a, ratio, off)",
    "c = Transpose <perm = [1, 2, 0]> (a) b = Transpose <perm = [2, 0, 1]> (c)",
]
SOMETHING = [
    "b = Transpose <perm = [0, 2, 1]> (a) ",
    "b = Reshape (a, other)",
    "b = Pad (a, shift)",
    "b = Slice (a, last, first, start, back)",
    "b = Slice (a, last, big, start)",
    "b = Concat <axis = 1> (a, a)",
    "c = Transpose <perm = [1, 2, 0]> (a) b = Transpose <perm = [1, 2, 0]> (c)",
]
AROUND = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2, 3, 4] x) => (float[P, Q, R] y)
    <int64[3] same = {{2, 3, 4}}, int64[3] copied = {{0, -1, 4}}, int64[3] other = {{2, 4, 3}}, int64[1] one = {{1}},
     int64[6] no_pads = {{0, 0, 0, 0, 0, 0}}, int64[6] shift = {{1, 0, 0, -1, 0, 0}}, int64[1] start = {{0}},
     int64[1] big = {{9223372036854775807}}, int64[3] ones = {{1, 1, 1}}, int64[1] last = {{-1}},
     int64[1] first = {{-9}}, int64[1] back = {{-1}}, float ratio = {{0.5}}, bool off = {{0}}>
    {{ a = Relu (x) {} y = Sigmoid (b) }}"""


@pytest.mark.parametrize("body", NOTHING)
def test_a_node_that_does_nothing_goes(body):
    assert ops(simplified(text(AROUND.format(body)))) == ["Relu", "Sigmoid"]


@pytest.mark.parametrize("body", SOMETHING)
def test_a_node_that_does_something_stays(body):
    assert len(simplified(text(AROUND.format(body))).graph.node) == 3


def test_outputs_that_are_inputs_or_equal_to_each_other_keep_their_names():
    result = simplified(
        text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] p, float[2] q, float[2] r, float[2] s) {
            p = Identity (x)
            q = Relu (x)
            r = Identity (q)
            a = Sigmoid (x)
            s = Identity (a)
        }""")
    )
    assert [(n.op_type, n.output[0]) for n in result.graph.node] == [
        ("Identity", "p"), ("Relu", "q"), ("Identity", "r"), ("Sigmoid", "s"),
    ]  # fmt: skip


def test_repeated_nodes_become_one_but_not_random_ones():
    proto = text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3] x) => (float[2, 3] y) {
            a = Sigmoid (x)
            b = Sigmoid (x)
            c = Elu <alpha = 0.5> (a)
            d = Elu <alpha = 0.5> (b)
            e = Elu <alpha = 0.25> (b)
            s = Sum (c, d, e)
            r1 = RandomNormalLike <seed = 1.0> (x)
            r2 = RandomNormalLike <seed = 1.0> (x)
            r3 = RandomUniform <shape = [2, 3]> ()
            y = Sum (s, r1, r2, r3)
        }""")
    model = from_proto(proto)
    simplify(model)
    kinds = [n.op_type for n in model.graph]
    assert kinds.count("Sigmoid") == 1 and kinds.count("Elu") == 2
    assert kinds.count("RandomNormalLike") == 2 and kinds.count("RandomUniform") == 1


def test_equal_weights_stay_two():
    net = Net("twins")
    x = net.input("x", ["N", 3, 4, 4])
    a, b = (net.node("Conv", x, net.weight(n, np.ones((2, 3, 1, 1), np.float32)), name=f"conv_{n}") for n in "ab")
    net.output(net.node("Concat", a, b, axis=1), ["N", 4, 4, 4])
    assert len(simplified(net.model()).graph.initializer) == 2


def test_constants_are_not_computed_where_the_file_would_grow():
    net = Net("constants")
    x = net.input("x", ["N", 512])
    shape = net.weight("shape", np.array([512, 512]))
    value = numpy_helper.from_array(np.array([0.01], np.float32))
    y = net.node("MatMul", x, net.node("ConstantOfShape", shape, name="filled", value=value))
    row = net.weight("row", net.random(512))
    y = net.node("Add", y, net.node("Expand", net.weight("scalar", net.random(1)), net.weight("size", np.array([512]))))
    outer = net.node(
        "Mul", net.node("Unsqueeze", row, net.weight("axis", np.array([1])), name="column"), row, name="outer"
    )
    y = net.node("MatMul", y, outer)
    turned = net.node("Transpose", net.weight("w", net.random(512, 4)), name="turned", perm=[1, 0])
    y = net.node("Gemm", y, turned, transB=1)
    net.output(y, ["N", 4])
    proto = net.model()
    result = simplified(proto)
    assert ops(result) == [op for op in ops(proto) if op != "Transpose"]
    assert result.ByteSize() <= from_proto(proto).proto().ByteSize()


@pytest.mark.parametrize(
    "body",
    [
        "c = Transpose <perm = [1, 0]> (w)", "c = Add (w, v)", "c = Concat <axis = 0> (w, w)", "c = Gather (w, i)",
        "p, c = Split <axis = 0> (w)", "d = Sqrt (w) e = Reciprocal (d) c = Mul (e, v)", "c = Slice (w, i, j)",
        "d = Shape (w) e = Cast <to = 1> (d) f = Mul (e, two) g = Floor (f) h = Cast <to = 7> (g) c = Expand (v, h)",
    ],
)  # fmt: skip
def test_constants_are_computed(body):
    proto = text(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[1] x) => (float[P, Q] y)
        <float[2, 2] w = {{1.0, 2.0, 3.0, 4.0}}, float[2] v = {{5.0, 6.0}}, int64[1] i = {{1}}, int64[1] j = {{2}},
         float two = {{1.0}}> {{ {body} y = Mul (x, c) }}""")
    assert ops(simplified(proto)) == ["Mul"]


def test_a_scalar_stays_a_scalar():
    proto = text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[3, 2] x, int64 i) => (float[P] y) <float[2] w = {1.0, 2.0}> {
            shape = Shape (x)
            last = Constant <value_int = 1> ()
            size = Gather (shape, last)
            half = Constant <value_int = 2> ()
            place = Div (size, half)
            y = Gather <axis = 1> (x, place)
        }""")
    result = simplified(proto)
    assert ops(result) == ["Gather"]
    assert weights(result) == {"place": 1}


def test_a_constant_that_is_not_a_number_stays_computed():
    proto = text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[1] x) => (float[2] y) <float[2] w = {-1.0, 1.0}> {
            c = Log (w) d = Sqrt (w) e = Add (c, d) y = Mul (x, e)
        }""")
    assert ops(simplified(proto)) == ["Log", "Sqrt", "Add", "Mul"]


def test_quantised_weights_stay_encoded():
    net = Net("encoded", opset=17)
    x = net.input("x", ["N", 8])
    q = net.weight("q", net.rng.integers(-127, 127, (8, 4)).astype(np.int8))
    w = net.node("DequantizeLinear", q, net.weight("s", np.float32(0.01)), net.weight("z", np.int8(0)), name="dq")
    index = net.node("Cast", net.weight("index", net.rng.integers(0, 16, (4, 40)).astype(np.uint8)), name="cast", to=7)
    book = net.node("Gather", net.weight("book", net.random(16)), index, name="lookup")
    net.output(net.node("MatMul", net.node("MatMul", x, w), book), ["N", 40])
    assert ops(simplified(net.model())) == ["DequantizeLinear", "Cast", "Gather", "MatMul", "MatMul"]


def test_branches_and_functions_are_left_alone_and_said_so():
    model = from_proto(networks.control())
    found = list(Simplify().propose(model, None))
    assert Skipped("node_choice", "If holds a sub-graph, which is passed through untouched") in found
    assert any(isinstance(f, Skipped) and "local function" in f.reason for f in found)
    branch = model.node("node_choice").attributes["then_branch"].as_graph()
    before = [(n.op_type, [v.name for v in n.inputs]) for n in branch]
    simplify(model)
    branch = model.node("node_choice").attributes["then_branch"].as_graph()
    assert [(n.op_type, [v.name for v in n.inputs]) for n in branch] == before


def test_a_value_captured_by_a_branch_may_be_folded_outside():
    proto = text("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x, bool c) => (float[2] y) {
            two = Constant <value = float[2] {2.0, 3.0}> ()
            same = Identity (two)
            i = Identity (x)
            y = If (c) <
                then_branch = t () => (float[2] p) { p = Mul (i, same) },
                else_branch = e () => (float[2] q) { q = Identity (i) }
            >
        }""")
    model = from_proto(proto)
    simplify(model)
    result = model.proto()
    onnx.checker.check_model(result, full_check=True)
    assert ops(result) == ["If"]
    for c in (True, False):
        inputs = {"x": np.array([1, -1], np.float32), "c": np.array(c)}
        assert distance(run(proto, inputs), run(result, inputs)) == 0


def test_nothing_to_do_is_said():
    (found,) = Simplify().propose(from_proto(networks.mlp()), None)
    assert found == Skipped("graph", "no node is constant, repeated, unread, or of a kind that may do nothing")


def test_proposal_foresees_the_nodes():
    (found,) = Simplify().propose(from_proto(networks.two_outputs()), None)
    assert isinstance(found, Proposal)
    assert set(found.nodes) == {"node_same", "node_t1", "node_t2"}


def test_rewriting_nothing_leaves_the_revision():
    model = from_proto(networks.mlp())
    revision = model.revision
    simplify(model)
    assert model.revision == revision


def test_every_node_is_edited_at_most_once(monkeypatch):
    """The sweep is linear: twice the nodes, twice the edits."""
    counts = []
    for size in (100, 200):
        net = Net("long")
        x = net.input("x", ["N", 2])
        for _ in range(size):
            x = net.node("Identity", net.node("Relu", x))
        net.output(x, ["N", 2])
        model = from_proto(net.model())
        touched = []
        monkeypatch.setattr(model, "touch", lambda touched=touched, model=model: touched.append(Model.touch(model)))
        simplify(model)
        assert len(model.graph) == size
        counts.append(len(touched))
    assert counts == [100, 200]
