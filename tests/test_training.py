"""effc.training: a published table of six language models, and what cannot be."""

import math

import pytest

from effc import BadInput
from effc.training import Training, convolutional_flops, training_cost, transformer_flops

# Days and dollars on 256 A100 (312 TFLOP/s in bfloat16) as a lecture on training budgets states them, with the share
# of the peak and the price an hour that follow from them, to two and three digits.
# parameters, tokens, days, dollars, operations, utilisation, price
TABLE = [
    (1.3e9, 26e9, 0.14, 2e3, 2.03e20, 0.21, 2.33),
    (2.7e9, 54e9, 0.48, 6e3, 8.75e20, 0.26, 2.03),
    (6.7e9, 134e9, 2.32, 30e3, 5.39e21, 0.34, 2.10),
    (13e9, 260e9, 7.43, 100e3, 2.03e22, 0.40, 2.19),
    (30e9, 610e9, 35.98, 450e3, 1.10e23, 0.44, 2.04),
    (70e9, 1400e9, 176.55, 2.5e6, 5.88e23, 0.48, 2.30),
]


@pytest.mark.parametrize(("n", "d", "days", "dollars", "flops", "utilisation", "price"), TABLE)
def test_the_published_table(n, d, days, dollars, flops, utilisation, price):
    found = training_cost(transformer_flops(n, d), peak=312e12, utilisation=utilisation, devices=256, price=price)
    assert found.flops == pytest.approx(flops, rel=0.005)  # three digits
    rounding = 0.005 / utilisation  # of two digits: 1 to 2.4 %
    assert found.days == pytest.approx(days, rel=rounding, abs=0.005)
    assert found.money == pytest.approx(dollars, rel=rounding + 0.005 / price)


def test_hours_are_those_of_all_devices():
    found = training_cost(3.6e18, peak=1e12, utilisation=0.5, devices=4, price=1.5)
    assert found == Training(3.6e18, 1e12, 0.5, 4, 1.8e6, 2000.0, 3000.0)
    assert found.days == 1.8e6 / 86400
    assert training_cost(1e12, peak=1e12, utilisation=1).money is None


def test_a_convolutional_network_takes_three_forward_passes_a_sample():
    """ResNet-50: 4.09 G multiply-adds; 90 epochs of 1.28 M images are 6 x 4.09e9 x 1.15e8 operations."""
    assert convolutional_flops(4.09e9, 90 * 1.281e6) == pytest.approx(2.83e18, rel=0.01)
    assert convolutional_flops(1, 1) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"utilisation": 0}, "a utilisation of 0 cannot be; it is a share of the peak, above 0 and at most 1"),
        ({"utilisation": 40}, "a utilisation of 40 cannot be"),
        ({"utilisation": math.nan}, "a utilisation of nan cannot be"),
        ({"devices": 0}, "0 devices cannot train anything; at least 1 is needed"),
        ({"price": -1}, "a price of -1 an hour cannot be; it is 0 or more"),
        ({"peak": 0}, "0 peak operations a second cannot be; a number above 0 is needed"),
        ({"flops": math.inf}, "inf operations cannot be"),
    ],
)
def test_what_cannot_be(options, words):
    with pytest.raises(BadInput, match="^" + words.replace(".", r"\.")):
        training_cost(**({"flops": 1e18, "peak": 1e14, "utilisation": 0.4} | options))


def test_nothing_is_trained_on_nothing():
    with pytest.raises(BadInput, match=r"^0 tokens cannot be; a number above 0 is needed"):
        transformer_flops(1e9, 0)
    with pytest.raises(BadInput, match=r"^-1 parameters cannot be"):
        transformer_flops(-1, 1e9)
    with pytest.raises(BadInput, match=r"^0 multiply-accumulates cannot be"):
        convolutional_flops(0, 10)
