"""A x, B y  ->  (S A) x, (B S^-1) y  with y = f(A x), f(S z) = S f(z), S diagonal and positive: other channel ranges.

Exact, and by itself of no use: codes with one scale a tensor lose less where its channels reach equally far, so this
stands before `int8`. Scales are those of least predicted noise of codes (`_equalization`). Channels
below the upper bound of a Clip stay, as what data yet to come reach is not known; with `margin` those are scaled that
calibration data keep that far from the bound, before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.model import Model

from ._equalization import Noise, limits, requests
from ._homogeneous import LAYERS, Scalable, components, scalable

Terms = list[tuple[float, np.ndarray]]


@dataclass(frozen=True)
class Equalize(Pass):
    """Channels of hidden tensors scaled so that 8-bit codes of activations and weights lose least; before int8."""

    name: ClassVar[str] = "equalize"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4

    margin: Annotated[
        float | None,
        Field(
            ge=0,
            description="scale channels below a Clip's upper bound too, where calibration data would still be cut off "
            "nowhere if they reached further by this share; exact for such data only. Not given: these stay",
        ),
    ] = None
    least: Annotated[
        float, Field(gt=0, le=1, description="share of the predicted noise that may be left at most, else tensors stay")
    ] = 0.9

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        found = scalable(model)
        reasons = dict(_fixed(model, found))
        groups = [(units, _nodes(model, found, units)) for units in components(found)]
        if context.calibration is None:
            unknown = "how far channels reach is not known: give --calibrate SPEC"
            reasons |= dict.fromkeys((name for _, names in groups for name in names), unknown)
            yield from (Skipped(name, reason) for name, reason in reasons.items())
            return
        logs, before, after = self._scales(model, found, context)
        taken: set[str] = set()
        for units, names in groups:
            was, left = (sum(value for value, own in each if np.isin(own, units).any()) for each in (before, after))
            if not (logs[units] != 0).any():
                reason = "its channels are below the bound of a Clip, or no codes are made of it"
            elif left > self.least * was:
                kept = f"{left / was:.2f} of the noise of codes would be left" if was else "it makes no noise"
                reason = f"its channels are alike already: {kept}"
            else:
                yield Proposal(_site(found, units), names, {"noise": round(left / was, 4)}, damage=0.0)
                taken |= set(names)
                continue
            reasons |= dict.fromkeys(names, reason)
        yield from (Skipped(name, reason) for name, reason in reasons.items() if name not in taken)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        found = scalable(model)
        logs, _, _ = self._scales(model, found, context)
        sites = {p.site for p in chosen}
        units = np.concatenate([u for u in components(found) if _site(found, u) in sites])
        scales = np.ones(len(logs) + 1)
        scales[units] = np.exp(logs[units])
        places = {place: own for place, own in found.places.items() if np.isin(own, units).any()}
        weights = {place.weight: model.graph.initializers[place.weight] for place in places}
        arrays = {name: value.const_value.numpy().astype(np.float64) for name, value in weights.items()}
        for place, own in places.items():
            shape = np.ones(arrays[place.weight].ndim, int)
            shape[place.axis] = -1
            arrays[place.weight] = arrays[place.weight] * (scales[own] ** (-1 if place.reads else 1)).reshape(shape)
        for name, array in arrays.items():
            edit.set_initializer(model, weights[name], array.astype(np.float32))
        changed = [name for name, (_, own) in found.tensors.items() if (scales[own] != 1).any()]
        for name in changed:  # what reads them under their old names would take them for what they were
            edit.rename(model, model.value(name))

    def _scales(self, model: Model, found: Scalable, context: Context) -> tuple[np.ndarray, Terms, Terms]:
        """Logarithms of all scales, and the terms of J with their units, before and after."""

        def compute() -> tuple[np.ndarray, Terms, Terms]:
            asked = requests(model, found)
            known = context.statistics(model, asked.values())
            extents = {name: known[request] for name, request in asked.items() if known[request] is not None}
            low, high = limits(found, extents, self.margin)
            noise = Noise(model, found, extents)
            owners = [t.units for t in (*noise.coded, *noise.rows)]
            logs = noise.least(low, high) if len(low) else low
            before, after = (list(zip(noise.terms(x)[0], owners, strict=True)) for x in (np.zeros(len(low)), logs))
            return logs, before, after

        assert context.calibration is not None
        return model.cached((self, context.calibration.digest), compute, for_clones=True)


def _site(found: Scalable, units: np.ndarray) -> str:
    """The first weight that makes the units."""
    return next(place.weight for place, own in found.places.items() if not place.reads and np.isin(own, units).any())


def _fixed(model: Model, found: Scalable) -> Iterator[tuple[str, str]]:
    """Layers none of whose outputs may be scaled, each with the first reason."""
    for node in model.nodes(*LAYERS):
        value = node.inputs[1] if len(node.inputs) > 1 else None
        units = found.places_of(value.name) if value is not None else []
        if all(unit in found.fixed for unit in units):
            yield node.name, found.fixed[units[0]] if units else "its weight is no constant of its own"


def _nodes(model: Model, found: Scalable, units: np.ndarray) -> tuple[str, ...]:
    weights = {place.weight for place, own in found.places.items() if np.isin(own, units).any()}
    return tuple(node.name for node in model.graph if any(v is not None and v.name in weights for v in node.inputs))
