"""effc.recover: a classifier of digits that passes have hurt learns from the original; the command; refusals."""

import json

import numpy as np
import onnx
import pytest
from sklearn.datasets import load_digits

from effc import api
from effc.capture import from_proto, load
from effc.cli import main
from effc.contract import Context
from effc.errors import BadInput
from effc.history import KEPT, UNCHANGED, UNDONE
from effc.piecewise import rewritten
from effc.recover import Recover, recover, train
from effc.registry import backend
from effc.save import save
from effc.target import find
from tests import networks
from tests.networks import Net, distance, feeds, run

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype(np.float32)[np.random.default_rng(0).permutation(len(X))]
Y = Y[np.random.default_rng(0).permutation(len(Y))]
HOW = "recover{epochs=8, batch=32, learning_rate=0.05}"


@pytest.fixture(scope="module")
def digits() -> onnx.ModelProto:
    """64-48-32-10 with batch norms, trained here by `recover` on labels alone."""
    net = Net("digits")
    x = net.norm(net.linear(net.input("x", ["N", 64]), 64, 48, name="fc1"), 48, name="bn1")
    x = net.relu(net.norm(net.linear(net.relu(x), 48, 32, name="fc2"), 32, name="bn2"))
    net.output(net.linear(x, 32, 10, name="fc3"), ["N", 10])
    how = Recover(epochs=12, batch=32, learning_rate=0.1, labels=1.0, reestimate=10)
    return train(net.model(), how, data=samples(0, 900)).model.proto()


def samples(begin: int, end: int, labelled: bool = True) -> dict:
    spec = {"source": lambda: iter([{"x": X[begin:end], "y": Y[begin:end]}]), "inputs": {"x": "x"}}
    return spec | ({"labels": "y"} if labelled else {})


def right(proto: onnx.ModelProto) -> float:
    """Per cent of the images that were not trained on."""
    (made,) = run(proto, {"x": X[900:]}).values()
    return 100 * float(np.mean(made.argmax(1) == Y[900:]))


def optimize(proto: onnx.ModelProto, recipe: str, **options) -> api.Result:
    settings = {"calibrate": samples(0, 256, False), "train": samples(0, 900), "measure": False, "force": True}
    return api.optimize(proto, recipe, target_name="onnxruntime-avx2", **settings | options)


def test_labels_alone_train_a_network(digits):
    assert right(digits) > 90


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("features", [0, 1])
def test_what_low_rank_lost_comes_back(digits, labelled, features):
    split = "low-rank{macs=0.2}"
    hurt = right(optimize(digits, split).model.proto())
    how = HOW.replace("epochs", f"features={features}, epochs")
    found = optimize(digits, f"{split}, {how}", train=samples(0, 900, labelled))
    assert hurt < right(digits) - 5
    assert right(found.model.proto()) > (hurt + right(digits)) / 2
    assert found.history.stages[0].status == KEPT and len(found.history.stages) == 1
    (note,) = [n for n in found.history.passes[1].notes if n.startswith("recover: loss")]
    assert ("top-1" in note) is labelled and "on 90 held-out samples" in note
    assert "train" in found.history.data


def test_integer_weights_are_trained_as_they_are_deployed(digits):
    """So coarse that much is lost: the weights are of 4 steps. What is trained is what onnxruntime runs."""
    coarse = optimize(digits, "simplify, fold-batchnorm, int8").model
    after = optimize(digits, f"simplify, fold-batchnorm, int8, {HOW}").model
    assert [n.op_type for n in after.graph] == [n.op_type for n in coarse.graph]
    changed = [
        name for name, value in after.graph.initializers.items()
        if not np.array_equal(value.const_value.numpy(), coarse.graph.initializers[name].const_value.numpy())
    ]  # fmt: skip
    kinds = {after.graph.initializers[name].dtype.name for name in changed}
    assert "INT8" in kinds
    session, view = backend("onnxruntime").session(after, optimize=False), backend("torch")
    seen = view.session(view.view(after)).run({"x": X[900:]})
    assert distance(session.run({"x": X[900:]}), seen) <= 0.02  # one step of the last activation
    assert right(after.proto()) >= right(coarse.proto()) - 1


def test_the_seed_decides_all_that_is_random(digits, tmp_path):
    np.savez(tmp_path / "d.npz", x=X[:900], y=Y[:900])
    data = f"{tmp_path / 'd.npz'}{{labels=y}}"
    one, same, other = (
        optimize(digits, f"low-rank{{macs=0.3}}, {HOW}", seed=seed, train=data).model.proto() for seed in (0, 0, 1)
    )
    assert one.SerializeToString() == same.SerializeToString() != other.SerializeToString()


def test_a_replay_needs_the_same_training_data(digits):
    first = optimize(digits, f"low-rank{{macs=0.3}}, {HOW}").history
    with pytest.raises(BadInput, match="made with other training data; give the same --train SPEC"):
        optimize(digits, first.recipe, replay=first, train=samples(0, 800))


def test_a_model_that_is_its_own_teacher_stays_as_it_is(digits):
    found = optimize(digits, HOW, train=samples(0, 900, False))
    assert found.history.stages[0].status == UNCHANGED


def test_where_nothing_was_better_it_says_what_may_have_hidden_it(digits):
    """Own outputs cannot be bettered; a network that has much to learn is told nothing of the kind."""
    how = Recover(epochs=2, batch=32, labels=0.0)
    (told,) = train(digits, how, data=samples(0, 900)).notes
    assert "best after epoch 0 of 2; samples that the model knows from an earlier training flatter it" in told
    (told,) = train(optimize(digits, "low-rank{macs=0.2}").model, how, data=samples(0, 900), teachers=[digits]).notes
    assert "flatter" not in told


def test_alone_it_is_judged_by_accuracy(digits):
    """Trained on labels that are all wrong, it is undone; on right ones it is kept, though it saves nothing."""
    wrong = {"source": lambda: iter([{"x": X[:900], "y": (Y[:900] + 1) % 10}]), "labels": "y"}
    judged = {"evaluate": samples(900, 1797), "force": False, "max_drop": 100}
    hard = HOW.replace("epochs", "labels=1, epochs")
    found = optimize(digits, hard, train=wrong, **judged)
    assert found.history.stages[0].status == UNDONE and "trained" in found.history.stages[0].reason
    worse = optimize(digits, "low-rank{macs=0.3}").model.proto()
    found = optimize(worse, hard, **judged)
    assert found.history.stages[0].status == KEPT and found.history.stages[0].goals == ("accuracy",)
    assert right(found.model.proto()) > right(worse)


def test_the_tensors_behind_rewritten_layers(digits):
    original, split = from_proto(digits), optimize(digits, "low-rank{macs=0.3}").model
    assert rewritten(split, [original]) == ["fc1", "fc2"]  # the last one is an output
    assert rewritten(original, [original]) == [] and rewritten(split, []) == []


def test_several_teachers(digits):
    split = optimize(digits, "low-rank{macs=0.2}").model
    how = Recover(epochs=6, batch=32, learning_rate=0.05, mean="geometric")
    found = train(split, how, data=samples(0, 900, False), teachers=[digits, digits], evaluate_on=samples(900, 1797))
    assert found.scores["after"].value > found.scores["before"].value
    assert found.scores["teacher"].points == pytest.approx(right(digits))
    assert found.scores["after"].points == pytest.approx(right(found.model.proto()))


def test_a_teacher_that_knows_less_is_told(digits):
    dull = optimize(digits, "low-rank{macs=0.05}").model
    how = Recover(epochs=2, batch=32, learning_rate=0.01, labels=0.9)
    _, note = train(digits, how, data=samples(0, 900), teachers=[dull]).notes
    assert note.startswith("the teacher makes ") and "less than the student: train it first" in note
    assert len(train(dull, how, data=samples(0, 900), teachers=[digits]).notes) == 1


def context(proto: onnx.ModelProto, **options) -> Context:
    return Context(from_proto(proto), find("onnxruntime-avx2"), backend("onnxruntime"), **options)


def test_refusals(digits):
    with pytest.raises(BadInput, match="recover needs training data: give --train SPEC"):
        optimize(digits, HOW, train=None)
    with pytest.raises(BadInput, match="labels=1 trains on labels alone, and the training data have none"):
        optimize(digits, "recover{labels=1}", train=samples(0, 900, False))
    beyond = {"source": lambda: iter([{"x": X, "y": Y + 1}]), "labels": "y"}
    with pytest.raises(BadInput, match="hold label 10, the model has classes 0 to 9"):
        optimize(digits, HOW, train=beyond)
    others = [
        ("x", 7, "fc3", r"the teacher has an output .* they must match"),
        ("x", 10, "fc", "has outputs fc, the model fc3: they must be called alike"),
        ("z", 10, "fc3", "has inputs z, the model x: they must be called alike"),
    ]
    for inputs, classes, output, text in others:
        net = Net("other")
        net.output(net.linear(net.input(inputs, ["N", 64]), 64, classes, name=output), ["N", classes])
        with pytest.raises(BadInput, match=text):
            train(digits, Recover(epochs=1), data=samples(0, 900), teachers=[net.model()])
    fixed = networks.depthwise()
    one = {"source": lambda: iter([feeds(fixed, 1)])}
    with pytest.raises(BadInput, match="the model's batch is fixed at 1"):
        train(fixed, data=one)


def test_without_torch_it_says_what_is_needed(digits, monkeypatch):
    def trainer():
        raise BadInput("training needs PyTorch, which is not installed: pip install 'effc[torch]'")

    monkeypatch.setattr("effc.registry.trainer", trainer)
    model = from_proto(digits)
    with pytest.raises(BadInput, match=r"pip install 'effc\[torch\]'"):
        recover(model, Recover(), context(digits))


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["effc", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command(digits, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "train.npz", x=X[:900], y=Y[:900])
    np.savez(tmp_path / "test.npz", x=X[900:], y=Y[900:])
    save(from_proto(digits), tmp_path / "teacher.onnx")
    save(optimize(digits, "low-rank{macs=0.2}").model, tmp_path / "student.onnx")
    paths = [str(tmp_path / name) for name in ("student.onnx", "teacher.onnx", "out.onnx")]
    spec = f"{tmp_path / 'train.npz'}{{labels=y}}"
    options = f"epochs=6, batch=32, learning_rate=0.05, checkpoint={tmp_path / 'state'}"
    given = ["--train", spec, "--teacher", paths[1], "--options", options, "-o", paths[2]]
    judged = ["--evaluate", f"{tmp_path / 'test.npz'}{{labels=y}}"]
    assert command(monkeypatch, "recover", paths[0], *given, *judged) == 0
    told = capsys.readouterr().out
    assert "recover: loss" in told and "top1" in told and "written: " in told
    assert (tmp_path / "state").exists()
    student, trained = (right(load(path).proto()) for path in (paths[0], paths[2]))
    assert trained > student
    assert command(monkeypatch, "recover", paths[0], "--train", spec, "-o", paths[0]) == 2
    assert "is the input itself; choose another output" in capsys.readouterr().err
    assert command(monkeypatch, "recover", paths[0], "--train", spec, "--options", "epoch=1") == 2
    assert "there is no option 'epoch'" in capsys.readouterr().err
    report = tmp_path / "r.json"
    recipe = ["--passes", "low-rank{macs=0.2}, recover{epochs=1}", "--no-measure", "--force", "--json", str(report)]
    assert command(monkeypatch, "optimize", paths[1], "--train", spec, *recipe, "-o", paths[2]) == 0
    assert any(
        note.startswith("recover: loss")
        for p in json.loads(report.read_text())["stages"][0]["passes"]
        for note in p["notes"]
    )
