"""Depthwise convolutions with a pointwise one behind them, computed as the one convolution that both make.

    y = P (D x),  D[c m, i, j] for channel c,  P[o, c m]   =   W x,  W[o, c, i, j] = sum_m P[o, c m] D[c m, i, j]

The factors stay what is trained; gradients reach them through W. PyTorch runs grouped convolutions several times slower
than dense ones of as many multiply-accumulates, forwards and backwards, so that W pays though it counts more of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

DEARER = 4  # times the chain's multiply-accumulates up to which the one convolution takes less time
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
COMPUTE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def compose(view: fx.GraphModule) -> int:
    """Let each chain of a view run as one convolution, in place; how many there were. Modules and names stay."""
    modules, count = dict(view.named_modules()), 0
    for last in list(view.graph.nodes):
        first = last.args[0] if last.op == "call_module" and last.args else None
        if not isinstance(first, fx.Node) or first.op != "call_module" or len(first.users) > 1:
            continue
        depthwise, pointwise = modules[first.target], modules[last.target]
        if not _pays(depthwise, pointwise):
            continue
        with view.graph.inserting_before(last):
            operands = [_operand(view, node, name) for name in ("weight", "bias") for node in (first, last)]
            where = {name: getattr(depthwise, name) for name in ("stride", "padding", "dilation")}
            made = view.graph.call_function(convolved, (first.args[0], *operands), where)
        made.meta = last.meta
        last.replace_all_uses_with(made)
        view.graph.erase_node(last)
        view.graph.erase_node(first)
        count += 1
    if count:
        view.recompile()
    return count


def convolved(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, inner: Tensor | None, outer: Tensor | None, *,
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """[N, C, ...] -> [N, O, ...].

    Args:
        depthwise: [C m, 1, *kernel], its filters channel by channel.
        pointwise: [O, C m, 1, ...].
        inner, outer: their biases, [C m] and [O].
    """
    channels, kernel = x.shape[1], depthwise.shape[2:]
    with torch.autocast(x.device.type, enabled=False):  # weights are small: their product stays in their precision
        by_channel, each = pointwise.flatten(1).unflatten(1, (channels, -1)), depthwise.flatten(1)
        weight = torch.einsum("ocm,cmk->ock", by_channel, each.unflatten(0, (channels, -1)))
        bias = outer if inner is None else pointwise.flatten(1) @ inner + (0 if outer is None else outer)
    return COMPUTE[x.dim()](x, weight.unflatten(2, kernel), bias, stride, padding, dilation)


def _pays(first: nn.Module, last: nn.Module) -> bool:
    if not isinstance(first, KINDS) or type(first) is not type(last):
        return False
    if first.groups != first.in_channels or first.groups == 1 or isinstance(first.padding, str):
        return False
    plain = {*last.kernel_size, *last.stride, last.groups} == {1} and not any(last.padding)
    taps, filters, outputs = first.weight[0].numel(), first.out_channels, last.out_channels
    return plain and first.in_channels * outputs * taps <= DEARER * filters * (taps + outputs)


def _operand(view: fx.GraphModule, node: fx.Node, name: str) -> fx.Node | None:
    there = getattr(view.get_submodule(str(node.target)), name) is not None
    return view.graph.get_attr(f"{node.target}.{name}") if there else None
