"""What units of channels are worth, one by one: saliencies that do not look at what stays.

l1, l2: of the filters that make a unit (Li et al., "Pruning filters for efficient ConvNets", 2017). batch-norm: its
scale (Liu et al., "Network slimming", 2017). geometric-median: how far its filters are from all others (He et al.,
"Filter pruning via geometric median", 2019). taylor: E |sum g w|, to first order (Molchanov et al. 2019). fisher:
E (sum g w)^2 / 2 (Theis et al. 2018). obd: sum h w^2 / 2 (LeCun, Denker and Solla 1990). random: for comparison.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from effc import registry
from effc.channels import Place, channels
from effc.contract import Context
from effc.errors import BadInput
from effc.finetune import torch_threads
from effc.model import Model
from effc.runtime import Slice

from ._unit_order import Order
from ._weight_saliency import curvature
from ._widths import Coupled

UnitSaliency = Literal["l1", "l2", "batch-norm", "geometric-median", "taylor", "fisher", "obd", "random"]
IN_NATS = ("taylor", "fisher", "obd")
GRADIENTS = 256  # samples, which go backwards one by one


def by_saliency(
    kind: UnitSaliency, model: Model, groups: Sequence[Coupled], context: Context, *, labels: bool = False
) -> dict[str, Order]:
    """Orders by rising saliency; damage adds up, for `IN_NATS` in nats a sample.

    Saliencies of weights are divided by their mean in a group, so that groups can be compared.

    Raises:
        BadInput: a saliency that needs calibration data or PyTorch, and these are not there.
    """
    if kind in ("taylor", "fisher"):
        found = _by_gradients(kind, model, groups, context, labels)
    else:
        h = curvature(model, context) if kind == "obd" else {}
        found = {g.name: _by_weights(kind, model, g, context.seed, h) for g in groups}
    orders = {}
    for group in groups:
        values = found[group.name]
        values = values if kind in IN_NATS else values / max(values.mean(), 1e-30)
        order = np.argsort(values, kind="stable")[: group.count - 1]
        damage = np.append(0.0, np.cumsum(values[order]))
        orders[group.name] = Order(np.asarray(group.group.units)[order], damage, kind in IN_NATS)
    return orders


def _by_weights(kind: UnitSaliency, model: Model, group: Coupled, seed: int, h: Mapping[str, np.ndarray]) -> np.ndarray:
    """[units] of a group."""
    total = np.zeros(group.count)
    if kind == "random":
        return np.random.default_rng([seed, zlib.crc32(group.name.encode())]).random(group.count)
    scales = {n.inputs[1].name for n in model.nodes("BatchNormalization") if n.inputs[1] is not None}
    if kind == "batch-norm" and not any(p.weight in scales for p in group.group.places):
        raise BadInput(f"saliency=batch-norm: no batch norm scales the channels of {group.name!r}; take another")
    for place in group.group.places:
        weight = model.graph.initializers[place.weight].const_value.numpy().astype(np.float64)
        rows = np.moveaxis(weight, place.axis, 0).reshape(weight.shape[place.axis], -1)
        if kind == "batch-norm":
            values = np.abs(rows[:, 0]) if place.weight in scales else None
        elif place.reads or (weight.ndim < 2 and kind != "obd"):
            values = None
        elif kind == "obd":
            own = h.get(place.weight)
            values = (
                None if own is None else 0.5 * (np.moveaxis(own, place.axis, 0).reshape(rows.shape) * rows**2).sum(1)
            )
        elif kind == "geometric-median":
            values = np.sqrt(np.maximum(_squared_distances(rows), 0)).sum(axis=1)
        else:
            values = np.abs(rows).sum(axis=1) if kind == "l1" else np.sqrt((rows**2).sum(axis=1))
        if values is not None:
            total += _of_units(values, model, place, group)
    return total


def _squared_distances(rows: np.ndarray) -> np.ndarray:
    lengths = (rows**2).sum(axis=1)
    return lengths[:, None] + lengths[None] - 2 * rows @ rows.T


def _of_units(values: np.ndarray, model: Model, place: Place, group: Coupled) -> np.ndarray:
    """Numbers by index along a place -> by unit of a group."""
    index = {unit: number for number, unit in enumerate(group.group.units)}
    found = np.zeros(group.count)
    for unit, value in zip(channels(model).weights[place].tolist(), values, strict=True):
        if unit in index:
            found[index[unit]] += value
    return found


def _by_gradients(
    kind: UnitSaliency, model: Model, groups: Sequence[Coupled], context: Context, labels: bool
) -> dict[str, np.ndarray]:
    """Of all groups from one run: what a common factor of all filters that make a unit does to the loss."""
    if context.calibration is None:
        raise BadInput(f"saliency={kind} needs calibration data: give --calibrate SPEC (Python: calibrate=...)")
    try:
        trainer = registry.trainer()
    except BadInput as error:
        raise BadInput(f"saliency={kind} needs PyTorch: pip install 'effc[torch]'") from error
    number = {unit: at for at, unit in enumerate(u for g in groups for u in g.group.units)}
    slices = []
    for place in dict.fromkeys(p for g in groups for p in g.group.places if not p.reads):
        units = np.array([number.get(unit, -1) for unit in channels(model).weights[place].tolist()])
        slices.append(Slice(place.weight, place.axis, units))
    batches = list(context.calibration.for_model(model).first(GRADIENTS).batches(model.batch or 32))
    if labels and any(batch.labels is None for batch in batches):
        raise BadInput("labels=true needs calibration data with labels")
    with torch_threads(context.threads):
        view = trainer.view(model)
        trained = trainer.weights(view)
        slices = [s for s in slices if s.weight in trained and trained[s.weight].requires_grad]
        given = [batch.labels for batch in batches] if labels else None
        found = trainer.gradients(view, [b.feeds for b in batches], given, units=slices, seed=context.seed)
    values = found.taylor if kind == "taylor" else 0.5 * found.fisher
    return {g.name: np.array([values[number[unit]] for unit in g.group.units]) for g in groups}
