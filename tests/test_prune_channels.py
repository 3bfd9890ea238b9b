"""effc.passes.prune_channels: what nobody misses goes for nothing, budgets hold, and fitting what stays pays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import effc.guard
from effc import api
from effc.capture import from_proto
from effc.cost import cost
from effc.errors import BadInput
from effc.history import KEPT, UNDONE, History
from effc.measure import Latency
from tests.networks import NETWORKS, Net, distance, feeds, run

SAMPLES = 64


def optimize(proto: onnx.ModelProto, recipe: str, **options) -> api.Result:
    return api.optimize(proto, recipe, measure=False, force=True, target_name="onnxruntime-avx2", **options)


def images(proto: onnx.ModelProto) -> dict:
    return {"source": lambda: iter([feeds(proto, batch=SAMPLES, seed=7)])}


def off(proto: onnx.ModelProto, result: api.Result) -> float:
    after = result.model.proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = feeds(proto, batch=8, seed=3)
    return distance(run(proto, inputs), run(after, inputs))


def shapes(result: api.Result) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in result.model.proto().graph.initializer}


def redundant(norm: bool = False) -> onnx.ModelProto:
    """Ten channels, of which six say all: two repeat others, one is twice another, one is never above zero."""
    net = Net("redundant")
    x = net.conv(net.input("x", ["N", 3, 8, 8]), 3, 10, 3, name="a", bias=True)
    x = net.relu(net.norm(x, 10, name="bn") if norm else x)
    net.output(net.conv(x, 10, 6, 3, name="b", bias=True), ["N", 6, 4, 4])
    weight, bias = net.weights["a.weight"], net.weights["a.bias"]
    for unit, other, factor in ((6, 0, 1), (7, 1, 1), (8, 2, 1 if norm else 2)):
        weight[unit], bias[unit] = factor * weight[other], factor * bias[other]
        for name in [name for name in net.weights if name.startswith("bn")]:
            net.weights[name][unit] = net.weights[name][other]
    weight[9], bias[9] = 0, -1
    if norm:
        net.weights["bn.bias"][9] = -9
    return net.model()


@pytest.mark.parametrize("norm", [False, True])
def test_what_repeats_and_what_is_dead_goes_first_and_is_made_up_for(norm):
    """Six of ten channels are enough; what stays carries the rest, and batch norms stay."""
    proto = redundant(norm)
    result = optimize(proto, "prune-channels{macs=0.6, multiple=1}", calibrate=images(proto))
    assert shapes(result)["a.weight"] == (6, 3, 3, 3) and shapes(result)["b.weight"] == (6, 6, 3, 3)
    assert [n.op_type for n in result.model.proto().graph.node] == [n.op_type for n in proto.graph.node]
    assert off(proto, result) <= 0.05  # a ridge holds weights to what they were
    one_more = optimize(proto, "prune-channels{macs=0.5, multiple=1}", calibrate=images(proto))
    assert shapes(one_more)["a.weight"][0] == 5 and off(proto, one_more) > 3 * off(proto, result)


@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "branches", "mlp"])
@pytest.mark.parametrize(("budget", "quantity"), [("macs", "macs"), ("size", "weight_bytes")])
def test_budgets_hold(name, budget, quantity):
    proto = NETWORKS[name]()
    result = optimize(proto, f"prune-channels{{{budget}=0.7}}", calibrate=images(proto))
    before, after = (getattr(cost(m, 1).total, quantity) for m in (from_proto(proto), result.model))
    assert 0.4 * before <= after <= 0.72 * before  # counts of single layers are rounded; steps are coarse


@pytest.mark.parametrize("saliency", ["reconstruction", "l2", "random"])
def test_fitting_what_stays_pays(saliency):
    proto = NETWORKS["plain"]()
    recipe = f"prune-channels{{macs=0.6, saliency={saliency}, correct="
    fitted, plain = (optimize(proto, f"{recipe}{c}}}", calibrate=images(proto)) for c in ("true", "false"))
    assert off(proto, fitted) < 0.8 * off(proto, plain)


def test_reconstruction_hurts_less_than_chance():
    proto = NETWORKS["plain"]()
    chosen, chance = (
        optimize(proto, f"prune-channels{{macs=0.6, saliency={s}}}", calibrate=images(proto))
        for s in ("reconstruction", "random")
    )
    assert off(proto, chosen) < off(proto, chance)


def test_units_that_a_recurrent_layer_reads_are_missed():
    """Its gates are no layer that is fitted, but what they read counts: the units that they need most stay."""
    net = Net("recurrent", opset=18)
    x = net.relu(net.node("MatMul", net.input("x", [6, 8, 3]), net.weight("w", net.random(3, 8))))
    read = net.random(1, 12, 8, scale=0.5)
    read[:, :, ::2] *= 0.01
    net.node("GRU", x, net.weight("input", read), net.weight("state", net.random(1, 12, 4)), name="gru", outputs=2,
             hidden_size=4, linear_before_reset=1)  # fmt: skip
    last = net.node("Squeeze", "gru_1", net.weight("axes", np.array([0])))
    net.output(net.node("MatMul", last, net.weight("v", net.random(4, 3))), [8, 3])
    proto = net.model()
    result = optimize(proto, "prune-channels{macs=0.8}", calibrate={"source": lambda: iter([feeds(proto, seed=7)])})
    entry = next(e for e in result.history.passes[0].ledger if e.status == "changed")
    kept = result.model.graph.initializers["w"].const_value.numpy()
    rows = [np.flatnonzero((net.weights["w"] == column[:, None]).all(0))[0] for column in kept.T]
    assert entry.damage > 0 and {1, 3, 5, 7} <= set(rows) and len(rows) < 8


def test_without_data_weights_decide_and_nothing_is_fitted():
    proto = NETWORKS["plain"]()
    result = optimize(proto, "prune-channels{macs=0.7}")
    ledger = result.history.passes[0].ledger
    assert {e.damage for e in ledger if e.status == "changed"} == {None}
    kept = shapes(result)["conv1.weight"][0]
    norms = np.linalg.norm(numpy_helper.to_array(_weight(proto, "conv1.weight")).reshape(8, -1), axis=1)
    expected = np.sort(np.argsort(norms)[8 - kept :])
    now = numpy_helper.to_array(_weight(result.model.proto(), "conv1.weight"))
    np.testing.assert_array_equal(now, numpy_helper.to_array(_weight(proto, "conv1.weight"))[expected])


def test_without_data_a_budget_is_needed():
    with pytest.raises(
        BadInput, match=r"prune-channels needs calibration data .* or a budget: macs=, size= or speedup="
    ):
        optimize(NETWORKS["plain"](), "prune-channels")


def test_multiples_and_the_share_that_stays():
    proto = NETWORKS["plain"]()
    result = optimize(proto, "prune-channels{macs=0.1, multiple=4, most=0.5}", calibrate=images(proto))
    counts = {name: shape[0] for name, shape in shapes(result).items() if name.endswith("conv1.weight")}
    assert counts == {"conv1.weight": 4}
    assert all(setting["units"] % 4 == 0 for _, setting in result.history.passes[0].chosen)
    assert any("macs=0.1 is out of reach" in note for note in result.history.passes[0].notes)


def test_a_report_replays_to_the_same_bytes():
    proto = NETWORKS["residual"]()
    result = optimize(proto, "prune-channels{macs=0.7}", calibrate=images(proto))
    report = History.from_json(result.history.to_json())
    again = optimize(proto, "prune-channels{macs=0.7}", calibrate=images(proto), replay=report)
    assert again.model.proto().graph == result.model.proto().graph


@pytest.mark.filterwarnings(f"ignore::{ConvergenceWarning.__module__}.ConvergenceWarning")
def test_digits_keep_their_accuracy():
    """A classifier of real digits, 64 - 96 - 96 - 10, at half of its multiply-accumulates, without training."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    found = MLPClassifier((96, 96), max_iter=60, random_state=0).fit(x[:1200], y[:1200])
    net = Net("digits")
    t = net.input("x", ["N", 64])
    for number, (weight, bias) in enumerate(zip(found.coefs_, found.intercepts_, strict=True)):
        names = (net.weight(f"w{number}", weight.astype(np.float32)), net.weight(f"b{number}", bias.astype(np.float32)))
        t = net.node("Gemm", t, *names)
        t = net.relu(t) if number < 2 else t
    net.output(t, ["N", 10])
    proto = net.model()
    calibrate = {"source": {"x": x[:1000]}}
    rights = {}
    for recipe in ("prune-channels{macs=0.5}", "prune-channels{macs=0.5, saliency=l2, correct=false}"):
        result = optimize(proto, recipe, calibrate=calibrate)
        assert result.history.passes[0].status == KEPT
        (made,) = run(result.model.proto(), {"x": x[1200:]}).values()
        rights[recipe] = float((made.argmax(axis=1) == y[1200:]).mean())
    (whole,) = run(proto, {"x": x[1200:]}).values()
    fitted, plain = rights.values()
    assert fitted >= float((whole.argmax(axis=1) == y[1200:]).mean()) - 0.01
    assert fitted > plain


def _weight(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in proto.graph.initializer if t.name == name)


PRUNED = {
    "prune-channels": "plain", "prune-blocks": "residual", "prune-groups": "plain", "low-rank": "plain",
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("ratio", [1.3, 0.7])
def test_a_pruned_model_that_is_not_faster_is_refused(name, ratio, monkeypatch):
    """By what is measured, which is made up here: the stage is undone, and the model is what it was."""
    proto = NETWORKS[PRUNED[name]]()

    def measured(before, after, inputs, **options):
        return Latency(2.0, 2 * ratio, ratio, ratio - 0.001, ratio + 0.001, 9, 1, 1)

    monkeypatch.setattr(effc.guard, "compare", measured)
    recipe = f"{name}{{damage=2.0}}" if name == "prune-blocks" else f"{name}{{damage=2.0, min_gain=1}}"
    recipe = "prune-channels{damage=2.0}" if name == "prune-channels" else recipe
    monkeypatch.setattr(effc.guard.Guard, "foresees", lambda self, lossy: False)  # measured, not predicted
    found = api.optimize(proto, recipe, calibrate=images(proto))  # for this machine: another's is not measured
    (stage,) = found.history.stages
    if ratio > 1:
        assert stage.status == UNDONE and stage.reason.startswith("slower: 2.600 ms against 2.000 ms, 1.30x")
        assert not any(t.dims != u.dims for t, u in zip(
            found.model.proto().graph.initializer, from_proto(proto).proto().graph.initializer, strict=True
        ))  # fmt: skip
    else:
        assert stage.status == KEPT and found.model.nbytes() < from_proto(proto).nbytes()


def test_without_data_what_is_a_constant_is_not_lost():
    """A filter of zeros makes its bias: the bias behind takes it, so removing it changes nothing."""
    net = Net("constant")
    x = net.relu(net.conv(net.input("x", ["N", 3, 8, 8]), 3, 8, 3, name="a", bias=True))
    net.output(net.conv(x, 8, 6, 3, name="b", bias=True), ["N", 6, 4, 4])
    net.weights["a.weight"][[1, 4]], net.weights["a.bias"][[1, 4]] = 0, (2.0, 3.0)
    proto = net.model()
    found = optimize(proto, "prune-channels{macs=0.76}")
    assert shapes(found)["a.weight"][0] == 6 and off(proto, found) <= 1e-5
