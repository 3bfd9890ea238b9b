"""effc.passes._sites: models with chains in the place of layers, against the models they were."""

from typing import Any

import numpy as np
import onnx
import pytest

from effc import edit
from effc.capture import from_proto
from effc.layers import constant_weight
from effc.model import Model
from effc.passes._decoupled import Decoupled
from effc.passes._factors import Factors, Layer, compose
from effc.passes._filters import Filters, Filters3d
from effc.passes._separable import Separable
from effc.passes._sites import Site, find, put, stored
from tests import networks
from tests.networks import Net, distance, feeds, run

CLOSE = 1e-5  # of float32 sums in another order, relative to the largest output


def site_of(proto: onnx.ModelProto, name: str) -> tuple[Model, Site]:
    model = from_proto(proto)
    site = find(model, model.node(f"node_{name}"), model.shapes(2))
    assert isinstance(site, Site), site
    return model, site


def exact(kind: str, layer: Layer) -> Factors:
    """A chain that loses nothing."""
    kh, kw = layer.kernel
    separable = min(layer.inputs * kh, layer.outputs * kw)
    if kind == "filters":
        return Filters(layer).fit({"rank": layer.outputs})
    if kind == "filters-3d":
        return Filters3d(layer).fit({"rank": layer.outputs, "inner": separable})
    if kind == "separable":
        return Separable(layer).fit({"rank": separable})
    return Decoupled(layer).fit({"terms": min(layer.taps, layer.outputs)})


def convolution(
    x: tuple[Any, ...], kernel: tuple[int, ...], *, norm: bool = True, bias: bool = True, end: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:  # fmt: skip
    """One layer from 5 to 7 channels; with `end` its output is the graph's."""
    net = Net("convolution")
    y = net.conv(net.input("input", ["N", 5, *x]), 5, 7, kernel, name="layer", bias=bias, **attributes)
    y = net.norm(y, 7, name="norm") if norm else y
    net.output(y if end else net.relu(y))
    return net.model()


def dense(op: str, x: tuple[Any, ...], *, bias: bool = False, norm: bool = False, **attributes: Any) -> onnx.ModelProto:
    net = Net("dense")
    shape = (7, 6) if attributes.get("transB") else (6, 7)
    inputs = [net.input("input", x), net.weight("w", net.random(*shape))]
    inputs += [net.weight("b", net.random(7))] * bias
    y = net.node(op, *inputs, name="layer", **attributes)
    net.output(net.relu(net.norm(y, 7, name="norm") if norm else y))
    return net.model()


ODD = {"strides": [2, 1], "dilations": [1, 2], "pads": [1, 2, 0, 3]}
CONVOLUTIONS = {
    "with all": convolution((11, 12), (3, 3), **ODD),
    "without bias": convolution((11, 12), (3, 2), bias=False, **ODD),
    "alone": convolution((11, 12), (3, 3), norm=False, **ODD),
    "an output": convolution((11, 12), (3, 3), norm=False, end=True, **ODD),
    "an output behind a norm": convolution((11, 12), (3, 3), end=True, **ODD),
    "of dynamic size": convolution(("H", "W"), (3, 3), **ODD),
    "same, upper": convolution((11, 12), (3, 4), auto_pad="SAME_UPPER", strides=[2, 1]),
    "same, lower": convolution((11, 12), (3, 4), auto_pad="SAME_LOWER", strides=[2, 1]),
    "valid": convolution((11, 12), (3, 3), auto_pad="VALID"),
    "one axis": convolution((17,), (5,), strides=[3], dilations=[2], pads=[4, 1]),
    "one dynamic axis": convolution(("T",), (3,), norm=False, pads=[1, 0]),
}
DENSE = {
    "gemm": dense("Gemm", ("N", 6), bias=True, alpha=0.5, beta=-2.0),
    "gemm, transposed": dense("Gemm", ("N", 6), bias=True, norm=True, transB=1, alpha=0.5),
    "gemm without bias": dense("Gemm", ("N", 6), transB=1, alpha=-1.5),
    "matmul": dense("MatMul", ("N", 6), norm=True),
    "matmul over a sequence": dense("MatMul", ("N", "T", 6)),
}


def put_in(proto: onnx.ModelProto, kind: str) -> Model:
    model, site = site_of(proto, "layer")
    put(model, site, exact(kind, site.layer), None)
    return from_proto(model.proto())  # checked


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("kind", "length"), [("filters", 2), ("filters-3d", 3), ("separable", 2), ("depthwise", 2)])
def test_an_exact_chain_changes_nothing(name: str, kind: str, length: int) -> None:
    proto = CONVOLUTIONS[name]
    model = put_in(proto, kind)
    assert [node.name for node in model.nodes("Conv")] == [f"node_layer_{letter}" for letter in "abc"[:length]]
    assert distance(run(proto), run(model.proto(), feeds(proto))) <= CLOSE


@pytest.mark.parametrize("name", DENSE)
def test_an_exact_chain_of_dense_layers_changes_nothing(name: str) -> None:
    proto = DENSE[name]
    model = put_in(proto, "filters")
    last = "Gemm" if name in ("gemm", "gemm, transposed") else "MatMul"
    assert [node.op_type for node in model.nodes("Gemm", "MatMul")] == ["MatMul", last]
    assert distance(run(proto), run(model.proto(), feeds(proto))) <= CLOSE


def test_a_poorer_chain_does_what_its_kernel_does() -> None:
    proto = CONVOLUTIONS["with all"]
    model, site = site_of(proto, "layer")
    chain = Decoupled(site.layer).fit({"terms": 1})
    other, _ = site_of(proto, "layer")
    edit.set_initializer(other, other.value("layer.weight"), stored(site, compose(chain)))
    put(model, site, chain, None)
    assert distance(run(other.proto(), feeds(proto)), run(model.proto(), feeds(proto))) <= CLOSE
    assert distance(run(proto), run(model.proto(), feeds(proto))) > 0.01


@pytest.mark.parametrize("name", ["with all", "without bias", "alone", "one axis"])
def test_a_bias_is_that_of_what_stands_behind_the_norm(name: str) -> None:
    """Its reference: the model's output before the activation, its own bias taken off."""
    proto = CONVOLUTIONS[name]
    model, site = site_of(proto, "layer")
    bias = np.random.default_rng(3).normal(size=7)
    put(model, site, exact("filters", site.layer), bias)
    before, after = onnx.ModelProto(), model.proto()
    before.CopyFrom(proto)
    for each in (before, after):
        each.graph.output.append(onnx.helper.make_empty_tensor_value_info(site.end))
    was, found = run(before, feeds(proto))[site.end], run(after, feeds(proto))[site.end]
    own = site.shift + (0 if site.bias is None else site.scale * site.bias)
    expected = was + (bias - own).reshape(7, *[1] * (was.ndim - 2))
    np.testing.assert_allclose(found, expected, atol=CLOSE * np.abs(expected).max())


def test_a_layer_that_had_no_bias_gets_one() -> None:
    proto = DENSE["gemm without bias"]
    model, site = site_of(proto, "layer")
    put(model, site, exact("filters", site.layer), np.arange(7.0))
    gemm = next(model.nodes("Gemm"))
    np.testing.assert_array_equal(model.constant(gemm.inputs[2]), np.arange(7, dtype=np.float32))
    without = np.maximum(feeds(proto)["input"] @ site.layer.matrix.T.astype(np.float32) + np.arange(7), 0)
    found = run(model.proto(), feeds(proto))
    np.testing.assert_allclose(next(iter(found.values())), without, rtol=1e-5, atol=1e-5)


def added_behind(shared: bool, shape: tuple[int, ...], end: bool) -> onnx.ModelProto:
    """A MatMul and what adds its bias."""
    net = Net("added")
    b = net.weight("b", net.random(*shape))
    y = net.node("MatMul", net.input("input", ["N", 5, 6]), net.weight("w", net.random(6, 7)), name="layer")
    y = net.node("Add", b, y, name="add")
    y = net.node("Mul", y, b) if shared else y
    net.output(y if end else net.relu(y))
    return net.model()


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 1, 7)])
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_added_behind_a_matmul_takes_the_bias(shared: bool, shape: tuple[int, ...], end: bool) -> None:
    """Other readers of the constant, and its shape, stay as they were."""
    proto = added_behind(shared, shape, end)
    model, site = site_of(proto, "layer")
    bias = np.random.default_rng(3).normal(size=7)
    put(model, site, exact("filters", site.layer), bias)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    made = feeds(proto)["input"] @ weights["w"] + bias
    made = made * weights["b"] if shared else made
    found = next(iter(run(from_proto(model.proto()).proto(), feeds(proto)).values()))
    np.testing.assert_allclose(found, made if end else np.maximum(made, 0), rtol=1e-5, atol=1e-5)
    assert model.constant(model.node("node_add").inputs[0]).shape == shape
    assert [node.op_type for node in model.nodes("MatMul", "Gemm", "Add")] == ["MatMul", "MatMul", "Add"]


def test_an_output_of_the_graph_keeps_its_name_and_its_place() -> None:
    proto = CONVOLUTIONS["an output"]
    model, site = site_of(proto, "layer")
    nodes = put(model, site, exact("filters-3d", site.layer), None)
    assert [value.name for value in model.graph.outputs] == ["layer"]
    assert [node.op_type for node in model.graph] == ["Conv"] * 3
    assert nodes[-1].outputs[0] is model.graph.outputs[0]


def test_an_output_that_is_read_inside_as_well_is_the_chains_in_both_places() -> None:
    net = Net("both")
    x = net.conv(net.input("input", ["N", 3, 6, 6]), 3, 4, 3, name="layer", bias=True)
    net.output(x)
    net.output(net.relu(x))
    proto = net.model()
    model = put_in(proto, "filters")
    assert [info.name for info in model.outputs] == ["layer", "relu1"]
    assert distance(run(proto), run(model.proto(), feeds(proto))) <= CLOSE


@pytest.mark.parametrize("network", ["plain", "residual", "branches", "mlp", "transformer", "sound"])
def test_all_layers_of_a_network_at_once(network: str) -> None:
    proto = networks.NETWORKS[network]()
    model = from_proto(proto)
    nodes, shapes = list(model.nodes("Conv", "Gemm", "MatMul")), model.shapes(2)
    sites = [site for node in nodes if isinstance(site := find(model, node, shapes), Site)]
    for site in sites:
        put(model, site, exact("filters", site.layer), None)
    assert len(sites) >= 3 and len(list(model.graph)) == len(proto.graph.node) + len(sites)
    assert distance(run(proto), run(from_proto(model.proto()).proto(), feeds(proto))) <= CLOSE


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *DENSE])
def test_a_layers_own_weight_is_stored_as_it_was(name: str) -> None:
    _, site = site_of((CONVOLUTIONS | DENSE)[name], "layer")
    weight, found = constant_weight(site.node), stored(site, site.layer.weight)
    assert weight is not None and found.dtype == weight.dtype
    np.testing.assert_allclose(found, weight, rtol=1e-6)
