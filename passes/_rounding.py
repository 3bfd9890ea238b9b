"""Which way weights are rounded: by what the layer's output loses, not by each weight's own error.

    min_q (q - u) H (q - u)^T,   q integers,   u = w / scale,   H = E x x^T of what the layer meets

Columns are rounded one after another while those behind make up for each (Frantar and Alistarh, "Optimal brain
compression", NeurIPS 2022, section 5; with one factor of H^-1 for all rows, Frantar et al., "GPTQ", ICLR 2023, section
3), then single codes move by one as long as that lowers the sum. The objective is that of Nagel et al., "Up or down?
Adaptive rounding for post-training quantization", ICML 2020, equation 20, per output.
"""

from __future__ import annotations

import numpy as np

from ._compensation import feed_back

MOVES = 512  # single codes of a row, at most


def round_to_outputs(exact: np.ndarray, metric: np.ndarray, top: int) -> np.ndarray:
    """Codes of least output error found; never above that of rounding each weight to the nearest.

    Args:
        exact: [..., N, D] weights over their scales.
        metric: [..., D, D] H, positive definite; leading axes as those of `exact` (groups of a convolution).
        top: codes lie in [-top, top].
    """
    nearest = np.clip(np.rint(exact), -top, top)
    order = np.argsort(-np.diagonal(metric, axis1=-2, axis2=-1), axis=-1, kind="stable")  # what counts most goes first
    back = np.argsort(order, axis=-1)
    turned = np.take_along_axis(exact, order[..., None, :], -1)
    sorted_metric = np.take_along_axis(np.take_along_axis(metric, order[..., None, :], -1), order[..., :, None], -2)
    fed = feed_back(turned, sorted_metric, lambda values, column: np.clip(np.rint(values), -top, top))
    fed = np.take_along_axis(fed, back[..., None, :], -1)
    better = lost(exact, fed, metric) < lost(exact, nearest, metric)
    return _moved(np.where(better[..., None], fed, nearest), exact, metric, top)


def lost(exact: np.ndarray, codes: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """[..., N] (q - u) H (q - u)^T."""
    off = codes - exact
    return ((off @ metric) * off).sum(axis=-1)


def _moved(codes: np.ndarray, exact: np.ndarray, metric: np.ndarray, top: int) -> np.ndarray:
    """Codes after moves by one, in each row the one that gains most first."""
    shape, size = codes.shape, codes.shape[-1]
    slope = ((codes - exact) @ metric).reshape(-1, size)
    codes = codes.reshape(-1, size).copy()
    groups = np.repeat(np.arange(len(codes) // shape[-2]), shape[-2])
    metric = metric.reshape(-1, size, size)
    curve = np.diagonal(metric, axis1=-2, axis2=-1)
    rows = np.arange(len(codes))
    for _ in range(MOVES):
        step = -np.sign(slope[rows])
        change = curve[groups[rows]] - 2 * np.abs(slope[rows])
        change[np.abs(codes[rows] + step) > top] = 0.0
        at = change.argmin(axis=1)
        every = np.arange(len(rows))
        gains = change[every, at] < -1e-9 * curve[groups[rows], at]
        if not gains.any():
            break
        rows, at, step = rows[gains], at[gains], step[every, at][gains]
        codes[rows, at] += step
        slope[rows] += step[:, None] * metric[groups[rows], at]
    return codes.reshape(shape)
