"""effc.history: the ledger of a rewrite, the record through JSON, node names over several rewrites."""

import json
from dataclasses import replace

import numpy as np
import pytest

from effc import edit
from effc.capture import from_proto
from effc.contract import Proposal
from effc.cost import Cost
from effc.errors import BadInput
from effc.evaluate import Score
from effc.history import (
    KEPT,
    UNDONE,
    Accuracy,
    History,
    NodeRecord,
    PassRecord,
    Predicted,
    Snapshot,
    StageRecord,
    compose,
    ledger,
)
from effc.measure import Latency
from effc.model import Model
from effc.predict import MEASURED, ROOFLINE, Estimate, Prediction
from tests import networks
from tests.fake_passes import Lossy

STEP = Lossy()


@pytest.fixture
def model() -> Model:
    return from_proto(networks.plain())


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
    control = from_proto(networks.control())
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
    predicted = Predicted(1.5, 0.9, 0.6, 0.05, "measured")
    kept = StageRecord([one], latency=latency, accuracy=accuracy, unproven=["latency was not measured"])
    kept.predicted, kept.goals = predicted, ("macs",)
    stages = [kept, StageRecord([two], UNDONE, "goal", "it drifts")]
    costs = Cost(10, 5, 20, 7, 1.5e-3, 2.5e-3), Cost(5, 4, 16, 6, 0.5e-3, 1.5e-3)
    before, after = Snapshot(costs[0], 100, 3), Snapshot(costs[1], 80, 2, accuracy)
    plain = History("net", "low-rank{macs=0.5}, simplify", "cpu", "latency", 1, 2, 3, {"effc": "1"}, {"evaluate": "ab"},
                    before, after, stages, latency, {"a": ("a", "b")}, {"QGemm": 1}, {"c": "no kernel"}, 1e-7,
                    ["a note"], ["nothing is known"], ["too slow"], 1.25, "measured", predicted)  # fmt: skip
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


def prediction(parts: dict[str, tuple[float, float]], basis: str = MEASURED, start: float = 1.0) -> Prediction:
    """Kinds of kernels with their seconds and errors; an inference takes `start` besides."""
    total = start + sum(seconds for seconds, _ in parts.values())
    return Prediction(Estimate(total, 0.2, basis), {}, parts=parts)


def test_errors_of_what_is_the_same_cancel():
    """conv stays, 4 s of pool become 1 s of qpool, and 1 s of copies is added to 2."""
    before = prediction({"conv": (13.0, 0.5), "pool": (4.0, 0.1), "copy": (2.0, 0.3)})
    after = prediction({"conv": (13.0, 0.5), "qpool": (1.0, 0.2), "copy": (3.0, 0.2)})
    found = Predicted.of(before, after)
    assert (found.before_ms, found.after_ms, found.ratio, found.basis) == (20e3, 18e3, 0.9, MEASURED)
    assert found.error == pytest.approx((0.4**2 + 0.2**2 + 0.3**2) ** 0.5 / 20)
    assert Predicted.of(before, before) == Predicted(20e3, 20e3, 1.0, 0.0, MEASURED)
    assert found.describe() == "18000.000 ms against 20000.000 ms, 0.90x +- 0.03"


def test_the_weaker_basis_counts_and_without_parts_nothing_cancels():
    bare = Prediction(Estimate(2.0, 0.3, ROOFLINE), {})
    found = Predicted.of(bare, Prediction(Estimate(1.0, 0.4, ROOFLINE), {}))
    assert (found.ratio, found.error, found.basis) == (0.5, pytest.approx(0.25), ROOFLINE)
    known = prediction({"conv": (1.0, 0.1)})
    assert Predicted.of(known, bare).basis == Predicted.of(bare, known).basis == ROOFLINE
    assert found.describe() == "1000.000 ms against 2000.000 ms, 0.50x by the roofline alone"
    nothing = Prediction(Estimate(0.0, 0.5, ROOFLINE), {})
    assert Predicted.of(nothing, nothing).ratio == 1.0


@pytest.mark.parametrize(
    ("ratio", "error", "basis", "slower", "sure"),
    [
        (1.2, 0.09, MEASURED, True, True),
        (1.2, 0.11, MEASURED, False, False),
        (1.2, 0.01, ROOFLINE, False, False),
        (0.8, 0.09, MEASURED, False, True),
        (0.8, 0.11, MEASURED, False, False),
        (1.0, 0.0, MEASURED, False, False),
    ],
)
def test_beyond_doubt_is_two_standard_deviations_of_measured_kernels(ratio, error, basis, slower, sure):
    found = Predicted(1.0, ratio, ratio, error, basis)
    assert (found.slower, found.sure) == (slower, sure)


def test_a_report_of_before_there_were_predictions_is_read():
    told = json.loads(history().to_json())
    for place in (told, *told["stages"]):
        for key in ("origin", "predicted", "goals"):
            place.pop(key, None)
    for place in (told["original"]["cost"], told["final"]["cost"]):
        for key in ("activation_bytes", "energy", "seconds"):
            del place[key]
    again = History.from_json(json.dumps(told))
    assert (again.origin, again.predicted, again.stages[0].predicted, again.stages[0].goals) == ("", None, None, ())
    assert again.original.cost == Cost(10, 5, 20)


def test_the_gain_of_a_node_is_what_is_known_and_changes(model):
    after = model.clone()
    edit.set_attributes(after, after.node("node_conv2"), strides=[1, 1])
    costs = Cost(10, 5, 40, 9, 2e-6, 3e-6), Cost(10, 5, 10, 9, 1e-6, 0.0)
    gain = told(model, after, Proposal("a", ("node_conv2",), {}, *costs))["node_conv2"].gain
    assert gain == {"weight_bytes": (40, 10), "energy": (2e-6, 1e-6)}
