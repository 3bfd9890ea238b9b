"""effc.backends.torch: the trainable view, its names and gradients, and the way of trained weights back."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper

from effc import registry
from effc.backends.torch import Torch
from effc.capture import from_proto
from effc.errors import BadInput, PassFailed
from effc.model import Model
from tests.networks import NETWORKS, Net, distance, feeds, run

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
TORCH = Torch()
TOLERANCES = {"half": 2e-3}  # float16 holds three digits; elsewhere 1e-5
TRAINABLE = [name for name in NETWORKS if name != "control"]


def captured(name: str) -> Model:
    return from_proto(NETWORKS[name]())


def floats(model: Model) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float(((a - b).abs().max() / a.abs().max()).detach())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_network_agrees_with_onnxruntime(name, batch):
    """To 1e-5 of the largest output (float16: 2e-3), at batches that the graph leaves open."""
    proto = NETWORKS[name]()
    inputs = feeds(proto, batch=batch)
    session = TORCH.session(TORCH.view(from_proto(proto)))
    assert session.outputs == tuple(o.name for o in proto.graph.output)
    assert distance(run(proto, inputs), session.run(inputs)) <= TOLERANCES.get(name, 1e-5)


@pytest.mark.parametrize("length", [1, 9])
def test_other_sizes_than_the_batch_are_open_too(length):
    proto = NETWORKS["transformer"]()
    inputs = {"input": np.random.default_rng(0).standard_normal((2, length, 16)).astype(np.float32)}
    found = TORCH.session(TORCH.view(from_proto(proto))).run(inputs)
    assert distance(run(proto, inputs), found) <= 1e-5


@pytest.mark.parametrize("name", TRAINABLE)
def test_every_float_weight_is_a_parameter_or_a_statistic(name):
    model = captured(name)
    view = TORCH.view(model)
    found = TORCH.weights(view)
    arrays = {n: a for n, a in floats(model).items() if a.dtype.kind == "f" and a.ndim}
    assert found.keys() == arrays.keys()
    for weight, array in arrays.items():
        assert np.array_equal(found[weight].detach().numpy(), array)
        assert isinstance(found[weight], nn.Parameter) != (".running_" in weight)
    assert not view._parameters and not view._buffers  # nothing sits on the root


def test_layers_are_standard_modules_under_their_own_names():
    view = TORCH.view(captured("plain"))
    kinds = {"conv1": nn.Conv2d, "bn1": nn.BatchNorm2d, "fc": nn.Linear}
    assert {name: type(view.get_submodule(name)) for name in kinds} == kinds
    assert view.get_parameter("conv2.bias") is TORCH.weights(view)["conv2.bias"]
    assert type(TORCH.view(captured("transposed")).up1) is nn.ConvTranspose2d
    assert type(TORCH.view(captured("sound")).bn2) is nn.BatchNorm1d
    transformer = TORCH.view(captured("transformer"))
    assert type(transformer.ln) is nn.LayerNorm and isinstance(transformer.q, nn.Linear)


def test_the_nodes_of_a_view_say_which_tensor_they_compute():
    model = captured("residual")
    found = {node.meta["tensor"] for node in TORCH.view(model).graph.nodes if "tensor" in node.meta}
    assert found == {v.name for node in model.graph for v in node.outputs}


class Plain(nn.Module):
    """`tests.networks.plain`, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.relu(self.conv3(x)).mean((2, 3)))


class Mlp(nn.Module):
    """`tests.networks.mlp`, written by hand; fc2.weight and fc3.weight in ONNX's layout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc4 = nn.Linear(20, 16), nn.Linear(12, 5)
        self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm1d(n) for n in (16, 12, 12, 12))
        self.fc2, self.fc3 = nn.Module(), nn.Module()
        self.fc2.weight, self.fc3.weight = nn.Parameter(torch.empty(16, 12)), nn.Parameter(torch.empty(12, 12))
        self.fc3.bias = nn.Parameter(torch.empty(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.fc1(x)))
        x = F.relu(self.bn2(x @ self.fc2.weight))
        return self.fc4(self.bn4(F.relu(self.bn3(x @ self.fc3.weight + self.fc3.bias))))


def sgd(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    F.cross_entropy(module(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "written"), [("plain", Plain), ("mlp", Mlp)])
@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_is_that_of_the_network_written_by_hand(name, written, training):
    """Gradients, weights after one step of SGD and statistics, each to 1e-5 of its largest number."""
    model = captured(name)
    view, hand = TORCH.view(model), written()
    hand.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in floats(model).items()}, strict=False)
    x = torch.from_numpy(feeds(NETWORKS[name](), batch=8)["input"])
    y = torch.arange(8) % 5
    for module in (view, hand):
        sgd(module.train(training), x, y)
    found, reference = TORCH.weights(view), dict(hand.named_parameters()) | dict(hand.named_buffers())
    before = floats(model)
    for weight, tensor in found.items():
        assert relative(reference[weight], tensor) <= 1e-5, weight
        if isinstance(tensor, nn.Parameter):
            # A bias before a batch norm in training has no gradient but rounding.
            assert (reference[weight].grad - tensor.grad).abs().max() <= 1e-5 * max(1.0, tensor.grad.abs().max())
        elif not training:
            assert np.array_equal(tensor.numpy(), before[weight])


def test_momentum_is_the_share_that_statistics_keep():
    """ONNX: new = m * old + (1 - m) * batch; 0.9 by default."""
    net = Net("momentum")
    net.output(net.norm(net.input("x", ["N", 3, 4, 4]), 3, name="bn", momentum=0.7), ["N", 3, 4, 4])
    view = TORCH.view(from_proto(net.model())).train()
    x = torch.from_numpy(feeds(net.model(), batch=5)["x"])
    expected = 0.7 * torch.from_numpy(net.weights["bn.running_mean"]) + 0.3 * x.mean((0, 2, 3))
    view(x)
    assert relative(expected, TORCH.weights(view)["bn.running_mean"]) <= 1e-6


def test_statistics_that_are_used_twice_are_fixed():
    net = Net("twice")
    x = net.norm(net.input("x", ["N", 3]), 3, name="bn")
    statistics = [f"bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    net.output(net.node("BatchNormalization", x, *statistics, name="again"), ["N", 3])
    model = from_proto(net.model())
    view = TORCH.view(model).train()
    inputs = feeds(net.model())
    assert distance(run(net.model(), inputs), TORCH.session(view).run(inputs)) <= 1e-6
    assert TORCH.weights(view).keys() == {"bn.weight", "bn.bias"}


def test_a_weight_of_two_nodes_is_one_parameter_whose_gradients_add_up():
    """two_outputs: y = conv(left) and conv(right) with one weight; to 1e-5."""
    model = captured("two_outputs")
    view = TORCH.view(model)
    left, right = (torch.from_numpy(a) for a in feeds(NETWORKS["two_outputs"]()).values())
    weight = TORCH.weights(view)["shared.weight"]
    assert sum(p is weight for p in view.parameters()) == 1
    view(left, right)[0].sum().backward()
    own = weight.detach().clone().requires_grad_()
    arrays = {n: torch.from_numpy(a.copy()) for n, a in floats(model).items()}
    total = torch.zeros(())
    for x, side in ((left, "left"), (right, "right")):
        total = (
            total
            + F.batch_norm(
                F.conv2d(x, own, padding=1),
                *(arrays[f"{side}_bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")),
            ).sum()
        )
    total.backward()
    assert relative(own.grad, weight.grad) <= 1e-5


def test_scalars_constants_and_infinities_are_not_trained():
    net = Net("fixed")
    x = net.node("Mul", net.input("x", ["N", 2]), net.weight("scale", np.float32(0.5)))
    x = net.node("Add", x, net.weight("mask", np.array([0, -np.inf], np.float32)))
    x = net.node("Add", x, net.node("Constant", value_floats=[1.0, 2.0]))
    net.output(net.node("Add", x, net.weight("bias", np.ones(2, np.float32))), ["N", 2])
    view = TORCH.view(from_proto(net.model()))
    assert list(TORCH.weights(view)) == ["bias"] and len(list(view.parameters())) == 1
    assert TORCH.session(view).run({"x": np.ones((1, 2), np.float32)})["add4"].tolist() == [[2.5, -np.inf]]


AWKWARD = ["input", "input_1", "class", "self", "x.1", "1", "x_1", "None", "input_", "Ä b"]


def test_inputs_and_weights_may_be_called_anything():
    """y = sum of i * input i + sum of weights named alike, exactly."""
    net = Net("awkward")
    terms = []
    for index, name in enumerate(AWKWARD):
        net.input(name, ["N"])
        factor = net.weight(f"{name}.training", np.full(1, index, np.float32))
        terms.append(net.node("Mul", name, factor, name=f"term{index}"))
    net.output(net.node("Sum", *terms, name="forward"), ["N"])
    session = TORCH.session(TORCH.view(from_proto(net.model())))
    inputs = {name: np.full(2, 10.0**i, np.float32) for i, name in enumerate(AWKWARD)}
    assert session.inputs == tuple(AWKWARD)
    assert distance(run(net.model(), inputs), session.run(inputs)) == 0
    with pytest.raises(BadInput, match="input 'class' is missing; there are input, input_1"):
        session.run({name: inputs[name] for name in ("input", "input_1")})


def test_rows_that_are_picked_at_run_time_are_an_embedding():
    """Also from the end, as ONNX may count; a row that is picked twice has twice the gradient."""
    net = Net("rows")
    rows = net.weight("rows.weight", net.random(5, 3))
    net.output(net.node("Gather", rows, net.input("ids", ["N"], np.int64), name="y"), ["N", 3])
    view = TORCH.view(from_proto(net.model()))
    assert type(view.get_submodule("rows")) is nn.Embedding
    ids = np.array([0, -1, 4, 2])
    assert distance(run(net.model(), {"ids": ids}), TORCH.session(view).run({"ids": ids})) == 0
    view(torch.from_numpy(ids)).sum().backward()
    assert TORCH.weights(view)["rows.weight"].grad[:, 0].tolist() == [1, 0, 1, 0, 2]


def test_dropout_drops_in_training_only():
    view = TORCH.view(captured("old"))
    dropout = view.get_submodule("node_dropout")
    assert isinstance(dropout, nn.Dropout) and dropout.p == 0.5
    x = torch.from_numpy(feeds(NETWORKS["old"]())["input"])
    assert torch.equal(view(x), view(x))
    dropout.train()
    assert not torch.equal(view(x), view(x))


@pytest.mark.parametrize("name", TRAINABLE)
def test_what_was_not_trained_is_not_touched(name):
    model = captured(name)
    revision, before = model.revision, model.proto().SerializeToString(deterministic=True)
    TORCH.write_back(TORCH.view(model), model)
    assert model.revision == revision and model.proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", TRAINABLE)
def test_trained_weights_come_home(name):
    """After two steps the model does in onnxruntime what the view does, to 1e-5; nothing but weights changed."""
    proto = NETWORKS[name]()
    model = from_proto(proto)
    before = floats(model)
    structure = [(n.name, n.op_type, [v and v.name for v in n.inputs]) for n in model.graph]
    view = TORCH.view(model).train()
    optimizer = torch.optim.SGD(view.parameters(), lr=0.01)
    inputs = feeds(proto, batch=4)
    for _ in range(2):
        made = view(*(torch.from_numpy(a) for a in inputs.values()))
        optimizer.zero_grad()
        losses = [o.float().square().mean() for o in (made if isinstance(made, tuple) else (made,))]
        torch.stack(losses).sum().backward()
        optimizer.step()
    TORCH.write_back(view.eval(), model)
    assert structure == [(n.name, n.op_type, [v and v.name for v in n.inputs]) for n in model.graph]
    trained = TORCH.weights(view)
    for weight, array in floats(model).items():
        assert array.dtype == before[weight].dtype and array.shape == before[weight].shape
        expected = trained[weight].detach().numpy() if weight in trained else before[weight]
        assert np.array_equal(array, expected), weight
    assert distance(run(model.proto(), inputs), TORCH.session(view).run(inputs)) <= TOLERANCES.get(name, 1e-5)


def test_a_single_weight_that_was_trained_is_the_only_one_written():
    model = captured("plain")
    before = floats(model)
    view = TORCH.view(model)
    with torch.no_grad():
        TORCH.weights(view)["conv2.weight"].mul_(2)
    TORCH.write_back(view, model)
    assert [n for n, a in floats(model).items() if not np.array_equal(a, before[n])] == ["conv2.weight"]
    assert np.array_equal(floats(model)["conv2.weight"], 2 * before["conv2.weight"])


def test_weights_of_another_model_or_without_numbers_are_refused():
    model = captured("plain")
    view = TORCH.view(model)
    with pytest.raises(
        BadInput, match=r"is not the model of this view: it has no weight 'conv1.weight' of \(8, 3, 3, 3\)"
    ):
        TORCH.write_back(view, captured("mlp"))
    with torch.no_grad():
        TORCH.weights(view)["conv1.weight"].mul_(2)
        TORCH.weights(view)["fc.bias"][0] = torch.nan
    before = model.revision
    with pytest.raises(PassFailed, match=r"weight 'fc.bias' is not finite after training: lower the learning rate"):
        TORCH.write_back(view, model)
    assert model.revision == before
    with pytest.raises(BadInput, match="this GraphModule was not made by effc"):
        TORCH.weights(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_a_checkpoint_goes_by_the_names_of_the_model():
    model = captured("mlp")
    view, other = TORCH.view(model), TORCH.view(model)
    with torch.no_grad():
        for tensor in TORCH.weights(view).values():
            tensor.add_(1)
    checkpoint = TORCH.state(view)
    assert checkpoint.keys() == TORCH.weights(view).keys() and checkpoint["fc2.weight"].shape == (16, 12)
    TORCH.load_state(other, checkpoint)
    inputs = feeds(NETWORKS["mlp"]())
    assert distance(TORCH.session(view).run(inputs), TORCH.session(other).run(inputs)) == 0
    with pytest.raises(BadInput, match=r"the checkpoint is of another model: 'fc1.bias' is in one of them only"):
        TORCH.load_state(other, {n: t for n, t in checkpoint.items() if n != "fc1.bias"})
    with pytest.raises(BadInput, match=r"'fc1.bias' is \(16,\), in the checkpoint \(3,\)"):
        TORCH.load_state(other, checkpoint | {"fc1.bias": torch.zeros(3)})


def test_a_copy_of_a_view_is_a_view():
    model = captured("two_outputs")
    view = TORCH.view(model)
    other = copy.deepcopy(view)
    with torch.no_grad():
        TORCH.weights(other)["shared.weight"].zero_()
    assert TORCH.weights(view)["shared.weight"].abs().max() > 0
    TORCH.write_back(other, model)
    assert not floats(model)["shared.weight"].any()


def test_an_operator_without_a_rule_is_refused_in_one_line():
    with pytest.raises(BadInput) as found:
        TORCH.view(captured("control"))
    assert str(found.value) == (
        "model cannot be trained: trainable forms of local.Swish (node_swish) are unknown;"
        " a rule for it belongs into _torch_ops.py"
    )
    net = Net("choice")
    x = net.input("x", ["N"])
    branch = helper.make_graph([helper.make_node("Relu", [x], ["b"])], "g", [], [onnx.ValueInfoProto(name="b")])
    branch.output[0].CopyFrom(helper.make_tensor_value_info("b", 1, ["N"]))
    net.output(
        net.node("If", net.weight("yes", np.bool_(True)), name="if", then_branch=branch, else_branch=branch), ["N"]
    )
    with pytest.raises(BadInput, match=r"trainable forms of If \(node_if\) are unknown; .* _torch_ops.py"):
        TORCH.view(from_proto(net.model()))


def test_a_kind_that_a_rule_does_not_know_is_refused_in_one_line():
    net = Net("kind")
    x, roi = net.input("x", ["N", 1, 4, 4]), net.weight("roi", np.float32([0, 0, 0, 0, 1, 1, 1, 1]))
    scales = net.weight("scales", np.float32([1, 1, 2, 2]))
    y = net.node("Resize", x, roi, scales, name="r", coordinate_transformation_mode="tf_crop_and_resize")
    net.output(y, ["N", 1, 8, 8])
    with pytest.raises(BadInput) as found:
        TORCH.view(from_proto(net.model()))
    assert str(found.value) == (
        "model cannot be trained: Resize (node_r) has coordinate_transformation_mode='tf_crop_and_resize', which has"
        " no trainable form; a rule for it belongs into _torch_ops.py"
    )


def test_a_batch_norm_that_returns_its_statistics_is_refused():
    net = Net("statistics")
    y = net.norm(net.input("x", ["N", 3]), 3, name="bn", outputs=3, training_mode=1)
    net.output(y, ["N", 3])
    with pytest.raises(
        BadInput, match=r"BatchNormalization \(node_bn\) has training_mode=1, which has no trainable form"
    ):
        TORCH.view(from_proto(net.model()))


def test_without_torch_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BadInput) as found:
        Torch()
    assert str(found.value) == "training needs PyTorch, which is not installed: pip install 'effc[torch]'"


def test_the_backend_is_found_by_name():
    assert (
        registry.trainer() is registry.trainer("torch")
        and isinstance(registry.trainer(), Torch)
        and TORCH.version() == torch.__version__
    )
    with pytest.raises(BadInput, match="the backend 'onnxruntime' does not train; there are torch"):
        registry.trainer("onnxruntime")
    with pytest.raises(BadInput, match=r"unknown backend 'tourch'.*did you mean 'torch'"):
        registry.trainer("tourch")
