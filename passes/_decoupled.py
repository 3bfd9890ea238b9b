"""A convolution as a depthwise one, T filters for each channel, and a pointwise one that mixes what they make.

    Conv(kh x kw, C->N) -> Conv(kh x kw, C->CT, groups C), Conv(1 x 1, CT->N)
    W[n,c,i,j] = sum_t p[n,c,t] d[c,t,i,j]           C T (kh kw + N) multiply-accumulates

Guo et al., Network Decoupling (2018, arXiv 1808.05517), section 3: for each channel c the truncated SVD of W[:, c] as
[N, kh kw], the best for weights and exact at T = min(N, kh kw). T = 1 is MobileNet's depthwise separable convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from ._factors import Factor, Factors, Layer, Method, Setting, blank, error, macs, refit
from ._separable import channel_matrices, spread_filters, too_dear


class Decoupled(Method):
    """Filters for each input channel, then mixed: {"terms": T}, T up to min(N, kh kw)."""

    name = "depthwise"

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        if layer.taps == 1:
            return "the kernel is 1 x 1: a depthwise one before it would only scale its inputs"
        return too_dear(layer, cls(layer).skeleton({"terms": 1}), "one filter a channel")

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        unit = macs(self.skeleton({"terms": 1}))
        return ({"terms": each} for each in spread_filters(unit, self.layer, self.most, step))

    @property
    def most(self) -> int:
        """Terms with which the chain is exact."""
        return min(self.layer.outputs, self.layer.taps)

    def skeleton(self, setting: Setting) -> Factors:
        layer, channels = self.layer, self.layer.inputs * setting["terms"]
        return self._chain(blank(channels, 1, *layer.kernel), blank(layer.outputs, channels, 1, 1))

    def fit(self, setting: Setting) -> Factors:
        """The truncated SVDs; with a covariance, mixing refitted to the better of their filters and whitened ones."""
        layer, terms, covariance = self.layer, setting["terms"], self.covariance
        plain = self._projected(self._left[:, :, :terms])
        if covariance is None:
            return plain
        if self.rough:
            return refit(layer, plain, covariance)
        made = [refit(layer, chain, covariance) for chain in (plain, self._projected(self._whitened[:, :, :terms]))]
        return min(made, key=lambda chain: error(layer, chain, covariance))

    def _projected(self, left: np.ndarray) -> Factors:
        """W[:, c] = left left' W[:, c]: filters left' W[:, c], [T, kh kw] a channel, mixed with left [C, N, T]."""
        layer = self.layer
        filters = left.swapaxes(1, 2) @ channel_matrices(layer)
        scale = np.sqrt(np.linalg.norm(filters, axis=2, keepdims=True)) + 1e-150  # shared evenly between both
        mixing = (left * scale.swapaxes(1, 2)).swapaxes(0, 1)
        return self._chain((filters / scale).reshape(-1, 1, *layer.kernel), mixing.reshape(layer.outputs, -1, 1, 1))

    def _chain(self, filters: np.ndarray, mixing: np.ndarray) -> Factors:
        return self.layer.whole(filters, self.layer.inputs), Factor(mixing)

    @cached_property
    def _left(self) -> np.ndarray:
        """Left singular vectors, [C, N, min(N, kh kw)]."""
        return np.linalg.svd(channel_matrices(self.layer), full_matrices=False)[0]

    @cached_property
    def _whitened(self) -> np.ndarray:
        """The same of W[:, c] times a root of the covariance of the channel's own patches: what these excite most."""
        layer, taps = self.layer, self.layer.taps
        blocks = np.einsum("cicj->cij", self.covariance.reshape(layer.inputs, taps, layer.inputs, taps))
        values, vectors = np.linalg.eigh(blocks)
        ridge = 1e-10 * np.trace(self.covariance) / len(self.covariance)  # directions never seen still have an order
        root = vectors * np.sqrt(np.maximum(values, 0) + ridge)[:, None]
        return np.linalg.svd(channel_matrices(layer) @ root, full_matrices=False)[0]
