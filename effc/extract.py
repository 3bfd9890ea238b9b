"""A part of a model, between some tensors and others, as a model of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from effc.model import Model


def between(targets: Sequence[ir.Value], available: Collection[str]) -> tuple[set[ir.Node], list[ir.Value]]:
    """The nodes that make some tensors of those available, and which of these they read and do not make again."""
    needed: set[ir.Node] = set()
    entries: dict[str, ir.Value] = {}
    waiting = list(targets)
    while waiting:
        value = waiting.pop()
        if value.name in available or (value.is_graph_input() and not value.is_initializer()):
            entries[value.name] = value
        elif (node := value.producer()) is not None and node not in needed:
            needed.add(node)
            waiting += [v for v in node.inputs if v is not None]
    again = {v.name for node in needed for v in node.outputs}  # beside another output that was not available
    return needed, [value for name, value in entries.items() if name not in again]


def part(
    model: Model,
    nodes: Collection[ir.Node],
    entries: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    dtypes: Mapping[str, np.dtype],
) -> Model:
    """A copy of these nodes, with the weights that they read; of the sizes of entries only the rank is kept.

    Args:
        dtypes: of entries, where the model does not say.
    """
    graph, ordered = model.graph, [node for node in model.graph if node in nodes]
    weights = {v.name: v for node in ordered for v in node.inputs if v is not None and v.is_initializer()}
    view = ir.GraphView(
        entries, outputs, nodes=ordered, initializers=tuple(weights.values()), name=graph.name,
        opset_imports=graph.opset_imports,
    )  # fmt: skip
    copy = view.clone()
    for value in (*copy.inputs, *copy.outputs):
        value.shape = None if value.producer() is not None else _rank_only(value)
    for value, before in zip(copy.inputs, entries, strict=True):
        value.type = value.type or ir.TensorType(ir.DataType.from_numpy(dtypes[before.name]))
    whole = ir.Model(copy, ir_version=model.ir.ir_version, functions=model.ir.functions.values())
    return Model(whole, model.name)


def _rank_only(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([None] * len(value.shape))
