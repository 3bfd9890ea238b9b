"""Rank from the weights alone: empirical variational Bayes matrix factorisation, in closed form.

    Y [L, M] = B A^T + noise of variance sigma^2,    B [L, H], A [M, H],    L <= M,    alpha = L / M

With Gaussian priors on B and A whose variances are estimated too, components whose evidence does not pay for them
vanish by themselves: the h-th stays when its singular value is above sqrt(M sigma^2 x_bar), with

    x_bar = (1 + tau_bar) (1 + alpha / tau_bar),    tau_bar = 2.5129 sqrt(alpha)

and sigma^2 minimises a function of one variable, `_free_energy`. No iteration over factors, no data, no parameter.

Source: Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14, 2013: the empirical solution, tau_bar by its approximation.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar

GRID = 512


def evb_rank(matrix: np.ndarray) -> tuple[int, float]:
    """The rank of a matrix under its noise.

    Args:
        matrix: of two dimensions; its transpose gives the same.

    Returns:
        rank: how many components stand out of the noise; 0 when all is noise.
        noise_variance: estimated, of one entry; 0 when the matrix is of low rank and nothing else.
    """
    short, long = sorted(matrix.shape)
    s = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    if not s[0]:
        return 0, 0.0
    s = s[s > 2 * s[0] * np.finfo(np.float32).eps]  # below, weights have nothing but rounding, which is not white
    energies = s**2 / long
    alpha = short / long
    tau_bar = 2.5129 * math.sqrt(alpha)
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)

    most = math.ceil(short / (1 + alpha)) - 1  # components that can stay
    if len(s) <= most:
        return len(s), 0.0  # the free energy falls without end as the noise vanishes
    low = max(energies[most] / x_bar, energies[most:].sum() / (short - most))
    high = energies.sum() / short
    noise = _least(energies, alpha, x_bar, short, low, high) if low < high else high
    return int(np.sum(energies > noise * x_bar)), float(noise)


def _least(energies: np.ndarray, alpha: float, x_bar: float, short: int, low: float, high: float) -> float:
    """The noise variance of least free energy: it may have several minima, so the best of a grid, refined."""

    def objective(log_noise: float) -> float:
        return _free_energy(energies, alpha, x_bar, short, math.exp(log_noise))

    grid = np.linspace(math.log(low), math.log(high), GRID)
    values = [objective(point) for point in grid]
    best = int(np.argmin(values))
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    found = minimize_scalar(objective, bounds=around, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x if found.fun < values[best] else grid[best])


def _free_energy(energies: np.ndarray, alpha: float, x_bar: float, short: int, noise: float) -> float:
    """Twice the free energy over M, up to a constant, for singular values squared over M (those that are not 0)."""
    x = energies / noise
    inside = x[x <= x_bar]
    x = x[x > x_bar]
    tau = (x - (1 + alpha) + np.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha)) / 2
    kept = x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)
    return float(np.sum(inside - np.log(inside)) + np.sum(kept) + (short - len(energies)) * math.log(noise))
