"""Which proposals to take: at most one a site, under the pass's budget.

A budget on MACs or bytes is a multiple-choice knapsack. It is solved greedily over the convex hull of each site's
alternatives, cheapest damage per unit saved first (Sinha and Zoltners, 1979): within one step of the optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import groupby

from effc.contract import Proposal
from effc.cost import Cost

QUANTITIES = {"macs": "macs", "size": "weight_bytes"}


def choose(proposals: Sequence[Proposal], budget: Mapping[str, float], total: Cost) -> list[Proposal]:
    """The proposals to make.

    Args:
        proposals: all alternatives of all sites; a pass's own preference stands first among those of a site.
        budget: `macs` or `size`: share of the total to keep at most. Empty: each site's first alternative. (The
            budget `max_drop` is held by evaluation along `by_worth`, which is the manager's business.)
        total: cost of the whole model.

    Returns:
        At most one proposal a site, in the order of `proposals`. All that there is when the budget is out of reach.
    """
    sites = _by_site(proposals)
    kept = [(QUANTITIES[name], share) for name, share in budget.items() if name in QUANTITIES]
    if not kept:
        return [alternatives[0] for alternatives in sites.values()]
    taken: dict[str, Proposal] = {}
    for quantity, share in kept:
        whole = getattr(total, quantity)
        _spend(sites, quantity, whole - share * whole, taken)
    return [p for p in proposals if taken.get(p.site) is p]


def _spend(sites: Mapping[str, list[Proposal]], quantity: str, wanted: float, taken: dict[str, Proposal]) -> None:
    """Take steps along the hulls, best first, until `wanted` is saved."""
    saved = sum(saving(p, quantity) for p in taken.values())
    heap = []
    for number, (site, alternatives) in enumerate(sites.items()):
        steps = _hull([p for p in alternatives if saving(p, quantity) > 0], quantity)
        steps = [p for p in steps if site not in taken or saving(p, quantity) > saving(taken[site], quantity)]
        if steps:
            heapq.heappush(heap, (_slope(taken.get(site), steps[0], quantity), number, site, steps))
    while heap and saved < wanted:
        _, number, site, steps = heapq.heappop(heap)
        before = taken.get(site)
        saved += saving(steps[0], quantity) - (saving(before, quantity) if before else 0.0)
        taken[site] = steps[0]
        if steps[1:]:
            heapq.heappush(heap, (_slope(steps[0], steps[1], quantity), number, site, steps[1:]))


def _hull(alternatives: Sequence[Proposal], quantity: str) -> list[Proposal]:
    """The alternatives on the lower convex hull of damage over saving, by rising saving."""
    hull: list[Proposal] = []
    for p in sorted(alternatives, key=lambda p: (saving(p, quantity), p.damage or 0.0)):
        while hull and (p.damage or 0.0) <= (hull[-1].damage or 0.0):
            hull.pop()
        while hull and _slope(hull[-2] if len(hull) > 1 else None, hull[-1], quantity) >= _slope(hull[-1], p, quantity):
            hull.pop()
        if not hull or saving(p, quantity) > saving(hull[-1], quantity):
            hull.append(p)
    return hull


def _slope(before: Proposal | None, after: Proposal, quantity: str) -> float:
    """Damage per unit saved from one alternative to the next."""
    saved = saving(after, quantity) - (saving(before, quantity) if before else 0.0)
    hurt = (after.damage or 0.0) - ((before.damage or 0.0) if before else 0.0)
    return hurt / saved if saved > 0 else float("inf")


def saving(proposal: Proposal, quantity: str) -> float:
    """How much of a quantity of `Cost` a proposal is predicted to save; 0 when it does not say."""
    if proposal.before is None or proposal.after is None:
        return 0.0
    return float(getattr(proposal.before, quantity) - getattr(proposal.after, quantity))


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
