"""Weights that stay make up for those that go: least squares on what a layer meets.

    min_W' E |W x - W' x|^2,  W' zero where it is pruned;  H = E x x^T, a ridge added

For a mask that is given each row has its own solution, w'_S = H_SS^-1 H_S w. Where all of them take too long, columns
go one after another and those behind make up for each: w -= w_q / [H^-1]_qq H^-1_q: (Hassibi and Stork, "Second order
derivatives for network pruning: optimal brain surgeon", 1993, equation 5; Frantar and Alistarh, "Optimal brain
compression", 2022, section 4), with one factor of H^-1 for all rows ("SparseGPT", 2023, section 3.2). On that way masks
can be chosen as well: lowest w_q^2 / [H^-1]_qq first, block by block; or weights are rounded (`_gptq`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky

BLOCK = 128  # columns
EXACT = 2e11  # multiply-accumulates that the rows' own solutions may take

Choose = Callable[[np.ndarray, slice], np.ndarray]


def compensate(weight: np.ndarray, kept: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """W' of a mask.

    Args:
        weight: [N, D].
        kept: [N, D] booleans.
        metric: [D, D] H, positive definite.
    """
    left = kept.sum(axis=1, dtype=np.float64)
    if np.sum(left**3) / 3 > EXACT:
        return in_turn(weight, metric, lambda _, columns: kept[:, columns])[0]
    made = np.zeros_like(weight)
    wanted = weight @ metric
    for row, mask in enumerate(kept):
        if mask.any():
            factor = cho_factor(metric[np.ix_(mask, mask)], lower=True, check_finite=False)
            made[row, mask] = cho_solve(factor, wanted[row, mask], check_finite=False)
    return made


def in_turn(weight: np.ndarray, metric: np.ndarray, choose: Choose) -> tuple[np.ndarray, np.ndarray]:
    """W' and its mask, columns from first to last.

    Args:
        choose: (w^2 / [H^-1]_qq of a block of columns as they are by then, which columns) -> those to keep.
    """
    kept = np.ones(weight.shape, bool)

    def enter(values: np.ndarray, spread: np.ndarray, block: slice) -> None:
        kept[:, block] = choose((values / spread) ** 2, block)

    made = feed_back(weight, metric, lambda values, column: np.where(kept[:, column], values, 0.0), enter)
    return np.where(kept, made, 0.0), kept


def feed_back(
    weight: np.ndarray,
    metric: np.ndarray,
    settle: Callable[[np.ndarray, int], np.ndarray],
    enter: Callable[[np.ndarray, np.ndarray, slice], None] | None = None,
) -> np.ndarray:
    """Settle columns from first to last; those that have not been make up for what each loses.

    Args:
        weight: [..., N, D].
        metric: [..., D, D] H, positive definite.
        settle: (a column as it is by then [..., N], its number) -> what becomes of it.
        enter: told of each block of columns before: (values, diagonal of the factor of H^-1, which columns).
    """
    made = weight.copy()
    upper = inverse_factor(metric)
    diagonal = np.diagonal(upper, axis1=-2, axis2=-1)
    for begin in range(0, weight.shape[-1], BLOCK):
        block = slice(begin, min(begin + BLOCK, weight.shape[-1]))
        if enter is not None:
            enter(made[..., block], diagonal[..., block], block)
        errors = np.zeros((*weight.shape[:-1], block.stop - begin))
        for column in range(begin, block.stop):
            held = settle(made[..., column], column)
            off = (made[..., column] - held) / diagonal[..., column, None]
            made[..., column : block.stop] -= off[..., None] * upper[..., None, column, column : block.stop]
            made[..., column] = held
            errors[..., column - begin] = off
        made[..., block.stop :] -= errors @ upper[..., block, block.stop :]
    return made


def inverse_factor(metric: np.ndarray) -> np.ndarray:
    """U of H^-1 = U^T U."""
    if metric.ndim > 2:
        return np.linalg.cholesky(np.linalg.inv(metric)).swapaxes(-1, -2)
    inverse = cho_solve(cho_factor(metric, lower=True, check_finite=False), np.eye(len(metric)), check_finite=False)
    return cholesky(inverse, lower=False, check_finite=False)


def lost(weight: np.ndarray, made: np.ndarray, metric: np.ndarray) -> float:
    """E |W x - W' x|^2 over E |W x|^2."""
    off = weight - made
    return float(np.sum((off @ metric) * off) / max(np.sum((weight @ metric) * weight), 1e-300))
