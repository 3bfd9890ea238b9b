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
Map = np.ndarray


class Trace:
    """What is known so far of the units of a model.

    Attributes:
        tensors: activation -> map of units.
        weights: (weight, axis, whether it reads) -> unit of each index.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.shapes = model.shapes(model.batch or 2)
        self.tensors: dict[str, Map] = {}
        self.weights: dict[tuple[str, int, bool], Map] = {}
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
        """Units at the same place, broadcast, become one; beside what is fixed they are fixed as well."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(a, b))
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self._edges.append(np.unique(np.stack([a[both], b[both]]), axis=1))

    def pin(self, units: Map, why: str) -> None:
        units = np.unique(units[units >= 0])
        if len(units):
            self._pins.append((units, why))

    def weigh(self, value: ir.Value | None, axis: int, units: Map, *, reads: bool = False) -> None:
        """A weight has these units along an axis, and those that another reader found there."""
        if value is None:
            return
        key = value.name, axis, reads
        known = self.weights.setdefault(key, units)
        if known is not units:
            self.meet(known, units, f"{value.name!r} is read by several nodes, one of which needs it whole")
        other = self.weights.get((value.name, axis, not reads))
        if other is not None:
            self.pin(np.concatenate([known, other]), f"{value.name!r} is read in two ways")

    def made(self, weight: ir.Value, axis: int, count: int) -> Map:
        """The units [count] that a weight makes: new ones, unless another reader of it made some."""
        key = weight.name, axis, False
        if key not in self.weights:
            self.weights[key] = self.fresh(count)
        return self.weights[key]

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
        for _, units, sizes in live:
            units = np.broadcast_to(units, size)
            if (units < 0).all() and sizes is not None and all(sizes[axis] == 1 for axis in axes):
                continue  # one number for all channels
            if not empty:
                self.meet(found, units, why)
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
            self.pin(found, f"{node.op_type} {node.name!r} combines it with a constant of several axes")

    def keep_rectangular(self) -> None:
        """Where two axes of a tensor hold units together, indices of the first stay whole: groups of a shuffle."""
        for _ in range(3):
            names, _ = self.united()
            joint = []
            for units in self.tensors.values():
                if sum(length > 1 for length in units.shape) < 2:
                    continue
                units = squeezed(np.where(units >= 0, names[units], FIXED))
                axes = [axis for axis, length in enumerate(units.shape) if length > 1]
                if len(axes) > 1:
                    joint.append((units, axes[0]))
            if not joint:
                return
            for units, axis in joint:
                self.unite(units, np.take(units, [0], axis))

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
    rule = None if holds_graphs(node) else RULES.find(node)
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
