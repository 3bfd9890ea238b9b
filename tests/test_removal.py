"""Removed units against units that nothing reads: the same outputs, from smaller weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from effc import edit
from effc.capture import from_proto
from effc.channels import channels
from effc.errors import PassFailed
from effc.model import Model
from effc.removal import mute_units, remove_units
from effc.verify import verify
from tests.networks import NETWORKS, Net, distance, feeds, run
from tests.test_channels import gated, heads, padded, shuffled

EQUAL = 1e-5  # max|a - b| / max|a|: sums of fewer terms are rounded otherwise


def unread(model: Model, units: set[int]) -> Model:
    """The model with zeros wherever weights read these units."""
    clone = model.clone()
    mute_units(clone, units)
    for place, held in channels(model).weights.items():
        array = np.moveaxis(clone.graph.initializers[place.weight].const_value.numpy(), place.axis, 0)
        assert not place.reads or not array[np.isin(held, list(units))].any()
    return clone


def some_units(model: Model, seed: int) -> set[int]:
    """Up to half of each group that can go."""
    rng, gone = np.random.default_rng(seed), set()
    for group in channels(model).groups:
        if group.pinned is None and len(group.units) > 1:
            gone |= set(rng.choice(group.units, rng.integers(1, len(group.units) // 2 + 1), replace=False).tolist())
    return gone


def removed(model: Model, units: set[int]) -> Model:
    clone = model.clone()
    remove_units(clone, units)
    edit.remove_unused(clone)
    verify(clone, model)
    return clone


def sliced(steps: int = 2) -> onnx.ModelProto:
    """Every second channel but the first, then a part of them."""
    net = Net("sliced")
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12, 3, name="a"))
    bounds = (("s", [2]), ("e", [12]), ("at", [-3]), ("by", [steps]))
    y = net.node("Slice", x, *(net.weight(n, np.array(v)) for n, v in bounds))
    net.head(net.conv(y, 10 // steps, 6, 1, name="b"), 6)
    return net.model()


def gathered() -> onnx.ModelProto:
    """Channels in another order, one of them twice."""
    net = Net("gathered")
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 3, name="a"))
    y = net.node("Gather", x, net.weight("order", np.array([5, 1, 7, 7, 0, 2])), axis=1)
    net.head(net.conv(y, 6, 6, 1, name="b"), 6)
    return net.model()


def split(opset: int) -> onnx.ModelProto:
    net = Net("split", opset=opset)
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 9, 3, name="a"))
    if opset < 13:
        a, b = net.node("Split", x, outputs=2, name="s", axis=1, split=[4, 5]), "s_1"
    elif opset < 18:
        a, b = net.node("Split", x, net.weight("parts", np.array([4, 5])), outputs=2, name="s", axis=1), "s_1"
    else:
        a, b = net.node("Split", x, outputs=2, name="s", axis=1, num_outputs=2), "s_1"
    first = 4 if opset < 18 else 5
    y = net.node("Concat", net.conv(a, first, 3, 1, name="b"), net.conv(b, 9 - first, 3, 1, name="c"), axis=1)
    y = net.relu(y)
    net.output(net.linear(net.node("Flatten", net.node("GlobalAveragePool", y)), 6, 5, name="fc"), ["N", 5])
    return net.model()


def resized() -> onnx.ModelProto:
    """Sizes of all axes stated, and what is expanded to them."""
    net = Net("resized")
    x = net.conv(net.input("x", [2, 3, 6, 6]), 3, 8, 3, name="a", pads=[1] * 4)
    up = net.node("Resize", x, "", "", net.weight("sizes", np.array([2, 8, 12, 12])), mode="nearest")
    gate = net.node("Expand", net.node("GlobalAveragePool", x), net.weight("to", np.array([2, 8, 12, 12])))
    net.head(net.node("Mul", up, gate), 8, batch=2)
    return net.model()


def twice_read() -> onnx.ModelProto:
    """Vectors that several layers read, as exporters write equal ones once: biases, and a norm's scale and variance."""
    net = Net("twice_read")
    bias, ones = net.weight("bias", net.random(8)), net.weight("ones", np.full(8, 1.5, np.float32))
    x = net.node("Conv", net.input("x", ["N", 3, 8, 8]), net.weight("a", net.random(8, 3, 3, 3)), bias)
    x = net.relu(net.node("BatchNormalization", x, ones, bias, bias, ones, name="bn"))
    x = net.relu(net.node("Conv", x, net.weight("b", net.random(8, 8, 3, 3, scale=0.2)), bias))
    y = net.node("Conv", x, net.weight("c", net.random(8, 8, 1, 1, scale=0.3)))
    y = net.node("Transpose", net.node("Transpose", y, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
    net.head(net.relu(net.node("BatchNormalization", y, ones, bias, bias, ones, name="last")), 8)
    return net.model()


OTHERS = {
    "gated": gated, "heads": heads, "padded": padded, "shuffled": shuffled, "sliced": sliced, "gathered": gathered,
    "split by attribute": lambda: split(11), "split by input": lambda: split(17), "split by count": lambda: split(18),
    "resized": resized, "twice read": twice_read, "sliced at once": lambda: sliced(1),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_what_is_left_computes_the_same_as_with_units_that_nothing_reads(name):
    proto = {**NETWORKS, **OTHERS}[name]()
    model = from_proto(proto)
    for seed in range(3):
        gone = some_units(model, seed)
        smaller = removed(model, gone)
        inputs = feeds(proto)
        assert distance(run(unread(model, gone).proto(), inputs), run(smaller.proto(), inputs)) <= EQUAL
        assert not gone or smaller.nbytes() < model.nbytes()


def test_a_vector_ties_none_of_its_readers_to_each_other():
    """Each keeps what it needs of it, in a copy where it needs another part than the others; none is left unread."""
    model = from_proto(twice_read())
    found = channels(model)
    assert len([group for group in found.groups if group.pinned is None and len(group.units) == 8]) == 3
    first = next(group for group in found.groups if any(place.weight == "a" for place in group.places))
    smaller = removed(model, set(first.units[:3]))
    shapes = {node.name: [tuple(v.shape) for v in node.inputs[1:]] for node in smaller.graph if len(node.inputs) > 1}
    assert shapes["node_bn"] == [(5,)] * 4 and shapes["node_last"] == [(8,)] * 4
    read = {value.name for node in smaller.graph for value in node.inputs}
    assert set(smaller.graph.initializers) <= read


def test_a_depthwise_convolution_has_fewer_groups():
    model = from_proto(NETWORKS["depthwise"]())
    node = next(n for n in model.nodes("Conv") if n.attributes.get_int("group", 1) > 1)
    before = node.attributes.get_int("group", 1)
    units = channels(model).tensors[node.inputs[0].name].reshape(-1)
    smaller = removed(model, {int(units[0]), int(units[1])})
    assert smaller.node(node.name).attributes.get_int("group", 1) == before - 2
    assert smaller.node(node.name).inputs[1].shape[0] == before - 2


def test_runs_of_channels_stay_slices_and_others_become_choices():
    model = from_proto(sliced())
    units = channels(model).tensors["relu1"].reshape(-1).tolist()
    assert not list(removed(model, {units[1]}).nodes("Gather"))  # 2, 4, 6 ... are then 1, 3, 5 ...
    assert list(removed(model, {units[1], units[5]}).nodes("Gather"))  # 1, 3, 4, 6, 8


def test_pinned_units_are_refused_and_nothing_changes():
    model = from_proto(NETWORKS["plain"]())
    unit, why = next(iter(channels(model).pinned.items()))
    revision = model.revision
    with pytest.raises(PassFailed, match=f"unit {unit} cannot be removed: "):
        remove_units(model, {unit})
    assert why and model.revision == revision


def test_the_last_unit_is_refused():
    model = from_proto(NETWORKS["plain"]())
    group = next(g for g in channels(model).groups if g.pinned is None)
    with pytest.raises(PassFailed, match="no unit along an axis of"):
        remove_units(model, set(group.units))
