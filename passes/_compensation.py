"""Weights that stay make up for those that go: least squares on what a layer meets.

    min_W' E |W x - W' x|^2,  W' zero where it is pruned;  H = E x x^T, a ridge added

For a mask that is given each row has its own solution, w'_S = H_SS^-1 H_S w. Where all of them take too long, columns
go one after another and those behind make up for each: w -= w_q / [H^-1]_qq H^-1_q: (Hassibi and Stork, "Second order
derivatives for network pruning: optimal brain surgeon", 1993, equation 5; Frantar and Alistarh, "Optimal brain
compression", 2022, section 4), with one factor of H^-1 for all rows ("SparseGPT", 2023, section 3.2). On that way masks
can be chosen as well: lowest w_q^2 / [H^-1]_qq first, block by block.
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
    made, kept = weight.copy(), np.ones(weight.shape, bool)
    inverse = cho_solve(cho_factor(metric, lower=True, check_finite=False), np.eye(len(metric)), check_finite=False)
    upper = cholesky(inverse, lower=False, check_finite=False)
    for begin in range(0, weight.shape[1], BLOCK):
        block = slice(begin, min(begin + BLOCK, weight.shape[1]))
        kept[:, block] = choose((made[:, block] / upper.diagonal()[block]) ** 2, block)
        errors = np.zeros((len(weight), block.stop - begin))
        for column in range(begin, block.stop):
            off = np.where(kept[:, column], 0.0, made[:, column]) / upper[column, column]
            made[:, column : block.stop] -= np.outer(off, upper[column, column : block.stop])
            errors[:, column - begin] = off
        made[:, block.stop :] -= errors @ upper[block, block.stop :]
    return np.where(kept, made, 0.0), kept


def lost(weight: np.ndarray, made: np.ndarray, metric: np.ndarray) -> float:
    """E |W x - W' x|^2 over E |W x|^2."""
    off = weight - made
    return float(np.sum((off @ metric) * off) / max(np.sum((weight @ metric) * weight), 1e-300))
