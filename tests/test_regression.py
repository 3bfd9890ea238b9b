"""effc.regression: laws that are known, their gradients, and how sure it is of what it found."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from effc import regression
from effc.regression import FEWEST, NOISE, Hyper, Model, fit, model_of

TERMS = np.array([3.0, 0.02, 5e-6])  # the law below: a constant, a part for the width, one for the area


def drawn(count: int, seed: int = 0, *, noise: float = 0.02, bend: float = 0.0, high: float = 4.0):
    """Samples of a law over widths of 10 to 10**high, bent smoothly by up to `bend`, with noise as stated.

    Returns:
        terms [n, 3], features [n, 2], values [n], errors [n], and the values without noise [n].
    """
    rng = np.random.default_rng(seed)
    width, kind = 10 ** rng.uniform(1, high, count), rng.uniform(-1, 1, count)
    terms = np.column_stack([np.ones(count), width, width**2])
    exact = terms @ TERMS * np.exp(bend * np.sin(2 * kind) * np.tanh(np.log10(width) - 2))
    features = np.column_stack([np.log(width), kind])
    values = exact * np.exp(noise * rng.standard_normal(count))
    return terms, features, values, np.full(count, max(noise, 1e-3)), exact


def off(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(np.log(found / exact))


@pytest.mark.parametrize("count", [3, FEWEST - 1])
def test_terms_are_found_from_a_few_exact_samples(count):
    """To 1 %, and times of sizes a hundred times as large to 1 %."""
    terms, features, values, errors, _ = drawn(count, noise=0)
    found = fit(terms, features, values, errors)
    assert found.lengths == () and found.noise == 0.2  # nobody is surer than that of so few
    np.testing.assert_allclose(found.terms, TERMS, rtol=1e-2)
    far, beyond, *_, exact = drawn(50, 1, noise=0, high=6)
    guess, error = model_of(found, terms, features, values, errors).predict(far, beyond)
    assert off(guess, exact).max() < 0.01 and (error == 0.2).all()


def test_one_sample_is_its_own_law():
    """As well as no sample can say; nothing is known of the next."""
    found = fit(*(part[:1] for part in drawn(1)[:4]))
    terms, features, values, errors, _ = drawn(1)
    guess, error = model_of(found, terms, features, values, errors).predict(terms, features)
    assert guess == pytest.approx(values, rel=0.01) and error == 0.5 and found.lengths == ()


def test_few_samples_that_disagree_say_so():
    """The spread of what is left is the error: here half as much again either way."""
    terms, features, _, errors, _ = drawn(6, noise=0)
    found = fit(terms[:, :1], features, 5 * 1.5 ** np.array([1, -1, 1, -1, 1, -1]), errors)
    assert found.terms == pytest.approx([5], rel=1e-3) and found.noise == pytest.approx(np.log(1.5), rel=1e-3)


def test_a_bent_law_is_found_from_sixty_samples():
    """A law bent by up to 30 %, noise of 2 %: half of what was not measured within 2 %, 95 % within 10 %."""
    samples = drawn(60, bend=0.3)[:4]
    model = model_of(fit(*samples), *samples)
    terms, features, *_, exact = drawn(400, 1, bend=0.3)
    found, error = model.predict(terms, features)
    assert np.median(off(found, exact)) < 0.02 and np.quantile(off(found, exact), 0.95) < 0.1
    trend = off(terms @ np.array(model.hyper.terms), exact)
    assert np.median(trend) > 4 * np.median(off(found, exact))  # the terms alone are far worse
    standardised = off(found, exact) / error
    assert 0.3 < np.sqrt(np.mean(standardised**2)) < 1.5  # and it knows how sure it is


def test_twice_as_many_samples_are_twice_as_good():
    """Median error, roughly: it falls at least by a third from 30 to 120."""
    terms, features, *_, exact = drawn(300, 1, bend=0.3)
    errors = []
    for count in (30, 120):
        samples = drawn(count, bend=0.3)[:4]
        errors.append(np.median(off(model_of(fit(*samples), *samples).predict(terms, features)[0], exact)))
    assert errors[1] < errors[0] * 2 / 3


def test_an_outlier_bends_nothing_else():
    """One measurement that was disturbed, three times too long: the others' shapes stay within 3 % at the median."""
    terms, features, values, errors, _ = drawn(40)
    values[7] *= 3
    far, beyond, *_, exact = drawn(200, 1)
    found = model_of(fit(terms, features, values, errors), terms, features, values, errors).predict(far, beyond)[0]
    assert np.median(off(found, exact)) < 0.03


def test_unsure_measurements_weigh_less():
    """Half of the samples say twice as much, and are known to be worthless: the others decide, within 2 %."""
    terms, features, values, errors, _ = drawn(40)
    errors[::2], values[::2] = 1.0, values[::2] * 2
    found = model_of(fit(terms, features, values, errors), terms, features, values, errors)
    far, beyond, *_, exact = drawn(200, 1)
    assert np.median(off(found.predict(far, beyond)[0], exact)) < 0.02


def test_what_contributes_nothing_is_left_out():
    terms, features, values, errors, _ = drawn(30)
    more = np.column_stack([terms, np.zeros(30), np.full(30, 1e-12)])
    found = fit(more, features, values, errors)
    assert found.terms[3] == 0.0 and min(found.terms) >= 0.0


def test_the_same_samples_give_the_same_model():
    samples = drawn(40, bend=0.3)[:4]
    assert fit(*samples) == fit(*(part.copy() for part in samples))


def test_a_model_is_had_back_from_what_fitting_found():
    """At the samples it says what was measured, as well as noise allows: within three standard deviations of it."""
    samples = drawn(60, bend=0.3)[:4]
    hyper = fit(*samples)
    model = model_of(Hyper(*hyper.__dict__.values()), *samples)
    found, error = model.predict(*samples[:2])
    assert off(found, samples[2]).max() < 3 * (NOISE + 0.02)
    np.testing.assert_array_equal(found, model_of(hyper, *samples).predict(*samples[:2])[0])
    assert (error < 0.1).all()


@pytest.fixture(scope="module")
def model() -> Model:
    samples = drawn(60, bend=0.3)[:4]
    return model_of(fit(*samples), *samples)


def anywhere(model: Model) -> np.ndarray:
    """Corrections to the trend at random points, most of them far away."""
    features = np.random.default_rng(2).uniform(-60, 60, (500, 2))
    terms = np.tile([1.0, 100, 1e4], (500, 1))
    return np.log(model.predict(terms, features)[0] / (terms @ np.array(model.hyper.terms)))


class TestUncertainty:
    def test_it_grows_away_from_samples(self, model):
        """Along a line out of the region that was measured, and never above 1."""
        width = 10.0 ** np.arange(2, 12)
        features = np.column_stack([np.log(width), np.zeros(len(width))])
        _, error = model.predict(np.column_stack([np.ones(len(width)), width, width**2]), features)
        outside = error[2:]  # from 10**4 on
        assert (np.diff(outside) >= -1e-9).all() and outside[-1] > 2 * error[0] and error.max() <= 1.0
        apart = np.column_stack([np.full(20, np.log(100)), np.linspace(1, 20, 20)])  # the other feature
        _, error = model.predict(np.tile([1, 100, 1e4], (20, 1)), apart)
        assert (np.diff(error) >= -1e-9).all() and error[-1] > 2 * error[0]

    def test_it_is_never_below_the_noise(self, model):
        _, error = model.predict(np.tile([1, 100, 1e4], (50, 1)), model.features[:50])
        assert (error >= model.hyper.noise * (1 - 1e-9)).all()

    def test_a_correction_never_exceeds_those_that_were_seen(self, model):
        """However far away: they stay within the range of what samples asked for."""
        found = anywhere(model)
        assert found.min() >= model.residuals.min() - 1e-9 and found.max() <= model.residuals.max() + 1e-9
        assert np.ptp(found) > 0.1  # it does correct

    def test_what_was_measured_badly_widens_no_range(self):
        """A worthless sample that asks for a factor of 50 leaves the largest correction as it was, to 2 %."""
        terms, features, values, errors, _ = drawn(60, bend=0.3)
        hyper = fit(terms, features, values, errors)
        before = anywhere(model_of(hyper, terms, features, values, errors)).max()
        values[5], errors[5] = values[5] * 50, 1.0
        after = anywhere(model_of(hyper, terms, features, values, errors)).max()
        assert after == pytest.approx(before, abs=0.02)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    """Both losses that are minimised, at random points: to 1e-4 of the gradient's size."""
    asked = []
    real = regression.minimize

    def minimize(loss, start, **options):
        asked.append((loss, np.array(start)))
        return real(loss, start, **options)

    monkeypatch.setattr(regression, "minimize", minimize)
    fit(*drawn(30, bend=0.3)[:4])
    assert [len(start) for _, start in asked] == [3, 2 + 3]  # factors; lengths, smooth, linear, noise
    rng = np.random.default_rng(4)
    for loss, start in asked:
        for _ in range(5):
            point = start + rng.uniform(-0.5, 0.5, len(start))
            value, slope = loss(point)
            near = np.asarray(approx_fprime(point, lambda x, loss=loss: loss(x)[0], 1e-6))
            assert np.isfinite(value) and np.abs(slope - near).max() < 1e-4 * max(np.abs(near).max(), 1.0)


def test_the_likelihood_is_that_of_a_normal_distribution(monkeypatch):
    """- log N(residuals; 0, K) by scipy, up to a constant, beside the prior of the parameters; to 1e-8."""
    from scipy.stats import multivariate_normal

    asked = []

    def minimize(loss, start, **options):
        asked.append(loss)
        return real(loss, start, **options)

    real = regression.minimize
    monkeypatch.setattr(regression, "minimize", minimize)
    terms, features, values, errors, _ = drawn(20, bend=0.3)
    hyper = fit(terms, features, values, errors)
    residuals = np.log(values) - np.log(terms @ np.array(hyper.terms))
    residuals -= np.median(residuals)
    z = (features - features.mean(0)) / features.std(0)

    def expected(logs: np.ndarray) -> float:
        lengths, (smooth, linear, noise) = np.exp(logs[:2]), np.exp(logs[2:])
        far = np.sqrt((((z[:, None] - z[None]) / lengths) ** 2).sum(-1) + 1e-12) * 3**0.5
        covariance = smooth**2 * (1 + far) * np.exp(-far) + linear**2 * (z @ z.T + 1)
        covariance += np.diag(noise**2 + errors**2)
        prior = np.log([regression.LENGTH] * 2 + [regression.SMOOTH, regression.LINEAR, regression.NOISE])
        return -multivariate_normal.logpdf(residuals, cov=covariance) + ((logs - prior) ** 2).sum() / 2

    points = np.random.default_rng(0).uniform(-1, 1, (4, 5)) + np.log([3, 3, 0.3, 0.1, 0.03])
    apart = [asked[1](point)[0] - expected(point) for point in points]
    np.testing.assert_allclose(apart, -20 * np.log(2 * np.pi) / 2, rtol=1e-8)
