"""How units of channels run through operators that move numbers; see `effc.channels`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from effc.channel_trace import FIXED, RULES, Map, Trace, laid, ranked, squeezed


@RULES.rule("Transpose")
def _transposed(trace: Trace, node: ir.Node) -> Map | None:
    units = trace.of(node.inputs[0])
    order = list(node.attributes.get_ints("perm", tuple(reversed(range(units.ndim)))))
    return units.transpose(order) if len(order) == units.ndim else None  # else a rank that dynamic sizes decide


@RULES.rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshaped(trace: Trace, node: ir.Node) -> Map | None:
    units = trace.of(node.inputs[0])
    if node.op_type == "Reshape":
        _pin_computed(trace, node)
    before, after = (trace.shape(v) for v in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or 0 in before:
        return np.full((1,) * len(after), FIXED) if after is not None and units.size == 1 and units.max() < 0 else None
    found: list[int] = []
    for own, new in _parts(before, after):
        if all(units.shape[axis] == 1 for axis in own):
            found += [1] * len(new)
        else:
            whole = list(units.shape)
            for axis in own:
                whole[axis] = before[axis]
            units = np.broadcast_to(units, whole)
            found += [after[axis] for axis in new]
    return squeezed(units.reshape(found))


def _parts(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same numbers before and after."""
    i = j = 0
    while i < len(before) or j < len(after):
        own, new, a, b = [], [], 1, 1
        while True:
            if a <= b and i < len(before):
                own.append(i)
                a, i = a * before[i], i + 1
            elif j < len(after):
                new.append(j)
                b, j = b * after[j], j + 1
            else:
                break
            if a == b and own and (new or a == 1):
                break
        yield own, new


def _pin_computed(trace: Trace, node: ir.Node) -> None:
    """Sizes that a node is given can be changed only where they are numbers."""
    if trace.model.constant(node.inputs[1]) is None:
        why = f"{node.op_type} {node.name!r} is given sizes that are computed; simplify makes them numbers"
        trace.pin(trace.of(node.inputs[0]), why)


@RULES.rule("Expand")
def _expanded(trace: Trace, node: ir.Node) -> Map | None:
    _pin_computed(trace, node)
    shape = trace.shapes.get(node.outputs[0].name)
    return None if shape is None else ranked(trace.of(node.inputs[0]), len(shape))


@RULES.rule("Concat")
def _concatenated(trace: Trace, node: ir.Node) -> Map | None:
    maps, shapes = [trace.of(v) for v in node.inputs], [trace.shape(v) for v in node.inputs]
    rank = max(m.ndim for m in maps)
    if not rank or any(shape is None for shape in shapes) or any(m.ndim != rank for m in maps):
        return None if any((m >= 0).any() for m in maps) else np.full((1,) * rank, FIXED)
    axis = node.attributes.get_int("axis", 0) % rank
    others = [np.broadcast_shapes(*(np.delete(m.shape, axis) for m in maps))]
    if any(length > 1 for length in others[0]):
        if any(m.shape[axis] > 1 for m in maps):
            return None
        return trace.joined(node.inputs, node, rank)
    if all((m < 0).all() for m in maps):
        return np.full((1,) * rank, FIXED)
    lengths = [shape[axis] for shape in shapes if shape is not None]
    whole = [np.broadcast_to(m.reshape(-1), length) for m, length in zip(maps, lengths, strict=True)]
    return laid(np.concatenate(whole), axis, rank)


@RULES.rule("Split")
def _split(trace: Trace, node: ir.Node) -> list[Map] | None:
    units = trace.of(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % max(units.ndim, 1)
    if units.ndim and units.shape[axis] == 1:
        return [units] * len(node.outputs)
    shapes = [trace.shape(v) for v in node.outputs]
    if any(shape is None for shape in shapes):
        return None
    ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
    return list(np.split(units, ends, axis))


@RULES.rule("Slice")
def _sliced(trace: Trace, node: ir.Node) -> Map | None:
    units = trace.of(node.inputs[0])
    if "starts" in node.attributes:
        given = [list(node.attributes.get_ints(k, ())) or None for k in ("starts", "ends", "axes")] + [None]
    else:
        tensors = [None if v is None else trace.model.constant(v) for v in (*node.inputs[1:], None, None)[:4]]
        if tensors[0] is None or tensors[1] is None:
            return units if units.max(initial=FIXED) < 0 else None
        given = [None if t is None else t.reshape(-1).tolist() for t in tensors]
    starts, ends, axes, steps = given
    for at, axis in enumerate(axes if axes is not None else range(len(starts))):
        if units.shape[axis] > 1:
            cut = slice(starts[at], None if ends[at] < -(2**30) else ends[at], 1 if steps is None else steps[at])
            index = [slice(None)] * units.ndim
            index[axis] = cut
            units = units[tuple(index)]
    return units


@RULES.rule("Gather")
def _gathered(trace: Trace, node: ir.Node) -> Map | None:
    data, indices = node.inputs
    rank = len(trace.shapes.get(indices.name) or ())
    if data.is_initializer():
        shape = trace.shape(data)
        if shape is None or len(shape) != 2 or node.attributes.get_int("axis", 0):
            return np.full((1,) * (rank + max(len(shape or ()), 1) - 1), FIXED)
        return laid(trace.made(data, 1, shape[1]), -1, rank + 1)  # an embedding
    units = trace.of(data)
    if not units.ndim:
        return units
    axis = node.attributes.get_int("axis", 0) % units.ndim
    chosen = trace.model.constant(indices)
    if units.shape[axis] == 1:
        return units.reshape(units.shape[:axis] + (1,) * rank + units.shape[axis + 1 :])
    return None if chosen is None else np.take(units, chosen, axis)


@RULES.rule("Pad")
def _padded(trace: Trace, node: ir.Node) -> Map | None:
    """Channels of zeros that are added can be removed as well: they are units of their own."""
    units = trace.of(node.inputs[0])
    if "pads" in node.attributes:
        pads = list(node.attributes.get_ints("pads"))
    else:
        tensor = trace.model.constant(node.inputs[1])
        if tensor is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
            return None
        pads = tensor.tolist()
    plain = node.attributes.get_string("mode", "constant") == "constant"
    axes = [axis for axis in range(units.ndim) if units.shape[axis] > 1]
    for axis in axes:
        before, after = pads[axis], pads[axis + units.ndim]
        if not (before or after):
            continue
        if not plain or min(before, after) < 0 or len(axes) > 1:
            return None
        rank = units.ndim
        parts = [trace.fresh(before), units.reshape(-1), trace.fresh(after)]
        units = laid(np.concatenate(parts), axis, rank)
    return units


@RULES.rule("Shape", "Size", "ConstantOfShape", "Range", "NonZero", "OneHot", "Constant", "EyeLike")
def _numbers(trace: Trace, node: ir.Node) -> list[Map]:
    return []
