"""Which groups (c, i, j) of a convolution's patch to keep, and what is lost without the others.

    E(S) = min_W' tr (W - W') H (W - W')^T,   columns of W' outside of S zero
         = tr W_R (H_RR - H_RS H_SS^-1 H_SR) W_R^T,   R all others

H is the covariance of patches: what the groups that stay can make up for is not lost. `reconstruction` removes groups
one after another by the exact rise of E (`_elimination`); the other saliencies rank them once: `l1` by sum |w|, `obd`
by sum h w^2 / 2 over all filters (LeCun, Denker and Solla, "Optimal brain damage", 1990, equation 6), `random`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from ._elimination import Reader, eliminate, felt
from ._factors import Layer

Saliency = Literal["reconstruction", "l1", "obd", "random"]
AT_ONCE = 1 / 16  # of the groups left, that go together
OFFSETS = 2304  # numbers of a patch up to which a window is tried at every place of the kernel


class Groups:
    """Groups of columns of one layer, and what is lost without some of them.

    Args:
        layer: as it is.
        matrix: [N, D] its weights, or what regression makes of them.
        metric: [D, D] covariance of patches with a ridge, or None.
        ridge: that is in it; groups whose inputs never change are free.
    """

    def __init__(self, layer: Layer, matrix: np.ndarray, metric: np.ndarray | None, ridge: float = 0.0) -> None:
        matrix = matrix if metric is None else felt(matrix, metric, ridge)
        self.layer, self.matrix, self.metric = layer, matrix, metric
        self.cross = matrix if metric is None else matrix @ metric
        self.power = max(float(np.einsum("nd,nd->", self.cross, matrix)), 1e-300)

    def lost(self, kept: np.ndarray) -> float:
        """E(S) as a share of the layer's power: tr W H W^T - tr (W H)_S H_SS^-1 (W H)_S^T."""
        part = self.cross[:, kept]
        told = part if self.metric is None else cho_solve(cho_factor(self.metric[np.ix_(kept, kept)]), part.T).T
        return float(min(max(1 - np.einsum("nd,nd->", told, part) / self.power, 0.0), 1.0))

    def order(
        self, kind: str, groups: Sequence[np.ndarray], least: int, curvature: np.ndarray | None, seed: Sequence[int]
    ) -> np.ndarray:
        """The order in which groups go, the first first, until `least` are left.

        Args:
            groups: of each, its columns.
            curvature: [D] sum of h w^2 / 2 over filters, for `obd`.
        """
        count = len(groups)
        if kind == "reconstruction":
            weights = np.ones(self.matrix.shape[1]) if self.metric is None else self.metric
            return eliminate([Reader(self.matrix, weights, groups)], count, least, AT_ONCE)[0]
        if kind == "random":
            return np.random.default_rng(seed).permutation(count)[: count - least]
        each = np.abs(self.layer.matrix).sum(axis=0) if kind == "l1" else curvature
        return np.argsort([each[group].sum() for group in groups], kind="stable")[: count - least]


def kept_of(order: np.ndarray, groups: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Columns that are left when `count` groups are, ascending."""
    stays = np.setdiff1d(np.arange(len(groups)), order[: len(groups) - count])
    return np.sort(np.concatenate([groups[g] for g in stays]))


def windows(layer: Layer) -> Iterator[list[Mapping[str, int]]]:
    """For each smaller size of the kernel, the places where it may be; wide layers have the middle alone."""
    full = layer.kernel
    wide = layer.matrix.shape[1] > OFFSETS
    for height in range(1, full[0] + 1):
        for width in range(1, full[1] + 1):
            if (height, width) == full:
                continue
            tops, lefts = range(full[0] - height + 1), range(full[1] - width + 1)
            places = [((len(tops) - 1) // 2, (len(lefts) - 1) // 2)] if wide else [(t, s) for t in tops for s in lefts]
            yield [{"top": t, "left": s, "height": height, "width": width} for t, s in places]
