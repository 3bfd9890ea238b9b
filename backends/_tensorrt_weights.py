"""Rules of TensorRT about the weights of a layer: their scales, 4-bit blocks, 2:4 sparsity, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ._tensorrt_graph import (
    DEQUANTIZE,
    Weight,
    channel_axis,
    code_type,
    codes_of_weight,
    constant,
    inner_axis,
    readers,
    scales,
    standard,
    weight_of,
)

BLOCKS = (64, 128)
NARROW = 16
OUTPUTS, INPUTS = 8, 16  # multiples from which on sparse kernels gain
MEANT = 0.6  # share of fours with two zeros, above which a weight is meant to be 2:4; by chance it is 0.375 at most


@dataclass(frozen=True)
class Broken:
    """One way in which a node breaks a rule: what was found, and what to do."""

    found: str
    remedy: str
    error: bool = True


def _weights(node: ir.Node) -> Iterator[tuple[int, Weight]]:
    for index in (0, 1):
        if (weight := weight_of(node, index)) is not None and len(weight.order) > 1:
            yield index, weight


def channels(node: ir.Node) -> Iterator[Broken]:
    """One scale an output channel: along axis 0 of Conv, 1 of ConvTranspose, that of the outputs of Gemm and MatMul."""
    for index, weight in _weights(node):
        decoder = weight.decoder
        scale = None if decoder is None else scales(decoder)
        if scale is None or decoder.attributes.get_int("block_size", 0):
            continue
        name, rank = weight.value.name, len(weight.order)
        axis = channel_axis(node, index, rank)
        wanted, outputs = weight.order[axis], weight.shape[axis]
        stated = decoder.attributes.get_int("axis", 1)
        stated += rank * (stated < 0)
        if scale.size == 1 and outputs > 1:
            yield Broken(
                f"one scale for the {outputs} outputs of weight {name!r}", f"give it {outputs}, along axis {wanted}"
            )
        elif scale.size > 1 and stated != wanted:
            yield Broken(f"scales of weight {name!r} along axis {stated}", f"put them along axis {wanted}")
        elif scale.size > 1 and scale.size != outputs:
            yield Broken(f"{scale.size} scales for the {outputs} outputs of weight {name!r}", f"give it {outputs}")


def narrow_types(node: ir.Node) -> Iterator[Broken]:
    """What a Q or DQ may not be of: 2 bits, unsigned 4 bits, 4 bits of an activation."""
    kind = code_type(node)
    if kind is None or kind.bitwidth > 4 or not kind.is_integer():
        return
    said = kind.name.lower()
    if kind.bitwidth < 4:
        yield Broken(f"its codes are {said}", "use int4 or int8")
    elif kind == ir.DataType.UINT4:
        yield Broken(f"its codes are {said}", "use int4, with zero point 0")
    elif node.op_type == DEQUANTIZE and codes_of_weight(node) is None:
        yield Broken(f"an activation in {said}", "use int8 for activations")
    elif node.op_type == DEQUANTIZE:
        users = [n for n, _ in readers(node.outputs[0]) if not standard(n, "Gemm", "MatMul")]
        if users:
            yield Broken(f"a weight in {said} of {users[0].op_type} {users[0].name!r}", "use int8 for it")


def blocks(node: ir.Node) -> Iterator[Broken]:
    """Blocks of scales: 4-bit weights have them, of 64 or 128 along K, and 8-bit ones have not."""
    for index, weight in _weights(node):
        decoder = weight.decoder
        scale, kind = (None, None) if decoder is None else (scales(decoder), code_type(decoder))
        if scale is None or kind is None or not kind.is_integer():
            continue
        name, rank, size = weight.value.name, len(weight.order), decoder.attributes.get_int("block_size", 0)
        if kind.bitwidth > 4:
            if size:
                yield Broken(
                    f"blocks of {size} in weight {name!r} of {kind.name.lower()}", "use one scale an output channel"
                )
            continue
        if size not in BLOCKS:
            found = f"blocks of {size}" if size else "no blocks"
            yield Broken(f"{found} in weight {name!r}", f"use blocks of {BLOCKS[0]} or {BLOCKS[1]}")
            continue
        axis = decoder.attributes.get_int("axis", 1) % rank
        held = np.asarray(weight.shape)[np.argsort(weight.order)]
        expected = tuple(-(-int(d) // size) if i == axis else int(d) for i, d in enumerate(held))
        if scale.shape != expected or axis != weight.order[inner_axis(node, index, rank)]:
            yield Broken(
                f"scales of shape {scale.shape} along axis {axis} for weight {name!r} of shape {tuple(held.tolist())}",
                "block the axis that is summed over, and no other",
            )


def sparsity(node: ir.Node) -> Iterator[Broken]:
    """Zeros that are meant for sparse tensor cores, and do not lie as these want them, or not where they gain."""
    for index, weight in _weights(node):
        array = constant(weight.value)
        if (
            array is None
            or array.dtype.kind not in "fi"
            or array.size < 32
            or 2 * np.count_nonzero(array) > 1.1 * array.size
        ):
            continue
        array = array.transpose(weight.order)
        inner, outer = (find(node, index, array.ndim) for find in (inner_axis, channel_axis))
        along = {axis: _fours(array, axis) for axis in range(array.ndim) if array.shape[axis] % 4 == 0}
        if not any(share >= MEANT for share, _ in along.values()):
            continue  # scattered zeros: a dense weight to TensorRT
        inputs, outputs, name = array.shape[inner], array.shape[outer], weight.value.name
        if inner not in along:
            yield Broken(
                f"{inputs} input channels in the sparse weight {name!r}", "make them a multiple of 4, or leave it dense"
            )
        elif over := along[inner][1]:
            yield Broken(
                f"{over} fours of input channels with 3 or 4 non-zeros in weight {name!r}", "zero two of each four"
            )
        elif outputs % OUTPUTS or inputs % INPUTS:
            yield Broken(
                f"the sparse weight {name!r} has {outputs} outputs and {inputs} inputs",
                f"multiples of {OUTPUTS} and {INPUTS} are worth it",
                error=False,
            )


def _fours(array: np.ndarray, axis: int) -> tuple[float, int]:
    """Share of fours along an axis with just two non-zeros, and how many have more."""
    count = np.moveaxis(array != 0, axis, -1).reshape(-1, 4).sum(axis=1)
    return float((count == 2).mean()), int((count > 2).sum())


def width(node: ir.Node) -> Iterator[Broken]:
    """Whether a layer on codes has enough inputs and outputs to gain."""
    for index, weight in _weights(node):
        rank, groups = len(weight.order), node.attributes.get_int("group", 1)
        inputs, outputs = (weight.shape[find(node, index, rank)] for find in (inner_axis, channel_axis))
        if node.op_type == "Conv":
            inputs *= groups
        elif node.op_type == "ConvTranspose":
            outputs *= groups
        if min(inputs, outputs) < NARROW:
            yield Broken(f"{inputs} inputs and {outputs} outputs", "leave it in float", error=False)
