"""r = S (q - Z) in training: codes are floats that hold integers, and rounding lets gradients through (Bengio 2013).

q = clip(round(x / S) + Z), ties to even, as onnxruntime computes it. dq/dx is 1/S inside the range of the codes and 0
outside, so that the pair of QuantizeLinear and DequantizeLinear has the gradient 1 or 0. Operators between the two,
such as a max-pool over codes, see numbers that they can differentiate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from ._torch_ops import TABLE, attributes, function, refuse

if TYPE_CHECKING:
    from ._torch_build import Builder


class _Codes(torch.autograd.Function):
    """clip(round(x / scale) + zero) with the gradient of x / scale inside the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        codes = torch.round(x / scale) + zero
        ctx.save_for_backward((codes >= low) & (codes <= high), scale)
        return codes.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale = ctx.saved_tensors
        return torch.where(inside, gradients[0] / scale, 0.0), None, None, None, None


def codes(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """Integer codes of x as floats; `scale` and `zero` broadcast against it."""
    return _Codes.apply(x, scale, zero.to(x.dtype), low, high)


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """One number, or one for each index of `axis`, in a form that broadcasts."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def limits(dtype: ir.DataType) -> tuple[int, int]:
    """The lowest and highest code of an integer type."""
    info = np.iinfo(dtype.numpy())
    return int(info.min), int(info.max)


@TABLE.rule("QuantizeLinear")
def quantize_rule(build: Builder, node: ir.Node) -> fx.Node:
    options = attributes(node)
    if options.get("block_size", 0):
        raise refuse(build, node, "blocks")
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = ir.DataType(options.get("output_dtype", 0) or ir.DataType.UINT8) if zero is None else zero.dtype
    if dtype is None or not dtype.is_integer() or dtype.bitwidth < 8:
        raise refuse(build, node, f"codes of type {dtype}")
    low, high = limits(dtype)
    operands = [build(node.inputs[0]), build.fixed(node.inputs[1]), build.fixed(zero)]
    return build.call(quantize, *operands, axis=options.get("axis", 1), low=low, high=high)


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, *, axis: int, low: int, high: int) -> Tensor:
    offset = torch.zeros_like(scale) if zero is None else zero
    return codes(x, along(scale, axis, x.dim()).to(x.dtype), along(offset, axis, x.dim()), low, high)


@TABLE.rule("DequantizeLinear")
def dequantize_rule(build: Builder, node: ir.Node) -> fx.Node:
    options = attributes(node)
    if options.get("block_size", 0):
        raise refuse(build, node, "blocks")
    operands = [build(node.inputs[0]), *(build.fixed(v) for v in node.inputs[1:])]
    return build.call(dequantize, *operands, axis=options.get("axis", 1))


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1) -> Tensor:
    """`q` as floats that hold integers, or as integers."""
    values = q.to(scale.dtype)
    if zero is not None:
        values = values - along(zero, axis, q.dim()).to(scale.dtype)
    return values * along(scale, axis, q.dim())


@function("DynamicQuantizeLinear")
def dynamic_quantize(x: Tensor, *, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of the range that the tensor has, zero included; the range itself is not differentiated."""
    low, high = x.detach().amin().clamp(max=0.0), x.detach().amax().clamp(min=0.0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((0 - low / scale).clamp(0, 255))
    return codes(x, scale, zero, 0, 255), scale, zero


@function("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Exact: products of codes are summed in 64 bits of float."""
    left, right = a.double(), b.double()
    if a_zero is not None:
        left = left - (a_zero.unsqueeze(-1) if a_zero.dim() and a_zero.numel() > 1 else a_zero)
    if b_zero is not None:
        right = right - b_zero
    return left @ right
