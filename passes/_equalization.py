"""Scales of channels that keep what 8-bit codes lose smallest.

    J(s) = sum_t D_t^2 / 12 sum_n l_n sum_c w_nc^2 / s_c^2    noise of a tensor's codes, D_t = range(s x) / 255
         + sum_n l_n d_n^2 / 12 sum_c s_c^2 E x_c^2           noise of weights' codes, d_n = max_c |w_nc| / s_c / 127

One scale a tensor makes D_t that of its widest channel, so small channels drown; one scale a row of weights makes d_n
that of its largest weight. Nagel et al. ("Data-free quantization through weight equalization and bias correction", ICCV
2019, section 4.1) equalise weights against weights, Xiao et al. ("SmoothQuant", ICML 2023, section 4) weigh activations
against weights by one exponent; J has both. l_n makes it relative: one over the mean square of output n, that of the
layer's outputs added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from effc.layers import constant_weight, output_axis
from effc.model import Model
from effc.statistics import Extent, Extents

from ._homogeneous import Scalable

SHARP = 24.0  # exponent of the norm that stands for a maximum
FURTHEST = np.log(256.0)  # of a scale, either way
FURTHEST_BOUNDED = np.log(8.0)  # of one below a Clip
ROUNDED = 0.25  # of the noise of weights is left when they make up for each other
STEPS = 300


@dataclass(frozen=True)
class Coded:
    """A tensor that gets codes, seen by what reads it.

    Attributes:
        units: [C].
        low, high: [C] how far it reaches below and above zero.
        gain: [C] sum_n l_n w_nc^2 over all readers.
    """

    units: np.ndarray
    low: np.ndarray
    high: np.ndarray
    gain: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The weights of a layer whose outputs share scales over input channels.

    Attributes:
        units: [C].
        largest: [N, C] max |w| over the kernel.
        weight: [N] l_n.
        power: [C] E x^2, times the kernel's taps.
    """

    units: np.ndarray
    largest: np.ndarray
    weight: np.ndarray
    power: np.ndarray


def requests(model: Model, found: Scalable) -> dict[str, Extent]:
    """What has to be known of tensors, by name: inputs of layers and sums, and what is before a Clip."""
    names = {v.name for node in _readers(model) for v in node.inputs if v is not None}
    names |= {node.outputs[0].name for node in model.nodes("Add")}
    names |= {name for bounds in found.bounds.values() for name, _ in bounds}
    return {n: Extent(n, axis=axis) for n, (axis, _) in found.tensors.items() if n in names}


def _readers(model: Model) -> list[ir.Node]:
    return list(model.nodes("Conv", "Gemm", "MatMul", "Add"))


def limits(found: Scalable, extents: Mapping[str, Extents], margin: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Bounds [units] of the scales' logarithms; both 0 for what has to stay."""
    count = 1 + max((int(units.max()) for _, units in found.tensors.values()), default=-1)
    low, high = np.full(count, -FURTHEST), np.full(count, FURTHEST)
    fixed = set(found.fixed)
    for unit, bounds in found.bounds.items():
        for name, bound in bounds:
            if margin is None:
                fixed.add(unit)
                continue
            reach = float(extents[name].maximum[found.tensors[name][1] == unit].max()) * (1 + margin)
            if reach >= bound:  # it is cut off, or nearly: it has to be cut off there
                fixed.add(unit)
            else:
                high[unit] = min(high[unit], FURTHEST_BOUNDED, np.log(bound / reach) if reach > 0 else np.inf)
                low[unit] = -FURTHEST_BOUNDED
    stay = sorted(fixed)
    low[stay] = high[stay] = 0.0
    return low, high


class Noise:
    """J and its gradient by the scales' logarithms."""

    def __init__(self, model: Model, found: Scalable, extents: Mapping[str, Extents]) -> None:
        self.coded: list[Coded] = []
        self.rows: list[Rows] = []
        gains: dict[str, np.ndarray] = {}
        for node in _readers(model):
            for value in node.inputs if node.op_type == "Add" else node.inputs[:1]:
                if value is None or value.name not in extents or extents[value.name] is None:
                    continue
                units, seen = found.tensors[value.name][1], extents[value.name]
                gain = self._sum(node, extents) if node.op_type == "Add" else self._layer(node, units, seen)
                if gain is not None and len(gain) == len(units):
                    gains[value.name] = gains.get(value.name, 0.0) + gain
        for name, gain in gains.items():
            units, seen = found.tensors[name][1], extents[name]
            low, high = np.maximum(-seen.minimum, 0.0), np.maximum(seen.maximum, 0.0)
            self.coded.append(Coded(units, low.astype(np.float64), high.astype(np.float64), gain))

    @staticmethod
    def _sum(node: ir.Node, extents: Mapping[str, Extents]) -> np.ndarray | None:
        made = extents.get(node.outputs[0].name)
        return None if made is None else 1 / _evened(made.power)

    def _layer(self, node: ir.Node, units: np.ndarray, seen: Extents) -> np.ndarray | None:
        weight = constant_weight(node)
        if weight is None or weight.ndim < 2:
            return None
        weight = np.moveaxis(weight, output_axis(node, weight.ndim), 0).astype(np.float64)
        weight = weight.reshape(*weight.shape[:2], -1)
        groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
        if weight.shape[1] * groups != len(units):
            return None
        each = len(weight) // groups
        power = seen.power.astype(np.float64)
        gain = np.zeros(len(units))
        for group in range(groups) if 1 < groups < len(units) else [0]:
            if groups == len(units) > 1:  # depthwise: a scale for each channel's weights
                energy = (weight**2).sum(axis=(1, 2))
                made = energy * np.repeat(power, each)
                gain += (energy / _evened(made)).reshape(groups, each).sum(axis=1)
                break
            rows = weight[group * each : (group + 1) * each] if groups > 1 else weight
            columns = slice(group * rows.shape[1], (group + 1) * rows.shape[1])
            squares = (rows**2).sum(axis=2)
            counts = 1 / _evened(squares @ power[columns])
            gain[columns] += counts @ squares
            self.rows.append(Rows(units[columns], np.abs(rows).max(axis=2), counts, power[columns] * rows.shape[2]))
        return gain

    def terms(self, logs: np.ndarray) -> tuple[list[float], np.ndarray]:
        """J, term by term (tensors, then rows), and its gradient."""
        slope = np.zeros(len(logs) + 1)  # the last is of what has no unit
        own = np.append(logs, 0.0)
        found = []
        for t in self.coded:
            scale = own[t.units]
            width, shares = 0.0, np.zeros(len(scale))
            for reach in (t.low, t.high):
                if reach.any():
                    with np.errstate(divide="ignore"):
                        powers = SHARP * (scale + np.log(reach))
                    part = np.exp(logsumexp(powers) / SHARP)
                    width += part
                    shares += part * softmax(powers)
            if not width:
                found.append(0.0)
                continue
            lost = t.gain * np.exp(-2 * scale)
            value = width**2 / 255**2 / 12 * lost.sum()
            np.add.at(slope, t.units, 2 * value * shares / width - 2 * value * lost / max(lost.sum(), 1e-300))
            found.append(float(value))
        for r in self.rows:
            scale = own[r.units]
            with np.errstate(divide="ignore"):
                powers = SHARP * (np.log(np.maximum(r.largest, 1e-30)) - scale)
            step = np.exp(2 * logsumexp(powers, axis=1) / SHARP) / 127**2 / 12 * ROUNDED
            met = r.power * np.exp(2 * scale)
            noise = float(r.weight @ step)
            value = noise * met.sum()
            shares = (r.weight * step) @ softmax(powers, axis=1)
            np.add.at(slope, r.units, 2 * noise * met - 2 * met.sum() * shares)
            found.append(float(value))
        return found, slope[:-1]

    def least(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Logarithms of the scales of least noise found, 0 the start."""

        def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
            found, slope = self.terms(logs)
            total = sum(found) / start
            return total + 1e-6 * float(logs @ logs), slope / start + 2e-6 * logs

        start = max(sum(self.terms(np.zeros(len(low)))[0]), 1e-300)
        bounds = np.stack([low, high], axis=1)
        return minimize(loss, np.zeros(len(low)), jac=True, method="L-BFGS-B", bounds=bounds,
                        options={"maxiter": STEPS}).x  # fmt: skip


def _evened(energy: np.ndarray) -> np.ndarray:
    """Mean squares of outputs, those of the layer mixed in: what is next to nothing is not worth everything."""
    return energy + energy.mean() + 1e-12
