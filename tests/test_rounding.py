"""effc.passes._rounding: codes of least output error, against exhaustive search and against rounding to the nearest."""

import itertools

import numpy as np
import pytest

from effc.passes._rounding import lost, round_to_outputs


def metric(size: int, *groups: int, seed: int = 0) -> np.ndarray:
    """Of inputs that go together, as pixels do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*groups, 4 * size, size)) @ (np.eye(size) + rng.uniform(0.2, 1.0, (size, size)))
    return x.swapaxes(-1, -2) @ x / (4 * size) + 1e-6 * np.eye(size)


@pytest.mark.parametrize("groups", [(), (5,)])
@pytest.mark.parametrize(("rows", "size"), [(8, 9), (40, 64), (3, 200)])
def test_never_above_the_nearest_in_any_row_and_far_below_in_all(groups, rows, size):
    h = metric(size, *groups)
    exact = np.random.default_rng(1).standard_normal((*groups, rows, size)) * 30
    codes = round_to_outputs(exact, h, 127)
    nearest = lost(exact, np.rint(exact), h)
    assert np.array_equal(codes, np.rint(codes)) and np.abs(codes).max() <= 127
    assert (lost(exact, codes, h) <= nearest * (1 + 1e-9)).all()
    assert lost(exact, codes, h).sum() < 0.6 * nearest.sum()


def test_close_to_the_best_of_all_roundings():
    """All 2^8 roundings up or down of 30 rows: within half of the least there is; the nearest has four times it."""
    h = metric(8)
    exact = np.random.default_rng(2).standard_normal((30, 8)) * 20
    ways = np.array(list(itertools.product((0.0, 1.0), repeat=8)))
    best = np.array([lost(np.broadcast_to(row, (256, 8)), np.floor(row) + ways, h).min() for row in exact])
    assert lost(exact, round_to_outputs(exact, h, 127), h).sum() <= 1.5 * best.sum()
    assert lost(exact, np.rint(exact), h).sum() >= 4 * best.sum()


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest():
    exact = np.random.default_rng(3).standard_normal((6, 20)) * 10
    assert np.array_equal(round_to_outputs(exact, np.diag(np.arange(1.0, 21.0)), 127), np.rint(exact))


def test_codes_keep_to_their_width():
    h = metric(16)
    codes = round_to_outputs(np.full((2, 16), 63.4), h, 63)
    assert np.abs(codes).max() == 63


def test_groups_are_rounded_as_each_by_itself():
    h = metric(9, 4)
    exact = np.random.default_rng(4).standard_normal((4, 2, 9)) * 25
    apart = np.stack([round_to_outputs(e, one, 127) for e, one in zip(exact, h, strict=True)])
    assert np.array_equal(round_to_outputs(exact, h, 127), apart)
