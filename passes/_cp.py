"""The CP decomposition: W[n,c,i,j] ~ sum_r D[n,r] A[c,r] B[i,r] E[j,r], and so Conv -> Conv . Conv . Conv . Conv.

Four convolutions take the place of one (Lebedev et al., ICLR 2015, section 3): A^T [R, C, 1, 1], then B^T
[R, 1, kh, 1] and E^T [R, 1, 1, kw], each channel for itself, then D [N, R, 1, 1]: R (C + kh + kw + N)
multiply-accumulates a position for N C kh kw. A kernel of one row or column has no B or no E.

All factors are fitted together, by damped Gauss-Newton (Phan, Tichavsky and Cichocki, SIAM J. Matrix Anal. 2013;
Sorber, Van Barel and De Lathauwer, SIAM J. Optim. 2013), as alternating least squares creeps where terms are alike. A
best approximation need not exist: terms can grow without bound and cancel (de Silva and Lim, SIAM J. Matrix Anal.
2008, section 4), which neither rounding nor later quantisation forgives. So there is a ridge, lowered bit by bit while
the terms stay small (as in Phan et al., ECCV 2020, with another measure of it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from ._factors import Factor, Factors, Layer, Method, Setting, blank, error, features, macs

CHOICES, LEAST = 9, 1 / 8  # ranks to choose from, and the share of the layer's work that the first keeps
STARTS, SWEEPS = 3, 10  # the first from singular vectors, the others random; of alternating least squares for each
TRIAL, STEPS, CONJUGATE = 10, 60, 30  # Gauss-Newton of each start; then of the best, for each ridge; inner iterations
RIDGES = (1e-4, 1e-5, 1e-6, 1e-8)  # times the squares of all factors of a tensor of norm one, at decreasing bias
BOUND = 100.0  # sum of the terms' squared norms over that of the kernel: so that cancelling costs one digit
SETTLED = 1e-4  # share of the loss by which a step must lower it for another to be worth taking
FLOOR = 1e-3, 1e-8  # of the mean variance: added to those of the axes, and to that of what the last factor sees


class CP(Method):
    """Canonical polyadic: a sum of R products of vectors, in as many convolutions as the kernel has dimensions."""

    name = "cp"

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        return "a 1x1 kernel is a matrix: CP is for kernels with more taps" if layer.taps == 1 else None

    def settings(self, step: int) -> Iterator[dict[str, int]]:
        whole, each = macs([self.layer.whole(self.layer.weight)]), macs(self.skeleton({"rank": 1}))
        last = int(np.ceil(whole / each / step) - 1)  # the work grows with the rank in proportion
        if last >= 1:
            steps = np.geomspace(np.clip(LEAST * whole / each / step, 1, last), last, CHOICES)
            yield from ({"rank": step * int(rank)} for rank in np.unique(steps.round()))

    def skeleton(self, setting: Setting) -> Factors:
        return self._chain([blank(size, setting["rank"]) for size in self._shape])

    def fit(self, setting: Setting) -> Factors:
        rank, layer = setting["rank"], self.layer
        plain = decompose(self._kernel, rank, self.seed)
        chain = self._chain(plain)
        if self.covariance is None:
            return chain
        # |W - W'|^2 is the error that counts where patches are uncorrelated. A covariance that is a product of one of
        # channels, one of rows and one of columns is made so by a change of basis for each, which keeps terms terms.
        white = self._kernel
        for mode, root in enumerate(self._roots, 1):
            white = np.moveaxis(np.tensordot(white, root, (mode, 0)), -1, mode)
        last, *others = decompose(white, rank, self.seed)
        pairs = zip(self._roots, others, strict=True)
        weighted = self._chain([last, *(solve_triangular(root, own, trans="T", lower=True) for root, own in pairs)])
        chains = [chain, self._refitted(chain), self._refitted(weighted)]
        return min(chains, key=lambda made: error(layer, made, self.covariance))

    @cached_property
    def _kernel(self) -> np.ndarray:
        """The weight in float64 without dimensions of one tap, [N, C, kh, kw] or [N, C, k]."""
        return self.layer.weight.astype(np.float64).reshape(self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.layer.outputs, self.layer.inputs, *(size for size in self.layer.kernel if size > 1)

    @cached_property
    def _roots(self) -> list[np.ndarray]:
        """Cholesky factors of the covariance of channels, rows and columns, each the mean over the other two."""
        assert self.covariance is not None
        sizes, roots = self._kernel.shape[1:], []
        for mode, size in enumerate(sizes):
            rows = "cij"[: len(sizes)]
            columns = rows.replace(rows[mode], "z")
            mean = np.einsum(f"{rows}{columns}->{rows[mode]}z", self.covariance.reshape(sizes * 2))
            mean = mean / max(np.trace(mean) / size, 1e-300)
            roots.append(cholesky(mean + FLOOR[0] * np.eye(size), lower=True))
        return roots

    def _chain(self, factors: Sequence[np.ndarray]) -> Factors:
        last, first, *taps = factors
        rank, layer = last.shape[1], self.layer
        spread = [vector.T.reshape(rank, 1, -1, 1) for vector in taps]
        if len(taps) == 2:
            middle = [layer.vertical(spread[0], rank), layer.horizontal(spread[1].swapaxes(2, 3), rank)]
        else:  # the one that is left has the strides and pads of both directions
            middle = [layer.whole(spread[0].reshape(rank, 1, *layer.kernel), rank)]
        return (Factor(first.T.reshape(rank, -1, 1, 1)), *middle, Factor(last.reshape(-1, rank, 1, 1)))

    def _refitted(self, chain: Factors) -> Factors:
        """The chain with the D that is best for the covariance S, given the others: W S F^T (F S F^T)^-1."""
        seen = features(chain)
        half = self.covariance @ seen.T
        gram = seen @ half
        gram += (FLOOR[1] * np.trace(gram) / len(gram) + 1e-300) * np.eye(len(gram))
        last = cho_solve(cho_factor(gram), (self.layer.matrix @ half).T).T
        return (*chain[:-1], Factor(last[:, :, None, None]))


def decompose(kernel: np.ndarray, rank: int, seed: int = 0) -> list[np.ndarray]:
    """Factors [size, R] for each dimension of a kernel [N, C, ...], the best of some starts; deterministic.

    A first or second dimension that is larger than the others' product is cut down to it, which loses nothing.
    """
    norm = np.linalg.norm(kernel)
    if norm == 0:
        return [np.zeros((size, rank)) for size in kernel.shape]
    core, bases = kernel / norm, {}
    for mode in 0, 1:
        if core.shape[mode] ** 2 > core.size:
            front = np.moveaxis(core, mode, 0)
            bases[mode], triangle = np.linalg.qr(front.reshape(len(front), -1))
            core = np.moveaxis(triangle.reshape(-1, *front.shape[1:]), 0, mode)
    tensor, rng = Tensor(core), np.random.default_rng([seed, rank])
    starts = [singular_start(tensor, rank, rng)]
    starts += [rng.standard_normal(starts[0].shape) / rank**0.25 for _ in range(STARTS - 1)]
    tried = [gauss_newton(tensor, alternating(tensor, start, RIDGES[0], SWEEPS), RIDGES[0], TRIAL) for start in starts]
    point = min(tried, key=lambda made: made.loss)
    for ridge in RIDGES:
        lower = gauss_newton(tensor, revived(tensor, point, rng), ridge, STEPS)
        if tensor.size(lower.x) > BOUND and ridge < RIDGES[0]:
            break
        point = lower if lower.miss < point.miss or ridge == RIDGES[0] else point
    factors = [norm ** (1 / core.ndim) * point.x[part] for part in tensor.parts]
    return [bases[mode] @ factor if mode in bases else factor for mode, factor in enumerate(factors)]


@dataclass(frozen=True)
class Point:
    """Factors stacked, x [n1 + n2 + .., R], and what they come to.

    Attributes:
        loss: half of miss + ridge |x|^2, where miss = |X - X'|^2.
        first: the product of X with all factors but the first, [n1, R].
        grams: of the factors, [R, R] each.
    """

    x: np.ndarray
    loss: float
    miss: float
    first: np.ndarray
    grams: list[np.ndarray]


class Tensor:
    """A tensor X of norm one, and its products with X' = sum_r x1_r o x2_r o ..; only two of them read all of X."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.flat = values, values.reshape(len(values), -1)
        ends = np.cumsum(values.shape)
        self.parts = [slice(end - size, end) for end, size in zip(ends, values.shape, strict=True)]

    def at(self, x: np.ndarray, ridge: float) -> Point:
        factors = [x[part] for part in self.parts]
        first = self.flat @ reduce(lambda a, b: (a[:, None] * b).reshape(-1, a.shape[1]), factors[1:])
        grams = [factor.T @ factor for factor in factors]
        miss = 1 - 2 * np.vdot(first, factors[0]) + others(grams).sum()
        return Point(x, float(miss + ridge * np.vdot(x, x)) / 2, float(miss), first, grams)

    def rest(self, x: np.ndarray) -> np.ndarray:
        """X with its first dimension contracted, [R, n2, n3, ..]."""
        return (x[self.parts[0]].T @ self.flat).reshape(-1, *self.values.shape[1:])

    def product(self, rest: np.ndarray, x: np.ndarray, mode: int) -> np.ndarray:
        """X times all factors but that of a mode other than the first, [n, R]."""
        letters = "abcdefg"[: rest.ndim - 1]
        with_factors = [(letters[m - 1] + "r", x[part]) for m, part in enumerate(self.parts) if m not in (0, mode)]
        names = ",".join(["r" + letters, *(name for name, _ in with_factors)])
        return np.einsum(f"{names}->{letters[mode - 1]}r", rest, *(f for _, f in with_factors), optimize=True)

    def balanced(self, x: np.ndarray) -> np.ndarray:
        """The same X' with each term's norm spread evenly over its vectors: where the ridge is least."""
        norms = np.stack([np.linalg.norm(x[part], axis=0) for part in self.parts])
        level = np.exp(np.log(np.maximum(norms, 1e-75)).mean(0))
        scale = np.where(norms.min(0) > 1e-75, level / np.maximum(norms, 1e-75), 0)
        return np.concatenate([x[part] * by for part, by in zip(self.parts, scale, strict=True)])

    def terms(self, x: np.ndarray) -> np.ndarray:
        """Squared norm of each term, [R]."""
        return reduce(np.multiply, [np.sum(x[part] ** 2, 0) for part in self.parts])

    def size(self, x: np.ndarray) -> float:
        return float(self.terms(x).sum())


def others(grams: Sequence[np.ndarray], *but: int) -> np.ndarray:
    """The elementwise product of Gram matrices, some left out."""
    return reduce(np.multiply, [g for k, g in enumerate(grams) if k not in but], np.ones_like(grams[0]))


def singular_start(tensor: Tensor, rank: int, rng: np.random.Generator) -> np.ndarray:
    """The largest singular terms of the slices [N, C] for each tap, taps turned to their principal axes.

    A little noise is added, as between orthogonal terms some gradients vanish.
    """
    turned, axes = tensor.values, []
    for mode in range(2, turned.ndim):
        front = np.moveaxis(turned, mode, 0)
        axes.append(np.linalg.svd(front.reshape(len(front), -1), full_matrices=False)[0])
        turned = np.moveaxis(np.tensordot(axes[-1].T, front, 1), 0, mode)
    shape = turned.shape[2:]
    u, s, v = np.linalg.svd(np.moveaxis(turned.reshape(*turned.shape[:2], -1), 2, 0), full_matrices=False)
    taps, which = np.unravel_index(np.argsort(-s, axis=None, kind="stable")[:rank], s.shape)
    vectors = [axis[:, index] for axis, index in zip(axes, np.unravel_index(taps, shape), strict=True)]
    x = tensor.balanced(np.concatenate([(u[taps, :, which] * s[taps, which, None]).T, v[taps, which].T, *vectors]))
    x = np.pad(x, ((0, 0), (0, rank - x.shape[1])))
    return x + 0.02 * np.sqrt(np.mean(x**2)) * rng.standard_normal(x.shape)


def alternating(tensor: Tensor, x: np.ndarray, ridge: float, sweeps: int) -> np.ndarray:
    """Alternating least squares: each factor in turn the best for the others."""
    for _ in range(sweeps):
        x = tensor.balanced(x)
        grams, rest = tensor.at(x, ridge).grams, None
        for mode, part in enumerate(tensor.parts):
            product = tensor.at(x, ridge).first if rest is None else tensor.product(rest, x, mode)
            gram = others(grams, mode)
            gram += (ridge + 1e-12 * np.trace(gram)) * np.eye(len(gram))
            x[part] = cho_solve(cho_factor(gram), product.T).T
            grams[mode] = x[part].T @ x[part]
            rest = tensor.rest(x) if rest is None else rest
    return tensor.balanced(x)


def revived(tensor: Tensor, point: Point, rng: np.random.Generator) -> np.ndarray:
    """The factors with terms that a ridge has made zero, and where they would stay, drawn anew."""
    terms = tensor.terms(point.x)
    dead = terms < 1e-9 * max(point.miss, 1e-12)
    level = (max(point.miss, 0) / len(dead)) ** (1 / 2 / len(tensor.parts)) / 4
    fresh = rng.standard_normal(point.x.shape)
    for part in tensor.parts:
        fresh[part] *= level / np.linalg.norm(fresh[part], axis=0)
    return np.where(dead, fresh, point.x)


def gauss_newton(tensor: Tensor, x: np.ndarray, ridge: float, steps: int) -> Point:
    """The ridge regression of X' on X, from x downhill, with the damping of Nielsen (IMM-REP-1999-05).

    J^T J has blocks made of Gram matrices alone (Tomasi and Bro 2006): with G_k.. the elementwise product of all but
    those of k.., (J^T J v)_k = v_k G_k + x_k sum_m G_km * (v_m^T x_m). It is never written out; its diagonal blocks
    are the preconditioner.
    """
    now = tensor.at(tensor.balanced(x), ridge)
    gradient, blocks, pairs = _system(tensor, now, ridge)
    damping, growth = 1e-2 * np.diagonal(blocks, axis1=1, axis2=2).max(), 2.0
    for _ in range(steps):
        step = _direction(tensor.parts, now.x, gradient, blocks, pairs, ridge + damping)
        expected = (damping * np.vdot(step, step) - np.vdot(gradient, step)) / 2
        made = tensor.at(tensor.balanced(now.x + step), ridge)
        gained = now.loss - made.loss
        if gained > 0:
            now = made
            if gained < SETTLED * made.loss:
                break
            gradient, blocks, pairs = _system(tensor, now, ridge)
            damping, growth = damping * max(1 / 5, 1 - (2 * gained / max(expected, 1e-300) - 1) ** 3), 2.0
        elif expected < 1e-15:  # what the loss, a difference of numbers of order one, does not resolve
            break
        else:
            damping, growth = damping * growth, growth * 2
    return now


def _system(tensor: Tensor, point: Point, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient [n1 + n2 + .., R]; the products of Gram matrices without one [d, R, R] and two of d, [d, d, R, R]."""
    x, grams, modes = point.x, point.grams, range(len(tensor.parts))
    rest = tensor.rest(x)
    blocks = np.stack([others(grams, k) for k in modes])
    pairs = np.stack([[others(grams, k, m) * (k != m) for m in modes] for k in modes])
    products = [point.first, *(tensor.product(rest, x, mode) for mode in modes[1:])]
    pulls = [x[part] @ block for part, block in zip(tensor.parts, blocks, strict=True)]
    return np.concatenate(pulls) - np.concatenate(products) + ridge * x, blocks, pairs


def _direction(
    parts: Sequence[slice], x: np.ndarray, gradient: np.ndarray, blocks: np.ndarray, pairs: np.ndarray, shift: float
) -> np.ndarray:
    """-(J^T J + shift)^-1 gradient by conjugate gradients, to a hundredth in the measure of the preconditioner.

    In float32, which is twice as fast: of a step no more is asked than that it goes down.
    """
    scale = np.abs(gradient).max() + 1e-300
    inverse = np.linalg.inv(blocks + shift * np.eye(x.shape[1])).astype(np.float32)
    left, x = (-gradient / scale).astype(np.float32), x.astype(np.float32)
    blocks, pairs, lift = blocks.astype(np.float32), pairs.astype(np.float32), np.float32(shift)

    def nearly(v: np.ndarray) -> np.ndarray:
        return np.concatenate([v[part] @ own for part, own in zip(parts, inverse, strict=True)])

    found, direction, power, enough = np.zeros_like(x), np.zeros_like(x), np.float32(1), np.float32(0)
    for iteration in range(CONJUGATE):
        guess = nearly(left)
        before, power = power, np.vdot(left, guess)
        enough = enough if iteration else power / 10000
        if power <= enough:
            break
        direction = guess + power / before * direction
        mixed = np.einsum("kmrs,mrs->krs", pairs, np.stack([direction[part].T @ x[part] for part in parts]))
        image = lift * direction
        for part, block, cross in zip(parts, blocks, mixed, strict=True):
            image[part] += direction[part] @ block + x[part] @ cross
        curvature = np.vdot(direction, image)
        if curvature <= 0:  # rounding
            break
        found += power / curvature * direction
        left = left - power / curvature * image
    return scale * found.astype(np.float64)
