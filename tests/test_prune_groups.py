"""effc.passes.prune_groups: forms are exact, what is lost is what regression loses, planted patterns are found."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from effc import api
from effc.capture import from_proto
from effc.cost import cost
from effc.errors import BadInput
from effc.history import UNCHANGED, History
from effc.passes._factors import Layer
from effc.passes._forms import by_tap, columns, emit, of_channels
from effc.passes._group_saliency import Groups, kept_of, windows
from effc.passes._sites import Site, find
from tests import networks
from tests.networks import Net, distance, feeds, run

SAMPLES = 64


def optimize(proto: onnx.ModelProto, recipe: str, known: bool = True, **options) -> api.Result:
    seen = {"calibrate": {"source": lambda: iter([feeds(proto, batch=SAMPLES, seed=7)])}} if known else {}
    return api.optimize(proto, recipe, measure=False, force=True, target_name="onnxruntime-avx2", **seen, **options)


def chosen(result: api.Result) -> dict[str, dict]:
    return {site.removeprefix("node_"): dict(setting) for site, setting in result.history.passes[-1].chosen}


def reasons(result: api.Result) -> dict[str, str]:
    ledger = result.history.passes[-1].ledger
    return {e.node.removeprefix("node_"): e.reason for e in ledger if not e.reason.startswith("nothing for ")}


def moved(proto: onnx.ModelProto, result: api.Result) -> float:
    after = result.model.proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = feeds(proto, batch=8, seed=3)
    return distance(run(proto, inputs), run(after, inputs))


def network(weight: np.ndarray, opset: int = 17, **attributes) -> onnx.ModelProto:
    """A stem that mixes channels, and a layer with this weight behind it."""
    net = Net("groups", opset=opset)
    n, c, *kernel = weight.shape
    x = net.input("x", ["N", 6, *[9 + axis for axis in range(len(kernel))]])
    x = net.relu(net.conv(x, 6, c, [1] * len(kernel), name="stem", bias=True))
    y = net.conv(x, c, n, kernel, name="layer", **attributes)
    net.weights["layer.weight"] = weight.astype(np.float32)
    net.output(net.relu(net.norm(y, n, name="bn")))
    return net.model()


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) / np.prod(shape[1:]) ** 0.5


# --- forms ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "padded": ((10, 8, 3, 3), {"pads": [1, 2, 0, 1], "bias": True}),
    "strided": ((10, 8, 3, 3), {"pads": [1] * 4, "strides": [2, 3], "dilations": [2, 1]}),
    "valid": ((10, 8, 3, 3), {"bias": True}),
    "strided and valid": ((10, 8, 4, 3), {"strides": [2, 2]}),
    "same": ((10, 8, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    "one-dimensional": ((10, 8, 5), {"pads": [3, 1], "strides": [2], "bias": True}),
    "pointwise": ((10, 8, 1, 1), {}),
}


def groups_of(layer: Layer, form: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if form == "channels":
        return of_channels(layer, np.sort(rng.permutation(layer.inputs)[:3]))
    if form == "taps":
        size = layer.matrix.shape[1]
        return by_tap(layer, np.sort(rng.permutation(size)[: max(2, size // 5)]))
    places = [place for size in windows(layer) for place in size]
    return columns(layer, places[seed % len(places)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("form", ["crop", "channels", "taps"])
@pytest.mark.parametrize("name", LAYERS)
def test_forms_compute_what_the_layer_does_with_zeros_elsewhere(name, form, seed):
    """Stated bound: 1e-5 of the largest output."""
    shape, attributes = LAYERS[name]
    if form == "crop" and name == "pointwise":
        pytest.skip("a kernel of one tap has no smaller window")
    proto = network(random(*shape), **attributes)
    model = from_proto(proto)
    site = find(model, model.node("node_layer"), model.shapes(2))
    assert isinstance(site, Site), site
    kept = groups_of(site.layer, form, seed)
    zeros = np.zeros(shape[0] * site.layer.matrix.shape[1]).reshape(shape[0], -1)
    zeros[:, kept] = random(*shape).reshape(shape[0], -1)[:, kept]
    wanted = network(zeros.reshape(shape), **attributes)
    emit(model, site, form, kept, site.layer.matrix[:, kept], None)
    after = model.proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = feeds(proto, batch=3, seed=1)
    assert distance(run(wanted, inputs), run(after, inputs)) <= 1e-5
    sizes = {t.name: numpy_helper.to_array(t).size for t in after.graph.initializer}
    (layer,) = [n for n in after.graph.node if n.op_type == "Conv" and n.name != "node_stem"]
    assert sizes[layer.input[1]] == shape[0] * len(kept)


# --- what is lost ---------------------------------------------------------------------------------------------------


def samples(size: int, rows: int = 400) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(rows, size)) @ rng.normal(size=(size, size))


@pytest.mark.parametrize("kept", [[0], [0, 1, 2, 3, 9], [*range(2, 18)], [*range(18)]])
def test_the_loss_is_the_residual_of_a_regression(kept):
    x, layer = samples(18), Layer(random(5, 2, 3, 3))
    wanted = x @ layer.matrix.T
    fitted = x[:, kept] @ np.linalg.lstsq(x[:, kept], wanted, rcond=None)[0]
    expected = ((wanted - fitted) ** 2).sum() / (wanted**2).sum()
    found = Groups(layer, layer.matrix, x.T @ x).lost(np.array(kept))
    assert found == pytest.approx(expected, abs=1e-9)


def test_elimination_takes_the_group_that_costs_least_at_each_step():
    """Few enough that one goes at a time; each is checked against all regressions."""
    x, layer = samples(12), Layer(random(4, 3, 2, 2))
    groups = Groups(layer, layer.matrix, x.T @ x)
    parts = [np.array([c]) for c in range(12)]
    left, order = list(range(12)), groups.order("reconstruction", parts, 2, None, (0, 0))
    assert len(order) == 10
    for gone in order:
        tried = {c: groups.lost(np.array([other for other in left if other != c])) for c in left}
        assert tried[int(gone)] <= min(tried.values()) + 1e-9
        left.remove(int(gone))
    assert kept_of(order, parts, 2).tolist() == left


def test_other_saliencies_rank_groups_by_their_sums():
    layer = Layer(random(4, 3, 2, 2))
    groups, parts = Groups(layer, layer.matrix, None), [np.arange(4 * c, 4 * c + 4) for c in range(3)]
    sums = np.abs(layer.matrix).sum(axis=0).reshape(3, 4).sum(axis=1)
    assert groups.order("l1", parts, 1, None, (0, 0)).tolist() == np.argsort(sums)[:2].tolist()
    assert groups.order("obd", parts, 1, np.repeat([3.0, 1.0, 2.0], 4), (0, 0)).tolist() == [1, 2]
    assert groups.order("reconstruction", parts, 2, None, (0, 0)).tolist() == [
        int(np.argmin((layer.matrix**2).sum(axis=0).reshape(3, 4).sum(axis=1)))
    ]
    assert sorted(groups.order("random", parts, 0, None, (0, 1))) == [0, 1, 2]


# --- planted patterns -----------------------------------------------------------------------------------------------


def planted(form: str) -> np.ndarray:
    weight, mask = random(16, 32, 3, 3), np.zeros((32, 3, 3), bool)
    if form == "crop":
        mask[:, 1, :] = True
    elif form == "channels":
        mask[np.random.default_rng(1).permutation(32)[:8]] = True
    else:
        mask.flat[np.random.default_rng(1).permutation(288)[:40]] = True
    return weight * mask


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("form", "setting"), [
    ("crop", {"form": "crop", "top": 1, "left": 0, "height": 1, "width": 3}),
    ("channels", {"form": "channels", "kept": 8}),
    ("taps", {"form": "taps", "kept": 43}),
])  # fmt: skip
def test_planted_patterns_are_found_and_cost_nothing(form, setting, known):
    """Bound: 1e-4, as weights are fitted in float32."""
    proto = network(planted(form), pads=[1] * 4, bias=True)
    found = optimize(proto, "prune-groups{macs=0.4}", known)
    assert chosen(found)["layer"] == setting
    assert moved(proto, found) <= 1e-4
    after = found.history.passes[-1].cost_after.macs
    share = {"crop": 3 * 32, "channels": 8 * 9, "taps": 43}[form]
    read = 8 if form == "channels" else 32  # the stem makes no channel that nothing reads
    assert after <= 90 * (6 * read + 16 * share) and (form == "taps" or after == 90 * (6 * read + 16 * share))


def test_channels_that_nothing_reads_go_where_they_are_made():
    """And with them the Gather: what is left are two smaller convolutions. What another layer reads stays."""
    net = Net("two readers")
    x = net.input("x", ["N", 6, 9, 10])
    alone, both = (net.relu(net.conv(x, 6, 32, 1, name=name, bias=True)) for name in ("alone", "both"))
    first = net.conv(alone, 32, 16, 3, name="first", pads=[1] * 4)
    second = net.conv(both, 32, 16, 3, name="second", pads=[1] * 4)
    for name in ("first", "second"):
        net.weights[f"{name}.weight"] = planted("channels").astype(np.float32)
    net.output(net.node("Concat", first, second, net.conv(both, 32, 4, 1, name="other"), axis=1))
    proto = net.model()
    found = optimize(proto, "prune-groups{forms=[channels], macs=0.4}")
    assert moved(proto, found) <= 1e-4
    after = found.model.proto()
    sizes = {t.name: t.dims[0] for t in after.graph.initializer}
    made = {n.name: sizes[n.input[1]] for n in after.graph.node if n.op_type == "Conv"}
    assert made["node_alone"] == 8 and made["node_both"] == 32
    assert [n.op_type for n in after.graph.node].count("Gather") == 1
    assert found.history.passes[-1].notes == ["24 channels that nothing reads any more went where they were made"]


@pytest.mark.parametrize("saliency", ["l1", "obd"])
def test_other_saliencies_find_them_too(saliency):
    if saliency == "obd":
        pytest.importorskip("torch")
    proto = network(planted("taps"), pads=[1] * 4, bias=True)
    found = optimize(proto, f"prune-groups{{saliency={saliency}, macs=0.4}}")
    assert chosen(found)["layer"] == {"form": "taps", "kept": 43} and moved(proto, found) <= 1e-4


def test_what_others_make_up_for_is_worth_less_than_its_size():
    """Channels that are copies of others cost next to nothing, whatever their weights are; by size they would stay."""
    net = Net("copies")
    x = net.input("x", ["N", 6, 8, 8])
    x = net.relu(net.conv(x, 6, 16, 1, name="stem", bias=True))
    net.weights["stem.weight"][8:] = net.weights["stem.weight"][:8]
    net.weights["stem.bias"][8:] = net.weights["stem.bias"][:8]
    net.output(net.conv(x, 16, 12, 3, name="layer", bias=True))
    proto = net.model()
    recipe = "prune-groups{{forms=[channels], macs=0.6, saliency={}}}"
    exact, by_size, by_chance = (optimize(proto, recipe.format(s)) for s in ("reconstruction", "l1", "random"))
    assert chosen(exact)["layer"] == {"form": "channels", "kept": 8}
    # The ridge that holds weights to what they were keeps the first from being exact.
    assert moved(proto, exact) <= 0.05 < 0.1 < min(moved(proto, by_size), moved(proto, by_chance))


def test_fitting_is_nearer_than_leaving_weights_as_they_are():
    proto = network(random(16, 32, 3, 3), pads=[1] * 4, bias=True)
    fitted, blind = (optimize(proto, "prune-groups{macs=0.6}", known) for known in (True, False))
    assert moved(proto, fitted) < 0.7 * moved(proto, blind)


# --- budgets, options, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_shares_are_held(share):
    proto = network(random(16, 32, 3, 3), pads=[1] * 4, bias=True)
    thin, small = (optimize(proto, f"prune-groups{{{b}={share}}}") for b in ("macs", "size"))
    before = from_proto(proto)
    assert cost(thin.model).total.macs <= share * cost(before).total.macs
    # Indices of channels are no weights, but bytes: they are so few that the share is held to one per cent of it.
    assert cost(small.model).total.weight_bytes <= 1.02 * share * cost(before).total.weight_bytes


@pytest.mark.parametrize("share", [0.85, 0.7, 0.5])
def test_what_producers_save_is_counted(share):
    """In a chain each layer is made narrower by the one behind: what is chosen is what is reached, to a step of 8."""
    net = Net("chain")
    x = net.input("x", ["N", 3, 12, 12])
    for number, (n, d) in enumerate(((3, 32), (32, 48), (48, 64), (64, 64))):
        x = net.relu(net.conv(x, n, d, 3, name=f"c{number}", bias=True, pads=[1] * 4))
    net.head(x, 64)
    proto = net.model()
    found = optimize(proto, f"prune-groups{{forms=[channels], macs={share}}}")
    reached = cost(found.model).total.macs / cost(from_proto(proto)).total.macs
    assert share - 0.1 <= reached <= share * 1.02


def test_only_stated_forms_are_made():
    proto = network(random(16, 32, 3, 3), pads=[1] * 4)
    for form in ("crop", "channels", "taps"):
        assert chosen(optimize(proto, f"prune-groups{{forms=[{form}], macs=0.8}}"))["layer"]["form"] == form


def test_a_report_replays_to_the_same_bytes():
    proto = network(random(16, 32, 3, 3), pads=[1] * 4)
    first = optimize(proto, "prune-groups{forms=[taps], macs=0.6}")
    told = History.from_json(first.history.to_json())
    again = optimize(proto, told.recipe, replay=told)
    assert chosen(first) and again.model.proto().SerializeToString() == first.model.proto().SerializeToString()


def test_what_gains_too_little_is_left_alone_with_the_best_there_was():
    """The cheapest of 32 channels x 3 x 3 is a fortieth of the groups: 7 of 288."""
    proto = network(random(16, 32, 3, 3), pads=[1] * 4)
    found = optimize(proto, "prune-groups{macs=0.5, min_gain=60}")
    said = f"no form is 60 times cheaper in multiply-accumulates (the best, taps: {288 / 7:.2f} times)"
    assert reasons(found)["layer"] == said and found.history.passes[-1].status == UNCHANGED


def test_a_small_budget_finds_taps_all_over_the_kernel():
    """Not the one place of a 5 x 5 kernel that a crop would leave, which sees none of this layer's weights."""
    weight = random(16, 4, 5, 5)
    weight[:, :, 2, 2] = 0
    found = chosen(optimize(network(weight, pads=[2] * 4), "prune-groups{macs=0.056}", goal="macs"))
    assert found["layer"] == {"form": "taps", "kept": 4}


def test_old_operators_leave_the_smaller_kernels():
    proto = network(random(16, 32, 3, 3), opset=11, pads=[1] * 4)
    assert chosen(optimize(proto, "prune-groups{macs=0.6}"))["layer"]["form"] == "crop"
    said = reasons(optimize(proto, "prune-groups{forms=[taps], macs=0.6}"))["layer"]
    assert said == "none of the forms taps is there for a 3 x 3 kernel at opset 11"


def test_depthwise_and_other_floats_are_left_alone():
    said = reasons(optimize(networks.depthwise(), "prune-groups{macs=0.5}"))
    assert said["dw"].startswith("it is depthwise") and said["grouped"].startswith("it has 4 groups")
    assert "float16" in reasons(optimize(networks.half(), "prune-groups"))["conv1"]


def test_an_unknown_form_is_refused():
    with pytest.raises(BadInput, match="forms"):
        optimize(networks.plain(), "prune-groups{forms=[none]}")
