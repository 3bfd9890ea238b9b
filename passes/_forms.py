"""Dense forms of a convolution that reads only some groups (c, i, j) of its patch, for all filters alike.

    crop        the groups of a window of the kernel:   Conv(a x b), its padding shifted
    channels    all taps of some channels:              Conv(k x k) . Gather
    taps        any groups:                             Conv(1 x 1) . Concat . (Slice . Gather for each tap) . Pad

All are exact: what is left out is multiplied with nothing. Channels that nothing reads any more go where they are made,
and a Gather that then takes all there are goes too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.channels import channels
from effc.model import Model
from effc.removal import remove_units, sparing

from ._factors import Factor, Layer
from ._sites import Site, put

Form = Literal["crop", "channels", "taps"]
Setting = Mapping[str, int | str]
END = np.iinfo(np.int64).max
OPSET = 13  # from which Pad and Slice have their numbers as inputs, and Gather what it has today


def columns(layer: Layer, setting: Setting) -> np.ndarray:
    """Numbers of the patch that a window reads, in the order (c, i, j)."""
    place = np.arange(layer.matrix.shape[1]).reshape(layer.inputs, *layer.kernel)
    top, left, height, width = (int(setting[key]) for key in ("top", "left", "height", "width"))
    return place[:, top : top + height, left : left + width].reshape(-1)


def of_channels(layer: Layer, channels: np.ndarray) -> np.ndarray:
    """Numbers of the patch that belong to channels."""
    return np.arange(layer.matrix.shape[1]).reshape(layer.inputs, -1)[channels].reshape(-1)


def by_tap(layer: Layer, kept: np.ndarray) -> np.ndarray:
    """The same groups, tap by tap: the order in which `taps` puts them side by side."""
    return kept[np.lexsort((kept // layer.taps, kept % layer.taps))]


def nonzero(layer: Layer) -> np.ndarray:
    """[C kh kw] which groups hold anything but zeros; the first, where none does."""
    there = np.count_nonzero(layer.matrix, axis=0) > 0
    return there if there.any() else np.arange(len(there)) == 0


def without_zeros(layer: Layer, form: str, there: np.ndarray) -> tuple[Setting, np.ndarray]:
    """The least that a form can read of groups that are not zero: its setting, and the groups as `emit` takes them.

    Args:
        there: what `nonzero` says.
    """
    place = there.reshape(layer.inputs, *layer.kernel)
    if form == "crop":
        rows, cols = (np.flatnonzero(place.any(axis=axes)) for axes in ((0, 2), (0, 1)))
        setting = {
            "form": form, "top": int(rows[0]), "left": int(cols[0]),
            "height": int(rows[-1] - rows[0] + 1), "width": int(cols[-1] - cols[0] + 1),
        }  # fmt: skip
        return setting, columns(layer, setting)
    if form == "channels":
        own = np.flatnonzero(place.any(axis=(1, 2)))
        return {"form": form, "kept": len(own)}, of_channels(layer, own)
    return {"form": form, "kept": int(there.sum())}, by_tap(layer, np.flatnonzero(there))


def emit(model: Model, site: Site, form: str, kept: np.ndarray, matrix: np.ndarray, bias: np.ndarray | None) -> None:
    """Put a form in the place of a convolution.

    Args:
        kept: [K] which numbers of the patch it reads; of taps, in the order of `by_tap`.
        matrix: [N, K] weights of the scaled layer (`Site.layer`).
        bias: [N] for what stands behind the batch norm; None leaves the layer's own.
    """
    layer = site.layer
    if form == "crop":
        factor = _crop(model, site, kept, matrix)
    elif form == "channels":
        own = np.unique(kept // layer.taps)
        _read(model, site, [_gather(model, site, site.node.inputs[0], own)])
        factor = layer.whole(matrix.reshape(layer.outputs, len(own), *layer.kernel))
    else:
        _read(model, site, _thinned(model, site, kept))
        factor = Factor(matrix[:, :, None, None])
    put(model, site, (factor,), bias)


def settle(model: Model, gathers: Sequence[ir.Node]) -> int:
    """Remove the units that are not gathered and that nothing else reads, where they are made; returns how many."""
    found = channels(model)
    maps = [found.tensors.get(node.inputs[0].name) for node in gathers]
    met = {unit for units in maps if units is not None for unit in np.unique(units).tolist()}
    unread = [g.units for g in found.groups if g.pinned is None and not any(place.reads for place in g.places)]
    gone = sparing(model, {unit for units in unread for unit in units} & met)
    if not gone:
        return 0
    remove_units(model, gone)
    left = channels(model).tensors
    for node in [n for n in gathers if _takes_all(model, n, left.get(n.inputs[0].name))]:
        edit.bypass(model, node, node.inputs[0])
    return len(gone)


def _takes_all(model: Model, gather: ir.Node, units: np.ndarray | None) -> bool:
    indices = model.constant(gather.inputs[1])
    return units is not None and np.array_equal(indices, np.arange(units.shape[1]))


def _crop(model: Model, site: Site, kept: np.ndarray, matrix: np.ndarray) -> Factor:
    layer = site.layer
    rows, cols = np.unravel_index(np.unique(kept % layer.taps), layer.kernel)
    first, last = (rows.min(), cols.min()), (rows.max(), cols.max())
    around = [layer.pads[a] - int(first[a]) * layer.dilations[a] for a in (0, 1)]
    around += [layer.pads[2 + a] - (layer.kernel[a] - 1 - int(last[a])) * layer.dilations[a] for a in (0, 1)]
    shape = (layer.outputs, layer.inputs, last[0] - first[0] + 1, last[1] - first[1] + 1)
    if min(around) < 0:  # the window never meets the rim
        begins, ends = ([max(0, -p) for p in part] for part in (around[:2], around[2:]))
        _read(model, site, [_slice(model, site, site.node.inputs[0], begins, ends, (1, 1))])
    pads = (max(around[0], 0), max(around[1], 0), max(around[2], 0), max(around[3], 0))
    return Factor(matrix.reshape(shape), 1, layer.strides, layer.dilations, pads)


def _thinned(model: Model, site: Site, kept: np.ndarray) -> list[ir.Node]:
    """What gathers groups [K] as channels, at each output position."""
    layer, x, nodes = site.layer, site.node.inputs[0], []
    if any(layer.pads):
        nodes.append(_pad(model, site, x))
        x = nodes[-1].outputs[0]
    parts = []
    for tap in np.unique(kept % layer.taps):
        i, j = np.unravel_index(tap, layer.kernel)
        own = kept[kept % layer.taps == tap] // layer.taps
        value = x
        if len(own) < layer.inputs:
            nodes.append(_gather(model, site, value, own))
            value = nodes[-1].outputs[0]
        begins = [int(t) * gap for t, gap in zip((i, j), layer.dilations, strict=True)]
        ends = [(k - 1 - int(t)) * gap for t, k, gap in zip((i, j), layer.kernel, layer.dilations, strict=True)]
        if any(begins) or any(ends) or layer.strides != (1, 1):
            nodes.append(_slice(model, site, value, begins, ends, layer.strides))
            value = nodes[-1].outputs[0]
        parts.append(value)
    if len(parts) > 1:
        nodes.append(edit.make_node(model, "Concat", parts, {"axis": 1}, name=f"{site.name}_taps", origin=[site.node]))
    return nodes


def _read(model: Model, site: Site, nodes: Sequence[ir.Node]) -> None:
    """Let the layer read what new nodes make."""
    if nodes:
        edit.insert_before(model, site.node, nodes)
        edit.set_input(model, site.node, 0, nodes[-1].outputs[0])


def _pad(model: Model, site: Site, x: ir.Value) -> ir.Node:
    top, left, bottom, right = site.layer.pads
    around = [0, 0, top, left, 0, 0, bottom, right] if site.spatial == 2 else [0, 0, left, 0, 0, right]
    return _node(model, site, "Pad", x, _numbers(model, site, "pads", around))


def _gather(model: Model, site: Site, x: ir.Value, channels: np.ndarray) -> ir.Node:
    return _node(model, site, "Gather", x, _numbers(model, site, "channels", channels), axis=1)


def _slice(
    model: Model, site: Site, x: ir.Value, begins: Sequence[int], ends: Sequence[int], steps: Sequence[int]
) -> ir.Node:
    """What is left without so many numbers at the begin and end of each spatial axis."""
    axes = [2, 3] if site.spatial == 2 else [2]
    skip = 2 - len(axes)
    lists = [begins[skip:], [-end if end else END for end in ends][skip:], axes, steps[skip:]]
    names = ("starts", "ends", "axes", "steps")
    return _node(model, site, "Slice", x, *(_numbers(model, site, n, v) for n, v in zip(names, lists, strict=True)))


def _node(model: Model, site: Site, op: str, *inputs: ir.Value, **attributes: int) -> ir.Node:
    return edit.make_node(model, op, inputs, attributes, name=f"{site.name}_{op.lower()}", origin=[site.node])


def _numbers(model: Model, site: Site, what: str, numbers: Sequence[int] | np.ndarray) -> ir.Value:
    return edit.add_initializer(model, f"{site.name}_{what}", np.asarray(numbers, np.int64))
