"""A layer and the chain of smaller layers that takes its place: what all low-rank methods share.

Everything is seen as a two-dimensional convolution in float64: a dense layer is a 1 x 1 kernel on a 1 x 1 image, a
one-dimensional convolution a kernel of one row. No factor but the last has a bias, so that zero padding between
factors is what it was before them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from scipy import linalg, sparse

SETTINGS = 10  # to choose from, for one method and layer
FITTED = 3  # of them, to know the errors of all
LEAST = 1e-3  # of an error for the trend: what is exact at one rank may be far from it at the next

Pair = tuple[int, int]
Setting = Mapping[str, int]


@dataclass(frozen=True)
class Layer:
    """A convolution, its biases left out.

    Attributes:
        weight: [N, C, kh, kw], N outputs and C inputs; groups of inputs are not factorised.
        strides, dilations: vertical, horizontal.
        pads: top, left, bottom, right.
    """

    weight: np.ndarray
    strides: Pair = (1, 1)
    dilations: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def kernel(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def matrix(self) -> np.ndarray:
        """The weight as [N, C kh kw]: what patches, in the order (c, i, j), are multiplied with."""
        return self.weight.reshape(self.outputs, -1)

    def whole(self, weight: np.ndarray, groups: int = 1) -> Factor:
        """A factor with the layer's own strides, dilations and pads."""
        return Factor(weight, groups, self.strides, self.dilations, self.pads)

    def vertical(self, weight: np.ndarray, groups: int = 1) -> Factor:
        """A factor of kh x 1 taps, with what the layer does vertically."""
        top, _, bottom, _ = self.pads
        return Factor(weight, groups, (self.strides[0], 1), (self.dilations[0], 1), (top, 0, bottom, 0))

    def horizontal(self, weight: np.ndarray, groups: int = 1) -> Factor:
        """A factor of 1 x kw taps, with what the layer does horizontally."""
        _, left, _, right = self.pads
        return Factor(weight, groups, (1, self.strides[1]), (1, self.dilations[1]), (0, left, 0, right))


@dataclass(frozen=True)
class Factor:
    """One convolution of a chain.

    Attributes:
        weight: [outputs, inputs of a group, kh, kw].
    """

    weight: np.ndarray
    groups: int = 1
    strides: Pair = (1, 1)
    dilations: Pair = (1, 1)
    pads: tuple[int, int, int, int] = field(default=(0, 0, 0, 0))


Factors = tuple[Factor, ...]


class Method(ABC):
    """One way to factorise layers, made for one of them and for what is known of its inputs.

    Decompositions that all ranks share are computed once (`functools.cached_property`).

    Args:
        layer: to factorise.
        covariance: [C kh kw, C kh kw] of the patches that the kernel meets, in the order (c, i, j); the error that
            counts is E|(W - W')p|^2 = tr((W - W') covariance (W - W')^T). None: nothing is known, and the error is
            |W - W'|^2.
        seed: of what starts at random.
        rough: leave out what takes long and brings little: for an estimate of the error.
    """

    name: ClassVar[str]

    def __init__(
        self, layer: Layer, covariance: np.ndarray | None = None, seed: int = 0, *, rough: bool = False
    ) -> None:
        self.layer = layer
        self.covariance = covariance
        self.seed = seed
        self.rough = rough

    @classmethod
    def refusal(cls, layer: Layer) -> str | None:
        """Why this method has nothing to offer for a layer, whatever the rank; or None."""
        return None

    @abstractmethod
    def settings(self, step: int) -> Iterator[dict[str, int]]:
        """Ranks to choose from, multiples of `step`, cheapest first; those that save multiply-accumulates."""

    @abstractmethod
    def skeleton(self, setting: Setting) -> Factors:
        """The chain for a setting, its weights `blank`: for what it costs."""

    @abstractmethod
    def fit(self, setting: Setting) -> Factors:
        """The chain for a setting with the weights that come closest."""

    def errors(self, settings: Sequence[Setting]) -> list[float]:
        """`error` of each setting: of some fitted, of those between by the trend of its logarithm over their work."""
        work = [macs(self.skeleton(setting)) for setting in settings]
        order = np.argsort(work, kind="stable")
        tried = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), FITTED)).round().astype(int))]
        found = {int(i): error(self.layer, self.fit(settings[i]), self.covariance) for i in tried}
        known = np.log([max(found[int(i)], LEAST) for i in tried])
        trend = np.exp(np.interp(work, np.take(work, tried), known))
        return [found.get(i, float(e)) for i, e in enumerate(trend)]


def blank(*shape: int) -> np.ndarray:
    """A weight that takes no memory, where only its shape counts."""
    return np.broadcast_to(np.float32(0), shape)


def macs(factors: Sequence[Factor]) -> float:
    """Multiply-accumulates for one output position of the whole chain: positions before a stride count by it."""
    total, positions = 0.0, 1.0
    for factor in reversed(factors):
        total += positions * factor.weight.size
        positions *= factor.strides[0] * factor.strides[1]
    return total


def compose(factors: Sequence[Factor]) -> np.ndarray:
    """The one kernel [N, C, kh, kw] that does what the chain does."""
    kernel = None
    for factor in factors:
        own = _dense(factor)
        if kernel is None:
            kernel = own
            continue
        (n, _, a, b), (_, c, height, width) = own.shape, kernel.shape
        made = np.zeros((n, c, a + height - 1, b + width - 1))
        for i in range(a):
            for j in range(b):
                made[:, :, i : i + height, j : j + width] += np.tensordot(own[:, :, i, j], kernel, 1)
        kernel = made
    assert kernel is not None
    return kernel


def features(factors: Sequence[Factor]) -> np.ndarray:
    """What the last factor sees, as a matrix F [q, C kh kw] of the patch: the chain is `last.reshape(N, q) @ F`.

    The last factor must not be grouped; q runs over its inputs and taps, in the order of its weight.
    """
    *before, last = factors
    inputs, a, b = last.weight.shape[1:]
    if not before:
        return np.eye(inputs * a * b)
    kernel = compose(before)
    _, c, height, width = kernel.shape
    made = np.zeros((inputs, a, b, c, a + height - 1, b + width - 1))
    for i in range(a):
        for j in range(b):
            made[:, i, j, :, i : i + height, j : j + width] = kernel
    return made.reshape(inputs * a * b, -1)


def error(layer: Layer, factors: Sequence[Factor], covariance: np.ndarray | None = None) -> float:
    """Squared error of a chain as a share of what the layer makes; see `Method`."""
    off = layer.matrix - compose(factors).reshape(layer.outputs, -1)
    return _power(off, covariance) / max(_power(layer.matrix, covariance), 1e-300)


def _power(matrix: np.ndarray, covariance: np.ndarray | None) -> float:
    return float(np.sum(matrix**2) if covariance is None else np.sum((matrix @ covariance) * matrix))


def _dense(factor: Factor) -> np.ndarray:
    """The weight of a grouped convolution as that of a dense one, [outputs, inputs, kh, kw]."""
    n, inner, *taps = factor.weight.shape
    if factor.groups == 1:
        return np.asarray(factor.weight, np.float64)
    made = np.zeros((n, inner * factor.groups, *taps))
    each = n // factor.groups
    for group in range(factor.groups):
        rows, columns = slice(group * each, (group + 1) * each), slice(group * inner, (group + 1) * inner)
        made[rows, columns] = factor.weight[rows]
    return made


def refit(layer: Layer, factors: Sequence[Factor], covariance: np.ndarray | None = None) -> Factors:
    """The chain with its last factor the best for what it sees: weighted least squares, in closed form.

    With F the `features`, S the covariance and U the last factor [N, q], U becomes U + (W - U F) S F' (F S F')^-1. The
    ridge that keeps this solvable where features repeat each other pulls towards U as it was, not towards zero, so
    that the error never grows and what was exact stays so. The last factor must not be grouped.
    """
    *before, last = factors
    assert last.groups == 1, "the last factor is grouped"
    seen: Any = features(factors)
    own = np.asarray(last.weight, np.float64).reshape(layer.outputs, -1)
    if np.count_nonzero(seen) * 8 < seen.size:  # behind a depthwise factor: taps of one channel each
        seen = sparse.csr_array(seen)
    off = layer.matrix - own @ seen
    weighted = (seen.toarray() if sparse.issparse(seen) else seen) if covariance is None else seen @ covariance
    slope, gram = weighted @ off.T, weighted @ seen.T
    gram.flat[:: len(gram) + 1] += 1e-10 * max(np.trace(gram) / len(gram), 1e-290)
    try:
        change = linalg.cho_solve(linalg.cho_factor(gram, lower=True), slope)
    except linalg.LinAlgError:  # rounding made it indefinite
        change = linalg.lstsq(gram, slope)[0]
    return (*before, replace(last, weight=(own + change.T).reshape(last.weight.shape)))


def spread(unit: float, layer: Layer, limit: int, step: int, count: int = SETTINGS) -> list[int]:
    """Multiples of a step up to a limit, evenly on a logarithmic scale, that cost from a 16th of a layer to all.

    Args:
        unit: multiply-accumulates for one.
        count: of them, at most.
    """
    full = layer.weight.size
    most = min(limit, math.ceil(full / unit) - 1) // step
    if most < 1:
        return []
    least = min(max(round(full / 16 / unit / step), 1), most)
    if most - least < count:
        return [each * step for each in range(least, most + 1)]
    return sorted({round(each) * step for each in np.geomspace(least, most, count)})
