"""A positive quantity over orders of magnitude from few samples: a physical model, corrected by a Gaussian process.

    log t(x) = log(sum_j a_j terms_j(x)) + g(x),   a_j >= 0

The terms carry the trend to sizes that were never measured; the process (Rasmussen and Williams, Gaussian Processes
for Machine Learning, 2006, algorithm 2.1) learns what they leave, and says how sure it is where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize, nnls

ROOT3 = 3**0.5
# Prior of the process: lengths in standard deviations of a feature; deviations of the smooth part, of the linear
# part, and of noise, as shares.
LENGTH, SMOOTH, LINEAR, NOISE = 3.0, 0.3, 0.1, 0.03
LENGTHS, SHARES, SLOPES = (-1.5, 4.0), (-6.0, 0.7), (-6.0, -2.5)  # bounds of their logarithms
SURE = 0.1  # error of a measurement, as a share, up to which it is reliable
HUBER = 0.5
FEWEST = 8  # samples, below which the terms alone are fitted


@dataclass(frozen=True)
class Hyper:
    """What fitting found; with the samples it gives the whole model back.

    Attributes:
        terms: factor of each physical term.
        lengths: of each feature, in standard deviations; empty: no process.
        smooth, linear, noise: standard deviations of the parts of the correction.
    """

    terms: tuple[float, ...]
    lengths: tuple[float, ...] = ()
    smooth: float = 0.0
    linear: float = 0.0
    noise: float = 0.3


@dataclass(frozen=True)
class Model:
    """A fitted model.

    Attributes:
        features: [samples, d] of the samples.
        residuals: [samples] log measured - log of the physical model there.
        errors: [samples] standard deviation of each measurement, as a share.
        hyper: what fitting found.
    """

    features: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    hyper: Hyper

    def predict(self, terms: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected values and their relative standard deviations; terms [n, j], features [n, d]."""
        trend = np.log(np.maximum(terms @ np.asarray(self.hyper.terms), 1e-12))
        if not self.hyper.lengths:
            return np.exp(trend), np.full(len(trend), self.hyper.noise)
        hyper, (factor, weights, known, mean, scale, middle) = self.hyper, self._fitted
        z = (features - mean) / scale
        cross = _covariance(z, known, hyper)
        inner = solve_triangular(factor, cross.T, lower=True)
        own = hyper.smooth**2 + hyper.linear**2 * (1 + (z**2).sum(axis=1))
        variance = np.maximum(own - (inner**2).sum(axis=0), 0) + hyper.noise**2
        # Beyond what was measured the trend alone leads: a correction never exceeds those that were seen.
        correction = np.clip(middle + cross @ weights, *self._range)
        return np.exp(trend + correction), np.minimum(np.sqrt(variance), 1.0)

    @cached_property
    def _range(self) -> tuple[float, float]:
        """The corrections that reliable measurements asked for, without the most extreme."""
        reliable = self.errors <= max(SURE, float(np.median(self.errors)))
        low, high = np.quantile(self.residuals[reliable], (0.02, 0.98))
        return float(low), float(high)

    @cached_property
    def _fitted(self) -> tuple:
        mean, scale = _scaling(self.features)
        known = (self.features - mean) / scale
        noise = np.diag(self.hyper.noise**2 + self.errors**2)
        factor = np.linalg.cholesky(_covariance(known, known, self.hyper) + noise)
        middle = float(np.median(self.residuals))
        return factor, cho_solve((factor, True), self.residuals - middle), known, mean, scale, middle


def fit(terms: np.ndarray, features: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Hyper:
    """Fit to samples.

    Args:
        terms: [n, j] physical terms, not negative.
        features: [n, d] what the correction depends on.
        values: [n] measured, positive.
        errors: [n] standard deviation of each measurement, as a share of it.
    """
    factors = _fit_terms(terms, values, errors)
    residuals = np.log(values) - np.log(terms @ factors)
    if len(values) < FEWEST:
        spread = float(np.sqrt(np.mean(residuals**2))) if len(values) > 1 else 0.5
        return Hyper(tuple(factors), noise=max(spread, 0.2))
    return _fit_process(tuple(factors), features, residuals - np.median(residuals), errors)


def model_of(hyper: Hyper, terms: np.ndarray, features: np.ndarray, values: np.ndarray, errors: np.ndarray) -> Model:
    """The model that `fit` found these parameters for."""
    residuals = np.log(values) - np.log(np.maximum(terms @ np.asarray(hyper.terms), 1e-12))
    return Model(features, residuals, errors, hyper)


def _fit_terms(terms: np.ndarray, values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Factors that bring the logarithms closest, robustly (Huber), from the least squares of relative errors."""
    used = (terms > 0).any(axis=0)
    scale = np.where(used, terms.mean(axis=0), 1.0)
    scaled, weights, target = terms / scale, 1 / (1 + (errors / 0.1) ** 2), np.log(values)
    root = np.sqrt(weights)
    start, _ = nnls(scaled * (root / values)[:, None], root)
    start = np.maximum(start, 1e-6 * values.mean())

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        factors = np.exp(np.clip(logs, -60, 60)) * used
        made = scaled @ factors
        off = np.log(made) - target
        inside = np.abs(off) < HUBER
        each = np.where(inside, off**2 / 2, HUBER * (np.abs(off) - HUBER / 2))
        slope = np.where(inside, off, HUBER * np.sign(off))
        return float(weights @ each), ((weights * slope / made) @ scaled) * factors

    found = minimize(loss, np.log(start), jac=True, method="L-BFGS-B", options={"maxiter": 300})
    factors = np.exp(np.clip(found.x, -60, 60)) * used
    # What contributes nothing anywhere is left out.
    factors[(scaled * factors).max(axis=0) < 1e-5 * values.min()] = 0.0
    return factors / scale


def _fit_process(factors: tuple[float, ...], features: np.ndarray, residuals: np.ndarray, errors: np.ndarray) -> Hyper:
    """The most probable lengths and deviations (marginal likelihood with log-normal priors)."""
    mean, scale = _scaling(features)
    z = (features - mean) / scale
    n, d = z.shape
    apart = [(z[:, j, None] - z[None, :, j]) ** 2 for j in range(d)]
    inner, diagonal = z @ z.T + 1, errors**2
    middle = np.log([*[LENGTH] * d, SMOOTH, LINEAR, NOISE])

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        lengths, (smooth, linear, noise) = np.exp(logs[:d]), np.exp(2 * logs[d:])
        far = np.sqrt(sum((a / length**2 for a, length in zip(apart, lengths, strict=True)), np.full((n, n), 1e-12)))
        decay = np.exp(-ROOT3 * far)
        matern = smooth * (1 + ROOT3 * far) * decay
        try:
            factor = cho_factor(matern + linear * inner + np.diag(noise + diagonal), lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(logs)
        weights = cho_solve(factor, residuals)
        pull = np.outer(weights, weights) - cho_solve(factor, np.eye(n))
        value = residuals @ weights / 2 + np.log(np.diag(factor[0])).sum()
        slope, shared = np.empty_like(logs), pull * (3 * smooth * decay)
        for j in range(d):
            slope[j] = -np.sum(shared * apart[j]) / (2 * lengths[j] ** 2)
        slope[d:] = -np.sum(pull * matern), -np.sum(pull * linear * inner), -np.trace(pull) * noise
        return float(value + ((logs - middle) ** 2).sum() / 2), slope + (logs - middle)

    bounds = [LENGTHS] * d + [SHARES, SLOPES, SHARES]
    start = np.clip(middle, *np.transpose(bounds))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
    lengths, shares = np.exp(found.x[:d]), np.exp(found.x[d:])
    return Hyper(factors, tuple(map(float, lengths)), *map(float, shares))


def _scaling(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    spread = features.std(axis=0)
    return features.mean(axis=0), np.where(spread > 1e-9, spread, 1.0)


def _covariance(a: np.ndarray, b: np.ndarray, hyper: Hyper) -> np.ndarray:
    lengths: Sequence[float] = hyper.lengths
    scaled, other = a / lengths, b / lengths
    apart = np.maximum((scaled**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * scaled @ other.T, 0)
    far = ROOT3 * np.sqrt(apart + 1e-12)
    return hyper.smooth**2 * (1 + far) * np.exp(-far) + hyper.linear**2 * (a @ b.T + 1)
