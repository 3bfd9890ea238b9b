"""What a chain of factors costs in a layer's place: counted, and predicted as the runtime would run it.

For the prediction the chain stands in a small network of its own, between layers as it will have around it: what the
runtime fuses, and in which layout it computes, is then its own word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from effc.contract import Context
from effc.cost import Cost
from effc.energy import joules
from effc.errors import EffcError
from effc.kernels import CONVOLUTION, FREE, MATRIX, Kernel, family, left
from effc.lowered import integer
from effc.model import Model
from effc.predict import MEASURED, estimate
from effc.traffic import Moved

from ._factors import Factor, blank
from ._sites import Site

OPSET = 17


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        size: shape of its input: [n, C, H, W], or [rows, K] of a dense layer.
        first: it reads an input of the graph.
        around: bytes that go through the caches in a whole inference; what was not touched since has left by that much.
        weight_bytes: bytes of a weight.
    """

    size: tuple[int, ...]
    first: bool
    around: float
    weight_bytes: int = 4


class ChainCosts:
    """Costs of chains on a context's target; what was asked once is remembered by its shapes.

    Args:
        timed: predict seconds; else they are 0, for not known.
    """

    def __init__(self, context: Context, *, timed: bool = True) -> None:
        self._context, self._timed = context, timed
        self._codes = any(step.name == "int8" for step in context.later)
        self._known: dict[tuple, float | None] = {}

    def of(self, site: Site, place: Place, factors: Sequence[Factor]) -> Cost:
        """Cost of a chain in a layer's place; seconds are 0 where they are not known."""
        rows = _positions(place, factors)
        macs = sum(r * f.weight.size for r, f in zip(rows, factors, strict=True))
        bias = 0 if site.bias is None else site.bias.size
        parameters = sum(f.weight.size for f in factors) + bias
        tensors = _tensors(place, factors, rows)
        moved = Moved(parameters * place.weight_bytes, tuple((size, size) for size in tensors))
        energy = joules(macs, "int8" if self._codes else "float32", moved, self._context.target.cache)
        seconds = self.seconds(place, factors, dense=site.dense)
        return Cost(macs, parameters, parameters * place.weight_bytes, sum(tensors), energy, seconds or 0.0)

    def seconds(self, place: Place, factors: Sequence[Factor], *, dense: bool) -> float | None:
        """Predicted time, or None where only the roofline would tell it."""
        shapes = tuple((f.weight.shape, f.groups, f.strides, f.dilations, f.pads) for f in factors)
        key = place.size, place.first, dense, shapes
        if key not in self._known:
            self._known[key] = self._predicted(place, factors, dense)
        return self._known[key]

    def _predicted(self, place: Place, factors: Sequence[Factor], dense: bool) -> float | None:
        context = self._context
        if not self._timed or not context.target.kernels or context.backend.name != context.target.runtime:
            return None
        small = network(place, factors, dense)
        try:
            found, stands_for = context.backend.kernels(small, place.size[0], {}, context.threads)
        except EffcError:
            return None
        own = own_kernels(found, stands_for)
        own = [moved_apart(kernel, place.around) for kernel in own]
        if self._codes:
            weights = {kernel.name: shape for kernel, shape in _weights(own, factors)}
            own = [integer(kernel, weights.get(kernel.name)) or kernel for kernel in own]
        estimates = estimate([kernel for kernel in own if kernel.kind != FREE], context.target, context.threads)
        return None if any(e.basis != MEASURED for e in estimates) else sum(e.seconds for e in estimates)


def _positions(place: Place, factors: Sequence[Factor]) -> list[int]:
    """Output positions of each factor, over all images."""
    if len(place.size) == 2:
        return [place.size[0]] * len(factors)
    images, _, *size = place.size
    counts = []
    for factor in factors:
        size = _after(factor, size)
        counts.append(images * math.prod(size))
    return counts


def _after(factor: Factor, size: Sequence[int]) -> list[int]:
    """Height and width of what a factor makes."""
    made = []
    for axis, length in enumerate(size):
        reach = factor.dilations[axis] * (factor.weight.shape[2 + axis] - 1)
        made.append((length + factor.pads[axis] + factor.pads[axis + 2] - reach - 1) // factor.strides[axis] + 1)
    return made


def _tensors(place: Place, factors: Sequence[Factor], rows: Sequence[int]) -> list[int]:
    """Bytes that the factors read and write, tensor by tensor."""
    sizes = [math.prod(place.size) * place.weight_bytes]
    for count, factor in zip(rows, factors, strict=True):
        made = count * factor.weight.shape[0] * place.weight_bytes
        sizes += [made, made]
    return sizes[:-1]


def network(place: Place, factors: Sequence[Factor], dense: bool) -> Model:
    """The chain between a layer before and a layer behind (dense layers stand alone)."""
    x = ir.val("x", ir.DataType.FLOAT, ir.Shape(place.size))
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []

    def add(value: ir.Value, factor: Factor, name: str) -> ir.Value:
        shape = factor.weight.shape
        weight = blank(*shape[:2]).T if dense else blank(*shape)
        operand = ir.val(f"{name}_w", const_value=ir.tensor(weight.copy(), name=f"{name}_w"))
        weights.append(operand)
        attributes = {} if dense else {
            "kernel_shape": list(shape[2:]), "strides": list(factor.strides), "dilations": list(factor.dilations),
            "pads": list(factor.pads), "group": factor.groups,
        }  # fmt: skip
        made = ir.node("MatMul" if dense else "Conv", [value, operand], attributes, name=name, num_outputs=1)
        made.outputs[0].name = f"{name}_y"
        nodes.append(made)
        return made.outputs[0]

    y, outputs = x, factors[-1].weight.shape[0]
    if not dense and not place.first:
        y = add(y, Factor(blank(place.size[1], place.size[1], 1, 1)), "enter")
    for number, factor in enumerate(factors):
        y = add(y, factor, f"factor{number}")
    if not dense:
        relu = ir.node("Relu", [y], name="relu", num_outputs=1)
        relu.outputs[0].name = "relu_y"
        nodes.append(relu)
        y = add(relu.outputs[0], Factor(blank(outputs, outputs, 1, 1)), "leave")
    y.dtype = ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": OPSET}, name="chain")
    return Model(ir.Model(graph, ir_version=8), "chain")


def own_kernels(found: Sequence[Kernel], stands_for: Mapping[str, str]) -> list[Kernel]:
    """The kernels from the first factor to the last, and what the runtime puts in between them and their neighbours."""
    place = {kernel.name: index for index, kernel in enumerate(found)}
    start = place.get(stands_for.get("enter", ""), -1) + 1
    end = place.get(stands_for.get("leave", ""), len(found))
    inside = list(found[start:end])
    if "enter" not in stands_for and inside and inside[0].kind.startswith("blocked-Reorder"):
        inside = inside[1:]  # the image is brought into the runtime's layout in any case
    return inside


def moved_apart(kernel: Kernel, around: float) -> Kernel:
    """The kernel where so many bytes go through caches in one inference: its weights have left since the last one."""
    dims, own = dict(kernel.dims), family(kernel.dims)
    if own == CONVOLUTION:
        weights = 4 * math.prod(dims[key] for key in ("m", "c", "g", "kh", "kw"))
    elif own == MATRIX:
        weights = 4 * dims["k"] * dims["n"]
    else:
        weights = 0
    for index, name in enumerate(("near", "far")):
        dims[name] += max(0.0, weights * (left(around)[index] - left(dims["around"])[index]))
    return replace(kernel, dims=dims | {"around": max(around, dims["around"])})


def _weights(kernels: Sequence[Kernel], factors: Sequence[Factor]) -> list[tuple[Kernel, tuple[int, ...]]]:
    """The convolutions among the kernels with the shapes of their weights, in order."""
    own = [kernel for kernel in kernels if family(kernel.dims) == CONVOLUTION]
    return [(kernel, factor.weight.shape) for kernel, factor in zip(own, factors, strict=False)]
