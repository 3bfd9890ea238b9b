"""effc.walk: what is seen on the way equals what onnxruntime makes of the whole model."""

from typing import Any, cast

import numpy as np
import onnx
import pytest

from effc import edit, walk
from effc.capture import from_proto
from effc.data import open_data
from effc.errors import BadInput
from effc.model import Model
from effc.registry import backend
from effc.runtime import Backend
from effc.walk import Walk, samples
from tests import networks
from tests.networks import NETWORKS, Net, distance, feeds, run

RUNTIME = backend("onnxruntime")
CLOSE = 1e-5  # onnxruntime with its optimisations against onnxruntime without, relative to the largest number


def two_batches(proto: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [feeds(proto, 3, seed=1), feeds(proto, 2, seed=2)]


def start(proto: onnx.ModelProto, **options: Any) -> tuple[Model, Walk, list[dict[str, np.ndarray]]]:
    model, batches = from_proto(proto), two_batches(proto)
    return model, Walk(model, RUNTIME, batches, **options), batches


def exposed(proto: onnx.ModelProto, batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Every tensor of the main graph, by onnxruntime on the whole model."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    there = {o.name for o in proto.graph.output}
    made = [name for node in proto.graph.node for name in node.output if name and name not in there]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made)
    return [run(shown, batch) | batch for batch in batches]


def same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    for values, reference in zip(found, expected, strict=True):
        assert values and distance({name: reference[name] for name in values}, values) <= CLOSE


@pytest.mark.parametrize("network", sorted(NETWORKS.keys() - {"half"}))
def test_every_tensor_on_the_way_is_that_of_the_whole_model(network: str) -> None:
    proto = NETWORKS[network]()
    model, on_way, batches = start(proto)
    expected = exposed(proto, batches)
    for node in model.graph:
        same(on_way.to(node.outputs[0].name), expected)
    outputs = on_way.outputs()
    assert [*outputs[0]] == [o.name for o in proto.graph.output]
    same(outputs, expected)


@pytest.mark.parametrize("network", ["residual", "transformer", "two_outputs"])
def test_a_jump_to_the_end_is_the_whole_model(network: str) -> None:
    proto = NETWORKS[network]()
    _, on_way, batches = start(proto)
    same(on_way.outputs(), [run(proto, batch) for batch in batches])


class Noting:
    """onnxruntime, with the nodes of all models that were loaded."""

    def __init__(self) -> None:
        self.loaded: list[str | None] = []

    def session(self, model: Model, **options: Any) -> Any:
        self.loaded += [node.name for node in model.graph]
        return RUNTIME.session(model, **options)


def test_all_steps_together_run_each_node_once() -> None:
    proto, noting = networks.residual(), Noting()
    model = from_proto(proto)
    on_way = Walk(model, cast(Backend, noting), two_batches(proto))
    for name in ("b1_conv1", "relu2", "b1_add", "b2_conv2", "b2_bn3", "fc"):
        on_way.to(name)
    assert sorted(map(str, noting.loaded)) == sorted(str(node.name) for node in model.graph)


def test_what_no_node_will_read_is_let_go_and_made_again_when_asked_for() -> None:
    proto, noting = networks.plain(), Noting()
    model, batches = from_proto(proto), two_batches(proto)
    on_way = Walk(model, cast(Backend, noting), batches)
    on_way.to("conv2")
    once = len(noting.loaded)
    same(on_way.to("conv1"), exposed(proto, batches))
    assert len(noting.loaded) == once + 1  # from the inputs again


@pytest.mark.parametrize("network", ["plain", "control"])
def test_inputs_of_the_graph_are_at_hand_at_any_time(network: str) -> None:
    proto = NETWORKS[network]()
    _, on_way, batches = start(proto)
    on_way.outputs()
    name = proto.graph.input[0].name
    for found, fed in zip(on_way.to(name), batches, strict=True):
        np.testing.assert_array_equal(found[name], fed[name])


def test_what_a_fork_does_leaves_the_walk_where_it_is() -> None:
    proto = networks.residual()
    _, on_way, batches = start(proto)
    expected = exposed(proto, batches)
    on_way.to("b1_bn1")
    fork = on_way.fork(1)
    same(fork.outputs(), expected[:1])
    fork.forget("relu2")
    for name in ("b1_bn1", "relu2", "b1_add"):
        same(on_way.to(name), expected)
    same(on_way.fork().outputs(), expected)


def with_shift(proto: onnx.ModelProto, weight: str, array: np.ndarray, made: str, shift: np.ndarray) -> onnx.ModelProto:
    """The model with another weight, and a shift added to what its node makes."""
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    next(t for t in other.graph.initializer if t.name == weight).CopyFrom(onnx.numpy_helper.from_array(array, weight))
    other.graph.initializer.append(onnx.numpy_helper.from_array(shift, "shift"))
    index = next(i for i, node in enumerate(other.graph.node) if made in node.output)
    other.graph.node[index].output[0] = "unshifted"
    other.graph.node.insert(index + 1, onnx.helper.make_node("Add", ["unshifted", "shift"], [made]))
    return other


@pytest.mark.parametrize(
    ("network", "name"),
    [
        ("plain", "conv2"),
        ("residual", "b1_conv2"),
        ("mlp", "fc2"),
        ("mlp", "fc4"),
        ("plain", "fc"),
        ("control", "conv2"),
    ],
)
def test_a_changed_layer_is_the_model_with_that_weight_and_shift(network: str, name: str) -> None:
    proto = NETWORKS[network]()
    model, on_way, batches = start(proto)
    rng, node = np.random.default_rng(0), model.node(f"node_{name}")
    before = node.inputs[1].const_value.numpy()
    weight = rng.normal(size=before.shape).astype(np.float32)
    outputs = before.shape[0] if name != "fc2" else before.shape[1]
    shift = rng.normal(size=(outputs, *[1] * (before.ndim - 2))).astype(np.float32)
    expected = [run(with_shift(proto, f"{name}.weight", weight, name, shift), batch) for batch in batches]
    unchanged = [run(proto, batch) for batch in batches]
    assert distance(unchanged[0], expected[0]) > 0.05
    on_way.to(node.inputs[0].name)
    same(on_way.changed(node, weight, shift).outputs(), expected)
    same(on_way.changed(node, weight, shift, 1).outputs(), expected[:1])
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), before)
    same(on_way.outputs(), unchanged)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize(
    ("network", "name", "by"),
    [("residual", "b1_add", "relu2"), ("control", "mean", "other"), ("plain", "bn1", "conv1")],
)
def test_a_replaced_tensor_is_the_model_that_reads_the_other(network: str, name: str, by: str, jump: bool) -> None:
    proto = NETWORKS[network]()
    if network == "control":
        # With sub-graphs the model is run from its inputs each time.
        proto.graph.node.insert(0, onnx.helper.make_node("ReduceMean", ["input"], [by], name="node_other", keepdims=0))
    _, on_way, batches = start(proto, keep={by})
    on_way.to(by)
    if jump:
        before = on_way.outputs()
    other = on_way.replaced(name, by).outputs()
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for node in changed.graph.node:
        for index, read in enumerate(node.input):
            node.input[index] = by if read == name else read
    same(other, [run(changed, batch) for batch in batches])
    if jump:
        same(on_way.outputs(), before)


def test_what_is_held_on_the_way_stays() -> None:
    _, on_way, _ = start(NETWORKS["plain"]())
    on_way.hold({"relu2"})
    on_way.outputs()
    assert "relu2" in on_way._batches[0]


def test_outputs_in_the_middle_of_the_graph_stay() -> None:
    proto = networks.two_outputs()
    _, on_way, batches = start(proto)
    on_way.to("t2")
    found = on_way.outputs()
    assert {*found[0]} == {"sum", "t2"}
    same(found, [run(proto, batch) for batch in batches])


def test_what_is_kept_stays_until_it_is_released() -> None:
    proto = networks.plain()
    _, on_way, batches = start(proto, keep={"relu2"})
    expected = exposed(proto, batches)
    kept = on_way.to("relu2")[0]["relu2"]
    same(on_way.outputs(), expected)
    assert on_way.to("relu2")[0]["relu2"] is kept
    on_way.release("relu2")
    on_way.outputs()
    assert on_way.to("relu2")[0]["relu2"] is not kept


def test_what_was_made_of_a_forgotten_tensor_is_forgotten_too() -> None:
    """The shortcut's layer changes after the sum behind it was asked for."""
    model, on_way, batches = start(networks.residual())
    on_way.to("b2_bn3")
    weight = model.value("b2_conv3.weight")
    on_way.forget("b2_conv3")
    edit.set_initializer(model, weight, 2 * weight.const_value.numpy())
    same(on_way.to("b2_bn3"), exposed(model.proto(), batches))
    same(on_way.outputs(), [run(model.proto(), batch) for batch in batches])


def test_what_was_forgotten_is_made_anew() -> None:
    model, on_way, _ = start(networks.plain(), keep={"input"})
    before = on_way.to("conv1")[0]["conv1"]
    weight = model.value("conv1.weight")
    edit.set_initializer(model, weight, 2 * weight.const_value.numpy())
    np.testing.assert_array_equal(on_way.to("conv1")[0]["conv1"], before)
    on_way.forget("conv1")
    np.testing.assert_allclose(on_way.to("conv1")[0]["conv1"], 2 * before, atol=CLOSE * np.abs(before).max())


@pytest.mark.parametrize(("network", "seen", "weight"), [("plain", "relu2", "conv2"), ("control", "swish", "conv2")])
def test_a_model_edited_ahead_of_the_walk_is_seen_edited(network: str, seen: str, weight: str) -> None:
    proto = NETWORKS[network]()
    model, on_way, batches = start(proto)
    on_way.to(seen)
    value = model.value(f"{weight}.weight")
    edit.set_initializer(model, value, value.const_value.numpy()[::-1].copy())
    last_relu = next(node for node in reversed(model.graph) if node.op_type == "Relu")
    edit.bypass(model, last_relu, last_relu.inputs[0])
    expected = [run(model.proto(), batch) for batch in batches]
    assert distance(run(proto, batches[0]), expected[0]) > 0.05
    same(on_way.outputs(), expected)


def test_one_of_two_outputs_may_have_been_let_go_of() -> None:
    """The node that makes both runs again for it, and what was kept of it is no entry beside."""
    net = Net("halves", opset=18)
    x = net.node("Split", net.input("x", ["N", 6]), outputs=2, name="halves", num_outputs=2, axis=1)
    y = net.node("Add", "halves_1", net.relu("halves_1"), name="sum")
    net.output(net.node("Concat", x, "halves_1", y, axis=1, name="all"), ["N", 9])
    proto = net.model()
    _, on_way, batches = start(proto, keep={"halves_1", "sum"})
    on_way.outputs()
    (found, *_), (reference, *_) = on_way.replaced("sum", "halves_1").outputs(), exposed(proto, batches)
    parts = [reference[name] for name in ("halves", "halves_1", "halves_1")]
    np.testing.assert_array_equal(found["all"], np.concatenate(parts, axis=1))


def test_nan_on_the_way_is_refused() -> None:
    proto = networks.plain()
    batch = feeds(proto)
    batch["input"][1, 2, 3, 4] = np.nan
    with pytest.raises(BadInput, match="the calibration data drive 'relu2' to NaN or infinity"):
        Walk(from_proto(proto), RUNTIME, [feeds(proto), batch]).to("relu2")


def counts(proto: onnx.ModelProto, stored: int, most: int) -> list[int]:
    """Samples in each batch, which must be the first ones of the data in their order."""
    array = feeds(proto, 1)["input"][:1] * np.arange(1, stored + 1, dtype=np.float32)[:, None, None, None]
    found = samples(from_proto(proto), open_data({"source": lambda: iter([{"input": array}])}), most)
    whole = np.concatenate([batch["input"] for batch in found])
    np.testing.assert_array_equal(whole[:stored], array[: len(whole)])
    np.testing.assert_array_equal(whole[stored:], np.repeat(array[-1:], max(len(whole) - stored, 0), axis=0))
    return [len(batch["input"]) for batch in found]


def test_samples_are_at_most_so_many() -> None:
    assert counts(networks.plain(), 50, 20) == [20]
    assert counts(networks.plain(), 50, 45) == [32, 13]
    assert counts(networks.plain(), 50, 100) == [32, 18]


@pytest.mark.parametrize(("network", "numbers"), [("plain", 2 * 8 * 144), ("residual", 3 * 8 * 144)])
def test_samples_are_so_many_as_the_widest_place_allows(network: str, numbers: int, monkeypatch: Any) -> None:
    """That of `plain` holds two tensors, that of `residual` its shortcut as well."""
    monkeypatch.setattr(walk, "BYTES", 4 * numbers * 13 + 7)
    assert counts(NETWORKS[network](), 50, 45) == [13]
    monkeypatch.setattr(walk, "BYTES", 1)
    assert counts(NETWORKS[network](), 50, 45) == [8]


def test_samples_come_in_the_models_own_batch() -> None:
    net = Net("fixed")
    net.output(net.relu(net.input("input", [4, 3, 6, 6])), [4, 3, 6, 6])
    assert counts(net.model(), 12, 100) == [4, 4, 4]
    assert counts(net.model(), 10, 100) == [4, 4]  # others are enough without the last two
    assert counts(net.model(), 3, 100) == [4]
    assert counts(networks.depthwise(), 5, 3) == [1, 1, 1]
