"""The same function in fewer nodes.

    f(constants)              ->  constant        where the file does not grow by it
    Reshape(x, [N, c, -1])    ->  Reshape(x, [0, c, -1])        where N is spelled Shape(x), Gather, Concat ...
    Transpose_p(Transpose_q)  ->  Transpose_pq
    Identity(x), Dropout(x), a Reshape, Cast, Pad, Slice ... that is proven to do nothing  ->  x
    f(x), f(x)                ->  one f(x)
    what no output reads      ->  nothing

One sweep in the order of the graph, linear in nodes. Sub-graphs, local functions and foreign domains stay as they are.
Equal weights stay apart, since a later pass may change one of them and not the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.model import STANDARD_DOMAINS, Model, constant_tensor
from effc.shapes import ShapeNumbers, slice_bounds

from ._constants import KEPT, NODE_BYTES, RANDOM, constants, fold, replace, unproven


@dataclass(frozen=True)
class Simplify(Pass):
    """Constants folded, dead and repeated nodes dropped, shape arithmetic with a dynamic batch made static."""

    name: ClassVar[str] = "simplify"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        untouched = model.not_analysed()
        for name, reason in untouched.items():
            yield Skipped(name, reason)
        seen: set[tuple] = set()
        nodes = tuple(n.name or "" for n in model.graph if n.name not in untouched and _candidate(n, seen))
        if nodes or any(not (v.uses() or v.is_graph_output()) for v in model.graph.initializers.values()):
            yield Proposal("graph", nodes, damage=0.0)
        else:
            yield Skipped("graph", "no node is constant, repeated, unread, or of a kind that may do nothing")

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        if chosen:
            simplify(model)


def simplify(model: Model) -> None:
    """Simplify a model in place; see the module. Its inputs, outputs and the names of nodes that stay are kept."""
    for _ in range(4):  # what was computed may prove more shapes, as where a size went through floating point
        if not _sweep(model):
            break
    edit.remove_unused(model)


def _sweep(model: Model) -> bool:
    """Visit each node once; returns whether another sweep may find more."""
    numbers, twins = ShapeNumbers(model), {}
    untouched, folded, stuck = model.not_analysed(), False, False
    for node in [n for n in model.graph if n.name not in untouched]:
        if fold(model, node, numbers) or _fold_shape(model, node, numbers):
            folded = folded or node.op_type != "Constant"
            continue
        stuck = stuck or unproven(node, numbers)
        if node.op_type == "Reshape":
            _make_static(model, node, numbers)
        elif node.op_type == "Transpose":
            _compose(model, node)
        source = _IDENTITIES[node.op_type](node, numbers) if node.op_type in _IDENTITIES else None
        if source is not None and edit.may_bypass(model, node, source):
            edit.bypass(model, node, source)
        else:
            _merge(model, node, twins)
    return folded and stuck


def _candidate(node: ir.Node, seen: set[tuple]) -> bool:
    if not any(v.uses() or v.is_graph_output() for v in node.outputs):
        return True
    key = _signature(node)
    repeated = key in seen
    seen.add(key)
    if node.op_type in {"Constant", "Shape", "Size", *_IDENTITIES}:
        return True
    return (repeated and node.op_type not in RANDOM) or (node.op_type not in KEPT and constants(node) is not None)


# Shape arithmetic


def _fold_shape(model: Model, node: ir.Node, numbers: ShapeNumbers) -> bool:
    """Shape, Gather, Concat ... -> constant, when every number in the result is known."""
    found, output = numbers.follow(node), node.outputs[0]
    if found is None or not all(isinstance(n, int) for n in found) or not output.uses() or output.is_graph_output():
        return False
    return replace(model, node, {output: np.array(found, np.int64).reshape(numbers.fact(output).shape)})


def _make_static(model: Model, node: ir.Node, numbers: ShapeNumbers) -> None:
    """Reshape(x, [size of axis 0 of x, 2048]) -> Reshape(x, [0, 2048]); one other size beside constants -> -1."""
    found, shape = numbers.of(node.inputs[1]), numbers.dimensions(node.inputs[0])
    if not found or shape is None or all(isinstance(n, int) for n in found):
        return
    if node.attributes.get_int("allowzero", 0) and 0 in found:
        return
    kept = [not isinstance(n, int) and i < len(shape) and n == shape[i] for i, n in enumerate(found)]
    target = [0 if keep else n for keep, n in zip(kept, found, strict=True)]
    unknown = [i for i, n in enumerate(target) if not isinstance(n, int)]
    if unknown and (len(unknown) > 1 or any(isinstance(n, int) and n <= 0 for n in target)):
        return
    for index in unknown:  # beside positive numbers only one size is possible, and so it may be inferred
        target[index] = -1
    weight = edit.add_initializer(model, f"{node.name}_shape", np.array(target, np.int64))
    edit.set_input(model, node, 1, weight)
    edit.set_attributes(model, node, allowzero=None)


# Nodes that do nothing, or nothing new


def _compose(model: Model, node: ir.Node) -> None:
    first = node.inputs[0].producer()
    if first is None or first.op_type != "Transpose" or first.domain not in STANDARD_DOMAINS:
        return
    outer, inner = (n.attributes.get_ints("perm", None) for n in (node, first))
    if outer is not None and inner is not None and len(outer) == len(inner):
        edit.set_input(model, node, 0, first.inputs[0])
        edit.set_attributes(model, node, perm=[inner[axis] for axis in outer])
        if not first.outputs[0].uses():
            edit.absorb(node, first)


def _unchanged(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    """For operators that keep the order of elements: the shape does not change."""
    before, after = numbers.fact(node.inputs[0]).shape, numbers.fact(node.outputs[0]).shape
    return node.inputs[0] if before is not None and None not in before and before == after else None


def _slice(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    bounds = slice_bounds(node)
    return _unchanged(node, numbers) if bounds is not None and min(bounds[3], default=1) > 0 else None


def _pad(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    pads = node.attributes.get_ints("pads", None) if tensor is None else tensor.numpy().ravel().tolist()
    return node.inputs[0] if pads is not None and not any(pads) else None


def _cast(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    before, after = numbers.fact(node.inputs[0]).dtype, numbers.fact(node.outputs[0]).dtype
    return node.inputs[0] if before is not None and before == after else None


def _dropout(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None  # the input came with opset 12
    tensor = constant_tensor(training)
    return node.inputs[0] if training is None or (tensor is not None and not tensor.numpy().any()) else None


def _transpose(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    perm = node.attributes.get_ints("perm", None)
    return node.inputs[0] if perm is not None and list(perm) == sorted(perm) else None


def _single(node: ir.Node, numbers: ShapeNumbers) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


_IDENTITIES: dict[str, Callable[[ir.Node, ShapeNumbers], ir.Value | None]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Expand", "Tile"), _unchanged),
    **dict.fromkeys(("Concat", "Sum", "Mean", "Max", "Min", "Identity"), _single),
    **dict.fromkeys(("Cast", "CastLike"), _cast),
    "Slice": _slice,
    "Pad": _pad,
    "Dropout": _dropout,
    "Transpose": _transpose,
}


def _merge(model: Model, node: ir.Node, twins: dict[tuple, list[ir.Node]]) -> None:
    """f(x), f(x) -> one f(x)."""
    if not node.inputs or node.op_type in RANDOM or any(v.is_graph_output() for v in node.outputs):
        return
    alike = twins.setdefault(_signature(node), [])
    for twin in alike[:8]:
        pairs = {old: new for old, new in zip(node.outputs, twin.outputs, strict=False) if old.uses()}
        if len(node.outputs) == len(twin.outputs) and all(v.name for v in pairs.values()) and _same(node, twin):
            edit.replace(model, [node], [], pairs)
            edit.absorb(twin, node)
            return
    alike.append(node)


def _signature(node: ir.Node) -> tuple:
    """What equal nodes share, but for attributes: operator and inputs, small integers among them by their numbers."""
    return node.op_type, node.domain, *(_content(v) for v in node.inputs)


def _content(value: ir.Value | None) -> object:
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.nbytes > NODE_BYTES:
        return value
    return tuple(tensor.shape.numpy()), tensor.tobytes()


def _same(a: ir.Node, b: ir.Node) -> bool:
    texts = ({k: ir.to_proto(v).SerializeToString(deterministic=True) for k, v in n.attributes.items()} for n in (a, b))
    return next(texts) == next(texts)
