"""effc.passes.group_lasso: a classifier of digits loses groups in training; what is zero is removed exactly."""

import numpy as np
import onnx
import pytest
from sklearn.datasets import load_digits

from effc import api
from effc.capture import from_proto
from effc.errors import BadInput
from effc.history import KEPT, UNDONE, History
from effc.recover import Recover, train
from tests import networks
from tests.networks import Net, distance, run

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

X, Y = load_digits(return_X_y=True)
ORDER = np.random.default_rng(0).permutation(len(X))
X, Y = (X / 16).astype(np.float32)[ORDER].reshape(-1, 1, 8, 8), Y[ORDER]
HOW = "epochs=4, batch=32, learning_rate=0.05"


def samples(begin: int, end: int) -> dict:
    return {"source": lambda: iter([{"x": X[begin:end], "y": Y[begin:end]}]), "inputs": {"x": "x"}, "labels": "y"}


def right(proto: onnx.ModelProto) -> float:
    """Per cent of the images that were not trained on."""
    (made,) = run(proto, {"x": X[900:]}).values()
    return 100 * float(np.mean(made.argmax(1) == Y[900:]))


@pytest.fixture(scope="module")
def digits() -> onnx.ModelProto:
    """Three convolutions with batch norms, the last two in a residual block, trained here on labels."""
    net = Net("digits")
    x = net.input("x", ["N", 1, 8, 8])
    x = net.relu(net.norm(net.conv(x, 1, 16, 3, name="conv1", pads=[1] * 4), 16, name="bn1"))
    x = net.relu(net.norm(net.conv(x, 16, 24, 3, name="conv2", pads=[1] * 4, strides=[2, 2]), 24, name="bn2"))
    y = net.relu(net.norm(net.conv(x, 24, 24, 3, name="conv3", pads=[1] * 4), 24, name="bn3"))
    y = net.norm(net.conv(y, 24, 24, 3, name="conv4", pads=[1] * 4), 24, name="bn4")
    net.head(net.relu(net.node("Add", x, y)), 24, classes=10)
    how = Recover(epochs=6, batch=32, learning_rate=0.1, labels=1.0, reestimate=10)
    return train(net.model(), how, data=samples(0, 900)).model.proto()


def optimize(proto: onnx.ModelProto, recipe: str, **options) -> api.Result:
    settings = {"train": samples(0, 900), "measure": False, "force": True, "goal": "macs"}
    return api.optimize(proto, recipe, target_name="onnxruntime-avx2", **settings | options)


@pytest.fixture(scope="module")
def sparse(digits) -> dict[str, api.Result]:
    return {
        groups: optimize(digits, f"group-lasso{{sparsity=0.6, groups={groups}, {HOW}}}")
        for groups in ("taps", "channels")
    }


def weights(result: api.Result) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in result.model.graph.initializers.items()}


def test_the_goal_is_met_with_next_to_no_loss(digits, sparse):
    """Places of patches: 9 + 16 * 9 + 2 * 24 * 9 in four layers."""
    found = weights(sparse["taps"])
    zero = [(found[f"conv{n}.weight"] == 0).all(axis=0).sum() for n in (1, 2, 3, 4)]
    assert sum(zero) == round(0.6 * 585) and all(zero[n] < found[f"conv{n + 1}.weight"][0].size for n in range(4))
    assert right(digits) > 97 and right(sparse["taps"].model.proto()) > right(digits) - 2.5
    assert right(sparse["channels"].model.proto()) > right(digits) - 4
    note = sparse["taps"].history.passes[0].notes[-1]
    assert note.startswith("group-lasso: 351 of 585 groups in 4 families are zero")
    assert (found["fc.weight"] != 0).mean() > 0.99  # dense layers have no such groups


def test_chosen_without_training_the_same_share_costs_far_more(digits, sparse):
    """The groups with the smallest norms, as many of each layer, set to zero."""
    clone = onnx.ModelProto()
    clone.CopyFrom(digits)
    for tensor in clone.graph.initializer:
        if tensor.name.startswith("conv"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            count = int((weights(sparse["taps"])[tensor.name] == 0).all(axis=0).sum())
            flat = array.reshape(len(array), -1)
            flat[:, np.argsort(np.linalg.norm(flat, axis=0))[:count]] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert right(clone) < right(sparse["taps"].model.proto()) - 5


def coupled(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Norms of the channels of this network, by hand: those of the two tensors that are added go together."""

    def norms(makers: str, readers: list[np.ndarray]) -> np.ndarray:
        total = sum(np.square(array).sum(axis=(0, *range(2, array.ndim))) for array in readers)
        for n in makers:
            total = total + np.square(found[f"conv{n}.weight"]).sum(axis=(1, 2, 3))
            total = total + found[f"bn{n}.weight"] ** 2 + found[f"bn{n}.bias"] ** 2
        return np.sqrt(total)

    return {
        "first": norms("1", [found["conv2.weight"]]),
        "inner": norms("3", [found["conv4.weight"]]),
        "stream": norms("24", [found["conv3.weight"], found["fc.weight"]]),
    }


def test_coupled_channels_go_together(sparse):
    norms = coupled(weights(sparse["channels"]))
    zeros = {name: int((n == 0).sum()) for name, n in norms.items()}
    assert sum(zeros.values()) == round(0.6 * 64) and all(zeros[name] < len(norms[name]) for name in zeros)


def gone(proto: onnx.ModelProto, result: api.Result) -> float:
    """How far outputs of a result are from those of the network with zeros."""
    after = result.model.proto()
    onnx.checker.check_model(after, full_check=True)
    return distance(run(proto, {"x": X[:64]}), run(after, {"x": X[:64]}))


@pytest.mark.parametrize("forms", ["[crop, channels, taps]", "[taps]", "[channels]", "[crop]"])
def test_taps_are_removed_exactly(sparse, forms):
    """Stated bound: 1e-5 of the largest output. Nothing but groups that are zero goes."""
    before = sparse["taps"].model.proto()
    found = optimize(before, f"prune-groups{{zeros=true, forms={forms}}}", train=None)
    assert gone(before, found) <= 1e-5
    record = found.history.passes[0]
    if forms not in ("[crop]", "[channels]"):  # there may be none of these
        there = {f"node_{n}": w for n, w in weights(sparse["taps"]).items()}
        for site, setting in record.chosen:
            if setting["form"] == "taps":
                assert setting["kept"] == int(there[f"{site}.weight"].any(axis=0).sum())
        assert record.status == KEPT and record.cost_after.macs < 0.55 * record.cost_before.macs


def test_channels_are_removed_exactly(sparse):
    """Stated bound: 1e-5 of the largest output; as many are left as are not zero."""
    before = sparse["channels"].model.proto()
    found = optimize(before, "prune-channels{zeros=true}", train=None)
    assert gone(before, found) <= 1e-5
    norms, left = coupled(weights(sparse["channels"])), weights(found)
    assert left["conv1.weight"].shape[0] == (norms["first"] > 0).sum()
    assert left["conv3.weight"].shape[0] == (norms["inner"] > 0).sum()
    assert left["conv4.weight"].shape[0] == left["conv2.weight"].shape[0] == (norms["stream"] > 0).sum()


def test_with_recover_behind_it_is_one_stage(digits):
    recipe = f"group-lasso{{sparsity=0.5, {HOW}}}, prune-groups{{zeros=true}}, recover{{epochs=2, batch=32}}"
    found = optimize(digits, recipe, force=False, evaluate=samples(900, 1797), max_drop=5)
    (stage,) = found.history.stages
    assert [p.name for p in stage.passes] == ["group-lasso", "prune-groups", "recover"] and stage.goals == ("macs",)
    assert stage.status == KEPT and stage.passes[-1].cost_after.macs < 0.7 * stage.passes[0].cost_before.macs


def test_alone_it_is_judged_by_compressed_bytes(digits):
    found = optimize(digits, f"group-lasso{{sparsity=0.6, {HOW}}}, prune-groups{{zeros=true}}", force=False)
    assert [stage.goals for stage in found.history.stages] == [("compressed size",), ("macs",)]
    assert [stage.status for stage in found.history.stages] == [KEPT, KEPT]
    little = optimize(digits, f"group-lasso{{sparsity=0.002, {HOW}}}", force=False)
    assert little.history.stages[0].status == UNDONE and "compress" in little.history.stages[0].reason


def test_the_same_again_and_after_a_stop(digits, tmp_path, monkeypatch):
    """Byte by byte: run twice; and gone on with from the checkpoint of an epoch on either side of the goal."""
    recipe = f"group-lasso{{sparsity=0.6, {HOW}, checkpoint={tmp_path / 'state'}}}"
    once = optimize(digits, recipe).model.proto().SerializeToString()
    (tmp_path / "state").unlink()
    for epoch in (2, 3):
        (tmp_path / "state").unlink(missing_ok=True)
        stopped(monkeypatch, epoch, lambda: optimize(digits, recipe))
        assert (tmp_path / "state").exists()
        assert optimize(digits, recipe).model.proto().SerializeToString() == once


def stopped(monkeypatch, epoch: int, work) -> None:
    """Work whose training is interrupted once this epoch's end was written."""
    from effc.finetune import Finetune

    save = Finetune._save

    def last(self, number, optimizer):
        save(self, number, optimizer)
        if number == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Finetune, "_save", last)
        with pytest.raises(KeyboardInterrupt):
            work()


def test_a_report_replays_to_the_same_bytes(digits, tmp_path):
    np.savez(tmp_path / "d.npz", x=X[:900], y=Y[:900])
    data = f"{tmp_path / 'd.npz'}{{labels=y}}"
    recipe = f"group-lasso{{sparsity=0.6, {HOW}}}, prune-groups{{zeros=true}}"
    first = optimize(digits, recipe, train=data)
    again = optimize(digits, recipe, train=data, replay=History.from_json(first.history.to_json()))
    assert again.model.proto().SerializeToString() == first.model.proto().SerializeToString()


def test_a_training_that_explodes_leaves_the_model_dense(digits):
    found = optimize(digits, "group-lasso{epochs=4, batch=32, learning_rate=1e6, clip=1e9, warmup=0}")
    notes = " ".join(found.history.passes[0].notes)
    assert "a lower learning rate may help" in notes and "training ended before the 292 that were wanted" in notes
    assert right(found.model.proto()) == pytest.approx(right(digits))


def test_refusals(digits):
    with pytest.raises(BadInput, match="group-lasso needs training data: give --train SPEC"):
        optimize(digits, "group-lasso", train=None)
    for recipe, text in (
        ("group-lasso{sparsity=1}", "sparsity"),
        ("group-lasso{epochs=0}", "epochs"),
        ("group-lasso{groups=filters}", "taps, channels"),
        ("group-lasso{by=block}", "there is no option 'by'"),
        ("prune-groups{zeros=true, macs=0.5}", "zeros=true takes what is zero, and no budget: leave out macs"),
        ("prune-channels{zeros=true, size=0.5, damage=1}", "leave out damage, size"),
    ):
        with pytest.raises(BadInput, match=text):
            optimize(digits, recipe)


def test_what_is_not_zero_is_left_alone_with_a_reason(digits):
    reasons = {"groups": "none of its groups is zero", "channels": "none of its units is read with zeros alone"}
    for kind, said in reasons.items():
        ledger = optimize(digits, f"prune-{kind}{{zeros=true}}", train=None).history.passes[0].ledger
        assert {e.reason for e in ledger if e.node == "node_conv1"} == {said}


def test_networks_without_groups_are_left_alone():
    proto = networks.mlp()
    data = {"source": lambda: iter([networks.feeds(proto, batch=64)])}
    record = optimize(proto, "group-lasso{epochs=1, batch=16}", train=data).history.passes[0]
    assert record.status == "unchanged"


def test_a_layer_of_zeros_keeps_one_group_and_one_unit():
    """Whatever it is: something has to be left to compute with."""
    net = Net("zeros")
    x = net.relu(net.conv(net.input("x", ["N", 4, 6, 6]), 4, 8, 3, name="a", bias=True))
    net.output(net.conv(x, 8, 5, 3, name="b", bias=True))
    net.weights["b.weight"][:] = 0
    proto = net.model()
    inputs = networks.feeds(proto)
    for name in ("prune-groups", "prune-channels"):
        found = optimize(proto, f"{name}{{zeros=true}}", train=None)
        assert distance(run(proto, inputs), run(found.model.proto(), inputs)) <= 1e-5
        assert found.history.passes[0].status == KEPT
    assert from_proto(proto).graph.initializers["a.weight"].const_value.shape[0] == 8
    assert found.model.graph.initializers["a.weight"].const_value.shape[0] == 1
