"""passes/_cp.py: kernels whose rank is known, bounds from theory, and the chain run by another library."""

import itertools

import numpy as np
import pytest

from effc.passes import _cp
from effc.passes._cp import CP, decompose
from effc.passes._factors import Factor, Layer, compose, error, macs


def planted(*shape: int, rank: int, alike: float = 0.0, seed: int = 0) -> np.ndarray:
    """A kernel [N, C, kh, kw] of a given rank; `alike` is the cosine between any two vectors of a factor."""
    rng = np.random.default_rng(seed)
    mixed = np.linalg.cholesky(np.full((rank, rank), alike) + (1 - alike) * np.eye(rank)).T
    vectors = []
    for size in shape:
        drawn = rng.standard_normal((size, rank))
        vectors.append((np.linalg.qr(drawn)[0] if size >= rank else drawn / np.linalg.norm(drawn, axis=0)) @ mixed)
    return np.einsum("nr,cr,ir,jr->ncij", *vectors)


def correlated(c: int, taps: int, seed: int = 0) -> np.ndarray:
    """A covariance [c taps, c taps] of neighbours that are alike and channels of very different strength."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((c, c)))[0]
    near = 0.7 ** np.abs(np.subtract.outer(np.arange(taps), np.arange(taps)))
    return np.kron((basis * np.arange(1.0, c + 1) ** -1.5) @ basis.T, near)


def vectors_of(chain: tuple[Factor, ...]) -> list[np.ndarray]:
    """D, A, B, E of a chain of four, each [size, R]."""
    first, down, across, last = (factor.weight for factor in chain)
    return [last[:, :, 0, 0], first[:, :, 0, 0].T, down[:, 0, :, 0].T, across[:, 0, 0, :].T]


def bulk(vectors: list[np.ndarray]) -> float:
    """Sum of the squared norms of the terms."""
    return float(np.prod([np.sum(vector**2, 0) for vector in vectors], 0).sum())


def by_alternating(weight: np.ndarray, rank: int, sweeps: int, seed: int) -> float:
    """Relative squared error of textbook alternating least squares, written with `lstsq`."""
    rng = np.random.default_rng(seed)
    factors: list[np.ndarray] = [rng.standard_normal((size, rank)) for size in weight.shape]
    off = 1.0
    for _ in range(sweeps):
        for mode in range(weight.ndim):
            product = np.ones((1, rank))
            for factor in (factors[k] for k in range(weight.ndim) if k != mode):
                product = (product[:, None] * factor).reshape(-1, rank)
            flat = np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1)
            factors[mode] = np.linalg.lstsq(product, flat.T)[0].T
            off = float(np.sum((flat - factors[mode] @ product.T) ** 2) / np.sum(weight**2))
    return off


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((16, 12, 3, 3), 10), ((40, 3, 3, 5), 6), ((5, 64, 3, 3), 8), ((16, 12, 1, 5), 8), ((9, 8, 3, 1), 6)],
)
def test_a_kernel_of_known_rank_is_found(shape, rank):
    """To 1e-10 of its square; wide ones, which are cut down first, and ones of three dimensions included."""
    layer = Layer(planted(*shape, rank=rank))
    chain = CP(layer).fit({"rank": rank})
    assert error(layer, chain) <= 1e-10
    assert len(chain) == (4 if min(shape[2:]) > 1 else 3)


def test_any_kernel_is_exact_at_a_rank_that_suffices():
    """27 terms are enough for 4 x 3 x 3 x 3, one for each triple of the smaller indices; error 1e-5 in norm."""
    layer = Layer(np.random.default_rng(3).standard_normal((4, 3, 3, 3)))
    assert error(layer, CP(layer).fit({"rank": 27})) <= 1e-10


def test_the_chain_is_the_sum_of_its_terms():
    layer = Layer(np.random.default_rng(0).standard_normal((7, 6, 3, 5)))
    chain = CP(layer).fit({"rank": 5})
    assert [factor.groups for factor in chain] == [1, 5, 5, 1]
    direct = np.einsum("nr,cr,ir,jr->ncij", *vectors_of(chain))
    np.testing.assert_allclose(compose(chain), direct, rtol=0, atol=1e-12)
    off = np.sum((layer.weight - direct) ** 2) / np.sum(layer.weight**2)
    assert error(layer, chain) == pytest.approx(off, rel=1e-9) and 0 < off < 1
    blanks = CP(layer).skeleton({"rank": 5})
    assert [(f.weight.shape, f.groups, f.pads) for f in blanks] == [(f.weight.shape, f.groups, f.pads) for f in chain]
    assert macs(blanks) == 5 * (6 + 3 + 5 + 7)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 2), (1, 3), (3, 1)])
def test_torch_runs_the_chain_to_the_same_numbers(kernel):
    """With strides, dilations and uneven pads, in float64, to 1e-5 of the output's scale, against one convolution."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    layer = Layer(rng.standard_normal((6, 5, *kernel)), (2, 3), (2, 1), (3, 1, 0, 2))

    def run(image, factor: Factor):
        top, left, bottom, right = factor.pads
        padded = torch.nn.functional.pad(image, (left, right, top, bottom))
        kernel = torch.from_numpy(np.ascontiguousarray(factor.weight))
        return torch.nn.functional.conv2d(padded, kernel, None, factor.strides, 0, factor.dilations, factor.groups)

    image = torch.from_numpy(rng.standard_normal((2, 5, 17, 20)))
    chain = CP(layer).fit({"rank": 4})
    made = image
    for factor in chain:
        made = run(made, factor)
    expected = run(image, layer.whole(compose(chain)))
    assert made.shape == expected.shape
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max() > 0


def test_a_swamp_that_alternating_does_not_leave():
    """Vectors at a cosine of 0.9 in each factor: 200 sweeps from each of three starts remain 100 times further off."""
    weight = planted(12, 12, 3, 3, rank=6, alike=0.9)
    layer = Layer(weight)
    ours = error(layer, CP(layer).fit({"rank": 6}))
    theirs = min(by_alternating(weight, 6, 200, seed) for seed in range(3))
    assert ours < 1e-8
    assert theirs > 100 * ours


def test_the_best_single_term_is_at_least_the_bound():
    """Of rank one: no worse than the largest singular term of any one tap, which is itself of that form."""
    weight = np.random.default_rng(5).standard_normal((8, 6, 3, 3))
    layer = Layer(weight)
    found = error(layer, CP(layer).fit({"rank": 1}))
    tap = max(np.linalg.norm(weight[:, :, i, j], 2) for i in range(3) for j in range(3))
    assert found < 1 - tap**2 / np.sum(weight**2)
    unfolded = [np.moveaxis(weight, mode, 0).reshape(weight.shape[mode], -1) for mode in range(4)]
    largest = min(np.linalg.norm(matrix, 2) for matrix in unfolded)  # a term cannot hold more than a singular value's
    assert found >= 1 - largest**2 / np.sum(weight**2)


def test_more_terms_are_no_worse():
    layer = Layer(np.random.default_rng(2).standard_normal((10, 8, 3, 3)))
    errors = [error(layer, CP(layer).fit({"rank": rank})) for rank in (1, 2, 4, 8, 16, 24)]
    assert all(later <= before + 1e-6 for before, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 2


def test_terms_stay_small_where_no_best_approximation_exists():
    """a.a.b + a.b.a + b.a.a has rank three and is the limit of rank two, with terms that grow without bound."""
    a, b = np.eye(2)
    weight = np.array(sum(np.einsum("n,c,j->ncj", *vectors) for vectors in [(a, a, b), (a, b, a), (b, a, a)]))
    weight = weight[:, :, None]
    layer = Layer(weight)
    vectors = decompose(weight[:, :, 0], 2)
    assert bulk(vectors) <= _cp.BOUND * np.sum(weight**2)
    assert error(layer, CP(layer).fit({"rank": 2})) < 1e-3
    spread = [np.linalg.norm(vector, axis=0) for vector in vectors]
    np.testing.assert_allclose(spread, np.broadcast_to(np.mean(spread, 0), (3, 2)), rtol=1e-6)
    assert error(layer, CP(layer).fit({"rank": 3})) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_terms_stay_small_in_general(seed):
    layer = Layer(np.random.default_rng(seed).standard_normal((12, 12, 3, 3)))
    assert bulk(vectors_of(CP(layer, seed=seed).fit({"rank": 20}))) <= _cp.BOUND * np.sum(layer.weight**2)


def test_a_covariance_is_heeded():
    """The weighted error is 0.75 of the plain fit's at most, and the last factor solves the normal equations."""
    layer = Layer(np.random.default_rng(4).standard_normal((10, 8, 3, 3)))
    covariance = correlated(8, 9)
    plain, fitted = CP(layer).fit({"rank": 8}), CP(layer, covariance).fit({"rank": 8})
    assert error(layer, fitted, covariance) < 0.75 * error(layer, plain, covariance)
    assert error(layer, fitted) > error(layer, plain)
    last, *others = vectors_of(fitted)
    seen = np.einsum("cr,ir,jr->rcij", *others).reshape(8, -1)
    pull = (layer.matrix - last @ seen) @ covariance @ seen.T
    scale = np.abs(layer.matrix @ covariance @ seen.T).max()
    np.testing.assert_allclose(pull / scale, 0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_covariance_never_makes_it_worse(seed):
    """Of few samples, so singular; and none at all."""
    rng = np.random.default_rng(seed)
    layer = Layer(rng.standard_normal((6, 4, 3, 3)))
    samples = rng.standard_normal((5 * seed, 36))
    covariance = samples.T @ samples
    plain, fitted = CP(layer).fit({"rank": 3}), CP(layer, covariance).fit({"rank": 3})
    assert error(layer, fitted, covariance) <= error(layer, plain, covariance)
    assert all(np.isfinite(factor.weight).all() for factor in fitted)


def test_the_seed_decides():
    layer = Layer(np.random.default_rng(6).standard_normal((8, 7, 3, 3)))
    first, again, other = (CP(layer, seed=seed).fit({"rank": 6}) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.weight, two.weight)
    assert not np.array_equal(first[0].weight, other[0].weight)


def test_a_kernel_of_zeros_gives_zeros():
    chain = CP(Layer(np.zeros((4, 3, 3, 3)))).fit({"rank": 2})
    assert all((factor.weight == 0).all() for factor in chain)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("step", [1, 8])
def test_settings_save_and_ascend(strides, step):
    layer = Layer(np.zeros((64, 48, 3, 3)), strides)
    method = CP(layer)
    ranks = [setting["rank"] for setting in method.settings(step)]
    costs = [macs(method.skeleton({"rank": rank})) for rank in ranks]
    whole = 64 * 48 * 9
    at_input, halved = strides[0] * strides[1], strides[1]
    assert costs == [rank * (48 * at_input + 3 * halved + 3 + 64) for rank in ranks]
    assert all(rank % step == 0 for rank in ranks) and 8 <= len(ranks) <= 10
    assert costs == sorted(set(costs)) and costs[-1] < whole
    assert costs[-1] + (costs[-1] / ranks[-1]) * step >= whole
    assert costs[0] == pytest.approx(whole / 8, abs=step * costs[0] / ranks[0])


def test_no_settings_where_nothing_saves():
    assert list(CP(Layer(np.zeros((4, 4, 3, 3)))).settings(16)) == []


def test_a_matrix_is_refused():
    assert CP.refusal(Layer(np.zeros((4, 4, 1, 1)))) == "a 1x1 kernel is a matrix: CP is for kernels with more taps"
    assert CP.refusal(Layer(np.zeros((4, 4, 1, 3)))) is None
