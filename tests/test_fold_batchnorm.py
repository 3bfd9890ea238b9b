"""effc.passes.fold_batchnorm: against the formula of batch norm itself, form by form."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from effc import edit
from effc.capture import from_proto
from effc.contract import Proposal, Skipped
from effc.errors import PassFailed
from effc.model import Model
from effc.passes.fold_batchnorm import FoldBatchNorm
from tests import networks
from tests.networks import NETWORKS, Net, distance, feeds, run

STEP = FoldBatchNorm()
HALF = 4e-3  # of the largest output: four rounding steps of float16


def fold(model: Model) -> tuple[list[Proposal], dict[str, str]]:
    found = list(STEP.propose(model, None))
    chosen = [f for f in found if isinstance(f, Proposal)]
    STEP.rewrite(model, chosen, None)
    onnx.checker.check_model(model.proto(), full_check=True)
    return chosen, {f.site: f.reason for f in found if isinstance(f, Skipped)}


def norms(model: Model) -> int:
    return sum(1 for _ in model.nodes("BatchNormalization"))


@pytest.mark.parametrize(
    ("name", "sites", "left"),
    [
        ("plain", 2, 0), ("residual", 6, 0), ("depthwise", 4, 0), ("branches", 3, 1), ("mlp", 4, 0), ("old", 1, 0),
        ("transformer", 0, 0), ("control", 2, 0), ("transposed", 3, 0), ("sound", 2, 0), ("half", 2, 0),
        ("two_outputs", 0, 2), ("masked", 0, 0),
    ],
)  # fmt: skip
def test_sites_and_outputs_of_every_network(name, sites, left):
    proto = NETWORKS[name]()
    model = from_proto(proto)
    chosen, skipped = fold(model)
    assert (len(chosen), len(skipped), norms(model)) == (sites, left, left)
    inputs = feeds(proto)
    assert distance(run(proto, inputs), run(model.proto(), inputs)) <= (HALF if name == "half" else STEP.tolerance)
    assert all(p.damage == 0 and p.site == p.nodes[1] and p.setting == {"into": p.nodes[0]} for p in chosen)


def test_every_network_is_in_the_table_above():
    assert len(NETWORKS) == 13


def reference(x: np.ndarray, gamma, beta, mean, var, eps: float) -> np.ndarray:
    along = (1, -1) + (1,) * (x.ndim - 2)
    gamma, beta, mean, var = (a.astype(np.float64).reshape(along) for a in (gamma, beta, mean, var))
    return (x.astype(np.float64) - mean) / np.sqrt(var + eps) * gamma + beta


FORMS = {
    "conv": lambda n, x: n.conv(x, 6, 8, 3, name="layer", bias=True, pads=[1, 0, 1, 2]),
    "conv without bias": lambda n, x: n.conv(x, 6, 8, 3, name="layer", strides=[2, 1]),
    "grouped conv": lambda n, x: n.conv(x, 6, 8, 3, name="layer", group=2, dilations=[2, 2]),
    "depthwise conv": lambda n, x: n.conv(x, 6, 12, 3, name="layer", group=6),
    "transposed conv": lambda n, x: n.conv(x, 6, 8, 3, name="layer", transposed=True, bias=True),
    "grouped transposed conv": lambda n, x: n.conv(x, 6, 8, 2, name="layer", transposed=True, group=2, pads=[1] * 4),
}
CHANNELS = {"depthwise conv": 12}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opset", [9, 13, 14, 15, 17, 22])
def test_convolutions_behind_which_a_norm_stands(form, opset):
    """Compared with the layer's own output put through the formula in float64."""
    net = Net(f"{form} {opset}", opset)
    x = net.input("x", ["N", 6, 9, 9])
    layer = FORMS[form](net, x)
    y = net.norm(layer, CHANNELS.get(form, 8), name="bn", epsilon=1e-3)
    net.output(y)
    proto = net.model()
    inputs = feeds(proto)
    parts = [net.weights[f"bn.{k}"] for k in ("weight", "bias", "running_mean", "running_var")]
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.node[-1], bare.graph.output[:]
    bare.graph.output.append(helper.make_tensor_value_info(layer, 1, None))
    expected = {"bn": reference(run(bare, inputs)[layer], *parts, eps=1e-3).astype(np.float32)}
    model = from_proto(proto)
    fold(model)
    assert distance(expected, run(model.proto(), inputs)) <= STEP.tolerance
    assert [n.name for n in model.graph] == ["node_layer"]
    assert {*model.graph.initializers} == {"layer.weight", "layer.bias"}
    assert [v.name for v in model.graph.outputs] == ["bn"]


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (2, 1), (2, 5)])
@pytest.mark.parametrize("behind", [True, False])
def test_gemm(trans, bias, behind):
    net = Net(f"gemm {trans} {bias} {behind}")
    x = net.input("x", [2, 7])
    inputs = [net.weight("w", net.random(5, 7) if trans else net.random(7, 5))]
    inputs += [] if bias is None else [net.weight("c", np.asarray(net.random(*bias)))]
    x = x if behind else net.norm(x, 7, name="bn")
    y = net.node("Gemm", x, *inputs, name="fc", transB=trans, alpha=0.5, beta=3.0)
    net.output(net.norm(y, 5, name="bn") if behind else y, [2, 5])
    proto = net.model()
    model = from_proto(proto)
    assert len(fold(model)[0]) == 1 and [n.op_type for n in model.graph] == ["Gemm"]
    assert distance(run(proto), run(model.proto())) <= STEP.tolerance


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_before_a_convolution_without_padding(group, bias):
    net = Net(f"before {group} {bias}")
    x = net.input("x", ["N", 6, 8, 8])
    y = net.conv(net.norm(x, 6, name="bn"), 6, 12, 3, name="conv", group=group, bias=bias, strides=[2, 2])
    net.output(y, ["N", 12, 3, 3])
    proto = net.model()
    model = from_proto(proto)
    chosen, _ = fold(model)
    assert chosen[0].setting == {"into": "node_conv"} and norms(model) == 0
    assert distance(run(proto), run(model.proto())) <= STEP.tolerance


def test_a_chain_of_norms_becomes_part_of_one_layer():
    net = Net("chain")
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4, 3, name="conv")
    net.output(net.norm(net.norm(net.norm(x, 4, name="a"), 4, name="b"), 4, name="c"), ["N", 4, 4, 4])
    proto = net.model()
    model = from_proto(proto)
    assert len(fold(model)[0]) == 3 and len(model.graph) == 1
    assert distance(run(proto), run(model.proto())) <= STEP.tolerance


def test_norm_behind_norm_where_nothing_else_is_left():
    net = Net("two norms")
    x = net.relu(net.input("x", ["N", 3, 6, 6]))
    net.output(net.relu(net.norm(net.norm(x, 3, name="a"), 3, name="b")), ["N", 3, 6, 6])
    proto = net.model()
    model = from_proto(proto)
    chosen, skipped = fold(model)
    assert [p.nodes for p in chosen] == [("node_a", "node_b")] and norms(model) == 1
    assert skipped == {"node_a": "it stands behind Relu 'node_relu0'; BatchNormalization 'node_b' follows"}
    assert distance(run(proto), run(model.proto())) <= STEP.tolerance


def test_matmul_gets_an_add_that_a_second_norm_uses():
    net = Net("matmul")
    x = net.node("MatMul", net.input("x", ["N", 6]), net.weight("w", net.random(6, 4)), name="mm")
    net.output(net.norm(net.norm(x, 4, name="a"), 4, name="b"), ["N", 4])
    proto = net.model()
    model = from_proto(proto)
    assert len(fold(model)[0]) == 2
    assert [n.op_type for n in model.graph] == ["MatMul", "Add"]
    assert edit.origin_of(model.graph[1]) == ("node_mm", "node_a", "node_b")
    assert distance(run(proto), run(model.proto())) <= STEP.tolerance


def test_float16_is_computed_wide_and_stored_narrow():
    proto = networks.half()
    model = from_proto(proto)
    parts = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    fold(model)
    s = parts["bn1.weight"].astype(np.float64) / np.sqrt(parts["bn1.running_var"].astype(np.float64) + 1e-5)
    expected = (parts["conv1.weight"].astype(np.float64) * s[:, None, None, None]).astype(np.float16)
    assert model.value("conv1.weight").const_value.numpy().dtype == np.float16
    np.testing.assert_array_equal(model.value("conv1.weight").const_value.numpy(), expected)


def test_the_layer_stands_for_the_norm_as_well():
    model = from_proto(networks.plain())
    fold(model)
    assert edit.origin_of(model.node("node_conv1")) == ("node_conv1", "node_bn1")


def test_weights_that_were_not_given_stay_untouched():
    """A model shares its weights with its clone: folding in one must not be seen in the other."""
    model = from_proto(networks.plain())
    before = model.value("conv1.weight").const_value.numpy().copy()
    clone = model.clone()
    fold(clone)
    np.testing.assert_array_equal(model.value("conv1.weight").const_value.numpy(), before)
    assert norms(model) == 2 and norms(clone) == 0


def refusal(net: Net) -> str:
    model = from_proto(net.model())
    revision = model.revision
    chosen, skipped = fold(model)
    assert not chosen and model.revision == revision
    return skipped["node_bn"]


def test_refuses_an_output_that_others_read():
    net = Net("others")
    conv = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 3, 1, name="conv")
    net.output(net.node("Add", net.norm(conv, 3, name="bn"), conv, name="sum"), ["N", 3, 6, 6])
    assert refusal(net) == "what 'node_conv' makes is read by others too; Add 'node_sum' follows"


def test_refuses_an_output_that_the_caller_reads():
    net = Net("caller")
    conv = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 3, 1, name="conv")
    net.output(conv, ["N", 3, 6, 6])
    net.output(net.norm(conv, 3, name="bn"), ["N", 3, 6, 6])
    assert refusal(net) == "what 'node_conv' makes is read by others too; its output is read by the caller"


def test_refuses_a_shared_weight():
    _, skipped = fold(from_proto(networks.two_outputs()))
    assert skipped["node_left_bn"].startswith("the weight of 'node_conv_left' is shared with another node")


def test_refuses_training_mode():
    net = Net("training")
    conv = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 3, 1, name="conv")
    net.output(net.norm(conv, 3, name="bn", training_mode=1), ["N", 3, 6, 6])
    net.nodes[-1].output.extend(["mean", "var"])
    assert refusal(net) == "it runs in training mode, with the statistics of each batch"


def test_refuses_a_weight_that_is_no_constant():
    net = Net("filled")
    x = net.input("x", ["N", 8, 6, 6])
    value = numpy_helper.from_array(np.array([0.1], np.float32))
    w = net.node("ConstantOfShape", net.weight("shape", np.array([8, 8, 3, 3])), name="filled", value=value)
    net.output(net.norm(net.node("Conv", x, w, name="conv"), 8, name="bn"), ["N", 8, 4, 4])
    assert refusal(net).startswith("the weight of 'node_conv' is ConstantOfShape 'node_filled', not a constant")


def test_refuses_statistics_that_are_no_constants():
    net = Net("statistics")
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 3, 1, name="conv")
    scale = net.input("scale", [3])
    rest = [net.weight(name, np.ones(3, np.float32)) for name in ("bias", "mean", "var")]
    net.output(net.node("BatchNormalization", x, scale, *rest, name="bn"), ["N", 3, 6, 6])
    assert refusal(net) == "its scale is an input, not a constant"


def test_refuses_a_padded_layer_behind():
    net = Net("padded")
    x = net.norm(net.relu(net.input("x", ["N", 3, 6, 6])), 3, name="bn")
    net.output(net.conv(x, 3, 4, 3, name="conv", pads=[1] * 4), ["N", 4, 6, 6])
    expected = "node_conv' pads its input with zeros, which the norm would have shifted"
    assert refusal(net) == f"it stands behind Relu 'node_relu0'; '{expected}"


def test_refuses_a_matrix_product_of_higher_rank():
    net = Net("rank")
    x = net.node("MatMul", net.input("x", ["N", 4, 4]), net.weight("w", net.random(4, 4)), name="mm")
    net.output(net.norm(x, 4, name="bn"), ["N", 4, 4])
    assert "the last axis of 'node_mm' is not known to be the channel axis" in refusal(net)


def test_refuses_a_scale_that_overflows_float16():
    net = Net("overflow", dtype=np.float16)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 3, 1, name="conv")
    net.norm(x, 3, name="bn", epsilon=0.0)
    net.weights["bn.weight"][:] = 6e4
    net.weights["bn.running_var"][:] = 1e-4
    net.output("bn", ["N", 3, 6, 6])
    assert refusal(net).startswith("the new weight of 'node_conv' does not fit into float16")


def test_refuses_negative_variance():
    net = Net("negative")
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 3, 1, name="conv")
    net.norm(x, 3, name="bn")
    net.weights["bn.running_var"][1] = -1
    net.output("bn", ["N", 3, 6, 6])
    assert refusal(net) == "its statistics give no finite scale"


def test_refuses_statistics_for_each_position():
    proto = parser.parse_model("""<ir_version: 4, opset_import: ["": 7]>
        g (float[1, 2, 3, 3] x, float[2, 3, 3] s, float[2, 3, 3] b, float[2, 3, 3] m, float[2, 3, 3] v)
        => (float[1, 2, 3, 3] y) { y = BatchNormalization <spatial = 0> (x, s, b, m, v) }""")
    (found,) = STEP.propose(from_proto(proto), None)
    assert found.reason == "it has statistics for each position (spatial=0)"


def test_norms_in_branches_are_reported():
    net = Net("inner")
    x = net.input("x", ["N", 2, 4, 4])
    c = net.input("c", [], np.bool_)
    stats = [net.weight(name, np.ones(2, np.float32)) for name in ("s", "b", "m", "v")]
    branches = {}
    for key in ("then_branch", "else_branch"):
        node = helper.make_node("BatchNormalization", [x, *stats], [f"{key}_y"], name=f"{key}_bn")
        info = helper.make_tensor_value_info(f"{key}_y", 1, ["N", 2, 4, 4])
        branches[key] = helper.make_graph([node], key, [], [info])
    net.output(net.node("If", c, name="choice", **branches), ["N", 2, 4, 4])
    found = list(STEP.propose(from_proto(net.model()), None))
    assert {f.site for f in found} == {"then_branch_bn", "else_branch_bn"}
    assert found[0].reason.startswith("it is inside 'node_choice': If holds a sub-graph")


def test_choosing_what_cannot_be_done_fails_before_it_writes():
    model = from_proto(networks.two_outputs())
    with pytest.raises(
        PassFailed, match=r"fold-batchnorm: 'node_left_bn' cannot be folded: the weight of .* is shared"
    ):
        STEP.rewrite(model, [Proposal("node_left_bn")], None)
