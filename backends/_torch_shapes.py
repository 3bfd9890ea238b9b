"""Operators on shapes and positions: what a tensor holds moves, and sizes are computed while the network runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ._torch_ops import DTYPES, TABLE, align, function, ints

PAD_MODES = ("constant", "reflect", "edge", "wrap")


@function("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


@function("Size")
def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@function("Reshape", static=(1,))
def reshape(x: Tensor, shape: Any, *, allowzero: int = 0) -> Tensor:
    sizes = ints(shape)
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@function("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    first = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:first]), math.prod(x.shape[first:]))


@function("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))) if perm is None else tuple(perm))


@function("Squeeze", static=(1,))
def squeeze(x: Tensor, axes: Any = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


@function("Unsqueeze", static=(1,))
def unsqueeze(x: Tensor, axes: Any) -> Tensor:
    added = ints(axes)
    rank = x.dim() + len(added)
    for axis in sorted(a % rank for a in added):
        x = x.unsqueeze(axis)
    return x


@function("Concat")
def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(align(*values), axis)


@function("Split", static=(1,))
def split(
    x: Tensor, split: Any = None, *, outputs: int, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...] | Tensor:
    """Without sizes: equal parts, the last one smaller."""
    parts = -(-x.shape[axis] // outputs) if split is None else ints(split)
    made = torch.split(x, parts, axis)
    return made if outputs > 1 else made[0]


@function("Slice", static=(1, 2, 3, 4))
def slices(x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = ints(starts), ints(ends)
    along = list(range(len(first))) if axes is None else ints(axes)
    strides = [1] * len(first) if steps is None else ints(steps)
    index: list[slice] = [slice(None)] * x.dim()
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        if step > 0:
            index[axis] = slice(start, end, step)
        else:  # which PyTorch's indexing does not take
            places = list(range(*slice(start, end, step).indices(x.shape[axis])))
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x[tuple(index)]


@function("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    places = wrap(indices.to(x.device), size=x.shape[axis])
    found = x.index_select(axis, places.reshape(-1))
    return found.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def wrap(indices: Tensor, *, size: int) -> Tensor:
    """Indices that count from the end as such that count from the start, int64."""
    places = indices.to(torch.int64)
    return torch.where(places < 0, places + size, places)


@function("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, wrap(indices.to(x.device), size=x.shape[axis]))


@function("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    places = indices.to(x.device, torch.int64)
    if batch_dims == 0:
        return x[tuple(places.unbind(-1))]
    batch = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    places = places.reshape(len(flat), *places.shape[batch_dims:])
    first = torch.arange(len(flat), device=x.device).reshape(-1, *[1] * (places.dim() - 2))
    found = flat[(first, *places.unbind(-1))]
    return found.reshape(*batch, *found.shape[1:])


@function("ScatterND", only={"reduction": ("none", "add")})
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    places = tuple(indices.to(x.device, torch.int64).unbind(-1))
    return x.index_put(places, updates.to(x), accumulate=reduction == "add")


@function("ScatterElements", "Scatter", only={"reduction": ("none", "add")})
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    places = wrap(indices.to(x.device), size=x.shape[axis])
    return x.scatter(axis, places, updates) if reduction == "none" else x.scatter_add(axis, places, updates)


@function("Expand", static=(1,))
def expand(x: Tensor, shape: Any) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, ints(shape)))


@function("Tile", static=(1,))
def tile(x: Tensor, repeats: Any) -> Tensor:
    return x.repeat(ints(repeats))


@function("Range")
def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = (v.item() for v in (start, limit, delta))
    return torch.arange(max(math.ceil((last - first) / step), 0)).to(start.dtype) * step + first


@TABLE.rule("ConstantOfShape")
def constant_of_shape(build, node: ir.Node) -> fx.Node:
    value = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
    dtype = DTYPES[int(ir.DataType.from_numpy(value.dtype))]
    return build.call(full, build.numbers(node.inputs[0]), value=value.reshape(-1)[0].item(), dtype=dtype)


def full(shape: Any, *, value: float, dtype: torch.dtype) -> Tensor:
    return torch.full(ints(shape), value, dtype=dtype)


@function("NonZero")
def nonzero(x: Tensor) -> Tensor:
    return torch.nonzero(x).T


@function("OneHot", static=(1,))
def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    count = ints(depth)[0]
    places = torch.arange(count, device=indices.device)
    off, on = values.to(indices.device).unbind()
    # An index outside of [-depth, depth) has no one.
    hot = torch.where(indices < 0, indices + count, indices).unsqueeze(-1) == places
    return torch.where(hot, on, off).movedim(-1, axis)


@function("Trilu", static=(1,))
def trilu(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else ints(k)[0]
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@function("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b, d = blocksize, c // blocksize**2
    if mode == "CRD":
        y = x.reshape(n, d, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        y = x.reshape(n, b, b, d, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, d, h * b, w * b)


@function("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return y.reshape(n, c * b * b, h // b, w // b)


@function("Pad", static=(1, 2, 3), only={"mode": PAD_MODES})
def pad(x: Tensor, pads: Any, value: Any = None, axes: Any = None, *, mode: str = "constant") -> Tensor:
    """Begins, then ends, of all axes or of `axes`; a negative pad crops."""
    given = ints(pads)
    along = [a % x.dim() for a in (range(x.dim()) if axes is None else ints(axes))]
    widths = dict(zip(along, zip(given[: len(along)], given[len(along) :], strict=True), strict=True))
    if mode == "constant":
        filler = 0.0 if value is None else float(torch.as_tensor(value).reshape(()))
        sides = [side for axis in reversed(range(x.dim())) for side in widths.get(axis, (0, 0))]
        return F.pad(x, sides, value=filler)
    for axis, (begin, end) in widths.items():
        if begin or end:
            around = np.pad(np.arange(x.shape[axis]), (max(begin, 0), max(end, 0)), mode=cast(Any, mode))
            kept = around[max(-begin, 0) : len(around) - max(-end, 0)]
            x = x.index_select(axis, torch.from_numpy(kept).to(x.device))
    return x
