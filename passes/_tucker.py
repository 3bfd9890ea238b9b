"""Tucker decomposition of a convolution along its channels.

    Conv(k x k, C -> N)  ->  Conv(1 x 1, C -> R3) . Conv(k x k, R3 -> R4) . Conv(1 x 1, R4 -> N)
    W[n,c,i,j]           ~   sum_rs U4[n,s] G[s,r,i,j] P[r,c]

W: [N, C, kh, kw], P: [R3, C] of orthonormal rows, G: [R4, R3, kh, kw], U4: [N, R4] of orthonormal columns. A rank that
is full needs no factor: with R4 = N two remain, the 1 x 1 on the inputs and the kernel.

Without a covariance: HOSVD (the leading singular vectors of the unfoldings [C, N kh kw] and [N, C kh kw]), improved by
HOOI (each basis in turn is the best for the other); G = W x3 P x4 U4^T. Kim et al., "Compression of Deep Convolutional
Neural Networks for Fast and Low Power Mobile Applications", ICLR 2016, section 3; De Lathauwer et al., "On the best
rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors", SIAM J. Matrix Anal. Appl. 2000.

With a covariance S of the patches: given P, the features are F = P at each tap [R3 kh kw, C kh kw], and U4 G is a
regression of rank R4 on them with a closed form (Izenman 1975): with F S F^T = M M^T and B = W S F^T M^-T, U4 holds the
leading left singular vectors of B, G = U4^T B M^-1. For P, S is taken for a Kronecker product of a covariance of
channels, K K^T, and one of taps: HOOI of the tensor whitened by both gives U3, and P spans the rows of U3^T K^-1. The P
of the plain weights is tried as well; what S itself finds closer is improved by steps down the error's slope in P.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from ._factors import Factor, Factors, Layer, Method, Setting, blank, macs
from ._vbmf import evb_rank

BOTH = tuple(0.85 * 0.83**i for i in range(9))  # shares of the inputs and of the outputs that stay
INPUTS = tuple(0.85 * 0.7**i for i in range(6))  # shares of the inputs, with all outputs
SWEEPS, GAIN = 20, 1e-4
STEPS = 2  # most of what there is to gain; each costs two products with the covariance
RIDGE = 1e-8  # of the mean variance: where data say nothing, the weights decide


class Tucker(Method):
    """A 1 x 1 on the inputs, a small kernel, a 1 x 1 on the outputs; settings {"inputs": R3, "outputs": R4}."""

    name = "tucker"

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        if layer.taps == 1:
            return "its kernel is 1 x 1: a matrix has no core between its factors"
        if layer.inputs == 1:
            return "it has one input channel: there is none to spare"
        return None

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        n, c = self.layer.outputs, self.layer.inputs
        wanted = [(c * share, n * share) for share in BOTH] + [(c * share, n) for share in INPUTS]
        evb = self.vbmf()
        wanted.append((evb["inputs"], evb["outputs"]))
        found = {(_near(r3, c, step), _near(r4, n, step)) for r3, r4 in wanted}
        costs = {pair: self._macs(*pair) for pair in found if pair[0] < c}
        for (r3, r4), cost in sorted(costs.items(), key=lambda item: (item[1], item[0])):
            # a 1 x 1 that costs more than it spares: without it the chain is cheaper and no worse
            if cost < self._macs(c, n) and (r4 == n or cost < min(self._macs(r3, n), self._macs(c, r4))):
                yield {"inputs": r3, "outputs": r4}

    def vbmf(self, relaxation: float = 0.0) -> dict[str, int]:
        """Ranks by empirical variational Bayes on each unfolding, brought closer to the full ones by a share."""
        (r3, c), (r4, n) = (self._evb[0], self.layer.inputs), (self._evb[1], self.layer.outputs)
        r3, r4 = (rank + relaxation * (full - rank) for rank, full in ((r3, c), (r4, n)))
        return {"inputs": max(round(r3), 1), "outputs": max(round(r4), 1)}

    def skeleton(self, setting: Setting) -> Factors:
        r3, r4 = setting["inputs"], setting["outputs"]
        n, c = self.layer.outputs, self.layer.inputs
        return self._chain(blank(r3, c), blank(r4, r3, *self.layer.kernel), blank(n, r4))

    def fit(self, setting: Setting) -> Factors:
        r3, r4 = setting["inputs"], setting["outputs"]
        sweeps = 0 if self.rough else SWEEPS
        if self.covariance is not None and self.rough and r3 < self.layer.inputs:
            return self._chain(*self._regress(self._white_basis(r3, r4, sweeps), r4)[1:])
        plain, u4 = hooi(self._tensor, r3, r4, sweeps)
        if self.covariance is None:
            return self._chain(plain.T, self._core(np.tensordot(u4.T, plain.T @ self._tensor, 1)), u4)
        bases = [plain]
        if r3 < self.layer.inputs:
            bases.append(self._white_basis(r3, r4, sweeps).T)
        best = min((self._regress(basis.T, r4) for basis in bases), key=lambda made: made[0])
        for _ in range(STEPS if r3 < self.layer.inputs else 0):
            best = min(best, self._regress(self._step(*best[1:]), r4), key=lambda made: made[0])
        return self._chain(*best[1:])

    def _white_basis(self, r3: int, r4: int, sweeps: int) -> np.ndarray:
        """P for inputs whose covariance is a Kronecker product."""
        tensor, channels = self._whitened
        white, _ = hooi(tensor, r3, r4, sweeps)
        return np.linalg.qr(solve_triangular(channels, white, trans=1, lower=True))[0].T

    def _regress(self, p: np.ndarray, r4: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        """The best factors after P, of orthonormal rows: how far off, P, G, U4."""
        taps, r3 = self.layer.taps, len(p)
        half = (p @ self._s.reshape(self.layer.inputs, -1)).reshape(r3 * taps, -1, taps)
        gram = np.moveaxis(np.tensordot(half, p, ((1,), (1,))), 1, 2).reshape(r3 * taps, -1)
        root, ridge = _root(gram, self._ridge)
        seen = self._ws + ridge * self._tensor
        cross = (p @ seen).reshape(self.layer.outputs, -1)
        b = solve_triangular(root, cross.T, lower=True).T
        u4 = leading(b, r4)
        core = solve_triangular(root, b.T @ u4, trans=1, lower=True).T
        off = np.sum(seen * self._tensor) - np.sum((u4.T @ b) ** 2)
        return float(off), p, self._core(core), u4

    def _step(self, p: np.ndarray, core: np.ndarray, u4: np.ndarray) -> np.ndarray:
        """P after the best step down the slope as it is where S is a Kronecker product (a preconditioner)."""
        core = core.reshape(*core.shape[:2], -1)

        def pull(tensor: np.ndarray) -> np.ndarray:
            seen = (tensor.reshape(len(core), -1) @ self._s).reshape(tensor.shape)
            return np.tensordot(core, seen, ((0, 2), (0, 2)))

        def push(rows: np.ndarray) -> np.ndarray:
            return np.einsum("srt,rc->sct", core, rows, optimize=True)

        slope = pull(np.tensordot(u4.T, self._tensor, 1) - push(p))
        between = np.tensordot(core, core, ((0, 2), (0, 2)))
        root, _ = _root(between, RIDGE * float(np.trace(between)) or 1.0)
        way = cho_solve((self._whitened[1], True), cho_solve((root, True), slope).T).T
        bend = np.sum(way * pull(push(way)))
        return np.linalg.qr((p + np.sum(way * slope) / bend * way).T)[0].T if bend > 0 else p

    def _chain(self, p: np.ndarray, core: np.ndarray, u4: np.ndarray) -> Factors:
        first = (Factor(p[:, :, None, None]),) if len(p) < self.layer.inputs else ()
        last = (Factor(u4[:, :, None, None]),) if len(core) < self.layer.outputs else ()
        return (*first, self.layer.whole(core), *last)

    def _core(self, core: np.ndarray) -> np.ndarray:
        return core.reshape(len(core), -1, *self.layer.kernel)

    def _macs(self, r3: int, r4: int) -> float:
        return macs(self.skeleton({"inputs": r3, "outputs": r4}))

    @cached_property
    def _tensor(self) -> np.ndarray:
        """[N, C, kh kw]"""
        return np.asarray(self.layer.weight, np.float64).reshape(self.layer.outputs, self.layer.inputs, -1)

    @cached_property
    def _evb(self) -> tuple[int, int]:
        return evb_rank(unfold(self._tensor, 1))[0], evb_rank(unfold(self._tensor, 0))[0]

    @cached_property
    def _s(self) -> np.ndarray:
        return np.asarray(self.covariance, np.float64)

    @cached_property
    def _ridge(self) -> float:
        return RIDGE * float(np.trace(self._s)) / len(self._s) or 1.0

    @cached_property
    def _ws(self) -> np.ndarray:
        """W S, [N, C, kh kw]"""
        return (self._tensor.reshape(self.layer.outputs, -1) @ self._s).reshape(self._tensor.shape)

    @cached_property
    def _whitened(self) -> tuple[np.ndarray, np.ndarray]:
        """The weight for inputs of no correlation, and the lower factor K [C, C] that colours channels."""
        inputs, taps = self.layer.inputs, self.layer.taps
        blocks = self._s.reshape(inputs, taps, inputs, taps)
        channels, _ = _root(np.einsum("ctdt->cd", blocks), self._ridge)
        between, _ = _root(np.einsum("ctcu->tu", blocks), self._ridge)
        return (channels.T @ self._tensor) @ between, channels


def hooi(tensor: np.ndarray, r3: int, r4: int, sweeps: int = SWEEPS) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases [C, R3] and [N, R4] of a tensor [N, C, taps]; no sweeps: HOSVD."""
    by_outputs, by_inputs = unfold(tensor, 0), unfold(tensor, 1)
    u3, u4 = leading(by_inputs, r3), leading(by_outputs, r4)
    off = power = np.sum(tensor**2)
    for _ in range(sweeps):
        u3 = leading(unfold((u4.T @ by_outputs).reshape(-1, *tensor.shape[1:]), 1), r3)
        small = unfold((u3.T @ by_inputs).reshape(-1, len(tensor), tensor.shape[2]), 1)
        u4 = leading(small, r4)
        before, off = off, power - np.sum((u4.T @ small) ** 2)
        if before - off <= GAIN * before or off <= 1e-14 * power:
            break
    return u3, u4


def leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The first left singular vectors, as columns; all of them span everything, as the identity does."""
    if rank >= len(matrix):
        return np.eye(len(matrix))
    return np.ascontiguousarray(np.linalg.eigh(matrix @ matrix.T)[1][:, : -rank - 1 : -1])


def unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """[N, C, taps] as [N, C taps] or [C, N taps]."""
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def _root(matrix: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """The lower Cholesky factor of a matrix and a ridge, which grows until rounding in the matrix is covered."""
    while True:
        try:
            return cholesky(matrix + ridge * np.eye(len(matrix)), lower=True), ridge
        except np.linalg.LinAlgError:
            ridge *= 100


def _near(rank: float, full: int, step: int) -> int:
    return full if rank >= full else min(max(round(rank / step), 1) * step, full)
