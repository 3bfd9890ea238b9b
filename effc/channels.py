"""Which channels live and die together: units, and where in the model each of them shows.

A tensor has a map of its numbers to units: an array of its rank, of length 1 along axes where nothing changes, with
`FIXED` for what cannot be removed. Operators that move numbers move the map in the same way; those that combine tensors
number by number unite their units. A layer reads the units of its input and makes new ones. So shortcuts,
concatenations, channel shuffles and heads of attention need no rules of their own (compare the dependency graphs of
Fang et al., "DepGraph", CVPR 2023, section 3.2, which are built of layers and not of numbers).

What is not understood pins the units that it meets, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import networkx as nx
import numpy as np

from effc import channel_moves, channel_rules
from effc.channel_trace import FIXED, Trace, follow
from effc.model import Model

RULE_FILES = (channel_moves, channel_rules)  # imported for what they put into the table


class Place(NamedTuple):
    """An axis of a weight along which units lie.

    Attributes:
        reads: the weights there are what reads the units; else they make them.
        reader: the node meant, where several share a vector: units that one of them loses stay in the others' copies.
    """

    weight: str
    axis: int
    reads: bool
    reader: str = ""


@dataclass(frozen=True)
class Group:
    """Units that show at the same places: any of them can be removed by itself, at all its places together.

    Attributes:
        units: their numbers.
        pinned: why none of them can be removed; None where they can.
    """

    units: tuple[int, ...]
    places: tuple[Place, ...]
    pinned: str | None


class Channels:
    """The units of a model.

    Attributes:
        tensors: name of an activation -> its map of units; length 1 along axes where nothing changes.
        weights: place -> unit of each index along it.
        pinned: unit -> why it cannot be removed.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], weights: Mapping[Place, np.ndarray], pinned: Mapping[int, str]
    ) -> None:
        self.tensors, self.weights, self.pinned = tensors, weights, pinned

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All units, by the places where they show, in the model's order."""
        shown: dict[int, list[Place]] = {}
        for place, units in self.weights.items():
            for unit in np.unique(units[units >= 0]).tolist():
                shown.setdefault(unit, []).append(place)
        found: dict[tuple[tuple[Place, ...], str | None], list[int]] = {}
        for unit, places in shown.items():
            found.setdefault((tuple(places), self.pinned.get(unit)), []).append(unit)
        return tuple(Group(tuple(units), places, pinned) for (places, pinned), units in found.items())

    @cached_property
    def graph(self) -> nx.Graph:
        """Places as nodes, an edge where two show the same units; its `pairs` are the indices along one and the other.

        A place is joined to the first one that shows the unit; `first` of an edge says which of the two that is.
        """
        graph = nx.Graph()
        graph.add_nodes_from(self.weights)
        for group in self.groups:
            first, *rest = group.places
            here = self._rows(first, group.units)
            for place in rest:
                there = self._rows(place, group.units)
                pairs = [(a, b) for unit in group.units for a in here[unit] for b in there[unit]]
                known = graph.edges.get((first, place), {"pairs": []})
                graph.add_edge(first, place, first=first, pairs=[*known["pairs"], *pairs])
        return graph

    def _rows(self, place: Place, units: Sequence[int]) -> dict[int, list[int]]:
        """Unit -> its indices along a place."""
        wanted: dict[int, list[int]] = {unit: [] for unit in units}
        for index, unit in enumerate(self.weights[place].tolist()):
            if unit in wanted:
                wanted[unit].append(index)
        return wanted


def channels(model: Model) -> Channels:
    """The units of a model's main graph."""
    return model.cached("channels", lambda: _traced(model), for_clones=True)


def _traced(model: Model) -> Channels:
    trace = Trace(model, apart=True)
    for node in model.graph:
        follow(trace, node)
    for value in model.graph.outputs:
        trace.pin(trace.of(value), f"{value.name!r} is an output of the model")
    trace.keep_whole()
    trace.keep_rectangular()
    names, pinned = trace.united()
    return Channels(
        {name: np.where(units >= 0, names[units], FIXED) for name, units in trace.tensors.items()},
        {Place(*key): np.where(units >= 0, names[units], FIXED) for key, units in trace.weights.items()},
        pinned,
    )
