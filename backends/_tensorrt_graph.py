"""What TensorRT sees in a graph with Q/DQ: what is decoded where, which weights are codes, who computes on codes.

Nothing here runs a model or asks for shapes; what a graph does not tell is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.model import STANDARD_DOMAINS, constant_tensor

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Q and DQ pass over these: they move values, or take the largest.
MOVING = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Gather",
     "Expand", "Identity", "Dropout", "Pad", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
# Kernels absorb these into the layer before them.
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Elu", "Selu"})
# Other operators with an integer kernel -> how many of their inputs are data (None: all).
COMPUTING: dict[str, int | None] = {
    "AveragePool": 1, "GlobalAveragePool": 1, "GlobalMaxPool": 1, "ReduceMean": 1, "Resize": 1, "Add": None,
    "Sub": None, "Mul": None, "Sum": None, "Min": None, "Max": None, **dict.fromkeys(ACTIVATIONS, 1),
}  # fmt: skip


def standard(node: ir.Node | None, *op_types: str) -> bool:
    """Whether a node is one of these operators of ONNX."""
    return node is not None and node.op_type in op_types and node.domain in STANDARD_DOMAINS


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a weight; None where it is none, or its numbers cannot be read."""
    tensor = constant_tensor(value)
    try:
        return None if tensor is None else tensor.numpy()
    except (ValueError, TypeError, OSError):  # what onnx_ir raises on tensors that contradict themselves
        return None


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[index] if len(node.inputs) > index else None


def maker_of(node: ir.Node, index: int = 0) -> ir.Node | None:
    """The node that makes an input."""
    value = given(node, index)
    return None if value is None else value.producer()


def scales(node: ir.Node) -> np.ndarray | None:
    return constant(given(node, 1))


def code_type(node: ir.Node) -> ir.DataType | None:
    """Type of the codes that a Q makes or a DQ reads; ONNX's default is uint8."""
    told = constant_tensor(given(node, 2))
    if told is not None:
        return told.dtype
    if node.op_type == DEQUANTIZE:
        tensor, maker = constant_tensor(given(node, 0)), maker_of(node)
        if tensor is not None:
            return tensor.dtype
        return code_type(maker) if standard(maker, QUANTIZE) else None
    if stated := node.attributes.get_int("output_dtype", 0):
        return ir.DataType(stated)
    return ir.DataType.UINT8 if given(node, 2) is None else None


def small_codes(node: ir.Node) -> bool:
    """Whether codes take 4 bits or fewer: weights alone have such."""
    kind = code_type(node)
    return kind is not None and kind.is_integer() and kind.bitwidth <= 4


def codes_of_weight(node: ir.Node) -> ir.Value | None:
    """The constant behind a Q or DQ, as codes or as floats before a Q; None where it is about an activation."""
    value, maker = given(node, 0), maker_of(node)
    if node.op_type == DEQUANTIZE and standard(maker, QUANTIZE):
        value = given(maker, 0)
    return value if constant_tensor(value) is not None else None


@dataclass(frozen=True)
class Weight:
    """A constant operand of a layer, decoded from codes or plain floats.

    Attributes:
        decoder: the DQ it comes from; None for floats.
        value: the constant: codes, or floats.
        order: axis of the operand as the layer reads it -> axis of the constant, for a constant that is transposed.
    """

    decoder: ir.Node | None
    value: ir.Value
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As the layer reads it."""
        held = constant_tensor(self.value).shape.numpy()
        return tuple(held[axis] for axis in self.order)


def weight_of(node: ir.Node, index: int) -> Weight | None:
    """An operand of a layer that is a constant, through DQ and Transpose; None: it is an activation."""
    value, turns = given(node, index), []
    while value is not None and standard(maker := value.producer(), "Transpose", "Identity"):
        if maker.op_type == "Transpose":
            turns.append(maker)
        value = given(maker, 0)
    maker = None if value is None else value.producer()
    decoder = maker if standard(maker, DEQUANTIZE) else None
    held = value if decoder is None else codes_of_weight(decoder)
    tensor = constant_tensor(held)
    if tensor is None:
        return None
    order = tuple(range(len(tensor.shape)))
    for turn in reversed(turns):
        perm = turn.attributes.get_ints("perm", tuple(reversed(range(len(order)))))
        if sorted(perm) != sorted(range(len(order))):
            return None
        order = tuple(order[axis] for axis in perm)
    return Weight(decoder, held, order)


def channel_axis(node: ir.Node, index: int, rank: int) -> int:
    """The axis of a layer's operand that runs over its outputs: one scale an index of it."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return int(bool(node.attributes.get_int("transA" if index == 0 else "transB", 0)) == (index == 0))
    return max(rank - 2, 0) if index == 0 else rank - 1


def inner_axis(node: ir.Node, index: int, rank: int) -> int:
    """The axis over which a layer sums up: input channels of a convolution (of a group), K of a product."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return 1 - channel_axis(node, index, rank)
    return max(2 * rank - 3 - channel_axis(node, index, rank), 0)  # the other one of the last two


def decoded(value: ir.Value | None) -> bool:
    """Whether an activation arrives as codes that were decoded: from a DQ, or moved since."""
    seen = 0
    while value is not None and seen < 64:  # chains of movers are short; a bound keeps this linear
        maker = value.producer()
        if standard(maker, DEQUANTIZE):
            return codes_of_weight(maker) is None
        if not standard(maker, *MOVING):
            return False
        if maker.op_type == "Concat":
            return all(_from_codes(v) for v in maker.inputs)
        value, seen = given(maker, 0), seen + 1
    return False


def _from_codes(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    return standard(maker, DEQUANTIZE)


def operands(node: ir.Node) -> tuple[int, ...]:
    """Indices of a layer's two factors."""
    return tuple(i for i in (0, 1) if given(node, i) is not None)


def takes_codes(node: ir.Node) -> bool:
    """Whether a layer computes on integers: both of its factors are decoded codes."""
    if not standard(node, *WEIGHTED) or len(operands(node)) < 2:
        return False
    return all(_factor_decoded(node, index) for index in operands(node))


def _factor_decoded(node: ir.Node, index: int) -> bool:
    weight = weight_of(node, index)
    return decoded(node.inputs[index]) if weight is None else weight.decoder is not None


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Who reads a tensor, and at which input, through operators that only move values."""
    pending, seen = [value], set()
    while pending:
        for use in pending.pop().uses():
            if (standard(use.node, *MOVING) and use.idx == 0) or standard(use.node, "Concat"):
                if use.node not in seen:
                    seen.add(use.node)
                    pending += use.node.outputs[:1] if use.node.op_type != "Split" else use.node.outputs
            else:
                yield use.node, use.idx


def layer_behind(value: ir.Value | None) -> ir.Node | None:
    """The layer that makes a tensor, an activation in between left out."""
    maker = None if value is None else value.producer()
    if standard(maker, *ACTIVATIONS):
        maker = maker_of(maker)
    return maker if standard(maker, *WEIGHTED) else None


def only_reader(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()
