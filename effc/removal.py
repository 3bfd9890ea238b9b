"""Units taken out of a model: every weight is sliced wherever they show, and every size that counts them shrinks.

What reads a unit reads it no more, and what made it is gone; the rest computes what it did before with the removed
units at zero. Nothing is evaluated and nothing estimated: which units may go is `effc.channels`' word, which should go
a pass's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.channels import Channels, channels
from effc.errors import PassFailed
from effc.model import Model
from effc.shapes import slice_bounds
from effc.table import OpTable


def remove_units(model: Model, units: Collection[int]) -> None:
    """Remove units in place (numbers of `channels(model)`).

    Raises:
        PassFailed: a unit is pinned, or a tensor would have none left; nothing was changed.
    """
    if not units:
        return
    found = channels(model)
    gone = np.array(sorted(units))
    if pinned := [unit for unit in gone.tolist() if unit in found.pinned]:
        raise PassFailed(f"unit {pinned[0]} cannot be removed: {found.pinned[pinned[0]]}")
    for what, held in ((place.weight, held) for place, held in found.weights.items()):
        if np.isin(held, gone).all():
            raise PassFailed(f"no unit along an axis of {what!r} would be left")
    removal = _Removal(model, found, gone)
    for node in list(model.graph):
        if (rule := _SIZES.find(node)) is not None:
            rule(removal, node)
    removal.slice_weights()


def mute_units(model: Model, units: Collection[int], weights: Collection[str] | None = None) -> None:
    """Let nothing read units: zeros where weights do, in place; of all weights, or of these."""
    for place, held in channels(model).weights.items():
        gone = np.isin(held, list(units))
        if place.reads and gone.any() and (weights is None or place.weight in weights):
            value = model.graph.initializers[place.weight]
            array = value.const_value.numpy().copy()
            np.moveaxis(array, place.axis, 0)[gone] = 0
            edit.set_initializer(model, value, array)


def sparing(model: Model, units: Collection[int]) -> set[int]:
    """These units but for one of each axis of a weight that would have none left."""
    found = set(units)
    for held in channels(model).weights.values():
        if set(held.tolist()) <= found:
            found.discard(int(held.min()))
    return found


class _Removal:
    """One removal: the model, its units, and which indices of its tensors stay."""

    def __init__(self, model: Model, found: Channels, gone: np.ndarray) -> None:
        self.model, self.found, self.gone = model, found, gone

    def kept(self, value: ir.Value | None, axis: int) -> np.ndarray | None:
        """Which indices along an axis of an activation stay; None where all of them do."""
        units = None if value is None else self.found.tensors.get(value.name)
        if units is None or not units.ndim or units.shape[axis % units.ndim] == 1:
            return None
        stays = ~np.isin(np.moveaxis(units, axis, 0).reshape(units.shape[axis % units.ndim], -1), self.gone)
        return None if stays.all() else stays.any(axis=1)

    def changed(self, value: ir.Value) -> dict[int, np.ndarray]:
        """Axis -> which indices stay, of those along which some go."""
        units = self.found.tensors.get(value.name)
        masks = {} if units is None else {axis: self.kept(value, axis) for axis in range(units.ndim)}
        return {axis: mask for axis, mask in masks.items() if mask is not None}

    def give(self, node: ir.Node, index: int, numbers: Collection[int], name: str = "") -> None:
        """Other sizes for a node: in an input, or for old operators in the attribute of that name."""
        if name and (len(node.inputs) <= index or node.inputs[index] is None) and name in node.attributes:
            edit.set_attributes(self.model, node, **{name: [int(n) for n in numbers]})
        else:
            new = edit.add_initializer(self.model, f"{node.name}_sizes", np.asarray(list(numbers), np.int64))
            edit.set_input(self.model, node, index, new)
        edit.forget_shapes(self.model, node)

    def slice_weights(self) -> None:
        sliced: dict[tuple[str, str], np.ndarray] = {}
        for place, units in self.found.weights.items():
            stays, key = ~np.isin(units, self.gone), (place.weight, place.reader)
            if not stays.all():
                whole = self.model.graph.initializers[place.weight].const_value.numpy()
                sliced[key] = np.compress(stays, sliced.get(key, whole), place.axis)
        for (name, reader), array in sliced.items():
            value = self.model.graph.initializers[name]
            node = self.model.node(reader) if reader else None
            if node is None:
                edit.set_initializer(self.model, value, np.ascontiguousarray(array))
                continue
            own = edit.add_initializer(self.model, name, array)
            for index in [index for index, read in enumerate(node.inputs) if read is value]:
                edit.set_input(self.model, node, index, own)
        shared = {name for name, reader in sliced if reader}
        edit.discard(self.model, [self.model.graph.initializers[name] for name in shared])


Rule = Callable[[_Removal, ir.Node], None]
_SIZES: OpTable[Rule] = OpTable("removal")


@_SIZES.rule("Conv", "ConvTranspose")
def _groups(removal: _Removal, node: ir.Node) -> None:
    """A depthwise convolution has a group for each channel."""
    groups, stays = node.attributes.get_int("group", 1), removal.kept(node.inputs[0], 1)
    if stays is not None and len(stays) == groups > 1:
        edit.set_attributes(removal.model, node, group=int(stays.sum()))


@_SIZES.rule("Reshape", "Expand")
def _shape(removal: _Removal, node: ir.Node) -> None:
    changed = removal.changed(node.outputs[0])
    if not changed:
        return
    sizes = removal.model.constant(node.inputs[1]).reshape(-1).tolist()
    copies = node.op_type == "Reshape" and not node.attributes.get_int("allowzero", 0)
    before = len(removal.found.tensors[node.outputs[0].name].shape) - len(sizes)  # axes that Expand leaves to its input
    for axis, stays in changed.items():
        if axis < before or sizes[axis - before] in (-1, 1):
            continue  # worked out by the runtime, or copied from what is expanded
        copied = copies and sizes[axis - before] == 0 and removal.kept(node.inputs[0], axis) is not None
        sizes[axis - before] = 0 if copied and _same(removal, node, axis, stays) else int(stays.sum())
    removal.give(node, 1, sizes)


def _same(removal: _Removal, node: ir.Node, axis: int, stays: np.ndarray) -> bool:
    return int(removal.kept(node.inputs[0], axis).sum()) == int(stays.sum())


@_SIZES.rule("Split")
def _parts(removal: _Removal, node: ir.Node) -> None:
    axis = node.attributes.get_int("axis", 0)
    whole = removal.kept(node.inputs[0], axis)
    if whole is None:
        return
    counts = []
    for value in node.outputs:
        stays, length = removal.kept(value, axis), removal.found.tensors[value.name].shape[axis]
        counts.append(length if stays is None else int(stays.sum()))
    edit.set_attributes(removal.model, node, num_outputs=None)
    removal.give(node, 1, counts, "" if removal.model.opset >= 13 else "split")


@_SIZES.rule("Slice")
def _window(removal: _Removal, node: ir.Node) -> None:
    """Bounds count what is left; what is no run of indices any more becomes a choice of them."""
    changed = removal.changed(node.inputs[0])
    if not changed:
        return
    units = removal.found.tensors[node.inputs[0].name]
    starts, ends, axes, steps = slice_bounds(node)
    axes = [axis % units.ndim for axis in (range(len(starts)) if axes is None else axes)]
    choices: dict[int, np.ndarray] = {}
    for at, axis in enumerate(axes):
        if axis not in changed:
            continue
        end = None if ends[at] < -(2**30) else ends[at]
        taken = np.arange(units.shape[axis])[slice(starts[at], end, steps[at])]
        places = np.cumsum(changed[axis])[taken[changed[axis][taken]]] - 1
        step = int(places[1] - places[0]) if len(places) > 1 else 1
        if step > 0 and (np.diff(places) == step).all() and (step == 1 or "starts" not in node.attributes):
            starts[at], ends[at], steps[at] = int(places[0]), int(places[-1]) + 1, step
        else:
            starts[at], ends[at], steps[at] = 0, 2**31 - 1, 1
            choices[axis] = places
    model = removal.model
    if "starts" in node.attributes:
        edit.set_attributes(model, node, starts=starts, ends=ends)
    else:
        for index, numbers in enumerate((starts, ends, axes, steps), 1):
            edit.set_input(model, node, index, edit.add_initializer(model, f"{node.name}_{index}", np.array(numbers)))
    edit.forget_shapes(model, node)
    for axis, places in choices.items():
        made = node.outputs[0]
        indices = edit.add_initializer(model, f"{node.name}_places", places)
        gather = edit.make_node(model, "Gather", [made, indices], {"axis": axis}, name=f"{node.name}_chosen")
        edit.insert_after(model, node, [gather])
        edit.replace_uses(model, made, gather.outputs[0], where=lambda reader, _, own=gather: reader is not own)


@_SIZES.rule("Gather")
def _taken(removal: _Removal, node: ir.Node) -> None:
    """Constant indices along an axis of units: those that stay, by their new places."""
    if node.inputs[0].is_initializer():
        return
    rank = removal.found.tensors[node.inputs[0].name].ndim if node.inputs[0].name in removal.found.tensors else 0
    axis = node.attributes.get_int("axis", 0) % max(rank, 1)
    stays = removal.kept(node.inputs[0], axis)
    if stays is None:
        return
    indices = removal.model.constant(node.inputs[1])
    for position in range(indices.ndim):
        own = removal.kept(node.outputs[0], axis + position)
        indices = indices if own is None else np.compress(own, indices, position)
    places = np.cumsum(stays) - 1
    new = edit.add_initializer(removal.model, f"{node.name}_indices", places[indices].astype(np.int64))
    edit.set_input(removal.model, node, 1, new)
    edit.forget_shapes(removal.model, node)


@_SIZES.rule("Pad")
def _padding(removal: _Removal, node: ir.Node) -> None:
    """Channels of zeros that are added: fewer of them."""
    before = removal.found.tensors.get(node.inputs[0].name)
    changed = removal.changed(node.outputs[0])
    old = "pads" in node.attributes
    pads = list(node.attributes.get_ints("pads")) if old else None
    for axis, stays in changed.items():
        pads = removal.model.constant(node.inputs[1]).reshape(-1).tolist() if pads is None else pads
        first, last = pads[axis], pads[axis + before.ndim]
        if first or last:
            pads[axis] = int(stays[:first].sum())
            pads[axis + before.ndim] = int(stays[len(stays) - last :].sum())
    if changed and pads is not None:
        removal.give(node, 1, pads, "pads")


@_SIZES.rule("Resize", "Upsample")
def _resized(removal: _Removal, node: ir.Node) -> None:
    """Sizes that are stated for all axes."""
    if len(node.inputs) < 4 or node.inputs[3] is None or "axes" in node.attributes:
        return
    changed = removal.changed(node.outputs[0])
    sizes = removal.model.constant(node.inputs[3]) if changed else None
    if sizes is not None:
        sizes = sizes.reshape(-1).tolist()
        for axis, stays in changed.items():
            sizes[axis] = int(stays.sum())
        removal.give(node, 3, sizes)
