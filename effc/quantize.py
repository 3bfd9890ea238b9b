"""Affine integer codes: r = S (q - Z) (Jacob et al. 2018, section 2). Ranges from histograms, codes of weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import rel_entr

from effc.statistics import Bins

CHANNELS = 64  # rounded together
TIES = 128  # weights of a channel that balanced rounding may turn
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of 8-bit activations: uint8, or int8 with zero point 0."""

    scale: np.float32
    zero: np.integer

    @property
    def low(self) -> float:
        return float(self.scale) * (np.iinfo(self.zero.dtype).min - int(self.zero))

    @property
    def high(self) -> float:
        return float(self.scale) * (np.iinfo(self.zero.dtype).max - int(self.zero))

    def decoded(self, values: np.ndarray) -> np.ndarray:
        """What is left of values that go through codes."""
        bounds, zero = np.iinfo(self.zero.dtype), np.float32(self.zero)
        codes = np.rint(values / self.scale) + zero
        return (np.clip(codes, bounds.min, bounds.max) - zero) * self.scale


def affine(low: float, high: float, *, signed: bool = False) -> Affine:
    """Parameters that cover [low, high] and hold zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    if signed:
        return Affine(_scale(max(-low, high) / 127), np.int8(0))
    scale = _scale((high - low) / 255)
    return Affine(scale, np.uint8(np.clip(np.rint(-low / float(scale)), 0, 255)))


def _scale(value: float) -> np.float32:
    """A tensor that is all zero still needs a positive scale; one below float32's normal range is flushed to zero."""
    return np.float32(value) if value > np.finfo(np.float32).tiny else np.float32(1.0)


def choose_range(
    bins: Bins, calibrator: str, percentile: float = 99.99, *, signed: bool = False
) -> tuple[float, float]:
    """Range [low, high] of a tensor's codes.

    minmax keeps all that was seen; percentile drops the tails outside the given share; mse takes the range of least
    expected squared error; entropy that of least Kullback-Leibler divergence between the values' distribution and
    their codes' (Migacz 2017, "8-bit inference with TensorRT").
    """
    low, high = min(bins.minimum, 0.0), max(bins.maximum, 0.0)
    if calibrator == "minmax" or low == high:
        return low, high
    if calibrator == "percentile":
        share = np.cumsum(bins.counts) / bins.counts.sum()
        tail = (1 - percentile / 100) / (2 if low < 0 < high else 1)
        edges = bins.low + np.arange(len(share) + 1) * bins.width
        cut_low = edges[np.searchsorted(share, tail, "right")] if low < 0 else 0.0
        cut_high = edges[np.searchsorted(share, 1 - tail, "left") + 1] if high > 0 else 0.0
        return max(low, min(cut_low, 0.0)), min(high, max(cut_high, 0.0))
    best, least = (low, high), np.inf
    score = _squared_error if calibrator == "mse" else _divergence
    for cut in _cuts(low, high):
        value = score(bins, affine(*cut, signed=signed))
        if value < least:
            best, least = cut, value
    return best


def _cuts(low: float, high: float) -> list[tuple[float, float]]:
    """Candidate ranges: each end cut by itself, and both together."""
    shares = np.concatenate([np.linspace(1.0, 0.5, 26), np.linspace(0.48, 0.1, 20)])
    if low == 0 or high == 0:
        return [(low * s, high * s) for s in shares]
    extent = max(-low, high)
    both = [(max(low, -extent * s), min(high, extent * s)) for s in shares]
    return both + [(low * s, high) for s in shares[1:]] + [(low, high * s) for s in shares[1:]]


def _squared_error(bins: Bins, q: Affine) -> float:
    """Expected (x - code(x))^2 over the histogram; within a bin values are taken as spread evenly."""
    x = bins.centres
    step = float(q.scale)
    inside = np.clip(x, q.low, q.high)
    if bins.width < step:
        error = (x - inside) ** 2 + np.where(inside == x, (x - step * np.rint(x / step)) ** 2, 0.0)
    else:
        error = (x - inside) ** 2 + np.where(inside == x, step**2 / 12, 0.0)
    return float(error @ bins.counts) / float(bins.counts.sum())


def _divergence(bins: Bins, q: Affine) -> float:
    """KL divergence of the clipped histogram from what its codes can tell of it."""
    x, step = bins.centres, float(q.scale)
    codes = np.clip(np.rint(x / step) + int(q.zero), np.iinfo(q.zero.dtype).min, np.iinfo(q.zero.dtype).max)
    inside = (x >= q.low - step / 2) & (x <= q.high + step / 2)
    counts = bins.counts.astype(np.float64)
    # The zeros that a ReLU leaves have a code of their own; as a spike in one bin they would rule the divergence.
    zero = int(np.floor(-bins.low / bins.width))
    if 0 <= zero < len(counts):
        around = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
        counts[zero] = min(counts[zero], max(around, default=0.0))
    if not counts.any():
        return 0.0
    if not inside.any():
        return np.inf
    reference = np.where(inside, counts, 0.0)
    index = (codes - codes[0]).astype(np.int64)
    # The reference keeps the clipped mass at the ends; the coded distribution spreads a code's mass over its bins.
    first, last = np.flatnonzero(inside)[[0, -1]]
    reference[first] += counts[:first].sum()
    reference[last] += counts[last + 1 :].sum()
    occupied = inside & (counts > 0)
    mass = np.bincount(index, np.where(inside, counts, 0.0))
    places = np.maximum(np.bincount(index, occupied), 1)
    coded = np.where(occupied, (mass / places)[index], 0.0)
    smoothed = np.maximum(coded, 1e-9 * counts.sum())
    return float(rel_entr(reference / reference.sum(), smoothed / smoothed.sum()).sum())


@dataclass(frozen=True)
class Weight:
    """Symmetric per-channel int8 codes of a weight: `codes` of its shape, one positive scale per index of `axis`."""

    codes: np.ndarray
    scales: np.ndarray
    axis: int

    def decoded(self) -> np.ndarray:
        return self.codes.astype(np.float32) * self.scales.reshape(_along(self.axis, self.codes.ndim))


def quantize_weight(
    weight: np.ndarray,
    axis: int,
    *,
    bits: int = 8,
    bias: np.ndarray | None = None,
    input_scale: float = 0.0,
    mean: np.ndarray | None = None,
) -> Weight:
    """Codes in [-(2^(bits-1) - 1), 2^(bits-1) - 1], the lowest code unused (Jacob et al. 2018, section 2.3).

    Args:
        weight: of any shape.
        axis: the axis with a scale an index.
        bias, input_scale: a channel of tiny weights and large bias gets a wider scale, so that its bias fits 32 bits
            at `input_scale` times the weight's scale.
        mean: mean input of each weight, of the weight's shape. Weights near a tie are then rounded so that the
            channel's mean output stays where it was, rather than each to the nearest.
    """
    top = 2 ** (bits - 1) - 1
    scales = weight_scales(weight, axis, bits=bits, bias=bias, input_scale=input_scale)
    exact = weight / scales.reshape(_along(axis, weight.ndim)).astype(np.float64)
    codes = np.clip(np.rint(exact), -top, top)
    if mean is not None:
        codes = _balanced(codes, exact, mean, axis, top)
    return Weight(codes.astype(np.int8), scales, axis)


def weight_scales(
    weight: np.ndarray, axis: int, *, bits: int = 8, bias: np.ndarray | None = None, input_scale: float = 0.0
) -> np.ndarray:
    """One positive scale per index of `axis`; arguments as those of `quantize_weight`."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float64)
    scales = np.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0)
    if bias is not None and input_scale > 0:
        scales = np.maximum(scales, np.abs(bias) / (input_scale * 2.0**30))
    return np.maximum(scales, np.finfo(np.float32).tiny).astype(np.float32)


def _balanced(codes: np.ndarray, exact: np.ndarray, mean: np.ndarray, axis: int, top: int) -> np.ndarray:
    """Round weights nearest to a tie the other way while that brings sum((code - weight) * mean) nearer to zero."""
    moved = np.moveaxis(codes, axis, 0)
    result = np.empty_like(moved)
    for start in range(0, len(moved), CHANNELS):  # some channels at a time: the copies below are many
        part = slice(start, start + CHANNELS)
        rows = (np.moveaxis(a, axis, 0)[part].reshape(len(moved[part]), -1) for a in (codes, exact, mean))
        result[part] = _balanced_rows(*rows, top).reshape(moved[part].shape)
    return np.moveaxis(result, 0, axis)


def _balanced_rows(codes: np.ndarray, u: np.ndarray, m: np.ndarray, top: int) -> np.ndarray:
    q = codes.copy()
    error = q - u
    other = np.clip(q + np.where(error > 0, -1.0, 1.0), -top, top)
    other = np.where(u == 0, q, other)  # zeros are exact, and may stand in a pattern that kernels skip
    change = (other - q) * m
    drift = (error * m).sum(axis=1)
    tried = max(1, min(TIES, q.shape[1] // 2))
    nearest = np.argpartition(-np.abs(error), tried - 1, axis=1)[:, :tried]
    order = np.take_along_axis(nearest, np.argsort(-np.abs(np.take_along_axis(error, nearest, 1)), axis=1), 1)
    rows = np.arange(len(q))
    for column in order.T:
        step = change[rows, column]
        better = np.abs(drift + step) < np.abs(drift)
        drift += np.where(better, step, 0.0)
        q[rows, column] = np.where(better, other[rows, column], q[rows, column])
    return q


def _along(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(-1 if i == axis else 1 for i in range(rank))
