"""Conv(k x k, C -> N)  ->  Conv(k x k, C -> d) . Conv(1 x 1, d -> N): fewer filters, and how outputs mix them.

Zhang, Zou, He, Sun, "Accelerating very deep convolutional networks" (TPAMI 2016, section 3.1): the outputs of a layer
lie near a subspace of d dimensions. W = P Q of rank d that comes closest under the covariance S of the patches: with U
the d leading eigenvectors of W S W^T, P = U and Q = U^T W (for a dense layer, and without S, the truncated SVD of
Denton et al. 2014). `Filters3d` (section 3.4) then splits the k x k factor into k x 1 and 1 x k as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
from scipy import linalg

from ._factors import Factor, Factors, Layer, Method, Setting, blank, macs, spread
from ._separable import Separable

RANKS = 16  # to choose from
WIDE = 2048  # outputs, above which decompositions are made in single precision, and only as far as they are needed


class Filters(Method):
    """d filters of the layer's own kernel, then 1 x 1; setting `rank` d. Also for 1 x 1 kernels and dense layers."""

    name: ClassVar[str] = "filters"

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        most = min(self.layer.outputs, self.layer.matrix.shape[1])
        unit = macs(self.skeleton({"rank": 1}))
        return ({"rank": rank} for rank in spread(unit, self.layer, most, step, RANKS))

    def skeleton(self, setting: Setting) -> Factors:
        n, c, d = self.layer.outputs, self.layer.inputs, setting["rank"]
        return self.layer.whole(blank(d, c, *self.layer.kernel)), Factor(blank(n, d, 1, 1))

    def fit(self, setting: Setting) -> Factors:
        d = setting["rank"]
        basis = self._leading(d)
        inner = (basis.T @ self.layer.matrix).reshape(d, self.layer.inputs, *self.layer.kernel)
        return self.layer.whole(inner), Factor(basis[:, :, None, None])

    def errors(self, settings: Sequence[Setting]) -> list[float]:
        """Exact: the share of the power that lies in directions that are left out."""
        left_out = np.append(np.cumsum(self._powers[::-1])[::-1], 0.0)
        return [float(max(left_out[s["rank"]], 0.0) / max(left_out[0], 1e-300)) for s in settings]

    def _leading(self, d: int) -> np.ndarray:
        """The directions [N, d] along which outputs have most power, most first."""
        n = self.layer.outputs
        if not d:
            return np.zeros((n, 0))
        if n <= WIDE:
            return self._directions[1][:, :d]
        return linalg.eigh(self._power, subset_by_index=(n - d, n - 1), check_finite=False)[1][:, ::-1]

    @cached_property
    def _powers(self) -> np.ndarray:
        """Power [N] of the outputs along all directions, most first."""
        if self.layer.outputs <= WIDE:
            return self._directions[0]
        return linalg.eigh(self._power, eigvals_only=True, check_finite=False)[::-1]

    @cached_property
    def _directions(self) -> tuple[np.ndarray, np.ndarray]:
        powers, directions = np.linalg.eigh(self._power)
        return powers[::-1], directions[:, ::-1]

    @cached_property
    def _power(self) -> np.ndarray:
        """W S W^T, [N, N]."""
        matrix, covariance = self.layer.matrix, self.covariance
        if self.layer.outputs > WIDE:
            matrix = matrix.astype(np.float32)
            covariance = None if covariance is None else covariance.astype(np.float32)
        power = matrix @ matrix.T if covariance is None else matrix @ covariance @ matrix.T
        return (power + power.T) / 2


class Filters3d(Method):
    """k x 1, 1 x k to d filters, 1 x 1; settings `rank` d and `inner` K, the channels between the first two."""

    name: ClassVar[str] = "filters-3d"

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        return Separable.refusal(layer)

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        """Both cuts take the same share of their layer's work."""
        own = macs([self.layer.whole(self.layer.weight)])
        found = {}
        for setting in self._filters.settings(step):
            d = setting["rank"]
            whole = macs([self.layer.whole(blank(d, self.layer.inputs, *self.layer.kernel))])
            for split in self._separable(d, blanks=True).settings(step):
                both = {"rank": d, "inner": split["rank"]}
                share = macs(self._separable(d, blanks=True).skeleton(split)) / whole
                off = abs(share - macs(self._filters.skeleton(setting)) / own)
                if macs(self.skeleton(both)) < own and (d not in found or off < found[d][0]):
                    found[d] = off, both
        yield from sorted((both for _, both in found.values()), key=lambda s: macs(self.skeleton(s)))

    def skeleton(self, setting: Setting) -> Factors:
        first = self._separable(setting["rank"], blanks=True).skeleton({"rank": setting["inner"]})
        return *first, Factor(blank(self.layer.outputs, setting["rank"], 1, 1))

    def fit(self, setting: Setting) -> Factors:
        first = self._separable(setting["rank"]).fit({"rank": setting["inner"]})
        return *first, self._filters.fit({"rank": setting["rank"]})[1]

    @cached_property
    def _filters(self) -> Filters:
        return Filters(self.layer, self.covariance, self.seed)

    def _separable(self, d: int, *, blanks: bool = False) -> Separable:
        """The splitting of the d filters."""
        shape = d, self.layer.inputs, *self.layer.kernel
        weight = blank(*shape) if blanks else self._filters.fit({"rank": d})[0].weight
        inner = Layer(weight, self.layer.strides, self.layer.dilations, self.layer.pads)
        return Separable(inner, None if blanks else self.covariance, self.seed, rough=self.rough)
