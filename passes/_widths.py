"""How many units of each group are left, and what layers cost by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import onnx_ir as ir

from effc.channels import Channels, Group, Place, channels
from effc.contract import Context
from effc.cost import Cost
from effc.layers import RECURRENT, WEIGHTED, constant_weight, dilations, pads, strides
from effc.model import Model

from ._chain_costs import ChainCosts
from ._chain_costs import Place as Standing
from ._factors import Factor, blank

LAYERS = (*WEIGHTED, "ConvTranspose", *RECURRENT)


@dataclass(frozen=True)
class Coupled:
    """Units that can go one by one, and the layers that make and read them.

    Attributes:
        name: of the first layer that makes them, numbered where it makes several groups.
        makers, readers: names of layers; a depthwise convolution is both.
    """

    name: str
    group: Group
    makers: tuple[str, ...]
    readers: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.group.units)

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.makers, *self.readers)))


def prunable(model: Model) -> Iterator[Coupled | tuple[str, str]]:
    """The groups of a model, or their name and why nothing of them can go."""
    found, names = channels(model), {}
    by_weight: dict[str, list[ir.Node]] = {}
    for node in model.nodes(*LAYERS):
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            by_weight.setdefault(node.inputs[1].name, []).append(node)
    for group in found.groups:
        makers = _layers(group, by_weight, reads=False)
        if not makers:
            continue
        first = makers[0]
        names[first] = names.get(first, 0) + 1
        name = first if names[first] == 1 else f"{first} #{names[first]}"
        if group.pinned is not None:
            yield name, group.pinned
        elif len(group.units) == 1:
            yield name, "it is a single unit, and one has to stay"
        else:
            yield Coupled(name, group, makers, _layers(group, by_weight, reads=True))


def unread(model: Model, group: Coupled) -> list[int]:
    """Units of a group whose every reader has nothing but zeros for them; all but the first, where that is all."""
    found = []
    for unit in group.group.units:
        read = [place for place in group.group.places if place.reads]
        if not any(_rows(model, place, unit).any() for place in read):
            found.append(unit)
    return found if len(found) < group.count else found[1:]


def _rows(model: Model, place: Place, unit: int) -> np.ndarray:
    """What a weight holds along one unit."""
    weight = model.graph.initializers[place.weight].const_value.numpy()
    return np.compress(channels(model).weights[place] == unit, weight, place.axis)


def _layers(group: Group, by_weight: Mapping[str, list[ir.Node]], *, reads: bool) -> tuple[str, ...]:
    nodes = (n for p in group.places if p.reads == reads for n in by_weight.get(p.weight, ()))
    return tuple(dict.fromkeys(node.name for node in nodes))


class Widths:
    """Costs of a model by how many units of each group are left.

    Args:
        timed: predict seconds of layers at other widths; else they go by their multiply-accumulates.
    """

    def __init__(self, model: Model, groups: list[Coupled], shapes: Mapping, context: Context, *, timed: bool) -> None:
        self.model, self.context, self.shapes = model, context, shapes
        self.left = {g.name: g.count for g in groups}
        self._groups = {g.name: g for g in groups}
        self._chains = ChainCosts(context, timed=timed)
        self._around = sum(c.activation_bytes + c.weight_bytes for c in context.costs(model).nodes.values())
        self._axes = self._all_axes(channels(model), groups)
        self._touched: dict[str, list[str]] = {g.name: [] for g in groups}
        for node, axes in self._axes.items():
            for name in {name for axis in axes if axis for name in axis[1]}:
                self._touched[name].append(node)
        self._known: dict[tuple, Cost] = {}

    def touched(self, name: str) -> Sequence[str]:
        """Nodes whose cost depends on the units of a group."""
        return self._touched[name]

    def saving(self, name: str, left: int) -> Cost:
        """What is saved when so many units of a group are left, beside all others as they are now."""
        then = self.left | {name: left}
        before = sum((self.cost(node) for node in self._touched[name]), Cost())
        return less(before, sum((self.cost(node, then) for node in self._touched[name]), Cost()))

    def cost(self, node: str, left: Mapping[str, int] | None = None) -> Cost:
        """Cost of one node, with so many units of each group."""
        left = self.left if left is None else left
        counts = tuple(None if axis is None else _count(axis, left) for axis in self._axes[node])
        key = node, counts
        if key not in self._known:
            self._known[key] = self._scaled(node, counts)
        return self._known[key]

    def _scaled(self, name: str, counts: tuple[int | None, ...]) -> Cost:
        whole = self.context.costs(self.model).nodes[name]
        full = tuple(None if axis is None else axis[2] for axis in self._axes[name])
        share = float(np.prod([c / f for c, f in zip(counts, full, strict=True) if c is not None]))
        node = self.model.node(name)
        if node.op_type in RECURRENT:  # units are read by the one matrix, and not by that of the state
            read, state = (int(np.prod(value.const_value.shape)) for value in node.inputs[1:3])
            share = (share * read + state) / (read + state)
        before = self._seconds(node, full) if whole.seconds else None
        after = self._seconds(node, counts) if before else None
        slower = after / before if before and after else share
        made = 1.0 if counts[0] is None else counts[0] / full[0]
        return Cost(
            round(whole.macs * share), round(whole.parameters * share), round(whole.weight_bytes * share),
            round(whole.activation_bytes * made), whole.energy * share, whole.seconds * slower,
        )  # fmt: skip

    def _seconds(self, node: ir.Node, counts: tuple[int | None, ...]) -> float | None:
        """Predicted time of a convolution or dense layer with so many outputs and inputs."""
        size = self.shapes.get(node.inputs[0].name)
        held = constant_weight(node) if node.op_type in WEIGHTED else None
        if held is None or size is None or not all(isinstance(d, int) for d in size):
            return None
        weight = held.shape
        first = node.inputs[0].is_graph_input()
        outputs, inputs = counts
        if node.op_type != "Conv":
            rows = int(np.prod(size[:-1]))
            across = 0 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else 1
            outputs = weight[across] if outputs is None else outputs
            inputs = weight[1 - across] if inputs is None else inputs
            factor, standing = Factor(blank(outputs, inputs, 1, 1)), Standing((rows, inputs), first, self._around)
            return self._chains.seconds(standing, [factor], dense=True)
        if len(weight) != 4:
            return None
        groups = node.attributes.get_int("group", 1)
        outputs = weight[0] if outputs is None else outputs
        depthwise = weight[1] == 1 and groups > 1
        own = outputs * groups // weight[0] if depthwise else groups
        inputs = weight[1] if inputs is None or depthwise else inputs
        top, left, bottom, right = pads(node, size[2:], weight[2:])
        factor = Factor(
            blank(outputs, inputs, *weight[2:]), own, tuple(strides(node, 2)), tuple(dilations(node, 2)),
            (top, left, bottom, right),
        )  # fmt: skip
        standing = Standing((size[0], inputs * own, *size[2:]), first, self._around)
        return self._chains.seconds(standing, [factor], dense=False)

    def _all_axes(self, found: Channels, groups: list[Coupled]) -> dict[str, tuple]:
        """Node -> its output and its input axis, as (units that always stay, group -> units, all)."""
        of = {unit: g.name for g in groups for unit in g.group.units}
        axes = {}
        for node in self.model.graph:
            weight = node.inputs[1] if node.op_type in LAYERS and len(node.inputs) > 1 else None
            held = {} if weight is None else {p: u for p, u in found.weights.items() if p.weight == weight.name}
            if held:
                made = next((u for p, u in held.items() if not p.reads), None)
                read = next((u for p, u in held.items() if p.reads), None)
            else:
                made = None if not node.outputs else found.tensors.get(node.outputs[0].name)
                made, read = None if made is None else made.reshape(-1), None
            pair = tuple(None if units is None else _axis(units, of) for units in (made, read))
            if any(axis and axis[1] for axis in pair):
                axes[node.name] = pair
        return axes


def less(before: Cost, saved: Cost) -> Cost:
    """What is left of a cost."""
    return Cost(**{f.name: getattr(before, f.name) - getattr(saved, f.name) for f in fields(Cost)})


def _axis(units: np.ndarray, of: Mapping[int, str]) -> tuple[int, dict[str, float], int]:
    """Rows that stay, and for each group the rows of one of its units."""
    rows: dict[str, set[int]] = {}
    counted: dict[str, int] = {}
    fixed = 0
    for unit in units.tolist():
        name = of.get(unit)
        if name is None:
            fixed += 1
        else:
            counted[name] = counted.get(name, 0) + 1
            rows.setdefault(name, set()).add(unit)
    return fixed, {name: count / len(rows[name]) for name, count in counted.items()}, len(units)


def _count(axis: tuple[int, dict[str, float], int], left: Mapping[str, int]) -> int:
    return axis[0] + round(sum(each * left[name] for name, each in axis[1].items()))
