"""effc.search: which rewrites are given up, and in what order, where all outcomes are told beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from effc.capture import from_proto
from effc.contract import Proposal
from effc.cost import Cost
from effc.guard import Guard
from effc.history import KEPT, UNDONE, NodeRecord, PassRecord, Predicted, StageRecord
from effc.measure import Latency
from effc.model import Model
from effc.predict import MEASURED
from effc.search import FARTHEST, GAIN, LOOKS, Search
from effc.stages import Attempt
from tests import networks

Drop = Callable[[frozenset[int]], float | None]


def proposals(damages: Sequence[float], savings: Sequence[int] | None = None) -> list[Proposal]:
    savings = savings or [10] * len(damages)
    return [
        Proposal(f"layer{i}", (f"layer{i}",), {"rank": i}, Cost(macs=100), Cost(macs=100 - s), d)
        for i, (d, s) in enumerate(zip(damages, savings, strict=True))
    ]


class Told:
    """A guard and attempts that do nothing: `looks` are at part of the data, `judged` at all of it."""

    goal, times, choosing_samples, chosen_on_part = "macs", True, 50, False

    def __init__(self, part: Drop = lambda kept: 0.0, whole: Drop = lambda kept: 0.0) -> None:
        self.part, self.whole = part, whole
        self.ratios: dict[str, tuple[float, float, float]] = {}
        self.looks: list[frozenset[int]] = []
        self.judged: list[frozenset[int]] = []
        self.made: dict[int, frozenset[int]] = {}
        self.everything: list[Proposal] = []
        self.raced = 0
        self.error = 0.0
        self.foretold: dict[frozenset[int], float] = {}
        self.basis = MEASURED
        self.slow: list[frozenset[int]] = []  # what is foretold to be slower than before

    def hopeless(self, before: Model, after: Model) -> bool:
        return self.made[id(after)] in self.slow

    def predicted(self, before: Model, after: Model) -> Predicted | None:
        ratio = self.foretold.get(self.made[id(after)])
        return None if ratio is None else Predicted(1.0, ratio, ratio, 0.01, self.basis)

    def make(self, chosen: list[Proposal]) -> Attempt:
        model = from_proto(networks.mlp())
        self.made[id(model)] = frozenset(p.setting["rank"] for p in chosen)
        done = {p.site for p in chosen}
        ledger = [
            NodeRecord(p.site, "Conv", "changed", (p.site,), p.setting, damage=p.damage)
            if p.site in done
            else NodeRecord(p.site, "Conv", "skipped", reason="nothing for it to do")
            for p in self.everything
        ]
        ledger.append(NodeRecord("other", "Conv", "skipped", reason="nothing for it to do"))
        return Attempt(model, [PassRecord("lossy", "lossy", False, KEPT, ledger=ledger)], {}, [list(chosen)], [])

    def drop(self, model: Model) -> float | None:
        self.looks.append(self.made[id(model)])
        return self.part(self.looks[-1])

    def drop_error(self, model: Model) -> float:
        return self.error

    def judge(self, record: StageRecord, before: Model, after: Model, lossy: bool, limit: float | None) -> None:
        assert lossy and limit is not None
        self.judged.append(self.made[id(after)])
        drop = self.whole(self.judged[-1])
        if drop is not None and drop > limit:
            record.status, record.cause, record.reason = UNDONE, "accuracy", f"{drop} is too much"

    def race(self, models: dict[str, Model]) -> dict[str, Latency]:
        self.raced += 1
        assert list(models) == ["all", *self.ratios]
        return {name: Latency(2.0, 2 * r, r, low, high, 9, 1, 1) for name, (r, low, high) in self.ratios.items()}


def full(told: Told, everything: list[Proposal]) -> tuple[Attempt, StageRecord]:
    """The attempt with all rewrites, and how it failed."""
    told.everything = everything
    attempt = told.make(everything)
    attempt.records[0].ledger[-1] = NodeRecord("other", "Conv", "skipped", reason="its weight is no constant")
    return attempt, StageRecord(attempt.records, UNDONE, "accuracy", "too much")


def within(told: Any, everything: list[Proposal], precise: list[Proposal] | None = None, limit: float = 1.0):
    attempt, failed = full(told, everything)
    search = Search(told, told.make, told.make)
    return search.within(limit, attempt.model, attempt, failed, everything if precise is None else precise)


def damage_of(damages: Sequence[float]) -> Drop:
    return lambda kept: sum(damages[i] for i in kept)


def test_the_worst_trades_are_given_up_first():
    """Damage per unit saved decides: layer 2 hurts most, but saves most too."""
    damages, savings = [1.0, 4.0, 6.0, 2.0, 0.5], [10, 20, 60, 10, 10]
    told = Told(lambda kept: 9.0)
    within(told, proposals(damages, savings))
    assert told.looks == [frozenset({4, 0, 2, 3}), frozenset({4, 0, 2}), frozenset({4, 0}), frozenset({4})]
    assert not told.judged  # nothing held the limit even on the part


def test_what_was_estimated_again_decides_the_order():
    precise = proposals([1.0, 9.0, 2.0])
    told = Told(lambda kept: 9.0)
    within(told, proposals([9.0, 1.0, 2.0]), [*precise, Proposal("elsewhere", (), {}, Cost(), Cost(), 0.0)])
    assert told.looks == [frozenset({0, 2}), frozenset({0})]


def test_stops_at_the_first_choice_that_holds_on_all_data():
    damages = [0.25, 0.5, 1.0, 2.0, 4.0]
    told = Told(damage_of(damages), damage_of(damages))
    attempt, record = within(told, proposals(damages))
    assert [p.setting["rank"] for p in attempt.chosen[0]] == [0, 1] and record.status == KEPT
    assert [len(kept) for kept in told.looks[:3]] == [4, 3, 2]
    assert told.judged == [frozenset({0, 1})] and told.chosen_on_part
    assert told.looks[3:] == [frozenset({0, 1, n}) for n in (2, 3, 4)]  # none of those may come back


def test_those_that_were_given_up_beside_the_guilty_one_come_back():
    """All seem to hurt alike, and the third alone does."""
    told = Told(lambda kept: 9.0 * (2 in kept), lambda kept: 9.0 * (2 in kept))
    attempt, record = within(told, proposals([1.0] * 6))
    assert [p.setting["rank"] for p in attempt.chosen[0]] == [0, 1, 3, 4, 5] and record.status == KEPT
    assert "1 of 6 rewrites were given up" in record.passes[0].notes[0]
    assert {e.node for e in attempt.records[0].ledger if e.reason.startswith("given up")} == {"layer2"}


def test_what_holds_on_the_part_alone_is_looked_at_and_passed_over():
    """No order is perfect: the part says yes to all, the whole to the third."""
    told = Told(lambda kept: 0.0, lambda kept: 0.5 if len(kept) <= 3 else 3.0)
    attempt, record = within(told, proposals([1.0] * 6))
    assert [len(kept) for kept in told.judged] == [5, 4, 3, 4, 4, 4] and len(attempt.chosen[0]) == 3
    assert record.status == KEPT and record.passes[0].notes == [
        "3 of 6 rewrites were given up to hold a drop of 1 points: chosen on 50 samples, judged 7 times on all"
        " evaluation samples"
    ]


@pytest.mark.parametrize("count", [30, 400])
def test_looks_at_all_data_are_bounded_and_the_last_failure_is_told(count):
    told = Told(lambda kept: 0.0, lambda kept: 5.0)
    attempt, record = within(told, proposals([1.0] * count))
    assert len(told.judged) == len(told.looks) == LOOKS
    assert (record.status, record.cause) == (UNDONE, "accuracy") and attempt.model is not None
    assert f"judged {LOOKS + 1} times" in record.passes[0].notes[0]


def test_a_long_list_is_given_up_in_growing_steps():
    told = Told(lambda kept: 9.0)
    within(told, proposals([1.0] * 100))
    assert [100 - len(kept) for kept in told.looks] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 99]


def test_no_choice_that_holds_leaves_the_failure_as_it_was():
    for told, everything in ((Told(lambda kept: 9.0), proposals([1.0] * 4)), (Told(), proposals([1.0]))):
        attempt, record = within(told, everything)
        assert record.reason == "too much" and len(attempt.chosen[0]) == len(everything) and not told.judged
        count = len(everything)
        assert record.passes[0].notes[0].startswith(f"{count} of {count} rewrites were given up")


def test_a_drop_that_is_no_number_does_not_hold():
    told = Told(lambda kept: None)
    _, record = within(told, proposals([1.0] * 3))
    assert record.status == UNDONE and not told.judged


def test_the_ledger_says_what_was_given_up_and_keeps_what_was_refused_before():
    damages = [0.25, 4.0, 0.5]
    told = Told(damage_of(damages), damage_of(damages))
    attempt, _ = within(told, proposals(damages))
    entries = {e.node: e for e in attempt.records[0].ledger}
    assert {n: e.status for n, e in entries.items()} == {
        "layer0": "changed", "layer1": "skipped", "layer2": "changed", "other": "skipped",
    }  # fmt: skip
    assert entries["layer1"].reason == "given up to hold a drop of 1 points" and entries["layer1"].damage == 4.0
    assert entries["other"].reason == "its weight is no constant"
    assert entries["layer0"].reason == "" and entries["layer0"].damage == 0.25


@pytest.mark.parametrize(
    ("ratios", "taken"),
    [
        ([(0.9, 0.88, 0.92)], [1, 2, 3]),
        ([(0.9, 0.88, 0.92), (0.8, 0.7, 0.9)], [2, 3]),  # the fastest
        ([(0.8, 0.78, 0.82), (0.9, 0.85, 0.95)], [1, 2, 3]),
        ([(0.9, 0.7, 1.1)], None),  # faster, but not beyond doubt
        ([(GAIN + 0.005, 0.98, 0.99)], None),  # beyond doubt, but by next to nothing
        ([(1.2, 1.1, 1.3), (1.0, 0.99, 1.01)], None),
    ],
)
def test_a_variant_is_taken_only_where_it_is_faster_beyond_doubt(ratios, taken):
    told: Any = Told()
    everything = proposals([1.0] * 4)
    attempt, _ = full(told, everything)
    told.ratios = {str(i): r for i, r in enumerate(ratios)}
    variants = [everything[k + 1 :] for k in range(len(ratios))]
    found = Search(told, told.make, told.make).quickest(attempt.model, attempt, variants)
    assert told.raced == 1
    if taken is None:
        assert found is attempt
        return
    assert [p.setting["rank"] for p in found.chosen[0]] == taken
    entries = {e.node: e for e in found.records[0].ledger}
    ratio = min(r for r, _, _ in ratios)
    reason = f"measured faster with this layer in its old form ({ratio:.2f}x of the time)"
    assert [entries[f"layer{i}"].reason for i in range(4) if i not in taken] == [reason] * (4 - len(taken))
    assert entries["other"].reason == "its weight is no constant"


def test_what_is_foretold_to_be_slower_is_not_raced():
    """All four layers would be slower than before; of the variants, only the second would not."""
    told: Any = Told()
    everything = proposals([1.0] * 4)
    attempt, _ = full(told, everything)
    told.slow = [frozenset({0, 1, 2, 3}), frozenset({1, 2, 3})]
    told.ratios = {"1": (0.5, 0.4, 0.6)}
    variants = [everything[1:], everything[2:]]
    found = Search(told, told.make, told.make).quickest(attempt.model, attempt, variants)
    assert told.raced == 1 and [p.setting["rank"] for p in found.chosen[0]] == [2, 3]
    told.slow.append(frozenset({2, 3}))
    assert Search(told, told.make, told.make).quickest(attempt.model, attempt, variants) is attempt
    assert told.raced == 1


class Amounts:
    """Attempts by the damage that they spend, and what each loses."""

    def __init__(self, drop: Callable[[float], float | None]) -> None:
        self.told = Told(lambda kept: drop(self.spent[kept]))
        self.spent: dict[frozenset[int], float] = {}
        self.amounts: list[float] = []
        self.start = self.attempt(8.0)

    def attempt(self, amount: float) -> Attempt:
        mark = proposals([0.0] * (len(self.spent) + 1))
        self.spent[frozenset(p.setting["rank"] for p in mark)] = amount
        return self.told.make(mark)

    def spend(self, amount: float) -> Attempt:
        self.amounts.append(amount)
        return self.attempt(amount)

    def most(self, limit: float = 1.0, *, upwards: bool = True) -> tuple[float, Attempt]:
        """The damage of the attempt that is found, and that attempt."""
        told: Any = self.told
        found = Search(told, told.make, told.make).most_damage(limit, self.start, 8.0, self.spend, upwards=upwards)
        return self.spent[told.made[id(found.model)]], found


@pytest.mark.parametrize("bound", [0.36, 1.0, 3.0, 8.0, 11.0, 12.0, 100.0])
@pytest.mark.parametrize("upwards", [True, False])
def test_the_most_damage_that_holds_is_found_to_half_a_doubling(bound, upwards):
    """Amounts up to the bound hold. Seen from 8, in steps of the root of 2."""
    tried = Amounts(lambda amount: 0.5 if amount <= bound else 2.0)
    found, attempt = tried.most(upwards=upwards)
    if bound >= 8 and not upwards:
        assert found == 8 and not tried.amounts and not tried.told.chosen_on_part
        assert attempt is tried.start and not attempt.records[0].notes
        return
    assert found <= bound < found * 2**0.5 * (1 + 1e-9)
    assert tried.told.chosen_on_part and len(set(tried.amounts)) == len(tried.amounts) <= FARTHEST / 2 + 2
    assert attempt.records[0].notes == [
        f"as much damage as holds a drop of 1 points, of {len(tried.amounts) + 1} amounts tried: chosen on 50 samples"
    ]


def test_more_damage_is_tried_so_far_and_no_farther():
    tried = Amounts(lambda amount: 0.0)
    found, _ = tried.most()
    assert tried.amounts == pytest.approx([16, 32, 64, 128, 256, 256 * 2**0.5])
    assert found == pytest.approx(256 * 2**0.5)


def test_less_damage_is_tried_by_halves():
    tried = Amounts(lambda amount: 0.0 if amount <= 2 else 9.0)
    assert tried.most()[0] == 2 and tried.amounts == pytest.approx([4, 2, 8**0.5])


def test_amounts_that_were_looked_for_hold_by_a_standard_error():
    tried = Amounts(lambda amount: amount / 16)  # the limit holds up to 16
    tried.told.error = 0.25
    assert tried.most()[0] == pytest.approx(8 * 2**0.5)
    tried.told.error = 0.6
    assert tried.most()[0] == 8  # the first, though it would not hold with the error added: it was not looked for


@pytest.mark.parametrize(("bound", "judged"), [(4.0, [32**0.5, 4.0]), (3.0, [32**0.5, 4.0, 8**0.5]), (0.5, None)])
def test_where_all_data_say_no_smaller_amounts_are_judged(bound, judged):
    """The part says yes up to 8, all data up to the bound; none holds within four steps of the root of 2."""
    tried = Amounts(lambda amount: 0.5 if amount <= 8 else 2.0)
    told: Any = tried.told
    told.whole = lambda kept: 0.5 if tried.spent[kept] <= bound else 2.0
    search = Search(told, told.make, told.make)
    attempt = search.most_damage(1.0, tried.start, 8.0, tried.spend, upwards=True)
    failed = StageRecord(attempt.records, UNDONE, "accuracy", "too much")
    found, record = search.weaker(1.0, attempt.model, attempt, failed)
    looked = [tried.spent[kept] for kept in told.judged]
    if judged is None:
        assert found is attempt and record is failed and len(looked) == 4
        return
    assert looked == pytest.approx(judged) and tried.spent[told.made[id(found.model)]] == pytest.approx(judged[-1])
    assert record.status == KEPT and "of the damage that holds a drop of 1 points" in found.records[0].notes[-1]


def test_where_nothing_held_on_the_part_nothing_smaller_is_judged():
    tried = Amounts(lambda amount: 5.0)
    told: Any = tried.told
    search = Search(told, told.make, told.make)
    attempt = search.most_damage(1.0, tried.start, 8.0, tried.spend, upwards=True)
    failed = StageRecord(attempt.records, UNDONE, "accuracy", "too much")
    assert search.weaker(1.0, attempt.model, attempt, failed) == (attempt, failed) and not told.judged


def test_where_no_amount_holds_the_least_is_what_comes_back():
    tried = Amounts(lambda amount: 5.0)
    assert tried.most()[0] == min(tried.amounts) == pytest.approx(0.25)
    assert tried.most(upwards=False)[0] == pytest.approx(0.25)


def test_a_drop_on_the_limit_holds_and_one_that_is_no_number_does_not():
    assert Amounts(lambda amount: 1.0 if amount <= 8 else 1.0001).most()[0] == 8
    assert Amounts(lambda amount: None if amount > 4 else 0.0).most()[0] == 4


def test_seconds_decide_the_order_where_latency_is_the_goal_and_all_are_known():
    """By MACs layer 1 is the worst trade; by seconds layer 0 is."""
    damages, seconds = [1.0, 1.0, 0.1], [(5.0, 4.0), (5.0, 1.0), (5.0, 3.0)]
    everything = [
        replace(p, before=replace(p.before, seconds=a), after=replace(p.after, seconds=b))
        for p, (a, b) in zip(proposals(damages, [20, 10, 10]), seconds, strict=True)
    ]
    for goal, looks in (("macs", [{0, 2}, {2}]), ("latency", [{1, 2}, {2}])):
        told = Told(lambda kept: 9.0)
        told.goal = goal
        within(told, everything)
        assert told.looks == [frozenset(look) for look in looks]
    told = Told(lambda kept: 9.0)
    told.goal = "latency"
    within(told, [*everything[:2], replace(everything[2], after=Cost(macs=90))])  # of one it is not known: MACs
    assert told.looks == [frozenset({0, 2}), frozenset({2})]


def test_nothing_is_raced_without_variants_or_without_a_clock():
    told: Any = Told()
    attempt, _ = full(told, proposals([1.0] * 2))
    assert Search(told, told.make, told.make).quickest(attempt.model, attempt, []) is attempt
    told.times = False
    assert Search(told, told.make, told.make).quickest(attempt.model, attempt, [[attempt.chosen[0][0]]]) is attempt
    assert told.raced == 0


@pytest.mark.parametrize(
    ("ratios", "basis", "taken"),
    [
        ((0.9, 0.95), MEASURED, [1, 2, 3]),
        ((0.95, 0.9), MEASURED, [2, 3]),
        ((GAIN, 1.1), MEASURED, None),
        ((0.9, 0.8), "roofline", None),  # a lower bound, which says little about ratios
        ((None, None), MEASURED, None),
    ],
)
def test_without_a_clock_predictions_of_the_whole_decide(ratios, basis, taken):
    told: Any = Told()
    everything = proposals([1.0] * 4)
    attempt, _ = full(told, everything)
    told.times, told.basis = False, basis
    told.foretold = dict(zip((frozenset({1, 2, 3}), frozenset({2, 3})), ratios, strict=True))
    found = Search(told, told.make, told.make).quickest(attempt.model, attempt, [everything[1:], everything[2:]])
    assert told.raced == 0 and (found is attempt) == (taken is None)
    if taken is not None:
        assert [p.setting["rank"] for p in found.chosen[0]] == taken
        reason = f"predicted to be faster with this layer in its old form ({min(ratios):.2f}x of the time)"
        assert found.records[0].ledger[0].reason == reason


def test_the_stand_in_has_what_a_guard_has():
    for name in ("times", "choosing_samples", "drop", "drop_error", "judge", "race", "hopeless", "predicted"):
        assert hasattr(Guard, name) and hasattr(Told, name)
    assert {"chosen_on_part", "goal"} <= Guard.__dataclass_fields__.keys()
