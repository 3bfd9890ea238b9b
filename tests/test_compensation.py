"""effc.passes._compensation: least squares under a mask, columns in turn, masks chosen on the way."""

import numpy as np
import pytest

from effc.passes import _compensation
from effc.passes._compensation import compensate, in_turn, lost
from effc.passes._prunable import best_of, counts, fewest, next_share

RNG = np.random.default_rng(0)
CAUSES = RNG.normal(size=(400, 10)) @ RNG.normal(size=(10, 24)) + 0.3 * RNG.normal(size=(400, 24))
METRIC = CAUSES.T @ CAUSES / 400
WEIGHT = RNG.normal(size=(7, 24))
KEPT = RNG.random((7, 24)) < 0.4


def test_each_row_is_its_own_least_squares():
    """Against numpy's lstsq, to 1e-8."""
    made = compensate(WEIGHT, KEPT, METRIC)
    for row in range(7):
        best = np.linalg.lstsq(CAUSES[:, KEPT[row]], CAUSES @ WEIGHT[row], rcond=None)[0]
        assert np.abs(made[row, KEPT[row]] - best).max() <= 1e-8 and not made[row, ~KEPT[row]].any()


def test_one_weight_removed_is_made_up_for_as_optimal_brain_surgeon_says():
    """w - w_q / [H^-1]_qq H^-1_q: (Hassibi and Stork 1993, equation 5), and what it costs, to 1e-9."""
    kept = np.ones((1, 24), bool)
    kept[0, 5] = False
    inverse = np.linalg.inv(METRIC)
    wanted = WEIGHT[:1] - WEIGHT[0, 5] / inverse[5, 5] * inverse[5]
    made = compensate(WEIGHT[:1], kept, METRIC)
    assert np.abs(made - wanted).max() <= 1e-9
    power = float(np.sum((WEIGHT[:1] @ METRIC) * WEIGHT[:1]))
    assert lost(WEIGHT[:1], made, METRIC) == pytest.approx(WEIGHT[0, 5] ** 2 / inverse[5, 5] / power, rel=1e-9)


@pytest.mark.parametrize("block", [4, 8, 128])
def test_columns_in_turn_lie_between_the_best_and_none(block, monkeypatch):
    """However they are blocked the result is one and the same, to 1e-9; the first column's removal is exact."""
    whole = in_turn(WEIGHT, METRIC, lambda _, columns: KEPT[:, columns])[0]
    monkeypatch.setattr(_compensation, "BLOCK", block)
    made, kept = in_turn(WEIGHT, METRIC, lambda _, columns: KEPT[:, columns])
    assert np.array_equal(kept, KEPT) and not made[~KEPT].any() and np.abs(made - whole).max() <= 1e-9
    errors = [lost(WEIGHT, each, METRIC) for each in (compensate(WEIGHT, KEPT, METRIC), made, WEIGHT * KEPT)]
    assert errors[0] < errors[1] < errors[2]


def test_rows_that_would_take_too_long_are_done_in_turn(monkeypatch):
    monkeypatch.setattr(_compensation, "EXACT", 0)
    made = compensate(WEIGHT, KEPT, METRIC)
    assert np.array_equal(made, in_turn(WEIGHT, METRIC, lambda _, columns: KEPT[:, columns])[0])


def test_masks_chosen_on_the_way_lose_less_on_that_way():
    """Half of the weights, columns in turn: chosen by what cannot be made up for, against by size."""
    size = fewest([np.abs(WEIGHT)], WEIGHT.size // 2)[0]
    own, kept = in_turn(WEIGHT, METRIC, lambda scores, _: fewest([scores], scores.size // 2)[0])
    other = in_turn(WEIGHT, METRIC, lambda _, columns: size[:, columns])[0]
    assert kept.sum() == size.sum()
    assert lost(WEIGHT, own, METRIC) < lost(WEIGHT, other, METRIC)


def test_the_fewest_of_several_arrays_and_of_equals_the_first():
    kept = fewest([np.array([3.0, 1.0, 1.0]), np.array([[1.0, 5.0]])], 2)
    assert kept[0].tolist() == [True, False, False] and kept[1].tolist() == [[True, True]]
    assert all(each.all() for each in fewest([np.ones(3)], 0)) and not fewest([np.ones(3)], 3)[0].any()


def test_the_best_of_every_four_is_the_best_mask_there_is():
    """Against all masks of two in four, by brute force."""
    scores = RNG.random((3, 8, 2))
    kept = best_of(scores, 1, 2, 4)
    groups = np.moveaxis(scores * kept, 1, -1).reshape(-1, 4).sum(1)
    every = np.moveaxis(scores, 1, -1).reshape(-1, 4)
    most = np.max([every[:, a] + every[:, b] for a in range(4) for b in range(a)], axis=0)
    assert np.allclose(groups, most, rtol=0, atol=1e-15) and (np.moveaxis(kept, 1, -1).reshape(-1, 4).sum(1) == 2).all()


def test_the_share_of_the_next_round_is_read_off_the_zeros():
    steps = [0.9 * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)]
    zeros = [0, int(steps[0] * 1000), int(steps[0] * 1000) + 50, int(steps[1] * 1000), 900, 950]
    assert [next_share(0.9, 3, z, 1000) for z in zeros] == [*steps[:2], steps[1], steps[2], 0.9, 0.9]
    assert counts([], {}, share=0.5, rounds=1, together=True) == {}
