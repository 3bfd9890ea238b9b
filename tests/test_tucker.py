"""effc.passes._tucker: against the bounds of the theory, dense references and PyTorch's convolutions."""

from itertools import pairwise

import numpy as np
import pytest

from effc.passes import _tucker
from effc.passes._factors import Factors, Layer, compose, error, features, macs
from effc.passes._tucker import Tucker, hooi, unfold

SHAPES = [(12, 10, 3, 3), (8, 14, 1, 5), (15, 6, 2, 3)]


def layer(*shape: int, seed: int = 0, **where) -> Layer:
    return Layer(np.random.default_rng(seed).standard_normal(shape), **where)


def correlated(size: int, seed: int = 0) -> np.ndarray:
    """Eigenvalues over three decades, in a random basis."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return basis * np.logspace(0, -3, size) @ basis.T


def setting(inputs: int, outputs: int) -> dict[str, int]:
    return {"inputs": inputs, "outputs": outputs}


def planted(r3: int, r4: int, shape: tuple[int, ...]) -> Layer:
    rng = np.random.default_rng(3)
    n, c, *kernel = shape
    core = rng.standard_normal((r4, r3, *kernel))
    return Layer(np.einsum("ns,srij,rc->ncij", rng.standard_normal((n, r4)), core, rng.standard_normal((r3, c))))


def hooi_chain(of: Layer, r3: int, r4: int, sweeps: int = 20) -> Factors:
    """Without a covariance, from the bases, by projection alone."""
    tensor = of.weight.reshape(of.outputs, of.inputs, -1)
    u3, u4 = hooi(tensor, r3, r4, sweeps)
    made = np.einsum("ns,ms,mct,cr,dr->ndt", u4, u4, tensor, u3, u3, optimize=True)
    return (of.whole(made.reshape(of.weight.shape)),)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_at_full_rank_and_at_planted_ranks(shape, weighted):
    n, c, *kernel = shape
    s = correlated(c * kernel[0] * kernel[1]) if weighted else None
    for made, ranks in [(layer(*shape), (c, n)), (planted(3, 4, shape), (3, 4)), (planted(4, n, shape), (4, n))]:
        kernel = compose(Tucker(made, s).fit(setting(*ranks)))
        assert np.abs(kernel - made.weight).max() <= 1e-5 * np.abs(made.weight).max()
    exact = planted(3, 4, shape)
    assert error(exact, Tucker(exact, s).fit(setting(2, 4)), s) > 1e-3
    assert error(exact, Tucker(exact, s).fit(setting(3, 3)), s) > 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_factors_are_those_of_the_skeleton(weighted):
    made = layer(12, 10, 3, 3, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 1))
    tucker = Tucker(made, correlated(90) if weighted else None)
    for ranks, shapes in [
        ((4, 6), [(4, 10, 1, 1), (6, 4, 3, 3), (12, 6, 1, 1)]),
        ((4, 12), [(4, 10, 1, 1), (12, 4, 3, 3)]),
        ((10, 6), [(6, 10, 3, 3), (12, 6, 1, 1)]),
    ]:
        chain, skeleton = tucker.fit(setting(*ranks)), tucker.skeleton(setting(*ranks))
        assert [factor.weight.shape for factor in chain] == shapes
        for factor, bare in zip(chain, skeleton, strict=True):
            assert factor.weight.shape == bare.weight.shape
            where = factor.strides, factor.dilations, factor.pads
            assert where == (bare.strides, bare.dilations, bare.pads)
            whole = factor.weight.shape[2:] == (3, 3)
            assert where == (((2, 1), (1, 2), (1, 2, 0, 1)) if whole else ((1, 1), (1, 1), (0, 0, 0, 0)))
        if ranks[0] < 10:
            rows = chain[0].weight[:, :, 0, 0]
            np.testing.assert_allclose(rows @ rows.T, np.eye(ranks[0]), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(2, 3), (5, 3), (3, 7), (5, 7)])
def test_error_is_within_the_bounds_of_hosvd(shape, ranks):
    made = layer(*shape)
    total = np.sum(made.weight**2)
    tensor = made.weight.reshape(*shape[:2], -1)
    dropped = [
        np.sum(np.linalg.svd(unfold(tensor, mode))[1][rank:] ** 2) for mode, rank in ((1, ranks[0]), (0, ranks[1]))
    ]
    hosvd = error(made, hooi_chain(made, *ranks, sweeps=0)) * total
    best = error(made, Tucker(made).fit(setting(*ranks))) * total
    assert max(dropped) * (1 - 1e-9) <= best <= hosvd * (1 + 1e-9) <= sum(dropped) * (1 + 1e-8)


def test_hooi_improves_on_hosvd():
    made = layer(12, 10, 3, 3)
    best = error(made, Tucker(made).fit(setting(4, 4)))
    assert best == pytest.approx(error(made, hooi_chain(made, 4, 4)))
    assert best < 0.995 * error(made, hooi_chain(made, 4, 4, sweeps=0))


@pytest.mark.parametrize("weighted", [False, True])
def test_error_falls_with_either_rank(weighted):
    made = layer(12, 10, 3, 3)
    s = correlated(90) if weighted else None
    tucker = Tucker(made, s)
    for path in ([(r, 6) for r in range(1, 11)], [(5, r) for r in range(1, 13)], [(r, r + 2) for r in range(1, 11)]):
        errors = [error(made, tucker.fit(setting(*ranks)), s) for ranks in path]
        assert all(b < a for a, b in pairwise(errors))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ranks", [(2, 3), (6, 4), (4, 12), (10, 5), (9, 11)])
def test_with_a_covariance_never_further_off_than_without(ranks, seed):
    made, s = layer(12, 10, 3, 3, seed=seed), correlated(90, seed)
    assert error(made, Tucker(made, s).fit(setting(*ranks)), s) < error(made, Tucker(made).fit(setting(*ranks)), s)


def test_channels_that_carry_nothing_take_no_rank():
    """The heaviest weights meet channels of almost no variance: weights alone spend their rank there."""
    weight = layer(12, 10, 3, 3).weight
    weight[:, :5] *= 10
    made = Layer(weight)
    s = np.kron(np.diag([1e-6] * 5 + [1.0] * 5), np.full((3, 3), 0.5).repeat(3, 0).repeat(3, 1) + 0.5 * np.eye(9))
    seen, unseen = (error(made, Tucker(made, known).fit(setting(5, 12)), s) for known in (s, None))
    assert seen < 1e-3 < 0.3 < unseen


def test_a_covariance_without_structure_changes_nothing():
    made = layer(12, 10, 3, 3)
    weights, same = (error(made, Tucker(made, s).fit(setting(4, 6))) for s in (None, 7 * np.eye(90)))
    assert same == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize("s", [np.zeros((90, 90)), np.ones((90, 90)), np.diag([0.0] * 45 + [1.0] * 45)])
def test_singular_covariances(s):
    made = layer(12, 10, 3, 3)
    chain = Tucker(made, s).fit(setting(6, 7))
    assert error(made, chain, s) <= error(made, Tucker(made).fit(setting(6, 7)), s) + 1e-9
    assert max(np.abs(factor.weight).max() for factor in chain) < 10 * np.abs(made.weight).max()


def test_covariance_indefinite_by_rounding():
    x = np.random.default_rng(0).standard_normal((20, 90)).astype(np.float32)
    s = x.T @ x / 20
    s += 1e-6 * np.random.default_rng(1).standard_normal(s.shape).astype(np.float32)
    made = layer(12, 10, 3, 3)
    assert error(made, Tucker(made, s).fit(setting(6, 7)), s) < error(made, Tucker(made).fit(setting(6, 7)), s)


def test_zero_weights():
    made = Layer(np.zeros((12, 10, 3, 3)))
    assert not compose(Tucker(made, correlated(90)).fit(setting(4, 6))).any()
    assert Tucker(made).vbmf() == setting(1, 1)


def test_factors_after_the_first_are_optimal():
    """Reference: SVD of the whole of A (F S F^T)^1/2, with A the unconstrained regression on the features."""
    made, s, r4 = layer(12, 10, 3, 3), correlated(90), 5
    chain = Tucker(made, s).fit(setting(4, r4))
    seen = features(chain[:2])
    gram = seen @ s @ seen.T
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(values) @ vectors.T
    free = made.matrix @ s @ seen.T @ np.linalg.inv(gram)
    u, d, v = np.linalg.svd(free @ root, full_matrices=False)
    off = made.matrix - (u[:, :r4] * d[:r4] @ v[:r4] @ np.linalg.inv(root)) @ seen
    best = np.sum((off @ s) * off) / np.sum((made.matrix @ s) * made.matrix)
    assert error(made, chain, s) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranks", [(3, 12), (5, 4)])
def test_first_factor_starts_from_the_better_and_improves(ranks, seed, monkeypatch):
    made, s = layer(12, 10, 3, 3, seed=seed), correlated(90, seed)
    tucker, errors = Tucker(made, s), []
    for steps in range(4):
        monkeypatch.setattr(_tucker, "STEPS", steps)
        errors.append(error(made, tucker.fit(setting(*ranks)), s))
    plain, _ = hooi(made.weight.reshape(12, 10, 9), *ranks)
    assert errors[0] <= tucker._regress(plain.T, ranks[1])[0] / np.sum((made.matrix @ s) * made.matrix) * (1 + 1e-6)
    assert errors[0] * 0.998 > errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("ranks", [(4, 6), (4, 12)])
@pytest.mark.parametrize(
    ("shape", "where"),
    [
        ((12, 10, 3, 3), {"pads": (1, 1, 1, 1)}),
        ((12, 10, 3, 3), {"strides": (2, 3), "pads": (1, 2, 0, 1)}),
        ((12, 10, 2, 3), {"dilations": (2, 3), "pads": (0, 3, 2, 1), "strides": (1, 2)}),
        ((12, 10, 1, 5), {"strides": (1, 2), "pads": (0, 2, 0, 2)}),
    ],
)
def test_the_chain_runs_as_its_composed_kernel(shape, where, ranks):
    torch = pytest.importorskip("torch")
    made = layer(*shape, **where)

    def run(x, factor):
        top, left, bottom, right = factor.pads
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        return torch.nn.functional.conv2d(x, torch.tensor(factor.weight), None, factor.strides, 0, factor.dilations)

    x = y = torch.tensor(np.random.default_rng(0).standard_normal((2, 10, 11, 13)))
    chain = Tucker(made, correlated(made.matrix.shape[1])).fit(setting(*ranks))
    for factor in chain:
        y = run(y, factor)
    expected = run(x, made.whole(compose(chain)))
    assert y.shape == run(x, made.whole(made.weight)).shape
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("step", [1, 8, 16])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (128, 48, 3, 3), (100, 40, 1, 5), (24, 96, 2, 2)])
def test_settings(shape, strides, step):
    made = layer(*shape, strides=strides)
    tucker = Tucker(made)
    found = list(tucker.settings(step))
    costs = [macs(tucker.skeleton(one)) for one in found]
    assert costs == sorted(costs) and costs[-1] < made.weight.size
    assert len({tuple(one.values()) for one in found}) == len(found) <= 16
    assert all(one["inputs"] % step == 0 and one["inputs"] < made.inputs for one in found)
    assert all(one["outputs"] % step == 0 or one["outputs"] == made.outputs for one in found)
    assert any(one["outputs"] == made.outputs for one in found)
    for one in found:  # neither 1 x 1 costs more than it spares
        for full in ({"inputs": made.inputs}, {"outputs": made.outputs}):
            assert one["outputs"] == made.outputs or macs(tucker.skeleton(one)) < macs(tucker.skeleton({**one, **full}))


def test_settings_of_the_usual_layer():
    found = list(Tucker(layer(64, 64, 3, 3)).settings(4))
    assert 10 <= len(found) <= 16
    assert sum(one["outputs"] == 64 for one in found) >= 4
    assert all(abs(one["inputs"] - one["outputs"]) <= 4 for one in found if one["outputs"] < 64)


def test_a_stride_makes_the_first_factor_dear():
    """At 4 positions each, a 1 x 1 to 56 channels costs more than it spares."""
    plain, strided = (list(Tucker(layer(64, 64, 3, 3, strides=s)).settings(8)) for s in ((1, 1), (2, 2)))
    assert setting(56, 64) in plain
    assert setting(56, 64) not in strided


def test_no_settings_when_the_step_leaves_none():
    assert list(Tucker(layer(64, 3, 3, 3)).settings(8)) == []


def test_vbmf_ranks_and_relaxation():
    exact = planted(6, 9, (48, 40, 3, 3))
    noise = 0.02 * exact.weight.std() * np.random.default_rng(0).standard_normal(exact.weight.shape)
    tucker = Tucker(Layer(exact.weight + noise))
    assert tucker.vbmf() == setting(6, 9)
    assert tucker.vbmf(0.5) == setting(23, round(9 + 0.5 * 39))
    assert tucker.vbmf(1.0) == setting(40, 48)
    assert setting(6, 9) in tucker.settings(1)
    assert setting(8, 8) in tucker.settings(8)


def test_refusals():
    assert Tucker.refusal(layer(8, 8, 3, 3)) is None
    assert Tucker.refusal(layer(8, 8, 1, 3)) is None
    assert Tucker.refusal(layer(8, 8, 1, 1)) == "its kernel is 1 x 1: a matrix has no core between its factors"
    assert Tucker.refusal(layer(8, 1, 3, 3)) == "it has one input channel: there is none to spare"
