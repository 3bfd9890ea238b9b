"""effc.passes._reconstruction: chains fitted to data against least squares by NumPy and against theory."""

from typing import Any

import numpy as np
import pytest

from effc.passes import _reconstruction
from effc.passes._factors import Factors, Layer, compose
from effc.passes._filters import Filters
from effc.passes._reconstruction import MOST, RIDGE, Seen, _auxiliary, metric, reconstruct
from effc.passes._separable import Separable


def spread(size: int, seed: int = 1) -> np.ndarray:
    """A root of a covariance whose variances differ a thousandfold."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return basis * np.geomspace(3, 0.1, size)


def gaussian(count: int, root: np.ndarray, mean: float = 1.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, len(root))) @ root.T + mean).astype(np.float32)


def own_ridge(rows: np.ndarray) -> tuple[float, float]:
    """The ridge that `metric` added, as a share of the mean variance, and that variance."""
    mean = float(rows.astype(np.float64).var(axis=0).mean())
    return metric(rows, rows.mean(axis=0))[1] / mean, mean


@pytest.mark.parametrize(("count", "size"), [(25, 60), (200, 60), (1000, 30)])
def test_the_ridge_is_ledoits_and_wolfs(count: int, size: int) -> None:
    """Theirs is (1 - s) S + s m I, here S + s/(1 - s) m I: the same but for its scale, which changes no fit."""
    ledoit_wolf = pytest.importorskip("sklearn.covariance").LedoitWolf
    rows = gaussian(count, spread(size))
    theirs = ledoit_wolf().fit(rows.astype(np.float64))
    share, mean = own_ridge(rows)
    assert RIDGE < share < MOST / (1 - MOST)
    assert share == pytest.approx(theirs.shrinkage_ / (1 - theirs.shrinkage_), rel=1e-3)
    found, ridge = metric(rows, rows.mean(axis=0))
    assert ridge == pytest.approx(share * mean)
    scaled = (1 - theirs.shrinkage_) * found
    np.testing.assert_allclose(scaled, theirs.covariance_, atol=1e-4 * np.abs(theirs.covariance_).max())


def test_the_ridge_is_bounded_on_both_sides() -> None:
    many = gaussian(60_000, spread(12))
    assert own_ridge(many)[0] == pytest.approx(RIDGE, rel=1e-4)
    alike = np.random.default_rng(0).normal(size=(500, 40)).astype(np.float32)
    assert own_ridge(alike)[0] == pytest.approx(MOST / (1 - MOST), rel=1e-4)


def test_without_its_ridge_it_is_numpys_covariance() -> None:
    rows = gaussian(300, spread(20), mean=50)
    found, ridge = metric(rows, rows.mean(axis=0))
    expected = np.cov(rows.astype(np.float64).T, bias=True)
    np.testing.assert_allclose(found - ridge * np.eye(20), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("count", [15, 40, 120])
def test_of_few_samples_it_is_closer_to_the_truth_than_what_was_counted(count: int) -> None:
    """Up to scale: both are brought to the trace of the truth."""
    root = spread(60)
    truth = root @ root.T
    rows = gaussian(count, root)

    def off(found: np.ndarray) -> float:
        return float(np.linalg.norm(found * np.trace(truth) / np.trace(found) - truth))

    assert off(metric(rows, rows.mean(axis=0))[0]) < 0.98 * off(np.cov(rows.astype(np.float64).T, bias=True))


def test_inputs_that_never_change_are_no_trouble() -> None:
    found, ridge = metric(np.full((10, 4), 3, np.float32), np.full(4, 3.0))
    assert ridge > 0
    np.linalg.cholesky(found)


SIZE, OUTPUTS = 36, 20


def layer(seed: int = 2) -> tuple[Layer, np.ndarray]:
    """A layer of 4 x 3 x 3 inputs, and a bias."""
    rng = np.random.default_rng(seed)
    return Layer(rng.normal(size=(OUTPUTS, 4, 3, 3)) / 6), rng.normal(size=OUTPUTS)


def seen_by(
    of: Layer, bias: np.ndarray, count: int, drift: float = 0.0, shortcut: bool = False, **options: Any
) -> Seen:
    """What a layer wants to make of some inputs, and inputs that are off by a `drift` that is no noise alone."""
    rng = np.random.default_rng(5)
    x = gaussian(count, spread(SIZE), mean=0.5)
    turn = np.eye(SIZE) + drift * rng.normal(size=(SIZE, SIZE)) / SIZE**0.5
    seen = x @ turn.T + drift * (0.5 + rng.normal(size=x.shape))
    wanted = x @ of.matrix.T + bias
    added = None
    if shortcut:
        other = np.maximum(rng.normal(size=wanted.shape), 0)
        wanted = wanted + other
        added = (other * (1 - drift) + drift * rng.normal(size=other.shape)).astype(np.float32)
    return Seen(seen.astype(np.float32), wanted.astype(np.float32), added, **options)


def matrix(factors: Factors) -> np.ndarray:
    return compose(factors).reshape(OUTPUTS, -1)


def made(fitted: tuple[Factors, np.ndarray], seen: Seen) -> np.ndarray:
    """What stands before the activation."""
    factors, bias = fitted
    return seen.patches @ matrix(factors).T + bias + (0 if seen.added is None else seen.added)


@pytest.mark.parametrize("count", [12, 100, 5000])
@pytest.mark.parametrize("shortcut", [False, True])
def test_of_full_rank_the_layer_comes_back(count: int, shortcut: bool) -> None:
    """However few samples there are: what they do not say is held to the weights."""
    of, bias = layer()
    seen = seen_by(of, bias, count, shortcut=shortcut)
    factors, found = reconstruct(of, Filters, {"rank": OUTPUTS}, seen)
    np.testing.assert_allclose(matrix(factors), of.matrix, atol=1e-4 * np.abs(of.matrix).max())
    np.testing.assert_allclose(found, bias, atol=1e-4)
    factors, found = reconstruct(of, Separable, {"rank": 12}, seen)
    np.testing.assert_allclose(compose(factors), of.weight, atol=1e-4 * np.abs(of.weight).max())


def reduced_rank_regression(of: Layer, seen: Seen, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """By one SVD of the fitted values; that weights are held to what they were is rows of data as well."""
    ridge = metric(seen.patches, seen.mean)[1]
    x, y = seen.patches.astype(np.float64), seen.target.astype(np.float64)
    held = np.sqrt(len(x) * ridge)
    inputs = np.vstack([x - x.mean(axis=0), held * np.eye(SIZE)])
    outputs = np.vstack([y - y.mean(axis=0), held * of.matrix.T])
    full = np.linalg.lstsq(inputs, outputs)[0]
    directions = np.linalg.svd(inputs @ full, full_matrices=False)[2][:rank]
    best = (full @ directions.T @ directions).T
    return best, y.mean(axis=0) - best @ x.mean(axis=0)


@pytest.mark.parametrize("count", [30, 3000])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("rank", [3, 12, OUTPUTS])
def test_drifted_inputs_are_made_up_for_as_by_reduced_rank_regression(count: int, shortcut: bool, rank: int) -> None:
    of, bias = layer()
    seen = seen_by(of, bias, count, drift=0.4, shortcut=shortcut, low=0.0)
    factors, found = reconstruct(of, Filters, {"rank": rank}, seen, nonlinear=False)
    expected, shift = reduced_rank_regression(of, seen, rank)
    np.testing.assert_allclose(matrix(factors), expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(found, shift, atol=1e-3 * np.abs(shift).max())
    assert np.linalg.matrix_rank(matrix(factors), tol=1e-6) == rank


def test_drifted_inputs_are_made_up_for_better_than_by_the_layer_itself() -> None:
    of, bias = layer()
    seen = seen_by(of, bias, 3000, drift=0.4, shortcut=True)
    fitted = made(reconstruct(of, Filters, {"rank": OUTPUTS}, seen), seen)
    own = seen.patches @ of.matrix.T + bias + seen.added
    assert np.mean((fitted - seen.wanted) ** 2) < 0.5 * np.mean((own - seen.wanted) ** 2)


def test_of_patches_too_wide_for_a_covariance_the_mean_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reconstruction, "WIDEST", SIZE - 1)
    of, bias = layer()
    seen = seen_by(of, bias, 300, drift=0.4, shortcut=True, low=0.0)
    fitted = reconstruct(of, Filters, {"rank": 5}, seen)
    left, values, right = np.linalg.svd(of.matrix, full_matrices=False)
    np.testing.assert_allclose(matrix(fitted[0]), left[:, :5] * values[:5] @ right[:5], atol=1e-10)
    np.testing.assert_allclose((made(fitted, seen) - seen.wanted).mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("rank", [4, OUTPUTS])
def test_without_an_activation_means_are_kept(nonlinear: bool, rank: int) -> None:
    of, bias = layer()
    seen = seen_by(of, bias, 500, drift=0.3, shortcut=True)
    off = made(reconstruct(of, Filters, {"rank": rank}, seen, nonlinear=nonlinear), seen) - seen.wanted
    np.testing.assert_allclose(off.mean(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("count", [12, 100, 5000])
def test_of_full_rank_the_layer_comes_back_through_an_activation_too(count: int) -> None:
    of, bias = layer()
    factors, _ = reconstruct(of, Filters, {"rank": OUTPUTS}, seen_by(of, bias, count, low=0.0))
    np.testing.assert_allclose(matrix(factors), of.matrix, atol=1e-3 * np.abs(of.matrix).max())


@pytest.mark.parametrize("nonlinear", [False, True])
def test_without_a_bias_means_are_part_of_what_is_fitted(nonlinear: bool) -> None:
    """Reduced-rank regression of what is not centred; its error is that of NumPy's, whatever the mean."""
    of, _ = layer()
    seen = seen_by(of, np.zeros(OUTPUTS), 3000, biased=False)
    factors, bias = reconstruct(of, Filters, {"rank": 4}, seen, nonlinear=nonlinear)
    assert not bias.any()
    values = np.linalg.svd(seen.wanted.astype(np.float64), compute_uv=False)
    off = seen.patches @ matrix(factors).T - seen.wanted
    assert np.sum(off.astype(np.float64) ** 2) == pytest.approx(np.sum(values[4:] ** 2), rel=1e-2)


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 1.5), (-np.inf, 0.5), (-0.5, 0.5)])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_behind_an_activation_the_fit_through_it_is_closer(
    low: float, high: float, shortcut: bool, drift: float
) -> None:
    of, bias = layer()
    seen = seen_by(of, bias - 0.5, 4000, drift=drift, shortcut=shortcut, low=low, high=high)
    off = {}
    for nonlinear in (False, True):
        cut = np.clip(made(reconstruct(of, Filters, {"rank": 4}, seen, nonlinear=nonlinear), seen), low, high)
        off[nonlinear] = np.mean((cut - np.clip(seen.wanted, low, high)) ** 2)
    assert off[True] < 0.995 * off[False]


@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 6.0), (-np.inf, 1.0), (-1.0, 1.0), (-np.inf, np.inf)])
@pytest.mark.parametrize("weight", [0.01, 1.0, 50.0])
def test_theauxiliary_is_the_minimum_over_a_grid(low: float, high: float, weight: float) -> None:
    rng = np.random.default_rng(7)
    made = rng.normal(scale=4, size=(20, 15)).astype(np.float32)
    wanted = np.clip(rng.normal(scale=4, size=made.shape), low, high).astype(np.float32)

    def cost(z: np.ndarray) -> np.ndarray:
        off = z - made.astype(np.float64)[..., None]
        return (wanted.astype(np.float64)[..., None] - np.clip(z, low, high)) ** 2 + weight * off**2

    step = 0.01
    least = cost(np.arange(-20, 20 + step, step)).min(axis=-1)
    found = cost(_auxiliary(made, wanted, weight, low, high).astype(np.float64)[..., None])[..., 0]
    np.testing.assert_array_less(found, least + 1e-4)
    # Between two points of the grid the cost, a parabola of curvature 1 + weight, falls by so much at most.
    np.testing.assert_array_less(least, found + (1 + weight) * step**2 / 4 + 1e-4)
