"""Units that do nothing: no weight reads them, or what they make is known beforehand and goes into biases behind.

    filters of unit u zero    =>    u is c = f(b_u) everywhere    =>    b' = b + sum_taps W'_u c,    u removed

(Han et al., "Learning both weights and connections for efficient neural networks", 2015, section 3.5, where dying
units are left to training.) What comes out is the same up to rounding. Where zero padding surrounds a constant that is
not 0 it is no constant any more, and such a unit stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.channels import Channels, Place, channels
from effc.constant_units import Known, along, constants, padded
from effc.layers import added_behind, alpha, bias_array, output_axis, set_bias, set_operand
from effc.model import Model
from effc.removal import remove_units, sparing


@dataclass(frozen=True)
class Dead:
    """What was done about units that do nothing.

    Attributes:
        removed: how many are gone.
        left: how many are constant and stay, as zero padding meets them or nothing behind can take their constant.
    """

    removed: int
    left: int


def remove_dead(model: Model) -> Dead:
    """Remove units that do nothing, in place, and those that do nothing then; outputs stay, up to rounding."""
    removed = 0
    while True:
        dead, left = _dead(model)
        dead = sparing(model, dead)
        if not dead:
            return Dead(removed, left)
        absorb(model, dead)
        remove_units(model, dead)
        removed += len(dead)


def absorb(model: Model, units: Collection[int]) -> None:
    """Let the layers that read units add what these are known to make, in place, wherever that is exact.

    What reads the units is left as it is: the model computes the same once nothing reads them any more.
    """
    values, wanted = constants(model), np.array(sorted(units), np.int64)
    for reader in list(_readers(model, channels(model), values)):
        if reader.takes and np.isin(reader.units, wanted).any():
            here = np.where(np.isin(reader.units, wanted) & ~np.isnan(reader.inputs), reader.inputs, 0.0)
            shift = np.einsum("gnc,gc->gn", reader.summed, here).reshape(-1)
            if shift.any():
                _add(model, reader.node, shift)


def _add(model: Model, node: ir.Node, shift: np.ndarray) -> None:
    if node.op_type == "MatMul":
        adding, place = added_behind(model, node, len(shift))
        before = model.constant(adding.inputs[place])
        set_operand(
            model, adding, place, (before + shift.reshape(before.shape)).astype(before.dtype), f"{node.name}_bias"
        )
    else:
        before = bias_array(model, node, len(shift))
        set_bias(model, node, shift if before is None else before + shift)


def _dead(model: Model) -> tuple[set[int], int]:
    """Units that can go, and how many are constant and cannot."""
    found = channels(model)
    units = {int(u) for held in found.weights.values() for u in np.unique(held[held >= 0])} - found.pinned.keys()
    used, stuck = _read_whole(model, found), set()
    for reader in _readers(model, found, constants(model)):
        known = ~np.isnan(reader.inputs) | ~reader.weighs
        exact = ~reader.weighs | (reader.inputs == 0) | (known & reader.takes)
        used |= set(reader.units[~known.all(axis=0)].tolist())
        stuck |= set(reader.units[~exact.all(axis=0)].tolist())
    return units - used - stuck, len((units & stuck) - used)


def _read_whole(model: Model, found: Channels) -> set[int]:
    """Units that something other than a weight reads: sums over them, products of two activations."""
    used: set[int] = set()
    for node in model.graph:
        made = {int(u) for v in node.outputs for u in np.unique(found.tensors.get(v.name, np.empty(0)))}
        for place, value in enumerate(node.inputs):
            if value is not None and value.name in found.tensors and not (place == 0 and _place(node, found)):
                used |= {int(u) for u in np.unique(found.tensors[value.name])} - made
    return used


def _place(node: ir.Node, found: Channels) -> Place | None:
    """Where the weight of a layer reads units."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    axes = () if weight is None or node.op_type not in _AXES else _AXES[node.op_type](node)
    return next((p for axis in axes if (p := Place(weight.name, axis, True)) in found.weights), None)


_AXES: dict[str, Callable[[ir.Node], tuple[int, ...]]] = {
    "Conv": lambda node: (1,), "ConvTranspose": lambda node: (0,), "LSTM": lambda node: (2,), "GRU": lambda node: (2,),
    "RNN": lambda node: (2,), "Gemm": lambda node: (1 - output_axis(node, 2),), "MatMul": lambda node: (0,),
}  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """A layer that reads units, g groups of c inputs.

    Attributes:
        units: [c] along its weight.
        weighs: [g, c] whether any of its weights there is not zero.
        inputs: [g, c] what it gets, NaN where that is not known.
        summed: [g, n, c] weights of a group's outputs, summed over the kernel.
        takes: it can add a constant that it gets, exactly.
    """

    node: ir.Node
    units: np.ndarray
    weighs: np.ndarray
    inputs: np.ndarray
    summed: np.ndarray
    takes: bool


def _readers(model: Model, found: Channels, values: Mapping[str, Known]) -> Iterator[_Reader]:
    for node in model.graph:
        place = _place(node, found)
        if place is None:
            continue
        units, weight = found.weights[place], node.inputs[1].const_value.numpy()
        matrix = np.moveaxis(weight, place.axis, 1) if weight.ndim > 1 else weight[None]
        groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        matrix = matrix.reshape(groups, -1, *matrix.shape[1:])
        taps = tuple(range(3, matrix.ndim))
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
        inputs = along(found, values, node.inputs[0], axis, groups * len(units)).reshape(groups, -1)
        weighs = (matrix != 0).any(axis=(1, *taps))
        summed = matrix.sum(axis=taps, dtype=np.float64) * alpha(node)
        takes = _takes(model, node, summed.shape[0] * summed.shape[1])
        yield _Reader(node, units, weighs, inputs, summed, takes)


def _takes(model: Model, node: ir.Node, outputs: int) -> bool:
    if node.op_type == "MatMul":
        return added_behind(model, node, outputs) is not None
    if node.op_type not in ("Conv", "Gemm") or padded(node):
        return False
    try:
        bias_array(model, node, outputs)
    except ValueError:
        return False
    return True
