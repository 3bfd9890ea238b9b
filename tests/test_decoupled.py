"""effc.passes._decoupled: singular value decompositions channel by channel, and mixing that knows the inputs."""

from itertools import pairwise

import numpy as np
import pytest

from effc.passes._decoupled import Decoupled
from effc.passes._factors import Factor, Layer, compose, error, macs, refit


def layer(n: int, c: int, kh: int, kw: int, **options: tuple[int, ...]) -> Layer:
    return Layer(np.random.default_rng(0).normal(size=(n, c, kh, kw)), **options)


def correlated(of: Layer, rank: int | None = None, floor: float = 1e-3) -> np.ndarray:
    """A covariance of patches that live mostly in a subspace."""
    size = of.inputs * of.taps
    root = np.random.default_rng(1).normal(size=(size, rank or size // 3)) * np.linspace(3, 0.1, rank or size // 3)
    return root @ root.T / size + floor * np.eye(size)


def convolve(factors: tuple[Factor, ...], x: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    y = torch.from_numpy(x).float()
    for each in factors:
        top, left, bottom, right = each.pads
        y = torch.nn.functional.pad(y, (left, right, top, bottom))
        weight = torch.from_numpy(np.ascontiguousarray(each.weight)).float()
        y = torch.nn.functional.conv2d(y, weight, None, each.strides, 0, each.dilations, each.groups)
    return y.numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("n", "terms"), [(20, 9), (5, 5)])
@pytest.mark.parametrize("known", [False, True])
def test_all_terms_are_exact(n: int, terms: int, known: bool) -> None:
    of = layer(n, 4, 3, 3, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 3))
    chain = Decoupled(of, correlated(of) if known else None).fit({"terms": terms})
    assert error(of, chain) <= 1e-20
    x = np.random.default_rng(2).normal(size=(2, 4, 15, 13))
    assert relative(convolve(chain, x), convolve((of.whole(of.weight),), x)) <= 1e-5


def test_all_terms_are_exact_for_inputs_that_are_never_seen() -> None:
    of = layer(12, 4, 3, 3)
    covariance = correlated(of, rank=5, floor=0)
    covariance[:9], covariance[:, :9] = 0, 0  # the first channel is dead
    assert error(of, Decoupled(of, covariance).fit({"terms": 9})) <= 1e-20


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_channels_are_off_by_their_dropped_singular_values(terms: int) -> None:
    of = layer(11, 4, 3, 2)
    off = of.weight - compose(Decoupled(of).fit({"terms": terms}))
    for c in range(4):
        dropped = np.linalg.svd(of.weight[:, c].reshape(11, 6), compute_uv=False)[terms:]
        assert np.sum(off[:, c] ** 2) == pytest.approx(np.sum(dropped**2), rel=1e-10)


def test_one_term_is_the_best_depthwise_separable_convolution() -> None:
    of = layer(10, 3, 3, 3)
    depthwise, pointwise = Decoupled(of).fit({"terms": 1})
    assert (depthwise.weight.shape, depthwise.groups, pointwise.weight.shape) == ((3, 1, 3, 3), 3, (10, 3, 1, 1))
    for c in range(3):
        u, s, t = np.linalg.svd(of.weight[:, c].reshape(10, 9))
        made = np.outer(pointwise.weight[:, c, 0, 0], depthwise.weight[c, 0].ravel())
        assert np.allclose(made, s[0] * np.outer(u[:, 0], t[0]), rtol=0, atol=1e-12)


def test_a_channels_filters_stand_together() -> None:
    """Outputs cT to cT + T - 1 of the depthwise factor are of channel c: the runtime's order of groups."""
    of = layer(10, 3, 3, 3)
    of.weight[:, 1] = 0
    depthwise, pointwise = Decoupled(of).fit({"terms": 2})
    assert np.linalg.norm(depthwise.weight[2:4]) < 1e-100 and np.linalg.norm(pointwise.weight[:, 2:4]) < 1e-100
    assert np.all(np.linalg.norm(depthwise.weight[[0, 1, 4, 5]].reshape(4, -1), axis=1) > 0.1)


@pytest.mark.parametrize("known", [False, True])
def test_more_terms_are_less_error(known: bool) -> None:
    of = layer(12, 4, 3, 3)
    covariance = correlated(of) if known else None
    errors = [error(of, Decoupled(of, covariance).fit({"terms": terms}), covariance) for terms in range(1, 10)]
    assert all(after < before for before, after in pairwise(errors)), errors


@pytest.mark.parametrize("known", [False, True])
def test_the_chain_does_what_its_kernel_does(known: bool) -> None:
    of = layer(6, 4, 3, 5, strides=(2, 3), dilations=(2, 1), pads=(2, 1, 3, 0))
    covariance = correlated(of) if known else None
    chain = Decoupled(of, covariance).fit({"terms": 2})
    assert 1e-3 < error(of, chain, covariance) < 1
    x = np.random.default_rng(4).normal(size=(2, 4, 23, 21))
    assert relative(convolve(chain, x), convolve((of.whole(compose(chain)),), x)) <= 1e-5


@pytest.mark.parametrize("terms", [1, 2, 4])
@pytest.mark.parametrize("floor", [1.0, 1e-3, 0.0])
def test_knowing_the_inputs_never_harms(terms: int, floor: float) -> None:
    of = layer(8, 6, 3, 3)
    covariance = correlated(of, floor=floor)
    plain, fitted = Decoupled(of).fit({"terms": terms}), Decoupled(of, covariance).fit({"terms": terms})
    assert error(of, fitted, covariance) <= error(of, refit(of, plain, covariance), covariance)
    assert error(of, fitted, covariance) < error(of, plain, covariance)
    assert error(of, fitted) > error(of, plain)


def test_inputs_of_few_directions_need_few_terms() -> None:
    of = layer(16, 8, 3, 3)
    covariance = correlated(of, rank=3, floor=1e-6)
    plain, fitted = (error(of, Decoupled(of, known).fit({"terms": 1}), covariance) for known in (None, covariance))
    assert fitted < 0.05 * plain


def test_filters_are_those_that_patches_excite() -> None:
    """With taps of which only some ever move, in channels of their own, whitening finds the optimum: no error."""
    of = layer(16, 4, 3, 3)
    moving = np.zeros(36)
    moving[np.array([0, 5, 9, 13, 20, 22, 30, 35])] = 1  # two taps a channel
    covariance = np.diag(moving) + 1e-9 * np.eye(36)
    assert error(of, Decoupled(of, covariance).fit({"terms": 2}), covariance) < 1e-7
    chosen = error(of, Decoupled(of, covariance).fit({"terms": 1}), covariance)
    assert chosen < error(of, refit(of, Decoupled(of).fit({"terms": 1}), covariance), covariance)


@pytest.mark.parametrize("step", [1, 8])
def test_settings_ascend_and_save(step: int) -> None:
    of = layer(48, 36, 5, 5, strides=(2, 2))
    made = Decoupled(of)
    terms = [setting["terms"] for setting in made.settings(step)]
    costs = [macs(made.skeleton({"terms": each})) for each in terms]
    assert terms == sorted(set(terms)) and len(terms) >= 5
    assert costs == [36 * each * (25 + 48) for each in terms]
    assert costs[-1] < of.weight.size <= costs[-1] + costs[0]
    assert all(36 * each % step == 0 for each in terms)


def test_a_step_that_channels_cannot_meet_is_left() -> None:
    assert [setting["terms"] for setting in Decoupled(layer(32, 3, 3, 3)).settings(64)] == [1, 2, 3, 4, 5, 6, 7]


def test_skeletons_are_what_is_fitted() -> None:
    of = layer(12, 5, 3, 2, strides=(2, 1), pads=(1, 0, 1, 1))
    made = Decoupled(of, correlated(of))
    for factor, shape in zip(made.fit({"terms": 2}), made.skeleton({"terms": 2}), strict=True):
        assert factor.weight.shape == shape.weight.shape and factor.weight.dtype == np.float64
        assert (factor.groups, factor.strides, factor.pads) == (shape.groups, shape.strides, shape.pads)


def test_what_cannot_gain_is_refused() -> None:
    text = "the kernel is 1 x 1: a depthwise one before it would only scale its inputs"
    assert Decoupled.refusal(layer(8, 8, 1, 1)) == text
    text = "even one filter a channel takes 20 multiply-accumulates for each output position, the layer 18"
    assert Decoupled.refusal(layer(1, 2, 3, 3)) == text
    assert Decoupled.refusal(layer(8, 8, 1, 3)) is None
