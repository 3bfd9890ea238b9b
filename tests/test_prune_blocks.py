"""effc.passes.prune_blocks: blocks are found, dropped exactly, in the order of what they do, and made up for."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from scipy.special import softmax
from scipy.stats import entropy

from effc import api
from effc.capture import from_proto
from effc.errors import BadInput
from effc.history import UNCHANGED, History
from effc.passes._block_order import levelled
from effc.passes._blocks import Block, blocks
from tests import networks
from tests.networks import Net, distance, feeds, run

SAMPLES = 64
SCALES = (1.0, 0.02, 0.6, 0.1, 0.3)  # of what the branches of `stack` add


def stack(scales=SCALES, channels: int = 12, relu: bool = True, tap: str = "") -> onnx.ModelProto:
    """A stem and residual blocks; `tap` names a tensor that is an output too."""
    net = Net("stack")
    x = net.relu(net.conv(net.input("x", ["N", 3, 8, 8]), 3, channels, 3, name="stem", pads=[1] * 4, bias=True))
    for number, scale in enumerate(scales):
        y = net.relu(net.conv(x, channels, channels, 3, name=f"b{number}_one", pads=[1] * 4, bias=True))
        y = net.conv(y, channels, channels, 3, name=f"b{number}_two", pads=[1] * 4, bias=True)
        for key in ("weight", "bias"):
            net.weights[f"b{number}_two.{key}"] *= np.float32(scale)
        x = net.node("Add", x, y, name=f"b{number}_add")
        x = net.relu(x) if relu else x
    if tap:
        net.output(tap, ["N", channels, 8, 8])
    net.head(x, channels)
    return net.model()


def optimize(proto: onnx.ModelProto, recipe: str, known: bool = True, **options) -> api.Result:
    seen = {"calibrate": {"source": lambda: iter([feeds(proto, batch=SAMPLES, seed=7)])}} if known else {}
    return api.optimize(
        proto, recipe, measure=False, force=True, target_name="onnxruntime-avx2", **seen, **options
    )  # fmt: skip


def dropped(result: api.Result) -> list[str]:
    return sorted(site.removeprefix("node_") for site, _ in result.history.passes[-1].chosen)


def reasons(result: api.Result) -> dict[str, str]:
    ledger = result.history.passes[-1].ledger
    return {e.node.removeprefix("node_"): e.reason for e in ledger if not e.reason.startswith("nothing for ")}


def without(proto: onnx.ModelProto, *weights: str) -> onnx.ModelProto:
    """The network with some weights zero, so that the branches that end in them add nothing."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
    return copy


def silent(proto: onnx.ModelProto, *numbers: int) -> onnx.ModelProto:
    return without(proto, *(f"b{n}_two.{key}" for n in numbers for key in ("weight", "bias")))


def hurt(proto: onnx.ModelProto, after: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> float:
    """Nats a sample."""
    (a,), (b,) = (run(each, inputs).values() for each in (proto, after))
    return float(entropy(softmax(a.astype(float), 1), softmax(b.astype(float), 1), axis=1).mean())


# --- finding --------------------------------------------------------------------------------------------------------


def test_blocks_of_a_residual_network_are_found():
    found = [b for b in blocks(from_proto(stack())) if isinstance(b, Block)]
    assert [b.name for b in found] == [f"node_b{n}_add" for n in range(5)]
    assert [{n.op_type for n in b.nodes} for b in found] == [{"Conv", "Relu"}] * 5
    assert all(len(b.nodes) == 3 and b.keep == 0 for b in found)


def test_a_transformers_branches_are_found():
    """Attention with all that splits its heads; in what order the sum has its operands is the same."""
    (found,) = [b for b in blocks(from_proto(networks.transformer())) if isinstance(b, Block)]
    assert found.shortcut.name == "input" and sum(n.op_type == "MatMul" for n in found.nodes) == 5


def test_a_shortcut_without_layers_may_change_sizes():
    """Subsampling and padding, as the first residual networks had it; what is dropped are the convolutions alone."""
    net = Net("sampled")
    x = net.relu(net.conv(net.input("x", ["N", 3, 8, 8]), 3, 4, 1, name="stem"))
    y = net.conv(x, 4, 8, 3, name="branch", pads=[1] * 4, strides=[2, 2])
    s = net.node("MaxPool", x, kernel_shape=[1, 1], strides=[2, 2])
    s = net.node("Pad", s, net.weight("pads", np.array([0, 2, 0, 0, 0, 2, 0, 0])), name="padded")
    net.head(net.relu(net.node("Add", y, s, name="add")), 8)
    (found,) = blocks(from_proto(net.model()))
    assert isinstance(found, Block) and found.keep == 1 and [n.name for n in found.nodes] == ["node_branch"]
    result = optimize(net.model(), "prune-blocks{count=1, correct=false}")
    inputs = feeds(net.model(), batch=3)
    assert distance(run(without(net.model(), "branch.weight"), inputs), run(result.model.proto(), inputs)) <= 1e-6


# --- dropping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_is_left_computes_what_it_did_with_branches_of_zero(count, relu):
    proto = stack(relu=relu)
    found = optimize(proto, f"prune-blocks{{count={count}, correct=false}}")
    after = found.model.proto()
    onnx.checker.check_model(after, full_check=True)
    names = dropped(found)
    assert len(names) == count
    inputs = feeds(proto, batch=5, seed=3)
    assert distance(run(silent(proto, *(int(n[1]) for n in names)), inputs), run(after, inputs)) <= 1e-6
    ops = [node.op_type for node in after.graph.node]
    assert ops.count("Add") == 5 - count and ops.count("Conv") == 1 + 2 * (5 - count)
    # One of the stem, two of each block, of which the one behind the sum changes nothing that a Relu made.
    assert ops.count("Relu") == 1 + (5 - count) * (1 + relu)


def test_an_activation_that_cuts_something_off_stays():
    net = Net("linear stem")
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 1, name="stem", bias=True)
    y = net.conv(x, 8, 8, 3, name="branch", pads=[1] * 4)
    net.head(net.relu(net.node("Add", y, x, name="add")), 8)
    after = optimize(net.model(), "prune-blocks{count=1, correct=false}").model.proto()
    assert [node.op_type for node in after.graph.node] == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]


def test_branches_go_in_the_order_of_what_they_do():
    proto = stack()
    taken = [dropped(optimize(proto, f"prune-blocks{{count={c}, correct=false}}")) for c in (1, 2, 3)]
    assert taken[:2] == [["b1_add"], ["b1_add", "b3_add"]] and taken[2][-1] in ("b3_add", "b4_add")


def test_damages_add_up_to_what_all_together_do():
    """On the calibration data, where no layer is fitted anew."""
    proto = stack()
    found = optimize(proto, "prune-blocks{count=4, correct=false}")
    told = {e.node: e.damage for e in found.history.passes[-1].ledger if e.node.endswith("_add") and e.damage}
    inputs = feeds(proto, batch=SAMPLES, seed=7)
    assert sum(told.values()) == pytest.approx(hurt(proto, found.model.proto(), inputs), rel=1e-3)


@pytest.mark.parametrize("damages", [[1, 2, 3], [3, 2, 1], [1, 5, 0, 0, 7, 6], [0, 0, 0], [2, 0, 4, 1]])
def test_prices_never_fall_along_the_order_and_damages_keep_their_sum(damages):
    savings = [1.0 + 0.5 * (number % 3) for number in range(len(damages))]
    found = levelled(damages, savings)
    prices = np.array(found) / savings
    assert sum(found) == pytest.approx(sum(damages), rel=1e-7) and (np.diff(prices) >= 0).all()
    falls = np.diff(np.array(damages) / savings) < 0
    assert falls.any() or found == pytest.approx(damages, rel=1e-7)


def test_less_damage_takes_the_first_of_the_order():
    proto = stack(scales=(1.0, 0.02, 0.6, 0.1, 0.3, 0.5, 0.2, 0.8))
    whole = optimize(proto, "prune-blocks{count=8, correct=false}").history.passes[-1]
    told = {e.node: e.damage for e in whole.ledger if e.node in dict(whole.chosen)}
    by_price = sorted(told, key=lambda name: told[name])
    for amount in (0.01, 0.1, 0.3, 1.0):
        taken = optimize(proto, f"prune-blocks{{damage={amount}, correct=false}}")
        first = [f"node_{name}" for name in dropped(taken)]
        assert set(first) == set(by_price[: len(first)])


def test_layers_behind_make_up_for_what_went():
    proto = stack()
    plain, fitted = (optimize(proto, f"prune-blocks{{count=2, correct={c}}}").model.proto() for c in ("false", "true"))
    inputs = feeds(proto, batch=64, seed=3)
    assert hurt(proto, fitted, inputs) < 0.6 * hurt(proto, plain, inputs)
    assert [n.op_type for n in fitted.graph.node] == [n.op_type for n in plain.graph.node]


def test_layers_before_what_went_stay_as_they_are():
    proto = stack(scales=(1.0, 1.0, 0.02))
    after = optimize(proto, "prune-blocks{count=1}").model
    before = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    for name in ("stem.weight", "b0_one.weight", "b1_two.weight"):
        assert np.array_equal(after.constant(after.value(name)), before[name])
    assert not np.array_equal(after.constant(after.value("fc.weight")), before["fc.weight"])


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "quantity"), [("macs", "macs"), ("size", "weight_bytes")])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_shares_are_held_with_as_few_branches_as_are_needed(budget, quantity, share):
    found = optimize(stack(), f"prune-blocks{{{budget}={share}}}")
    record = found.history.passes[-1]
    kept = getattr(record.cost_after, quantity) / getattr(record.cost_before, quantity)
    assert share - 0.2 < kept <= share
    said = {r for r in reasons(found).values() if "hurt" in r}
    assert said == {f"{len(dropped(found))} other branches hurt less, and are enough" if len(dropped(found)) > 1 else
                    "another branch hurts less, and are enough"}  # fmt: skip


def test_a_share_out_of_reach_is_told():
    found = optimize(stack(), "prune-blocks{macs=0.01}")
    assert len(dropped(found)) == 5
    assert found.history.passes[-1].notes[0].startswith("macs=0.01 is out of reach")


def test_damage_is_spent_and_no_more():
    amounts = (1e-7, 0.002, 0.05, 1.5)
    found = [optimize(stack(), f"prune-blocks{{damage={amount}}}") for amount in amounts]
    assert found[0].history.passes[-1].status == UNCHANGED
    counts = [len(dropped(each)) for each in found]
    assert counts == sorted(counts) and counts[0] == 0 < counts[-1]


def test_a_limit_on_accuracy_needs_data():
    with pytest.raises(BadInput, match="max_drop needs evaluation data"):
        optimize(stack(), "prune-blocks{max_drop=1}")


@pytest.mark.parametrize("options", ["count=2", "macs=0.6"])
def test_a_report_replays_to_the_same_bytes(options):
    first = optimize(stack(), f"prune-blocks{{{options}}}")
    told = History.from_json(first.history.to_json())
    again = optimize(stack(), told.recipe, replay=told)
    assert again.model.proto().SerializeToString() == first.model.proto().SerializeToString()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_without_data_it_says_what_it_needs():
    found = optimize(stack(), "prune-blocks{count=1}", known=False)
    assert {*reasons(found).values()} == {"what its branch is worth is measured on calibration data: give --calibrate"}
    assert found.history.passes[-1].status == UNCHANGED


def test_a_shortcut_with_a_layer_is_no_shortcut():
    found = optimize(networks.residual(), "prune-blocks{count=5}")
    assert dropped(found) == ["b1_add"]
    names = "'node_b2_conv2' and 'node_b2_conv3'"
    said = f"both of its operands come from layers of their own, {names}: neither is a shortcut"
    assert reasons(found)["b2_add"] == said


REFUSALS = {
    "b0_two": "neither of its operands is a branch of layers that nothing else reads",
    "b0_one": "its branch does not start where its shortcut does: it reads 'b0_one'",
    "b0_add": "its sum is an output of the graph, which the shortcut cannot take the name of",
}


@pytest.mark.parametrize("tap", REFUSALS)
def test_a_branch_that_is_read_elsewhere_stays(tap):
    found = optimize(stack(tap=tap), "prune-blocks{count=9}")
    assert "b0_add" not in dropped(found) and reasons(found)["b0_add"] == REFUSALS[tap]
    assert dropped(found) == ["b1_add", "b2_add", "b3_add", "b4_add"]
