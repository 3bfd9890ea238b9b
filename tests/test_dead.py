"""Units that do nothing go, and the same comes out: filters of zeros, what nothing reads, and what padding meets."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import pytest

from effc import edit
from effc.capture import from_proto
from effc.channels import channels
from effc.constant_units import constants
from effc.dead import Dead, absorb, remove_dead
from effc.model import Model
from effc.removal import mute_units
from effc.verify import verify
from tests.networks import NETWORKS, Net, distance, feeds, run
from tests.test_channels import gated, heads, padded, shuffled
from tests.test_removal import gathered, resized, sliced, split

EQUAL, HALF = 1e-5, 4e-3  # max|a - b| / max|a|: sums of fewer terms are rounded otherwise, of 16 bits to 4 units
OTHERS = {
    "gated": gated, "heads": heads, "padded": padded, "shuffled": shuffled, "sliced": sliced, "gathered": gathered,
    "split": lambda: split(18), "resized": resized,
}  # fmt: skip


def with_zeros(model: Model, name: str, index: int | Collection[int], axis: int = 0) -> None:
    """Zeros in a weight, in place."""
    value = model.graph.initializers[name]
    array = value.const_value.numpy().copy()
    np.moveaxis(array, axis, 0)[index] = 0
    edit.set_initializer(model, value, array)


def checked(model: Model, proto: onnx.ModelProto) -> tuple[Dead, Model]:
    """What is left without dead units, its outputs compared."""
    smaller = model.clone()
    told = remove_dead(smaller)
    verify(smaller, model)
    inputs = feeds(proto)
    made = run(model.proto(), inputs)
    allowed = HALF if any(y.dtype == np.float16 for y in made.values()) else EQUAL
    assert distance(made, run(smaller.proto(), inputs)) <= allowed
    return told, smaller


def dense(op: str = "Gemm") -> onnx.ModelProto:
    net = Net("dense")
    x = net.relu(net.linear(net.input("x", ["N", 6]), 6, 8, name="a"))
    if op == "Gemm":
        y = net.linear(x, 8, 4, name="b")
    else:
        y = net.node("MatMul", x, net.weight("b.weight", net.random(8, 4)))
        y = net.node("Add", y, net.weight("b.bias", net.random(4))) if op == "MatMul, Add" else y
    net.output(y, ["N", 4])
    return net.model()


def convolutions(pads: int, bias: float, *, norm: bool = False, pool: str = "") -> onnx.ModelProto:
    """Filter 2 of the first makes `bias` everywhere, before a ReLU."""
    net = Net("convolutions")
    weight, shift = net.random(8, 3, 3, 3), net.random(8)
    weight[2], shift[2] = 0, bias
    x = net.node("Conv", net.input("x", ["N", 3, 8, 8]), net.weight("a.weight", weight), net.weight("a.bias", shift))
    x = net.relu(net.norm(x, 8, name="n") if norm else x)
    x = net.node(pool, x, kernel_shape=[2, 2], strides=[2, 2]) if pool else x
    net.head(net.relu(net.conv(x, 8, 6, 3, name="b", pads=[pads] * 4)), 6)
    return net.model()


@pytest.mark.parametrize("op", ["Gemm", "MatMul, Add"])
def test_a_constant_goes_into_the_bias_behind(op):
    """b' = b + W u relu(b_u), to rounding of float32."""
    proto = dense(op)
    model = from_proto(proto)
    with_zeros(model, "a.weight", 3)
    held = {name: model.graph.initializers[name].const_value.numpy() for name in ("a.bias", "b.weight", "b.bias")}
    edit.set_initializer(model, model.graph.initializers["a.bias"], np.abs(held["a.bias"]))
    told, smaller = checked(model, proto)
    assert told == Dead(1, 0)
    column = held["b.weight"][:, 3] if op == "Gemm" else held["b.weight"][3]
    wanted = held["b.bias"] + column * abs(held["a.bias"][3])
    found = smaller.graph.initializers["b.bias"].const_value.numpy()
    np.testing.assert_allclose(found.reshape(-1), wanted.reshape(-1), rtol=1e-5, atol=1e-7)
    assert smaller.graph.initializers["a.weight"].const_value.shape[0] == 7


def test_a_product_without_bias_keeps_what_is_not_zero():
    proto = dense("MatMul")
    for bias, told in ((0.5, Dead(0, 1)), (-0.5, Dead(1, 0))):
        model = from_proto(proto)
        with_zeros(model, "a.weight", 3)
        edit.set_initializer(model, model.graph.initializers["a.bias"], np.full(8, bias, np.float32))
        assert checked(model, proto)[0] == told


@pytest.mark.parametrize("pool", ["", "MaxPool", "AveragePool"])
@pytest.mark.parametrize("norm", [False, True])
def test_padding_decides_where_a_constant_is_one(norm, pool):
    for pads, bias, told in ((0, 50.0, Dead(1, 0)), (1, -50.0, Dead(1, 0)), (1, 50.0, Dead(0, 1))):
        proto = convolutions(pads, bias, norm=norm, pool=pool)
        assert checked(from_proto(proto), proto)[0] == told


def test_a_norm_of_scale_zero_makes_a_constant():
    proto = convolutions(0, 1.0, norm=True)
    model = from_proto(proto)
    with_zeros(model, "n.weight", [4, 5])
    assert checked(model, proto)[0] == Dead(3, 0)


def test_what_nothing_reads_goes_and_then_what_nothing_reads_any_more():
    """Of three layers the last reads one unit of the second, and that one three of the first."""
    net = Net("chain")
    x = net.relu(net.linear(net.input("x", ["N", 6]), 6, 8, name="a"))
    net.output(net.linear(net.relu(net.linear(x, 8, 5, name="b")), 5, 4, name="c"), ["N", 4])
    proto = net.model()
    model = from_proto(proto)
    with_zeros(model, "c.weight", [0, 1, 3, 4], axis=1)
    assert checked(model, proto)[0] == Dead(4, 0)
    with_zeros(model, "b.weight", [0, 2, 4, 5, 7], axis=1)
    assert checked(model, proto)[0] == Dead(9, 0)


def test_one_unit_of_a_layer_stays():
    proto = dense()
    model = from_proto(proto)
    with_zeros(model, "a.weight", list(range(8)))
    told, smaller = checked(model, proto)
    assert told == Dead(7, 0) and smaller.graph.initializers["a.weight"].const_value.shape == (1, 6)


def test_units_that_are_summed_up_are_read():
    """A zero that nothing weighs is no dead unit: the sum over units reads it."""
    net = Net("summed")
    x = net.relu(net.linear(net.input("x", ["N", 6]), 6, 8, name="a"))
    net.output(net.node("ReduceSum", x, net.weight("axes", np.array([1]))), ["N", 1])
    proto = net.model()
    model = from_proto(proto)
    with_zeros(model, "a.weight", 3)
    assert checked(model, proto)[0] == Dead(0, 0)


def test_a_live_network_is_left_alone():
    for make in NETWORKS.values():
        model = from_proto(make())
        revision = model.revision
        assert remove_dead(model) == Dead(0, 0) and model.revision == revision


@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_the_same_comes_out_of_any_network(name):
    """Some units made by zeros, others read by zeros; of those at least the latter go."""
    proto = {**NETWORKS, **OTHERS}[name]()
    for seed in range(3):
        model, rng = from_proto(proto), np.random.default_rng(seed)
        found = channels(model)
        free = [g for g in found.groups if g.pinned is None and len(g.units) > 2]
        unread = {int(rng.choice(g.units)) for g in free if any(p.reads for p in g.places)}
        mute_units(model, unread)
        unmade = np.array([int(rng.choice(g.units)) for g in free])
        for place, held in found.weights.items():
            value = model.graph.initializers[place.weight]
            array = value.const_value.numpy()
            if not place.reads and array.ndim > 1 and np.isin(held, unmade).any():
                with_zeros(model, place.weight, np.flatnonzero(np.isin(held, unmade)), place.axis)
        told, smaller = checked(model, proto)
        assert told.removed >= len(unread) and (not unread or smaller.nbytes() < model.nbytes())


def test_known_constants_are_what_the_runtime_makes():
    """At every position, to 1e-6 of the largest."""
    for name in ("plain", "residual", "depthwise", "branches"):
        proto = NETWORKS[name]()
        model = from_proto(proto)
        for node in model.nodes("Conv"):
            with_zeros(model, node.inputs[1].name, [0, 2])
        known = {tensor: units for tensor, units in constants(model).items() if units}
        assert known
        shown = model.proto()
        there = {o.name for o in shown.graph.output}
        shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in known if n not in there)
        made = run(shown, feeds(proto))
        for tensor, units in known.items():
            map_ = np.broadcast_to(channels(model).tensors[tensor], made[tensor].shape)
            for unit, number in units.items():
                off = np.abs(made[tensor][map_ == unit] - number).max()
                assert off <= 1e-6 * max(np.abs(made[tensor]).max(), 1)


def test_constants_are_absorbed_where_that_is_exact_though_units_are_not_dead():
    """Muted with their constants absorbed, units are missed no more."""
    proto = convolutions(0, 0.5)
    model = from_proto(proto)
    unit = int(
        channels(model).weights[next(p for p in channels(model).weights if p.weight == "a.weight" and not p.reads)][2]
    )
    muted, told = model.clone(), model.clone()
    mute_units(muted, {unit})
    absorb(told, {unit})
    mute_units(told, {unit})
    inputs = feeds(proto)
    assert distance(run(model.proto(), inputs), run(told.proto(), inputs)) <= EQUAL
    assert distance(run(model.proto(), inputs), run(muted.proto(), inputs)) > 1e-3
