"""In which order groups of channels give up units: what hurts least for what it saves, one step after another.

What a layer costs is a product of its inputs and its outputs, so what a step saves depends on the steps before it: the
savings of a path add up to the truth, those of single sites would not.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from effc.cost import Cost

from ._widths import Widths

FREE = 1e-12


@dataclass(frozen=True)
class Step:
    """One group going down to so many units, beside all steps before it.

    Attributes:
        saved, damage: by this step alone.
    """

    site: str
    left: int
    saved: Cost
    damage: float


@dataclass(frozen=True)
class Choice:
    """What a group may go down to.

    Attributes:
        sizes: units left, from most to fewest; the first is all of them.
        damage: of each size, rising.
    """

    sizes: Sequence[int]
    damage: Sequence[float]


def path(widths: Widths, choices: Mapping[str, Choice], quantity: str, enough: Callable[[Cost], bool]) -> list[Step]:
    """Steps until what is saved is enough, or nothing is left to save.

    A step is as far down as pays best: least damage for each unit of `quantity`, an attribute of `Cost`; the last one
    no further than is enough. What it pays is looked at anew when its turn comes: steps of neighbours may have made it
    less.
    """
    at = dict.fromkeys(choices, 0)
    saved, steps = Cost(), []
    heap = []

    def best(site: str) -> tuple[float, int, Cost] | None:
        """Price, index and saving of the step of a group that pays best."""
        found = None
        for index in range(at[site] + 1, len(choices[site].sizes)):
            gained = widths.saving(site, choices[site].sizes[index])
            amount = getattr(gained, quantity)
            hurt = choices[site].damage[index] - choices[site].damage[at[site]]
            if amount > 0 and (found is None or (hurt + FREE) / amount < found[0]):
                found = (hurt + FREE) / amount, index, gained
        return found

    def push(site: str) -> None:
        if (found := best(site)) is not None:
            heapq.heappush(heap, (found[0], site, found[1], found[2]))

    for site in choices:
        push(site)
    while heap and not enough(saved):
        _, site, *_ = heapq.heappop(heap)
        now = best(site)
        if now is None:
            continue
        if heap and now[0] > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (now[0], site, now[1], now[2]))
            continue
        _, index, gained = now
        if enough(saved + gained):
            sizes = choices[site].sizes
            shorter = ((i, widths.saving(site, sizes[i])) for i in range(at[site] + 1, index))
            index, gained = next(((i, g) for i, g in shorter if enough(saved + g)), (index, gained))
        hurt = choices[site].damage[index] - choices[site].damage[at[site]]
        steps.append(Step(site, choices[site].sizes[index], gained, hurt))
        at[site], widths.left[site] = index, choices[site].sizes[index]
        saved = saved + gained
        push(site)
    return steps


def ranked(widths: Widths, choices: Mapping[str, Choice], enough: Callable[[Cost], bool], *, alike: bool) -> list[Step]:
    """Steps in an order that does not ask what they save, until it is enough.

    Args:
        alike: all groups give up the same share of their units; else units go by their damage, least first.
    """

    def key(choice: Choice, index: int) -> float:
        if alike:
            return 1 - choice.sizes[index] / choice.sizes[0]
        return (choice.damage[index] - choice.damage[index - 1]) / (choice.sizes[index - 1] - choice.sizes[index])

    events = sorted((key(c, index), site, index) for site, c in choices.items() for index in range(1, len(c.sizes)))
    saved, steps = Cost(), []
    for _, site, index in events:
        if enough(saved):
            break
        size, damage = choices[site].sizes[index], choices[site].damage
        gained = widths.saving(site, size)
        steps.append(Step(site, size, gained, damage[index] - damage[index - 1]))
        widths.left[site] = size
        saved = saved + gained
    return steps


def steps_of(count: int, multiple: int, most: float) -> list[int]:
    """Units to keep: all, then multiples, down to the share that has to stay."""
    least = max(1, int(np.ceil(count * (1 - most))))
    found = [n for n in range(multiple * ((count - 1) // multiple), 0, -multiple) if n >= least]
    return [count, *found]
