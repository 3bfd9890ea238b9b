"""effc.contract: what a pass is made of, its budget, the statistics it may ask for, and Repeat."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import pytest

import effc.predict
from effc import edit, recipe, statistics
from effc.calls import parse
from effc.capture import from_proto
from effc.contract import DAMAGE, Budgeted, Context, Pass, Proposal, Repeat, no_progress
from effc.cost import Cost
from effc.data import open_data
from effc.errors import BadInput, EffcError
from effc.kernels import Kernel
from effc.registry import backend
from effc.statistics import Histogram, Mean
from effc.target import find
from tests import networks


@dataclass(frozen=True)
class Shares(Pass):
    name: ClassVar[str] = "shares"
    macs: float | None = None
    speedup: float | None = None
    energy: float | None = None
    max_drop: float | None = None
    rank: int = 3

    def propose(self, model, context):
        yield from ()

    def rewrite(self, model, chosen, context):
        return None


def test_a_budget_is_what_was_given_under_the_shared_names():
    assert Shares().budget() == {}
    assert Shares(macs=0.5, rank=4).budget() == {"macs": 0.5}
    assert Shares(max_drop=0.0).budget() == {"max_drop": 0.0}  # no drop at all is a budget too
    assert Shares(speedup=2.0, energy=0.5).budget() == {"speedup": 2.0, "energy": 0.5}


@dataclass(frozen=True)
class Narrow(Budgeted):
    name: ClassVar[str] = "narrow"
    rank: int | None = None

    def bounded(self, given):
        return super().bounded(given) or self.rank is not None

    def propose(self, model, context):
        yield from ()

    def rewrite(self, model, chosen, context):
        return None


def test_a_pass_with_a_budget_does_so_much_damage_where_nothing_says_how_far_to_go():
    assert Narrow().budget() == {"damage": DAMAGE}
    assert Narrow(max_drop=1.0).budget() == {"max_drop": 1.0, "damage": DAMAGE}
    assert Narrow(rank=3).budget() == {}
    assert Narrow(damage=0.2).budget() == {"damage": 0.2} and Narrow(size=0.5).budget() == {"size": 0.5}


def test_options_of_a_base_stand_behind_the_pass_s_own():
    names = [option.name for option in recipe.options(Narrow)]
    assert names == ["rank", "macs", "size", "speedup", "damage", "max_drop"]
    assert Narrow(3) == Narrow(rank=3)


def test_a_pass_and_a_proposal_cannot_be_changed():
    step: Any = Shares()
    proposal: Any = Proposal("a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.macs = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        proposal.damage = 0.5
    assert Proposal("a") == Proposal("a", (), {}, None, None, None)


def test_a_pass_that_does_not_propose_or_rewrite_is_none():
    class Half(Pass):
        name = "half"

        def propose(self, model, context):
            return iter(())

    kind: Any = Half
    with pytest.raises(TypeError, match="rewrite"):
        kind()


def test_progress_may_go_nowhere():
    assert no_progress("calibrating", 3)(1) is None


@pytest.mark.parametrize("steps", ["0", "-1", "1.5", "two"])
def test_repeat_takes_whole_rounds(steps):
    with pytest.raises(BadInput, match=r"repeat: option steps=.*allowed: integer >= 1"):
        recipe.build(parse(f"repeat{{steps={steps}}}"))


def test_repeat_itself_proposes_and_changes_nothing():
    model = from_proto(networks.plain())
    revision, context = model.revision, cast(Context, None)
    step = Repeat(steps=2, passes=(Shares(),))
    assert list(step.propose(model, context)) == []
    step.rewrite(model, [], context)
    assert model.revision == revision


@pytest.fixture
def context() -> Context:
    proto = networks.plain()
    samples = np.concatenate([networks.feeds(proto, seed=s)["input"] for s in range(3)])
    data = open_data({"source": lambda: iter([{"input": samples}])})
    model = from_proto(proto)
    return Context(model, find("onnxruntime-avx2"), backend("onnxruntime"), calibration=data.for_model(model))


@pytest.fixture
def runs(monkeypatch) -> list[list]:
    """The requests of each run of the data."""
    made, collect = [], statistics.collect

    def counted(model, requests, context) -> Any:
        made.append(list(requests))
        return collect(model, made[-1], context)

    monkeypatch.setattr(statistics, "collect", counted)
    return made


def test_a_pass_with_a_budget_goes_by_what_the_first_is_about(context):
    context.goal = "energy"
    goals = [Narrow(**given).goal(context) for given in ({}, {"damage": 1.0}, {"speedup": 2.0, "size": 0.5})]
    assert goals == ["energy", "energy", "size"]
    assert Narrow(speedup=2.0).goal(context) == "latency"


def test_statistics_are_those_of_the_data(context):
    inputs = next(iter(context.calibration.batches(6))).feeds["input"]
    found = context.statistics(context.original, [Mean("input"), Histogram("input")])
    assert np.allclose(found[Mean("input")], inputs.mean(axis=0), atol=1e-6)
    bins = found[Histogram("input")]
    assert (bins.minimum, bins.maximum) == (inputs.min(), inputs.max())
    assert bins.counts.sum() == inputs.size


def test_all_that_is_asked_for_takes_one_run_and_is_asked_for_once(context, runs):
    model, wanted = context.original, [Mean("input"), Histogram("conv1"), Mean("input")]
    first = context.statistics(model, wanted)
    again = context.statistics(model, wanted)
    assert runs == [[Mean("input"), Histogram("conv1")]]
    assert again[Mean("input")] is first[Mean("input")]
    context.statistics(model, [Mean("input"), Mean("conv2")])
    assert runs[1:] == [[Mean("conv2")]]  # only what is not known yet


def test_an_edit_makes_statistics_void_but_not_those_of_the_original(context, runs):
    clone = context.original.clone()
    context.statistics(context.original, [Mean("conv1")])
    context.statistics(clone, [Mean("conv1")])
    assert len(runs) == 1  # a clone is the same state
    weight = clone.value("conv1.weight")
    edit.set_initializer(clone, weight, 2 * clone.constant(weight))
    doubled = context.statistics(clone, [Mean("conv1")])[Mean("conv1")]
    assert len(runs) == 2
    original = context.statistics(context.original, [Mean("conv1")])[Mean("conv1")]
    assert len(runs) == 2
    assert np.allclose(doubled, 2 * original, rtol=1e-4, atol=1e-5)


def test_statistics_of_states_gone_by_are_dropped(context):
    clone = context.original.clone()
    for factor in (2, 3):
        weight = clone.value("conv1.weight")
        edit.set_initializer(clone, weight, factor * clone.constant(weight))
        context.statistics(clone, [Mean("conv1")])
    assert {key[0] for key in context._statistics} == {clone.revision}


def test_statistics_need_calibration_data(context):
    context.calibration = None
    with pytest.raises(BadInput, match="calibration data are needed: give --calibrate SPEC"):
        context.statistics(context.original, [Mean("input")])


# Prediction


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """What `effc.predict` was asked for, each time."""
    made, predict = [], effc.predict.predict

    def counted(model, target, **options) -> Any:
        made.append({"target": target.name, **options})
        return predict(model, target, **options)

    monkeypatch.setattr(effc.predict, "predict", counted)
    return made


def test_a_model_is_predicted_once_until_it_is_edited(context, asked):
    model = context.original
    first = context.predict(model)
    assert context.predict(model) is first is context.predict(model.clone()) is context.foresee(model)
    assert first.total.seconds > 0 and set(first.nodes) <= {node.name for node in model.graph}
    clone = model.clone()
    edit.set_initializer(clone, clone.value("fc.bias"), 2 * clone.constant(clone.value("fc.bias")))
    assert context.predict(clone).total == first.total and len(asked) == 2
    assert asked[0] == {
        "target": "onnxruntime-avx2", "backend": context.backend, "batch": 1, "dims": {}, "threads": 1,
    }  # fmt: skip
    other = dataclasses.replace(context, target=find("onnxruntime-avx512-vnni"), threads=2, batch=3)
    assert other.predict(model) is not first and asked[2]["threads"] == 2 and asked[2]["batch"] == 3


def test_the_runtime_is_asked_for_its_kernels_where_it_is_the_target_s(context, asked):
    elsewhere = dataclasses.replace(context, target=find("tensorrt-a100"))
    prediction = elsewhere.predict(context.original)
    assert asked[0]["backend"] is None and prediction.total.basis == "roofline"
    assert "tensorrt is not at hand" in prediction.notes[0]


def test_the_cost_of_some_nodes_is_the_sum_of_theirs(context):
    model = context.original
    found = context.costs(model)
    names = ["node_conv1", "node_conv2", "node_fc"]
    assert context.cost_of(model, names) == sum((found.nodes[name] for name in names), Cost())
    assert context.cost_of(model, []) == Cost()
    conv = context.cost_of(model, ["node_conv2"])
    assert (conv.macs, conv.seconds) == (36 * 16 * 72, context.predict(model).nodes["node_conv2"].seconds)
    assert conv.energy > conv.macs * 4.6e-12
    assert found.total.seconds == context.predict(model).total.seconds
    fused = context.predict(model).fused
    assert "node_relu2" in fused and context.cost_of(model, ["node_relu2"]).seconds == 0  # its kernel's leader has them
    with pytest.raises(KeyError):
        context.cost_of(model, ["node_none"])


def test_kernels_that_are_not_there_take_what_the_target_says(context):
    roof = context.target.roof(1)
    dims = {"b": 1, "m": 8, "k": 64, "n": 32}
    kernel = Kernel("made up", "gemm", (), dims, 8 * 64 * 32, 4 * (8 * 64 + 64 * 32 + 8 * 32), "float32")
    each = max(kernel.macs / roof.macs["float32"], kernel.moved / roof.bandwidth) + roof.overhead
    assert context.seconds([kernel]) == pytest.approx(each, rel=1e-12)
    assert context.seconds([kernel, kernel]) == pytest.approx(2 * each, rel=1e-12)
    assert context.seconds([]) == 0


def test_large_models_are_foreseen_where_latency_is_the_goal_only(context, asked, monkeypatch):
    monkeypatch.setattr("effc.contract.LARGE_NODES", 3)
    for goal in ("size", "macs", "energy"):
        context.goal = goal
        assert context.foresee(context.original) is None
        total = context.costs(context.original).total
        assert total.energy > 0 and total.seconds == 0
    assert not asked
    context.goal = "latency"
    assert context.foresee(context.original) is not None and context.costs(context.original).total.seconds > 0
    monkeypatch.setattr("effc.contract.LARGE_NODES", 5000)
    monkeypatch.setattr("effc.contract.LARGE_BYTES", 1000)
    assert context.large


def test_what_the_runtime_does_not_take_is_not_foreseen(context, monkeypatch):
    def refuse(*settings: Any) -> Any:
        raise EffcError("onnxruntime does not load it")

    monkeypatch.setattr(type(context.backend), "kernels", refuse)
    assert context.foresee(context.original) is None
    assert context.costs(context.original).total.energy > 0
    with pytest.raises(EffcError, match="does not load it"):
        context.predict(context.original)
