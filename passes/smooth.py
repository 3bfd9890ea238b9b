"""MatMul(x, W) -> MatMul(x / s, s W): channels of x that stand out give way to those that do not, before int8.

    LayerNorm_{g,b} ; MatMul_i(W_i)                ->  LayerNorm_{g/s,b/s} ; MatMul_i(s W_i)
    Linear_{V,b} [; Relu] [; Mul(u)] ; MatMul(W)   ->  Linear_{V/s,b/s} [; Relu] [; Mul(u)] ; MatMul(s W)
    x ; MatMul_i(W_i)                              ->  Mul(1/s) ; MatMul_i(s W_i)         where that much noise goes

One scale a tensor is what integer kernels take of activations, so that one channel with large values leaves the others
few codes. s = max|x|^a or max|x|^a / max|w|^(1-a), channel by channel (Xiao et al. 2023, "SmoothQuant", equation 4);
where the paper fixes a = 0.5, here each layer has the kind and the a of least rounding noise (`noise`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.errors import BadInput, PassFailed
from effc.layers import constant_weight, output_axis
from effc.model import Model
from effc.statistics import Request

from ._absorb import absorbers

LEVELS, TOP = 255, 127  # steps of 8-bit activations; largest code of a weight
POWERS = np.linspace(0.0, 1.0, 21)
LEAST_GAIN = 1.1  # noise before over noise after, from which on a layer is touched
RELATIVE = 1e-3  # extents below this share of the largest count as this share


@dataclass(frozen=True)
class Extent(Request):
    """Least and largest value and mean square of a tensor's channels, its last axis -> `Extents`."""

    def start(self) -> _ExtentAccumulator:
        return _ExtentAccumulator()


@dataclass(frozen=True)
class Extents:
    """Of K channels: `low` <= 0 <= `high`, and `square`, the mean of x^2; all [K]."""

    low: np.ndarray
    high: np.ndarray
    square: np.ndarray


class _ExtentAccumulator:
    def __init__(self) -> None:
        self.low = self.high = self.square = None
        self.rows = 0

    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        rows = values.reshape(-1, values.shape[-1])
        if not rows.size:
            return
        low, high = (np.asarray(each, np.float64) for each in (rows.min(axis=0), rows.max(axis=0)))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise BadInput("the calibration data drive the model to NaN or infinity; check their preprocessing")
        square = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        if self.rows:
            low, high, square = np.minimum(low, self.low), np.maximum(high, self.high), square + self.square
        self.low, self.high, self.square, self.rows = low, high, square, self.rows + len(rows)

    def result(self) -> Extents | None:
        if not self.rows:
            return None
        return Extents(np.minimum(self.low, 0.0), np.maximum(self.high, 0.0), self.square / self.rows)


@dataclass(frozen=True)
class Smooth(Pass):
    """Scales that move from activations into weights, so that int8 loses less; the outputs stay the same."""

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4

    insert: Annotated[
        float,
        Field(ge=0, le=1, description="share of a layer's power that rounding noise must fall by to put a Mul in"),
    ] = 1e-3

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        groups, refusals = _groups(model)
        yield from (Skipped(name, reason) for name, reason in refusals.items())
        if context.calibration is None:
            for group in groups.values():
                yield from (Skipped(n.name, "its scales need calibration data: give --calibrate SPEC") for n in group)
            return
        found = context.statistics(model, [Extent(value.name) for value in groups])
        for value, group in groups.items():
            proposal = self._proposal(value, group, found[Extent(value.name)])
            if isinstance(proposal, str):
                yield from (Skipped(n.name, proposal) for n in group)
            else:
                yield proposal

    def _proposal(self, value: ir.Value, group: list[ir.Node], extents: Extents | None) -> Proposal | str:
        matrix = _together(group)
        if extents is None or not extents.square.any() or not matrix.any():
            return "its input or its weight is zero on the calibration data"
        before = noise(np.ones(len(matrix)), extents, matrix)
        best, least = {}, np.inf
        for setting in _settings():
            after = noise(scales(setting, extents, matrix), extents, matrix)
            if after < least:
                best, least = setting, after
        if before < LEAST_GAIN * least:
            return f"its channels are even: rounding noise falls by less than {LEAST_GAIN:g} times"
        into = absorbers(value, group, len(matrix))
        if isinstance(into, str):
            share = (before - least) / float((extents.square[:, None] * matrix**2).sum())
            if share < self.insert:
                return f"{into}; a Mul would lower noise by {share:.1e} of its power, below insert={self.insert:g}"
            return Proposal(group[0].name, tuple(n.name for n in group), {**best, "into": "mul"}, damage=0.0)
        nodes = (*dict.fromkeys(use.node.name for tensor, _ in into for use in tensor.uses()), *(n.name for n in group))
        return Proposal(group[0].name, nodes, {**best, "into": "before"}, damage=0.0)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        groups, _ = _groups(model)
        wanted = {p.site: p.setting for p in chosen}
        sites = {value: group for value, group in groups.items() if group[0].name in wanted}
        found = context.statistics(model, [Extent(value.name) for value in sites])
        for value, group in sites.items():
            setting = wanted[group[0].name]
            matrix = _together(group)
            s = scales(setting, found[Extent(value.name)], matrix)
            if setting["into"] == "mul":
                _insert(model, value, group, s)
            else:
                into = absorbers(value, group, len(matrix))
                if isinstance(into, str):
                    raise PassFailed(f"{self.name}: nothing takes up the scales of {group[0].name!r}: {into}")
                for tensor, axis in into:
                    edit.set_initializer(model, tensor, _times(tensor.const_value.numpy(), 1 / s, axis))
            for node in group:
                weight = constant_weight(node)
                edit.set_initializer(model, node.inputs[1], _times(weight, s, 1 - output_axis(node, 2)))


def noise(s: np.ndarray, extents: Extents, weight: np.ndarray) -> float:
    """Mean squared error of a row of x W that 8-bit codes of x / s and of s W make, rounding taken as even noise.

        step_x^2 / 12  sum_jk (s_j w_jk)^2   +   sum_k step_k^2 / 12  sum_j E[x_j^2] / s_j^2

    with one step for x, over the range of all channels, and one for each column of W (Jacob et al. 2018's codes).

    Args:
        s: [K]; weight: [K, N].
    """
    step = (float((extents.high / s).max()) - float((extents.low / s).min())) / LEVELS
    scaled = s[:, None] * weight
    steps = np.abs(scaled).max(axis=0) / TOP
    of_x = step**2 * float((scaled**2).sum())
    return (of_x + float((steps**2).sum()) * float((extents.square / s**2).sum())) / 12


def scales(setting: Mapping[str, Any], extents: Extents, weight: np.ndarray) -> np.ndarray:
    """s [K], of geometric mean 1; SmoothQuant's equation 4, or its numerator alone."""
    power = float(setting["power"])
    s = _floored(np.maximum(extents.high, -extents.low)) ** power
    if setting["weights"]:
        s = s / _floored(np.abs(weight).max(axis=1)) ** (1 - power)
    return s / np.exp(np.log(s).mean())


def _settings() -> Iterator[dict[str, object]]:
    yield from ({"power": float(a), "weights": weights} for a in POWERS for weights in (False, True))


def _floored(extent: np.ndarray) -> np.ndarray:
    """A channel that calibration data never touched may still come alive: its scale stays within bounds."""
    return np.maximum(extent, RELATIVE * extent.max())


def _groups(model: Model) -> tuple[dict[ir.Value, list[ir.Node]], dict[str, str]]:
    """Tensor -> the dense layers that read it and share its scales; and the layers left alone, with why."""
    groups: dict[ir.Value, list[ir.Node]] = {}
    refusals: dict[str, str] = {}
    for node in model.nodes("MatMul", "Gemm"):
        if reason := _refusal(model, node):
            refusals[node.name or ""] = reason
        else:
            groups.setdefault(node.inputs[0], []).append(node)
    return groups, refusals


def _refusal(model: Model, node: ir.Node) -> str | None:
    weight = constant_weight(node)
    if weight is None:
        return "its right operand is no constant" if node.op_type == "MatMul" else "its weight is no constant"
    if not node.inputs[1].is_initializer():
        return "its weight is made by a node: simplify makes it a weight of the graph"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}; float32 is scaled"
    if weight.ndim != 2:
        return f"its right operand has {weight.ndim} axes; 2 are scaled"
    if others := [use.node.name for use in node.inputs[1].uses() if use.node is not node]:
        return f"its weight is shared with {others[0]!r}"
    if node.attributes.get_int("transA", 0):
        return "its left operand is transposed"
    if model.constant(node.inputs[0]) is not None:
        return "its input is a constant; simplify folds it"
    return None


def _together(group: Sequence[ir.Node]) -> np.ndarray:
    """Weights of layers that read the same tensor, side by side: [K, N]."""
    parts = []
    for node in group:
        weight = constant_weight(node).astype(np.float64)
        weight = weight.T if output_axis(node, 2) == 0 else weight
        parts.append(weight * node.attributes.get_float("alpha", 1.0))
    return np.concatenate(parts, axis=1)


def _insert(model: Model, value: ir.Value, group: Sequence[ir.Node], s: np.ndarray) -> None:
    factor = edit.add_initializer(model, f"{value.name}_smoothing", (1 / s).astype(np.float32))
    mul = edit.make_node(model, "Mul", [value, factor], name=f"{value.name}_smooth", origin=group[:1])
    mul.outputs[0].shape, mul.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
    first = next(node for node in model.graph if node in set(group))
    edit.insert_before(model, first, [mul])
    for node in group:
        edit.set_input(model, node, 0, mul.outputs[0])


def _times(array: np.ndarray, factors: np.ndarray, axis: int) -> np.ndarray:
    """An array whose `axis` is multiplied by factors; in float64, stored in the array's type."""
    shape = [-1 if i == axis else 1 for i in range(array.ndim)]
    return (array.astype(np.float64) * factors.reshape(shape)).astype(array.dtype)
