"""min L(w) + s sum_g |w_g| over the smallest groups g  ->  w_g = 0 for a stated share of them.

Group-wise brain damage as it is trained (Lebedev and Lempitsky, "Fast ConvNets using group-wise brain damage", CVPR
2016): `effc.proximal` says how groups shrink, `effc.recover` trains all else. A group is what one of the pruning passes
can take away, and with `zeros=true` takes away exactly:

    taps        all filters' weights at one place (c, i, j) of a convolution's patch      prune-groups
    channels    all weights that make or read a channel, wherever it is coupled           prune-channels

By itself it makes nothing but compressed weights smaller; with a `recover` behind, all between are one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from effc.channels import channels
from effc.choose import COMPRESSED
from effc.contract import Context, Proposal, Skipped
from effc.model import Model
from effc.piecewise import By
from effc.proximal import Family, Part, Shrinkage
from effc.recover import Recover, recover

from ._observed import sizes
from ._sites import Site, find
from ._widths import prunable


@dataclass(frozen=True)
class GroupLasso(Recover):
    """Training that brings groups of weights to zero, for prune-groups or prune-channels with zeros=true."""

    name: ClassVar[str] = "group-lasso"
    recovers: ClassVar[bool] = False
    judged_by: ClassVar[str | None] = COMPRESSED
    by: ClassVar[By] = "whole"  # no option here  # pyright: ignore[reportIncompatibleVariableOverride]

    epochs: Annotated[int, Field(ge=1, description="passes over the training data")] = 10
    sparsity: Annotated[float, Field(gt=0, lt=1, description="share of the groups that are zero in the end")] = 0.5
    groups: Annotated[
        Literal["taps", "channels"],
        Field(description="places of convolutions' patches, for prune-groups; or channels, for prune-channels"),
    ] = "taps"

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        proposals = list(super().propose(model, context))
        families, skipped = self._families(model, context)
        yield from skipped
        if families:
            yield from proposals

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        families, _ = self._families(model, context)
        made: list[Shrinkage] = []

        def shrinkage(weights: Mapping[str, Any]) -> Shrinkage:
            made.append(Shrinkage(families, weights, self.sparsity))
            return made[-1]

        for note in recover(model, self, context, shrinkage):
            context.say(note)
        context.say(_told(made[-1], families))

    def _families(self, model: Model, context: Context) -> tuple[list[Family], list[Skipped]]:
        """The groups that may go, and what is left alone."""
        found = list(_taps(model, context) if self.groups == "taps" else _channels(model))
        return [f for f in found if isinstance(f, Family)], [f for f in found if isinstance(f, Skipped)]


def _taps(model: Model, context: Context) -> Iterator[Family | Skipped]:
    shapes = sizes(model, context)
    for node in model.nodes("Conv"):
        site = find(model, node, shapes)
        if isinstance(site, Site):
            count, shape = site.layer.matrix.shape[1], node.inputs[1].const_value.shape
            groups = np.arange(count).reshape(1, *shape[1:])
            yield Family(site.name, count, (Part(node.inputs[1].name, groups),))
        else:
            yield Skipped(node.name or "", site)


def _channels(model: Model) -> Iterator[Family | Skipped]:
    units = channels(model).weights
    for item in prunable(model):
        if isinstance(item, tuple):
            yield Skipped(*item)
            continue
        number = {unit: index for index, unit in enumerate(item.group.units)}
        parts = []
        for place in item.group.places:
            rank = len(model.graph.initializers[place.weight].const_value.shape)
            groups = np.array([number.get(unit, -1) for unit in units[place].tolist()])
            parts.append(Part(place.weight, groups.reshape([-1 if a == place.axis else 1 for a in range(rank)])))
        yield Family(item.name, item.count, tuple(parts))


def _told(shrinkage: Shrinkage, families: Sequence[Family]) -> str:
    zeros = int((shrinkage.norms() == 0).sum())
    said = f"group-lasso: {zeros:,} of {shrinkage.count:,} groups in {len(families)} families are zero"
    if zeros < shrinkage.aim:
        return f"{said}: training ended before the {shrinkage.aim:,} that were wanted"
    if shrinkage.cut is None or not shrinkage.cut[0]:
        return said
    return f"{said}; {shrinkage.cut[0]:,} of them shrank to {shrinkage.cut[1]:.2g} of the largest at most, and were cut"
