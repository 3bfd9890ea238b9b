"""Rounding whose errors the columns behind make up for (Frantar et al., "GPTQ", 2023, algorithm 1).

    min_Q E |W x - Q x|^2,  Q on a grid;  H = E x x^T, a ridge added

Columns are rounded one after another, those of the largest inputs first, and each time the columns that are still
free move by -(w_q - Q_q) / [H^-1]_qq H^-1_q:. The grid is that of the matrix as it was, so any order will do.
"""

from __future__ import annotations

import numpy as np

from effc.block_codes import BlockCodes, Grid

from ._compensation import feed_back


def gptq(weight: np.ndarray, metric: np.ndarray, grid: Grid) -> BlockCodes:
    """Codes of a matrix.

    Args:
        weight: [N, K].
        metric: [K, K] H, positive definite.
    """
    order = np.argsort(-metric.diagonal(), kind="stable")
    scales, zeros = (each.astype(np.float64)[:, order] for each in grid.of_columns(weight.shape[1]))
    codes = np.empty(weight.shape, np.uint8)
    top = 2**grid.bits - 1

    def settle(values: np.ndarray, column: int) -> np.ndarray:
        s, z = scales[:, column], zeros[:, column]
        q = np.clip(np.rint(values / s) + z, 0, top)
        codes[:, order[column]] = q
        return (q - z) * s

    feed_back(weight[:, order].astype(np.float64), metric[np.ix_(order, order)], settle)
    return BlockCodes(codes, grid)
