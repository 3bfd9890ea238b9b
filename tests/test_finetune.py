"""effc.finetune: the loop against PyTorch's own steps, schedules against their formulas, kills, and what goes wrong."""

import copy
import math
from typing import Any

import numpy as np
import pytest

from effc.data import Data, open_data
from effc.distillation import Loss
from effc.errors import BadInput
from effc.finetune import Finetune, Fitted
from effc.reestimate import reestimate
from effc.schedule import Schedule

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 6)).astype(np.float32)
Y = (X @ RNG.normal(size=(6, 4))).argmax(axis=1)
HARD = Loss(1.0, 1.0)


class View(torch.nn.Module):
    """What a trainable view looks like from outside."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16) if norm else torch.nn.Identity(), torch.nn.ReLU()]
        self.net = torch.nn.Sequential(*layers, torch.nn.Dropout(0.1 if norm else 0.0), torch.nn.Linear(16, 4))

    def forward(self, x: Any) -> Any:
        return self.net(x)


def data(x: np.ndarray = X, y: np.ndarray | None = Y) -> Data:
    batch = {"x": x} | ({} if y is None else {"y": y})
    spec: dict[str, Any] = {"source": lambda: iter([batch])}
    return open_data(spec if y is None else spec | {"labels": "y"})


@pytest.fixture
def stored(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    return open_data({"source": str(tmp_path / "d.npz"), "labels": "y"})


def finetune(view: View, given: Data, schedule: Schedule, loss: Loss = HARD, **options: Any) -> Finetune:
    return Finetune(
        view, ["x"], ["y"], given, options.pop("held_out", given), loss, schedule, **{"labels": True, **options}
    )


def weights(view: View) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in view.state_dict().items()}


def test_the_rate_rises_and_falls_along_a_cosine():
    schedule = Schedule(epochs=4, learning_rate=0.2, warmup=1)
    rates = [schedule.rate(step, 10) for step in range(40)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], 0.1 * (1 + np.cos(np.pi * np.arange(30) / 30)))
    assert Schedule(epochs=1, learning_rate=0.3).rate(0, 5) == 0.3


def test_a_step_in_bfloat16_is_autocast_and_judged_in_float32():
    """Against PyTorch's own autocast by hand, to the last bit; weights stay float32."""
    schedule = Schedule(epochs=1, batch=96, learning_rate=0.1, weight_decay=0.0, clip=1e9, precision="bfloat16")
    view = View(norm=False)
    other, exact = copy.deepcopy(view), copy.deepcopy(view)
    fitted = finetune(view, data(), schedule).run()
    by_hand = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    order = np.concatenate([part.feeds["x"] for part in data().batches(96)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = other(torch.from_numpy(order))
    assert made.dtype == torch.bfloat16
    torch.nn.functional.cross_entropy(made.float(), torch.from_numpy(Y)).backward()
    by_hand.step()
    for name, value in weights(other).items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(weights(view)[name], value, rtol=0, atol=1e-6)  # samples come in another order
    before = torch.nn.functional.cross_entropy(exact(torch.from_numpy(X)), torch.from_numpy(Y)).item()
    assert fitted.scores[0][1] == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_is_that_of_the_optimizer(optimizer):
    """One batch an epoch and no norm, against PyTorch's own by hand; the last state of a falling loss is the best."""
    schedule = Schedule(epochs=3, batch=96, optimizer=optimizer, learning_rate=0.1, weight_decay=0.01, clip=0.5)
    view = View(norm=False)
    other = copy.deepcopy(view)
    fitted = finetune(view, data(), schedule).run()
    assert fitted.best == 3 and fitted.ended is None
    groups = [
        {"params": [p for p in other.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in other.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    by_hand = (
        torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=0.1)
    )
    for epoch in range(3):
        for group in by_hand.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 3))
        loss = torch.nn.functional.cross_entropy(other(torch.from_numpy(X)), torch.from_numpy(Y))
        assert fitted.losses[epoch] == pytest.approx(float(loss.detach()), rel=1e-5)
        by_hand.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        by_hand.step()
    for name, value in weights(view).items():
        np.testing.assert_allclose(value, weights(other)[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("score", "better"),
    [((0.895, 0.5), True), ((0.91, 1.1), False), ((0.93, 2.0), True), ((0.88, 0.5), False), ((0.93, math.nan), False),
     ((0.86, 0.5), False)],
)  # fmt: skip
def test_top_1_decides_beyond_its_standard_error_and_the_loss_within(score, better):
    """0.9 of 400 samples is known to 0.015; nothing is right less often than before training."""
    training = Finetune.__new__(Finetune)
    training.shrinkage, training.held_out = None, range(400)
    training.fitted = Fitted(scores=[(0.87, 2.0), (0.9, 1.0), score], best=1)
    assert training._better() is better
    training.fitted = Fitted(scores=[(0.9, 1.0), (0.895, 0.5)])
    assert not training._better()


def test_it_learns_and_the_best_state_is_kept(stored):
    view = View()
    fitted = finetune(view, stored, Schedule(epochs=30, batch=16, learning_rate=0.1)).run()
    shares = [share for share, _ in fitted.scores]
    assert max(shares) > 0.9 > 0.6 > shares[0]
    best = fitted.best
    assert shares[best] >= max(shares) - math.sqrt(max(shares) * (1 - max(shares)) / len(X)) and not view.training
    made = view(torch.from_numpy(X)).argmax(1).numpy()
    assert (made == Y).mean() == shares[best]


def test_weights_of_volumes_are_trained_too():
    """Only those of images have a layout with channels last."""
    x = RNG.normal(size=(32, 1, 4, 4, 4)).astype(np.float32)
    view = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(32, 2))
    before = copy.deepcopy(view.state_dict())
    found = finetune(view, data(x, (x.mean((1, 2, 3, 4)) > 0).astype(int)), Schedule(epochs=2, batch=8)).run()
    assert found.losses[-1] < found.losses[0] and not torch.equal(before["0.weight"], view.state_dict()["0.weight"])


def test_a_teacher_is_enough(stored):
    """Its answers are learnt without labels."""
    teacher = X @ RNG.normal(size=(6, 4)).astype(np.float32) * 3
    rows = {row.tobytes(): answer for row, answer in zip(X, teacher, strict=True)}
    view = View(norm=False)

    def wanted(feeds):
        return {"y": np.stack([rows[row.tobytes()] for row in feeds["x"]])}

    schedule = Schedule(epochs=40, batch=16, learning_rate=0.1)
    fitted = finetune(view, stored, schedule, Loss(2.0, 0.0), wanted=wanted, labels=False).run()
    assert fitted.scores[fitted.best][1] < 0.1 * fitted.scores[0][1]
    agreement = (view(torch.from_numpy(X)).argmax(1).numpy() == teacher.argmax(1)).mean()
    assert agreement > 0.9


def killed_after(epochs: int, view: View, given: Data, schedule: Schedule, **options: Any) -> None:
    """A run that ends in the middle of the epoch after."""
    run = finetune(view, given, schedule, **options)
    steps = 0

    def wanted(feeds):
        nonlocal steps
        steps += 1
        if steps > epochs * 12 + 4 and view.training:  # 6 steps and 6 batches of judging an epoch
            raise KeyboardInterrupt
        return {}

    run.wanted = wanted
    with pytest.raises(KeyboardInterrupt):
        run.run()


def test_a_killed_run_ends_as_one_that_was_not(stored, tmp_path):
    schedule = Schedule(epochs=5, batch=16, learning_rate=0.1, augment="flip")
    whole, broken = View(), View()
    expected = finetune(whole, stored, schedule, checkpoint=tmp_path / "one", key="k").run()
    killed_after(2, broken, stored, schedule, checkpoint=tmp_path / "two", key="k")
    again = View()
    fitted = finetune(again, stored, schedule, checkpoint=tmp_path / "two", key="k").run()
    assert fitted == expected
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(value, weights(again)[name])
    done = View()
    assert finetune(done, stored, schedule, checkpoint=tmp_path / "two", key="k").run() == expected  # nothing to do


def test_a_checkpoint_of_another_run_is_refused(stored, tmp_path):
    schedule = Schedule(epochs=1, batch=16)
    finetune(View(), stored, schedule, checkpoint=tmp_path / "c", key="a").run()
    with pytest.raises(BadInput, match="is of another model, other data or other options"):
        finetune(View(), stored, schedule, checkpoint=tmp_path / "c", key="b").run()
    (tmp_path / "d").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="is no checkpoint of effc"):
        finetune(View(), stored, schedule, checkpoint=tmp_path / "d", key="b").run()


def test_a_checkpoint_that_cannot_be_read_is_not_called_bad(stored, tmp_path):
    """A folder in its place: opening it fails, and nobody is told to remove what may be a good file."""
    with pytest.raises(BadInput, match="cannot be read: Is a directory") as found:
        finetune(View(), stored, Schedule(epochs=1, batch=16), checkpoint=tmp_path, key="a").run()
    assert "remove" not in str(found.value)


def test_a_checkpoint_that_cannot_be_written_is_refused_before_training(stored, tmp_path):
    run = finetune(View(), stored, Schedule(epochs=1, batch=16), checkpoint=tmp_path / "none" / "c", key="a")
    with pytest.raises(BadInput, match=r"the checkpoint .* cannot be written: No such file or directory"):
        run.run()
    assert not run.fitted.losses


def test_patience(stored):
    schedule = Schedule(epochs=20, batch=16, learning_rate=1e-12, patience=3)
    fitted = finetune(View(norm=False), stored, schedule).run()
    assert fitted.ended == "no better state in 3 epochs" and len(fitted.losses) == fitted.best + 3


def test_no_epoch_begins_when_the_seconds_are_over(stored):
    fitted = finetune(View(norm=False), stored, Schedule(epochs=5, batch=16, seconds=1e-6)).run()
    assert fitted.ended == "after epoch 1 the 1e-06 seconds were over" and len(fitted.losses) == 1
    assert finetune(View(norm=False), stored, Schedule(epochs=1, batch=16, seconds=1e-6)).run().ended is None


@pytest.mark.parametrize("rate", [1e6, 1e30])
def test_a_loss_that_explodes_ends_training_and_the_best_state_stays(stored, rate):
    view = View(norm=False)
    before = weights(view)
    fitted = finetune(view, stored, Schedule(epochs=3, batch=16, learning_rate=rate, clip=1e9)).run()
    assert fitted.best == 0 and "in epoch 1; a lower learning rate may help" in fitted.ended
    for name, value in weights(view).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_loss_that_is_no_number_from_the_start_is_refused(stored):
    view = View(norm=False)
    with torch.no_grad():
        next(view.parameters()).fill_(float("nan"))
    with pytest.raises(BadInput, match="the loss of the model as it is given is no number"):
        finetune(view, stored, Schedule(epochs=1)).run()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (Y + 1, "hold label 4, the model has classes 0 to 3"),
        (Y - 1, "hold label -1"),
        (Y + 0.5, "one integer a sample"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, text):
    with pytest.raises(BadInput, match=text):
        finetune(View(), data(y=labels), Schedule(epochs=1)).run()


@pytest.mark.parametrize(
    ("wanted", "text"), [({"z": X}, "an output 'z' of"), ({"y": X}, r"'y' of \(96, 6\), the model one of \(96, 4\)")]
)
def test_a_teacher_with_other_outputs_is_refused(wanted, text):
    with pytest.raises(BadInput, match=text):
        finetune(View(), data(), Schedule(epochs=1), wanted=lambda feeds: wanted).run()


def test_frozen_norms_keep_their_statistics(stored):
    for frozen in (False, True):
        view = View()
        before = weights(view)
        finetune(view, stored, Schedule(epochs=5, batch=16, frozen_norms=frozen, learning_rate=0.1)).run()
        same = np.array_equal(weights(view)["net.1.running_mean"], before["net.1.running_mean"])
        assert same is frozen


def test_statistics_are_averages_over_batches():
    view = View()
    reestimate(view, ["x"], data(y=None), 32, 2)
    inner = view.net[0](torch.from_numpy(X)).detach().numpy()
    means, variances = (np.mean([f(inner[i : i + 32]) for i in (0, 32)], axis=0) for f in (
        lambda a: a.mean(axis=0), lambda a: a.var(axis=0, ddof=1),
    ))  # fmt: skip
    np.testing.assert_allclose(view.net[1].running_mean.numpy(), means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(view.net[1].running_var.numpy(), variances, rtol=1e-4)
    assert view.net[1].momentum == 0.1 and not view.training
