"""effc.passes._vbmf against matrices whose rank and noise are known, and against the free energy itself."""

import numpy as np
import pytest

from effc.passes._vbmf import evb_rank


def planted(rank: int, noise: float, shape: tuple[int, int] = (120, 900), seed: int = 0) -> np.ndarray:
    """Independent components of equal strength, entries of variance 1 together, under white noise."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])) / max(rank, 1) ** 0.5
    return made + noise * rng.standard_normal(shape)


@pytest.mark.parametrize("rank", [10, 30, 20, 5, 0])
@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_planted_rank_and_noise(rank, noise, seed):
    found, variance = evb_rank(planted(rank, noise, seed=seed))
    assert found == rank
    assert variance == pytest.approx(noise**2, rel=0.1)


@pytest.mark.parametrize("shape", [(40, 40), (64, 576), (30, 3000)])
def test_shapes(shape):
    found, variance = evb_rank(planted(6, 0.3, shape))
    assert found == 6
    assert variance == pytest.approx(0.09, rel=0.1)


def test_weak_components_are_lost_in_the_noise():
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.standard_normal((100, 4)))
    v, _ = np.linalg.qr(rng.standard_normal((100, 4)))
    noise = rng.standard_normal((100, 100))  # singular values up to 20; those added below appear from about 10 on
    assert evb_rank(u * [80, 60, 40, 5] @ v.T + noise)[0] == 3
    assert evb_rank(u * [80, 60, 40, 5] @ v.T + noise / 10)[0] == 4


def test_transposition_and_scale():
    matrix = planted(7, 0.4)
    rank, variance = evb_rank(matrix)
    assert rank == 7
    assert evb_rank(matrix.T) == (rank, pytest.approx(variance, rel=1e-6))
    assert evb_rank(matrix * 1e-6) == (rank, pytest.approx(variance * 1e-12, rel=1e-6))


@pytest.mark.parametrize("rank", [1, 12, 40])
def test_low_rank_without_noise(rank):
    assert evb_rank(planted(rank, 0)) == (rank, 0.0)


@pytest.mark.parametrize("rank", [1, 3, 12, 40])
def test_rounding_to_single_precision_is_no_component(rank):
    matrix = planted(rank, 0).astype(np.float32)
    assert np.linalg.matrix_rank(matrix.astype(np.float64)) == 120
    assert evb_rank(matrix) == (rank, 0.0)


@pytest.mark.parametrize("shape", [(5, 9), (1, 9), (1, 1)])
def test_zeros(shape):
    assert evb_rank(np.zeros(shape)) == (0, 0.0)


def test_one_row_cannot_be_told_from_noise():
    row = np.random.default_rng(0).standard_normal((1, 50))
    rank, variance = evb_rank(row)
    assert rank == 0
    assert variance == pytest.approx(np.mean(row**2))
    assert evb_rank(row.T)[0] == 0
    assert evb_rank(np.full((1, 1), 3.0)) == (0, pytest.approx(9.0))


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_the_global_minimum_of_the_free_energy(seed):
    """Decaying spectra have several minima. The reference: the paper's sums, term by term, on a fine grid."""
    rng = np.random.default_rng(seed)
    short, long = 24, 60
    alpha = short / long
    tau_bar = 2.5129 * alpha**0.5
    x_bar = (1 + tau_bar) * (1 + alpha / tau_bar)
    u, v = (np.linalg.qr(rng.standard_normal((n, short)))[0] for n in (short, long))
    s = np.exp(-rng.uniform(0, 6, short))
    s[::-1].sort()

    def energy(noise: float) -> float:
        total = 0.0
        for x in s**2 / (long * noise):
            if x <= x_bar:
                total += x - np.log(x)
            else:
                tau = 0.5 * (x - (1 + alpha) + np.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha))
                total += x - tau + np.log((tau + 1) / x) + alpha * np.log(tau / alpha + 1)
        return total

    half = int(np.ceil(short / (1 + alpha))) - 1
    low = max(s[half] ** 2 / (long * x_bar), np.mean(s[half:] ** 2) / long)
    grid = np.exp(np.linspace(np.log(low), np.log(np.sum(s**2) / (short * long)), 2000))
    values = [energy(noise) for noise in grid]
    rank, variance = evb_rank(u * s @ v.T)
    assert energy(variance) <= min(values) + 1e-6
    assert rank == np.sum(s > np.sqrt(long * variance * x_bar))
