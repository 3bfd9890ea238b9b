"""effc.optimize: what it refuses, hands back and requires, and the same again. Times are told beforehand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import effc
import effc.guard
import effc.predict
import effc.target
from effc.api import DEFAULT_MAX_DROP, optimize, real_feeds
from effc.capture import from_proto
from effc.contract import Proposal
from effc.cost import Cost
from effc.data import open_data
from effc.energy import on_target
from effc.errors import BadInput, RequirementNotMet
from effc.history import KEPT, UNDONE, History
from effc.measure import Latency
from effc.passes.fold_batchnorm import FoldBatchNorm
from effc.passes.simplify import Simplify
from effc.predict import MEASURED, ROOFLINE, Estimate, Prediction
from effc.registry import backend
from effc.target import KERNEL_FLAGS, cpu_flags, find
from effc.targetfile import to_json
from tests import networks
from tests.fake_passes import COUNTS, Exact, Lossy, Paced, classifier, emptied, samples, scaled
from tests.networks import distance, feeds, run

HERE = "onnxruntime-avx2"  # stands in for this machine, whichever it is: of its kernels, no times are known
# A shipped target that is not this machine, whichever it is.
FAR = HERE if KERNEL_FLAGS & cpu_flags() != {"avx2", "fma"} else "onnxruntime-avx512-vnni"


@pytest.fixture(autouse=True)
def this_machine(monkeypatch) -> None:
    real = effc.target.find

    def find(name: str | None = None, **options: Any) -> effc.Target:
        return real(name, **options) if name else replace(real(HERE, **options), local=True)

    monkeypatch.setattr(effc.target, "find", find)


def quick(model: Any, passes: Any = "simplify,fold-batchnorm", **options: Any) -> effc.Result:
    return optimize(model, passes, **{"measure": False} | options)


@pytest.fixture
def ratios(monkeypatch) -> list[float]:
    """What the next measurements find; the last one for good."""
    left = [0.5]

    def fake(before, after, feeds, **options):
        ratio = left.pop(0) if len(left) > 1 else left[0]
        return Latency(2.0, 2 * ratio, ratio, ratio - 0.001, ratio + 0.001, 9, 1, 1)

    monkeypatch.setattr(effc.guard, "compare", fake)
    return left


def test_whatever_names_a_model_is_taken_and_never_changed(tmp_path):
    proto = networks.plain()
    onnx.save(proto, tmp_path / "m.onnx")
    held = from_proto(proto)
    before = held.proto().SerializeToString(), held.revision
    forms = [proto, held, ir.from_proto(proto), tmp_path / "m.onnx", str(tmp_path / "m.onnx")]
    graphs = {quick(form).model.proto().graph.SerializeToString(deterministic=True) for form in forms}
    assert len(graphs) == 1
    assert (held.proto().SerializeToString(), held.revision) == before
    assert proto.SerializeToString() == networks.plain().SerializeToString()
    assert distance(run(proto), run(quick(proto).model.proto())) <= 1e-5


def test_the_history_tells_what_went_in_and_what_came_out():
    proto = networks.plain()
    history = quick(proto, batch=3, threads=2, seed=5, target_name="onnxruntime-avx2").history
    assert (history.recipe, history.target, history.goal) == ("simplify, fold-batchnorm", "onnxruntime-avx2", "latency")
    assert (history.batch, history.threads, history.seed) == (3, 2, 5)
    assert (history.original.nodes, history.final.nodes) == (11, 9)
    assert (
        history.original.cost.macs == 3 * (144 * 8 * 27 + 36 * 16 * 72 + 36 * 16 * 144 + 80) == history.final.cost.macs
    )
    assert history.original.cost.parameters - history.final.cost.parameters == 4 * (8 + 16) - 8  # conv1 gets a bias
    assert history.versions["onnxruntime"] and history.versions["effc"] == effc.__version__
    assert history.unproven == ["latency was not measured"]
    assert history.node_map["node_bn1"] == ("node_conv1",)
    assert history.deployed_difference is None  # float, and nothing measured: not read back


def test_the_size_told_is_that_of_the_file(tmp_path):
    result = quick(networks.plain())
    path = effc.save(result.model, tmp_path / "m.onnx")
    assert result.history.final.size == pytest.approx(path.stat().st_size, rel=0.02)


def test_the_file_says_how_it_came_about():
    properties = {p.key: p.value for p in quick(networks.plain()).model.proto().metadata_props}
    assert properties["effc.recipe"] == "simplify, fold-batchnorm"
    assert properties["effc.version"] == effc.__version__
    assert properties["effc.target"].startswith("onnxruntime-avx2")


def test_when_nothing_is_kept_the_original_comes_back():
    proto = networks.transposed()
    result = quick(proto, "simplify")
    assert not result.history.changed
    assert result.model.proto().graph.SerializeToString(deterministic=True) == from_proto(
        proto
    ).proto().graph.SerializeToString(deterministic=True)
    assert not result.model.proto().metadata_props


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"goal": "speed"}, "unknown goal 'speed'; there are latency, size, energy, macs"),
        ({"min_speedup": 2.0}, "a minimum speed-up has to be measured: leave out --no-measure or --min-speedup"),
        ({"max_drop": 1.0}, "a largest drop needs evaluation data: give --evaluate SPEC"),
        ({"target_name": "tpu"}, "unknown target 'tpu'; there are onnxruntime-avx2, onnxruntime-avx512-vnni"),
        ({"target_name": FAR, "min_speedup": 2.0, "measure": True},
         f"target {FAR!r} is another machine's: no speed can be measured; leave out --min-speedup"),
        ({"passes": "int9"}, "unknown pass 'int9'"),
        ({"passes": "int8{bits=3}"}, "int8: there is no option 'bits'"),
        ({"passes": "int8{calibrator=best}"}, "int8: option calibrator=best: allowed are minmax, percentile"),
        ({"passes": "int8{max_drop=1}"}, "max_drop needs evaluation data: give --evaluate SPEC"),
        ({"calibrate": {"source": lambda: iter([{"input": np.zeros((2, 3, 9, 9), np.float32)}])}},
         "give samples of shape (3, 9, 9); the model's input 'input' takes (3, 12, 12)"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(options, said):
    with pytest.raises(BadInput) as found:
        quick(networks.plain(), **options)
    assert said in str(found.value)


def test_a_fixed_batch_is_what_is_measured():
    assert quick(networks.depthwise()).history.batch == 1
    with pytest.raises(BadInput, match="the model's batch is fixed at 1; --batch 4 cannot be measured"):
        quick(networks.depthwise(), batch=4)


def test_a_symbolic_dimension_has_to_be_stated():
    with pytest.raises(BadInput, match="the symbolic size 'T'; state it with --dim T=value"):
        quick(networks.sound())
    assert quick(networks.sound(), dims={"T": 6}).history.original.cost.macs == 480 + 1152 + 144


def test_a_model_that_the_runtime_does_not_run_is_told_in_its_words():
    net = networks.Net("foreign")
    x = net.input("x", ["N", 4])
    net.nodes.append(onnx.helper.make_node("Hyper", [x], ["y"], domain="com.example", name="hyper"))
    net.output("y", ["N", 4])
    proto = net.model()
    proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    with pytest.raises(BadInput, match=r"onnxruntime cannot run model as it is: .*Hyper"):
        quick(proto)


# Accuracy


def test_with_labels_a_point_may_be_lost_unless_told_otherwise():
    damages = (0, *COUNTS[1:])
    assert DEFAULT_MAX_DROP == 1.0
    # of classes 0 to 5 the emptied layers cost 0, 2, 4, 8, 16, 30 points
    kept = {}
    for name, options in {"default": {}, "stated": {"max_drop": 7.0}, "forced": {"force": True}}.items():
        history = quick(classifier(), [emptied(damages=damages)], evaluate=samples(), **options).history
        kept[name] = [] if history.stages[0].status == UNDONE else [s for s, _ in history.stages[0].passes[0].chosen]
    assert "node_class1" not in kept["default"]
    assert kept["stated"] == [f"node_class{i}" for i in range(3)]
    assert kept["forced"] == [f"node_class{i}" for i in range(6)]


def test_without_labels_no_limit_is_set():
    unlabelled = {key: value for key, value in samples().items() if key not in ("labels", "metric")}
    result = quick(classifier(), [emptied()], evaluate=unlabelled).history
    assert result.stages[0].status == KEPT
    assert (result.final.accuracy.metric, result.final.accuracy.points) == ("agreement", 40.0)
    assert result.final.accuracy.drop == 60.0


def test_accuracy_stands_beside_the_original_s():
    history = quick(classifier(), [Lossy(scaled("w1", 0.0))], evaluate=samples(), max_drop=5.0).history
    assert (history.original.accuracy.points, history.original.accuracy.drop) == (100.0, 0.0)
    assert history.final.accuracy.points == pytest.approx(98.0)
    assert history.final.accuracy.agreement == pytest.approx(0.98)
    assert set(history.data) == {"evaluate"} and len(history.data["evaluate"]) == 64


def test_without_evaluation_a_lossy_result_is_unproven_and_an_exact_one_is_not():
    unproven = "nothing is known about accuracy: no evaluation data were given"
    assert unproven in quick(classifier(), [Lossy(scaled("w1", 0.0))]).history.unproven
    assert unproven not in quick(classifier(), [Exact(scaled("w1", 1 + 1e-6))]).history.unproven


def test_samples_that_serve_twice_are_told(tmp_path):
    spec = samples()
    np.savez(tmp_path / "d.npz", **next(spec["source"]()))
    data = {**spec, "source": str(tmp_path / "d.npz")}
    both = {"calibrate": {**data, "limit": 30}, "evaluate": {**data, "start": 20, "limit": 40}}
    assert any(
        note == "calibration and evaluation share 10 samples: the accuracy reported is too good; use start and limit"
        for note in quick(classifier(), "simplify", **both).history.notes
    )
    apart = {"calibrate": {**data, "limit": 30}, "evaluate": {**data, "start": 30}}
    assert not any("share" in note for note in quick(classifier(), "simplify", **apart).history.notes)


# Requirements


def test_a_required_speed_is_held_to_what_was_measured(ratios):
    ratios[:] = [0.5]
    step = Exact(scaled("w0", 1 + 1e-6))
    assert optimize(classifier(), [step], min_speedup=2.0).history.latency.ratio == 0.5
    with pytest.raises(RequirementNotMet) as found:
        optimize(classifier(), [step], min_speedup=2.1)
    assert str(found.value) == "the result is 2.00x as fast as the original, 2.1x was required"
    assert found.value.result.history.changed  # the best that was reached
    assert found.value.result.history.unmet == [str(found.value)]
    with pytest.raises(RequirementNotMet, match=r"the result is 1\.00x as fast"):
        optimize(classifier(), [Exact()], min_speedup=1.5)  # nothing was changed


def test_a_required_size_is_held_to_the_file_s():
    with pytest.raises(RequirementNotMet, match=r"the result has 0\.9\d of the original's size, 0\.5 was required"):
        quick(networks.plain(), max_size=0.5)
    assert quick(networks.plain(), max_size=0.99).history.unmet == []


def test_stages_that_each_pay_a_little_are_undone_when_the_whole_is_slower(ratios):
    """Each stage may lose up to the noise; together they lose more."""
    ratios[:] = [1.019, 1.019, 1.04]
    steps = [Exact(scaled("w0", 1 + 1e-6)), Exact(scaled("w1", 1 + 1e-6))]
    result = optimize(classifier(), steps)
    assert [stage.status for stage in result.history.stages] == [UNDONE, UNDONE]
    assert result.history.stages[0].reason == (
        "the whole is slower than the original: 2.080 ms against 2.000 ms, 1.04x [1.04, 1.04] at batch 1"
    )
    assert not result.history.changed and result.history.latency is None
    assert result.history.node_map == {node.name: (node.name,) for node in result.model.graph}
    ratios[:] = [1.019, 1.019, 1.04]
    assert optimize(classifier(), steps, force=True).history.changed


# Targets and predictions


def test_the_whole_is_predicted_beside_what_is_measured(ratios):
    ratios[:] = [0.5]
    proto = networks.plain()
    history = optimize(proto, "simplify,fold-batchnorm").history
    whole = history.predicted
    assert (whole.basis, whole.ratio, whole.error) == (ROOFLINE, 1.0, 0.0)  # the runtime folds batch norm by itself
    assert (whole.before_ms, whole.after_ms) == (1e3 * history.original.cost.seconds, 1e3 * history.final.cost.seconds)
    aim, runtime = find(HERE), backend("onnxruntime")
    model = from_proto(proto)
    alone = on_target(model, aim, prediction=effc.predict.predict(model, aim, backend=runtime)).total
    assert history.original.cost == alone and history.final.cost.energy < alone.energy
    assert (history.target, history.origin, history.latency.ratio) == (HERE, "published", 0.5)
    assert f"target {HERE}: published figures, {aim.source}" in history.notes
    assert [stage.predicted and stage.predicted.after_ms for stage in history.stages] == [None, whole.after_ms]


def test_what_the_user_should_know_of_the_target_is_told(monkeypatch):
    told = replace(effc.target.find(), remark="no shipped target is of this kind", source="")
    monkeypatch.setattr(effc.target, "find", lambda name, **options: told)
    notes = quick(networks.plain()).history.notes
    assert f"target {HERE}: published figures" in notes and "no shipped target is of this kind" in notes


def test_for_another_machine_nothing_is_timed(ratios):
    ratios[:] = [0.001]
    history = optimize(networks.plain(), "fold-batchnorm", target_name=FAR).history
    assert history.latency is None and history.stages[0].latency is None and history.predicted is not None
    assert f"latency was not measured: target {FAR!r} is another machine's" in history.unproven
    assert history.changed


def test_a_target_measured_elsewhere_has_to_be_asked_for(tmp_path):
    file = tmp_path / "far.json"
    file.write_text(to_json(replace(find(HERE), name="far", origin=MEASURED, processor="another", runtime_version="1")))
    with pytest.raises(BadInput, match=r"far\.json was measured on 'another'.*--foreign-target"):
        quick(networks.plain(), target_name=str(file))
    history = optimize(networks.plain(), target_name=str(file), foreign_target=True).history
    assert (history.target, history.origin, history.latency) == ("far", "measured", None)


@pytest.fixture
def foretold(monkeypatch) -> dict[str, float]:
    """Seconds that a product takes, by the number that stands first in its weight; anything else takes 1 s."""
    seconds: dict[str, float] = {}

    def fake(model, target, **options) -> Prediction:
        assert options["backend"] is not None
        total = 1.0
        for node in model.nodes("MatMul"):
            total += seconds.get(f"{model.constant(node.inputs[1]).max():g}", 1.0)
        return Prediction(Estimate(total, 0.1, MEASURED), {}, parts={"gemm": (total - 1, 0.1)})

    monkeypatch.setattr(effc.predict, "predict", fake)
    return seconds


def test_a_lossy_stage_is_kept_or_undone_by_prediction_where_nothing_is_measured(foretold):
    """Six products of 1 s each, and 1 s besides. One becomes quicker, another slower."""
    foretold |= {"2": 0.3, "3": 1.4}
    history = quick(classifier(), [Lossy(scaled("w0", 2.0)), Lossy(scaled("w1", 3.0))]).history
    assert [stage.status for stage in history.stages] == [KEPT, UNDONE]
    assert history.stages[1].reason == "predicted to be slower: 6700.000 ms against 6300.000 ms, 1.06x +- 0.01"
    assert (history.predicted.before_ms, history.predicted.after_ms) == (7000, pytest.approx(6300))
    assert history.unproven == [
        "latency was not measured",
        "nothing is known about accuracy: no evaluation data were given",
        "predicted, not measured: 6300.000 ms against 7000.000 ms, 0.90x +- 0.01",
    ]


def test_what_cannot_be_predicted_is_told(monkeypatch):
    def refused(*arguments: Any, **options: Any) -> Prediction:
        raise effc.EffcError("onnxruntime does not load plain: no memory")

    monkeypatch.setattr(effc.predict, "predict", refused)
    history = quick(networks.plain()).history
    assert "latency is not predicted: onnxruntime does not load plain: no memory" in history.notes
    assert history.predicted is None and history.original.cost.energy > 0 and history.original.cost.seconds == 0
    assert history.changed


def test_large_models_are_predicted_only_where_it_decides(monkeypatch):
    asked, predict = [], effc.predict.predict
    monkeypatch.setattr(effc.predict, "predict", lambda *a, **k: asked.append(1) or predict(*a, **k))
    monkeypatch.setattr("effc.contract.LARGE_NODES", 3)
    history = quick(networks.plain()).history
    assert not asked and history.predicted is None and history.original.cost.energy == 0
    history = quick(classifier(), [Lossy(scaled("w0", 2.0))], goal="energy").history
    assert not asked and history.original.cost.energy == history.final.cost.energy > 0
    assert quick(classifier(), [Lossy(scaled("w0", 2.0))]).history.predicted.ratio == 1.0 and asked


def test_energy_may_be_the_goal():
    proto = networks.residual()
    history = quick(proto, "simplify,fold-batchnorm,int8", calibrate=calibration(proto), goal="energy").history
    assert all(stage.goals == ("energy",) for stage in history.stages)
    assert history.final.cost.energy < 0.6 * history.original.cost.energy
    costs = [(r.cost_before.energy, r.cost_after.energy) for r in history.passes if r.status == KEPT]
    assert len(costs) > 1 and all(before >= after > 0 for before, after in costs)


def test_what_is_kept_for_the_budget_of_a_pass_may_be_slower(ratios):
    """The pass was asked for half of the MACs; the whole is slower, and that is said."""
    ratios[:] = [1.5]
    layer = Proposal("node_class0", ("node_class0",), {}, Cost(macs=36), Cost(), 0.0)
    smaller = Lossy(scaled("w0", 0.5), proposals=[layer], macs=0.9)
    history = optimize(classifier(), [smaller]).history
    assert (history.stages[0].status, history.stages[0].goals, history.latency.ratio) == (KEPT, ("macs",), 1.5)
    assert any(t.startswith("kept for the budgets of its passes, though the whole is slower") for t in history.unproven)
    assert optimize(classifier(), [Lossy(scaled("w0", 0.5))]).history.stages[0].status == UNDONE


def test_a_budget_on_speed_in_a_report_is_replayed():
    step = Paced(scaled("w0", 1.5), speedup=1.05)
    first = quick(classifier(), [step])
    told = History.from_json(first.history.to_json())
    again = quick(classifier(), [step], replay=told).history
    assert again.stages[0].passes[0].chosen == told.stages[0].passes[0].chosen != []
    assert again.stages[0].predicted == told.stages[0].predicted and again.stages[0].goals == ("latency",)
    assert again.stages[0].passes[0].cost_after == told.stages[0].passes[0].cost_after


# The same again


def content(result: effc.Result) -> bytes:
    return result.model.proto().SerializeToString(deterministic=True)


def calibration(proto: onnx.ModelProto) -> dict:
    made = [feeds(proto, seed=seed) for seed in range(8)]
    return {"source": lambda: iter(made)}


def test_the_same_input_gives_the_same_file(tmp_path):
    files = []
    for name in ("a", "b"):
        proto = networks.residual()
        result = quick(proto, "simplify,fold-batchnorm,int8", calibrate=calibration(proto))
        files.append(effc.save(result.model, tmp_path / f"{name}.onnx"))
    assert result.history.changed
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("later", [0.3, 3.0])
def test_a_report_replays_to_the_same_bytes_whatever_is_measured_then(ratios, later):
    """simplify is undone; fold-batchnorm and int8 are kept; then the whole is measured."""
    ratios[:] = [1.5, 1.5, 0.9]
    proto = networks.old()
    first = optimize(proto, "simplify,fold-batchnorm,int8", calibrate=calibration(proto))
    statuses = [stage.status for stage in first.history.stages]
    assert statuses == [UNDONE, KEPT, KEPT]
    told = History.from_json(first.history.to_json())
    ratios[:] = [later]
    again = optimize(proto, told.recipe, replay=told, calibrate=calibration(proto))
    assert [stage.status for stage in again.history.stages] == statuses
    assert distance(run(first.model.proto()), run(again.model.proto())) == 0
    assert again.history.node_map == first.history.node_map


def test_a_replay_gives_the_same_bytes():
    proto = networks.transformer()
    first = quick(proto, "simplify,fold-batchnorm", dims={"T": 6})
    told = History.from_json(first.history.to_json())
    assert first.history.changed
    assert content(quick(proto, told.recipe, dims={"T": 6}, replay=told)) == content(first)


def test_a_report_of_a_search_replays_without_searching():
    damages = (0, *COUNTS[1:])
    first = quick(classifier(), [emptied(damages=damages)], evaluate=samples(), max_drop=7.0)
    told = History.from_json(first.history.to_json())
    step = emptied(damages=damages)
    again = quick(classifier(), [step], evaluate=samples(), max_drop=7.0, replay=told)
    assert content(again) == content(first)
    assert not any(entry[0] == "propose" for entry in step.log)
    assert again.history.stages[0].passes[0].chosen == [(s, dict(v)) for s, v in told.stages[0].passes[0].chosen]


# Inputs to measure with


def test_feeds_are_the_first_samples_repeated_where_they_are_too_few():
    model = from_proto(classifier())
    data = open_data(samples([3, 1, 4])).for_model(model)
    assert real_feeds(model, 2, {}, data)["x"].argmax(axis=1).tolist() == [3, 1]
    assert real_feeds(model, 5, {}, data)["x"].argmax(axis=1).tolist() == [3, 1, 4, 3, 1]
    made_up = real_feeds(model, 2, {}, None, seed=1)["x"]
    assert made_up.shape == (2, 6) and not np.array_equal(made_up, real_feeds(model, 2, {}, None, seed=2)["x"])


def test_the_public_names_are_there():
    for name in effc.__all__:
        assert getattr(effc, name) is not None
    assert effc.Proposal is Proposal
    assert Path(effc.__file__).name == "__init__.py"
    assert [type(step) for step in (Simplify(), FoldBatchNorm())] == [Simplify, FoldBatchNorm]
