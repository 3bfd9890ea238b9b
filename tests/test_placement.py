"""effc.placement: hand-drawn graphs, and where codes should run through each."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import helper, numpy_helper

from effc.capture import from_proto
from effc.placement import clip_bounds, is_absorbed, plan
from effc.target import IntegerKernels, find
from tests.networks import Net

KERNELS = find("onnxruntime-avx2").integer


class Drawn:
    """The placement of a network, by names: of tensors where they carry codes, of nodes where they compute."""

    def __init__(self, net: Net, *weighted: str, kernels: IntegerKernels = KERNELS) -> None:
        proto = net.model()
        proto.opset_import.append(helper.make_opsetid("com.example", 1))
        model = from_proto(proto)
        found = plan(model, [f"node_{name}" for name in weighted], kernels)
        self.coded: dict[str, str] = {v.name or "": s.name or "" for v, s in found.coded.items()}
        self.integer = {n.name.removeprefix("node_") for n in found.integer}
        self.passing = {n.name.removeprefix("node_") for n in found.passing}
        self.settled = {n.name.removeprefix("node_"): v.name for n, v in found.settled.items()}
        self.made = {v.name for v in found.coded if found.made_in_codes(v)}

    @property
    def own(self) -> set[str]:
        """Tensors with a scale of their own."""
        return {v for v, source in self.coded.items() if v == source}


TENSORRT = find("tensorrt").integer


def start(name: str, channels: int = 4, opset: int = 17) -> tuple[Net, str]:
    net = Net(name, opset)
    return net, net.input("x", ["N", channels, 8, 8])


def test_residual_add():
    net, x = start("residual")
    a = net.node("Relu", net.conv(x, 4, 4, 1, name="a"), name="ra")
    b = net.conv(a, 4, 4, 1, name="b")
    y = net.node("Relu", net.node("Add", a, b, name="add"), name="radd")
    net.output(net.conv(y, 4, 4, 1, name="c"))
    found = Drawn(net, "a", "b", "c")
    assert found.own == {"x", "ra", "b", "radd", "c"} == {*found.coded}  # none on a's and add's own outputs
    assert found.integer == {"a", "b", "c", "add"} and not found.passing
    assert found.settled == {"a": "ra", "b": "b", "c": "c", "add": "radd"}
    assert found.made == {"ra", "b", "radd", "c"}


def test_an_add_with_something_in_float_stays_in_float():
    net, x = start("half residual")
    a = net.conv(x, 4, 4, 1, name="a")
    y = net.node("Add", a, net.node("Sigmoid", x, name="gate"), name="add")
    net.output(net.conv(net.node("Add", y, net.weight("c", net.random(4, 1, 1)), name="shift"), 4, 4, 1, name="b"))
    found = Drawn(net, "a", "b", kernels=replace(KERNELS, computing=frozenset({"Add"})))
    assert found.own == {"x", "a", "shift", "b"} and found.integer == {"a", "b"}
    assert "shift" not in found.made  # coded for b's sake only


def test_a_shortcut_of_slices_and_a_pad_runs_on_codes():
    net, x = start("shortcut")
    a = net.node("Relu", net.conv(x, 4, 4, 1, name="a"), name="ra")
    bounds = [net.weight(n, np.array(v)) for n, v in [("s", [0]), ("e", [99]), ("ax", [2]), ("st", [2])]]
    y = net.node("Slice", a, *bounds, name="slice")
    pads = net.weight("pads", np.array([0, 2, 0, 0, 0, 2, 0, 0]))
    y = net.node("Pad", y, pads, net.weight("zero", np.float32(0)), name="pad")
    b = net.conv(a, 4, 8, 1, name="b", strides=[2, 1])
    net.output(net.conv(net.node("Add", b, y, name="add"), 8, 4, 1, name="c"))
    found = Drawn(net, "a", "b", "c")
    assert found.passing == {"slice", "pad"}
    assert (found.coded["slice"], found.coded["pad"]) == ("ra", "ra")
    assert found.own == {"x", "ra", "b", "add", "c"}
    assert {"slice", "pad"} <= found.made and {"add", "slice", "pad"} <= found.integer


@pytest.mark.parametrize(
    ("mode", "value", "passes"),
    [
        ("constant", None, True),
        ("constant", 0.0, True),
        ("constant", 1.0, False),
        ("reflect", None, True),
        ("edge", None, True),
    ],
)
def test_which_pads_run_on_codes(mode, value, passes):
    net, x = start(f"pad {mode} {value}")
    inputs = [net.conv(x, 4, 4, 1, name="a"), net.weight("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))]
    inputs += [] if value is None else [net.weight("value", np.float32(value))]
    net.output(net.conv(net.node("Pad", *inputs, name="pad", mode=mode), 4, 4, 1, name="b"))
    found = Drawn(net, "a", "b")
    assert ("pad" in found.passing) == passes
    assert found.coded["pad"] == ("a" if passes else "pad")


@pytest.mark.parametrize(("mode", "passes"), [("nearest", True), ("linear", False)])
def test_only_a_resize_that_makes_no_new_values_runs_on_codes(mode, passes):
    net, x = start(f"resize {mode}")
    scales = net.weight("scales", np.array([1, 1, 2, 2], np.float32))
    y = net.node("Resize", net.conv(x, 4, 4, 1, name="a"), "", scales, name="resize", mode=mode)
    net.output(net.conv(y, 4, 4, 1, name="b"))
    assert Drawn(net, "a", "b").passing == ({"resize"} if passes else set())


def test_branches_of_a_concat_keep_scales_of_their_own():
    net, x = start("concat")
    parts = [net.conv(x, 4, 4, 1, name=n) for n in "ab"] + [net.node("MaxPool", x, name="pool", kernel_shape=[1, 1])]
    net.output(net.conv(net.node("Concat", *parts, name="cat", axis=1), 12, 4, 1, name="c"))
    found = Drawn(net, "a", "b", "c")
    assert found.own == {"x", "a", "b", "cat", "c"} and found.coded["pool"] == "x"
    assert found.integer == {"a", "b", "c", "cat", "pool"} and found.passing == {"pool"}


def test_a_pool_that_tells_places_stays_in_float():
    net, x = start("indices")
    net.node("MaxPool", net.conv(x, 4, 4, 1, name="a"), name="pool", outputs=2, kernel_shape=[2, 2])
    net.output(net.conv("pool", 4, 4, 1, name="b"))
    net.output("pool_1", dtype=np.int64)
    found = Drawn(net, "a", "b")
    assert not found.passing and found.coded["pool"] == "pool"


@pytest.mark.parametrize("op", ["MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze"])
def test_what_the_caller_reads_is_not_left_in_codes(op):
    net, x = start(f"end {op}")
    y = net.conv(x, 4, 1, 1, name="a")
    extra = {"Reshape": [np.array([0, -1])], "Squeeze": [np.array([1])]}.get(op, [])
    attributes = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
    net.output(net.node(op, y, *(net.weight("k", a) for a in extra), name="end", **attributes))
    found = Drawn(net, "a")
    assert found.coded == {"x": "x", "a": "a"} and found.integer == {"a"}


def low(net: Net, bound: float) -> str:
    return net.weight("low", np.float32(bound))


def high(net: Net, bound: float) -> str:
    return net.weight("high", np.float32(bound))


ACTIVATIONS = {
    "relu": (lambda n, y: n.node("Relu", y, name="act"), True),
    "clip": (lambda n, y: n.node("Clip", y, low(n, 0), high(n, 6), name="act"), True),
    "clip below": (lambda n, y: n.node("Clip", y, low(n, 0), name="act"), True),
    "clip from minus one": (lambda n, y: n.node("Clip", y, low(n, -1), name="act"), False),
    "clip above": (lambda n, y: n.node("Clip", y, "", high(n, 6), name="act"), False),
    "tanh": (lambda n, y: n.node("Tanh", y, name="act"), False),
}


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_activations_that_a_kernel_absorbs(form):
    make, absorbed = ACTIVATIONS[form]
    net, x = start(form)
    net.output(net.conv(make(net, net.conv(x, 4, 4, 1, name="a")), 4, 4, 1, name="b"))
    found = Drawn(net, "a", "b")
    assert found.settled["a"] == ("act" if absorbed else "a")
    assert found.own == ({"x", "act", "b"} if absorbed else {"x", "a", "act", "b"})
    assert ("act" in found.made) == absorbed


def test_an_activation_is_not_absorbed_where_others_read_what_it_reads():
    net, x = start("several")
    a = net.conv(x, 4, 4, 1, name="a")
    relu = net.node("Relu", a, name="relu")
    net.output(net.conv(net.node("Add", a, relu, name="add"), 4, 4, 1, name="b"))
    found = Drawn(net, "a", "b")
    assert found.settled["a"] == "a" and "relu" not in found.coded and "add" not in found.integer


def test_an_activation_is_not_absorbed_where_the_caller_reads_what_it_reads():
    net, x = start("caller")
    net.output(net.conv(x, 4, 4, 1, name="a"))
    net.output(net.conv(net.node("Relu", "a", name="relu"), 4, 4, 1, name="b"))
    found = Drawn(net, "a", "b")
    assert found.settled["a"] == "a" and found.own == {"x", "a", "relu", "b"}


def test_an_activation_inside_a_branch_is_not_absorbed():
    net, x = start("branch")
    a = net.conv(x, 4, 4, 1, name="a")
    decision = net.input("decision", [], np.bool_)
    zero = numpy_helper.from_array(np.zeros((1, 4, 8, 8), np.float32))
    branches = {
        key: helper.make_graph([node], key, [], [helper.make_tensor_value_info(key, 1, None)])
        for key, node in {
            "then_branch": helper.make_node("Relu", [a], ["then_branch"], name="inner"),
            "else_branch": helper.make_node("Constant", [], ["else_branch"], name="none", value=zero),
        }.items()
    }
    net.output(net.node("If", decision, name="choice", **branches))
    assert Drawn(net, "a").settled == {"a": "a"}


def test_bounds_of_clips():
    net, x = start("bounds", opset=9)
    net.output(net.node("Clip", x, name="both", min=0.0, max=6.0), ["N", 4, 8, 8])
    net.output(net.node("Clip", x, name="none"), ["N", 4, 8, 8])
    model = from_proto(net.model())
    assert [clip_bounds(n) for n in model.graph] == [(0.0, 6.0), (None, None)]
    assert [is_absorbed(n) for n in model.graph] == [True, False]
    net, x = start("computed bounds")
    net.output(net.node("Clip", x, net.input("low", []), net.weight("high", np.float32(1)), name="clip"))
    model = from_proto(net.model())
    assert clip_bounds(model.graph[0]) == (None, 1.0) and not is_absorbed(model.graph[0])


def test_a_dense_layer_at_the_end_hands_out_floats():
    net, x = start("classifier")
    pooled = net.node("GlobalAveragePool", net.conv(x, 4, 4, 1, name="a"), name="pool")
    net.output(net.linear(net.node("Flatten", pooled, name="flat"), 4, 5, name="fc"))
    found = Drawn(net, "a", "fc")
    assert found.coded == {"x": "x", "a": "a", "pool": "pool", "flat": "pool"}
    assert found.settled["fc"] == "fc" and "fc" in found.integer


def test_dense_layers_hand_codes_to_each_other_through_activations_and_floats_to_others():
    net = Net("dense")
    x = net.node("Relu", net.linear(net.input("x", ["N", 8]), 8, 8, name="a"), name="ra")
    x = net.node("Softmax", net.linear(x, 8, 8, name="b"), name="soft")
    net.output(net.linear(x, 8, 5, name="c"))
    found = Drawn(net, "a", "b", "c")
    assert found.own == {"x", "ra", "soft"} == {*found.coded}
    assert found.made == {"ra"}  # what b makes stays float, and codes of soft are for c alone


def test_a_convolution_that_the_caller_reads_is_coded():
    net, x = start("conv at the end")
    net.output(net.node("Relu", net.conv(x, 4, 4, 1, name="a"), name="relu"))
    assert Drawn(net, "a").own == {"x", "relu"}
    free = replace(KERNELS, output_pairs=False)
    assert Drawn(net, "a", kernels=free).own == {"x"}


@pytest.mark.parametrize(
    ("opset", "axes", "keepdims", "mean"),
    [
        (17, [2, 3], 1, True), (17, [-1, -2], 0, True), (18, [2, 3], 1, True), (18, [3, 2], 0, True),
        (17, [1, 2], 1, False), (17, [3], 1, False), (18, None, 1, False),
    ],
)  # fmt: skip
def test_a_mean_over_all_positions_is_computed_on_codes(opset, axes, keepdims, mean):
    net, x = start("mean", opset=opset)
    a = net.conv(x, 4, 4, 1, name="a")
    if opset < 18:
        y = net.node("ReduceMean", a, name="mean", axes=axes, keepdims=keepdims)
    else:
        y = net.node("ReduceMean", a, *([] if axes is None else [net.weight("axes", np.array(axes))]), name="mean")
        net.nodes[-1].attribute.append(helper.make_attribute("keepdims", keepdims))
    net.output(net.node("Exp", y))
    assert ("mean" in Drawn(net, "a").integer) == mean


def test_a_mean_that_drops_its_axes_and_one_that_the_caller_reads():
    net, x = start("flat mean")
    y = net.node("ReduceMean", net.conv(x, 4, 4, 1, name="a"), name="mean", axes=[2, 3], keepdims=0)
    net.output(net.linear(y, 4, 5, name="fc"))
    found = Drawn(net, "a", "fc")
    assert found.own == {"x", "a", "mean"} and found.integer == {"a", "fc", "mean"}
    net.output(y)
    found = Drawn(net, "a", "fc")
    assert found.own == {"x", "a", "mean"} and found.integer == {"a", "fc"} and "mean" not in found.made


def test_a_layer_in_float_between_two_in_integers():
    net, x = start("between")
    a = net.conv(x, 4, 4, 1, name="a")
    b = net.node("Relu", net.conv(a, 4, 4, 3, name="b", group=4), name="rb")
    net.output(net.conv(b, 4, 4, 1, name="c"))
    found = Drawn(net, "a", "c")
    assert found.own == {"x", "a", "rb", "c"} and found.integer == {"a", "c"}
    assert found.made == {"a", "c"}  # so that b reads decoded codes, and rb stays what it was for its other readers


def test_what_a_foreign_operator_makes_is_coded_for_its_reader():
    net, x = start("foreign")
    net.conv(x, 4, 4, 1, name="a")
    net.nodes.append(helper.make_node("Add", ["a", "a"], ["f"], name="node_f", domain="com.example"))
    net.output(net.conv("f", 4, 4, 1, name="b"), ["N", 4, 8, 8])
    found = Drawn(net, "a", "b")
    assert found.own == {"x", "a", "f", "b"} and found.integer == {"a", "b"}


def test_nothing_is_placed_for_nothing():
    net, x = start("nothing")
    net.output(net.conv(x, 4, 4, 1, name="a"))
    found = Drawn(net)
    assert not found.coded and not found.integer


class TestForReadersAlone:
    """TensorRT's placement: a tensor is coded for layers, for shortcuts, and where a pool lies between."""

    def test_residual_adds(self):
        net, x = start("residual, shortcut coded")
        a = net.node("Relu", net.conv(x, 4, 4, 1, name="a"), name="ra")
        b = net.conv(a, 4, 4, 1, name="b")
        y = net.node("Relu", net.node("Add", a, b, name="add"), name="radd")
        net.output(net.conv(y, 4, 4, 1, name="c"))
        found = Drawn(net, "a", "b", "c", kernels=TENSORRT)
        assert found.own == {"x", "ra", "radd"} == {*found.coded}  # no output of its own, and not between b and add
        assert found.integer == {"a", "b", "c", "add"} and not found.passing and not found.made

    def test_of_two_convolutions_the_shorter_way_is_the_shortcut(self):
        for swapped in (False, True):
            net, x = start(f"projection {swapped}")
            b = net.conv(net.conv(x, 4, 4, 1, name="a"), 4, 4, 1, name="b")
            p = net.conv(x, 4, 4, 1, name="p")
            net.output(net.node("Add", *((p, b) if swapped else (b, p)), name="add"))
            assert Drawn(net, "a", "b", "p", kernels=TENSORRT).own == {"x", "a", "p"}

    @pytest.mark.parametrize("weighted", [("b",), ()])
    def test_a_convolution_in_float_takes_no_shortcut_in(self, weighted):
        net, x = start(f"float {weighted}")
        y = net.conv(x, 4, 4, 1, name="a")
        y = net.node("Add", y, net.node("Sigmoid", x, name="gate"), name="add")
        net.output(net.conv(y, 4, 4, 1, name="b"))
        assert Drawn(net, *weighted, kernels=TENSORRT).own == ({"add"} if weighted else set())

    def test_an_add_of_a_constant_or_of_what_others_read_has_no_shortcut(self):
        net, x = start("no shortcuts")
        a = net.conv(x, 4, 4, 1, name="a")
        shifted = net.node("Add", a, net.weight("c", net.random(4, 1, 1)), name="shift")
        b = net.conv(shifted, 4, 4, 1, name="b")
        net.output(net.node("Mul", net.node("Add", b, x, name="add"), b, name="both"))
        assert Drawn(net, "a", "b", kernels=TENSORRT).own == {"x", "shift"}

    def test_a_pool_between_coded_tensors(self):
        net, x = start("pools")
        for name, behind in (("in", True), ("out", False)):
            pool = net.node("AveragePool", x, name=name, kernel_shape=[2, 2])
            net.output(net.conv(pool, 4, 4, 1, name="b") if behind else pool)
        net.output(net.conv(net.node("MaxPool", x, name="max", kernel_shape=[2, 2]), 4, 4, 1, name="c"))
        net.output(net.conv(x, 4, 4, 1, name="a"))
        found = Drawn(net, "a", "b", "c", kernels=TENSORRT)
        assert found.own == {"x", "in", "max"} == {*found.coded}  # what moves values is moved over by the builder
        assert found.integer == {"a", "b", "c", "in"}
