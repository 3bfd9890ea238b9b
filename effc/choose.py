"""Which proposals to take: at most one a site, under the pass's budget.

A budget is a multiple-choice knapsack. It is solved greedily over the convex hull of each site's alternatives,
cheapest damage per unit saved first (Sinha and Zoltners, 1979): within one step of the optimum, which may be most of a
layer. Where dynamic programming finds less damage, that is taken. Several budgets are weighed against each other until
all hold (a Lagrangian relaxation, its multipliers found by trying).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np

from effc.contract import Proposal
from effc.cost import Cost

# Budget -> the attribute of Cost that it bounds, and the goal that a pass with this budget is judged by.
QUANTITIES = {"macs": "macs", "size": "weight_bytes", "speedup": "seconds", "energy": "energy"}
JUDGED_BY = {"macs": "macs", "size": "size", "speedup": "latency", "energy": "energy"}
GOALS = {"latency": "seconds", "size": "weight_bytes", "energy": "energy", "macs": "macs"}
IN_WORDS = {"seconds": "predicted latency", "weight_bytes": "bytes", "energy": "energy", "macs": "multiply-accumulates"}
ACCURACY = "accuracy"  # the goal of passes that only train
COMPRESSED = "compressed size"  # the goal of passes that only make weights shorter to write down
PREDICTED = ("seconds", "energy")  # 0 means: not known
ROUNDS = 24
ROUNDING = 1e-9
UNITS = 10_000  # that what is wanted is counted in, rounded down, by dynamic programming
CELLS = 2 * 10**8  # sites by alternatives by units, above which greed has to do


def choose(proposals: Sequence[Proposal], budget: Mapping[str, float], total: Cost) -> list[Proposal]:
    """The proposals to make.

    Args:
        proposals: all alternatives of all sites; a pass's own preference stands first among those of a site.
        budget: `macs`, `size` or `energy`: share of the total to keep at most; `speedup`: the total's seconds over
            what is left at most. With several, all have to hold. Empty: each site's first alternative. (The budget
            `max_drop` is held by evaluation along `by_worth`, which is the manager's business.)
        total: cost of the whole model.

    Returns:
        At most one proposal a site, in the order of `proposals`. Where a budget is out of reach, what comes nearest.
    """
    sites = _by_site(proposals)
    if not QUANTITIES.keys() & budget.keys():
        return [alternatives[0] for alternatives in sites.values()]
    wanted = {QUANTITIES[name]: amount for name, amount in _wanted(budget, total).items() if amount > 0}
    taken = _together(sites, wanted) if len(wanted) > 1 else _spend(sites, wanted, dict.fromkeys(wanted, 1.0))
    if len(wanted) == 1:
        taken = min(taken, _programmed(sites, wanted) or taken, key=_damage)
    return [p for p in proposals if taken.get(p.site) is p]


def spend_damage(proposals: Sequence[Proposal], limit: float, quantity: str) -> list[Proposal]:
    """The proposals that save most of a quantity of `Cost` for so much damage in all, in the order of `proposals`."""
    spent = 0.0

    def fits(before: Proposal | None, after: Proposal) -> bool:
        nonlocal spent
        more = (after.damage or 0.0) - ((before.damage or 0.0) if before else 0.0)
        if spent + more > limit * (1 + ROUNDING):
            return False  # a smaller step of another site may still fit
        spent += more
        return True

    taken = _greedy(_by_site(proposals), {quantity: 1.0}, fits)
    return [p for p in proposals if taken.get(p.site) is p]


def unreached(chosen: Sequence[Proposal], budget: Mapping[str, float], total: Cost) -> dict[str, float]:
    """Budgets that a choice is predicted to miss -> what it reaches: shares kept, and times as fast."""
    missed = {}
    for name, amount in _wanted(budget, total).items():
        whole, saved = getattr(total, QUANTITIES[name]), sum(saving(p, QUANTITIES[name]) for p in chosen)
        if saved < amount - ROUNDING * whole:
            left = (whole - saved) / whole
            missed[name] = 1 / left if name == "speedup" else left
    return missed


def _wanted(budget: Mapping[str, float], total: Cost) -> dict[str, float]:
    """How much of its quantity each budget wants saved."""
    shares = {n: 1 / b if n == "speedup" else b for n, b in budget.items() if n in QUANTITIES}
    return {n: (whole := getattr(total, QUANTITIES[n])) - share * whole for n, share in shares.items()}


def _spend(
    sites: Mapping[str, list[Proposal]], wanted: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, Proposal]:
    """Take steps along the hulls until all that is wanted is saved; by site."""
    saved = dict.fromkeys(wanted, 0.0)

    def needed(before: Proposal | None, after: Proposal) -> bool:
        if all(saved[quantity] >= amount for quantity, amount in wanted.items()):
            return False
        for quantity in wanted:
            saved[quantity] += _step(before, after, quantity)
        return True

    return _greedy(sites, weights, needed)


def _programmed(sites: Mapping[str, list[Proposal]], wanted: Mapping[str, float]) -> dict[str, Proposal] | None:
    """Least damage for one quantity, to the rounding of units; None where it is out of reach, or would take long."""
    ((quantity, amount),) = wanted.items()
    if len(sites) * max(map(len, sites.values()), default=0) * UNITS > CELLS or amount <= 0:
        return None
    units = np.arange(UNITS + 1)
    least = np.where(units == 0, 0.0, np.inf)  # damage, to have saved at least so many units
    steps: list[tuple[list[tuple[Proposal | None, int]], np.ndarray]] = []
    for alternatives in sites.values():
        saved = ((p, int(UNITS * min(saving(p, quantity) / amount, 1.0))) for p in alternatives)
        options: list[tuple[Proposal | None, int]] = [(None, 0), *((p, s) for p, s in saved if s > 0)]
        found = np.stack([least[np.maximum(units - s, 0)] + ((p.damage or 0.0) if p else 0.0) for p, s in options])
        which = found.argmin(axis=0)
        steps.append((options, which))
        least = found[which, units]
    # Rounding may hide a unit a site: the first of these that is enough in truth.
    for enough in range(max(UNITS - len(sites), 0), UNITS + 1):
        taken, left = {}, enough
        for options, which in reversed(steps):
            p, s = options[which[left]]
            left = max(left - s, 0)
            taken |= {} if p is None else {p.site: p}
        if np.isfinite(least[enough]) and not _short(_saved(taken.values(), wanted), wanted):
            _spare(sites, wanted, taken)
            return taken
    return None


def _damage(taken: Mapping[str, Proposal]) -> float:
    return sum(p.damage or 0.0 for p in taken.values())


def _greedy(
    sites: Mapping[str, list[Proposal]],
    weights: Mapping[str, float],
    take: Callable[[Proposal | None, Proposal], bool],
) -> dict[str, Proposal]:
    """Steps along the hulls, least damage per unit gained first; a site ends where `take` refuses the next. By site."""
    taken: dict[str, Proposal] = {}
    heap = []
    for number, (site, alternatives) in enumerate(sites.items()):
        if steps := _hull([p for p in alternatives if _gain(p, weights) > 0], weights):
            heapq.heappush(heap, (_slope(None, steps[0], weights), number, site, steps))
    while heap:
        _, number, site, steps = heapq.heappop(heap)
        if not take(taken.get(site), steps[0]):
            continue
        taken[site] = steps[0]
        if steps[1:]:
            heapq.heappush(heap, (_slope(steps[0], steps[1], weights), number, site, steps[1:]))
    return taken


def _together(sites: Mapping[str, list[Proposal]], wanted: Mapping[str, float]) -> dict[str, Proposal]:
    """For several budgets: what is short counts more in the next round, what holds most amply less."""
    weights = {quantity: 1 / amount for quantity, amount in wanted.items()}
    best, least = {}, None
    for _ in range(ROUNDS):
        taken = _spend(sites, wanted, weights)
        saved = _saved(taken.values(), wanted)
        short = _short(saved, wanted)
        rank = sum(short.values()), _damage(taken)
        if least is None or rank < least:
            best, least = taken, rank
        if short:
            weights = {q: w * (2 if q in short else 1) for q, w in weights.items()}
        else:
            ample = max(wanted, key=lambda q: saved[q] / wanted[q])
            weights = {q: w / (1.5 if q == ample else 1) for q, w in weights.items()}
    _mend(sites, wanted, best)
    _spare(sites, wanted, best)
    return best


def _mend(sites: Mapping[str, list[Proposal]], wanted: Mapping[str, float], taken: dict[str, Proposal]) -> None:
    """Where budgets are short still, change one site at a time, as long as that brings them nearer."""
    everything = [p for alternatives in sites.values() for p in alternatives]
    saved = _saved(taken.values(), wanted)
    for _ in range(len(sites)):
        short = sum(_short(saved, wanted).values())
        if not short:
            return
        then = [{q: saved[q] + _step(taken.get(p.site), p, q) for q in wanted} for p in everything]
        ranks = [(sum(_short(s, wanted).values()), p.damage or 0.0) for s, p in zip(then, everything, strict=True)]
        index = min(range(len(ranks)), key=ranks.__getitem__)
        if not ranks[index][0] < short:
            return
        taken[everything[index].site], saved = everything[index], then[index]


def _spare(sites: Mapping[str, list[Proposal]], wanted: Mapping[str, float], taken: dict[str, Proposal]) -> None:
    """Take back what no budget needs, the most damage first."""
    saved = _saved(taken.values(), wanted)
    if _short(saved, wanted):
        return
    for p in sorted(taken.values(), key=lambda p: -(p.damage or 0.0)):
        less = [other for other in sites[p.site] if (other.damage or 0.0) < (p.damage or 0.0)]
        for other in (None, *sorted(less, key=lambda other: other.damage or 0.0)):
            then = {q: saved[q] + _step(p, other, q) for q in wanted}
            if not _short(then, wanted):
                saved = then
                del taken[p.site]
                taken |= {} if other is None else {p.site: other}
                break


def _short(saved: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    """Quantities of which too little is saved -> the share of what is wanted that is missing."""
    missing = {q: 1 - saved[q] / amount for q, amount in wanted.items()}
    return {q: share for q, share in missing.items() if share > ROUNDING}


def _saved(chosen: Iterable[Proposal], quantities: Iterable[str]) -> dict[str, float]:
    chosen = list(chosen)
    return {q: sum(saving(p, q) for p in chosen) for q in quantities}


def _step(before: Proposal | None, after: Proposal | None, quantity: str) -> float:
    """What is saved more by an alternative than by another, or by none."""
    return (saving(after, quantity) if after else 0.0) - (saving(before, quantity) if before else 0.0)


def _hull(alternatives: Sequence[Proposal], weights: Mapping[str, float]) -> list[Proposal]:
    """The alternatives on the lower convex hull of damage over gain, by rising gain."""
    hull: list[Proposal] = []
    for p in sorted(alternatives, key=lambda p: (_gain(p, weights), p.damage or 0.0)):
        while hull and (p.damage or 0.0) <= (hull[-1].damage or 0.0):
            hull.pop()
        while hull and _slope(hull[-2] if len(hull) > 1 else None, hull[-1], weights) >= _slope(hull[-1], p, weights):
            hull.pop()
        if not hull or _gain(p, weights) > _gain(hull[-1], weights):
            hull.append(p)
    return hull


def _slope(before: Proposal | None, after: Proposal, weights: Mapping[str, float]) -> float:
    """Damage per unit gained from one alternative to the next."""
    gained = _gain(after, weights) - (_gain(before, weights) if before else 0.0)
    hurt = (after.damage or 0.0) - ((before.damage or 0.0) if before else 0.0)
    return hurt / gained if gained > 0 else float("inf")


def _gain(p: Proposal, weights: Mapping[str, float]) -> float:
    return sum(weight * saving(p, quantity) for quantity, weight in weights.items())


def known(p: Proposal, quantity: str) -> bool:
    """Whether a proposal says what it does to a quantity of `Cost`. Where nothing is left, nothing has to be known."""
    if p.before is None or p.after is None:
        return False
    if quantity not in PREDICTED:
        return True
    return getattr(p.before, quantity) > 0 and (getattr(p.after, quantity) > 0 or p.after == Cost())


def saving(proposal: Proposal, quantity: str) -> float:
    """How much of a quantity of `Cost` a proposal is predicted to save; 0 when it does not say."""
    if not known(proposal, quantity):
        return 0.0
    return float(getattr(proposal.before, quantity) - getattr(proposal.after, quantity))


def pays(p: Proposal, goals: Sequence[str]) -> bool:
    """Whether a single rewrite is not foretold to make things worse: it must lower one of the goals, or leave it.

    What is predicted (latency, energy) has to fall; what is counted must not rise.
    """
    told = [goal for goal in goals if goal in GOALS and known(p, GOALS[goal])]
    saved = [(saving(p, GOALS[goal]), GOALS[goal] in PREDICTED) for goal in told]
    return len(told) < len(goals) or any(amount > 0 or (amount == 0 and not must_fall) for amount, must_fall in saved)


def decisive(goal: str, proposals: Sequence[Proposal]) -> str:
    """The attribute of `Cost` by which rewrites are worth more or less; MACs where not all say what is predicted."""
    quantity = GOALS.get(goal, "macs")
    return quantity if all(known(p, quantity) for p in proposals) else "macs"


def by_worth(chosen: Sequence[Proposal], quantity: str) -> list[Proposal]:
    """The order in which to give rewrites up, last first: least damage per unit saved first."""

    def price(p: Proposal) -> tuple[float, float]:
        saved = saving(p, quantity)
        damage = p.damage if p.damage is not None else float("inf")
        return (damage / saved if saved > 0 else float("inf"), damage)

    return sorted(chosen, key=price)


def _by_site(proposals: Sequence[Proposal]) -> dict[str, list[Proposal]]:
    ordered = sorted(proposals, key=lambda p: p.site)
    groups = {site: list(group) for site, group in groupby(ordered, key=lambda p: p.site)}
    return {p.site: groups[p.site] for p in proposals}
