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

from ._factors import Factors, Layer, Method, Setting, features

RIDGE = 3e-3  # of the mean variance of inputs: so far the weights are held to what they were
WEIGHTS, ROUNDS = (0.01, 1.0), 12  # of the distance to z, one after the other; so many turns each
TINY = 1e-6


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a layer, at sampled output positions.

    Attributes:
        patches: [S, C kh kw] that the layer meets.
        wanted: [S, N] what should stand before the activation.
        added: [S, N] what is added to the layer's output before the activation, or None.
        low, high: bounds of the activation; infinite where there is none.
    """

    patches: np.ndarray
    wanted: np.ndarray
    added: np.ndarray | None = None
    low: float = -np.inf
    high: float = np.inf

    @property
    def activated(self) -> bool:
        return np.isfinite(self.low) or np.isfinite(self.high)

    @cached_property
    def target(self) -> np.ndarray:
        """[S, N] what the layer itself should make."""
        return self.wanted if self.added is None else self.wanted - self.added

    @cached_property
    def mean(self) -> np.ndarray:
        return self.patches.mean(axis=0, dtype=np.float64)

    @cached_property
    def covariance(self) -> np.ndarray:
        """[D, D] of the patches, about their mean."""
        return spread(self.patches)


def spread(rows: np.ndarray) -> np.ndarray:
    """Covariance [D, D] of rows [S, D]."""
    off = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    return (off.T @ off).astype(np.float64) / len(off)


def reconstruct(
    layer: Layer, kind: type[Method], setting: Setting, seen: Seen, *, nonlinear: bool = True, seed: int = 0
) -> tuple[Factors, np.ndarray]:
    """The chain and the bias [N] of its last factor that come closest to what is wanted.

    Args:
        layer: as it was; where data say little, its weights are kept to.
        nonlinear: look through the activation, where there is one.
    """
    ridge = RIDGE * np.trace(seen.covariance) / len(seen.covariance) + 1e-30
    metric = seen.covariance + ridge * np.eye(len(seen.covariance))
    full = _regression(layer, seen, metric, ridge)
    aim = replace(layer, weight=full.reshape(layer.weight.shape))
    factors = kind(aim, metric, seed).fit(setting)
    target = seen.target
    if nonlinear and seen.activated:
        factors, target = _through_activation(aim, kind, setting, factors, seen, metric)
    matrix = _matrix(factors)
    bias = target.mean(axis=0, dtype=np.float64) - matrix @ seen.mean
    return factors, bias


def _matrix(factors: Factors) -> np.ndarray:
    last = factors[-1].weight
    return last.reshape(len(last), -1) @ features(factors)


def _regression(layer: Layer, seen: Seen, metric: np.ndarray, ridge: float) -> np.ndarray:
    """The matrix [N, D] that predicts the target best, held to the weights by the ridge."""
    off = seen.patches - seen.mean.astype(np.float32)
    target = seen.target - seen.target.mean(axis=0)
    cross = (target.T @ off).astype(np.float64) / len(off)
    return cho_solve(cho_factor(metric), (cross + ridge * layer.matrix).T).T


def _through_activation(
    aim: Layer, kind: type[Method], setting: Setting, factors: Factors, seen: Seen, metric: np.ndarray
) -> tuple[Factors, np.ndarray]:
    """Turns of z and of the last factor; z [S, N] replaces the target."""
    off = seen.patches - seen.mean.astype(np.float32)
    inner = features(factors)
    seen_inside = off @ inner.T.astype(np.float32)  # [S, q], what the last factor sees
    spread = inner @ metric @ inner.T
    spread += 1e-9 * np.trace(spread) / len(spread) * np.eye(len(spread))
    solve = cho_factor(spread)
    last = factors[-1].weight.reshape(len(factors[-1].weight), -1)
    bias = seen.target.mean(axis=0)
    cut = np.clip(seen.wanted, seen.low, seen.high)
    z = seen.target
    for weight in WEIGHTS:
        for _ in range(ROUNDS):
            made = seen_inside @ last.T.astype(np.float32) + bias
            z = _auxiliary(made if seen.added is None else made + seen.added, cut, weight, seen.low, seen.high)
            z = z if seen.added is None else z - seen.added
            bias = z.mean(axis=0)
            cross = ((z - bias).T @ seen_inside).astype(np.float64) / len(z)
            last = cho_solve(solve, cross.T).T
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
