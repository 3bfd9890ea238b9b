"""In which order units of groups should go, and what it does to the model's outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from effc.channels import Place, channels
from effc.contract import Context
from effc.evaluate import damage as damage_of
from effc.model import Model
from effc.removal import mute_units
from effc.walk import Values, Walk, samples

from ._elimination import Reader, compensated, eliminate
from ._observed import moments
from ._refit import renew
from ._sites import Site, find
from ._split_damage import USUAL, sensitivity
from ._widths import LAYERS, Coupled

SAMPLES, BATCHES = 512, 2  # to look at; batches of them to measure damage on
POWER = 0.6
CHECKED, FAR_OFF = (0.5, 0.75), 2.0  # shares of units gone at which damage is measured; times that is too far above


@dataclass(frozen=True)
class Order:
    """How a group gives up its units.

    Attributes:
        units: numbers of units, first to go first; the last one stays.
        damage: with so many of them gone, from none.
        scaled: damage is on the report's scale; else it is only good for an order.
    """

    units: np.ndarray
    damage: np.ndarray
    scaled: bool = True


def by_reconstruction(
    model: Model, groups: Sequence[Coupled], shapes: Mapping[str, tuple | None], context: Context
) -> dict[str, Order]:
    """Backward elimination by what layers that read the units lose, weighed by what that does to the outputs."""
    feeds = samples(model, context.calibration, SAMPLES)
    walk = Walk(model, context.backend, feeds, threads=context.threads)
    reference = walk.fork(BATCHES).outputs()
    waiting = {g.name: list(g.readers) for g in groups}
    found: dict[str, list[_Weighed]] = {g.name: [] for g in groups}
    curves = {}
    reading = [node for node in model.nodes(*LAYERS) if any(node.name in names for names in waiting.values())]
    advance = context.progress("weighing channels", len(reading))
    for node in reading:
        seen = _observed(model, node, shapes, walk, reference, context)
        for group in groups:
            if node.name not in waiting[group.name]:
                continue
            waiting[group.name].remove(node.name)
            columns = columns_of(model, node, group, seen.matrix.shape[1])
            found[group.name].append(replace(seen, columns=columns))
            if not waiting[group.name]:
                curves[group.name] = _curve(model, group, found.pop(group.name), walk, reference)
        advance(1)
    unread = {g.name: _curve(model, g, (), walk, reference) for g in groups if g.name in found}
    return _comparable(curves | unread)


@dataclass(frozen=True)
class _Weighed(Reader):
    """A reader, and where it stands.

    Attributes:
        site: None for a layer that is not fitted.
        mean: [D] of its inputs, as far as a bias makes up for it.
    """

    site: Site | None = None
    mean: np.ndarray | None = None


def _observed(
    model: Model, node: ir.Node, shapes: Mapping, walk: Walk, reference: Sequence[Values], context: Context
) -> _Weighed:
    site = find(model, node, shapes)
    if isinstance(site, str):
        matrix = input_matrix(model, node)
        return _Weighed(matrix, np.ones(matrix.shape[1]), ())
    mean, spread, ridge = moments(site, walk, context)
    price = sensitivity(site, walk, reference, spread, mean, USUAL)
    if spread is None:  # too wide: inputs are taken to be independent and alike
        spread = np.ones(site.layer.matrix.shape[1])
    return _Weighed(site.layer.matrix, spread, (), price, ridge, site, mean)


@dataclass(frozen=True)
class _Curve:
    """How a group gives up its units: `Order` before damages are made comparable.

    Attributes:
        damage: as measured or estimated for this group alone.
        price: of a single reader; None where several layers read the units.
    """

    units: np.ndarray
    damage: np.ndarray
    price: float | None


def _curve(
    model: Model, group: Coupled, readers: Sequence[_Weighed], walk: Walk, reference: Sequence[Values]
) -> _Curve:
    order, errors = eliminate(readers, group.count)
    damage = errors @ [r.price for r in readers]
    units = np.asarray(group.group.units)[order]
    if len(readers) == 1 and readers[0].site is not None:
        return _Curve(units, _checked(model, readers[0], order, damage, walk, reference[:1]), readers[0].price)
    if readers and all(r.site is not None for r in readers):
        # What several layers lose at once does more than the sum of what each loses alone.
        some = max(1, group.count // 4)
        hurt = _hurt(model, readers, order[:some], walk, reference)
        damage = damage * max(hurt / max(float(damage[some]), 1e-12), 1.0)
    elif readers:
        # No layer to fit, and no price of its own: what counts is what the outputs lose without half of the units.
        some = max(1, group.count // 2)
        hurt = _missed(model, units[:some], walk, reference)
        damage = damage * (hurt / max(float(damage[some]), 1e-12))
    return _Curve(units, damage, None)


def _checked(
    model: Model, reader: _Weighed, order: np.ndarray, damage: np.ndarray, walk: Walk, reference: Sequence[Values]
) -> np.ndarray:
    """Damage, raised where what is measured with so many units gone is far above it.

    The first layers of an image network lose little of their power, and with it the edges that all others live on.
    """
    gone = [max(1, int(share * len(damage))) for share in CHECKED]
    found = [_hurt(model, [reader], order[:count], walk, reference) for count in gone]
    factors = [max(1.0, hurt / max(FAR_OFF * damage[count], 1e-12)) for hurt, count in zip(found, gone, strict=True)]
    return damage * np.interp(np.arange(len(damage)), [len(damage) / 4, *gone], [1.0, *factors])


def _comparable(curves: Mapping[str, _Curve]) -> dict[str, Order]:
    """Layers count by a power of their price, as in `worth`: those behind are fitted to make up for those before.

    What several layers read and lose together no layer can make up for: there the price counts in full.
    """
    prices = [c.price for c in curves.values() if c.price]
    usual = float(np.median(prices)) if prices else 1.0
    factors = {name: 1.0 if not c.price else (usual / c.price) ** (1 - POWER) for name, c in curves.items()}
    return {name: Order(c.units, c.damage * factors[name]) for name, c in curves.items()}


def _hurt(
    model: Model, readers: Sequence[_Weighed], gone: np.ndarray, walk: Walk, reference: Sequence[Values]
) -> float:
    """Damage of units that nothing reads any more, with what reads others making up for it."""
    clone = model.clone()
    for reader in readers:
        site = replace(reader.site, node=clone.node(reader.site.name))
        if site.adding is not None:
            site = replace(site, adding=clone.node(site.adding.name))
        left = compensated(reader, gone)
        bias = site.shift + (0 if site.bias is None else site.bias * site.scale)
        renew(clone, site, left, bias + (reader.matrix - left) @ reader.mean)
    return damage_of(Walk(clone, walk.backend, walk.feeds(len(reference)), threads=walk.threads).outputs(), reference)


def _missed(model: Model, gone: np.ndarray, walk: Walk, reference: Sequence[Values]) -> float:
    """Damage of units that nothing reads any more and nothing makes up for."""
    clone = model.clone()
    mute_units(clone, gone.tolist())
    return damage_of(Walk(clone, walk.backend, walk.feeds(len(reference)), threads=walk.threads).outputs(), reference)


def input_matrix(model: Model, node: ir.Node) -> np.ndarray:
    """The weight of any layer as [outputs, numbers of a patch], channels of its input outermost, in float64."""
    place = reading_place(model, node)
    weight = node.inputs[1].const_value.numpy().astype(np.float64)
    moved = np.moveaxis(weight, place.axis, -1) if weight.ndim < 3 else np.moveaxis(weight, place.axis, 1)
    return moved.reshape(len(moved), -1)


def reading_place(model: Model, node: ir.Node) -> Place:
    """Where a layer's weight reads units."""
    return next(p for p in channels(model).weights if p.weight == node.inputs[1].name and p.reads)


def columns_of(model: Model, node: ir.Node, group: Coupled, width: int) -> list[np.ndarray]:
    """Of each unit of a group, the columns of a layer's matrix [N, width] that read it."""
    units = channels(model).weights[reading_place(model, node)]
    taps = width // len(units)
    rows: dict[int, list[int]] = {unit: [] for unit in group.group.units}
    for index, unit in enumerate(units.tolist()):
        if unit in rows:
            rows[unit].append(index)
    return [(np.array(rows[u], np.int64)[:, None] * taps + np.arange(taps)).reshape(-1) for u in group.group.units]
