"""Operators over axes: reductions, softmax, norms that no module stands for, products of runtime tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._torch_ops import function, ints

REDUCTIONS: dict[str, Callable[[Tensor, Sequence[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep, dtype=x.dtype),
}


@function(*REDUCTIONS, "ReduceProd", static=(1,))
def reduce(x: Tensor, axes: Any = None, *, op_type: str, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    over = [] if axes is None else ints(axes)
    if not over:
        if noop_with_empty_axes:
            return x
        over = list(range(x.dim()))
    if op_type != "ReduceProd":
        return REDUCTIONS[op_type](x, over, bool(keepdims))
    for axis in sorted((a % x.dim() for a in over), reverse=True):
        x = x.prod(axis, bool(keepdims), dtype=x.dtype)
    return x


@function("ArgMax", "ArgMin")
def arg(x: Tensor, *, op_type: str, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    best = torch.argmax if op_type == "ArgMax" else torch.argmin
    if not select_last_index:
        return best(x, axis, bool(keepdims))
    return x.shape[axis] - 1 - best(x.flip(axis), axis, bool(keepdims))


@function("TopK", static=(1,))
def top_k(x: Tensor, k: Any = None, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, ...]:
    return tuple(torch.topk(x, ints(k)[0], axis, bool(largest), bool(sorted)))


@function("CumSum", static=(1,))
def cumulated(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    along = ints(axis)[0]
    x = x.flip(along) if reverse else x
    y = x.cumsum(along, dtype=x.dtype)
    y = y - x if exclusive else y
    return y.flip(along) if reverse else y


@function("Softmax", "LogSoftmax")
def softmax(x: Tensor, *, op_type: str, opset: int, axis: int | None = None) -> Tensor:
    """Before opset 13 all axes from `axis` on are one."""
    compute = F.softmax if op_type == "Softmax" else F.log_softmax
    if opset >= 13:
        return compute(x, -1 if axis is None else axis)
    first = (1 if axis is None else axis) % max(x.dim(), 1)
    return compute(x.flatten(first), -1).reshape(x.shape)


@function("LRN")
def local_response_norm(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """x / (bias + alpha / size * sum of squares over `size` channels around)^beta."""
    before = (size - 1) // 2
    squares = F.pad(x * x, [0, 0] * (x.dim() - 2) + [before, size - 1 - before])
    around = sum(squares[:, i : i + x.shape[1]] for i in range(size))
    return x / (bias + alpha / size * around) ** beta


@function("InstanceNormalization")
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@function("GroupNormalization", only={"stash_type": (1,)})
def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@function("LayerNormalization", only={"stash_type": (1,)})
def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    outputs: int,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    over = list(range(axis % x.dim(), x.dim()))
    mean = x.mean(over, keepdim=True)
    inverse = (x.var(over, correction=0, keepdim=True) + epsilon).rsqrt()
    y = (x - mean) * inverse * scale
    y = y if bias is None else y + bias
    return y if outputs == 1 else (y, mean, inverse)


@function("RMSNormalization", only={"stash_type": (1,)})
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    over = list(range(axis % x.dim(), x.dim()))
    return x * ((x * x).mean(over, keepdim=True) + epsilon).rsqrt() * scale


@function("LpNormalization")
def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@function("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@function("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = (a.T if transA else a) @ (b.T if transB else b)
    y = y if alpha == 1 else alpha * y
    if c is None:
        return y
    return y + (c if beta == 1 else beta * c)


@function("Einsum")
def einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *operands)


@function("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)
