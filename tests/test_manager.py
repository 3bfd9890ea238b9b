"""effc.manager: stages, roll-back, the search under a limit on accuracy, blame, replay, the ledger and the node map."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import effc.guard
import effc.predict
from effc import edit
from effc.capture import from_proto
from effc.contract import Context, Pass, Proposal, Repeat, Skipped
from effc.cost import Cost, cost
from effc.data import open_data
from effc.errors import BadInput, PassFailed
from effc.evaluate import evaluate
from effc.guard import Guard
from effc.history import KEPT, UNCHANGED, UNDONE, History
from effc.manager import Outcome, PassManager
from effc.measure import Latency, random_feeds
from effc.model import Model
from effc.passes.fold_batchnorm import FoldBatchNorm
from effc.passes.simplify import Simplify
from effc.registry import backend
from effc.stages import stages
from effc.target import find
from tests import networks
from tests.fake_passes import COUNTS, Exact, Lossy, Paced, Recover, classifier, emptied, samples, scaled


def manager(model: Model, evaluation: dict | None = None, replay: Any = None, **options: Any) -> PassManager:
    """Times nothing unless `measure=True` is given."""
    runtime = backend("onnxruntime")
    data = None if evaluation is None else open_data(evaluation).for_model(model)
    settings: dict[str, Any] = {"measure": False, "batch": model.batch or 1, "dims": {"T": 6}} | options
    feeds = random_feeds(model, settings["batch"], settings["dims"])
    aim = replace(find("onnxruntime-avx2"), local=True)  # only its roofline is known, which decides nothing
    context = Context(model, aim, runtime, batch=settings["batch"], dims=settings["dims"])
    context.goal = settings.get("goal", "latency")
    guard = Guard(original=model, backend=runtime, feeds=feeds, context=context, evaluation=data, **settings)
    return PassManager(context, guard, replay)


def run(model: Model, *passes: Pass, **options: Any) -> Outcome:
    return manager(model, **options).run(model, passes)


def content(model: Model) -> bytes:
    return model.proto().SerializeToString(deterministic=True)


@pytest.fixture
def model() -> Model:
    return from_proto(networks.plain())


# Stages


def test_what_training_makes_of_the_original_takes_its_place(model):
    """For the passes behind it: they correct towards what it was trained to, not to what it was before."""
    seen: list[bytes] = []
    weight = next(iter(model.nodes("Conv"))).inputs[1].name
    told = manager(model)

    def look(here: Model, chosen: Any) -> None:
        seen.append(content(told.context.original))
        scaled(weight, 0.5)(here, chosen)

    def moved(by: float) -> Recover:
        return Recover(scaled(weight, by))

    outcome = told.run(model, [moved(1.01), Lossy(look), moved(1.02), moved(1.03), Lossy(look)])
    assert [s.status for s in outcome.stages] == [KEPT] * 4
    trained = run(model, moved(1.01)).model
    assert seen == [content(trained)] * 2  # not the third: something was lost before
    assert content(trained) != content(model)


E, L, R = Exact(), Lossy(), Recover()


@pytest.mark.parametrize(
    ("passes", "planned"),
    [
        ([], []),
        ([E, L, E], [[E], [L], [E]]),
        ([L, E, R, E], [[L, E, R], [E]]),
        ([E, L, R, L, R], [[E], [L, R], [L, R]]),
        ([L, L, R], [[L, L, R]]),
        ([R, L], [[R], [L]]),
        ([Repeat(2, (L, R))], [[L, R, L, R]]),
        ([Repeat(3, (Repeat(2, (L,)), E)), E], [[L, L, E] * 3, [E]]),
        ([L, Repeat(2, (E,)), R], [[L, E, E, R]]),
    ],
)
def test_a_recipe_falls_into_stages(passes, planned):
    assert [[type(step) for step in stage.passes] for stage in stages(passes)] == [
        [type(step) for step in stage] for stage in planned
    ]


def test_each_pass_knows_what_follows_it(model):
    log: list = []
    steps = [Exact(scaled("fc.weight", 1.0), log), Lossy(scaled("fc.weight", 1.1), log), Recover(log=log), Exact()]
    run(model, *steps)
    assert [entry[2] for entry in log if entry[0] == "rewrite"] == [
        ("lossy", "recover", "exact"), ("recover", "exact"), ("exact",),
    ]  # fmt: skip


# What is kept and what is undone


def test_a_lossy_pass_is_kept_and_the_given_model_is_as_it_was(model):
    before, revision = content(model), model.revision
    outcome = run(model, Lossy(scaled("fc.weight", 1.5)))
    assert [stage.status for stage in outcome.stages] == [KEPT]
    ratio = outcome.model.constant(outcome.model.value("fc.weight")) / model.constant(model.value("fc.weight"))
    assert np.allclose(ratio, 1.5)
    assert (content(model), model.revision) == (before, revision)


def test_an_exact_pass_that_drifts_is_undone(model):
    outcome = run(model, Exact(scaled("fc.weight", 1.01)), Lossy(scaled("fc.bias", 2.0)))
    first, second = outcome.stages
    assert first.status == UNCHANGED and first.passes[0].status == UNDONE
    assert first.passes[0].drift > 1e-3
    assert first.passes[0].reason.startswith("outputs moved by ")
    assert first.passes[0].reason.endswith(", more than the 1e-05 it promises")
    assert first.passes[0].cost_after == first.passes[0].cost_before
    assert second.status == KEPT  # the recipe goes on
    weight = outcome.model.constant(outcome.model.value("fc.weight"))
    assert np.array_equal(weight, model.constant(model.value("fc.weight")))


def test_an_exact_pass_within_its_tolerance_is_kept(model):
    record = run(model, Exact(scaled("fc.weight", 1 + 2e-6))).stages[0].passes[0]
    assert record.status == KEPT
    assert 0 < record.drift <= 1e-5


def test_a_pass_that_does_nothing_is_unchanged_and_says_so(model):
    silent = Exact(proposals=())
    skipping = Exact(proposals=(Skipped("node_conv1", "too small"), Skipped("node_conv2", "too small")))
    idle = Exact()
    reasons = [stage.passes[0].reason for stage in run(model, silent, skipping, idle).stages]
    assert reasons == [
        "the model has nothing for it",
        "every site was skipped: too small (2)",
        "everything was in the wanted form already",
    ]


def breaking(model: Model, chosen) -> None:
    scaled("fc.weight", 2.0)(model, chosen)
    model.node("node_conv1").name = "node_conv2"


def crashing(model: Model, chosen) -> None:
    raise ZeroDivisionError("no rank\nis left")


def refusing(model: Model, chosen) -> None:
    raise PassFailed("'fc' has a rank of 0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (breaking, "lossy: every name is its own: two nodes are called 'node_conv2'; leave this pass out"),
        (crashing, "lossy: ZeroDivisionError: no rank\nis left; leave this pass out"),
        (refusing, "lossy: 'fc' has a rank of 0; leave this pass out"),
    ],
)
def test_a_pass_that_breaks_its_contract_is_named_and_the_model_is_as_it_was(model, change, message):
    before = content(model)
    with pytest.raises(PassFailed) as found:
        run(model, Exact(), Lossy(change))
    assert str(found.value) == message
    assert content(model) == before


def test_what_the_user_must_mend_passes_through(model):
    def needy(model, chosen):
        raise BadInput("calibration data are needed")

    with pytest.raises(BadInput, match=r"^calibration data are needed$"):
        run(model, Lossy(needy))


def latency(ratio: float) -> Latency:
    return Latency(1.0, ratio, ratio, ratio - 0.01, ratio + 0.01, 9, 1, 1)


@pytest.fixture
def ratios(monkeypatch) -> list[float]:
    """What the next measurements find; the last one for good."""
    left = [0.5]

    def fake(before, after, feeds, **options):
        return latency(left.pop(0) if len(left) > 1 else left[0])

    monkeypatch.setattr(effc.guard, "compare", fake)
    return left


def test_what_is_slower_is_undone_and_the_rest_goes_on(model, ratios):
    ratios[:] = [1.5, 1.5, 0.8]
    outcome = run(model, Lossy(scaled("fc.weight", 1.5)), Lossy(scaled("fc.bias", 2.0)), measure=True)
    assert [stage.status for stage in outcome.stages] == [UNDONE, KEPT]
    undone = outcome.stages[0]
    assert undone.cause == "goal"
    assert undone.reason == "slower: 1.500 ms against 1.000 ms, 1.50x [1.49, 1.51] at batch 1"
    assert undone.passes[0].reason == undone.reason
    assert undone.passes[0].status == UNDONE
    after = outcome.model.constant
    assert np.array_equal(after(outcome.model.value("fc.weight")), model.constant(model.value("fc.weight")))
    assert np.array_equal(after(outcome.model.value("fc.bias")), 2 * model.constant(model.value("fc.bias")))


@pytest.mark.parametrize(
    ("times", "taken"),
    [
        ({"all": 1.0, "0": 0.9, "1": 0.8}, [0, 1, 3]),  # the second, without class 2
        ({"all": 1.0, "0": 0.99, "1": 1.2}, [0, 1, 2, 3]),  # none is clearly faster
    ],
)
def test_the_variant_that_is_measured_to_be_faster_is_taken(monkeypatch, ratios, times, taken):
    raced = []

    def race(models, feeds, reference, **options):
        raced.append(list(models))
        return {name: latency(times[name] / times[reference]) for name in models}

    monkeypatch.setattr(effc.guard, "compare_many", race)
    model = from_proto(classifier())
    plain = emptied()
    fewer = (["node_class3"], ["node_class2"])
    step = Lossy(plain.change, proposals=plain.proposals[:4], fewer=fewer)
    record = run(model, step, measure=True).stages[0].passes[0]
    assert raced == [["all", "0", "1"]]
    assert [site for site, _ in record.chosen] == [f"node_class{i}" for i in taken]
    assert run(model, step).stages[0].passes[0].counts["changed"] == 4  # nothing is timed without measuring
    assert len(raced) == 1


def test_a_stage_is_undone_as_a_whole(model, ratios):
    ratios[:] = [2.0]
    steps = [Lossy(scaled("fc.weight", 1.5)), Recover(scaled("fc.bias", 2.0))]
    outcome = run(model, *steps, measure=True)
    assert outcome.model is model
    assert [record.status for record in outcome.stages[0].passes] == [UNDONE, UNDONE]
    assert outcome.node_map == {node.name: (node.name,) for node in model.graph}


def test_what_loses_too_much_is_undone():
    """Emptying layer 5 costs 30 of 100 samples; one rewrite cannot be given up in part."""
    model = from_proto(classifier())
    step = Lossy(scaled("w5", 0.0))
    stage = run(model, step, evaluation=samples(), max_drop=10.0).stages[0]
    assert (stage.status, stage.cause) == (UNDONE, "accuracy")
    assert stage.reason == "top1 is worse by 30.00 points, at 70.00, on 100 samples, more than the 10 allowed"
    kept = run(model, step, evaluation=samples(), max_drop=30.0).stages[0]
    assert kept.status == KEPT
    assert (kept.accuracy.points, kept.accuracy.drop, kept.accuracy.samples) == (70.0, 30.0, 100)


def test_an_exact_pass_is_not_judged_by_accuracy(model):
    assert run(model, Exact(scaled("fc.weight", 1 + 2e-6)), max_drop=0.0).stages[0].accuracy is None


# Budgets


def paced(**budget: float) -> tuple[PassManager, Outcome]:
    """Six equal products that can be made quicker, in steps; damage rises from layer to layer and step to step."""
    model = from_proto(classifier())
    steps = manager(model)
    return steps, steps.run(model, [Paced(scaled("w0", 1.5), **budget)])


def settings(outcome: Outcome) -> list[tuple[str, float]]:
    return [(site.removeprefix("node_"), setting["share"]) for site, setting in outcome.stages[0].passes[0].chosen]


def test_a_speedup_is_taken_where_it_hurts_least():
    """Steps cost 1, 3 and 5 times (the number of the layer + 0.1), each for a quarter of a layer's time."""
    steps, outcome = paced(speedup=1.1)
    costs = steps.context.costs(steps.context.original)
    each = costs.nodes["node_class0"].seconds
    wanted = costs.total.seconds * (1 - 1 / 1.1)
    saved = sum(each * (1 - share) for _, share in settings(outcome))
    assert wanted <= saved < wanted + each / 4
    order = sorted(((number + 0.1) * (2 * step - 1), number, step) for number in range(1, 7) for step in (1, 2, 3))
    taken = order[: round(saved / (each / 4))]
    assert dict(settings(outcome)) == {
        f"class{n - 1}": 1 - max(s for _, m, s in taken if m == n) / 4 for _, n, _ in taken
    }
    record = outcome.stages[0].passes[0]
    assert record.notes == ["speedup=1.1 is held by the roofline alone"]
    reasons = {entry.node: entry.reason for entry in record.ledger}
    assert reasons["node_class5"] == "the budget speedup=1.1 does without it"
    assert reasons["node_sum1"] == "nothing for paced to do"
    assert outcome.stages[0].goals == ("latency",)


def test_energy_is_a_budget_too_and_both_hold():
    steps, outcome = paced(energy=0.9, speedup=1.05)
    costs = steps.context.costs(steps.context.original)
    left = sum((1 - share) * costs.nodes[f"node_{name}"].energy for name, share in settings(outcome))
    assert left >= 0.1 * costs.total.energy
    quick = sum((1 - share) * costs.nodes[f"node_{name}"].seconds for name, share in settings(outcome))
    assert quick >= costs.total.seconds * (1 - 1 / 1.05)
    assert outcome.stages[0].goals == ("latency", "energy")


def test_a_budget_out_of_reach_takes_all_and_says_so():
    _, outcome = paced(speedup=50)
    assert settings(outcome) == [(f"class{i}", 0.25) for i in range(6)]
    said = outcome.stages[0].passes[0].notes
    assert len(said) == 2 and re.fullmatch(r"speedup=50 is out of reach: 1\.\d+, going by its proposals", said[1])


def test_no_budget_takes_each_first_alternative():
    _, outcome = paced()
    assert settings(outcome) == [(f"class{i}", 0.75) for i in range(6)]
    assert outcome.stages[0].passes[0].notes == []


def test_a_speedup_needs_a_prediction(monkeypatch):
    monkeypatch.setattr(Context, "foresee", lambda self, model: None)
    with pytest.raises(BadInput, match="speedup= needs a predicted latency, and this model's is not known"):
        paced(speedup=1.1)


def test_a_pass_with_a_budget_is_judged_by_it(model, ratios):
    """Slower, and asked for by its size: kept, and variants are not tried, which would save less."""
    ratios[:] = [3.0]
    step = Lossy(scaled("fc.weight", 1.5), size=1.0, proposals=(Proposal("fc", ("node_fc",)),), fewer=(["fc"],))
    stage = run(model, step, measure=True).stages[0]
    assert (stage.status, stage.goals, stage.latency) == (UNCHANGED, ("size",), None)  # nothing has to be saved
    slim = Lossy(scaled("fc.weight", 1.5), size=0.9, proposals=(shrinking("fc"),), fewer=(["fc"],))
    stage = run(model, slim, measure=True).stages[0]
    assert (stage.status, stage.goals, stage.latency) == (KEPT, ("size",), None)
    both = [Lossy(scaled("fc.weight", 1.5), size=0.9, proposals=(shrinking("fc"),)), Recover(scaled("fc.bias", 2.0))]
    stage = run(model, *both, measure=True).stages[0]
    assert (stage.status, stage.goals) == (KEPT, ("size",))


def shrinking(name: str) -> Proposal:
    return Proposal(name, (f"node_{name}",), {}, Cost(weight_bytes=10_000), Cost(weight_bytes=0), damage=0.0)


def test_what_is_foretold_not_to_pay_is_left_alone_with_its_figures(model):
    slower = Proposal("conv1", ("node_conv1",), {}, Cost(1, seconds=12.3e-6), Cost(1, seconds=15e-6))
    quicker = Proposal("fc", ("node_fc",), {}, Cost(1, seconds=12.3e-6), Cost(1, seconds=9e-6))
    record = run(model, Lossy(scaled("fc.weight", 2.0), proposals=(slower, quicker))).stages[0].passes[0]
    reasons = {entry.node: entry for entry in record.ledger}
    assert reasons["node_conv1"].reason == "predicted not to pay: 12.3 us before, 15.0 us after"
    assert reasons["node_fc"].gain == {"seconds": (12.3e-6, 9e-6)}
    assert record.notes == ["1 of 2 rewrites: predicted not to pay in latency"]
    none = run(model, Lossy(scaled("fc.weight", 2.0), proposals=(slower,))).stages[0]
    assert none.status == UNCHANGED
    assert none.passes[0].reason == "every site was skipped: predicted not to pay: 12.3 us before, 15.0 us after (1)"
    forced = run(model, Lossy(scaled("fc.weight", 2.0), proposals=(slower,)), force=True).stages[0]
    assert forced.status == KEPT


@pytest.mark.parametrize(("ratio", "taken"), [(0.9, ["conv1", "fc"]), (1.1, ["fc"])])
def test_what_is_foretold_not_to_pay_is_measured_beside_the_rest(model, ratios, monkeypatch, ratio, taken):
    slower = Proposal("conv1", ("node_conv1",), {}, Cost(1, seconds=12.3e-6), Cost(1, seconds=15e-6))
    quicker = Proposal("fc", ("node_fc",), {}, Cost(1, seconds=12.3e-6), Cost(1, seconds=9e-6))
    ratios[:] = [0.9]

    def race(self, models):
        each = dict(zip(models, (1.0, ratio), strict=True))
        return {name: Latency(1.0, r, r, r - 0.01, r + 0.01, 9, 1, 1) for name, r in each.items()}

    monkeypatch.setattr(Guard, "race", race)
    stage = run(model, Lossy(scaled("fc.weight", 1.01), proposals=(slower, quicker)), measure=True).stages[0]
    assert [site for site, _ in stage.passes[0].chosen] == taken and stage.status == KEPT


# Prediction


def test_costs_at_the_ends_of_a_stage_are_those_on_the_target(model):
    steps = manager(model)
    outcome = steps.run(model, [FoldBatchNorm(), Lossy(scaled("fc.weight", 1.5)), Exact()])
    fold, lossy, idle = (stage.passes[0] for stage in outcome.stages)
    assert fold.cost_before == steps.context.costs(model).total
    assert fold.cost_after == lossy.cost_before == lossy.cost_after  # new numbers cost what the old did
    assert fold.cost_after.energy > 0 and fold.cost_after.seconds > 0 and idle.cost_after.energy == 0
    predicted = outcome.stages[0].predicted
    assert (predicted.before_ms, predicted.after_ms) == (1e3 * fold.cost_before.seconds, 1e3 * fold.cost_after.seconds)
    assert predicted.basis == "roofline" and 0.5 < predicted.ratio <= 1.0
    assert outcome.stages[1].predicted.ratio == 1.0 and outcome.stages[2].predicted is None


def test_each_end_of_a_stage_is_predicted_once(model, monkeypatch):
    runtime, asked = backend("onnxruntime"), []
    real = type(runtime)._lower
    monkeypatch.setattr(
        type(runtime), "_lower", lambda self, m, *rest: asked.append(m.revision) or real(self, m, *rest)
    )
    run(model, FoldBatchNorm(), Lossy(scaled("fc.weight", 1.5)))
    assert len(asked) == len(set(asked)) == 3


# The search under a limit on accuracy


@pytest.fixture
def evaluations(monkeypatch) -> list[tuple[int, str]]:
    """Number of samples and digest of each evaluation."""
    made: list[tuple[int, str]] = []

    def counted(sessions, data, **options):
        made.append((len(data), data.digest))
        return evaluate(sessions, data, **options)

    monkeypatch.setattr(effc.guard, "evaluate", counted)
    return made


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        # Classes lose 0, 2, 4, 8, 16 and 30 points of 100 when their layers are emptied, damages being foretold.
        (2.0, [0, 1]),
        (7.0, [0, 1, 2]),
        (20.0, [0, 1, 2, 3]),
        (30.0, [0, 1, 2, 3, 4]),
        (60.0, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_the_search_gives_up_the_worst_rewrites_first(limit, kept):
    model = from_proto(classifier())
    damages = (0, *COUNTS[1:])
    stage = run(model, emptied(damages=damages), evaluation=samples(), max_drop=limit).stages[0]
    assert stage.status == KEPT
    assert [site for site, _ in stage.passes[0].chosen] == [f"node_class{i}" for i in kept]
    assert stage.accuracy.drop == pytest.approx(sum(COUNTS[i] for i in kept if i))
    given_up = {entry.node: entry for entry in stage.passes[0].ledger if entry.reason.startswith("given up")}
    assert set(given_up) == {f"node_class{i}" for i in range(6) if i not in kept}
    for i in range(6):
        if i not in kept:
            entry = given_up[f"node_class{i}"]
            assert (entry.reason, entry.damage) == (f"given up to hold a drop of {limit:g} points", damages[i])


def test_a_pass_may_bring_a_stricter_limit_of_its_own():
    model = from_proto(classifier())
    damages = (0, *COUNTS[1:])
    for own, general in ((7.0, 50.0), (50.0, 7.0), (7.0, None)):
        stage = run(model, emptied(own, damages), evaluation=samples(), max_drop=general).stages[0]
        assert [site for site, _ in stage.passes[0].chosen] == ["node_class0", "node_class1", "node_class2"]


def test_a_limit_of_a_pass_needs_evaluation_data():
    model = from_proto(classifier())
    with pytest.raises(BadInput, match="max_drop needs evaluation data: give --evaluate SPEC"):
        run(model, emptied(1.0))


def test_the_search_stays_on_its_samples_and_asks_for_precise_damage_once(evaluations):
    model = from_proto(classifier())
    step = emptied(damages=(0, *COUNTS[1:]))
    steps = manager(model, evaluation=samples(), max_drop=7.0)
    stage = steps.run(model, [step]).stages[0]
    whole, half = steps.guard.evaluation, steps.guard.evaluation.split()[0]
    # judged in full, found wanting; then chosen on the even samples, and judged in full again; none may come back
    assert evaluations[0] == evaluations[-4] == (100, whole.digest)
    assert evaluations[-3:] == [(50, half.digest)] * 3
    assert set(evaluations[1:]) == {(100, whole.digest), (50, half.digest)}
    assert [entry[1] for entry in step.log if entry[0] == "propose"] == [False, True]
    assert not steps.context.precise
    note = stage.passes[0].notes[0]
    assert note.startswith("3 of 6 rewrites were given up to hold a drop of 7 points")
    judged = sum(samples == 100 for samples, _ in evaluations)
    assert note.endswith(f"chosen on 50 samples, judged {judged} times on all evaluation samples")


def test_after_the_search_the_ledger_still_says_what_the_pass_left_alone():
    model = from_proto(classifier())
    step = emptied(damages=(0, *COUNTS[1:]))
    step = Lossy(step.change, proposals=(*step.proposals, Skipped("node_sum1", "it adds")))
    record = run(model, step, evaluation=samples(), max_drop=7.0).stages[0].passes[0]
    reasons = {entry.node: entry.reason for entry in record.ledger}
    assert reasons["node_sum1"] == "it adds"
    assert reasons["node_class5"] == "given up to hold a drop of 7 points"
    assert reasons["node_sum2"] == "nothing for lossy to do"


def test_what_fails_on_all_samples_is_followed_by_fewer_rewrites():
    """Only odd samples are of classes 3 to 5: on the even ones their layers may go."""
    model = from_proto(classifier())
    order = [label for pair in range(50) for label in (pair % 3, 3 + pair % 3)]
    damages = [0.0, 0.1, 0.2, 0.01, 0.02, 0.03]  # told to be cheap: 0, 3, 4, 5, 1, 2 is the order
    stage = run(model, emptied(damages=damages), evaluation=samples(order), max_drop=20.0).stages[0]
    # Even samples: 1 and 2 lose 34 and 32 of 100, the others nothing. Of all: 3, 4 and 5 lose 17, 17 and 16.
    assert stage.status == KEPT
    assert [site for site, _ in stage.passes[0].chosen] == ["node_class0", "node_class3"]
    assert stage.accuracy.drop == pytest.approx(17.0)
    assert "4 of 6 rewrites were given up" in stage.passes[0].notes[0]


def test_when_nothing_holds_the_limit_all_is_undone():
    model = from_proto(classifier())
    order = [label for pair in range(50) for label in (pair % 3, 3 + pair % 3)]
    damages = [0.5, 0.1, 0.2, 0.01, 0.02, 0.03]  # 3 first, which costs 17 points, unseen on even samples
    outcome = run(model, emptied(damages=damages), evaluation=samples(order), max_drop=5.0)
    assert outcome.model is model
    stage = outcome.stages[0]
    assert (stage.status, stage.cause, stage.passes[0].status) == (UNDONE, "accuracy", UNDONE)
    assert re.fullmatch(
        r"top1 is worse by \d\d.00 points, at \d\d.00, on 100 samples, more than the 5 allowed", stage.reason
    )


# The record


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_ledger_has_each_node_once_with_a_reason_or_an_heir(name):
    model = from_proto(networks.NETWORKS[name]())
    outcome = run(model, Simplify(), FoldBatchNorm())
    before = model
    for stage in outcome.stages:
        record = stage.passes[0]
        assert [entry.node for entry in record.ledger] == [node.name for node in before.graph]
        for entry in record.ledger:
            assert entry.op == before.node(entry.node).op_type
            assert entry.status in ("changed", "skipped")
            assert bool(entry.reason) == (entry.status == "skipped")
        if stage.status == KEPT:
            before = manager(before).run(before, [type_of(record.name)]).model


def type_of(name: str) -> Pass:
    return {"simplify": Simplify, "fold-batchnorm": FoldBatchNorm}[name]()


def test_what_was_skipped_says_the_words_of_the_pass(model):
    step = Lossy(scaled("fc.weight", 2.0), proposals=(Proposal("fc", ("node_fc",)), Skipped("node_conv1", "too small")))
    record = run(model, step).stages[0].passes[0]
    told = {entry.node: entry for entry in record.ledger}
    assert told["node_conv1"].reason == "too small"
    assert told["node_conv2"].reason == "nothing for lossy to do"
    assert told["node_fc"].status == "changed" and told["node_fc"].to == ("node_fc",)
    assert record.counts == {"changed": 1, "skipped": len(record.ledger) - 1}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_node_map_leads_from_the_original_to_the_result(name):
    model = from_proto(networks.NETWORKS[name]())
    outcome = run(model, Simplify(), FoldBatchNorm())
    assert set(outcome.node_map) == {node.name for node in model.graph}
    there = {node.name for node in outcome.model.graph}
    assert {new for to in outcome.node_map.values() for new in to} <= there
    unmade = there - {new for to in outcome.node_map.values() for new in to}
    assert not unmade, "a node of the result comes from none of the original"


def test_the_node_map_composes_over_passes(model):
    """conv1 <- bn1 by folding; then fc is split in two."""

    def split(model: Model, chosen) -> None:
        node = model.node("node_fc")
        a = edit.make_node(model, "Identity", [node.inputs[0]], name="first", origin=[node])
        b = edit.make_node(model, "Gemm", [a.outputs[0], *node.inputs[1:]], {"transB": 1}, name="second", origin=[node])
        edit.replace(model, [node], [a, b], {node.outputs[0]: b.outputs[0]})

    outcome = run(model, FoldBatchNorm(), Exact(split, proposals=(Proposal("fc", ("node_fc",)),)))
    assert [stage.status for stage in outcome.stages] == [KEPT, KEPT]
    assert outcome.node_map["node_conv1"] == outcome.node_map["node_bn1"] == ("node_conv1",)
    assert outcome.node_map["node_fc"] == ("first", "second")
    assert outcome.node_map["node_pool"] == ("node_pool",)


# The same again


def through_json(outcome: Outcome, model: Model) -> list:
    from effc.history import Snapshot

    number = Snapshot(cost(model).total, 1, 1)
    told = History("m", "", "t", "latency", 1, 1, 0, {}, {}, number, number, stages=outcome.stages)
    return History.from_json(told.to_json()).stages


def test_the_same_input_gives_the_same_bytes():
    for make in (networks.transformer, networks.residual):
        model = from_proto(make())
        results = [content(run(model, Simplify(), FoldBatchNorm()).model) for _ in range(2)]
        assert results[0] == results[1] != content(model)


def test_a_replay_makes_the_same_choices_without_judging(ratios, evaluations):
    model = from_proto(classifier())
    ratios[:] = [2.0, 2.0, 0.9]  # the first pass is undone
    steps = [Lossy(scaled("w0", 2.0)), emptied(damages=(0, *COUNTS[1:]))]
    first = run(model, *steps, evaluation=samples(), max_drop=7.0, measure=True)
    assert [stage.status for stage in first.stages] == [UNDONE, KEPT]
    evaluations.clear()
    ratios[:] = [9.0]  # would undo everything
    told = through_json(first, model)
    again = run(model, *steps, replay=told, evaluation=samples(), max_drop=7.0, measure=True)
    assert content(again.model) == content(first.model)
    assert [stage.status for stage in again.stages] == [UNDONE, KEPT]
    assert again.stages[1].reason == "replayed"
    assert not evaluations
    assert again.node_map == first.node_map


def test_a_replay_of_another_recipe_is_refused(model):
    told = run(model, Simplify(), FoldBatchNorm()).stages
    with pytest.raises(BadInput, match="the report to replay has 2 stages, the recipe 1"):
        run(model, Simplify(), replay=told)
    with pytest.raises(BadInput, match=r"ran \['fold-batchnorm'\] where the recipe has \['lossy'\]"):
        run(model, Simplify(), Lossy(), replay=told)


def test_in_float16_an_exact_pass_may_round_as_float16_does():
    model = from_proto(networks.half())
    folded = run(model, FoldBatchNorm()).stages[0].passes[0]
    assert folded.status == KEPT
    assert FoldBatchNorm.tolerance < folded.drift <= 4 * 2**-10
    assert run(model, Exact(scaled("conv1.weight", 1.05))).stages[0].passes[0].status == UNDONE


@pytest.mark.parametrize("kind", [Exact, Lossy])
def test_a_pass_whose_model_the_runtime_does_not_load_is_named(model, kind):
    def mistyped(model: Model, chosen) -> None:
        bias = model.value("fc.bias")
        edit.set_initializer(model, bias, model.constant(bias).astype(np.float64))

    with pytest.raises(PassFailed, match=rf"^{kind.name}: onnxruntime does not load .*; leave this pass out$"):
        run(model, kind(mistyped))
