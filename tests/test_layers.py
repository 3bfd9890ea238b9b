"""effc.layers: mean inputs against windows taken one by one, and against the mean output of onnxruntime."""

import itertools
import re

import numpy as np
import onnx_ir as ir
import pytest

from effc.capture import from_proto
from effc.layers import bias_array, bias_value, constant_weight, mean_inputs, mean_patch, output_axis, pads
from tests.networks import Net, run

FORMS = {
    "plain": {},
    "padded": {"pads": [1, 1, 1, 1]},
    "lopsided": {"pads": [2, 0, 1, 3]},
    "strided": {"strides": [2, 3], "pads": [1, 1, 1, 1]},
    "dilated": {"dilations": [2, 3], "pads": [2, 3, 2, 3]},
    "dilated and strided": {"dilations": [2, 1], "strides": [3, 2], "pads": [0, 1, 2, 0]},
    "same upper": {"auto_pad": "SAME_UPPER"},
    "same upper strided": {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
    "same lower": {"auto_pad": "SAME_LOWER", "strides": [3, 2]},
    "valid": {"auto_pad": "VALID", "strides": [2, 1]},
}
ALONG = {
    "line": {"pads": [3, 1]},
    "line strided": {"strides": [3], "dilations": [2]},
    "line same lower": {"auto_pad": "SAME_LOWER", "strides": [2]},
}


def convolution(form: str, kernel: tuple[int, ...], group: int, bias: bool = True) -> Net:
    net = Net(f"{form} {kernel} {group}")
    size = (11, 10)[: len(kernel)]
    x = net.input("x", ["N", 6, *size])
    net.conv(x, 6, 12, kernel, name="conv", group=group, bias=bias, **(FORMS | ALONG)[form])
    net.output("conv")
    return net


CASES = [
    *itertools.product(FORMS, [(3, 3), (4, 2), (1, 1)], [1, 3, 6]),
    *itertools.product(ALONG, [(5,), (2,)], [1, 6]),
]


@pytest.mark.parametrize(("form", "kernel", "group"), CASES)
def test_products_with_the_mean_inputs_sum_up_to_the_mean_output(form, kernel, group):
    net = convolution(form, kernel, group)
    proto = net.model()
    x = (net.rng.standard_normal((5, 6, *(11, 10)[: len(kernel)])) + 1).astype(np.float32)
    node = from_proto(proto).node("node_conv")
    weight = net.weights["conv.weight"]
    met = mean_inputs(node, x.mean(axis=0, dtype=np.float64), weight)
    assert met.shape == weight.shape
    output = run(proto, {"x": x})["conv"].astype(np.float64)
    expected = output.mean(axis=(0, *range(2, output.ndim)))
    found = (weight * met).sum(axis=tuple(range(1, weight.ndim))) + net.weights["conv.bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(output).max())


@pytest.mark.parametrize(
    ("attributes", "around"),
    [
        ({"pads": [1, 2, 0, 1]}, (1, 2, 0, 1)),
        ({"pads": [1, 2, 0, 1], "strides": [2, 3], "dilations": [3, 1]}, (1, 2, 0, 1)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 1]}, (0, 1, 1, 1)),  # rows: 8 to 4 by 3, one short; columns: 7 to 7
        ({"auto_pad": "SAME_LOWER", "strides": [2, 1]}, (1, 1, 0, 1)),
        ({"auto_pad": "SAME_UPPER", "dilations": [2, 1]}, (2, 1, 2, 1)),
        ({"auto_pad": "VALID", "strides": [2, 1]}, (0, 0, 0, 0)),
        ({}, (0, 0, 0, 0)),
    ],
)
def test_each_tap_meets_the_mean_over_its_windows(attributes, around):
    """Window by window, over the padded input."""
    net = Net(f"patch {attributes}")
    net.output(net.conv(net.input("x", [1, 2, 8, 7]), 2, 1, 3, name="conv", **attributes))
    node = from_proto(net.model()).node("node_conv")
    mean = net.rng.standard_normal((2, 8, 7))
    assert tuple(pads(node, (8, 7), (3, 3))) == around
    top, left, bottom, right = around
    padded = np.zeros((2, 8 + top + bottom, 7 + left + right))
    padded[:, top : top + 8, left : left + 7] = mean
    (s, t), (d, e) = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    windows = [
        padded[:, i : i + 2 * d + 1 : d, j : j + 2 * e + 1 : e]
        for i in range(0, padded.shape[1] - 2 * d, s)
        for j in range(0, padded.shape[2] - 2 * e, t)
    ]
    expected = np.mean(windows, axis=0).reshape(2, 9)
    np.testing.assert_allclose(mean_patch(node, mean, (3, 3)), expected, atol=1e-12)


def dense(op: str, bias: np.ndarray | None = None, **attributes) -> tuple[Net, str]:
    net = Net(f"{op} {attributes}")
    shape = (5, 7) if attributes.get("transB") else (7, 5)
    inputs = [net.input("x", ["N", 7]), net.weight("w", net.random(*shape))]
    if bias is not None:
        inputs.append(net.weight("c", bias.astype(np.float32)))
    net.output(net.node(op, *inputs, name="fc", **attributes))
    return net, "node_fc"


@pytest.mark.parametrize(("op", "rank", "axis"), [("Conv", 4, 0), ("ConvTranspose", 4, 1), ("MatMul", 3, 2)])
def test_the_axis_of_outputs(op, rank, axis):
    assert output_axis(ir.Node("", op, []), rank) == axis


@pytest.mark.parametrize(("op", "attributes"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_mean_inputs_of_dense_layers(op, attributes):
    net, name = dense(op, **attributes)
    x = (net.rng.standard_normal((9, 7)) + 1).astype(np.float32)
    proto = net.model()
    node = from_proto(proto).node(name)
    weight = net.weights["w"]
    axis = output_axis(node, 2)
    assert axis == (0 if attributes else 1)
    met = mean_inputs(node, x.mean(axis=0, dtype=np.float64), weight)
    assert met.shape == weight.shape
    expected = run(proto, {"x": x})["fc"].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose((weight * met).sum(axis=1 - axis), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (1, 1)])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_a_bias_in_all_its_forms(shape, beta):
    rng = np.random.default_rng(0)
    bias = np.asarray(rng.standard_normal(shape), np.float32)
    net, name = dense("Gemm", bias, beta=beta)
    model = from_proto(net.model())
    found = bias_array(model, model.node(name), 5)
    x = np.zeros((1, 7), np.float32)
    assert found is not None
    np.testing.assert_allclose(found, run(net.model(), {"x": x})["fc"][0], atol=1e-6)
    assert found.shape == (5,) and found.dtype == np.float32


@pytest.mark.parametrize("shape", [(5, 1), (2, 5), (4, 5)])
def test_third_operands_that_are_no_bias(shape):
    net, name = dense("Gemm", np.zeros(shape))
    model = from_proto(net.model())
    with pytest.raises(ValueError, match=re.escape(f"its third operand of shape {shape} is no bias along 5 outputs")):
        bias_array(model, model.node(name), 5)


def test_a_bias_that_is_computed():
    net = Net("computed")
    x, c = net.input("x", ["N", 7]), net.input("c", [5])
    net.output(net.node("Gemm", x, net.weight("w", net.random(7, 5)), c, name="fc"))
    model = from_proto(net.model())
    node = model.node("node_fc")
    assert bias_value(node).name == "c"
    with pytest.raises(ValueError, match="its bias is no constant"):
        bias_array(model, node, 5)


def test_layers_without_a_bias():
    for net, name in (dense("Gemm"), dense("MatMul"), (convolution("plain", (3, 3), 1, bias=False), "node_conv")):
        model = from_proto(net.model())
        assert bias_value(model.node(name)) is None and bias_array(model, model.node(name), 5) is None


def test_weights_that_are_constants_and_those_that_are_not():
    net, name = dense("MatMul")
    node = from_proto(net.model()).node(name)
    np.testing.assert_array_equal(constant_weight(node), net.weights["w"])
    net = Net("product")
    net.output(net.node("MatMul", net.input("x", ["N", 7]), net.input("y", [7, 5]), name="mm"))
    net.output(net.relu("x"))
    model = from_proto(net.model())
    assert constant_weight(model.node("node_mm")) is None and constant_weight(model.graph[1]) is None
