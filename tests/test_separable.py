"""effc.passes._separable: exact where it should be, as good as theory allows, and chains do what their kernels do."""

from itertools import pairwise

import numpy as np
import pytest

from effc.passes._factors import Factor, Layer, compose, error, features, macs, refit
from effc.passes._separable import Separable, SeparableBasis, cp

METHODS = [(Separable, "rank"), (SeparableBasis, "basis")]


def layer(n: int, c: int, kh: int, kw: int, seed: int = 0, **options: tuple[int, ...]) -> Layer:
    return Layer(np.random.default_rng(seed).normal(size=(n, c, kh, kw)), **options)


def correlated(of: Layer, seed: int = 1, rank: int | None = None, floor: float = 1e-3) -> np.ndarray:
    """A covariance of patches that live mostly in a subspace."""
    size = of.inputs * of.taps
    root = np.random.default_rng(seed).normal(size=(size, rank or size // 3)) * np.linspace(3, 0.1, rank or size // 3)
    return root @ root.T / size + floor * np.eye(size)


def convolve(factors: tuple[Factor, ...], x: np.ndarray, single: bool = False) -> np.ndarray:
    torch = pytest.importorskip("torch")
    kind = torch.float32 if single else torch.float64
    y = torch.from_numpy(x).to(kind)
    for each in factors:
        top, left, bottom, right = each.pads
        y = torch.nn.functional.pad(y, (left, right, top, bottom))
        weight = torch.from_numpy(np.ascontiguousarray(each.weight)).to(kind)
        y = torch.nn.functional.conv2d(y, weight, None, each.strides, 0, each.dilations, each.groups)
    return y.numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("method", "setting"), [(Separable, {"rank": 15}), (SeparableBasis, {"basis": 15})])
@pytest.mark.parametrize("known", [False, True])
def test_the_full_rank_is_exact(method: type, setting: dict, known: bool) -> None:
    of = layer(9, 5, 3, 5, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 3))
    chain = method(of, correlated(of) if known else None).fit(setting)
    assert error(of, chain) <= 1e-20
    x = np.random.default_rng(3).normal(size=(2, 5, 17, 19))
    assert relative(convolve(chain, x, single=True), convolve((of.whole(of.weight),), x)) <= 1e-5


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_columns_and_rows_are_off_by_the_dropped_singular_values(rank: int) -> None:
    of = layer(7, 6, 3, 4)
    rows = [[of.weight[n, c, i, j] for n in range(7) for j in range(4)] for c in range(6) for i in range(3)]
    dropped = np.linalg.svd(np.array(rows), compute_uv=False)[rank:]
    assert error(of, Separable(of).fit({"rank": rank})) * np.sum(of.weight**2) == pytest.approx(
        np.sum(dropped**2), rel=1e-10
    )


@pytest.mark.parametrize(("method", "name"), METHODS)
@pytest.mark.parametrize("known", [False, True])
def test_more_rank_is_less_error(method: type, name: str, known: bool) -> None:
    of = layer(12, 4, 3, 3)
    covariance = correlated(of) if known else None
    errors = [error(of, method(of, covariance).fit({name: rank}), covariance) for rank in range(1, 10)]
    assert all(after < before for before, after in pairwise(errors)), errors


@pytest.mark.parametrize(("method", "name"), METHODS)
@pytest.mark.parametrize("known", [False, True])
def test_the_chain_does_what_its_kernel_does(method: type, name: str, known: bool) -> None:
    of = layer(6, 4, 3, 5, strides=(2, 3), dilations=(2, 1), pads=(2, 1, 3, 0))
    covariance = correlated(of) if known else None
    chain = method(of, covariance).fit({name: 3})
    assert 1e-3 < error(of, chain, covariance) < 1
    x = np.random.default_rng(4).normal(size=(2, 4, 23, 21))
    assert relative(convolve(chain, x), convolve((of.whole(compose(chain)),), x)) <= 1e-12
    assert relative(convolve(chain, x, single=True), convolve((of.whole(compose(chain)),), x)) <= 1e-5


@pytest.mark.parametrize(("method", "name"), METHODS)
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("floor", [1.0, 1e-3, 0.0])
def test_knowing_the_inputs_never_harms(method: type, name: str, rank: int, floor: float) -> None:
    of = layer(8, 6, 3, 3)
    covariance = correlated(of, floor=floor)
    plain, fitted = method(of).fit({name: rank}), method(of, covariance).fit({name: rank})
    assert error(of, fitted, covariance) < error(of, plain, covariance)
    assert error(of, fitted) > error(of, plain)  # what is bought with it


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_inputs_of_few_directions_need_little_rank(method: type, name: str) -> None:
    of = layer(16, 8, 3, 3)
    covariance = correlated(of, rank=3, floor=1e-6)
    plain, fitted = (error(of, method(of, known).fit({name: 2}), covariance) for known in (None, covariance))
    assert fitted < 0.05 * plain


def test_whitening_finds_the_best_where_strips_do_not_correlate() -> None:
    """The covariance is then that of a strip at each offset: what is lost is the dropped part of the whitened SVD."""
    of = layer(7, 4, 3, 3)
    root = np.random.default_rng(7).normal(size=(12, 12)) * np.linspace(3, 0.1, 12)
    covariance = np.kron(root @ root.T, np.eye(3))
    method = Separable(of, covariance)
    dropped = np.linalg.svd(root.T @ method._matrix, compute_uv=False)[5:]
    power = np.sum((of.matrix @ covariance) * of.matrix)
    basis = method._whitened[:, :5]
    for chain in (method._chain(method._matrix @ basis, basis.T), method.fit({"rank": 5})):
        assert error(of, chain, covariance) * power == pytest.approx(np.sum(dropped**2), rel=1e-8)


def test_alternating_is_better_than_either_start() -> None:
    of = layer(10, 8, 3, 3)
    covariance = correlated(of)
    method = Separable(of, covariance)
    basis = method._whitened[:, :6]
    whitened = refit(of, method._chain(method._matrix @ basis, basis.T), covariance)
    rows = refit(of, Separable(of).fit({"rank": 6}), covariance)
    best = min(error(of, chain, covariance) for chain in (whitened, rows))
    assert error(of, method.fit({"rank": 6}), covariance) < 0.9 * best


def test_columns_found_are_stationary() -> None:
    """Enough sweeps lead where neither columns nor rows can be improved: the gradient vanishes."""
    of = layer(6, 4, 3, 3)
    covariance = correlated(of, floor=0.1)
    method = Separable(of, covariance)
    chain = method.fit({"rank": 4})
    for _ in range(300):
        chain = refit(of, method._better_columns(chain), covariance)
    slope = (of.matrix - compose(chain).reshape(6, -1)) @ covariance
    slope = slope.reshape(6, 4, 3, 3)
    columns = np.einsum("nkj,ncij->kci", chain[1].weight[:, :, 0], slope)
    start = np.einsum("nkj,ncij->kci", chain[1].weight[:, :, 0], (of.matrix @ covariance).reshape(6, 4, 3, 3))
    assert relative(start + columns, start) < 1e-4


@pytest.mark.parametrize("known", [False, True])
def test_refit_is_the_best_for_what_the_last_factor_sees(known: bool) -> None:
    of = layer(8, 5, 3, 3)
    covariance = correlated(of, floor=0.01) if known else np.eye(45)
    chain = Separable(of).fit({"rank": 5})
    off = (chain[0], Factor(chain[1].weight + 0.3, pads=chain[1].pads))
    best = refit(of, off, covariance if known else None)
    seen = features(best)

    def slope(factors: tuple[Factor, ...]) -> float:
        rest = of.matrix - factors[-1].weight.reshape(8, -1) @ seen
        return float(np.linalg.norm(rest @ covariance @ seen.T))

    assert slope(best) < 1e-7 * slope(off)
    assert best[0] is off[0] and best[1].pads == off[1].pads
    assert error(of, best, covariance) < error(of, off, covariance)


def test_refit_is_sound_where_features_repeat_or_vanish() -> None:
    of = layer(8, 5, 3, 3)
    columns = np.random.default_rng(5).normal(size=(4, 5, 3, 1))
    columns[1], columns[2] = columns[0], 0
    chain = (of.vertical(columns), of.horizontal(np.zeros((8, 4, 1, 3))))
    distinct = (of.vertical(columns[[0, 3]]), of.horizontal(np.zeros((8, 2, 1, 3))))
    covariance = correlated(of)
    errors = [error(of, refit(of, each, covariance), covariance) for each in (chain, distinct)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    nothing = refit(of, chain, np.zeros((45, 45)))
    assert np.all(nothing[1].weight == 0)


def test_refit_refuses_a_grouped_last_factor() -> None:
    of = layer(4, 4, 3, 3)
    with pytest.raises(AssertionError, match="the last factor is grouped"):
        refit(of, (of.whole(np.ones((4, 1, 3, 3)), 4),))


def test_cp_finds_tensors_of_its_rank() -> None:
    rng = np.random.default_rng(6)
    a, _ = np.linalg.qr(rng.normal(size=(5, 7, 2)))
    v, h = rng.normal(size=(5, 3, 2)), rng.normal(size=(5, 4, 2))
    tensors = np.einsum("crm,cim,cjm->crij", a, v, h)
    found = cp(tensors, 2, seed=0)
    assert relative(np.einsum("crm,cim,cjm->crij", *found), tensors) < 1e-6
    assert np.allclose(np.linalg.norm(found[1], axis=1), 1) and np.allclose(np.linalg.norm(found[2], axis=1), 1)


def test_one_filter_a_channel_is_no_worse_than_of_the_best_filter() -> None:
    """The start is the best separable part of the first singular filter; alternating starts there."""
    of = layer(10, 3, 3, 3)
    start = 0.0
    for c in range(3):
        filters = np.linalg.svd(of.weight[:, c].reshape(10, 9))[2][0].reshape(3, 3)
        u, _, t = np.linalg.svd(filters)
        taps = np.outer(u[:, 0], t[0]).ravel()
        start += float(np.sum((of.weight[:, c].reshape(10, 9) @ taps) ** 2))
    kept = (1 - error(of, SeparableBasis(of).fit({"basis": 1}))) * np.sum(of.weight**2)
    assert kept >= start * (1 - 1e-12)


@pytest.mark.parametrize(("method", "name"), METHODS)
@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_settings_ascend_and_save(method: type, name: str, step: int, strides: tuple[int, int]) -> None:
    of = layer(48, 36, 3, 3, strides=strides)
    made = method(of)
    ranks = [setting[name] for setting in made.settings(step)]
    costs = [macs(made.skeleton({name: rank})) for rank in ranks]
    assert 5 <= len(ranks) <= 10 if step == 1 or name == "rank" else len(ranks) >= 2
    assert ranks == sorted(set(ranks)) and costs == sorted(costs)
    assert costs[-1] < of.weight.size <= macs(made.skeleton({name: ranks[-1] + ranks[0]})) + costs[0]
    assert all((rank if name == "rank" else 36 * rank) % step == 0 for rank in ranks)


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_skeletons_are_what_is_fitted(method: type, name: str) -> None:
    of = layer(12, 5, 3, 2, strides=(2, 1), pads=(1, 0, 1, 1))
    made = method(of, correlated(of))
    for factor, shape in zip(made.fit({name: 2}), made.skeleton({name: 2}), strict=True):
        assert factor.weight.shape == shape.weight.shape and factor.weight.dtype == np.float64
        assert (factor.groups, factor.strides, factor.pads) == (shape.groups, shape.strides, shape.pads)


def test_costs_are_those_of_the_paper() -> None:
    of = layer(32, 16, 3, 5)
    assert macs(Separable(of).skeleton({"rank": 7})) == 7 * (16 * 3 + 32 * 5)
    assert macs(SeparableBasis(of).skeleton({"basis": 2})) == 16 * 2 * (3 + 5 + 32)


def test_a_step_that_channels_cannot_meet_is_left() -> None:
    assert [setting["basis"] for setting in SeparableBasis(layer(32, 3, 3, 3)).settings(64)] == [1, 2, 3, 4, 5, 6, 7]
    assert list(Separable(layer(32, 3, 3, 3)).settings(64)) == []


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_what_cannot_gain_is_refused(method: type, name: str) -> None:
    for kh, kw in ((1, 1), (1, 7), (3, 1)):
        text = f"the kernel is {kh} x {kw}: with a side of 1 there are no columns and rows to separate"
        assert method.refusal(layer(8, 8, kh, kw)) == text
    what = "rank 1" if name == "rank" else "one filter a channel"
    least = 4 if name == "rank" else 5
    text = f"even {what} takes {least} multiply-accumulates for each output position, the layer 4"
    assert method.refusal(layer(1, 1, 2, 2)) == text
    assert list(method(layer(1, 1, 2, 2)).settings(1)) == []
    assert method.refusal(layer(8, 8, 3, 3)) is None
