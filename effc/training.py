"""What it takes to train a model: operations, time and money, by the rules that the field plans with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from effc.errors import BadInput

HOUR, DAY = 3600, 86400


@dataclass(frozen=True)
class Training:
    """Cost of a training run.

    Attributes:
        flops: floating-point operations, a multiply-accumulate being two.
        peak, utilisation, devices: operations a second of one device at best, the share of it that is reached, and
            how many work at once.
        seconds: from start to end.
        device_hours: of all devices together.
        money: what these cost, None without a price.
    """

    flops: float
    peak: float
    utilisation: float
    devices: int
    seconds: float
    device_hours: float
    money: float | None

    @property
    def days(self) -> float:
        return self.seconds / DAY


def transformer_flops(parameters: float, tokens: float) -> float:
    """C = 6 N D: two operations a parameter and token forward, four backward.

    Attention's own products are left out (Kaplan et al., "Scaling laws for neural language models", 2020, section 2.1).
    """
    return 6 * _positive("parameters", parameters) * _positive("tokens", tokens)


def convolutional_flops(macs: float, samples: float) -> float:
    """C = 3 x 2 x MACs x samples: the backward pass costs twice the forward pass.

    Args:
        macs: multiply-accumulates of one sample's forward pass.
        samples: seen in all, epochs times data.
    """
    return 6 * _positive("multiply-accumulates", macs) * _positive("samples", samples)


def training_cost(
    flops: float, *, peak: float, utilisation: float, devices: int = 1, price: float | None = None
) -> Training:
    """Time and money of so many operations.

    Args:
        peak: operations a second that one device can reach at best.
        utilisation: share of the peak that training reaches, 0 to 1.
        devices: working at once, without loss.
        price: of one device for an hour.

    Raises:
        BadInput: a number that cannot be.
    """
    if not 0 < utilisation <= 1:
        raise BadInput(f"a utilisation of {utilisation:g} cannot be; it is a share of the peak, above 0 and at most 1")
    if devices < 1:
        raise BadInput(f"{devices} devices cannot train anything; at least 1 is needed")
    if price is not None and not 0 <= price < math.inf:
        raise BadInput(f"a price of {price:g} an hour cannot be; it is 0 or more")
    device_seconds = _positive("operations", flops) / (_positive("peak operations a second", peak) * utilisation)
    hours = device_seconds / HOUR
    money = None if price is None else hours * price
    return Training(flops, peak, utilisation, devices, device_seconds / devices, hours, money)


def _positive(what: str, number: float) -> float:
    if not 0 < number < math.inf:
        raise BadInput(f"{number:g} {what} cannot be; a number above 0 is needed")
    return number
