"""Scores against scikit-learn, SciPy and NumPy, computed on all samples at once; what is refused, with its text."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from effc.data import Data, open_data
from effc.errors import BadInput
from effc.evaluate import Score, are_probabilities, damage, divergence, evaluate, paired_p

SAMPLES, CLASSES = 70, 12


class Linear:
    """A session: scores x W, and what it was fed."""

    def __init__(self, weight: np.ndarray, probabilities: bool = False, **more) -> None:
        self.weight, self.probabilities, self.more, self.fed = weight, probabilities, more, []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.fed.append(len(feeds["x"]))
        scores = feeds["x"] @ self.weight
        scores = softmax(scores, axis=1) if self.probabilities else scores
        return {"scores": scores} | {name: f(feeds["x"]) for name, f in self.more.items()}


RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(SAMPLES, 6)).astype(np.float32), RNG.integers(0, CLASSES, SAMPLES)
WA = RNG.normal(size=(6, CLASSES)).astype(np.float32)
WB = WA + 0.3 * RNG.normal(size=WA.shape).astype(np.float32)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    return open_data(f"{tmp_path / 'd.npz'}{{labels=y}}")


@pytest.fixture
def unlabelled(tmp_path: Path) -> Data:
    np.savez(tmp_path / "u.npz", x=X)
    return open_data(tmp_path / "u.npz")


def both(data: Data, metric: str | None = None, batch: int | None = None, **more) -> tuple[Score, Score]:
    models = {"a": Linear(WA, **more), "b": Linear(WB, **more)}
    scores = evaluate(models, data, batch=batch, reference="a", metric=metric)
    return scores["a"], scores["b"]


# --- metrics against references -------------------------------------------------------------------------------------


def test_top1_agreement_and_damage(data):
    a, b = both(data)
    assert b.metric == "top1"
    assert b.value == accuracy_score(Y, (X @ WB).argmax(1))
    assert a.value == accuracy_score(Y, (X @ WA).argmax(1))
    assert b.agreement == accuracy_score((X @ WA).argmax(1), (X @ WB).argmax(1))
    kl = entropy(softmax((X @ WA).astype(float), 1), softmax((X @ WB).astype(float), 1), axis=1).mean()
    assert b.damage == pytest.approx(kl, rel=1e-12)
    assert (a.damage, a.agreement, b.samples) == (0, 1, SAMPLES)
    assert b.points == 100 * b.value
    assert b.higher_is_better
    np.testing.assert_array_equal(b.per_sample, (X @ WB).argmax(1) == Y)


def test_top5(data):
    _, b = both(data, "top5")
    assert b.value == top_k_accuracy_score(Y, X @ WB, k=5, labels=range(CLASSES))


def test_top5_ties_go_to_the_lower_class(data):
    constant = Linear(np.zeros_like(WA))
    score = evaluate({"a": constant}, data, reference="a", metric="top5")["a"]
    np.testing.assert_array_equal(score.per_sample, Y < 5)


def test_agreement_is_the_default_without_labels(unlabelled):
    _, b = both(unlabelled)
    assert (b.metric, b.value) == ("agreement", accuracy_score((X @ WA).argmax(1), (X @ WB).argmax(1)))


def test_kl_sqnr_and_cosine(data):
    A, B = (X @ WA).astype(float), (X @ WB).astype(float)
    kl, sqnr, cosine = (both(data, metric)[1] for metric in ("kl", "sqnr", "cosine"))
    assert kl.value == kl.damage == kl.points
    assert not kl.higher_is_better
    assert sqnr.value == pytest.approx(10 * np.log10((A**2).sum() / ((A - B) ** 2).sum()), rel=1e-12)
    expected = (A * B).sum(1) / np.linalg.norm(A, axis=1) / np.linalg.norm(B, axis=1)
    assert cosine.value == pytest.approx(expected.mean(), rel=1e-12)
    assert both(data, "sqnr")[0].value == math.inf
    assert both(data, "cosine")[0].value == pytest.approx(1, abs=1e-12)


def test_probabilities_are_taken_as_they_are(data):
    logits, shares = both(data)[1], both(data, probabilities=True)[1]
    assert shares.damage == pytest.approx(logits.damage, rel=1e-4)  # float32 probabilities


def test_divergence_is_stable_and_never_infinite_for_finite_outputs():
    a = np.array([[1000.0, 0, -1000], [0, 0, 0]])
    b = np.array([[999.0, 0, -1000], [1, 0, 0]])
    expected = entropy(softmax(a, 1), softmax(b, 1), axis=1)
    np.testing.assert_allclose(divergence(a, b), expected, rtol=0, atol=1e-12)
    shares = divergence(np.array([[0.5, 0.5, 0.0]]), np.array([[1.0, 0.0, 0.0]]))
    assert 10 < shares[0] < 100  # half of the mass sits where the other rounded to nothing
    assert divergence(np.array([[0.5, 0.5]]), np.array([[np.nan, 0.5]]))[0] == math.inf


def test_outputs_that_are_no_class_scores(unlabelled):
    boxes = {"a": lambda x: x[:, :, None] * 2, "b": lambda x: x[:, :, None] * 2.2}

    class Boxes(Linear):
        def run(self, feeds):
            return {"boxes": boxes[self.more["kind"]](feeds["x"]), "sizes": feeds["x"][:, 0]}

    scores = evaluate({k: Boxes(WA, kind=k) for k in boxes}, unlabelled, reference="a")
    assert scores["b"].metric == "sqnr"
    assert scores["b"].agreement is None
    assert scores["b"].damage == pytest.approx(0.01 / 2, rel=1e-5)  # two outputs, one of them equal
    assert scores["b"].value == pytest.approx(-10 * math.log10(0.01 / 2), rel=1e-5)


def test_damage_of_outputs_at_hand():
    """Two batches of unlike length; class scores alone count where there are any, else relative squared errors."""
    A, B, rng = X @ WA, X @ WB, np.random.default_rng(1)
    parts = [slice(0, 50), slice(50, SAMPLES)]
    a, b = ([{"scores": each[part], "box": rng.normal(size=(70, 2, 2))[part]} for part in parts] for each in (A, B))
    kl = entropy(softmax(A.astype(float), 1), softmax(B.astype(float), 1), axis=1).mean()
    assert damage(b, a) == pytest.approx(kl, rel=1e-12)
    assert damage(a, a) == damage(b, b) == 0
    boxes = [[{"box": batch["box"]} for batch in each] for each in (a, b)]
    wanted, found = (np.concatenate([batch["box"] for batch in each]) for each in boxes)
    assert damage(boxes[1], boxes[0]) == pytest.approx(np.sum((wanted - found) ** 2) / np.sum(wanted**2), rel=1e-12)
    assert damage([{"scores": np.full((2, 3), np.nan)}], [{"scores": np.ones((2, 3))}]) == math.inf
    with pytest.raises(ValueError, match="longer"):
        damage(a[:1], a)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8, 70, 100])
def test_a_fixed_batch_is_padded_and_the_surplus_dropped(data, batch):
    free, fixed = both(data)[1], both(data, batch=batch)[1]
    models = {"a": Linear(WA)}
    evaluate(models, data, batch=batch, reference="a")
    assert set(models["a"].fed) == {batch}
    assert (fixed.value, fixed.agreement, fixed.samples) == (free.value, free.agreement, free.samples)
    assert fixed.damage == pytest.approx(free.damage, rel=1e-6)


def test_an_output_without_a_batch_is_compared_as_a_whole(data):
    _, b = both(data, "cosine", batch=8, total=lambda x: x.sum(axis=0, keepdims=True)[:, :, None])
    assert b.value > 0.9
    assert b.samples == SAMPLES


def test_progress_is_told(data):
    told = []

    def progress(what, total=None):
        told.append((what, total))
        return told.append

    evaluate({"a": Linear(WA)}, data, reference="a", progress=progress)
    assert told == [("evaluating", SAMPLES), 32, 32, 6]


# --- own metrics ----------------------------------------------------------------------------------------------------

OWN = """
import numpy as np
def margin(outputs, labels, reference):
    scores = np.sort(outputs["scores"], axis=1)
    return scores[:, -1] - scores[:, -2]
def short(outputs, labels, reference):
    return [1.0]
def broken(outputs, labels, reference):
    return outputs["nothing"]
"""


def test_own_metric(tmp_path, data):
    (tmp_path / "own.py").write_text(OWN)
    _, b = both(data, f"{tmp_path / 'own.py'}:margin")
    ranked = np.sort(X @ WB, axis=1)
    assert b.value == pytest.approx((ranked[:, -1] - ranked[:, -2]).astype(float).mean(), rel=1e-6)
    assert b.points == b.value
    named = open_data(f"{tmp_path / 'd.npz'}{{labels=y, metric='{tmp_path / 'own.py'}:margin'}}")
    assert both(named)[1] == b
    with pytest.raises(BadInput, match=r"short' returned \(1,\): it must return 32 finite numbers"):
        both(data, f"{tmp_path / 'own.py'}:short")
    with pytest.raises(BadInput, match=r"broken' raised KeyError: 'nothing'"):
        both(data, f"{tmp_path / 'own.py'}:broken")


# --- what is wrong with outputs, labels, metrics --------------------------------------------------------------------


def test_nan_counts_as_wrong_in_a_model_and_is_refused_of_the_reference(data):
    bad = WB.copy()
    bad[:, 3] = np.nan
    scores = evaluate({"a": Linear(WA), "b": Linear(bad)}, data, reference="a")
    assert (scores["b"].value, scores["b"].agreement, scores["b"].damage) == (0, 0, math.inf)
    with pytest.raises(BadInput, match="'scores' of the reference model holds NaN or infinity"):
        evaluate({"a": Linear(WA), "b": Linear(bad)}, data, reference="b")


def test_outputs_must_match(data):
    with pytest.raises(BadInput, match=r"output 'scores' of \(32, 12\), a model beside it one of \(32, 7\)"):
        evaluate({"a": Linear(WA), "b": Linear(WA[:, :7])}, data, reference="a")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (Y + 1, "hold label 12, the model has classes 0 to 11: count labels from 0"),
        (Y - 1, "hold label -1, the model has classes 0 to 11"),
        (Y + 0.5, r"are float64 \(32,\): needed is one integer a sample"),
        (np.eye(CLASSES)[Y], r"are float64 \(32, 12\): needed is one integer a sample"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, text):
    np.savez(tmp_path / "l.npz", x=X, y=labels)
    with pytest.raises(BadInput, match=text):
        both(open_data(f"{tmp_path / 'l.npz'}{{labels=y}}"))


def test_labels_may_be_a_column(tmp_path, data):
    np.savez(tmp_path / "l.npz", x=X, y=Y[:, None].astype(np.float32))
    assert both(open_data(f"{tmp_path / 'l.npz'}{{labels=y}}"))[1].value == both(data)[1].value


def test_metrics_that_cannot_be_had(data, unlabelled):
    with pytest.raises(BadInput, match="metric top1 needs labels, and data 'u' have none: name them under labels"):
        both(unlabelled, "top1")
    with pytest.raises(BadInput, match="metric 'f1': allowed are top1, top5"):
        both(data, "f1")

    class Vector(Linear):
        def run(self, feeds):
            return {"v": feeds["x"][:, :1]}

    with pytest.raises(BadInput, match=r"top1 needs class scores \[N, C > 1\], the model gives v \(32, 1\): take sqnr"):
        evaluate({"a": Vector(WA)}, data, reference="a", metric="top1")


# --- McNemar --------------------------------------------------------------------------------------------------------


def flags(*right: int) -> Score:
    per_sample = np.array(right, bool)
    return Score("top1", float(per_sample.mean()), len(right), None, 0.0, per_sample)


def test_exact_mcnemar():
    a, b = flags(*[1] * 9, *[0] * 2, *[1] * 50), flags(*[0] * 9, *[1] * 2, *[1] * 50)
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11
    assert paired_p(a, b) == pytest.approx(2 * tail, rel=1e-12)
    assert paired_p(b, a) == paired_p(a, b)
    assert paired_p(a, a) == 1
    with pytest.raises(BadInput, match="it needs top1, top5, agreement on the same samples"):
        paired_p(a, flags(1, 0))


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize(
    ("model", "data", "top1"),
    [("resnet20-cifar10", "cifar10-test", 0.8122), ("mobilenet_v1_025-imagenet", "imagenet-500", 0.564)],
)
def test_stated_accuracy_of_real_models(model, data, top1):
    folder = Path(os.environ["EFFC_DATA"])
    runtime = onnxruntime.InferenceSession(folder / "models" / f"{model}.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in runtime.get_outputs()]

    class Real:
        def run(self, feeds):
            (feed,) = feeds.values()
            outputs = runtime.run(None, {runtime.get_inputs()[0].name: feed})
            return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}

    score = evaluate({"a": Real()}, open_data(folder / "data" / f"{data}.yaml"), reference="a")["a"]
    assert score.value == pytest.approx(top1, abs=1e-9)


def test_what_probabilities_are():
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * 3
    assert are_probabilities(softmax(logits, 1)) and not are_probabilities(logits)
    assert not are_probabilities(np.ones((3, 1), np.float32)) and not are_probabilities(np.eye(3, dtype=np.int64))
