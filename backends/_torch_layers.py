"""Layers with weights as PyTorch's modules; where an operand is computed at run time, the plain function instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from effc.layers import dilations, strides

from ._torch_ops import TABLE, attributes, refuse
from ._torch_reductions import gemm, layer_norm, matmul, prelu
from ._torch_shapes import gather, wrap
from ._torch_weights import Reshaped, Source, Transposed
from ._torch_windows import conv, conv_transpose, same, surround

if TYPE_CHECKING:
    from ._torch_build import Builder

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _plain(build: Builder, node: ir.Node, compute, **more: object) -> fx.Node:
    return build.call(compute, *(build(v) for v in node.inputs), **attributes(node), **more)


def _weight_and_bias(build: Builder, node: ir.Node) -> tuple[Source, Source | None] | None:
    """Both, when they can be parameters of one module."""
    weight = build.source(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = build.source(given)
    if weight is None or (given is not None and (bias is None or len(bias.shape) != 1)):
        return None
    return weight, bias


def _halves(pads: Sequence[int]) -> tuple[int, ...] | None:
    """Padding alike at both ends, as modules take it."""
    begins, ends = tuple(pads[: len(pads) // 2]), tuple(pads[len(pads) // 2 :])
    return begins if begins == ends and min(begins, default=0) >= 0 else None


@TABLE.rule("Conv")
def conv_rule(build: Builder, node: ir.Node) -> fx.Node:
    found = _weight_and_bias(build, node)
    if found is None or len(found[0].shape) - 2 not in CONVOLUTIONS:
        return _plain(build, node, conv)
    weight, bias = found
    outputs, inputs, *kernel = weight.shape
    x, steps, gaps = build(node.inputs[0]), strides(node, len(kernel)), dilations(node, len(kernel))
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    given = list(node.attributes.get_ints("pads", ())) if auto == "NOTSET" else []
    padding = _halves(given or [0] * 2 * len(kernel))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        x = build.call(same, x, kernel=tuple(kernel), strides=tuple(steps), dilations=tuple(gaps), auto_pad=auto)
    elif padding is None:
        x = build.call(surround, x, tuple(given))
    groups = node.attributes.get_int("group", 1)
    module = CONVOLUTIONS[len(kernel)](
        inputs * groups, outputs, tuple(kernel), tuple(steps), padding or 0, tuple(gaps), groups, bias is not None,
        device="meta",
    )  # fmt: skip
    return build.module(node, module, {"weight": weight, "bias": bias}, x)


@TABLE.rule("ConvTranspose")
def conv_transpose_rule(build: Builder, node: ir.Node) -> fx.Node:
    found, options = _weight_and_bias(build, node), attributes(node)
    sized = options.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in options
    if found is None or len(found[0].shape) - 2 not in TRANSPOSED or sized:
        return _plain(build, node, conv_transpose)
    weight, bias = found
    inputs, outputs, *kernel = weight.shape
    steps, gaps = tuple(strides(node, len(kernel))), tuple(dilations(node, len(kernel)))
    padding = _halves(options.get("pads", (0,) * 2 * len(kernel)))
    more = tuple(options.get("output_padding", (0,) * len(kernel)))
    if padding is None or any(m >= max(s, g) for m, s, g in zip(more, steps, gaps, strict=True)):
        return _plain(build, node, conv_transpose)
    groups = options.get("group", 1)
    module = TRANSPOSED[len(kernel)](
        inputs, outputs * groups, tuple(kernel), steps, padding, more, groups, bias is not None, gaps, device="meta"
    )
    return build.module(node, module, {"weight": weight, "bias": bias}, build(node.inputs[0]))


@TABLE.rule("Gemm")
def gemm_rule(build: Builder, node: ir.Node) -> fx.Node:
    found = _weight_and_bias(build, node)
    options = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | attributes(node)
    if found is None or options["transA"] or options["alpha"] != 1 or (found[1] is not None and options["beta"] != 1):
        return _plain(build, node, gemm)
    weight, bias = found
    outputs, inputs = weight.shape if options["transB"] else weight.shape[::-1]
    if bias is not None and bias.shape != (outputs,):
        return _plain(build, node, gemm)
    module = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layout = {} if options["transB"] else {"weight": Transposed()}
    return build.module(node, module, {"weight": weight, "bias": bias}, build(node.inputs[0]), layout=layout)


@TABLE.rule("MatMul")
def matmul_rule(build: Builder, node: ir.Node) -> fx.Node:
    weight = build.source(node.inputs[1])
    if weight is None or len(weight.shape) != 2:
        return _plain(build, node, matmul)
    module = nn.Linear(*weight.shape, bias=False, device="meta")
    return build.module(node, module, {"weight": weight}, build(node.inputs[0]), layout={"weight": Transposed()})


@TABLE.rule("BatchNormalization")
def batch_norm_rule(build: Builder, node: ir.Node) -> fx.Node:
    """ONNX keeps the share m of the statistics, PyTorch takes 1 - m of the batch's."""
    if node.attributes.get_int("training_mode", 0) or len(node.outputs) > 1:
        raise refuse(build, node, "training_mode=1")
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    sources = [build.source(v) for v in node.inputs[1:]]
    if None in sources or not all(build.is_statistic(v) for v in node.inputs[3:]):
        return build.call(normalize, *(build(v) for v in node.inputs), epsilon=epsilon)
    shape = build.shape(node.inputs[0])
    kind = NORMS.get(len(shape) if shape is not None else 0, BatchNorm)
    momentum = 1 - node.attributes.get_float("momentum", 0.9)
    module = kind(sources[0].shape[0], epsilon, momentum, device="meta")
    module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    weights = dict(zip(("weight", "bias", "running_mean", "running_var"), sources, strict=True))
    return build.module(node, module, weights, build(node.inputs[0]))


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over axis 1 of a tensor whose rank is known at run time only."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs two axes, got {input.dim()}")


def normalize(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float) -> Tensor:
    """Batch norm with statistics that are computed, or fixed because they are used elsewhere."""
    return nn.functional.batch_norm(x, mean, var, scale, bias, eps=epsilon)


@TABLE.rule("LayerNormalization")
def layer_norm_rule(build: Builder, node: ir.Node) -> fx.Node | list[fx.Node]:
    if node.attributes.get_int("stash_type", 1) != 1:
        raise refuse(build, node, "stash_type")
    weight = build.source(node.inputs[1])
    bias = build.source(node.inputs[2]) if len(node.inputs) > 2 else None
    shape, axis = build.shape(node.inputs[0]), node.attributes.get_int("axis", -1)
    over = -axis if axis < 0 else len(shape or ()) - axis
    alike = bias is None or (weight is not None and bias.shape == weight.shape)
    given = len(node.inputs) > 2 and node.inputs[2] is not None
    if weight is None or len(weight.shape) != over or len(node.outputs) > 1 or not alike or given != (bias is not None):
        return _plain(build, node, layer_norm, outputs=len(node.outputs))
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    module = nn.LayerNorm(weight.shape, epsilon, bias=bias is not None, device="meta")
    return build.module(node, module, {"weight": weight, "bias": bias}, build(node.inputs[0]))


@TABLE.rule("PRelu")
def prelu_rule(build: Builder, node: ir.Node) -> fx.Node:
    slope, shape = build.source(node.inputs[1]), build.shape(node.inputs[0])
    if slope is None or shape is None or len(shape) < 2:
        return _plain(build, node, prelu)
    count = max(slope.shape)
    channels = (1,) * (len(shape) - len(slope.shape)) + slope.shape
    if count > 1 and (len(channels) != len(shape) or channels != (1, count) + (1,) * (len(shape) - 2)):
        return _plain(build, node, prelu)
    module = nn.PReLU(count, device="meta")
    return build.module(node, module, {"weight": slope}, build(node.inputs[0]), layout={"weight": Reshaped((count,))})


@TABLE.rule("Gather")
def gather_rule(build: Builder, node: ir.Node) -> fx.Node:
    """Rows of a weight, picked at run time, are an embedding."""
    weight = build.source(node.inputs[0])
    if weight is None or len(weight.shape) != 2 or node.attributes.get_int("axis", 0) not in (0, -2):
        return _plain(build, node, gather)
    indices = build.call(wrap, build(node.inputs[1]), size=weight.shape[0])
    module = nn.Embedding(*weight.shape, device="meta")
    return build.module(node, module, {"weight": weight}, indices)


@TABLE.rule("Dropout")
def dropout_rule(build: Builder, node: ir.Node) -> fx.Node | list[fx.Node]:
    """Drops in train(), and passes on in eval(), as ONNX has it."""
    given = build.numbers(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get_float("ratio", 0.5)
    ratio = 0.5 if given is None else given[0] if isinstance(given, tuple) else given
    x = build(node.inputs[0])
    if isinstance(ratio, fx.Node) or len(node.outputs) > 1:
        mask = build.call(torch.ones_like, x, dtype=torch.bool)
        return [x, mask][: len(node.outputs)]
    return build.module(node, nn.Dropout(float(ratio)), {}, x)
