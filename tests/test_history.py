"""effc.history: the ledger of a rewrite, the record through JSON, node names over several rewrites."""

import json
from dataclasses import replace

import numpy as np
import pytest

from effc import capture, edit
from effc.contract import Proposal
from effc.cost import Cost
from effc.errors import BadInput
from effc.evaluate import Score
from effc.history import KEPT, UNDONE, Accuracy, History, NodeRecord, PassRecord, Snapshot, StageRecord, compose, ledger
from effc.measure import Latency
from effc.model import Model
from tests import networks
from tests.fake_passes import Lossy

STEP = Lossy()


@pytest.fixture
def model() -> Model:
    return capture.from_proto(networks.plain())


def told(before: Model, after: Model, *chosen: Proposal, **skipped: str) -> dict[str, NodeRecord]:
    records = ledger(before, after, chosen, skipped, STEP)
    assert [r.node for r in records] == [node.name for node in before.graph]
    return {r.node: r for r in records}


def test_nothing_done_is_nothing_changed(model):
    records = told(model, model.clone(), node_conv1="too small")
    assert {r.status for r in records.values()} == {"skipped"}
    assert records["node_conv1"] == NodeRecord("node_conv1", "Conv", "skipped", reason="too small")
    assert records["node_conv2"].reason == "nothing for lossy to do"


def test_new_weights_and_attributes_count_as_change_and_neighbours_do_not(model):
    after = model.clone()
    weight = after.value("conv1.weight")
    edit.set_initializer(after, weight, after.constant(weight) * np.float32(2))
    edit.set_attributes(after, after.node("node_conv2"), strides=[1, 1])
    proposal = Proposal("a", ("node_conv1",), {"rank": 2}, Cost(10, 0, 40), Cost(5, 0, 40), 0.25)
    records = told(model, after, proposal)
    assert [name for name, r in records.items() if r.status == "changed"] == ["node_conv1", "node_conv2"]
    assert records["node_conv1"] == NodeRecord(
        "node_conv1", "Conv", "changed", ("node_conv1",), {"rank": 2}, {"macs": (10, 5)}, 0.25
    )
    assert records["node_conv2"].damage is None


def test_what_is_gone_leads_nowhere_and_what_is_absorbed_to_its_heir(model):
    after = model.clone()
    bn, pool = after.node("node_bn1"), after.node("node_pool")
    edit.absorb(after.node("node_conv1"), bn)
    edit.bypass(after, bn, bn.inputs[0])
    edit.set_attributes(after, pool, alpha=1.0)
    flat = after.node("node_flat")
    edit.bypass(after, flat, flat.inputs[0])
    records = told(model, after)
    assert records["node_bn1"].to == ("node_conv1",)
    assert (records["node_flat"].status, records["node_flat"].to) == ("changed", ())
    assert records["node_fc"].status == "skipped"  # it reads another tensor now, and is the same


def test_what_is_not_analysed_says_why():
    control = capture.from_proto(networks.control())
    assert told(control, control.clone())["node_choice"].reason.startswith("If holds a sub-graph")


def test_names_compose():
    first = {"a": ("a",), "b": ("x", "y"), "c": (), "d": ("z", "gone")}
    then = {"a": ("a1",), "x": ("n",), "y": ("n", "m"), "z": ()}
    assert compose(first, then) == {"a": ("a1",), "b": ("n", "m"), "c": (), "d": ()}
    assert compose(first, {name: (name,) for name in ("a", "x", "y", "z", "gone")}) == first


@pytest.mark.parametrize(
    ("metric", "original", "value", "points", "drop"),
    [
        ("top1", 0.9, 0.75, 75.0, 15.0),
        ("agreement", 1.0, 0.99, 99.0, 1.0),
        ("cosine", 1.0, 0.9, 0.9, 0.1),
        ("kl", 0.0, 0.3, 0.3, 0.3),  # less is better
        ("sqnr", float("inf"), 40.0, 40.0, None),  # the original against itself has no error at all
    ],
)
def test_accuracy_is_in_points_and_a_drop_is_always_worse(metric, original, value, points, drop):
    found = Accuracy.of(Score(metric, value, 20, None, 0.0), Score(metric, original, 20, None, 0.0))
    assert found.points == pytest.approx(points)
    assert found.drop == (None if drop is None else pytest.approx(drop))
    assert found.samples == 20


def history(**options) -> History:
    latency = Latency(2.0, 1.0, 0.5, 0.45, 0.55, 9, 1, 1)
    accuracy = Accuracy("top1", 90.0, 100, 1.5, 0.97, 0.01)
    entries = [
        NodeRecord("a", "Conv", "changed", ("a", "b"), {"rank": 3, "axes": [0, 1]}, {"macs": (10, 5)}, 0.125),
        NodeRecord("c", "Relu", "skipped", reason="nothing to gain"),
    ]
    one = PassRecord("low-rank", "low-rank{macs=0.5}", False, chosen=[("a", {"rank": 3})], ledger=entries, drift=None)
    two = PassRecord("simplify", "simplify", True, UNDONE, "it drifts", drift=1e-3, cost_before=Cost(1, 2, 3))
    kept = StageRecord([one], latency=latency, accuracy=accuracy, unproven=["latency was not measured"])
    stages = [kept, StageRecord([two], UNDONE, "goal", "it drifts")]
    before, after = Snapshot(Cost(10, 5, 20), 100, 3), Snapshot(Cost(5, 4, 16), 80, 2, accuracy)
    plain = History("net", "low-rank{macs=0.5}, simplify", "cpu", "latency", 1, 2, 3, {"effc": "1"}, {"evaluate": "ab"},
                    before, after, stages, latency, {"a": ("a", "b")}, {"QGemm": 1}, {"c": "no kernel"}, 1e-7,
                    ["a note"], ["nothing is known"], ["too slow"], 1.25)  # fmt: skip
    return replace(plain, **options)


def test_json_holds_everything():
    whole = history()
    again = History.from_json(whole.to_json())
    assert again.to_json() == whole.to_json()
    assert again.stages[0].passes[0].ledger == whole.stages[0].passes[0].ledger
    assert again == whole
    assert json.loads(whole.to_json())["stages"][0]["passes"][0]["ledger"][1]["reason"] == "nothing to gain"


def test_json_holds_accuracy_without_a_number():
    """As of sqnr for equal outputs, and of damage where a model gives NaN; what is written is standard JSON."""
    perfect = Score("sqnr", float("inf"), 4, None, float("inf"))
    accuracy = Accuracy.of(perfect, perfect)
    assert (accuracy.points, accuracy.drop, accuracy.damage) == (None, None, None)
    text = history(original=Snapshot(Cost(), 1, 1, accuracy)).to_json()
    assert History.from_json(text).original.accuracy == accuracy
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "this is no report of effc: : Invalid JSON"),
        ("{}", "this is no report of effc: model: Field required"),
        (b"\x89PNG\xff", "this is no report of effc"),
        ("[1, 2]", "this is no report of effc"),
    ],
)
def test_what_is_no_report_is_refused(text, said):
    with pytest.raises(BadInput) as found:
        History.from_json(text)
    assert str(found.value).startswith(said)


def test_a_number_of_another_kind_is_told_with_its_place():
    broken = history().to_json().replace('"seed":3', '"seed":"three"').replace('"seed": 3', '"seed": "three"')
    with pytest.raises(BadInput, match=r"this is no report of effc: seed: "):
        History.from_json(broken)


def test_counts_and_reasons():
    record = history().stages[0].passes[0]
    assert record.counts == {"changed": 1, "skipped": 1}
    assert record.skip_reasons == {"nothing to gain": 1}


def test_whether_anything_was_kept():
    whole = history()
    assert whole.changed and [record.name for record in whole.passes] == ["low-rank", "simplify"]
    whole.stages[0].passes[0].status = UNDONE
    assert not whole.changed
    assert KEPT not in [record.status for record in whole.passes]
