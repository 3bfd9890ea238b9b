"""effc.cost: counts by hand, and published counts of known networks; every number is exact unless it says so."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc import capture
from effc.cost import Cost, cost
from tests import networks
from tests.networks import Net

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"  # topologies, weights made at run time


def test_costs_add_up():
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        # output pixels x output channels x kernel x input channels of a group, layer by layer; then the classifier
        ("plain", 144 * 8 * 27 + 36 * 16 * 72 + 36 * 16 * 144 + 16 * 5),
        ("depthwise", 36 * 8 * 27 + 36 * 8 * 9 + 36 * 16 * 8 + 16 * 16 * 4 * 9 + 16 * 5),
        ("mlp", 20 * 16 + 16 * 12 + 12 * 12 + 12 * 5),
        # q, k, v and the output of 6 positions; 4 heads of width 4: scores and their sums over values
        ("transformer", 3 * 6 * 16 * 16 + 6 * 16 * 5 + 2 * 4 * 6 * 6 * 4),
        # a transposed convolution takes each input pixel to all of the kernel: [C, N / groups, k, k] without C
        ("transposed", 16 * 8 * 36 + 8 * 16 * 3 * 4 + 12 * 64 * 4 * 9),
        ("sound", 6 * 8 * 2 * 5 + 6 * 8 * 8 * 3 + 6 * 3 * 8),
    ],
)
def test_macs_by_hand_grow_with_the_batch(name, macs):
    model = capture.from_proto(networks.NETWORKS[name]())
    assert cost(model, dims={"T": 6}).total.macs == macs
    if model.batch is None:
        assert cost(model, batch=3, dims={"T": 6}).total.macs == 3 * macs
    assert not cost(model, dims={"T": 6}).unknown


def test_each_node_has_its_own_share():
    model = capture.from_proto(networks.plain())
    found = cost(model)
    assert set(found.nodes) == {node.name for node in model.graph}
    assert found.nodes["node_conv2"] == Cost(36 * 16 * 72, 8 * 16 * 9 + 16, 4 * (8 * 16 * 9 + 16))
    assert found.nodes["node_bn1"] == Cost(0, 4 * 8, 4 * 4 * 8)
    assert found.nodes["node_pool"] == Cost()
    assert sum(found.nodes.values(), Cost()) == found.total


def test_a_weight_that_two_nodes_read_counts_once():
    found = cost(capture.from_proto(networks.two_outputs()))
    assert found.nodes["node_conv_left"].parameters == 4 * 4 * 9
    assert found.nodes["node_conv_right"] == Cost(macs=36 * 4 * 36)
    assert found.total.parameters == 4 * 4 * 9 + 2 * 4 * 4


def test_what_is_not_analysed_is_unknown_with_a_reason():
    found = cost(capture.from_proto(networks.control()))
    assert found.unknown == {
        "node_swish": "local.Swish is a local function, passed through untouched",
        "node_choice": "If holds a sub-graph, which is passed through untouched",
    }
    assert found.total.macs == 144 * 8 * 27 + 144 * 8 * 8 + 8 * 5  # the part that is known


def test_an_open_dimension_leaves_a_node_unknown():
    found = cost(capture.from_proto(networks.sound()))
    assert found.unknown["node_conv1"] == "the shapes of Conv (node_conv1) are not known"
    assert found.total.macs == 0


def graph(nodes, inputs, outputs, weights) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    infos = [[helper.make_tensor_value_info(n, t, s) for n, t, s in values] for values in (inputs, outputs)]
    made = helper.make_graph(nodes, "g", *infos, initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_integer_operators_count_as_their_float_forms():
    w, m = np.zeros((3, 2, 3, 3), np.uint8), np.zeros((5, 7), np.uint8)
    one, zero = np.float32(1), np.uint8(0)
    image, table = [("x", TensorProto.UINT8, [1, 2, 4, 4]), ("a", TensorProto.UINT8, [6, 5])], TensorProto.INT32
    scales = ["one", "zero"]
    nodes = [
        helper.make_node("ConvInteger", ["x", "w"], ["c"], "conv"),
        helper.make_node("QLinearConv", ["x", *scales, "w", *scales, *scales], ["q"], "qconv"),
        helper.make_node("MatMulInteger", ["a", "m"], ["p"], "matmul"),
        helper.make_node("QLinearMatMul", ["a", *scales, "m", *scales, *scales], ["r"], "qmatmul"),
    ]
    outputs = [("c", table, [1, 3, 2, 2]), ("q", TensorProto.UINT8, [1, 3, 2, 2])]
    outputs += [("p", table, [6, 7]), ("r", TensorProto.UINT8, [6, 7])]
    found = cost(capture.from_proto(graph(nodes, image, outputs, {"w": w, "m": m, "one": one, "zero": zero})))
    assert {name: c.macs for name, c in found.nodes.items()} == {
        "conv": 2 * 2 * 3 * 18, "qconv": 2 * 2 * 3 * 18, "matmul": 6 * 5 * 7, "qmatmul": 6 * 5 * 7,
    }  # fmt: skip


@pytest.mark.parametrize(("transposed", "shape"), [(0, [6, 5]), (1, [5, 6])])
def test_gemm_sums_over_the_inner_axis(transposed, shape):
    nodes = [helper.make_node("Gemm", ["a", "w"], ["y"], "gemm", transA=transposed)]
    model = graph(nodes, [("a", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, [6, 7])],
                  {"w": np.zeros((5, 7), np.float32)})  # fmt: skip
    assert cost(capture.from_proto(model)).total == Cost(6 * 5 * 7, 35, 140)


def test_integer_weights_are_parameters_and_their_scales_are_not():
    net = Net("coded")
    x = net.input("x", [1, 4])
    net.weights |= {"q": np.zeros((4, 3), np.int8), "scale": np.ones(3, np.float32), "zero": np.zeros(3, np.int8)}
    w = net.node("DequantizeLinear", "q", "scale", "zero", name="dq", axis=1)
    net.output(net.node("MatMul", x, w, name="mm"), [1, 3])
    assert cost(capture.from_proto(net.model())).total == Cost(12, 12, 12 + 4 * 3 + 3)


def test_constants_in_the_graph_count_too():
    net = Net("constants")
    x = net.input("x", [1, 4])
    stored = net.node("Constant", name="stored", value=numpy_helper.from_array(np.ones((4, 3), np.float32)))
    shape = net.weight("shape", np.array([3, 2], np.int64))
    made = net.node("ConstantOfShape", shape, name="made")
    net.output(net.node("MatMul", net.node("MatMul", x, stored, name="a"), made, name="b"), [1, 2])
    found = cost(capture.from_proto(net.model()))
    assert found.nodes["node_stored"] == Cost(0, 12, 48)
    assert found.nodes["node_made"] == Cost(0, 6, 16)  # made at run time: no bytes but its shape's
    assert found.total.macs == 12 + 6


# The numbers of torchvision are those of its table of pre-trained weights (GFLOPS, which it counts as multiply-adds,
# to two digits, and num_params); running means and variances of batch norm, which it does not count, are added here.
PUBLISHED = {
    # He et al. 2016 say 19.6 G for VGG-19; torchvision VGG19_Weights: 19.63, 143667240 parameters
    "light_vgg19": (19.63e9, 143_667_240, 0),
    # torchvision ResNet50_Weights: 4.09, 25557032 parameters (strides on the 3 x 3 convolutions)
    "light_resnet50": (4.09e9, 25_557_032, 2 * 26_560),
    # torchvision DenseNet121_Weights: 2.83, 7978856 parameters
    "light_densenet121": (2.83e9, 7_978_856, 2 * 83_648),
    # torchvision SqueezeNet1_1_Weights: 0.35, 1235496 parameters
    "light_squeezenet": (0.35e9, 1_235_496, 0),
    # Sze et al., "Efficient Processing of Deep Neural Networks", Proc. IEEE 105 (2017), table II: 1.43 G, 7 M
    "light_inception_v1": (1.43e9, 7_000_000, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    macs, parameters, statistics = PUBLISHED[name]
    found = cost(capture.load(LIGHT / f"{name}.onnx")).total
    assert found.macs == pytest.approx(macs, abs=0.006e9)  # two digits were published
    exact = name != "light_inception_v1"  # published in millions
    assert found.parameters - statistics == (parameters if exact else pytest.approx(parameters, rel=0.01))


def test_alexnet_by_hand():
    """Krizhevsky et al. 2012 with two groups, at 224 x 224 without padding: 54 x 54 after the first layer."""
    convolutions = [(96, 54, 3 * 121), (256, 26, 48 * 25), (384, 12, 256 * 9), (384, 12, 192 * 9), (256, 12, 192 * 9)]
    dense = [(256 * 36, 4096), (4096, 4096), (4096, 1000)]
    macs = sum(d * side**2 * patch for d, side, patch in convolutions) + sum(n * d for n, d in dense)
    parameters = sum(d * (patch + 1) for d, _, patch in convolutions) + sum((n + 1) * d for n, d in dense)
    found = cost(capture.load(LIGHT / "light_bvlc_alexnet.onnx")).total
    assert (found.macs, found.parameters) == (macs, parameters)


@pytest.mark.models
@pytest.mark.skipif("EFFC_DATA" not in os.environ, reason="EFFC_DATA is not set to the folder of models and data")
def test_resnet20_has_its_published_cost():
    """He et al. 2016, section 4.2: 0.27 M parameters; 40.55 M multiply-adds by the sum over its layers."""
    by_hand = 1024 * 16 * 27 + 6 * 1024 * 16 * 144
    by_hand += 256 * 32 * 144 + 5 * 256 * 32 * 288 + 64 * 64 * 288 + 5 * 64 * 64 * 576 + 640
    found = cost(capture.load(Path(os.environ["EFFC_DATA"], "models", "resnet20-cifar10.onnx"))).total
    assert found.macs == by_hand == pytest.approx(40.55e6, abs=0.005e6)
    assert found.parameters == pytest.approx(0.27e6, abs=0.005e6)
