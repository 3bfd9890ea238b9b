"""Kernels of kh x kw taps as columns of kh and rows of kw taps (Jaderberg, Vedaldi, Zisserman, BMVC 2014).

Scheme 2, `Separable`:       Conv(kh x kw, C->N) -> Conv(kh x 1, C->K), Conv(1 x kw, K->N)
    W[n,c,i,j] = sum_k h[n,k,j] v[k,c,i]             K (C kh + N kw) multiply-accumulates
Scheme 1, `SeparableBasis`:  -> Conv(kh x 1, C->CM, groups C), Conv(1 x kw, CM->CM, groups CM), Conv(1 x 1, CM->N)
    W[n,c,i,j] = sum_m a[n,c,m] v[c,m,i] h[c,m,j]    C M (kh + kw + N) multiply-accumulates

Both are in section 2, with their two fits: to the weights, or, where the covariance of inputs is known, to what the
layer makes of data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from scipy import linalg
from scipy.sparse.linalg import LinearOperator, cg

from ._factors import Factor, Factors, Layer, Method, Setting, blank, error, macs, refit, spread

SWEEPS, GAIN = 5, 1e-3  # of alternating least squares: as long as the error falls by this share
CG_STEPS = 4  # a sweep: the rows change next, so that more would be for nothing
CP_SWEEPS, CP_STARTS = 100, 3


class Separable(Method):
    """Columns for all inputs, then rows for all outputs: {"rank": K}, K up to min(C kh, N kw)."""

    name = "separable"

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        return one_sided(layer) or too_dear(layer, cls(layer).skeleton({"rank": 1}), "rank 1")

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        unit = macs(self.skeleton({"rank": 1}))
        return ({"rank": rank} for rank in spread(unit, self.layer, min(self._matrix.shape), step))

    def skeleton(self, setting: Setting) -> Factors:
        layer, rank = self.layer, setting["rank"]
        kh, kw = layer.kernel
        columns, rows = blank(rank, layer.inputs, kh, 1), blank(layer.outputs, rank, 1, kw)
        return layer.vertical(columns), layer.horizontal(rows)

    def fit(self, setting: Setting) -> Factors:
        """The truncated SVD, the best for weights; with a covariance, least squares on from the better of two."""
        layer, rank, covariance = self.layer, setting["rank"], self.covariance
        left, scale, right = self._svd
        best = self._chain(left[:, :rank] * scale[:rank], right[:rank])
        if covariance is None:
            return best
        basis = self._whitened[:, :rank]
        whitened = refit(layer, self._chain(self._matrix @ basis, basis.T), covariance)
        if self.rough:
            return whitened
        off, best = min(((error(layer, made, covariance), made) for made in (best, whitened)), key=lambda pair: pair[0])
        for _ in range(SWEEPS):
            made = refit(layer, self._better_columns(best), covariance)
            before, off = off, error(layer, made, covariance)
            best = made if off < before else best
            if off > before * (1 - GAIN):
                break
        return self._chain(*_matrices(best))

    def _chain(self, columns: np.ndarray, rows: np.ndarray) -> Factors:
        """Of columns [C kh, K] and rows [K, N kw], each pair made of even norms."""
        layer, rank = self.layer, len(rows)
        kh, kw = layer.kernel
        ratio = np.sqrt((np.linalg.norm(rows, axis=1) + 1e-150) / (np.linalg.norm(columns, axis=0) + 1e-150))
        vertical = (columns * ratio).T.reshape(rank, layer.inputs, kh, 1)
        horizontal = (rows / ratio[:, None]).reshape(rank, layer.outputs, 1, kw).swapaxes(0, 1)
        return layer.vertical(vertical), layer.horizontal(horizontal)

    def _better_columns(self, chain: Factors) -> Factors:
        """The chain with rows as they are and columns by conjugate gradients on the normal equations.

        With orthonormal rows the equations are those of the mean strip covariance, as far as strips side by side are
        not correlated: that is the preconditioner.
        """
        columns, rows = _matrices(chain)
        (size, rank), kw = columns.shape, self.layer.kernel[1]
        q, r = np.linalg.qr(rows.T)
        offsets = q.reshape(-1, kw, rank)  # [N, kw, K]
        # [K, (K', kw, kw')]: how rows K' and K go together at two offsets
        pairs = np.tensordot(offsets, offsets, (0, 0)).transpose(3, 1, 0, 2).reshape(rank, -1).astype(np.float32)

        def equations(guess: np.ndarray) -> np.ndarray:
            met = guess.reshape(rank, size).astype(np.float32) @ self._strips  # enough for a direction to go in
            return (pairs @ met.reshape(-1, size)).ravel()

        def precondition(guess: np.ndarray) -> np.ndarray:
            return linalg.cho_solve(self._mean_strip, guess.reshape(rank, size).T).T.ravel()

        made: Any = LinearOperator  # type checkers know only its subclasses' signature
        operator, helper = (made((rank * size,) * 2, act, dtype=np.float64) for act in (equations, precondition))
        target = np.tensordot(offsets, self._crossed, ((0, 1), (0, 2))).ravel()
        found, _ = cg(operator, target, (r @ columns.T).ravel(), maxiter=CG_STEPS, M=helper)
        return self._chain(found.reshape(rank, size).T, q.T)

    @cached_property
    def _matrix(self) -> np.ndarray:
        """The weight as [C kh, N kw]: a chain of rank K is a matrix of rank K."""
        layer = self.layer
        weight = np.asarray(layer.weight, np.float64).transpose(1, 2, 0, 3)
        return weight.reshape(layer.inputs * layer.kernel[0], -1)

    @cached_property
    def _svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.linalg.svd(self._matrix, full_matrices=False)

    @cached_property
    def _strips(self) -> np.ndarray:
        """The covariance as [C kh, (kw, kw', C kh)], of strips of one column of taps at two offsets; float32."""
        size, kw = len(self._matrix), self.layer.kernel[1]
        return self.covariance.astype(np.float32).reshape(size, kw, size, kw).transpose(0, 1, 3, 2).reshape(size, -1)

    @cached_property
    def _mean(self) -> np.ndarray:
        """The covariance of a strip, [C kh, C kh], whatever its offset."""
        size, kw = len(self._matrix), self.layer.kernel[1]
        return np.einsum("ajbj->ab", self.covariance.reshape(size, kw, size, kw)) / kw

    @cached_property
    def _mean_strip(self) -> tuple[np.ndarray, bool]:
        """Cholesky factor of `_mean`, with a ridge as inputs may repeat each other."""
        ridge = 1e-6 * np.trace(self._mean) / len(self._mean) + 1e-290
        return linalg.cho_factor(self._mean + ridge * np.eye(len(self._mean)))

    @cached_property
    def _whitened(self) -> np.ndarray:
        """Right singular vectors, as columns, of the matrix whitened by any root of the mean strip covariance."""
        return np.linalg.eigh(self._matrix.T @ self._mean @ self._matrix)[1][:, ::-1]

    @cached_property
    def _crossed(self) -> np.ndarray:
        """Outputs against inputs, [N, C kh, kw]."""
        return (self.layer.matrix @ self.covariance).reshape(self.layer.outputs, -1, self.layer.kernel[1])


class SeparableBasis(Method):
    """Separable filters for each input channel, then mixed: {"basis": M}, M up to kh kw and N min(kh, kw)."""

    name = "separable-basis"

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        return one_sided(layer) or too_dear(layer, cls(layer).skeleton({"basis": 1}), "one filter a channel")

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        unit, layer = macs(self.skeleton({"basis": 1})), self.layer
        limit = min(layer.taps, layer.outputs * min(layer.kernel))
        return ({"basis": each} for each in spread_filters(unit, layer, limit, step))

    def skeleton(self, setting: Setting) -> Factors:
        (kh, kw), channels = self.layer.kernel, self.layer.inputs * setting["basis"]
        return self._chain(
            blank(channels, 1, kh, 1), blank(channels, 1, 1, kw), blank(self.layer.outputs, channels, 1, 1)
        )

    def fit(self, setting: Setting) -> Factors:
        """Channel by channel a CP decomposition of W[:, c]; with a covariance, mixing for all channels at once."""
        layer, each = self.layer, setting["basis"]
        left, core = self._core
        a, v, h = cp(core, each, self.seed)
        channels = layer.inputs * each
        mixing = (left @ a).swapaxes(0, 1).reshape(layer.outputs, channels, 1, 1)
        if self.covariance is not None:  # both depthwise factors as one: what is mixed is the same, and made faster
            filters = np.einsum("cim,cjm->cmij", v, h).reshape(channels, 1, *layer.kernel)
            short = (layer.whole(filters, layer.inputs), Factor(mixing))
            mixing = refit(layer, short, self.covariance)[1].weight
        vertical, horizontal = (
            v.swapaxes(1, 2).reshape(channels, 1, -1, 1),
            h.swapaxes(1, 2).reshape(channels, 1, 1, -1),
        )
        return self._chain(vertical, horizontal, mixing)

    def _chain(self, vertical: np.ndarray, horizontal: np.ndarray, mixing: np.ndarray) -> Factors:
        layer = self.layer
        return layer.vertical(vertical, layer.inputs), layer.horizontal(horizontal, len(vertical)), Factor(mixing)

    @cached_property
    def _core(self) -> tuple[np.ndarray, np.ndarray]:
        """W[:, c] = left[c] core[c]: [C, N, R] orthonormal and [C, R, kh, kw] of the same norm, R up to kh kw."""
        layer = self.layer
        left, scale, right = np.linalg.svd(channel_matrices(layer), full_matrices=False)
        return left, (scale[:, :, None] * right).reshape(layer.inputs, -1, *layer.kernel)


def cp(tensors: np.ndarray, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CP decompositions of tensors [C, R, I, J] at once: a [C, R, M], v [C, I, M] and h [C, J, M], v and h of norm 1.

    Alternating least squares, the best of several starts for each tensor: the largest terms of the SVDs of R slices,
    and random ones. At M = I J filters of a single tap each are exact.
    """
    count, slices, height, width = tensors.shape
    if rank == height * width:
        v, h = np.repeat(np.eye(height), width, axis=1), np.tile(np.eye(width), height)
        return tensors.reshape(count, slices, rank), np.tile(v, (count, 1, 1)), np.tile(h, (count, 1, 1))
    u, scale, t = np.linalg.svd(tensors, full_matrices=False)
    largest = np.argsort(-scale.reshape(count, -1), axis=1, kind="stable")[:, None, :rank]
    v = np.take_along_axis(u.transpose(0, 2, 1, 3).reshape(count, height, -1), largest, 2)
    h = np.take_along_axis(t.transpose(0, 3, 1, 2).reshape(count, width, -1), largest, 2)
    rng = np.random.default_rng(seed)
    starts = [(v, h), *((rng.normal(size=v.shape), rng.normal(size=h.shape)) for _ in range(CP_STARTS - 1))]
    found = [_alternated(tensors, *start) for start in starts]
    offs = [tensors - np.einsum("crm,cim,cjm->crij", *terms, optimize=True) for terms in found]
    best = np.argmin([np.sum(off**2, axis=(1, 2, 3)) for off in offs], axis=0)
    a, v, h = (np.stack(each)[best, np.arange(count)] for each in zip(*found, strict=True))
    return a, v, h


def _alternated(tensors: np.ndarray, v: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms a, v and h, from where v and h start."""
    count, slices = tensors.shape[:2]
    by_slice, by_row, by_column = (
        np.moveaxis(tensors, axis, 1).reshape(count, tensors.shape[axis], -1) for axis in (1, 2, 3)
    )
    v, h = _unit(v), _unit(h)
    a = _solved(by_slice, np.zeros((count, slices, v.shape[2])), v, h)
    for _ in range(CP_SWEEPS):
        v = _unit(_solved(by_row, v, a, h))
        h = _unit(_solved(by_column, h, a, v))
        a = _solved(by_slice, a, v, h)
    return a, v, h


def _solved(unfolded: np.ndarray, own: np.ndarray, slow: np.ndarray, fast: np.ndarray) -> np.ndarray:
    """One factor [C, X, M] by least squares, the others as they are; a ridge pulls towards what it was."""
    count, _, rank = own.shape
    products = (slow[:, :, None] * fast[:, None]).reshape(count, -1, rank)
    gram = products.swapaxes(1, 2) @ products
    slope = (unfolded - own @ products.swapaxes(1, 2)) @ products
    ridge = 1e-9 * np.trace(gram, axis1=1, axis2=2) / rank + 1e-290
    return own + np.linalg.solve(gram + ridge[:, None, None] * np.eye(rank), slope.swapaxes(1, 2)).swapaxes(1, 2)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-150)


def _matrices(chain: Factors) -> tuple[np.ndarray, np.ndarray]:
    """Columns [C kh, K] and rows [K, N kw] of a chain of two."""
    columns, rows = (factor.weight for factor in chain)
    return columns.reshape(len(columns), -1).T, rows.swapaxes(0, 1).reshape(len(columns), -1)


def channel_matrices(layer: Layer) -> np.ndarray:
    """W[:, c] as matrices, [C, N, kh kw]."""
    return np.asarray(layer.weight, np.float64).reshape(layer.outputs, layer.inputs, -1).swapaxes(0, 1)


def spread_filters(unit: float, layer: Layer, limit: int, step: int) -> list[int]:
    """Filters for each channel, so that the channels they make are multiples of a step if there are such."""
    return spread(unit, layer, limit, step // math.gcd(step, layer.inputs)) or spread(unit, layer, limit, 1)


def one_sided(layer: Layer) -> str | None:
    kh, kw = layer.kernel
    if min(kh, kw) > 1:
        return None
    return f"the kernel is {kh} x {kw}: with a side of 1 there are no columns and rows to separate"


def too_dear(layer: Layer, cheapest: Factors, what: str) -> str | None:
    least, full = macs(cheapest), layer.weight.size
    if least < full:
        return None
    return f"even {what} takes {least:.0f} multiply-accumulates for each output position, the layer {full}"
