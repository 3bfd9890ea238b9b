"""effc.quantize: codes against what rounding can do at best, ranges against NumPy and against brute force."""

import numpy as np
import pytest

from effc.quantize import CALIBRATORS, Affine, affine, choose_range, quantize_weight
from effc.statistics import Bins, Histogram

RNG = np.random.default_rng(0)


def bins_of(values: np.ndarray) -> Bins:
    accumulator = Histogram("x", values=values.size).start()
    accumulator.update(values.reshape(1, -1).astype(np.float32))
    return accumulator.result()


def coded(values: np.ndarray, q: Affine) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear, as the standard has them."""
    limits = np.iinfo(q.zero.dtype)
    codes = np.clip(np.rint(values / np.float64(q.scale)) + int(q.zero), limits.min, limits.max)
    return (codes - int(q.zero)) * np.float64(q.scale)


def error(values: np.ndarray, cut: tuple[float, float], signed: bool = False) -> float:
    return float(((values - coded(values, affine(*cut, signed=signed))) ** 2).mean())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-1.0, 1.0), (-0.3, 2.7), (0.0, 6.0), (-4.0, 0.0), (2.0, 5.0), (-5.0, -2.0), (-1e-6, 1e6), (-1e-30, 3e-30)],
)
def test_an_affine_code_covers_its_range_and_holds_zero(low, high, signed):
    q = affine(low, high, signed=signed)
    assert q.scale.dtype == np.float32 and q.zero.dtype == (np.int8 if signed else np.uint8)
    assert coded(np.zeros(1), q) == 0.0
    inside = np.linspace(min(low, 0), max(high, 0), 1001)
    # The zero point is rounded, so an end may lie half a step outside; float32 rounds the scale.
    assert np.abs(coded(inside, q) - inside).max() <= float(q.scale) * 0.5 * (1 if signed else 2) * (1 + 1e-4)
    assert q.low <= min(low, 0) + 0.5001 * float(q.scale) and q.high >= max(high, 0) - 0.5001 * float(q.scale)
    assert not signed or q.zero == 0


def test_codes_of_what_is_never_negative_or_never_positive_start_at_an_end():
    assert (affine(0, 6).zero, affine(3, 6).zero, affine(-6, 0).zero) == (0, 0, 255)
    assert affine(0, 6).scale == np.float32(6 / 255)


@pytest.mark.parametrize("extent", [0.0, 1e-40])
def test_a_tensor_of_zeros_has_a_scale(extent):
    assert affine(-extent, extent) == Affine(np.float32(1), np.uint8(0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [7, 8])
def test_weights_are_coded_to_the_nearest(axis, bits):
    weight = (RNG.standard_normal((12, 9, 3, 3)) * np.exp(RNG.standard_normal((12, 9, 1, 1)))).astype(np.float32)
    q = quantize_weight(weight, axis, bits=bits)
    top = 2 ** (bits - 1) - 1
    assert q.codes.dtype == np.int8 and q.scales.dtype == np.float32 and q.axis == axis
    assert q.codes.shape == weight.shape and q.scales.shape == (weight.shape[axis],)
    along = tuple(i for i in range(4) if i != axis)
    np.testing.assert_array_equal(np.abs(q.codes.astype(int)).max(axis=along), top)  # each channel uses all of it
    np.testing.assert_allclose(q.scales, np.abs(weight).max(axis=along) / top, rtol=1e-6)
    shape = [-1 if i == axis else 1 for i in range(4)]
    decoded = q.decoded()
    np.testing.assert_allclose(decoded, q.codes * q.scales.reshape(shape), rtol=1e-6)
    assert decoded.shape == weight.shape and decoded.dtype == np.float32
    assert (np.abs(decoded - weight) <= q.scales.reshape(shape) * 0.5 * (1 + 1e-4)).all()


def test_empty_and_tiny_channels():
    weight = np.array([[0, 0], [1e-42, -2e-42], [1, -0.5]], np.float32)
    q = quantize_weight(weight, 0)
    assert (q.scales > 0).all() and np.isfinite(q.scales).all()
    assert q.codes.tolist() == [[0, 0], [0, 0], [127, -64]]


def test_a_bias_that_dwarfs_its_weights_still_fits_32_bits():
    weight = np.array([[1e-12, -3e-13], [0.5, 0.25]], np.float32)
    bias, step = np.array([7.0, 7.0]), 0.02
    integers = np.rint(bias / (step * quantize_weight(weight, 0, bias=bias, input_scale=step).scales))
    assert (np.abs(integers) <= 2**30 * (1 + 1e-6)).all()
    np.testing.assert_allclose(quantize_weight(weight, 0, bias=bias, input_scale=step).scales[1], 0.5 / 127, rtol=1e-6)
    assert np.abs(bias / (step * quantize_weight(weight, 0).scales))[0] > 2**31  # as it would have been


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(16, 64), (8, 5, 3, 3), (6, 1, 3, 3), (4, 1)])
def test_balanced_rounding_keeps_the_mean_output(axis, shape):
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(shape).astype(np.float32)
    mean = np.abs(rng.standard_normal(shape)) + 0.1
    nearest, balanced = quantize_weight(weight, axis), quantize_weight(weight, axis, mean=mean)
    along = tuple(i for i in range(len(shape)) if i != axis)
    np.testing.assert_array_equal(nearest.scales, balanced.scales)

    def drift(q):
        return np.abs(((q.decoded() - weight.astype(np.float64)) * mean).sum(axis=along))

    slack = 1e-5 * np.abs(weight).max() * mean.max() * weight.size  # of float32 in decoded()
    assert (drift(balanced) <= drift(nearest) + slack).all()
    if weight.size // weight.shape[axis] >= 9:
        assert drift(balanced).sum() < 0.35 * drift(nearest).sum()
    assert np.abs(nearest.codes.astype(int) - balanced.codes).max() <= 1
    assert np.abs(balanced.codes.astype(int)).max() == 127
    steps = balanced.scales.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    assert (np.abs(balanced.decoded() - weight) <= steps * (1 + 1e-4)).all()


def test_balanced_rounding_turns_no_zero():
    """Most weights are zero, and meet small inputs: turned, they would take off what is left of the drift."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((16, 64)).astype(np.float32) * (rng.random((16, 64)) < 0.15)
    q = quantize_weight(weight, 0, mean=np.where(weight == 0, 0.05, 2.0))
    assert not q.codes[weight == 0].any()
    assert (q.codes != quantize_weight(weight, 0).codes).any()


def test_balanced_rounding_of_inputs_that_are_zero_in_the_mean_is_the_nearest():
    weight = RNG.standard_normal((6, 20)).astype(np.float32)
    q = quantize_weight(weight, 0, mean=np.zeros_like(weight))
    np.testing.assert_array_equal(q.codes, quantize_weight(weight, 0).codes)


HEAVY = {
    "student": RNG.standard_t(2.5, 200_000),
    "outlier": np.append(RNG.standard_normal(100_000), [60.0, -45.0]),
    "relu": np.maximum(RNG.laplace(size=100_000), 0),
    "negative": -RNG.exponential(size=100_000),
    "lopsided": RNG.lognormal(sigma=1.2, size=100_000) - 1,
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", HEAVY)
def test_the_range_of_least_squared_error_beats_the_whole_range_and_nearly_all_others(name, signed):
    values = HEAVY[name].astype(np.float32).astype(np.float64)
    bins = bins_of(values)
    whole, best = (choose_range(bins, c, signed=signed) for c in ("minmax", "mse"))
    assert whole == (min(values.min(), 0), max(values.max(), 0))
    assert whole[0] <= best[0] <= 0 <= best[1] <= whole[1]
    least = error(values, best, signed)
    assert least <= error(values, whole, signed) * (1 + 1e-3)
    if name in ("student", "outlier"):
        assert least < 0.9 * error(values, whole, signed)
    cuts = [(whole[0] * a, whole[1] * b) for a in np.linspace(0.02, 1, 50) for b in (a, 1.0)]
    assert least <= 1.15 * min(error(values, cut, signed) for cut in cuts)


@pytest.mark.parametrize("share", [99.0, 99.9, 100.0])
@pytest.mark.parametrize("name", ["student", "relu", "negative"])
def test_percentiles_are_numpys_within_a_bin(name, share):
    """Two-sided data lose half of the share's rest at each end, one-sided data all of it at theirs."""
    values = HEAVY[name].astype(np.float32)[:99_991]  # no share falls between two samples
    bins = bins_of(values)
    low, high = choose_range(bins, "percentile", share)
    rest = (100 - share) / (2 if values.min() < 0 < values.max() else 1)
    expected = (
        -np.percentile(-values, 100 - rest, method="inverted_cdf") if values.min() < 0 else 0,
        np.percentile(values, 100 - rest, method="inverted_cdf") if values.max() > 0 else 0,
    )
    np.testing.assert_allclose([low, high], expected, atol=1.01 * bins.width)
    assert ((values < low) | (values > high)).mean() <= (100 - share) / 100 + 1e-9


def test_entropy_clips_a_far_outlier_and_keeps_a_uniform():
    normal = RNG.standard_normal(200_000)
    low, high = choose_range(bins_of(np.append(normal, [400.0])), "entropy")
    assert 3 <= high < 80 and low <= -3  # of four hundred; candidate ranges end at a tenth of the whole
    low, high = choose_range(bins_of(RNG.uniform(-2, 3, 200_000)), "entropy")
    assert low < -1.9 and high > 2.85


def test_entropy_is_not_ruled_by_the_zeros_of_a_relu():
    positive = np.abs(RNG.standard_normal(50_000))
    with_zeros = np.append(positive, np.zeros(2_000_000))
    _, alone = choose_range(bins_of(positive), "entropy")
    _, beside = choose_range(bins_of(with_zeros), "entropy")
    assert beside == pytest.approx(alone, rel=0.1) and beside > 2.5


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_a_tensor_of_zeros_or_of_one_number(calibrator):
    assert choose_range(bins_of(np.zeros(100)), calibrator) == (0, 0)
    low, high = choose_range(bins_of(np.full(100, 2.5)), calibrator)
    assert low == 0 and error(np.full(10, 2.5), (low, high)) <= (2.5 / 255) ** 2
    low, high = choose_range(bins_of(np.full(100, -2.5)), calibrator)
    assert high == 0 and error(np.full(10, -2.5), (low, high)) <= (2.5 / 255) ** 2
