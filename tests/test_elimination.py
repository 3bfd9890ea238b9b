"""effc.passes._elimination against least squares on what is left, solved from scratch."""

from __future__ import annotations

import numpy as np
import pytest

from effc.passes._elimination import Reader, compensated, eliminate
from effc.passes._factors import Layer
from effc.passes._group_saliency import Groups
from effc.passes._reconstruction import metric

EXACT = 1e-8  # relative, in double precision


def reader(units: int, size: int = 1, outputs: int = 3, seed: int = 0, price: float = 1.0) -> Reader:
    """A layer with `size` columns a unit, interleaved, and inputs that are correlated."""
    rng = np.random.default_rng(seed)
    width = units * size
    inputs = rng.standard_normal((200, width)) @ rng.standard_normal((width, width)) + 0.1
    columns = [np.arange(unit, width, units) for unit in range(units)]
    return Reader(rng.standard_normal((outputs, width)), inputs.T @ inputs / 200, columns, price)


def lost(of: Reader, gone: list[int]) -> float:
    """Share of the power that the best weights for what is left lose."""
    kept = np.setdiff1d(np.arange(of.matrix.shape[1]), np.concatenate([of.columns[u] for u in gone]))
    root = np.linalg.cholesky(of.metric)  # |(W - W') root|^2
    best = np.linalg.lstsq(root[kept].T, root.T @ of.matrix.T, rcond=None)[0]
    off = root.T @ of.matrix.T - root[kept].T @ best
    return float((off**2).sum() / ((of.matrix @ root) ** 2).sum())


@pytest.mark.parametrize("size", [1, 4])
def test_errors_are_the_residuals_of_least_squares(size):
    of = reader(7, size)
    order, errors = eliminate([of], 7)
    for count in range(1, 7):
        assert errors[count, 0] == pytest.approx(lost(of, order[:count].tolist()), rel=EXACT)


def test_each_step_takes_the_unit_that_costs_least():
    of = reader(6, 2)
    order, _ = eliminate([of], 6)
    gone: list[int] = []
    for unit in order.tolist():
        others = {u: lost(of, [*gone, u]) for u in range(6) if u not in gone}
        assert unit == min(others, key=others.__getitem__)
        gone.append(unit)


def test_readers_are_weighed_by_their_price():
    """Of two layers the one whose errors matter decides."""
    first, second = reader(5, seed=1), reader(5, seed=2)
    dear = Reader(second.matrix, second.metric, second.columns, price=1e6)
    alone, _ = eliminate([second], 5)
    together, errors = eliminate([first, dear], 5)
    np.testing.assert_array_equal(together, alone)
    assert errors.shape == (5, 2)
    assert errors[3, 0] == pytest.approx(lost(first, together[:3].tolist()), rel=EXACT)


def test_compensated_weights_are_the_best():
    of = reader(6, 3)
    gone = np.array([1, 4])
    left = compensated(of, gone)
    assert not left[:, np.concatenate([of.columns[u] for u in gone])].any()
    off = of.matrix - left
    share = np.einsum("nd,de,ne->", off, of.metric, off) / of.power
    assert share == pytest.approx(lost(of, [1, 4]), rel=EXACT)


def test_where_only_the_diagonal_is_known_nothing_is_made_up_for():
    of = reader(5, 2)
    plain = Reader(of.matrix, np.arange(1.0, 11.0), of.columns)
    order, errors = eliminate([plain], 5)
    powers = np.array([(of.matrix[:, c] ** 2 * np.arange(1.0, 11.0)[c]).sum() for c in of.columns])
    np.testing.assert_array_equal(order, np.argsort(powers)[:4])
    np.testing.assert_allclose(errors[:, 0], np.append(0, np.cumsum(np.sort(powers)[:4])) / powers.sum(), rtol=EXACT)


def test_a_unit_that_repeats_another_goes_for_nothing():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((100, 4))
    inputs = np.concatenate([inputs, inputs[:, :1] * 2], axis=1)
    metric = inputs.T @ inputs / 100 + 1e-9 * np.eye(5)
    order, errors = eliminate([Reader(rng.standard_normal((3, 5)), metric, [np.array([u]) for u in range(5)])], 5)
    assert order[0] in (0, 4) and errors[1, 0] < 1e-6 and errors[2, 0] > 1e-3


def test_so_many_stay_as_have_to():
    order, errors = eliminate([reader(6)], 6, least=4)
    assert len(order) == 2 and len(errors) == 3


def test_dead_units_are_free():
    """Nothing reads units 1 and 4, and what units 2 and 6 make never changes: no error, and they go first."""
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((300, 8)) @ rng.standard_normal((8, 8))
    inputs[:, [2, 6]] = 5.0, -3.0
    weights = rng.standard_normal((4, 8))
    weights[:, [1, 4]] = 0
    weights[:, [2, 6]] *= 100
    spread, ridge = metric(inputs.astype(np.float32), inputs.mean(axis=0))
    of = Reader(weights, spread, [np.array([u]) for u in range(8)], ridge=ridge)
    order, errors = eliminate([of], 8)
    assert set(order[:4].tolist()) == {1, 2, 4, 6}
    assert not errors[:5].any() and errors[5, 0] > 1e-3
    with_ridge, _ = eliminate([Reader(weights, spread, of.columns)], 8)
    assert set(with_ridge[:4].tolist()) != {1, 2, 4, 6}
    groups = Groups(Layer(weights[:, :, None, None]), weights, spread, ridge)
    assert groups.lost(np.array([0, 3, 5, 7])) == pytest.approx(0, abs=1e-12)
