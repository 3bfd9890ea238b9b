"""effc.passes._sites: what stands behind a layer, and which layers are none."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from effc.capture import from_proto
from effc.model import Model
from effc.passes._sites import Site, find, layers
from tests import networks
from tests.networks import Net


def found(proto: onnx.ModelProto, name: str) -> tuple[Model, Site | str]:
    model = from_proto(proto)
    return model, find(model, model.node(f"node_{name}"), model.shapes(2))


def site_of(proto: onnx.ModelProto, name: str) -> tuple[Model, Site]:
    model, site = found(proto, name)
    assert isinstance(site, Site), site
    return model, site


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}


def normalised(proto: onnx.ModelProto, norm: str) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta, mean, var = (
        weights(proto)[f"{norm}.{key}"].astype(np.float64) for key in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(var + 1e-5)
    return scale, beta - scale * mean


def behind(site: Site) -> tuple[str, str | None, float, float]:
    return site.end, site.added, site.low, site.high


def test_norm_sum_and_relu_behind_a_convolution() -> None:
    proto = networks.residual()
    _, site = site_of(proto, "b1_conv2")
    scale, shift = normalised(proto, "b1_bn2")
    np.testing.assert_allclose(site.scale, scale, rtol=1e-6)
    np.testing.assert_allclose(site.shift, shift, rtol=1e-6, atol=1e-7)
    expected = weights(proto)["b1_conv2.weight"] * scale[:, None, None, None]
    np.testing.assert_allclose(site.layer.weight, expected, rtol=1e-6)
    assert site.layer.weight.dtype == np.float64
    assert (site.name, site.input, site.output) == ("node_b1_conv2", "relu5", "b1_conv2")
    assert behind(site) == ("b1_add", "relu2", 0, np.inf)
    assert (site.bias, site.dense, site.spatial, site.biased) == (None, False, 2, True)


def test_of_two_summed_layers_each_has_the_other_added() -> None:
    proto = networks.residual()
    assert behind(site_of(proto, "b2_conv2")[1]) == ("b2_add", "b2_bn3", 0, np.inf)
    assert behind(site_of(proto, "b2_conv3")[1]) == ("b2_add", "b2_bn2", 0, np.inf)


def test_clip_behind_a_convolution_with_strides_and_pads() -> None:
    _, site = site_of(networks.depthwise(), "conv")
    assert behind(site) == ("bn", None, 0, 6)
    assert (site.layer.strides, site.layer.pads, site.layer.kernel) == ((2, 2), (1, 1, 1, 1), (3, 3))


def test_without_a_norm_nothing_is_scaled() -> None:
    proto = networks.branches()
    _, site = site_of(proto, "last")
    assert behind(site) == ("last", None, 0, np.inf)
    assert site.scale.tolist() == [1] * 12 and site.shift.tolist() == [0] * 12
    np.testing.assert_array_equal(site.layer.weight, weights(proto)["last.weight"])
    np.testing.assert_array_equal(site.bias, weights(proto)["last.bias"])
    _, site = site_of(proto, "dense")
    assert behind(site) == ("mid_bn", None, -np.inf, np.inf)


def test_one_spatial_axis_becomes_the_horizontal_one() -> None:
    proto = networks.sound()
    _, site = site_of(proto, "conv2")
    assert (site.layer.dilations, site.layer.strides, site.layer.pads) == ((1, 2), (1, 1), (0, 2, 0, 2))
    scale, _ = normalised(proto, "bn2")
    expected = weights(proto)["conv2.weight"][:, :, None, :] * scale[:, None, None, None]
    np.testing.assert_allclose(site.layer.weight, expected, rtol=1e-6)
    assert site.spatial == 1


def gemm(transposed: int, bias: bool = True, alpha: float = 0.5, beta: float = -3.0) -> onnx.ModelProto:
    net = Net("gemm")
    x = net.input("input", ["N", 6])
    inputs = [x, net.weight("w", net.random(*((9, 6) if transposed else (6, 9))))]
    inputs += [net.weight("b", net.random(9))] * bias
    y = net.node("Gemm", *inputs, name="layer", transB=transposed, alpha=alpha, beta=beta)
    net.output(net.relu(y), ["N", 9])
    return net.model()


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemms_alpha_and_beta_are_counted_in(transposed: int) -> None:
    proto = gemm(transposed)
    _, site = site_of(proto, "layer")
    w, b = weights(proto)["w"], weights(proto)["b"]
    np.testing.assert_allclose(site.layer.matrix, 0.5 * (w if transposed else w.T), rtol=1e-7)
    assert site.bias is not None
    np.testing.assert_allclose(site.bias, -3 * b, rtol=1e-6)
    assert (site.dense, site.biased, behind(site)) == (True, True, ("layer", None, 0, np.inf))


def test_a_matmul_is_a_dense_layer_that_takes_no_bias() -> None:
    proto = networks.mlp()
    _, site = site_of(proto, "fc2")
    scale, _ = normalised(proto, "bn2")
    np.testing.assert_allclose(site.layer.matrix, weights(proto)["fc2.weight"].T * scale[:, None], rtol=1e-6)
    assert (site.dense, site.biased, site.bias, behind(site)) == (True, False, None, ("bn2", None, 0, np.inf))


def test_a_constant_added_behind_a_matmul_is_its_bias() -> None:
    proto = networks.mlp()
    _, site = site_of(proto, "fc3")
    assert site.bias is not None and site.biased
    np.testing.assert_array_equal(site.bias, weights(proto)["fc3.bias"])
    assert (site.output, behind(site)) == ("fc3", ("bn3", None, 0, np.inf))


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (1, 1, 1, 6), (4, 6)])
def test_other_constants_added_behind_a_matmul_are_none(shape: tuple[int, ...]) -> None:
    """A scalar, one number a row, one that adds an axis, one that is a matrix."""
    net = Net("sequence")
    x = net.node("MatMul", net.input("input", ["N", 4, 8]), net.weight("w", net.random(8, 6)), name="layer")
    net.output(net.node("Add", x, net.weight("b", net.random(*shape))))
    _, site = site_of(net.model(), "layer")
    assert (site.bias, site.biased, site.end) == (None, False, "layer")


def behind_conv(write: Callable[[Net, str], Sequence[str]], norm: bool = False) -> tuple[str, str | None, float, float]:
    net = Net("behind")
    x = net.conv(net.relu(net.input("input", ["N", 4, 6, 6])), 4, 4, 3, name="layer", pads=[1] * 4)
    x = net.norm(x, 4, name="norm") if norm else x
    for name in write(net, x):
        net.output(name)
    return behind(site_of(net.model(), "layer")[1])


FREE = (-np.inf, np.inf)


def test_what_others_read_as_well_is_not_followed() -> None:
    assert behind_conv(lambda n, x: [n.node("Add", n.relu(x), x)]) == ("layer", None, *FREE)
    assert behind_conv(lambda n, x: [n.norm(x, 4, name="bn"), n.node("Neg", x)]) == ("layer", None, *FREE)
    assert behind_conv(lambda n, x: [n.node("Add", x, "relu0"), n.node("Neg", x)], norm=True) == ("norm", None, *FREE)
    assert behind_conv(lambda n, x: [n.norm(x, 4, name="bn"), x]) == ("layer", None, *FREE)
    assert behind_conv(lambda n, x: [n.relu(x), x]) == ("layer", None, *FREE)


def test_sums_of_other_kinds_are_not_followed() -> None:
    assert behind_conv(lambda n, x: [n.node("Add", x, x)]) == ("layer", None, *FREE)
    assert behind_conv(lambda n, x: [n.node("Add", x, "input")]) == ("layer", None, *FREE)
    pooled = behind_conv(lambda n, x: [n.node("Add", x, n.node("GlobalAveragePool", "relu0"))])
    assert pooled == ("layer", None, *FREE)
    assert behind_conv(lambda n, x: [n.node("Sub", x, "relu0")]) == ("layer", None, *FREE)


def test_activations_are_those_of_all_readers() -> None:
    assert behind_conv(lambda n, x: [n.relu(x), n.relu(x)]) == ("layer", None, 0, np.inf)
    assert behind_conv(lambda n, x: [n.relu(n.node("Add", "relu0", x, name="sum"))]) == ("sum", "relu0", 0, np.inf)
    low = behind_conv(lambda n, x: [n.node("Clip", x, n.weight("low", np.float32(-2)))], norm=True)
    assert low == ("norm", None, -2, np.inf)
    assert behind_conv(lambda n, x: [n.node("LeakyRelu", x)]) == ("layer", None, *FREE)


def lone(op: str, x: Sequence[Any], weight: Sequence[int], *more: str, **attributes: Any) -> onnx.ModelProto:
    net = Net("lone")
    inputs = [net.input("input", x), net.weight("w", net.random(*weight)), *more]
    if "rows" in more:
        net.weight("rows", net.random(6, 8))
    if "computed" in more:
        net.node("Neg", net.weight("long", net.random(8)), name="computed")
    net.output(net.node(op, *inputs, name="layer", **attributes))
    return net.model()


def made(by: str) -> onnx.ModelProto:
    """A layer whose weight is computed, or an input."""
    net = Net("made")
    net.input("input", ["N", 6])
    if by == "DequantizeLinear":
        codes = net.weight("codes", np.arange(48, dtype=np.uint8).reshape(6, 8))
        weight = net.node(by, codes, net.weight("step", np.float32(0.1)), net.weight("zero", np.uint8(24)))
    elif by == "input":
        weight = net.input("w", [6, 8])
    else:
        weight = net.node(by, net.weight("w", net.random(8, 6)))
    net.output(net.node("MatMul", "input", weight, name="layer"))
    return net.model()


def of_constant() -> onnx.ModelProto:
    net = Net("of_constant")
    y = net.linear(net.weight("fixed", net.random(2, 6)), 6, 8, name="layer")
    net.output(net.node("Add", y, net.input("input", [2, 8])), [2, 8])
    return net.model()


CODED = "its weight is made by DequantizeLinear, not a constant: split layers before their weights are encoded"
SHARED = "its weight is shared with 'node_conv_right': as two chains it would be stored twice"
DEPTHWISE = "it is depthwise: each channel has a filter of its own, and there is nothing to share"


@pytest.mark.parametrize(
    ("proto", "name", "why"),
    [
        (networks.half(), "conv1", "its weight is float16; float32 is factorised"),
        (networks.depthwise(), "grouped", "it has 4 groups; convolutions over all their inputs are factorised"),
        (networks.depthwise(), "dw", DEPTHWISE),
        (networks.two_outputs(), "conv_left", SHARED),
        (made("DequantizeLinear"), "layer", CODED),
        (made("Transpose"), "layer", "its right operand is no constant"),
        (made("input"), "layer", "its weight is an input of the graph, not a constant"),
        (lone("Conv", ["N", 2, 5, 5, 5], [3, 2, 3, 3, 3]), "layer", "it has 3 spatial axes; 1 and 2 are factorised"),
        (
            lone("Conv", ["N", 2, "H", 5], [3, 2, 3, 3], auto_pad="SAME_UPPER"),
            "layer",
            "it pads by the size of its input (auto_pad), and that is not fixed",
        ),
        (of_constant(), "layer", "its input is a constant; simplify folds it"),
        (lone("Gemm", [6, "N"], [6, 8], transA=1), "layer", "its left operand is transposed"),
        (lone("Gemm", ["N", 6], [6, 8], "computed"), "layer", "its bias is no constant"),
        (
            lone("Gemm", [6, 6], [6, 8], "rows"),
            "layer",
            "its third operand of shape (6, 8) is no bias along 8 outputs",
        ),
        (lone("MatMul", [3, 2, 6], [3, 6, 8]), "layer", "its right operand has 3 axes; matrices are factorised"),
    ],
)
def test_layers_that_are_no_sites_say_why(proto: onnx.ModelProto, name: str, why: str) -> None:
    assert found(proto, name)[1] == why


def test_layers_are_the_weighted_nodes_in_order() -> None:
    model = from_proto(networks.mlp())
    assert [node.name for node in layers(model)] == ["node_fc1", "node_fc2", "node_fc3", "node_fc4"]


def test_a_norm_over_other_channels_than_the_layers_is_not_followed() -> None:
    """Behind a MatMul over [N, T, K] a batch norm goes by T."""
    net = Net("tokens")
    y = net.node("MatMul", net.input("x", ["N", 5, 6]), net.weight("w", np.ones((6, 5), np.float32)), name="layer")
    net.output(net.norm(y, 5, name="bn"), ["N", 5, 5])
    _, site = site_of(net.model(), "layer")
    assert site.end == "layer" and np.all(site.scale == 1)


def test_a_weight_in_a_constant_node_is_left_to_simplify() -> None:
    net = Net("constant")
    weight = onnx.numpy_helper.from_array(np.ones((6, 5), np.float32))
    made = net.node("Constant", value=weight, name="w")
    net.output(net.node("MatMul", net.input("x", ["N", 6]), made, name="layer"), ["N", 5])
    assert found(net.model(), "layer")[1] == "its weight is made by Constant: simplify makes it a weight of the graph"
