"""What layers cost in float and in integers, layer by layer, on the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import replace

import onnx_ir as ir

from effc.contract import Context
from effc.cost import Cost
from effc.kernels import Kernel
from effc.layers import constant_weight
from effc.lowered import detour, integer, integer_cost
from effc.model import Model
from effc.traffic import traffic

from ._stem import widened

CLOSE = 1.2  # ratio up to which the prediction of a single kernel does not settle which of two is slower


def layer_costs(
    model: Model, nodes: Sequence[ir.Node], context: Context, *, static: bool
) -> dict[ir.Node, tuple[Cost, Cost]]:
    """Cost of each layer as it is, and on codes.

    Seconds of both are told where the target knows both kernels by measurement, and a loss is beyond doubt. What a
    layer takes as it is counts, for one that would stand between integer layers, the way to floats and back: that is
    what leaving it alone costs.

    Args:
        static: activations are codes between layers too.
    """
    prediction = context.foresee(model)
    moved = traffic(model, context.batch, context.dims, None if prediction is None else prediction.fused)
    costs = {}
    for node in nodes:
        before = context.cost_of(model, [node.name])
        weight = constant_weight(node)
        saved = weight.nbytes - weight.size  # of a weight that several layers read, the first tells
        saved = saved if saved <= before.weight_bytes else 0
        costs[node] = before, integer_cost(before, moved[node.name], context.target, saved, coded=static)
    pairs = _kernels(model, nodes, context) if static and prediction is not None else {}
    times = {node: [context.seconds([kernel]) for kernel in pair] for node, pair in pairs.items()}
    gaining = {node for node in nodes if node not in times or times[node][1] < times[node][0]}
    behind, ahead = sides(list(model.graph), gaining)
    for node, (alone, lowered) in times.items():
        besides = detour(pairs[node][0]) if node in behind and node in ahead else ()
        stays = alone + (context.seconds(besides) if all(map(_measured(context), besides)) else 0.0)
        if stays <= lowered < CLOSE * stays:
            continue  # too close to tell: the stage is measured
        before, after = costs[node]
        costs[node] = replace(before, seconds=stays), replace(after, seconds=lowered)
    return costs


def _kernels(model: Model, nodes: Sequence[ir.Node], context: Context) -> dict[ir.Node, tuple[Kernel, Kernel]]:
    """Of layers whose float and integer kernels were both measured: these two."""
    if not context.target.kernels or context.backend.name != context.target.runtime:
        return {}
    found, stands_for = context.backend.kernels(model, context.batch, context.dims, context.threads)
    by_name, measured = {kernel.name: kernel for kernel in found}, _measured(context)
    pairs = {}
    for node in nodes:
        kernel = by_name.get(stands_for.get(node.name or "", ""))
        lowered = None if kernel is None else integer(kernel, _weight_shape(node, context))
        if kernel is not None and lowered is not None and measured(kernel) and measured(lowered):
            pairs[node] = kernel, lowered
    return pairs


def _measured(context: Context) -> Callable[[Kernel], bool]:
    return lambda kernel: kernel.key in context.target.kernels.get(1, {})


def _weight_shape(node: ir.Node, context: Context) -> tuple[int, ...] | None:
    """Of a convolution, as it is lowered: with as many channels of an image as integer kernels like."""
    if node.op_type != "Conv":
        return None
    shape = constant_weight(node).shape
    return widened(node, shape, context.target.integer.inputs_in) if node.inputs[0].is_graph_input() else shape


def sides(order: Sequence[ir.Node], sources: Set[ir.Node]) -> tuple[set[ir.Node], set[ir.Node]]:
    """Nodes that stand behind one of the sources, and nodes that stand before one."""
    behind = _reached(order, sources, lambda n: (v.producer() for v in n.inputs if v is not None))
    return behind, _reached(order[::-1], sources, lambda n: (c for v in n.outputs for c in v.consumers()))


def _reached(
    order: Sequence[ir.Node], sources: Set[ir.Node], neighbours: Callable[[ir.Node], Iterable[ir.Node | None]]
) -> set[ir.Node]:
    """Nodes with a source among the nodes that come before them in `order` and that `neighbours` lead to."""
    reached: set[ir.Node] = set()
    for node in order:
        if any(n is not None and (n in reached or n in sources) for n in neighbours(node)):
            reached.add(node)
    return reached
