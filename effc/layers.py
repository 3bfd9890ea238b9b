"""Convolutions and dense layers seen alike: weight, output axis, padding, and the patch of input a filter meets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.model import STANDARD_DOMAINS, Model, constant_tensor

WEIGHTED = ("Conv", "Gemm", "MatMul")
RECURRENT = ("LSTM", "GRU", "RNN")


def output_axis(node: ir.Node, rank: int) -> int:
    """The axis of a layer's weight that runs over its outputs."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Conv" or node.attributes.get_int("transB", 0):
        return 0
    return rank - 1


def bias_value(node: ir.Node) -> ir.Value | None:
    """The bias of a Conv or Gemm, None where it has none (a MatMul never has)."""
    return node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None


def bias_array(model: Model, node: ir.Node, outputs: int) -> np.ndarray | None:
    """The bias as one number an output, scaled by Gemm's beta; None where there is none. Raises ValueError."""
    value = bias_value(node)
    if value is None:
        return None
    array = model.constant(value)
    if array is None:
        raise ValueError("its bias is no constant")
    if array.size not in (1, outputs) or (array.ndim > 1 and array.shape[-1] != array.size):
        raise ValueError(f"its third operand of shape {array.shape} is no bias along {outputs} outputs")
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.broadcast_to(array.reshape(-1), outputs) * np.asarray(beta, array.dtype)


def set_bias(model: Model, node: ir.Node, bias: np.ndarray) -> None:
    """Let a convolution, a Gemm or a batch norm add this to its outputs.

    Gemm's beta counts; where it is 0 it becomes 1.

    Args:
        bias: [N].
    """
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    numbers = (bias / (beta or 1.0)).astype(node.inputs[1].const_value.numpy().dtype)
    set_operand(model, node, 2, numbers, f"{node.name}_bias")
    if beta == 0:
        edit.set_attributes(model, node, beta=1.0)


def set_operand(model: Model, node: ir.Node, place: int, numbers: np.ndarray, hint: str) -> None:
    """Other numbers for a constant that a node reads, under its name and in its shape if it alone reads it."""
    value = node.inputs[place] if len(node.inputs) > place else None
    if value is not None and value.is_initializer() and len(value.uses()) == 1:
        shape = value.const_value.shape if value.const_value.size == numbers.size else numbers.shape
        edit.set_initializer(model, value, numbers.reshape(shape))
    else:
        edit.set_input(model, node, place, edit.add_initializer(model, hint, numbers))


def added_behind(model: Model, node: ir.Node, outputs: int, rank: int | None = None) -> tuple[ir.Node, int] | None:
    """The Add that alone reads a MatMul and adds one constant to each of its outputs, and the constant's place.

    Args:
        rank: of what the MatMul makes, where it is known: a constant of more axes is none of its bias.
    """
    reader = only_reader(node.outputs[0]) if node.op_type == "MatMul" else None
    if reader is None or reader.op_type != "Add":
        return None
    place = 1 if reader.inputs[0] is node.outputs[0] else 0
    operand = model.constant(reader.inputs[place])
    if operand is None or operand.shape[-1:] != (outputs,) or operand.size != outputs:
        return None
    return (reader, place) if operand.ndim <= max(1, rank or 1) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The standard operator that alone reads a tensor, in the same graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.graph is value.producer().graph and node.domain in STANDARD_DOMAINS else None


def alpha(node: ir.Node) -> float:
    """What a Gemm multiplies its product with; 1 for other layers."""
    return node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0


def pads(node: ir.Node, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Padding of a convolution or pool, begins then ends, `auto_pad` resolved for an input of spatial `size`."""
    spatial = len(size)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        given = [] if auto == "VALID" else list(node.attributes.get_ints("pads", ()))
        return given or [0] * 2 * spatial
    steps, gaps = strides(node, spatial), dilations(node, spatial)
    begins, ends = [], []
    for i in range(spatial):
        out = -(-size[i] // steps[i])
        total = max(0, (out - 1) * steps[i] + gaps[i] * (kernel[i] - 1) + 1 - size[i])
        less, more = total // 2, total - total // 2
        begins.append(less if auto == "SAME_UPPER" else more)
        ends.append(more if auto == "SAME_UPPER" else less)
    return begins + ends


def strides(node: ir.Node, spatial: int) -> list[int]:
    return list(node.attributes.get_ints("strides", ())) or [1] * spatial


def dilations(node: ir.Node, spatial: int) -> list[int]:
    return list(node.attributes.get_ints("dilations", ())) or [1] * spatial


def mean_inputs(node: ir.Node, mean: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The mean input that each weight is multiplied with, zero padding included, of the weight's shape.

    A layer is linear, so the products with the weights sum up to the layer's mean output, bias aside.

    Args:
        mean: E[x]; for a convolution [C, *size], position by position, for a dense layer [K].
        weight: as the layer's own: Conv [N, C/groups, *kernel], Gemm and MatMul a matrix.
    """
    if node.op_type != "Conv":
        return np.broadcast_to(mean if output_axis(node, weight.ndim) == 0 else mean[:, None], weight.shape)
    patch = mean_patch(node, mean, weight.shape[2:])
    groups = node.attributes.get_int("group", 1)
    filters = np.repeat(np.arange(groups), weight.shape[0] // groups)
    return patch.reshape(groups, *weight.shape[1:])[filters]


def mean_patch(node: ir.Node, mean: np.ndarray, kernel: Sequence[int]) -> np.ndarray:
    """Mean over output positions of the padded input that each kernel tap meets: [C, taps]."""
    spatial = len(kernel)
    around = pads(node, mean.shape[1:], kernel)
    padded = np.pad(mean, [(0, 0), *zip(around[:spatial], around[spatial:], strict=True)])
    steps, gaps = strides(node, spatial), dilations(node, spatial)
    sizes = [(padded.shape[1 + i] - gaps[i] * (kernel[i] - 1) - 1) // steps[i] + 1 for i in range(spatial)]
    taps = []
    for tap in np.ndindex(*kernel):
        starts = [t * gaps[i] for i, t in enumerate(tap)]
        window = [slice(s, s + steps[i] * (sizes[i] - 1) + 1, steps[i]) for i, s in enumerate(starts)]
        taps.append(padded[(slice(None), *window)].reshape(mean.shape[0], -1).mean(axis=1))
    return np.stack(taps, axis=1)


def constant_weight(node: ir.Node) -> np.ndarray | None:
    """The weight of a layer when it is a constant."""
    tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if tensor is None else tensor.numpy()
