"""Factors that let a layer make what it made in the original, from what it sees now (Zhang et al., TPAMI 2016).

    min_W' E |r(y) - r(W' x' + b)|^2,    W' a chain of factors

y is what the original layer makes, x' what this layer gets behind layers that are approximations already, r the
activation that follows (asymmetric, non-linear). Without r this is a regression of y on x': of all W', the full A
comes closest, and a chain loses |(A - W')S^(1/2)|^2 on top, S the covariance of x'. So each method factorises A instead
of W, and needs to know nothing of the original. With r, an auxiliary z that r maps close to r(y) takes the place of y,
and z and the last factor are found in turns.

Where a shortcut is added behind the layer, r acts on the sum, and the shortcut's own drift is made up for as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from ._factors import Factor, Factors, Layer, Method, Setting, features

WIDEST = 8192  # numbers of a patch whose covariance is held in memory
RIDGE, MOST = 3e-3, 0.9  # of the mean variance of inputs, at least: so far weights are held to what they were
WEIGHTS, ROUNDS = (0.01, 1.0), 6  # of the distance to z, one after the other; so many turns each


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a layer, at sampled output positions.

    Attributes:
        patches: [S, C kh kw] that the layer meets.
        wanted: [S, N] what should stand before the activation.
        added: [S, N] what is added to the layer's output before the activation, or None.
        low, high: bounds of the activation; infinite where there is none.
        biased: the layer has a bias, which makes up for means.
    """

    patches: np.ndarray
    wanted: np.ndarray
    added: np.ndarray | None = None
    low: float = -np.inf
    high: float = np.inf
    biased: bool = True

    @property
    def activated(self) -> bool:
        return np.isfinite(self.low) or np.isfinite(self.high)

    @cached_property
    def target(self) -> np.ndarray:
        """[S, N] what the layer itself should make."""
        return self.wanted if self.added is None else self.wanted - self.added

    @cached_property
    def mean(self) -> np.ndarray:
        """[C kh kw] of the patches, as far as a bias makes up for it."""
        mean = self.patches.mean(axis=0, dtype=np.float64)
        return mean if self.biased else np.zeros_like(mean)

    @cached_property
    def moments(self) -> tuple[np.ndarray, float]:
        """`metric` of the patches about their mean."""
        return metric(self.patches, self.mean)


def metric(rows: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, float]:
    """Covariance [D, D] of rows [S, D] about a mean [D], a ridge added, and the ridge.

    The ridge is what brings it closest to the covariance that more and more rows would show (Ledoit and Wolf, "A
    well-conditioned estimator for large-dimensional covariance matrices", 2004, lemma 3.2 to 3.4), `RIDGE` at least.
    """
    off = rows - mean.astype(np.float32)
    found = (off.T @ off).astype(np.float64) / len(off)
    level = np.trace(found) / len(found)
    power = np.sum(found**2)
    distance = power - len(found) * level**2
    lengths = np.einsum("sd,sd->s", off, off, dtype=np.float64)
    noise = (np.mean(lengths**2) - power) / len(off)
    share = min(max(noise, 0.0) / max(distance, 1e-300), MOST)
    ridge = max(RIDGE, share / (1 - share)) * level + 1e-30
    found.flat[:: len(found) + 1] += ridge
    return found, float(ridge)


def reconstruct(
    layer: Layer, kind: type[Method], setting: Setting, seen: Seen, *, nonlinear: bool = True, seed: int = 0
) -> tuple[Factors, np.ndarray]:
    """The chain and the bias [N] of its last factor that come closest to what is wanted.

    Args:
        layer: as it was; where data say little, its weights are kept to.
        nonlinear: look through the activation, where there is one.

    Of patches of more than `WIDEST` numbers only the mean is known, and weights are fitted to weights.
    """
    if seen.patches.shape[1] > WIDEST:
        factors = kind(layer, None, seed).fit(setting)
        return factors, seen.target.mean(axis=0, dtype=np.float64) * seen.biased - _matrix(factors) @ seen.mean
    spread, ridge = seen.moments
    full = regression(layer, seen)
    aim = replace(layer, weight=full.reshape(layer.weight.shape))
    factors = kind(aim, spread, seed).fit(setting)
    target = seen.target
    if nonlinear and seen.activated:
        factors, target = _through_activation(factors, seen, spread, ridge)
    matrix = _matrix(factors)
    return factors, target.mean(axis=0, dtype=np.float64) * seen.biased - matrix @ seen.mean


def refit(
    layer: Layer, seen: Seen, kept: np.ndarray | None = None, *, nonlinear: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The layer's own matrix [N, K] and bias [N] that come closest to what is wanted, from some numbers of the patch.

    Args:
        kept: [K] which numbers of the patch, in the order (c, i, j); None: all.

    Of patches of more than `WIDEST` numbers only the mean is known: weights stay, and the bias makes up for it.
    """
    kept = np.arange(seen.patches.shape[1]) if kept is None else kept
    if seen.patches.shape[1] > WIDEST:
        matrix, target = layer.matrix[:, kept], seen.target
    else:
        spread, ridge = seen.moments
        inside = spread[np.ix_(kept, kept)]
        matrix = regression(layer, seen)
        if len(kept) < len(spread):  # of what the best makes, the part that the kept numbers tell
            matrix = cho_solve(cho_factor(inside), spread[kept] @ matrix.T).T
        target = seen.target
        if nonlinear and seen.activated:
            factors = (Factor(matrix[:, :, None, None]),)
            fewer = seen if len(kept) == len(spread) else replace(seen, patches=seen.patches[:, kept])
            factors, target = _through_activation(factors, fewer, inside, ridge)
            matrix = _matrix(factors)
    return matrix, target.mean(axis=0, dtype=np.float64) * seen.biased - matrix @ seen.mean[kept]


def _matrix(factors: Factors) -> np.ndarray:
    last = factors[-1].weight.reshape(len(factors[-1].weight), -1)
    return last if len(factors) == 1 else last @ features(factors)


def regression(layer: Layer, seen: Seen) -> np.ndarray:
    """The matrix [N, D] that predicts the target best, held to the weights by the ridge."""
    spread, ridge = seen.moments
    off = seen.patches - seen.mean.astype(np.float32)
    target = seen.target - seen.target.mean(axis=0) * seen.biased
    cross = (target.T @ off).astype(np.float64) / len(off)
    return cho_solve(cho_factor(spread), (cross + ridge * layer.matrix).T).T


def _through_activation(factors: Factors, seen: Seen, spread: np.ndarray, ridge: float) -> tuple[Factors, np.ndarray]:
    """Turns of z and of the last factor, which the ridge holds to what it was; z [S, N] replaces the target."""
    off = seen.patches - seen.mean.astype(np.float32)
    inner = features(factors) if len(factors) > 1 else None  # None: the patch itself
    seen_inside = off if inner is None else off @ inner.T.astype(np.float32)  # [S, q], what the last factor sees
    gram = spread.copy() if inner is None else inner @ spread @ inner.T
    gram.flat[:: len(gram) + 1] += 1e-9 * np.trace(gram) / len(gram)
    inverse = np.linalg.inv(gram)
    last = factors[-1].weight.reshape(len(factors[-1].weight), -1)
    held = ridge * (last if inner is None else last @ (inner @ inner.T))
    bias = seen.target.mean(axis=0) * seen.biased
    cut = np.clip(seen.wanted, seen.low, seen.high)
    z = seen.target
    for weight in WEIGHTS:
        for _ in range(ROUNDS):
            made = seen_inside @ last.T.astype(np.float32) + bias
            z = _auxiliary(made if seen.added is None else made + seen.added, cut, weight, seen.low, seen.high)
            z = z if seen.added is None else z - seen.added
            bias = z.mean(axis=0) * seen.biased
            cross = ((z - bias).T @ seen_inside).astype(np.float64) / len(z)
            last = (cross + held) @ inverse
    weight = last.reshape(factors[-1].weight.shape)
    return (*factors[:-1], replace(factors[-1], weight=weight)), z


def _auxiliary(made: np.ndarray, wanted: np.ndarray, weight: float, low: float, high: float) -> np.ndarray:
    """z that minimises (wanted - r(z))^2 + weight (z - made)^2, number by number; r cuts off at low and high."""
    between = np.clip((weight * made + wanted) / (weight + 1), low, high)
    best, least = between, (wanted - between) ** 2 + weight * (between - made) ** 2
    for end, cut in ((low, np.minimum), (high, np.maximum)):
        if np.isfinite(end):
            beyond = cut(made, np.float32(end))
            cost = (wanted - np.float32(end)) ** 2 + weight * (beyond - made) ** 2
            best, least = np.where(cost < least, beyond, best), np.minimum(cost, least)
    return best
