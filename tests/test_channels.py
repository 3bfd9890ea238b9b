"""effc.channels: what a group says can be removed can be, and nothing else depends on it; which groups there are."""

from __future__ import annotations

import io

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from effc.capture import from_proto
from effc.channels import FIXED, Channels, Group, Place, channels
from effc.channels_report import channels_table
from effc.cli import main
from tests.networks import NETWORKS, Net, distance, feeds, run

CLOSE = 1e-5  # relative to the largest output, float32
FOLLOWED = ["plain", "residual", "depthwise", "branches", "mlp", "transposed", "sound", "two_outputs", "shuffled",
            "heads", "gated", "padded", "parts", "words"]  # fmt: skip


def shuffled(groups: int = 3) -> onnx.ModelProto:
    """1 x 1 convolutions, grouped or not, with a channel shuffle in between."""
    net = Net("shuffled")
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12, 3, name="a", pads=[1] * 4))
    x = net.conv(x, 12, 12, 1, name="b", group=groups)
    x = net.node("Reshape", x, net.weight("apart", np.array([0, 3, 4, 6, 6])))
    x = net.node("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = net.node("Reshape", x, net.weight("again", np.array([0, 12, 6, 6])))
    net.head(net.conv(x, 12, 12, 1, name="c", group=groups), 12)
    return net.model()


def heads() -> onnx.ModelProto:
    """Attention of three heads with a mask, and a feed-forward part."""
    net = Net("heads")
    x = net.input("x", ["N", 5, 12])
    parts = []
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = net.node("MatMul", x, net.weight(f"{name}.weight", net.random(12, 24, scale=0.3)))
        y = net.node("Add", y, net.weight(f"{name}.bias", net.random(24)))
        y = net.node("Reshape", y, net.weight(f"{name}.apart", np.array([0, 5, 3, 8])))
        parts.append(net.node("Transpose", y, perm=order))
    scores = net.node("Div", net.node("MatMul", parts[0], parts[1]), net.weight("scale", np.float32(2.8)))
    scores = net.node("Add", scores, net.weight("mask", np.triu(np.full((1, 1, 5, 5), -9, np.float32), 1)))
    mixed = net.node("MatMul", net.node("Softmax", scores, axis=-1), parts[2])
    mixed = net.node("Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = net.node("Reshape", mixed, net.weight("together", np.array([0, 5, 24])))
    y = net.node("Add", x, net.node("MatMul", mixed, net.weight("out.weight", net.random(24, 12, scale=0.2))))
    up = net.node("Gelu", net.node("MatMul", y, net.weight("up.weight", net.random(12, 20, scale=0.3))))
    net.output(net.node("MatMul", up, net.weight("down.weight", net.random(20, 12, scale=0.2))), ["N", 5, 12])
    net.opset = 20
    return net.model()


def gated() -> onnx.ModelProto:
    """Squeeze and excitation."""
    net = Net("gated")
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 3, name="a"))
    gate = net.conv(net.node("GlobalAveragePool", x), 8, 4, 1, name="down", bias=True)
    gate = net.node("Sigmoid", net.conv(net.relu(gate), 4, 8, 1, name="up", bias=True))
    net.head(net.node("Mul", x, gate), 8)
    return net.model()


def padded() -> onnx.ModelProto:
    """A shortcut that pads channels with zeros, two before and three behind."""
    net = Net("padded")
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 5, 3, name="a", pads=[1] * 4))
    wide = net.conv(x, 5, 10, 3, name="b", pads=[1] * 4)
    short = net.node("Pad", x, net.weight("pads", np.array([0, 2, 0, 0, 0, 3, 0, 0])))
    net.head(net.relu(net.node("Add", wide, short)), 10)
    return net.model()


def parts() -> onnx.ModelProto:
    """A split into a gate and what it gates, slices, a gather, and a flatten of channels and positions."""
    net = Net("parts")
    x = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 12, 3, name="a", pads=[1] * 4)
    net.nodes.append(
        onnx.helper.make_node("Split", [x, net.weight("sizes", np.array([6, 6]))], ["l", "r"], "s", axis=1)
    )
    y = net.node("Mul", "l", net.node("Sigmoid", "r"))
    low = net.node("Slice", y, *(net.weight(n, np.array([v])) for n, v in (("from", 0), ("to", 2), ("at", 1))))
    high = net.node("Gather", y, net.weight("chosen", np.array([5, 3])), axis=1)
    flat = net.node("Flatten", net.node("Concat", low, high, axis=1))
    net.output(net.linear(flat, 4 * 16, 5, name="fc"), ["N", 5])
    return net.model()


def words() -> onnx.ModelProto:
    """An embedding behind a norm over its numbers, and a sum over them."""
    net = Net("words")
    ids = net.input("ids", ["N", 7], np.int64)
    x = net.node("Gather", net.weight("table", net.random(11, 10)), ids)
    x = net.node("MatMul", x, net.weight("first", net.random(10, 6)))
    x = net.node("MatMul", net.relu(x), net.weight("second", net.random(6, 8)))
    x = net.node("LayerNormalization", x, net.weight("gain", net.random(8)), axis=-1)
    net.output(net.node("MatMul", x, net.weight("third", net.random(8, 4))), ["N", 7, 4])
    return net.model()


MADE = {**NETWORKS, **{f.__name__: f for f in (shuffled, heads, gated, padded, parts, words)}}


def traced(name: str) -> tuple[onnx.ModelProto, Channels]:
    proto = MADE[name]()
    return proto, channels(from_proto(proto))


def changed(proto: onnx.ModelProto, found: Channels, group: Group, unit: int, reads: bool, values) -> onnx.ModelProto:
    """Other numbers at the places that read a unit, or at those that make it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for place in group.places:
        if place.reads is reads:
            (tensor,) = [t for t in copy.graph.initializer if t.name == place.weight]
            array = np.moveaxis(numpy_helper.to_array(tensor).copy(), place.axis, 0)
            rows = found.weights[place] == unit
            array[rows] = values(array[rows])
            tensor.CopyFrom(numpy_helper.from_array(np.moveaxis(array, 0, place.axis).copy(), place.weight))
    return copy


@pytest.mark.parametrize("name", FOLLOWED)
def test_nothing_else_depends_on_a_unit(name):
    """With all that reads a unit at zero, what makes it may be anything."""
    proto, found = traced(name)
    rng, given = np.random.default_rng(0), feeds(proto, 2)
    free = [group for group in found.groups if group.pinned is None]
    for group in free:
        for unit in {group.units[0], group.units[-1]}:
            deaf = changed(proto, found, group, unit, True, np.zeros_like)
            other = changed(deaf, found, group, unit, False, lambda a: rng.normal(size=a.shape).astype(a.dtype) ** 2)
            expected = run(deaf, given)
            assert distance(expected, run(other, given)) <= CLOSE, (group, unit)
            assert any(not place.reads for place in group.places)


def removable(found: Channels) -> int:
    return sum(len(group.units) for group in found.groups if group.pinned is None)


def test_heads_stay_whole_and_go_together():
    _, found = traced("heads")
    (attention,) = [g for g in found.groups if any(p.weight == "q.weight" for p in g.places) and g.pinned is None]
    assert len(attention.units) == 3
    makers = {place.weight for place in attention.places if not place.reads}
    assert makers == {f"{n}.{kind}" for n in "qkv" for kind in ("weight", "bias")}
    assert [p for p in attention.places if p.reads] == [Place("out.weight", 0, True)]
    for place in attention.places:
        np.testing.assert_array_equal(found.weights[place], np.repeat(attention.units, 8))
    (inner,) = [g for g in found.groups if any(p.weight == "up.weight" for p in g.places) and g.pinned is None]
    assert len(inner.units) == 20


@pytest.mark.parametrize("groups", [1, 3])
def test_a_shuffle_keeps_as_many_channels_in_each_group(groups):
    """Where the convolutions around it have no groups, it does so itself."""
    found = channels(from_proto(shuffled(groups)))
    units = {p.weight: u.reshape(3, 4) for p, u in found.weights.items() if p.weight == "b.weight" and not p.reads}
    rows = units["b.weight"]
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))
    assert all(group.pinned is None for group in found.groups if any(p.weight == "b.weight" for p in group.places))


def test_channels_of_zeros_that_a_shortcut_adds():
    """Those of the wide layer at their place go alone; the others go with what the shortcut brings."""
    _, found = traced("padded")
    wide = found.weights[Place("b.weight", 0, False)]
    narrow = found.weights[Place("a.weight", 0, False)]
    np.testing.assert_array_equal(wide[2:7], narrow)
    assert not np.isin(wide[[0, 1, 7, 8, 9]], narrow).any() and removable(found) == 10


def test_what_is_cut_out_and_put_together():
    _, found = traced("parts")
    units = found.weights[Place("a.weight", 0, False)]
    np.testing.assert_array_equal(units[:6], units[6:])  # each goes with its gate
    read = found.weights[Place("fc.weight", 1, True)]
    np.testing.assert_array_equal(read, np.repeat(units[[0, 1, 5, 3]], 16))


def test_a_norm_over_channels_keeps_them_and_says_so():
    _, found = traced("words")
    pinned = {group.pinned for group in found.groups if any(p.weight == "second" and not p.reads for p in group.places)}
    assert pinned == {"LayerNormalization 'node_" + next(iter(pinned)).split("node_")[1].split("'")[0]
                      + "' depends on how many there are"}  # fmt: skip
    (table,) = [g for g in found.groups if any(p.weight == "table" for p in g.places)]
    assert len(table.units) == 10 and table.pinned is None


def made_by(found: Channels, weight: str) -> set[str | None]:
    """Why the units that a weight makes cannot be removed."""
    return {group.pinned for group in found.groups if any(p.weight == weight and not p.reads for p in group.places)}


def test_a_pool_over_channels_pins_them():
    """Channels moved to where a pool looks for positions."""
    net = Net("pooled")
    x = net.node("MatMul", net.input("x", ["N", 2, 5, 6]), net.weight("w", net.random(6, 8)))
    y = net.node("AveragePool", x, kernel_shape=[1, 2], strides=[1, 2], name="pool")
    net.output(net.node("MatMul", y, net.weight("v", net.random(4, 3))), ["N", 2, 5, 3])
    assert made_by(channels(from_proto(net.model())), "w") == {"AveragePool 'node_pool' is not understood"}


def test_a_sum_over_no_axes_passes_units_on():
    net = Net("nothing")
    x = net.node("MatMul", net.input("x", ["N", 6]), net.weight("w", net.random(6, 8)))
    y = net.node("ReduceSum", x, net.weight("none", np.zeros(0, np.int64)), noop_with_empty_axes=1)
    net.output(net.node("MatMul", y, net.weight("v", net.random(8, 3))), ["N", 3])
    found = channels(from_proto(net.model()))
    made, read = found.weights[Place("w", 1, False)], found.weights[Place("v", 0, True)]
    np.testing.assert_array_equal(made, read)
    assert made_by(found, "w") == {None}


def test_weights_that_are_computed_are_pinned_with_what_helps():
    net = Net("computed")
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 3, name="a"))
    scale = net.node("Unsqueeze", net.weight("s", net.random(8)), net.weight("at", np.array([1, 2])))
    net.head(net.node("Mul", x, scale), 8)
    (reason,) = made_by(channels(from_proto(net.model())), "a.weight")
    assert reason.endswith("is computed from weights; simplify makes it one")


def test_a_weight_that_something_else_reads_is_needed_whole():
    """Two layers with one weight, the second by another name, as older exporters write equal layers."""
    net = Net("alias")
    x = net.input("x", ["N", 4])
    y = net.node(
        "MatMul", net.relu(net.node("MatMul", x, net.weight("w", net.random(4, 6)))), net.weight("v", net.random(6, 3))
    )
    net.output(net.node("Concat", y, net.node("MatMul", x, net.node("Identity", "w", name="alias")), axis=1), ["N", 9])
    assert made_by(channels(from_proto(net.model())), "w") == {
        "'w' is also read by Identity 'node_alias', which needs it whole"
    }


def test_what_is_added_to_a_layer_by_another_is_no_weight():
    """A Gemm whose third operand is an activation: its units go with those that the Gemm makes."""
    net = Net("gemm")
    x = net.input("x", ["N", 6])
    other = net.node("MatMul", x, net.weight("u", net.random(6, 8)))
    y = net.node("Gemm", x, net.weight("w", net.random(6, 8)), other)
    net.output(net.node("MatMul", net.relu(y), net.weight("v", net.random(8, 3))), ["N", 3])
    found = channels(from_proto(net.model()))
    (group,) = [g for g in found.groups if g.pinned is None and len(g.units) == 8]
    assert {place.weight for place in group.places} == {"u", "w", "v"}


def test_a_shuffle_beside_what_is_fixed_ends_and_pins():
    net = Net("beside")
    x = net.input("x", ["N", 6, 4, 4])
    y = net.node("Concat", net.conv(x, 6, 3, 1, name="a"), net.node("Slice", x, *(
        net.weight(n, np.array([v])) for n, v in (("b", 0), ("e", 3), ("at", 1)))), axis=1)  # fmt: skip
    y = net.node("Reshape", y, net.weight("apart", np.array([0, 2, 3, 4, 4])))
    y = net.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    net.head(net.node("Reshape", y, net.weight("again", np.array([0, 6, 4, 4]))), 6)
    assert None not in made_by(channels(from_proto(net.model())), "a.weight")


def test_channels_laid_out_as_boxes_stay_whole():
    """A detector's head: [N, 6, H, W] read as [N, 3 H W, 2], behind other units, so that numbers of units differ."""
    net = Net("boxes")
    x = net.relu(net.conv(net.input("x", ["N", 3, 4, 4]), 3, 8, 1, name="a"))
    y = net.node("Transpose", net.conv(x, 8, 6, 1, name="b"), perm=[0, 2, 3, 1])
    y = net.node("Reshape", y, net.weight("apart", np.array([0, 48, 2])))
    net.output(net.node("ReduceMean", y, axes=[1], keepdims=0), ["N", 2])
    found = channels(from_proto(net.model()))
    assert made_by(found, "a.weight") == {None}
    at = found.weights[Place("b.weight", 0, False)]
    np.testing.assert_array_equal(at, at[[0, 1]].tolist() * 3)


def test_tensors_of_unknown_rank_pin_what_meets_them():
    net = Net("unknown")
    x = net.conv(net.input("x", ["N", 3, 4, 4]), 3, 8, 1, name="a")
    shape = net.input("shape", ["R"], np.int64)
    y = net.node("Transpose", net.node("Reshape", x, shape), perm=[0, 2, 1])
    net.output(net.node("ReduceSum", y, keepdims=0), [])
    assert None not in made_by(channels(from_proto(net.model())), "a.weight")


def test_sequences_may_be_of_any_length():
    """The heads of attention are found as where the length is stated."""
    proto = heads()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[1].dim_param = "L"
    for tensor in proto.graph.initializer:
        if tensor.name.endswith((".apart", "together")):
            sizes = [0 if size == 5 else size for size in numpy_helper.to_array(tensor)]
            tensor.CopyFrom(numpy_helper.from_array(np.array(sizes), tensor.name))
        if tensor.name == "mask":
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((1, 1, 1, 1), np.float32), "mask"))
    assert removable(channels(from_proto(proto))) == 3 + 20


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_is_followed_to_its_end(name):
    _, found = traced(name)
    assert found.groups and all(group.units and group.places for group in found.groups)


def test_outputs_and_what_is_not_understood_are_pinned_with_the_reason():
    _, found = traced("control")
    reasons = {group.pinned for group in found.groups}
    assert any(reason and "is not understood" in reason for reason in reasons)
    _, found = traced("plain")
    assert any(group.pinned and "is an output of the model" in group.pinned for group in found.groups)


def test_the_graph_joins_places_that_share_units():
    _, found = traced("plain")
    for first, second, edge in found.graph.edges(data=True):
        start, end = (first, second) if edge["first"] == first else (second, first)
        for a, b in edge["pairs"]:
            assert found.weights[start][a] == found.weights[end][b] != FIXED
    assert set(found.graph.nodes) == set(found.weights)


def test_the_table_lists_what_can_be_removed_first_and_why_not():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(channels_table(from_proto(heads())))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[1] == "20 up.weight[1] down.weight[0]"
    assert lines[2] == "3 q.weight[1], q.bias[0], k.weight[1], 3 more out.weight[0]"
    assert lines[3].startswith("12 out.weight[1]") and lines[3].endswith("combines it with what cannot be removed")
    assert "23 of 47 channels can be removed, each with all that depends on it, in 4 groups" in lines[-1]
    console.print(channels_table(from_proto(heads()), top=1))
    assert "3 more groups (--top 0 shows all)" in console.export_text()


def test_the_command(tmp_path, monkeypatch, capsys):
    onnx.save(padded(), tmp_path / "m.onnx")
    monkeypatch.setattr("sys.argv", ["effc", "inspect", str(tmp_path / "m.onnx"), "--channels"])
    main()
    assert "10 of 15 channels can be removed" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["effc", "inspect", str(tmp_path / "m.onnx"), "--channels", "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "--channels takes one model and prints a table" in capsys.readouterr().err
