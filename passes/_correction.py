"""Layers behind pruned channels, fitted anew one after another: to the original's outputs, from pruned inputs.

Which units of a group go is looked at once more where a single layer reads them, by what it gets behind layers that
were pruned before it; what is lost of an output counts as often as the activation behind it lets it through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.contract import Context
from effc.dead import absorb
from effc.model import Model
from effc.removal import mute_units

from ._elimination import Reader, eliminate
from ._observed import aims, in_order
from ._reconstruction import WIDEST, Seen, refit, regression
from ._refit import renew
from ._sites import Site, find
from ._unit_order import columns_of
from ._widths import LAYERS, Coupled

SAMPLES, POSITIONS = 1024, 16_384  # to fit to, and positions of a layer among them


@dataclass
class Correction:
    """What is to go of a model, and what it is fitted to.

    Attributes:
        gone: name of a group -> numbers of its units.
        again: choose single readers' units by what these get.
    """

    model: Model
    groups: Sequence[Coupled]
    gone: dict[str, np.ndarray]
    shapes: Mapping[str, tuple | None]
    context: Context
    nonlinear: bool = True
    again: bool = True

    def mute(self) -> None:
        """Let nothing read what is to go: weights there become zero; what is a constant is added to biases behind."""
        absorb(self.model, self._units())
        mute_units(self.model, self._units())

    def fit(self) -> None:
        """Let nothing read what is to go, and all layers behind make up for it; `gone` tells what went."""
        context, reading = self.context, self._reading()
        if not reading:
            return
        order = list(self.model.nodes(*LAYERS))
        behind = order[order.index(reading[0]) :]
        sites = {node: find(self.model, node, self.shapes) for node in behind}
        unfit = [node.inputs[1].name for node in reading if isinstance(sites[node], str)]
        mute_units(self.model, self._units(), unfit)
        outlines = [site.outline() for site in sites.values() if isinstance(site, Site)]
        fitting = in_order(
            self.model, outlines, self.shapes, context, "fitting layers behind pruned channels",
            aim=aims(self.model, context, outlines), samples=SAMPLES, most=POSITIONS,
        )  # fmt: skip
        for site, seen in fitting:
            kept = self._kept(site, seen)
            matrix, bias = refit(site.layer, seen, np.flatnonzero(kept), nonlinear=self.nonlinear)
            whole = np.zeros(site.layer.matrix.shape)
            whole[:, kept] = matrix
            renew(self.model, site, whole, bias)

    def _units(self) -> set[int]:
        return {int(unit) for units in self.gone.values() for unit in units}

    def _reading(self) -> list[ir.Node]:
        """The layers that read what is to go, in order."""
        names = {name for group in self.groups if len(self.gone.get(group.name, ())) for name in group.readers}
        return [node for node in self.model.nodes(*LAYERS) if node.name in names]

    def _kept(self, site: Site, seen: Seen) -> np.ndarray:
        """Which numbers of its patches [D] a layer still reads."""
        kept = np.ones(seen.patches.shape[1], bool)
        for group in self.groups:
            if site.name in group.readers and len(self.gone.get(group.name, ())):
                columns = columns_of(self.model, site.node, group, len(kept))
                if self.again and group.readers == (site.name,) and len(kept) <= WIDEST:
                    self.gone[group.name] = _worst(site, seen, group, columns, len(self.gone[group.name]))
                gone = np.isin(group.group.units, self.gone[group.name])
                kept[np.concatenate([columns[index] for index in np.flatnonzero(gone)])] = False
        return kept


def _worst(site: Site, seen: Seen, group: Coupled, columns: Sequence[np.ndarray], count: int) -> np.ndarray:
    """So many units of a group that a layer misses least."""
    spread, ridge = seen.moments
    matrix = regression(site.layer, seen)
    through = ((seen.wanted > seen.low) & (seen.wanted < seen.high)).mean(axis=0)
    reader = Reader(matrix * np.sqrt(through)[:, None], spread, columns, ridge=ridge)
    order, _ = eliminate([reader], group.count, group.count - count)
    return np.asarray(group.group.units)[order]
