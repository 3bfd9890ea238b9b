"""effc.choose: the greedy knapsack against brute force, and the order in which rewrites are given up."""

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.choose import by_worth, choose, saving
from effc.contract import Proposal
from effc.cost import Cost


def proposal(site: str, saved: int, damage: float | None, size: int = 0, setting: int = 0) -> Proposal:
    """Saves so many MACs and bytes of 1000."""
    before, after = Cost(1000, 0, 1000), Cost(1000 - saved, 0, 1000 - size)
    return Proposal(site, (site,), {"setting": setting}, before, after, damage)


def total_damage(chosen) -> float:
    return sum(p.damage for p in chosen)


def total_saving(chosen, quantity: str = "macs") -> float:
    return sum(saving(p, quantity) for p in chosen)


def by_brute_force(proposals, wanted: float) -> float | None:
    """Least damage that saves what is wanted with at most one proposal a site; None when nothing does."""
    sites = defaultdict(list)
    for p in proposals:
        sites[p.site].append(p)
    every = itertools.product(*([None, *alternatives] for alternatives in sites.values()))
    fitting = ([p for p in picked if p is not None] for picked in every)
    return min((total_damage(p) for p in fitting if total_saving(p) >= wanted), default=None)


ALTERNATIVE = st.tuples(st.integers(0, 60), st.integers(0, 100).map(lambda n: n / 100))
KNAPSACK = st.lists(st.lists(ALTERNATIVE, min_size=1, max_size=4), min_size=1, max_size=4)


def proposals_of(knapsack) -> list[Proposal]:
    return [
        proposal(f"site{i}", saved, damage, setting=j)
        for i, alternatives in enumerate(knapsack)
        for j, (saved, damage) in enumerate(alternatives)
    ]


@settings(max_examples=300, deadline=None)
@given(KNAPSACK, st.sampled_from([0.95, 0.9, 0.8, 0.7, 0.5]))
def test_the_damage_is_within_one_step_of_the_least_possible(knapsack, share):
    proposals = proposals_of(knapsack)
    whole = Cost(macs=200)
    wanted = (1 - share) * whole.macs
    chosen = choose(proposals, {"macs": share}, whole)
    assert len({p.site for p in chosen}) == len(chosen)
    assert [p for p in proposals if any(p is c for c in chosen)] == chosen  # in their order
    least = by_brute_force(proposals, wanted - 1e-9)
    if least is None:  # out of reach: each site saves the most it can
        most = defaultdict(float)
        for p in proposals:
            most[p.site] = max(most[p.site], saving(p, "macs"))
        assert total_saving(chosen) == sum(most.values())
        return
    assert total_saving(chosen) >= wanted - 1e-9
    # The last step leads to one of the proposals taken, and adds at most that one's damage.
    assert total_damage(chosen) <= least + max((p.damage for p in chosen), default=0.0) + 1e-9


@settings(max_examples=200, deadline=None)
@given(KNAPSACK, st.sampled_from([0.9, 0.7, 0.5]))
def test_nothing_is_taken_beyond_the_budget(knapsack, share):
    """Before the last step, which saves no more than the largest proposal taken, the budget did not hold."""
    whole = Cost(macs=200)
    chosen = choose(proposals_of(knapsack), {"macs": share}, whole)
    if chosen:
        assert total_saving(chosen) - max(saving(p, "macs") for p in chosen) < (1 - share) * whole.macs


def test_the_optimum_by_hand():
    """Site a: 30 for 0.1 then 60 for 0.6 (0.0033, 0.0167 a unit); site b: 40 for 0.2 (0.005)."""
    a, better, b = proposal("a", 30, 0.1, setting=1), proposal("a", 60, 0.6, setting=2), proposal("b", 40, 0.2)
    assert choose([a, better, b], {"macs": 0.95}, Cost(macs=1000)) == [a, b]  # 50 wanted, 70 saved
    assert choose([a, better, b], {"macs": 0.97}, Cost(macs=1000)) == [a]
    assert choose([a, better, b], {"macs": 0.92}, Cost(macs=1000)) == [better, b]


def test_an_alternative_off_the_hull_is_not_taken():
    """30 for 0.5 lies above the line from nothing to 60 for 0.6."""
    off, on = proposal("a", 30, 0.5, setting=1), proposal("a", 60, 0.6, setting=2)
    assert choose([off, on], {"macs": 0.97}, Cost(macs=1000)) == [on]


def test_without_a_budget_the_first_alternative_of_each_site_is_taken():
    first, second, other = proposal("a", 1, 0.9, setting=1), proposal("a", 9, 0.1, setting=2), proposal("b", 0, None)
    assert choose([first, second, other], {}, Cost(1000)) == [first, other]
    assert choose([second, other, first], {"max_drop": 1.0}, Cost(1000)) == [second, other]
    assert choose([], {"macs": 0.5}, Cost(1000)) == []


def test_a_budget_on_bytes_counts_bytes():
    thin, small = proposal("a", 500, 0.1, size=0), proposal("b", 0, 0.2, size=300)
    assert choose([thin, small], {"size": 0.8}, Cost(1000, 0, 1000)) == [small]
    assert choose([thin, small], {"macs": 0.8}, Cost(1000, 0, 1000)) == [thin]
    assert choose([thin, small], {"macs": 0.8, "size": 0.8}, Cost(1000, 0, 1000)) == [thin, small]


def test_a_budget_that_holds_already_takes_nothing():
    assert choose([proposal("a", 500, 0.0)], {"macs": 1.0}, Cost(1000)) == []


def test_what_states_no_cost_saves_nothing_and_is_never_taken_for_a_budget():
    silent = Proposal("a", damage=0.0)
    assert saving(silent, "macs") == 0
    assert choose([silent], {"macs": 0.1}, Cost(1000)) == []


def test_worth_is_damage_per_unit_saved_and_what_is_not_known_comes_last():
    cheap, dear, free = proposal("cheap", 100, 0.1), proposal("dear", 10, 0.1), proposal("free", 1, 0.0)
    useless, unknown = proposal("useless", 0, 0.1), proposal("unknown", 100, None)
    assert by_worth([unknown, useless, dear, cheap, free], "macs") == [free, cheap, dear, useless, unknown]


@pytest.mark.parametrize("quantity", ["macs", "weight_bytes"])
def test_saving_is_before_less_after(quantity):
    assert saving(proposal("a", 30, None, size=30), quantity) == 30
    assert saving(proposal("a", -30, None, size=-30), quantity) == -30
