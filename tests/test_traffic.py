"""effc.traffic: element types as onnx's own inference finds them, and bytes that move, counted by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from effc.capture import from_proto, load
from effc.shapes import proven
from effc.traffic import Moved, element_type, element_types, tensor_bytes, traffic
from tests import networks
from tests.networks import Net

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def moved(net: Net, fused: dict[str, str] | None = None) -> dict[str, Moved]:
    return dict(traffic(from_proto(net.model()), fused=fused))


@pytest.mark.parametrize("name", [*networks.NETWORKS])
def test_types_are_those_of_onnx_inference(name):
    model = from_proto(networks.NETWORKS[name]())
    assert element_types(model) == {n: fact.dtype for n, fact in proven(model).items() if fact.dtype is not None}


@pytest.mark.parametrize("path", [LIGHT / "light_shufflenet.onnx", LIGHT / "light_densenet121.onnx"])
def test_types_of_public_networks(path):
    model = load(path)
    assert element_types(model) == {n: fact.dtype for n, fact in proven(model).items() if fact.dtype is not None}


def test_types_by_schema():
    """One of each way in which an operator tells the type of what it makes."""
    net = Net("types", opset=21)
    x = net.input("x", [2, 4])
    one, zero = net.weight("one", np.float16(1)), net.weight("zero", np.int8(0))
    length = net.weight("length", np.array([3], np.int64))
    made = {
        "shape": (net.node("Shape", x), ir.DataType.INT64),
        "less": (net.node("Less", x, x), ir.DataType.BOOL),
        "cast": (net.node("Cast", x, to=TensorProto.BFLOAT16), ir.DataType.BFLOAT16),
        "bare": (net.node("QuantizeLinear", x, net.weight("s", np.float32(1))), ir.DataType.UINT8),
        "signed": (net.node("QuantizeLinear", net.node("Cast", x, to=10), one, zero), ir.DataType.INT8),
        "narrow": (net.node("QuantizeLinear", x, "s", output_dtype=TensorProto.INT4), ir.DataType.INT4),
        "like": (net.node("RandomNormalLike", x), ir.DataType.FLOAT),
        "normal": (net.node("RandomNormal", shape=[2]), ir.DataType.FLOAT),
        "zeros": (net.node("ConstantOfShape", length), ir.DataType.FLOAT),
        "ones": (
            net.node("ConstantOfShape", length, value=onnx.numpy_helper.from_array(np.ones(1, np.int32))),
            ir.DataType.INT32,
        ),
    }
    best = net.node("TopK", x, net.weight("k", np.array([1], np.int64)), outputs=2, name="top")
    for name, dtype in (("shape", np.int64), ("less", bool)):
        net.output(made[name][0], None, dtype)
    model = from_proto(net.model())
    types = element_types(model)
    assert {key: types[tensor] for key, (tensor, _) in made.items()} == {key: t for key, (_, t) in made.items()}
    assert (types[best], types["top_1"]) == (ir.DataType.FLOAT, ir.DataType.INT64)
    for tensor, dtype in made.values():
        assert element_type(model.value(tensor)) == dtype  # without what was found before


def test_a_type_that_nothing_tells_is_none():
    value = ir.Value(name="x")
    ir.Node("", "Relu", [value], num_outputs=1)
    other = ir.Node("somewhere", "Thing", [value], num_outputs=1).outputs[0]
    assert element_type(value) is None and element_type(None) is None and element_type(other) is None


def test_bytes_of_narrow_types_are_rounded_up():
    net = Net("narrow", opset=21)
    x = net.input("x", [3, 5])
    q = net.node("QuantizeLinear", x, net.weight("s", np.float32(1)), output_dtype=TensorProto.INT4, name="q")
    net.output(net.node("DequantizeLinear", q, "s"), [3, 5])
    sizes = tensor_bytes(from_proto(net.model()))
    assert (sizes["x"], sizes["q"], sizes["s"]) == (60, 8, 4)


def test_views_move_nothing_and_looks_read_nothing():
    net = Net("views")
    x = net.input("x", [2, 3, 4])
    shape = net.node("Shape", x, name="look")
    flat = net.node("Flatten", x, name="flat")
    net.output(net.node("Relu", net.node("Reshape", flat, shape, name="back"), name="act"), [2, 3, 4])
    assert moved(net) == {
        "node_look": Moved(0, ((24, 24),)),
        "node_flat": Moved(),
        "node_back": Moved(),
        "node_act": Moved(0, ((96, 96), (96, 96))),
    }


def test_a_lookup_reads_as_much_as_it_writes():
    """Three rows of eight floats out of a table of 1,000, and two of four columns of a tensor."""
    net = Net("lookup")
    ids = net.input("ids", [3], np.int64)
    x = net.input("x", [6, 4])
    table = net.weight("table", net.random(1000, 8))
    net.output(net.node("Gather", table, ids, name="rows"), [3, 8])
    bounds = [net.weight(n, np.array(v, np.int64)) for n, v in (("from", [0]), ("to", [2]), ("axis", [1]))]
    net.output(net.node("Slice", x, *bounds, name="columns"), [6, 2])
    found = moved(net)
    assert found["node_rows"] == Moved(96, ((24, 24), (96, 96)))
    assert found["node_columns"] == Moved(3 * 8, ((48, 96), (48, 48)))
    assert found["node_rows"].total == 96 + 24 + 96


def test_what_is_made_of_weights_is_made_once_when_the_model_is_loaded():
    net = Net("made")
    x = net.input("x", [2, 4])
    ones = net.node("ConstantOfShape", net.weight("size", np.array([4, 3], np.int64)), name="ones")
    turned = net.node("Transpose", net.node("Identity", ones, name="same"), name="turned")
    y = net.node("MatMul", x, net.node("Transpose", turned, name="again"), name="product")
    net.output(net.node("Add", y, net.node("RandomNormal", shape=[2, 3], name="noise"), name="sum"), [2, 3])
    found = moved(net)
    assert found["node_product"] == Moved(48, ((32, 32), (24, 24)))
    assert all(found[f"node_{name}"] == Moved() for name in ("ones", "same", "turned", "again"))
    assert found["node_noise"] == Moved(0, ((24, 24),))  # at each inference anew
    assert found["node_sum"].activations == 3 * 24


def quantised() -> Net:
    """x -> Q -> DQ -> MatMul(DQ(w)) -> Relu -> Q -> DQ -> out."""
    net = Net("quantised")
    x = net.input("x", [2, 4])
    s, z = net.weight("s", np.float32(1)), net.weight("z", np.uint8(0))
    a = net.node("DequantizeLinear", net.node("QuantizeLinear", x, s, z, name="q_x"), s, z, name="dq_x")
    w = net.node("DequantizeLinear", net.weight("w", np.zeros((4, 3), np.int8)), s, name="dq_w")
    y = net.node("Relu", net.node("MatMul", a, w, name="product"), name="act")
    y = net.node("DequantizeLinear", net.node("QuantizeLinear", y, s, z, name="q_y"), s, z, name="dq_y")
    net.output(y, [2, 3])
    return net


def test_weights_behind_dequantise_are_read_as_codes():
    found = moved(quantised())
    assert found["node_dq_w"] == Moved(12, ())  # the scale was read before
    assert found["node_product"] == Moved(0, ((32, 32), (24, 24)))
    assert found["node_q_x"] == Moved(4 + 1, ((32, 32), (8, 8)))


def test_what_stays_inside_of_a_kernel_does_not_move():
    inside = dict.fromkeys(("node_dq_x", "node_dq_w", "node_act", "node_q_y"), "node_product")
    found = moved(quantised(), inside)
    kernel = [found[name] for name in (*inside, "node_product")]
    assert sum(m.activations for m in kernel) == 8 + 6  # codes in, codes out
    assert found["node_product"] == Moved()
    assert sum(m.weights for m in found.values()) == 12 + 4 + 1


def test_each_kernel_that_takes_a_dequantise_in_reads_its_codes():
    """A skip connection: two kernels read the codes of x, and none its float form."""
    net = Net("skip")
    x = net.input("x", [2, 4])
    s, z = net.weight("s", np.float32(1)), net.weight("z", np.uint8(0))
    a = net.node("DequantizeLinear", net.node("QuantizeLinear", x, s, z, name="q_x"), s, z, name="dq_x")
    w = net.node("DequantizeLinear", net.weight("w", np.zeros((4, 4), np.int8)), s, name="dq_w")
    y = net.node("QuantizeLinear", net.node("MatMul", a, w, name="product"), s, z, name="q_y")
    y = net.node("Add", net.node("DequantizeLinear", y, s, z, name="dq_y"), a, name="sum")
    net.output(net.node("QuantizeLinear", y, s, z, name="q_z"), [2, 4], np.uint8)
    first = dict.fromkeys(("node_dq_x", "node_dq_w", "node_q_y"), "node_product")
    found = moved(net, first | dict.fromkeys(("node_dq_y", "node_q_z"), "node_sum"))
    kernels = [sum(found[name].activations for name in names) for names in (
        ("node_q_x",), ("node_product", *first), ("node_sum", "node_dq_y", "node_q_z"),
    )]  # fmt: skip
    assert kernels == [32 + 8, 8 + 8, 8 + 8 + 8]


def test_a_kernel_reads_once_and_writes_what_others_read():
    net = Net("swish")
    x = net.input("x", [2, 4])
    y = net.node("Relu", x, name="first")
    gate = net.node("Sigmoid", y, name="gate")
    z = net.node("Mul", net.node("Mul", y, gate, name="swish"), x, name="scaled")
    net.output(net.node("Add", z, gate, name="sum"), [2, 4])
    found = moved(net, {"node_gate": "node_swish", "node_scaled": "node_swish"})
    assert {name: m.activations for name, m in found.items()} == {
        "node_first": 64,
        "node_gate": 32 + 32,  # reads y; is read by sum
        "node_swish": 0,  # y was read, and what it makes stays
        "node_scaled": 32 + 32,  # reads x
        "node_sum": 96,
    }


def test_a_node_of_which_nothing_is_left_moves_nothing():
    net = Net("left")
    x = net.input("x", [2, 4])
    y = net.node("Cast", net.node("Relu", x, name="act"), to=TensorProto.FLOAT, name="cast")
    net.output(net.node("Neg", y, name="minus"), [2, 4])
    found = moved(net, {"node_cast": ""})
    assert {name: m.activations for name, m in found.items()} == {"node_act": 64, "node_cast": 0, "node_minus": 64}
    codes = dict.fromkeys(("node_dq_x", "node_act", "node_q_y"), "node_product")
    assert moved(quantised(), codes | {"node_dq_w": ""})["node_dq_w"].weights == 12  # its codes are read all the same


def test_a_tensor_that_a_node_reads_twice_moves_once():
    net = Net("square")
    x = net.input("x", [2, 4])
    net.output(net.node("Mul", x, x, name="square"), [2, 4])
    assert moved(net)["node_square"].activations == 64


def test_what_has_no_size_is_counted_as_missing():
    found = traffic(from_proto(networks.sound()))
    assert found["node_conv1"].missing == 2 and found["node_conv1"].activations == 0
    assert found["node_conv1"].weights == 4 * 8 * 2 * 5


def test_what_is_not_analysed_moves_nothing():
    found = traffic(from_proto(networks.control()))
    assert found["node_choice"] == found["node_swish"] == Moved()


def test_external_and_unknown_operators_do_not_stop_it():
    net = Net("foreign")
    x = net.input("x", [2, 4])
    net.nodes.append(helper.make_node("Thing", [x], ["thing"], name="node_thing", domain="somewhere"))
    net.output(net.node("Relu", "thing", name="act"), [2, 4])
    proto = net.model()
    proto.opset_import.append(helper.make_opsetid("somewhere", 1))
    found = traffic(from_proto(proto))
    assert found["node_thing"] == Moved() and found["node_act"].missing == 1
