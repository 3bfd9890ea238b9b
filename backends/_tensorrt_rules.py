"""TensorRT's rules of explicit quantisation as a table, and what of a model breaks them; the model is never run.

After NVIDIA's developer guide ("Working with quantized types": explicit quantization, Q/DQ layer placement
recommendations; "Structured sparsity") and the operator list of its ONNX parser. A rule is a row: a number, a name,
what is allowed, and a function of a node. Rules about weights stand in `_tensorrt_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.model import STANDARD_DOMAINS, Model
from effc.runtime import Finding

from ._tensorrt_graph import (
    COMPUTING,
    DEQUANTIZE,
    MOVING,
    QUANTIZE,
    WEIGHTED,
    code_type,
    codes_of_weight,
    constant,
    decoded,
    given,
    layer_behind,
    maker_of,
    only_reader,
    readers,
    scales,
    small_codes,
    standard,
    takes_codes,
    weight_of,
)
from ._tensorrt_weights import Broken, blocks, channels, narrow_types, sparsity, width

OLDEST_OPSET, NEWEST_OPSET, CHANNEL_OPSET, BLOCK_OPSET = 9, 25, 13, 21
FORBIDDEN = frozenset(
    {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "BitShift",
     "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"}
)  # fmt: skip
PLUGINS = ("trt", "nv")  # how domains of TensorRT's own plugins begin

Check = Callable[[ir.Node, Model], Iterator[Broken]]


@dataclass(frozen=True)
class Rule:
    """A row: `check` yields each way in which a node breaks it; advice is a warning."""

    number: int
    name: str
    allowed: str
    check: Check


RULES: list[Rule] = []


def _rule(number: int, name: str, allowed: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES.append(Rule(number, name, allowed, check))
        return check

    return register


def check(model: Model) -> tuple[Finding, ...]:
    """Every place where a model breaks a rule, in the graph's order, sub-graphs and local functions included."""
    of_opsets = next(rule for rule in RULES if rule.check is opsets)
    found = [_finding(of_opsets, broken, model.name, "") for broken in _opset(model)]
    bodies = (model.graph, *model.ir.functions.values())
    for node in (n for body in bodies for n in body.all_nodes()):
        for rule in RULES:
            found += [_finding(rule, broken, _name(node), node.op_type) for broken in rule.check(node, model)]
    return tuple(found)


def _finding(rule: Rule, broken: Broken, node: str, op: str) -> Finding:
    return Finding(rule.number, rule.name, broken.error, node, op, broken.found, rule.allowed, broken.remedy)


def _name(node: ir.Node) -> str:
    return node.name or next((v.name for v in node.outputs if v.name), "")


@_rule(1, "symmetric codes", "codes are int8 with zero point 0 and positive scales")
def symmetric(node: ir.Node, model: Model) -> Iterator[Broken]:
    if not standard(node, QUANTIZE, DEQUANTIZE) or _repeats(node):
        return
    kind = code_type(node)
    if kind in (ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16):
        yield Broken(f"its codes are {kind.name.lower()}", "quantise to int8 with zero point 0")
    zero = constant(given(node, 2))
    if zero is not None and np.any(zero.astype(np.float32)):
        yield Broken(f"zero point {_some(zero[zero != 0])}", "quantise symmetrically, with zero point 0")
    elif zero is None and given(node, 2) is not None:
        yield Broken("its zero point is computed", "make it a constant of 0")
    scale = scales(node)
    if scale is None:
        yield Broken("its scale is computed, so that nothing is known of it", "make it a constant", error=False)
    elif not np.all(np.isfinite(scale.astype(np.float32)) & (scale > 0)):
        bad = scale[~(np.isfinite(scale.astype(np.float32)) & (scale > 0))]
        yield Broken(f"scale {_some(bad)}", "give each scale a positive number, 1 where all codes are 0")


def _repeats(node: ir.Node) -> bool:
    """Whether a DQ only says what the Q before it said: one line tells both."""
    maker = maker_of(node)
    if node.op_type != DEQUANTIZE or not standard(maker, QUANTIZE):
        return False
    return all(given(maker, i) is given(node, i) or _equal(given(maker, i), given(node, i)) for i in (1, 2))


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    x, y = constant(a), constant(b)
    return x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y)


def _some(values: np.ndarray) -> str:
    listed = ", ".join(f"{float(v):g}" for v in values.reshape(-1)[:3])
    return listed + (", ..." if values.size > 3 else "")


@_rule(2, "granularity", "activations have one scale, weights one for each output channel along the right axis")
def granularity(node: ir.Node, model: Model) -> Iterator[Broken]:
    if standard(node, QUANTIZE, DEQUANTIZE) and codes_of_weight(node) is None:
        scale = scales(node)
        if scale is not None and scale.size > 1 and not _repeats(node):
            yield Broken(f"an activation with {scale.size} scales", "quantise it with one scale")
    elif standard(node, *WEIGHTED):
        yield from channels(node)


@_rule(
    3, "inputs of layers", "Q/DQ stand on all inputs of Conv, ConvTranspose, Gemm and MatMul, and not on their outputs"
)
def inputs_of_layers(node: ir.Node, model: Model) -> Iterator[Broken]:
    if standard(node, *WEIGHTED):
        coded, floats = [], []
        for index in (0, 1):
            if (value := given(node, index)) is None:
                continue
            weight = weight_of(node, index)
            if weight is not None and weight.decoder is not None and small_codes(weight.decoder):
                return  # weight-only: rule 9
            is_coded = decoded(value) if weight is None else weight.decoder is not None
            (coded if is_coded else floats).append(f"{'weight' if weight else 'input'} {value.name!r}")
        if coded and floats:
            yield Broken(
                f"its {coded[0]} is quantised and its {floats[0]} is not", "quantise both with Q/DQ, or none of them"
            )
    elif standard(node, QUANTIZE) and (layer := layer_behind(given(node, 0))) is not None:
        ends = [reader for out in node.outputs for reader, _ in readers(out)]
        ends = [r for n in ends if standard(n, DEQUANTIZE) for out in n.outputs for r, _ in readers(out)]
        if not any(standard(n, *WEIGHTED, *COMPUTING) for n in ends):
            yield Broken(
                f"the output of {layer.op_type} {_name(layer)!r} is quantised, and nothing behind computes on codes",
                "take this Q/DQ out",
            )


@_rule(4, "residual adds", "where Conv meets Add, the other operand has Q/DQ, and nothing stands between the two")
def residual_adds(node: ir.Node, model: Model) -> Iterator[Broken]:
    if (
        not standard(node, "Add")
        or len(node.inputs) != 2
        or any(v is None or constant(v) is not None for v in node.inputs)
    ):
        return
    fused = [v for v in node.inputs if only_reader(v) and _quantised_conv(v)]
    split = [v for v in node.inputs if _between(v)]
    if fused and not any(decoded(v) for v in node.inputs):
        other = next(v for v in node.inputs if v is not fused[0] or node.inputs[0] is node.inputs[1])
        yield Broken(
            f"Conv {_name(fused[0].producer())!r} meets {other.name!r} in floats", f"put Q/DQ on {other.name!r}"
        )
    elif split and not fused:
        conv = split[0].producer().inputs[0].producer().inputs[0].producer()
        yield Broken(
            f"Q/DQ between Conv {_name(conv)!r} and the Add force kernels of their own",
            "let the Add read the Conv itself and quantise the other operand",
        )


def _quantised_conv(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    return standard(maker, "Conv") and takes_codes(maker)


def _between(value: ir.Value) -> bool:
    """Whether a tensor is the output of a quantised Conv behind Q/DQ of its own, which has no other reader."""
    decoder = value.producer()
    if not standard(decoder, DEQUANTIZE) or not standard(maker := maker_of(decoder), QUANTIZE):
        return False
    source = given(maker, 0)
    return only_reader(value) and _quantised_conv(source) and only_reader(source)


@_rule(5, "other operators on codes", "an operator without weights whose inputs have Q/DQ has Q/DQ on its output too")
def other_operators(node: ir.Node, model: Model) -> Iterator[Broken]:
    if not standard(node, *COMPUTING) or node.op_type in MOVING:
        return
    count = COMPUTING[node.op_type]
    data = [v for v in node.inputs[:count] if v is not None]
    if not data or not all(decoded(v) for v in data):
        return
    after = [n for made in node.outputs[:1] for n, _ in readers(made)]
    after += [r for n in after if standard(n, "Relu", "Clip") for r, _ in readers(n.outputs[0])]  # absorbed
    if not any(standard(n, QUANTIZE) for n in after):
        yield Broken("its inputs are quantised and its output is not", "put Q/DQ behind it, or let it read floats")


@_rule(6, "biases", "biases are floats")
def biases(node: ir.Node, model: Model) -> Iterator[Broken]:
    if standard(node, "Conv", "ConvTranspose", "Gemm") and (bias := given(node, 2)) is not None:
        found = constant(bias)
        if standard(bias.producer(), DEQUANTIZE):
            yield Broken(f"its bias {bias.name!r} is decoded from codes", "keep it as floats")
        elif found is not None and found.dtype.kind in "iu":
            yield Broken(f"its bias {bias.name!r} is {found.dtype}", "keep it as floats")
    elif standard(node, "Add"):
        decoders = [v.producer() for v in node.inputs if v is not None and standard(v.producer(), DEQUANTIZE)]
        bias = next((d for d in decoders if codes_of_weight(d) is not None), None)
        makers = [v.producer() for v in node.inputs if v is not None]
        if bias is not None and any(standard(m, *WEIGHTED) for m in makers):
            yield Broken(f"its bias {bias.outputs[0].name!r} is decoded from codes", "keep it as floats")


@_rule(
    7,
    "operators",
    "quantisation is written as Q/DQ around float operators of ONNX; BitShift and Bitwise* are not known",
)
def operators(node: ir.Node, model: Model) -> Iterator[Broken]:
    if node.domain in STANDARD_DOMAINS:
        if node.op_type in FORBIDDEN:
            yield Broken(
                f"{node.op_type} is not taken", "write it with QuantizeLinear and DequantizeLinear, or leave it out"
            )
    elif node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "MatMulNBits", "QAttention")):
        yield Broken(
            f"{node.domain}.{node.op_type} is another runtime's", "write it with QuantizeLinear and DequantizeLinear"
        )
    elif node.op_identifier() not in model.ir.functions and not node.domain.startswith(PLUGINS):
        yield Broken(
            f"{node.domain}.{node.op_type} is no operator of ONNX", "have a plugin for it at hand", error=False
        )


def _opset(model: Model) -> Iterator[Broken]:
    """The part of rule 8 that is about the model as a whole."""
    if not OLDEST_OPSET <= model.opset <= NEWEST_OPSET:
        yield Broken(f"opset {model.opset}", f"export it at opset {OLDEST_OPSET} to {NEWEST_OPSET}")


@_rule(8, "opsets", "opset 9 to 25; scales along an axis from 13 on, 4-bit codes and blocks from 21 on")
def opsets(node: ir.Node, model: Model) -> Iterator[Broken]:
    if not standard(node, QUANTIZE, DEQUANTIZE) or not model.opset >= OLDEST_OPSET:
        return
    scale = scales(node)
    if small_codes(node) or node.attributes.get_int("block_size", 0):
        if model.opset < BLOCK_OPSET:
            yield Broken(f"4-bit codes or blocks at opset {model.opset}", f"export it at opset {BLOCK_OPSET} or later")
    elif scale is not None and scale.size > 1 and model.opset < CHANNEL_OPSET:
        yield Broken(f"{scale.size} scales at opset {model.opset}", f"export it at opset {CHANNEL_OPSET} or later")


@_rule(
    9,
    "4-bit weights",
    "int4 is for weights of Gemm and MatMul alone, in blocks of 64 or 128 along one axis; 2 bits are not taken",
)
def four_bits(node: ir.Node, model: Model) -> Iterator[Broken]:
    if standard(node, QUANTIZE, DEQUANTIZE):
        yield from narrow_types(node)
    elif standard(node, *WEIGHTED):
        yield from blocks(node)


@_rule(
    10, "2:4 sparsity", "at most 2 of every 4 consecutive input channels are not zero, and these are a multiple of 4"
)
def two_of_four(node: ir.Node, model: Model) -> Iterator[Broken]:
    if standard(node, *WEIGHTED):
        yield from sparsity(node)


@_rule(11, "narrow layers", "layers of fewer than 16 inputs or outputs are better left in float")
def narrow_layers(node: ir.Node, model: Model) -> Iterator[Broken]:
    if takes_codes(node):
        yield from width(node)


@_rule(12, "sibling scales", "Qs that read one tensor are merged where their scales are equal")
def sibling_scales(node: ir.Node, model: Model) -> Iterator[Broken]:
    if not standard(node, QUANTIZE) or (source := given(node, 0)) is None:
        return
    siblings = [n for n in source.consumers() if standard(n, QUANTIZE)]
    if len(siblings) > 1 and node is not siblings[0]:
        mine, first = scales(node), scales(siblings[0])
        if mine is not None and first is not None and not np.array_equal(mine, first):
            yield Broken(
                f"scale {_some(mine)} beside {_some(first)} of {_name(siblings[0])!r}",
                "give both one scale",
                error=False,
            )
