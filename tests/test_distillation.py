"""effc.distillation: losses against their formulas in NumPy and SciPy."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from effc.distillation import Loss, ensemble
from effc.errors import BadInput
from effc.evaluate import are_probabilities

torch = pytest.importorskip("torch")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (RNG.normal(size=(6, 5)).astype(np.float32) * 3 for _ in range(2))
LABELS = RNG.integers(0, 5, 6)


def tensors(**arrays: np.ndarray) -> dict:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_soft_and_hard_targets(temperature, share):
    found = Loss(temperature, share)(tensors(y=STUDENT), tensors(y=TEACHER), torch.from_numpy(LABELS))
    soft = entropy(softmax(TEACHER / temperature, 1), softmax(STUDENT / temperature, 1), axis=1).mean()
    hard = -log_softmax(STUDENT, 1)[np.arange(6), LABELS].mean()
    np.testing.assert_allclose(float(found), (1 - share) * temperature**2 * soft + share * hard, **CLOSE)


def test_without_labels_the_teacher_has_all_the_weight():
    made, wanted = tensors(y=STUDENT), tensors(y=TEACHER)
    np.testing.assert_allclose(float(Loss(2.0, 0.5)(made, wanted, None)), float(Loss(2.0, 0.0)(made, wanted, None)))


def test_at_high_temperatures_logits_are_matched():
    """Hinton et al., section 2.1: the gradient tends to (z - v) / N, for centred logits and T^2 counted in."""
    z, v = (a.astype(np.float64) - a.mean(1, keepdims=True) for a in (STUDENT, TEACHER))
    student = torch.from_numpy(z).requires_grad_()
    Loss(1e3, 0.0)({"y": student}, {"y": torch.from_numpy(v)}, None).backward()
    np.testing.assert_allclose(student.grad.numpy(), (z - v) / 5 / len(z), rtol=0.02, atol=1e-4)


def test_probabilities_count_by_their_logarithm():
    shares = {"made": softmax(STUDENT, 1), "wanted": softmax(TEACHER, 1)}
    loss = Loss(3.0, 0.0, probabilities=frozenset({"y"}))
    found = loss(tensors(y=shares["made"]), tensors(y=shares["wanted"]), None)
    logits = Loss(3.0, 0.0)(tensors(y=STUDENT), tensors(y=TEACHER), None)
    np.testing.assert_allclose(float(found), float(logits), rtol=1e-4)


def test_other_outputs_by_relative_squared_error_and_outputs_are_averaged():
    boxes = RNG.normal(size=(2, 6, 7, 4)).astype(np.float32)
    found = Loss(1.0, 0.0)(tensors(y=STUDENT, box=boxes[0]), tensors(y=TEACHER, box=boxes[1]), None)
    soft = entropy(softmax(TEACHER, 1), softmax(STUDENT, 1), axis=1).mean()
    off = np.sum((boxes[0] - boxes[1]) ** 2) / np.sum(boxes[1] ** 2)
    np.testing.assert_allclose(float(found), (soft + off) / 2, **CLOSE)


def test_features_count_by_their_relative_squared_error():
    a, b = (torch.from_numpy(RNG.normal(size=(6, 3, 4)).astype(np.float32)) for _ in range(2))
    made, wanted = tensors(y=STUDENT), tensors(y=TEACHER)
    more = float(Loss(1.0, 0.0, features=2.0)(made, wanted, None, [(a, b), (b, b)])) - float(
        Loss(1.0, 0.0)(made, wanted, None)
    )
    np.testing.assert_allclose(more, 2 * float(((a - b) ** 2).sum() / (b**2).sum()), rtol=1e-4)


def test_what_teachers_say_together():
    other = RNG.normal(size=(6, 5)).astype(np.float32)
    shares = [softmax(a.astype(np.float64), 1) for a in (TEACHER, other)]
    arithmetic = ensemble([{"y": TEACHER}, {"y": other}], "arithmetic")["y"]
    np.testing.assert_allclose(softmax(arithmetic, 1), np.mean(shares, axis=0), rtol=1e-5)
    geometric = ensemble([{"y": TEACHER}, {"y": other}], "geometric")["y"]
    product = np.sqrt(shares[0] * shares[1])
    np.testing.assert_allclose(softmax(geometric, 1), product / product.sum(1, keepdims=True), rtol=1e-5)
    for mean, expected in (
        ("arithmetic", np.mean(shares, axis=0)),
        ("geometric", product / product.sum(1, keepdims=True)),
    ):
        found = ensemble([{"y": s.astype(np.float32)} for s in shares], mean)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert are_probabilities(found)
    boxes = RNG.normal(size=(2, 6, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(ensemble([{"b": b} for b in boxes], "geometric")["b"], boxes.mean(0), rtol=1e-6)


def test_one_teacher_is_taken_at_its_word():
    assert ensemble([{"y": TEACHER}], "arithmetic")["y"] is TEACHER


@pytest.mark.parametrize(
    ("other", "text"),
    [({"y": STUDENT[:, :4]}, r"'y' of \(6, 5\), another one of \(6, 4\)"), ({"z": STUDENT}, "another only z")],
)
def test_teachers_must_match(other, text):
    with pytest.raises(BadInput, match=text):
        ensemble([{"y": TEACHER}, other], "arithmetic")
