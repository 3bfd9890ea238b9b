"""What is known of the units of a model while its operators are followed; see `effc.channels`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from effc.model import Model, constant_tensor, holds_graphs
from effc.table import OpTable

FIXED = -1  # no unit: it cannot be removed
BATCH, ANY = 2, 7  # lengths taken for a dynamic batch, and for other dynamic dimensions
Map = np.ndarray


class Trace:
    """What is known so far of the units of a model.

    Args:
        apart: nodes that share a vector, as exporters write equal biases once, can have one each; else it ties them.

    Attributes:
        tensors: activation -> map of units.
        weights: (weight, axis, whether it reads, the node where that is one of several) -> unit of each index.
    """

    def __init__(self, model: Model, *, apart: bool = False) -> None:
        self.model, self._apart = model, apart
        self.node: ir.Node | None = None  # that is followed now
        symbols = {d for info in model.inputs for d in (info.shape or ())[1:] if isinstance(d, str)}
        self.shapes = model.shapes(model.batch or BATCH, dict.fromkeys(symbols, ANY))
        self.tensors: dict[str, Map] = {}
        self.weights: dict[tuple[str, int, bool, str], Map] = {}
        self._weighed: set[tuple[str, str]] = set()  # weight, node that said what it makes of it
        self._count = 0
        self._edges: list[np.ndarray] = []
        self._pins: list[tuple[np.ndarray, str]] = []

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """Sizes as numbers, or None where one is not known."""
        found = self.shapes.get(value.name)
        return found if found is not None and all(isinstance(d, int) for d in found) else None

    def of(self, value: ir.Value | None) -> Map:
        """The map of a tensor; fixed throughout where nothing is known of it, or it is a constant."""
        if value is not None and value.name in self.tensors:
            return self.tensors[value.name]
        shape = None if value is None else self.shapes.get(value.name)
        return np.full((1,) * len(shape or ()), FIXED)

    def fresh(self, count: int) -> Map:
        self._count += count
        return np.arange(self._count - count, self._count)

    def unite(self, a: Map, b: Map) -> None:
        """Units at the same place, broadcast, become one."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(a, b))
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self._edges.append(np.unique(np.stack([a[both], b[both]]), axis=1))

    def pin(self, units: Map, why: str) -> None:
        units = np.unique(units[units >= 0])
        if len(units):
            self._pins.append((units, why))

    def weigh(self, value: ir.Value | None, axis: int, units: Map, *, reads: bool = False) -> None:
        """A weight has these units along an axis, and those that another reader found there.

        What is no weight but a tensor meets them number by number.
        """
        if value is None:
            return
        if not value.is_initializer():
            own = self.of(value)
            self.meet(laid(units, axis, max(own.ndim, 1)), own, self._obstacle(value, f"{value.name!r} is no weight"))
            return
        reader = self._reader(value)
        self._weighed.add((value.name, self.node.name if self.node else ""))
        known = self.weights.setdefault((value.name, axis, reads, reader), units)
        if known is not units:
            self.meet(known, units, f"{value.name!r} is read by several nodes, one of which needs it whole")
        other = self.weights.get((value.name, axis, not reads, reader))
        if other is not None:
            self.pin(np.concatenate([known, other]), f"{value.name!r} is read in two ways")

    def made(self, weight: ir.Value, axis: int, count: int) -> Map:
        """The units [count] that a weight makes: new ones, unless another reader of it made some."""
        key = weight.name, axis, False, self._reader(weight)
        self._weighed.add((weight.name, self.node.name if self.node else ""))
        if key not in self.weights:
            self.weights[key] = self.fresh(count)
        return self.weights[key]

    def _reader(self, weight: ir.Value) -> str:
        """The node that reads a vector where others do as well, and each can have its own; else nothing."""
        if not self._apart or self.node is None or len(self.shapes.get(weight.name) or ()) != 1:
            return ""
        return (self.node.name or "") if any(reader is not self.node for reader, _ in weight.uses()) else ""

    def meet(self, a: Map, b: Map, why: str) -> None:
        """Unite, and pin what meets something fixed."""
        self.unite(a, b)
        a, b = np.broadcast_arrays(a, b)
        self.pin(np.where(b < 0, a, FIXED), why)
        self.pin(np.where(a < 0, b, FIXED), why)

    def joined(self, values: Sequence[ir.Value | None], node: ir.Node, rank: int) -> Map:
        """The map of what combines tensors number by number, its constants weighed."""
        parts = [
            (v, ranked(self.of(v), rank), _ranked_shape(self.shapes.get(v.name), rank)) for v in values if v is not None
        ]
        live = [part for part in parts if constant_tensor(part[0]) is None]
        size = np.broadcast_shapes(*(units.shape for _, units, _ in live)) if live else (1,) * rank
        found = np.full(size, FIXED)
        why = f"{node.op_type} {node.name!r} combines it with what cannot be removed"
        axes = [axis for axis, length in enumerate(size) if length > 1]
        empty = True
        for value, units, sizes in live:
            units = np.broadcast_to(units, size)
            if (units < 0).all() and sizes is not None and all(sizes[axis] == 1 for axis in axes):
                continue  # one number for all channels
            if not empty:
                self.meet(found, units, self._obstacle(value, why))
            found, empty = np.where(found >= 0, found, units), False
        for value, _, sizes in parts:
            if constant_tensor(value) is not None and sizes is not None:
                self._weigh_constant(value, sizes, found, node)
        return found

    def _weigh_constant(self, value: ir.Value, sizes: tuple, found: Map, node: ir.Node) -> None:
        own = [axis for axis, length in enumerate(sizes) if length > 1 and found.shape[axis] > 1]
        if len(own) == 1 and sum(length > 1 for length in found.shape) == 1 and value.is_initializer():
            rank = len(self.shapes[value.name])
            self.weigh(value, own[0] - (len(sizes) - rank), found.reshape(-1))
        elif own:
            what = "of several axes" if value.is_initializer() else "that is no weight; simplify makes it one"
            self.pin(found, f"{node.op_type} {node.name!r} combines it with a constant {what}")

    def _obstacle(self, value: ir.Value, otherwise: str) -> str:
        """Why units that meet a tensor cannot be removed, if it has none."""
        maker = value.producer()
        read = [] if maker is None else [v for v in maker.inputs if v is not None]
        if read and all(constant_tensor(v) is not None for v in read):
            return f"{value.name!r} is computed from weights; simplify makes it one"
        return otherwise

    def keep_whole(self) -> None:
        """What is not understood reads a weight too: its units are pinned, unless it can have a copy."""
        for (name, _, _, reader), units in self.weights.items():
            for node, _ in () if reader else self.model.graph.initializers[name].uses():
                if (name, node.name or "") not in self._weighed:
                    self.pin(units, f"{name!r} is also read by {node.op_type} {node.name!r}, which needs it whole")

    def keep_rectangular(self) -> None:
        """Where two axes of a tensor hold units together, indices of the first stay whole: groups of a shuffle."""
        waiting = [(name, m) for name, m in self.tensors.items() if sum(length > 1 for length in m.shape) > 1]
        while waiting:
            names, _ = self.united()
            first = np.append(np.unique(names[:-1], return_index=True)[1], FIXED)  # a unit for each number
            joint = []
            for name, units in waiting:
                found = squeezed(np.where(units >= 0, first[names[units]], FIXED))
                axes = [axis for axis, length in enumerate(found.shape) if length > 1]
                if len(axes) < 2:
                    continue
                if (found < 0).any():
                    self.pin(found, f"{name!r} holds it along two axes, with what cannot be removed")
                    continue
                self.unite(found, np.take(found, [0], axes[0]))
                joint.append((name, units))
            waiting = joint

    def united(self) -> tuple[np.ndarray, dict[int, str]]:
        """Unit -> its final number, and final number -> why it is pinned."""
        pairs = np.concatenate(self._edges, axis=1) if self._edges else np.zeros((2, 0), np.int64)
        graph = coo_array((np.ones(pairs.shape[1], np.int8), pairs), shape=(self._count, self._count))
        _, names = connected_components(graph, directed=False) if self._count else (0, np.zeros(0, np.int64))
        pinned: dict[int, str] = {}
        for units, why in self._pins:
            for unit in np.unique(names[units]).tolist():
                pinned.setdefault(unit, why)
        return np.append(names, FIXED), pinned


Rule = Callable[[Trace, ir.Node], Any]
RULES: OpTable[Rule] = OpTable("channels")


def follow(trace: Trace, node: ir.Node) -> None:
    """Take the units of a node's inputs to its outputs; what no rule knows is pinned."""
    trace.node = node
    ranks_known = all(v is None or trace.shapes.get(v.name) is not None for v in node.inputs)
    rule = RULES.find(node) if ranks_known and not holds_graphs(node) else None
    if rule is not None:
        made = rule(trace, node)
        if made is not None:
            for value, units in zip(node.outputs, made if isinstance(made, list) else [made], strict=False):
                trace.tensors[value.name] = units
            return
    for value in _read(node):
        trace.pin(trace.of(value), f"{node.op_type} {node.name!r} is not understood")


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, the graphs that it holds included."""
    yield from (v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        graphs = {ir.AttributeType.GRAPH: [attribute.value], ir.AttributeType.GRAPHS: attribute.value}
        for graph in graphs.get(attribute.type, ()):
            for inner in graph:
                yield from _read(inner)


def ranked(units: Map, rank: int) -> Map:
    return units.reshape((1,) * (rank - units.ndim) + units.shape)


def _ranked_shape(shape: tuple | None, rank: int) -> tuple | None:
    return None if shape is None else (1,) * (rank - len(shape)) + tuple(shape)


def squeezed(units: Map) -> Map:
    """The map with length 1 along axes where it does not change."""
    for axis in range(units.ndim):
        first = np.take(units, [0], axis)
        if units.shape[axis] > 1 and (units == first).all():
            units = first
    return units


def laid(units: Map, axis: int, rank: int) -> Map:
    """Units [n] along one axis of a map."""
    shape = [1] * rank
    shape[axis] = -1
    return units.reshape(shape)
