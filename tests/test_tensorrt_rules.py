"""TensorRT's rules: each with graphs that break it, told by its number, and a twin beside each that keeps them all."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc import registry
from effc.capture import as_written
from effc.errors import BadInput
from effc.model import Model
from effc.runtime import Finding
from tests import networks
from tests.networks import Net

TENSORRT = registry.checker("tensorrt")


def found(proto: onnx.ModelProto) -> tuple[Finding, ...]:
    """Findings of a message as it stands: it need not be one that ONNX's own checker takes."""
    return TENSORRT.check(Model(ir.from_proto(proto), "drawn"))


def told(proto: onnx.ModelProto, *, error: bool | None = None) -> set[int]:
    return {f.number for f in found(proto) if error in (None, f.error)}


class Codes(Net):
    """A network with Q/DQ, drawn by hand."""

    def coded(self, x: str, name: str, scale=0.1, zero=None, **attributes) -> str:
        """Q and DQ behind a tensor."""
        zero = np.int8(0) if zero is None else zero
        inputs = [self.weight(f"{name}_scale", np.asarray(scale, np.float32)), self.weight(f"{name}_zero", zero)]
        codes = self.node("QuantizeLinear", x, *inputs, name=f"{name}_q", **attributes)
        return self.node("DequantizeLinear", codes, *inputs, name=f"{name}_dq", **attributes)

    def held(self, name: str, codes: np.ndarray, scale: np.ndarray | float, **attributes) -> str:
        """DQ over constant codes; zero points of 0."""
        scale = np.asarray(scale, np.float32)
        inputs = [self.weight(f"{name}_codes", codes), self.weight(f"{name}_scale", scale)]
        zeros = self.weight(f"{name}_zeros", np.zeros(scale.shape, codes.dtype))
        return self.node("DequantizeLinear", *inputs, zeros, name=f"{name}_dq", **attributes)

    def codes(self, *shape: int) -> np.ndarray:
        return self.rng.integers(-127, 128, shape).astype(np.int8)

    def layer(self, x: str, name: str, n: int = 16, d: int = 16, bias: str = "", k: int = 1, **changes) -> str:
        """A convolution on decoded codes of a decoded tensor."""
        scale = changes.pop("scale", np.full(d, 0.01))
        weight = self.held(name, changes.pop("weight", self.codes(d, n, k, k)), scale, axis=changes.pop("axis", 0))
        return self.node("Conv", x, weight, *([bias] if bias else []), name=name, **changes)


def start(opset: int = 17, channels: int = 16) -> tuple[Codes, str]:
    net = Codes("rules", opset)
    return net, net.input("x", ["N", channels, 8, 8])


def end(net: Codes, value: str) -> onnx.ModelProto:
    net.output(value)
    return net.model()


def chain(opset: int = 17, bias: np.ndarray | None = None, **codes) -> onnx.ModelProto:
    net, x = start(opset)
    held = net.weight("bias", bias) if bias is not None else ""
    return end(net, net.layer(net.coded(x, "x", **codes), "conv", bias=held))


def weights(**changes) -> onnx.ModelProto:
    net, x = start()
    return end(net, net.layer(net.coded(x, "x"), "conv", **changes))


def transposed(axis: int, count: int) -> onnx.ModelProto:
    net, x = start()
    weight = net.held("w", net.codes(16, 32, 2, 2), np.full(count, 0.01), axis=axis)
    return end(net, net.node("ConvTranspose", net.coded(x, "x"), weight, name="up", strides=[2, 2]))


def dense(op: str, axis: int, shape=(32, 48), turned: bool = False, **attributes) -> onnx.ModelProto:
    net = Codes("dense")
    x = net.coded(net.input("x", ["N", 32]), "x")
    weight = net.held("w", net.codes(*shape), np.full(shape[axis], 0.01), axis=axis)
    if turned:
        weight = net.node("Transpose", weight, perm=[1, 0], name="turn")
    return end(net, net.node(op, x, weight, name="fc", **attributes))


def one_factor(*, activation: bool, weight: bool) -> onnx.ModelProto:
    net, x = start()
    x = net.coded(x, "x") if activation else x
    if weight:
        return end(net, net.layer(x, "conv"))
    return end(net, net.node("Conv", x, net.weight("w", net.random(16, 16, 1, 1)), name="conv"))


def product(left: bool, right: bool) -> onnx.ModelProto:
    """Of two activations, as in attention."""
    net = Codes("product")
    factors = [net.input("a", ["N", 32, 32]), net.input("b", ["N", 32, 32])]
    factors = [net.coded(v, v) if wanted else v for v, wanted in zip(factors, (left, right), strict=True)]
    return end(net, net.node("MatMul", *factors, name="scores"))


def output(behind: bool) -> onnx.ModelProto:
    """Q/DQ behind the last layer, whose codes nobody computes on; or a layer does."""
    net, x = start()
    y = net.coded(net.relu(net.layer(net.coded(x, "x"), "conv")), "y")
    return end(net, net.layer(y, "next") if behind else net.node("Softmax", y, axis=1))


def residual(shortcut: bool, between: bool) -> onnx.ModelProto:
    net, x = start()
    x = net.coded(x, "x")
    y = net.layer(x, "conv")
    other = x if shortcut else net.node("Sigmoid", "x", name="gate")
    y = net.node("Add", net.coded(y, "y") if between else y, other, name="add")
    return end(net, net.layer(net.coded(net.relu(y), "sum"), "next"))


def projection(coded: bool) -> onnx.ModelProto:
    """Two convolutions that meet: one of them is the shortcut."""
    net, x = start()
    x = net.coded(x, "x")
    a, b = net.layer(x, "a"), net.layer(x, "b")
    y = net.node("Add", a, net.coded(b, "b_out") if coded else b, name="add")
    return end(net, net.layer(net.coded(y, "sum"), "next"))


def pool(behind: bool, before: bool = True) -> onnx.ModelProto:
    net, x = start()
    y = net.node("AveragePool", net.coded(x, "x") if before else x, name="pool", kernel_shape=[2, 2])
    if behind:
        return end(net, net.layer(net.coded(y, "y"), "next"))
    return end(net, net.node("Softmax", y, axis=1))


def bias(kind: str) -> onnx.ModelProto:
    net, x = start()
    held = {
        "float": lambda: net.weight("b", net.random(16)),
        "codes": lambda: net.held("b", np.arange(16, dtype=np.int32), np.full(16, 0.001), axis=0),
        "int32": lambda: net.weight("b", np.arange(16, dtype=np.int32)),
    }[kind]()
    return end(net, net.layer(net.coded(x, "x"), "conv", bias=held))


def added(*, codes: bool) -> onnx.ModelProto:
    """A bias added behind a product."""
    net = Codes("added")
    x = net.coded(net.input("x", ["N", 32]), "x")
    y = net.node("MatMul", x, net.held("w", net.codes(32, 32), np.full(32, 0.01), axis=1), name="fc")
    held = net.held("b", np.arange(32, dtype=np.int32), 0.01) if codes else net.weight("b", net.random(32))
    return end(net, net.node("Add", y, held, name="biased"))


def operator(op: str, domain: str = "") -> onnx.ModelProto:
    net = Codes("operator")
    net.nodes.append(helper.make_node(op, [net.input("x", ["N", 4], np.int32)], ["y"], name="node_odd", domain=domain))
    net.output("y", ["N", 4], np.int32)
    proto = net.model()
    if domain:
        proto.opset_import.append(helper.make_opsetid(domain, 1))
    return proto


def plain(opset: int) -> onnx.ModelProto:
    proto = networks.plain()
    proto.opset_import[0].version = opset
    return proto


def four_bits(
    size: int | None = 64,
    kind: int = TensorProto.INT4,
    op: str = "MatMul",
    opset: int = 21,
    axis: int = 0,
    k: int = 128,
) -> onnx.ModelProto:
    """Weights of 4 bits in blocks along K, floats beside."""
    net = Codes("four bits", opset)
    x = net.input("x", ["N", k])
    shape = [64, k] if op == "Gemm" else [k, 64]
    scales = [-(-d // (size or d)) if i == axis else d for i, d in enumerate(shape)]
    weight = net.weight("scale", np.full(scales if size else shape[1 - axis], 0.1, np.float32))
    attributes = {"axis": axis, "block_size": size} if size else {"axis": 1 - axis}
    w = net.node("DequantizeLinear", "codes", weight, name="w", **attributes)
    proto = end(net, net.node(op, x, w, name="fc", **({"transB": 1} if op == "Gemm" else {})))
    proto.graph.initializer.append(helper.make_tensor("codes", kind, shape, [1] * (64 * k)))
    return proto


def four_bit_convolution(kind: int) -> onnx.ModelProto:
    net, x = start(21)
    scale = net.weight("scale", np.full((16, 2, 1, 1), 0.1, np.float32))
    w = net.node("DequantizeLinear", "codes", scale, name="w", axis=1, block_size=64)
    proto = end(net, net.node("Conv", net.node("Concat", *[x] * 8, axis=1), w, name="conv"))
    proto.graph.initializer.append(helper.make_tensor("codes", kind, [16, 128, 1, 1], [1] * 2048))
    return proto


def sparse(shape=(16, 16, 3, 3), axis: int = 1, spoil: bool = False, scattered: bool = False) -> onnx.ModelProto:
    """Weights with zeros: two of every four along an axis, or as chance has it."""
    net, x = start(channels=shape[1])
    weight = net.rng.integers(1, 127, shape).astype(np.int8)
    along = np.moveaxis(weight, axis, -1)
    if scattered:
        weight[net.rng.random(shape) < 0.55] = 0
    else:
        along[..., np.arange(along.shape[-1]) % 4 < 2] = 0
    if spoil:
        weight[0, :3, 0, 0] = 7
    scale = np.full(shape[0], 0.01)
    return end(net, net.layer(net.coded(x, "x"), "conv", shape[1], shape[0], weight=weight, scale=scale))


def narrow(channels: int) -> onnx.ModelProto:
    net, x = start(channels=channels)
    return end(net, net.layer(net.coded(x, "x"), "conv", n=channels))


def siblings(second: float) -> onnx.ModelProto:
    net, x = start()
    a, b = net.layer(net.coded(x, "one", 0.1), "a"), net.layer(net.coded(x, "two", second), "b")
    return end(net, net.node("Concat", a, b, axis=1))


CHANNELS = np.full(16, 0.1, np.float32)
BROKEN: dict[str, tuple[int, Callable[[], onnx.ModelProto], Callable[[], onnx.ModelProto]]] = {
    "a zero point": (1, lambda: chain(zero=np.int8(3)), chain),
    "uint8 codes": (1, lambda: chain(zero=np.uint8(0)), chain),
    "uint8 codes around 128": (1, lambda: chain(zero=np.uint8(128)), chain),
    "a scale of 0": (1, lambda: chain(scale=0.0), lambda: chain(scale=1e-9)),
    "a negative scale": (1, lambda: weights(scale=np.full(16, -0.01)), weights),
    "an infinite scale": (1, lambda: weights(scale=np.full(16, np.inf)), weights),
    "an activation by channels": (
        2,
        lambda: chain(scale=CHANNELS, zero=np.zeros(16, np.int8), axis=1),
        lambda: chain(scale=[0.1], zero=np.zeros(1, np.int8)),
    ),
    "scales along the inputs": (2, lambda: weights(axis=1), weights),
    "scales of another number": (2, lambda: weights(scale=np.full(8, 0.01)), weights),
    "one scale for a weight": (2, lambda: weights(scale=0.01), lambda: weights(d=16)),
    "ConvTranspose along axis 0": (2, lambda: transposed(0, 16), lambda: transposed(1, 32)),
    "Gemm along K": (2, lambda: dense("Gemm", 0), lambda: dense("Gemm", 1)),
    "Gemm, transposed, along K": (
        2, lambda: dense("Gemm", 1, (48, 32), transB=1), lambda: dense("Gemm", 0, (48, 32), transB=1),
    ),
    "MatMul along K": (2, lambda: dense("MatMul", 0), lambda: dense("MatMul", 1)),
    "MatMul of a transposed weight": (
        2, lambda: dense("MatMul", 1, (48, 32), turned=True), lambda: dense("MatMul", 0, (48, 32), turned=True),
    ),
    "the activation alone": (
        3, lambda: one_factor(activation=True, weight=False), lambda: one_factor(activation=False, weight=False),
    ),
    "the weight alone": (
        3, lambda: one_factor(activation=False, weight=True), lambda: one_factor(activation=True, weight=True),
    ),
    "one factor of attention": (3, lambda: product(True, False), lambda: product(True, True)),
    "an output": (3, lambda: output(False), lambda: output(True)),
    "a shortcut in floats": (4, lambda: residual(False, False), lambda: residual(True, False)),
    "a pair between Conv and Add": (4, lambda: residual(True, True), lambda: residual(True, False)),
    "two convolutions that meet": (4, lambda: projection(False), lambda: projection(True)),
    "a pool into floats": (5, lambda: pool(False), lambda: pool(True)),
    "a bias of codes": (6, lambda: bias("codes"), lambda: bias("float")),
    "an integer bias": (6, lambda: bias("int32"), lambda: bias("float")),
    "a bias of codes behind MatMul": (6, lambda: added(codes=True), lambda: added(codes=False)),
    "QLinearConv": (7, lambda: operator("QLinearConv"), lambda: operator("Neg")),
    "MatMulInteger": (7, lambda: operator("MatMulInteger"), lambda: operator("Neg")),
    "DynamicQuantizeLinear": (7, lambda: operator("DynamicQuantizeLinear"), lambda: operator("Neg")),
    "BitShift": (7, lambda: operator("BitShift"), lambda: operator("Neg")),
    "BitwiseXor": (7, lambda: operator("BitwiseXor"), lambda: operator("Neg")),
    "another runtime's": (7, lambda: operator("QLinearAdd", "com.microsoft"), lambda: operator("Neg", "ai.onnx")),
    "opset 8": (8, lambda: plain(8), lambda: plain(9)),
    "opset 26": (8, lambda: plain(26), lambda: plain(25)),
    "channels at opset 12": (8, lambda: chain(12), lambda: chain(13)),
    "4 bits at opset 20": (8, lambda: four_bits(opset=20), four_bits),
    "blocks of 32": (9, lambda: four_bits(32), lambda: four_bits(128)),
    "4 bits without blocks": (9, lambda: four_bits(None), four_bits),
    "blocks along the outputs": (9, lambda: four_bits(axis=1), four_bits),
    "blocks of Gemm along the outputs": (9, lambda: four_bits(op="Gemm", axis=0), lambda: four_bits(op="Gemm", axis=1)),
    "unsigned 4 bits": (9, lambda: four_bits(kind=TensorProto.UINT4), four_bits),
    "2 bits": (9, lambda: four_bits(kind=TensorProto.INT2, opset=25), lambda: four_bits(opset=25)),
    "4 bits in Conv": (9, lambda: four_bit_convolution(TensorProto.INT4), four_bits),
    "three of four": (10, lambda: sparse(spoil=True), sparse),
    "two of four outputs": (10, lambda: sparse(axis=0), lambda: sparse(scattered=True)),
    "six input channels": (10, lambda: sparse((16, 6, 4, 4), axis=2), lambda: sparse((16, 16, 4, 4))),
}  # fmt: skip
ADVICE: dict[str, tuple[int, Callable[[], onnx.ModelProto], Callable[[], onnx.ModelProto]]] = {
    "an operator of nobody": (7, lambda: operator("Odd", "com.example"), lambda: operator("Odd", "trt.plugins")),
    "sparse and too few outputs": (10, lambda: sparse((12, 16, 3, 3)), sparse),
    "sparse and too few inputs": (10, lambda: sparse((16, 24, 3, 3)), lambda: sparse((16, 32, 3, 3))),
    "8 channels": (11, lambda: narrow(8), lambda: narrow(16)),
    "sibling scales": (12, lambda: siblings(0.2), lambda: siblings(0.1)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_a_rule_is_told_by_it_and_nothing_else(case):
    rule, broken, kept = BROKEN[case]
    assert told(broken(), error=True) == {rule}
    assert told(kept(), error=True) == set()


@pytest.mark.parametrize("case", ADVICE)
def test_advice_is_no_error(case):
    rule, advised, kept = ADVICE[case]
    assert rule in told(advised(), error=False) and told(advised(), error=True) == set()
    assert rule not in told(kept())


def test_each_rule_is_tried():
    from effc.backends._tensorrt_rules import RULES

    assert [rule.number for rule in RULES] == list(range(1, 13))
    assert {n for n, *_ in (*BROKEN.values(), *ADVICE.values())} == set(range(1, 13))


def test_the_page_lists_the_rules_as_the_table_has_them():
    from effc.backends._tensorrt_rules import RULES

    page = (Path(__file__).parent.parent / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ")[:3] for line in page.splitlines() if re.match(r"\| \d+ \|", line)]
    assert rows == [[str(rule.number), rule.name, rule.allowed] for rule in RULES]


@pytest.mark.parametrize("case", [*BROKEN, *ADVICE])
def test_a_finding_is_one_line_that_names_node_rule_and_remedy(case):
    _, broken, _ = (BROKEN | ADVICE)[case]
    for finding in found(broken()):
        line = str(finding)
        assert "\n" not in line and finding.node in line and len(finding.remedy) > 5 and finding.allowed in line
        assert f"rule {finding.number} ({finding.rule})" in line
        assert line.startswith("error: " if finding.error else "warning: ")


def test_a_finding_in_words():
    (one,) = found(weights(axis=1))
    assert str(one) == (
        "error: Conv 'node_conv': rule 2 (granularity): scales of weight 'conv_codes' along axis 1; activations have"
        " one scale, weights one for each output channel along the right axis: put them along axis 0"
    )


def test_a_pair_that_is_wrong_in_both_halves_is_told_once():
    assert [f.node for f in found(chain(zero=np.int8(3)))] == ["node_x_q"]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_float_networks_keep_the_rules(name):
    assert told(networks.NETWORKS[name](), error=True) == set()


def test_branches_and_functions_are_looked_into():
    net, _ = start()
    body = helper.make_graph(
        [helper.make_node("BitShift", ["x", "x"], ["made"], name="deep", direction="LEFT")],
        "branch", [], [helper.make_tensor_value_info("made", TensorProto.FLOAT, None)],
    )  # fmt: skip
    condition = net.weight("condition", np.array(True))
    proto = end(net, net.node("If", condition, then_branch=body, else_branch=body))
    assert [(f.number, f.node) for f in found(proto)] == [(7, "deep")] * 2
    swish = helper.make_function(
        "local", "Odd", ["a"], ["b"], [helper.make_node("BitwiseNot", ["a"], ["b"], name="inside")],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    proto = operator("Odd", "local")
    proto.functions.append(swish)
    assert [(f.number, f.node) for f in found(proto)] == [(7, "inside")]


def test_odd_models_are_survived():
    """No shapes, no names, scales and zero points that are computed, inputs left out, broken references."""
    net, x = start()
    scale = net.node("Abs", net.input("s", []), name="computed")
    q = net.node("QuantizeLinear", x, scale, name="q")
    y = net.node("DequantizeLinear", q, scale, "", name="dq")
    nodes = [helper.make_node("Conv", [y, "nothing", ""], ["a"]), helper.make_node("Conv", [""], ["b"])]
    nodes += [helper.make_node("Add", ["a"], ["c"]), helper.make_node("MatMul", ["a", "b"], [""])]
    nodes += [helper.make_node("QuantizeLinear", ["a", "s"], ["d"]), helper.make_node("DequantizeLinear", [], ["e"])]
    nodes += [helper.make_node("Transpose", ["e"], ["f"], perm=[5]), helper.make_node("Gemm", ["f", "f"], ["g"])]
    net.nodes += nodes
    proto = end(net, "g")
    for info in (*proto.graph.input, *proto.graph.output):
        info.type.tensor_type.ClearField("shape")
    assert 1 in told(proto, error=False) and 3 in told(proto)


def test_constants_may_be_nodes():
    net, x = start()
    net.node("Constant", name="s", value=numpy_helper.from_array(np.float32(0)))
    net.node("Constant", name="z", value=numpy_helper.from_array(np.int8(1)))
    q = net.node("QuantizeLinear", x, "s", "z", name="q")
    (zero, scale) = found(end(net, net.node("DequantizeLinear", q, "s", "z", name="dq")))
    assert "zero point 1" in zero.found and "scale 0" in scale.found


def test_a_backend_without_rules_says_so():
    with pytest.raises(
        BadInput, match="the backend 'onnxruntime' states no rules; those of tensorrt, tensorrt-fp16 can"
    ):
        registry.checker("onnxruntime")


def test_the_models_that_onnx_carries_are_survived():
    """Exported networks, large ones among them without their weights, control flow, sequences; of opsets from 1 on."""
    files = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data").rglob("*.onnx"))
    assert len(files) > 100
    for file in files:
        assert {f.number for f in TENSORRT.check(as_written(file)) if f.error} <= {8}, file
