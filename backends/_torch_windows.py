"""Operators that slide or sample over space: padding of windows, pools, convolutions of runtime weights, resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ._torch_ops import TABLE, attributes, function, ints, refuse

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
MODE = "coordinate_transformation_mode"
COORDINATES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")


def around(
    x: Tensor,
    kernel: Sequence[int],
    pads: Sequence[int] | None,
    strides: Sequence[int],
    dilations: Sequence[int],
    auto_pad: str,
) -> list[int]:
    """Pads of the spatial axes, begins then ends; `auto_pad` resolved for this input."""
    spatial = len(kernel)
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        return [0] * 2 * spatial if auto_pad == "VALID" or not pads else list(pads)
    totals = [
        max(0, (-(-size // step) - 1) * step + gap * (k - 1) + 1 - size)
        for size, k, step, gap in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return less + more if auto_pad == "SAME_UPPER" else more + less


def surround(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """Spatial axes padded: begins, then ends."""
    spatial = len(pads) // 2
    flat = [p for axis in reversed(range(spatial)) for p in (pads[axis], pads[axis + spatial])]
    return F.pad(x, flat, value=value) if any(pads) else x


def same(
    x: Tensor, *, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], auto_pad: str
) -> Tensor:
    """Zeros around, so that a window with these strides gives ceil(size / stride) positions."""
    return surround(x, around(x, kernel, None, strides, dilations, auto_pad))


@function("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: Sequence[int] | None = None,
) -> Tensor:
    kernel = weight.shape[2:]
    steps, gaps = strides or [1] * len(kernel), dilations or [1] * len(kernel)
    padded = surround(x, around(x, kernel, pads, steps, gaps, auto_pad))
    return CONVOLUTIONS[len(kernel)](padded, weight, bias, tuple(steps), 0, tuple(gaps), group)


@function("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: Sequence[int] | None = None,
) -> Tensor:
    """The whole result, then what the pads crop, so that begins and ends may differ."""
    kernel = weight.shape[2:]
    steps, gaps, more = (list(v or [d] * len(kernel)) for v, d in ((strides, 1), (dilations, 1), (output_padding, 0)))
    whole = TRANSPOSED[len(kernel)](x, weight, None, tuple(steps), 0, 0, group, tuple(gaps))
    whole = surround(whole, [0] * len(kernel) + more)
    if bias is not None:
        whole = whole + bias.reshape(-1, *[1] * len(kernel))
    ends = crops(x.shape[2:], whole.shape[2:], steps, pads, output_shape, auto_pad)
    return surround(whole, [-p for p in ends])


def crops(
    size: Sequence[int],
    whole: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int] | None,
    output_shape: Sequence[int] | None,
    auto_pad: str,
) -> list[int]:
    """What a transposed convolution leaves away at the begins, then at the ends."""
    wanted = list(output_shape)[-len(size) :] if output_shape else None
    if wanted is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [s * step for s, step in zip(size, strides, strict=True)]
    if wanted is None:
        return [0] * 2 * len(size) if auto_pad == "VALID" or not pads else list(pads)
    totals = [w - target for w, target in zip(whole, wanted, strict=True)]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return less + more if auto_pad == "SAME_UPPER" else more + less


class _Windows(NamedTuple):
    """Where a pool's windows lie on an input.

    Attributes:
        kernel: sizes of a window; of a single one no more than it meets, as exporters write 448 x 448 for all of 2 x 2.
        steps, gaps: strides and dilations.
        pads: begins, then ends; resolved.
        extra: what a last window reaches beyond the pads, in the same order.
    """

    kernel: tuple[int, ...]
    steps: tuple[int, ...]
    gaps: tuple[int, ...]
    pads: list[int]
    extra: list[int]


def _windows(
    x: Tensor,
    kernel: Sequence[int],
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int,
) -> _Windows:
    ones = [1] * len(kernel)
    steps, gaps = tuple(strides or ones), tuple(dilations or ones)
    widths = around(x, kernel, pads, steps, gaps, auto_pad)
    extra = _overhang(x, kernel, steps, gaps, widths, bool(ceil_mode))
    spatial, own = len(kernel), list(kernel)
    for i, (size, gap) in enumerate(zip(x.shape[2:], gaps, strict=True)):
        padded = size + widths[i] + widths[i + spatial]
        if gap == 1 and own[i] > padded and extra[i + spatial] == own[i] - padded:
            own[i], extra[i + spatial] = padded, 0
    return _Windows(tuple(own), steps, gaps, widths, extra)


def _overhang(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int], up: bool
) -> list[int]:
    """What a last window reaches beyond the pads when sizes are rounded up; it starts inside or before the input."""
    spatial, result = len(kernel), []
    for i, (size, k, step, gap) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        padded, extent = size + pads[i] + pads[i + spatial], gap * (k - 1) + 1
        count = -(-(padded - extent) // step) + 1 if up else 0
        if count and (count - 1) * step >= size + pads[i]:
            count -= 1
        result.append(max(0, (count - 1) * step + extent - padded) if count else 0)
    return [0] * spatial + result


@function("MaxPool", only={"storage_order": (0,)}, results=1)
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
) -> Tensor:
    kernel, steps, gaps, widths, extra = _windows(x, kernel_shape, pads, strides, dilations, auto_pad, ceil_mode)
    values = x if x.is_floating_point() else x.float()  # codes of 8 bits
    padded = surround(values, [a + b for a, b in zip(widths, extra, strict=True)], -math.inf)
    return MAX_POOLS[len(kernel)](padded, kernel, steps, 0, gaps).to(x.dtype)


@function("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    """Sums over windows by how many positions they hold, those of the padding included or not."""
    kernel, steps, gaps, widths, extra = _windows(x, kernel_shape, pads, strides, dilations, auto_pad, ceil_mode)

    def sums(values: Tensor) -> Tensor:
        ones = values.new_ones(values.shape[1], 1, *kernel)
        return CONVOLUTIONS[len(kernel)](values, ones, None, steps, 0, gaps, values.shape[1])

    counted = x.new_ones(1, 1, *x.shape[2:])
    counted = surround(surround(counted, widths, 1.0 if count_include_pad else 0.0), extra)
    return sums(surround(surround(x, widths), extra)) / sums(counted)


@function("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@function("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@TABLE.rule("Resize", "Upsample")
def resize_rule(build, node: ir.Node) -> fx.Node:
    """The inputs of the opsets, brought into one order; before 11 positions are those of `asymmetric`, rounded down."""
    options = attributes(node)
    early = node.op_type == "Upsample" or build.model.opset < 11
    defaults = {MODE: "asymmetric", "nearest_mode": "floor"} if early else {}
    refused = {"antialias": 0, "exclude_outside": None, "keep_aspect_ratio_policy": "stretch"}
    for key, allowed in refused.items():
        if allowed is not None and options.pop(key, allowed) != allowed:
            raise refuse(build, node, key)
    options = defaults | options
    if options.get(MODE, "half_pixel") not in COORDINATES:
        raise refuse(build, node, f"coordinate_transformation_mode={options[MODE]!r}")
    options.pop("extrapolation_value", None)
    given = [build.numbers(v) for v in node.inputs[1:]]
    scales, sizes = (
        (given[0] if given else options.pop("scales", None), None) if early else (*given[1:], None, None)[:2]
    )
    return build.call(resize, build(node.inputs[0]), scales, sizes, **options)


def resize(
    x: Tensor,
    scales: Any,
    sizes: Any,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    axes: Sequence[int] | None = None,
) -> Tensor:
    """Axis by axis: each output position takes the input positions around it, by weights that `mode` gives."""
    along = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    wanted = [] if sizes is None else ints(sizes)
    factors = [] if wanted else scales.tolist() if isinstance(scales, Tensor) else list(scales)
    for i, axis in enumerate(along):
        length = x.shape[axis]
        target = wanted[i] if wanted else math.floor(length * factors[i])
        factor = target / length if wanted else factors[i]
        if target == length and factor == 1:
            continue
        at = _positions(length, target, factor, coordinate_transformation_mode, x)
        if mode == "nearest":
            x = x.index_select(axis, _nearest(at, nearest_mode).clamp(0, length - 1).long())
            continue
        base = at.floor()
        part = at - base
        if mode in ("linear", "bilinear"):
            taps = {0: 1 - part, 1: part}
        else:
            taps = {t: _cubic((part - t).abs(), cubic_coeff_a) for t in (-1, 0, 1, 2)}
            if exclude_outside:
                inside = {t: w * ((base + t >= 0) & (base + t < length)) for t, w in taps.items()}
                taps = {t: w / sum(inside.values()) for t, w in inside.items()}
        parts = []
        for tap, weight in taps.items():
            found = x.index_select(axis, (base + tap).clamp(0, length - 1).long())
            parts.append(found * weight.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis)))
        x = sum(parts[1:], parts[0])
    return x


def _positions(length: int, target: int, factor: float, mode: str, x: Tensor) -> Tensor:
    """Where the output positions of one axis lie in the input."""
    at = torch.arange(target, dtype=torch.float32, device=x.device)
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * (length - 1) / (target - 1) if target > 1 else at * 0
    if mode == "pytorch_half_pixel" and target <= 1:
        return at * 0
    middle = (at + 0.5) / factor - 0.5
    if mode == "half_pixel_symmetric":
        adjustment = target / (factor * length)
        return length / 2 * (1 - adjustment) + middle
    return middle


def _nearest(at: Tensor, mode: str) -> Tensor:
    if mode == "floor":
        return at.floor()
    if mode == "ceil":
        return at.ceil()
    return (at - 0.5).ceil() if mode == "round_prefer_floor" else (at + 0.5).floor()


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Keys 1981, equation 4."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
