"""effc.passes._filters and ._factors: against truncated SVDs, the theory's errors, convolutions of others."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.signal import convolve2d

from effc.passes._factors import LEAST, Factor, Factors, Layer, Method, compose, error, features, macs, refit
from effc.passes._filters import Filters, Filters3d
from effc.passes._separable import Separable

KNOWN = pytest.mark.parametrize("known", [False, True])


def layer(*shape: int, seed: int = 0, **where: tuple[int, ...]) -> Layer:
    return Layer(np.random.default_rng(seed).normal(size=shape), **where)


def correlated(of: Layer, rank: int | None = None) -> np.ndarray:
    """Eigenvalues over three decades, in a random basis; those beyond the rank are 0."""
    size = of.inputs * of.taps
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))
    powers = np.logspace(0, -3, size) * (np.arange(size) < (rank or size))
    return basis * powers @ basis.T


def covariance(of: Layer, known: bool) -> np.ndarray | None:
    return correlated(of) if known else None


def power(matrix: np.ndarray, spread: np.ndarray | None) -> float:
    return float(np.trace(matrix @ (np.eye(matrix.shape[1]) if spread is None else spread) @ matrix.T))


def singular_values(of: Layer, spread: np.ndarray | None) -> np.ndarray:
    """Of W S^(1/2)."""
    return np.linalg.svd(of.matrix if spread is None else of.matrix @ np.real(sqrtm(spread)), compute_uv=False)


def run(factors: Factors, x: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    y = torch.from_numpy(x)
    for each in factors:
        top, left, bottom, right = each.pads
        y = torch.nn.functional.pad(y, (left, right, top, bottom))
        weight = torch.from_numpy(np.array(each.weight, np.float64))
        y = torch.nn.functional.conv2d(y, weight, None, each.strides, 0, each.dilations, each.groups)
    return y.numpy()


# --- filters --------------------------------------------------------------------------------------------------------


@KNOWN
@pytest.mark.parametrize("shape", [(10, 4, 3, 3), (30, 2, 3, 3), (8, 6, 1, 5), (12, 9, 1, 1)])
def test_the_full_rank_is_exact(shape, known):
    of = layer(*shape)
    made = Filters(of, covariance(of, known)).fit({"rank": min(of.outputs, of.matrix.shape[1])})
    assert np.abs(compose(made) - of.weight).max() <= 1e-10 * np.abs(of.weight).max()


@KNOWN
@pytest.mark.parametrize("rank", [1, 3, 7, 11])
def test_the_error_is_that_of_the_dropped_singular_values(rank, known):
    """Eckart and Young (1936) for W S^(1/2): exact but for the rounding of eigenvalues, 1e-9 of the whole."""
    of = layer(12, 5, 3, 2)
    spread = covariance(of, known)
    values = singular_values(of, spread)
    off = of.matrix - compose(Filters(of, spread).fit({"rank": rank})).reshape(12, -1)
    assert power(off, spread) == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-8, abs=1e-9 * np.sum(values**2))


@KNOWN
def test_errors_are_those_of_what_is_fitted_and_fall_with_the_rank(known):
    of = layer(14, 3, 3, 3)
    method = Filters(of, covariance(of, known))
    settings = [{"rank": rank} for rank in range(1, 15)]
    found = method.errors(settings)
    fitted = [error(of, method.fit(setting), method.covariance) for setting in settings]
    np.testing.assert_allclose(found, fitted, rtol=1e-8, atol=1e-12)
    assert all(after < before for before, after in pairwise(found)) and found[-1] <= 1e-12
    assert method.errors(settings[::-1]) == found[::-1]


@KNOWN
@pytest.mark.parametrize("rank", [1, 4])
def test_no_other_chain_of_the_rank_is_better(rank, known):
    """Tried: chains nearby and any inner filters, each with the last factor that is best for it."""
    of, rng = layer(9, 4, 3, 3), np.random.default_rng(2)
    spread = covariance(of, known)
    inner, last = Filters(of, spread).fit({"rank": rank})
    least = error(of, (inner, last), spread)
    for far in [*np.repeat([1e-3, 1e-2, 1e-1, 1.0], 10), np.inf]:
        moved = rng.normal(size=inner.weight.shape)
        weight = moved if np.isinf(far) else inner.weight + far * moved
        other = refit(of, (of.whole(weight), last), spread)
        assert error(of, other, spread) >= least * (1 - 1e-9)
        assert error(of, (inner, Factor(last.weight + 1e-3 * rng.normal(size=last.weight.shape))), spread) > least


def test_what_patches_do_not_excite_is_free():
    """Inputs of 3 directions need no more than 3 filters, whatever the weights."""
    of = layer(16, 4, 3, 3)
    spread = correlated(of, rank=3)
    aware, plain = (Filters(of, known).fit({"rank": 3}) for known in (spread, None))
    assert error(of, aware, spread) <= 1e-9 < 0.01 < error(of, plain, spread)


def test_a_dense_layer_gets_the_truncated_svd():
    of = layer(20, 30, 1, 1)
    u, s, t = np.linalg.svd(of.weight[:, :, 0, 0], full_matrices=False)
    for rank in (1, 6, 19):
        made = compose(Filters(of).fit({"rank": rank}))[:, :, 0, 0]
        np.testing.assert_allclose(made, u[:, :rank] * s[:rank] @ t[:rank], rtol=0, atol=1e-12 * s[0])


def test_filters_stand_where_the_layer_stood():
    of = layer(10, 4, 3, 5, strides=(2, 3), dilations=(2, 1), pads=(2, 1, 3, 0))
    inner, last = Filters(of, correlated(of)).fit({"rank": 4})
    assert (inner.weight.shape, last.weight.shape) == ((4, 4, 3, 5), (10, 4, 1, 1))
    assert (inner.strides, inner.dilations, inner.pads) == (of.strides, of.dilations, of.pads)
    assert (last.strides, last.dilations, last.pads) == ((1, 1), (1, 1), (0, 0, 0, 0))


@pytest.mark.parametrize("step", [1, 4, 8])
@pytest.mark.parametrize("shape", [(48, 16, 3, 3), (24, 40, 1, 1), (10, 3, 3, 3)])
def test_settings_are_multiples_that_save(shape, step):
    of = layer(*shape, strides=(2, 2))
    method = Filters(of)
    ranks = [setting["rank"] for setting in method.settings(step)]
    each = of.matrix.shape[1] + shape[0]  # multiply-accumulates for a rank
    saving = [r for r in range(step, min(shape[0], of.matrix.shape[1]) + 1, step) if r * each < of.weight.size]
    assert ranks == sorted(set(ranks) & set(saving)) and ranks[-1:] == saving[-1:]
    assert [macs(method.skeleton({"rank": r})) for r in ranks] == [r * each for r in ranks]


def test_no_rank_is_offered_where_none_saves():
    assert list(Filters(layer(2, 2, 1, 1)).settings(1)) == []
    assert list(Filters(layer(16, 16, 3, 3)).settings(16)) == []  # 16 x (144 + 16) is more than 16 x 144


@KNOWN
@pytest.mark.parametrize("rank", [0, 3, 10])
def test_wide_layers_are_decomposed_as_far_as_needed(monkeypatch, rank, known):
    """In single precision, and only the directions that are kept: the same approximation, to 1e-5."""
    of = layer(10, 4, 3, 3)
    whole = Filters(of, covariance(of, known))
    expected, errors = compose(whole.fit({"rank": rank})), whole.errors([{"rank": r} for r in range(11)])
    monkeypatch.setattr("effc.passes._filters.WIDE", 4)
    wide = Filters(of, covariance(of, known))
    np.testing.assert_allclose(compose(wide.fit({"rank": rank})), expected, atol=1e-5 * np.abs(of.matrix).max())
    np.testing.assert_allclose(wide.errors([{"rank": r} for r in range(11)]), errors, atol=1e-6)


# --- filters in three parts -----------------------------------------------------------------------------------------


@KNOWN
def test_full_ranks_of_three_parts_are_exact(known):
    of = layer(9, 4, 3, 2)
    made = Filters3d(of, covariance(of, known)).fit({"rank": 9, "inner": 12})
    assert np.abs(compose(made) - of.weight).max() <= 1e-8 * np.abs(of.weight).max()


@KNOWN
@pytest.mark.parametrize("inner", [2, 6])
def test_the_error_of_three_parts_is_the_sum_of_both_cuts(inner, known):
    """Both cuts are at right angles (Pythagoras): what filters leave out, and what their splitting leaves out."""
    of = layer(12, 5, 3, 3)
    spread = covariance(of, known)
    first, _ = Filters(of, spread).fit({"rank": 5})
    chain = Filters3d(of, spread).fit({"rank": 5, "inner": inner})
    split = Separable(Layer(first.weight), spread).fit({"rank": inner})
    dropped = np.sum(singular_values(of, spread)[5:] ** 2)
    off = (first.weight - compose(split)).reshape(5, -1)
    whole = power(of.matrix, spread)
    assert error(of, chain, spread) == pytest.approx((dropped + power(off, spread)) / whole, rel=1e-6)


@KNOWN
def test_more_of_either_rank_is_less_error(known):
    of = layer(10, 4, 3, 3)
    method = Filters3d(of, covariance(of, known))
    for grid in ([(rank, 12) for rank in range(1, 11)], [(6, inner) for inner in range(1, 13)]):
        errors = [error(of, method.fit({"rank": r, "inner": i}), method.covariance) for r, i in grid]
        assert all(after < before * (1 + 1e-6) for before, after in pairwise(errors)), errors
        assert errors[-1] < 0.7 * errors[0]


def test_three_parts_do_what_their_kernel_does():
    of = layer(9, 4, 3, 5, strides=(2, 3), dilations=(2, 1), pads=(2, 1, 3, 0))
    for spread in (None, correlated(of)):
        chain = Filters3d(of, spread).fit({"rank": 5, "inner": 6})
        assert [f.weight.shape for f in chain] == [(6, 4, 3, 1), (5, 6, 1, 5), (9, 5, 1, 1)]
        assert [f.strides for f in chain] == [(2, 1), (1, 3), (1, 1)]
        assert [f.pads for f in chain] == [(2, 0, 3, 0), (0, 1, 0, 0), (0, 0, 0, 0)]
        x = np.random.default_rng(3).normal(size=(2, 4, 17, 19))
        np.testing.assert_allclose(run(chain, x), run((of.whole(compose(chain)),), x), rtol=0, atol=1e-10)
        skeleton = Filters3d(of, spread).skeleton({"rank": 5, "inner": 6})
        assert [(f.weight.shape, f.strides, f.pads) for f in skeleton] == [
            (f.weight.shape, f.strides, f.pads) for f in chain
        ]


@pytest.mark.parametrize("step", [1, 4, 8])
def test_settings_of_three_parts_save_and_cut_both_alike(step):
    of = layer(64, 32, 3, 3)
    method = Filters3d(of)
    found = list(method.settings(step))
    costs = [macs(method.skeleton(setting)) for setting in found]
    assert len(found) >= 3 and costs == sorted(costs) and costs[-1] < of.weight.size
    assert all(value % step == 0 for setting in found for value in setting.values())
    assert len({setting["rank"] for setting in found}) == len(found)
    assert costs == [s["inner"] * (32 * 3 + s["rank"] * 3) + s["rank"] * 64 for s in found]


def test_kernels_of_one_row_are_refused():
    for kernel in ((1, 1), (1, 5), (3, 1)):
        said = f"the kernel is {kernel[0]} x {kernel[1]}: with a side of 1 there are no columns and rows to separate"
        assert Filters3d.refusal(layer(8, 8, *kernel)) == said
        assert Filters.refusal(layer(8, 8, *kernel)) is None
    assert Filters3d.refusal(layer(8, 8, 2, 2)) is None


# --- chains ---------------------------------------------------------------------------------------------------------


def composed(factors: Factors) -> np.ndarray:
    """By SciPy, output by output and input by input."""
    kernel = np.eye(factors[0].weight.shape[1] * factors[0].groups)[:, :, None, None]
    for factor in factors:
        n, inner, a, b = factor.weight.shape
        each = n // factor.groups
        made = np.zeros((n, kernel.shape[1], a + kernel.shape[2] - 1, b + kernel.shape[3] - 1))
        for o, m, c in np.ndindex(n, inner, kernel.shape[1]):
            made[o, c] += convolve2d(factor.weight[o, m], kernel[o // each * inner + m, c])
        kernel = made
    return kernel


def chain_of(*parts: tuple[tuple[int, ...], int]) -> Factors:
    rng = np.random.default_rng(4)
    return tuple(Factor(rng.normal(size=shape), groups) for shape, groups in parts)


CHAINS = [
    chain_of(((5, 4, 3, 1), 1), ((6, 5, 1, 3), 1), ((7, 6, 1, 1), 1)),
    chain_of(((8, 1, 3, 3), 4), ((7, 8, 1, 1), 1)),
    chain_of(((6, 4, 1, 1), 1), ((6, 2, 3, 2), 3), ((6, 1, 2, 2), 6), ((3, 6, 1, 1), 1)),
    chain_of(((4, 3, 2, 3), 1)),
]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_composes_to_what_scipy_and_torch_make_of_it(chain):
    kernel = compose(chain)
    np.testing.assert_allclose(kernel, composed(chain), rtol=0, atol=1e-12 * np.abs(kernel).max())
    x = np.random.default_rng(5).normal(size=(2, kernel.shape[1], 9, 8))
    np.testing.assert_allclose(run((Factor(kernel),), x), run(chain, x), rtol=0, atol=1e-11 * np.abs(kernel).max())
    last = chain[-1].weight.reshape(len(kernel), -1)
    np.testing.assert_allclose(last @ features(chain), kernel.reshape(len(kernel), -1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("chain", [*CHAINS[:2], CHAINS[3]])
@pytest.mark.parametrize("rank", [None, 3])
def test_refit_is_least_squares_and_never_worse(chain, rank):
    """Against numpy.linalg.lstsq on the roots; also where inputs move in 3 directions only."""
    kernel = compose(chain)
    of = layer(*kernel.shape)
    spread, root = correlated(of, rank), np.real(sqrtm(correlated(of, rank)))
    again = refit(of, chain, spread)
    solved, *_ = np.linalg.lstsq((features(chain) @ root).T, (of.matrix @ root).T)
    best = power(of.matrix - solved.T @ features(chain), spread) / power(of.matrix, spread)
    assert error(of, again, spread) <= min(error(of, chain, spread), best + 1e-6)
    assert all(a is b for a, b in zip(again[:-1], chain[:-1], strict=True))
    exact = Layer(kernel)
    assert error(exact, refit(exact, chain, spread), spread) <= 1e-18


def test_macs_count_positions_before_a_stride():
    """By hand, for one position behind the whole chain: 2 x 3 of what the first makes, 3 of what the second makes."""
    of = layer(8, 4, 3, 5, strides=(2, 3))
    assert macs([of.whole(of.weight)]) == 8 * 4 * 15
    assert macs(Filters3d(of).skeleton({"rank": 5, "inner": 6})) == 3 * (6 * 4 * 3) + 5 * 6 * 5 + 8 * 5
    first, last = Factor(np.zeros((6, 2, 1, 1)), 2), Factor(np.zeros((5, 6, 3, 3)), 1, (2, 2))
    assert macs([first, last]) == 4 * 6 * 2 + 5 * 6 * 9


class Estimated(Filters):
    """Filters whose errors are estimated as those of most methods are."""

    fitted = 0
    errors = Method.errors

    def fit(self, setting):
        self.fitted += 1
        return super().fit(setting)


@KNOWN
def test_errors_between_fitted_ones_lie_between_theirs(known):
    of = layer(24, 6, 3, 3)
    settings = [{"rank": rank} for rank in (9, 1, 20, 4, 13, 16, 2)]
    exact, method = Filters(of, covariance(of, known)).errors(settings), Estimated(of, covariance(of, known))
    found = dict(zip((s["rank"] for s in settings), method.errors(settings), strict=True))
    true = dict(zip((s["rank"] for s in settings), exact, strict=True))
    assert method.fitted == 3
    for rank in (1, 9, 20):  # the first, the middle one and the last
        assert found[rank] == pytest.approx(true[rank], rel=1e-6)
    assert all(found[1] > found[r] > found[9] for r in (2, 4)) and all(
        found[9] > found[r] > found[20] for r in (13, 16)
    )
    slope = np.log(found[9] / found[1]) / 8  # macs rise with the rank
    assert found[4] == pytest.approx(found[1] * np.exp(3 * slope), rel=1e-9)


def test_one_setting_alone_is_fitted():
    of = layer(6, 3, 3, 3)
    method = Estimated(of)
    assert method.errors([{"rank": 2}]) == pytest.approx(Filters(of).errors([{"rank": 2}])) and method.fitted == 1


def test_an_exact_rank_does_not_make_those_before_it_look_free():
    """A matrix of rank 8: the trend from rank 1 to it must not fall to rounding on the way."""
    rng = np.random.default_rng(3)
    thin = rng.normal(size=(24, 8)) @ rng.normal(size=(8, 54))
    method = Estimated(Layer(thin.reshape(24, 6, 3, 3)))
    settings = [{"rank": rank} for rank in (1, 4, 6, 8, 12, 16)]
    true = Filters(method.layer).errors(settings)
    found = method.errors(settings)
    assert found[0] == pytest.approx(true[0]) and max(found[-1], true[3]) < 1e-12  # as fitted, and as planted
    assert true[2] > 0.05 and min(found[1], found[2]) > LEAST
