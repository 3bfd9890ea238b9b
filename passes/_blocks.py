"""Residual blocks of a graph: y = x + f(x), where the branch f can go and leave y = x.

Found by walking back from the operands of each Add: what nothing else reads belongs to that operand alone. An operand
with layers of its own is the branch, one without is the shortcut. Nodes are visited once for each block they are in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.contract import Skipped
from effc.cost import MATRIX_OPS
from effc.layers import RECURRENT
from effc.model import STANDARD_DOMAINS, Model, constant_tensor
from effc.placement import clip_bounds

LAYERS = frozenset({*MATRIX_OPS, *RECURRENT})
KEEPING = frozenset({  # what is in bounds before is so behind: they choose among values, move them, or average them
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Dropout", "Reshape", "Flatten",
    "Squeeze", "Unsqueeze", "Transpose",
})  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One residual block.

    Attributes:
        adding: the Add that joins branch and shortcut.
        keep: which input of it is the shortcut.
        nodes: the branch: what nobody reads once the Add is gone.
    """

    adding: ir.Node
    keep: int
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        return self.adding.name or ""

    @property
    def shortcut(self) -> ir.Value:
        value = self.adding.inputs[self.keep]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        return self.adding.outputs[0]


def blocks(model: Model) -> Iterator[Block | Skipped]:
    """The blocks of the main graph in topological order, and the sums that are none, with why."""
    shapes = model.shapes()
    for node in model.nodes("Add"):
        if node.domain in STANDARD_DOMAINS and not any(_constant(model, v) for v in node.inputs):
            yield _block(node, shapes)


def _block(node: ir.Node, shapes: dict[str, tuple | None]) -> Block | Skipped:
    own = [_own(node, index) for index in (0, 1)]
    layers = [[n for n in nodes if n.op_type in LAYERS] for nodes in own]
    if all(layers):
        names = " and ".join(repr(found[0].name) for found in layers)
        return Skipped(node.name, f"both of its operands come from layers of their own, {names}: neither is a shortcut")
    if not any(layers):
        return Skipped(node.name, "neither of its operands is a branch of layers that nothing else reads")
    keep = 0 if layers[1] else 1
    nodes, shortcut = own[1 - keep], node.inputs[keep]
    starts = {shortcut, *_entries(own[keep])}
    if not starts & _entries(nodes):
        inside = sorted({v.name or "" for v in _entries(nodes) if v.producer() is not None})
        found = f"it reads {', '.join(map(repr, inside[:2]))}" if inside else "it reads inputs of the graph"
        return Skipped(node.name, f"its branch does not start where its shortcut does: {found}")
    sizes = shapes.get(shortcut.name), shapes.get(node.outputs[0].name)
    if None not in sizes and sizes[0] != sizes[1]:
        return Skipped(node.name, f"its shortcut has the shape {sizes[0]}, its sum {sizes[1]}")
    if node.outputs[0].is_graph_output():
        return Skipped(node.name, "its sum is an output of the graph, which the shortcut cannot take the name of")
    return Block(node, keep, tuple(nodes))


def _own(adding: ir.Node, index: int) -> list[ir.Node]:
    """The nodes that nobody reads once an Add does not read this operand, from the operand back."""
    if adding.inputs[0] is adding.inputs[1]:
        return []
    found: dict[ir.Node, None] = {}
    waiting = [adding.inputs[index]]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or node in found or node.graph is not adding.graph:
            continue
        uses = [use for v in node.outputs for use in v.uses()]
        if not any(v.is_graph_output() for v in node.outputs) and all(
            n in found or (n is adding and place == index) for n, place in uses
        ):
            found[node] = None
            waiting += [v for v in node.inputs if v is not None]
    return list(found)


def _entries(nodes: list[ir.Node]) -> set[ir.Value]:
    """What nodes read that they do not make, weights left out."""
    made = {v for node in nodes for v in node.outputs}
    return {v for node in nodes for v in node.inputs if v is not None and v not in made and not v.is_initializer()}


def _constant(model: Model, value: ir.Value | None) -> bool:
    return value is None or value.is_initializer() or constant_tensor(value) is not None


def drop(model: Model, adding: ir.Node, keep: int) -> ir.Value:
    """Let the readers of a block's sum read its shortcut, and return that.

    An activation behind the sum goes as well where it changes nothing.
    """
    source, readers = adding.inputs[keep], list(adding.outputs[0].consumers())
    assert source is not None
    edit.bypass(model, adding, source)
    if len(readers) == 1 and _idle(readers[0], source) and edit.may_bypass(model, readers[0], source):
        edit.bypass(model, readers[0], source)
    return source


def _idle(node: ir.Node, x: ir.Value) -> bool:
    """Whether a node is an activation that cuts off nothing of a tensor."""
    ends = _cut(node)
    if ends is None or node.inputs[0] is not x:
        return False
    low, high = _bounds(x)
    return ends[0] <= low and high <= ends[1]


def _cut(node: ir.Node) -> tuple[float, float] | None:
    """Where an activation cuts off; None if it does more than that."""
    if node.domain not in STANDARD_DOMAINS:
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip" or any(v is not None and constant_tensor(v) is None for v in node.inputs[1:]):
        return None
    low, high = clip_bounds(node)
    return -np.inf if low is None else low, np.inf if high is None else high


def _bounds(value: ir.Value) -> tuple[float, float]:
    """Bounds of all numbers of a tensor, as far as the nodes that make it tell."""
    while (node := value.producer()) is not None and node.domain in STANDARD_DOMAINS:
        if (ends := _cut(node)) is not None:
            return ends
        if node.op_type in ("Sigmoid", "Softmax", "HardSigmoid"):
            return 0.0, 1.0
        before = node.inputs[0] if node.inputs else None
        if node.op_type not in KEEPING or before is None:
            break
        value = before
    return -np.inf, np.inf
