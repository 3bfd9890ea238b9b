"""An image's few channels made more, as integer kernels want several: the pixels of a stride become channels.

    Conv(k x k, stride s, C -> d)  ->  Conv(k' x k', stride 1, s^2 C -> d) . SpaceToDepth(s),  k' = about k / s

Weights are moved, and zeros stand where a larger window has no weight: the sums are the same integers. Where the stride
does not fit, channels of zeros are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.layers import dilations, pads, strides
from effc.model import Model


def widen(
    model: Model, node: ir.Node, weight: np.ndarray, image: ir.Value, codes: ir.Value,
    parameters: tuple[ir.Value, ir.Value], multiple: int,
) -> np.ndarray:  # fmt: skip
    """Let a convolution of an image read more channels; its weight for them.

    Args:
        weight: codes [d, C, *kernel].
        image, codes: the image [N, C, *size], and its codes.
        parameters: scale and zero point of the codes.
        multiple: of channels, that the kernels like. An image of so many, or read in groups, is left as it is.
    """
    missing = _missing(node, weight.shape, multiple)
    if not missing or image.shape is None:
        return weight
    if (stride := _foldable(node, image)) is not None:
        weight, given = folded(weight, stride, pads(node, image.shape[2:], weight.shape[2:]), image.shape[2:])
        made = edit.make_node(
            model, "SpaceToDepth", [codes], {"blocksize": stride}, name=f"{image.name}_to_depth", origin=[node]
        )
        edit.set_attributes(model, node, strides=None, pads=given, kernel_shape=weight.shape[2:], auto_pad=None)
    else:
        weight = np.pad(weight, [(0, 0), (0, missing)] + [(0, 0)] * (weight.ndim - 2))
        ends = np.zeros(2 * weight.ndim, np.int64)
        ends[weight.ndim + 1] = missing
        widths = edit.add_initializer(model, f"{image.name}_pads", ends)
        made = edit.make_node(model, "Pad", [codes, widths, parameters[1]], name=f"{image.name}_widen", origin=[node])
    made.outputs[0].type = codes.type
    decoded = edit.make_node(
        model, "DequantizeLinear", [made.outputs[0], *parameters], name=f"{image.name}_wide_dequantize", origin=[node]
    )
    decoded.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    edit.insert_before(model, node, [made, decoded])
    edit.set_input(model, node, 0, decoded.outputs[0])
    return weight


def widened(node: ir.Node, weight: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Shape that `widen` will give the weight [d, C, *kernel] of a convolution of an image."""
    image = node.inputs[0]
    missing = _missing(node, weight, multiple)
    if missing and image.shape is not None and (stride := _foldable(node, image)) is not None:
        return _folded_shape(weight, stride, pads(node, image.shape[2:], weight[2:]))
    return weight[0], weight[1] + missing, *weight[2:]


def folded(
    weight: np.ndarray, stride: int, given: Sequence[int], size: Sequence[int]
) -> tuple[np.ndarray, list[int]]:  # fmt: skip
    """Weight and pads of the convolution of stride 1 behind SpaceToDepth that computes the same.

    Output o reads pixel s o + t - p with tap t; that is pixel (t - p) mod s of block o + floor((t - p) / s).

    Args:
        weight: [d, C, k, l].
        given: pads [*begins, *ends].
        size: of the image, in multiples of the stride.
    """
    d, channels, *kernel = weight.shape
    _, _, *taps = _folded_shape(weight.shape, stride, given)
    begins = [-(-p // stride) for p in given[:2]]
    ahead = [stride * b - p for b, p in zip(begins, given[:2], strict=True)]
    around = [(a, stride * t - a - k) for a, t, k in zip(ahead, taps, kernel, strict=True)]
    blocks = np.pad(weight, [(0, 0), (0, 0), *around]).reshape(d, channels, taps[0], stride, taps[1], stride)
    moved = blocks.transpose(0, 3, 5, 1, 2, 4).reshape(d, -1, *taps)
    made = [(n + p + e - k) // stride + 1 for n, p, e, k in zip(size, given[:2], given[2:], kernel, strict=True)]
    ends = [o - 1 + t - b - n // stride for o, t, b, n in zip(made, taps, begins, size, strict=True)]
    return moved, [*begins, *ends]


def _folded_shape(weight: Sequence[int], stride: int, given: Sequence[int]) -> tuple[int, ...]:
    d, channels, *kernel = weight
    begins = given[: len(kernel)]
    taps = (-(-p // stride) + (k - 1 - p) // stride + 1 for k, p in zip(kernel, begins, strict=True))
    return d, stride**2 * channels, *taps


def _missing(node: ir.Node, weight: Sequence[int], multiple: int) -> int:
    """Channels that an image lacks."""
    return -weight[1] % multiple if node.attributes.get_int("group", 1) == 1 else 0


def _foldable(node: ir.Node, image: ir.Value) -> int | None:
    """The stride of a convolution whose pixels can become channels, or None."""
    size = list(image.shape)[2:]
    if len(size) != 2 or set(dilations(node, 2)) != {1}:
        return None
    stride, other = strides(node, 2)
    fits = stride == other > 1 and all(isinstance(n, int) and n % stride == 0 for n in size)
    return stride if fits else None
