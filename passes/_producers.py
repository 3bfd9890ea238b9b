"""What layers save by inputs that they no longer read: channels go where they are made, with all that passes them on.

A layer that keeps a share a of its inputs, and of whose outputs the layer behind keeps a share b, costs a b of what it
did. Its own proposal counts 1 - a, that of the layer behind a (1 - b): as a is a matter of choice, savings are found in
rounds, each with what the round before has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from effc.channels import channels
from effc.contract import Context, Proposal
from effc.cost import Cost
from effc.model import Model

from ._sites import Site
from ._widths import Coupled, Widths, less, prunable

ROUNDS = 6


@dataclass(frozen=True)
class Fewer:
    """What other nodes save by a proposal, where they themselves stay as they are: node -> cost before, and saved."""

    before: Mapping[str, Cost]
    saved: Mapping[str, Cost]


class Producers:
    """What would go at the producers of a model's layers.

    Args:
        timed: predict seconds; else they are 0, for not known.
    """

    def __init__(self, model: Model, shapes: Mapping[str, tuple | None], context: Context, *, timed: bool) -> None:
        coupled = [g for g in prunable(model) if isinstance(g, Coupled) and len(g.readers) == 1]
        self._units = channels(model).tensors
        self._groups: dict[str, list[Coupled]] = {}
        for group in coupled:
            self._groups.setdefault(group.readers[0], []).append(group)
        self._widths = Widths(model, coupled, shapes, context, timed=timed)

    def fewer(self, site: Site, kept: np.ndarray) -> Fewer:
        """What is saved when a layer reads only so many numbers [K] of its patch, in the order (c, i, j)."""
        groups, units = self._groups.get(site.name, []), self._units.get(site.input)
        if not groups or units is None or units.size != site.layer.inputs:
            return Fewer({}, {})
        read = set(units.reshape(-1)[np.unique(kept // site.layer.taps)].tolist())
        left = {g.name: max(1, sum(unit in read for unit in g.group.units)) for g in groups}
        then = self._widths.left | left
        nodes = dict.fromkeys(node for name in left for node in self._widths.touched(name) if node != site.name)
        before = {node: self._widths.cost(node) for node in nodes}
        saved = {node: less(cost, self._widths.cost(node, then)) for node, cost in before.items()}
        return Fewer(
            {n: c for n, c in before.items() if saved[n] != Cost()}, {n: s for n, s in saved.items() if s != Cost()}
        )


def priced(
    proposals: Sequence[Proposal], fewer: Sequence[Fewer], choose: Callable[[list[Proposal]], list[Proposal]]
) -> list[Proposal]:
    """The same proposals with what other layers save by them, as those are chosen to be.

    Args:
        choose: what would be taken of proposals.
    """
    left: dict[str, Proposal] = {}
    found = list(proposals)
    for _ in range(ROUNDS):
        found = [_with(p, other, left) for p, other in zip(proposals, fewer, strict=True)]
        settings = {p.site: p.setting for p in left.values()}
        own = {(p.site, str(p.setting)): p for p in proposals}
        left = {p.site: own[p.site, str(p.setting)] for p in choose(found)}
        if {p.site: p.setting for p in left.values()} == settings:
            break
    return found


def _with(p: Proposal, other: Fewer, chosen: Mapping[str, Proposal]) -> Proposal:
    before, saved = p.before, Cost()
    for name, cost in other.before.items():
        before = before + cost
        saved = saved + _share(other.saved[name], chosen.get(name))
    own = Cost(**{f.name: getattr(before, f.name) - getattr(p.before, f.name) for f in fields(Cost)})
    nodes = tuple(dict.fromkeys((*p.nodes, *other.before)))
    return replace(p, nodes=nodes, before=before, after=less(p.after + own, saved))


def _share(saved: Cost, chosen: Proposal | None) -> Cost:
    """What is saved of a layer that is itself replaced by something cheaper."""
    if chosen is None:
        return saved
    parts = {}
    for f in fields(Cost):
        whole, now = getattr(chosen.before, f.name), getattr(chosen.after, f.name)
        parts[f.name] = type(whole)(getattr(saved, f.name) * now / whole) if whole else getattr(saved, f.name)
    return Cost(**parts)
