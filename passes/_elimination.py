"""Which inputs of layers to do without: backward elimination by the exact rise of least-squares residuals.

    min_W' tr (W - W') H (W - W')^T,   columns of removed units zero

From W' the unit u is removed whose columns cost least, cost_u = tr W'_u (G_uu)^-1 W'_u^T with G = H^-1, and all
that stays makes up for it: W' <- W' - W'_u (G_uu)^-1 G_u:, G <- G - G_:u (G_uu)^-1 G_u: (Optimal Brain Surgeon,
Hassibi and Stork 1993, for groups of weights and all outputs at once). Where several layers read a unit their costs
are added, each by what its error does to the model's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dpotri

STILL = 1e-6  # of the ridge: a variance below that is rounding
TOGETHER = 2**18  # columns times units left, of which one unit more is removed at a time


@dataclass(frozen=True)
class Reader:
    """A layer that reads units.

    Attributes:
        matrix: [N, D] its weights, or what regression makes of them.
        metric: [D, D] covariance H of its inputs, with a ridge; or its diagonal [D], where no more is known.
        columns: of each unit, the indices of the columns that read it.
        price: damage for each unit of its error's share of its power.
        ridge: what the diagonal of H holds beyond the covariance. An input with nothing but that never changes: the
            bias makes up for it, and to do without it is free.
    """

    matrix: np.ndarray
    metric: np.ndarray
    columns: Sequence[np.ndarray]
    price: float = 1.0
    ridge: float = 0.0

    @property
    def felt(self) -> np.ndarray:
        """[N, D] weights of inputs that change; those of others as zeros."""
        return felt(self.matrix, self.metric, self.ridge)

    @property
    def power(self) -> float:
        matrix = self.felt
        if self.metric.ndim == 1:
            return float(np.einsum("nd,d,nd->", matrix, self.metric, matrix))
        return float(np.einsum("nd,nd->", matrix @ self.metric, matrix))


def felt(matrix: np.ndarray, metric: np.ndarray, ridge: float) -> np.ndarray:
    """Weights [N, D] with zeros for inputs whose variance is but the ridge."""
    variance = metric if metric.ndim == 1 else np.diagonal(metric)
    return np.where(variance <= ridge * (1 + STILL), 0.0, matrix) if ridge else matrix


def eliminate(
    readers: Sequence[Reader], count: int, least: int = 1, share: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The order in which units go, and what each reader loses by it.

    Args:
        readers: all layers that read the units.
        count: of units.
        least: units that stay in any case.
        share: of the units left, that are removed at a time at least.

    Returns:
        order [count - least], and errors [count - least + 1, readers]: share of a reader's power that is lost when so
        many units are gone.
    """
    states = [_State(reader) for reader in readers]
    left, order = np.arange(count), []
    errors = [np.zeros(len(readers))]
    while len(left) > least:
        costs = [state.costs(left) for state in states]
        total = sum((s.reader.price * c for s, c in zip(states, costs, strict=True)), np.zeros(len(left)))
        widest = max((s.width for s in states), default=0)
        number = min(max(1, len(left) * widest // TOGETHER, int(share * len(left))), len(left) - least)
        chosen = left[np.argsort(total, kind="stable")[:number]]
        rises = np.array([state.remove(chosen) for state in states])
        errors += [errors[-1] + rises * (done + 1) / number for done in range(number)]
        order += chosen.tolist()
        left = np.setdiff1d(left, chosen)
    return np.array(order, np.int64), np.minimum(np.stack(errors), 1.0)


def compensated(reader: Reader, gone: np.ndarray) -> np.ndarray:
    """[N, D] the weights of a reader without some units, with what stays making up for them."""
    lost = np.concatenate([reader.columns[u] for u in gone])
    found = reader.matrix.copy()
    found[:, lost] = 0.0
    if reader.metric.ndim == 2 and len(lost) < found.shape[1]:
        kept = np.setdiff1d(np.arange(found.shape[1]), lost)
        inner, across = reader.metric[np.ix_(kept, kept)], reader.metric[np.ix_(lost, kept)]
        found[:, kept] += cho_solve(cho_factor(inner), (reader.matrix[:, lost] @ across).T).T
    return found


class _State:
    """One reader on the way: columns that are left, their weights, and the inverse of their metric."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.power = max(reader.power, 1e-30)
        self.weights = reader.felt.T.copy()  # [D, N]
        self.inverse = None if reader.metric.ndim == 1 else _inverse(reader.metric)
        self.place = np.arange(len(self.weights))  # column -> row of `weights`, as rows go

    @property
    def width(self) -> int:
        return 0 if self.inverse is None else len(self.weights)

    def costs(self, units: np.ndarray) -> np.ndarray:
        """[units] share of the power that each would cost alone."""
        found = np.empty(len(units))
        sizes = np.array([len(self.reader.columns[u]) for u in units])
        for size in np.unique(sizes):
            own = np.flatnonzero(sizes == size)
            rows = self.place[np.stack([self.reader.columns[u] for u in units[own]])] if size else None
            found[own] = 0.0 if rows is None else self._costs(rows)
        return found / self.power

    def _costs(self, rows: np.ndarray) -> np.ndarray:
        """Of units with the same number of columns, rows [units, size]."""
        weights = self.weights[rows]  # [units, size, N]
        if self.inverse is None:
            return np.einsum("usn,us->u", weights**2, self.reader.metric[rows])
        if rows.shape[1] == 1:
            return (weights[:, 0] ** 2).sum(axis=1) / np.diagonal(self.inverse)[rows[:, 0]]
        inner = self.inverse[rows[:, :, None], rows[:, None, :]]
        gram = weights @ weights.transpose(0, 2, 1)
        return np.trace(np.linalg.solve(inner, gram), axis1=1, axis2=2)

    def remove(self, units: np.ndarray) -> float:
        """Take units out together, and return the share of the power that it costs."""
        rows = self.place[np.concatenate([self.reader.columns[u] for u in units])]
        if not len(rows):
            return 0.0
        gone = self.weights[rows]
        if self.inverse is None:
            self.weights[rows] = 0.0
            return float(np.einsum("rn,r->", gone**2, self.reader.metric[rows])) / self.power
        across = self.inverse[rows]
        factor = cho_factor(across[:, rows])
        solved = cho_solve(factor, gone)
        cost = float(np.einsum("rn,rn->", gone, solved))
        stays = np.ones(len(self.weights), bool)
        stays[rows] = False
        kept = np.flatnonzero(stays)
        between = across[:, kept]
        self.weights = self.weights[kept] - between.T @ solved
        self.inverse = self.inverse[np.ix_(kept, kept)] - between.T @ cho_solve(factor, between)
        moved = np.cumsum(stays) - 1
        self.place = np.where(self.place >= 0, moved[self.place], -1)
        return cost / self.power


def _inverse(metric: np.ndarray) -> np.ndarray:
    lower = dpotri(cho_factor(metric, lower=True)[0], lower=1)[0]
    return np.tril(lower) + np.tril(lower, -1).T
