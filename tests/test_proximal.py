"""effc.proximal: the operator against NumPy, groups against loops, the goal reached step by step."""

import numpy as np
import pytest

from effc.proximal import REACHED, Family, Part, Shrinkage, shrunk

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)


def tensor(*shape: int, trained: bool = True):
    return torch.nn.Parameter(torch.from_numpy(RNG.normal(size=shape).astype(np.float32)), requires_grad=trained)


def layer(name: str, *shape: int) -> tuple[Family, dict]:
    """A convolution whose groups are the places of its patch."""
    count = int(np.prod(shape[1:]))
    part = Part(name, np.arange(count).reshape(1, *shape[1:]))
    return Family(name, count, (part,)), {name: tensor(*shape)}


def array(parameter) -> np.ndarray:
    return parameter.detach().numpy().astype(np.float64)


def lamp(norms: np.ndarray) -> np.ndarray:
    """By its definition, group by group; the largest stays."""
    scores = np.array([n**2 / (norms[norms >= n] ** 2).sum() for n in norms])
    scores[norms.argmax()] = np.inf
    return scores


@pytest.mark.parametrize("by", [0.0, 0.3, 1.0, 100.0])
def test_the_operator_minimises_what_it_says(by):
    """prox(w) is the least of |v - w|^2 / 2 + by |v| over v: no v near it, nor zero, is better. Bound: rounding."""
    w = RNG.normal(size=(20, 6))
    norms = np.linalg.norm(w, axis=1)
    factors = shrunk(torch.from_numpy(norms), torch.full((20,), by, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(factors, np.maximum(0, 1 - by / norms), atol=1e-15)

    def value(v):
        return ((v - w) ** 2).sum(axis=1) / 2 + by * np.linalg.norm(v, axis=1)

    least = value(w * factors[:, None])
    assert (least <= value(np.zeros_like(w)) + 1e-12).all()
    for _ in range(50):
        assert (least <= value(w * factors[:, None] + 1e-3 * RNG.normal(size=w.shape)) + 1e-12).all()


def test_a_vector_of_zeros_stays_one():
    zero = torch.zeros(1, dtype=torch.float64)
    assert shrunk(zero, zero).tolist() == [0.0]


def test_norms_of_groups_are_those_of_their_weights():
    """One over two weights along different axes, with numbers that belong to no group; one weight is not trained."""
    weights = {"made": tensor(4, 3), "scale": tensor(4), "read": tensor(5, 6), "fixed": tensor(4, trained=False)}
    parts = (
        Part("made", np.array([[0], [1], [-1], [2]])), Part("scale", np.array([0, 1, -1, 2])),
        Part("read", np.array([[0, 0, 1, 1, 2, -1]])), Part("fixed", np.array([0, 1, -1, 2])),
        Part("none", np.array([0])),
    )  # fmt: skip
    shrinkage = Shrinkage([Family("units", 3, parts)], weights, 0.5)
    made, scale, read = (array(weights[n]) for n in ("made", "scale", "read"))
    rows = [
        (made[i] ** 2).sum() + scale[i] ** 2 + (read[:, c] ** 2).sum() for i, c in ((0, [0, 1]), (1, [2, 3]), (3, 4))
    ]
    np.testing.assert_allclose(shrinkage.norms().numpy(), np.sqrt(rows), rtol=1e-6)


def test_a_step_against_numpy():
    """Two layers of very different scale: the groups with the lowest scores shrink by a share of their largest."""
    (one, weights), (two, more) = layer("a", 7, 3, 2, 2), layer("b", 4, 5)
    weights |= more
    with torch.no_grad():
        weights["b"].mul_(1e-12)
    shrinkage = Shrinkage([one, two], weights, 0.6)
    assert shrinkage.count == 17 and shrinkage.aim == 10
    before = {n: array(w).reshape(len(w), -1) for n, w in weights.items()}
    steps, step = 40, 9
    number = round(10 * (1 - (1 - (step + 1) / steps / REACHED) ** 3))
    norms = np.concatenate([np.linalg.norm(before[n], axis=0) for n in "ab"])
    least = np.argsort(np.concatenate([lamp(norms[:12]), lamp(norms[12:])]))[:number]
    factors = np.ones(17)
    for own in (least[least < 12], least[least >= 12]):
        by = norms[own].max(initial=0) / (0.05 * steps)
        factors[own] = np.maximum(0, 1 - by / norms[own])
    assert 0 < (factors < 1).sum() == number < 17 and {0, 1} == set((least >= 12).astype(int))
    shrinkage.step(step, steps)
    for name, own in (("a", factors[:12]), ("b", factors[12:])):
        np.testing.assert_allclose(
            array(weights[name]).reshape(len(weights[name]), -1), before[name] * own, rtol=1e-5, atol=0
        )


def train(shrinkage, weights, steps: int, begin: int = 0, seed: int = 0) -> list[int]:
    """Steps towards random targets; how many groups are zero after each."""
    targets = {n: torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(w.shape))) for n, w in weights.items()}
    zeros = []
    for step in range(begin, steps):
        with torch.no_grad():
            for name, weight in weights.items():
                weight += 0.05 * (targets[name] - weight)
        shrinkage.step(step, steps)
        zeros.append(int((shrinkage.norms() == 0).sum()))
    return zeros


def test_the_goal_is_reached_and_zeros_stay_zero():
    families, weights = [], {}
    for number in range(3):
        family, own = layer(f"layer{number}", 6, 4, 3, 3)
        families.append(family)
        weights |= own
    shrinkage = Shrinkage(families, weights, 0.7)
    zeros = train(shrinkage, weights, 200)
    first = next(i for i in range(200) if shrinkage.settled((i + 1) / 200))
    assert first == int(REACHED * 200) - 1
    assert zeros[:5] == [0] * 5 and max(zeros[:first]) > 20 and set(zeros[first:]) == {round(0.7 * 108)}
    assert shrinkage.cut is not None and shrinkage.cut[0] < 76 and shrinkage.cut[1] < 1
    assert all((shrinkage.norms()[36 * n : 36 * n + 36] > 0).any() for n in range(3))


def test_the_largest_group_of_each_family_stays():
    families, weights = zip(*(layer(f"layer{n}", 2, 3) for n in range(4)), strict=True)
    weights = {name: weight for own in weights for name, weight in own.items()}
    shrinkage = Shrinkage(families, weights, 0.99)
    assert shrinkage.aim == 8
    assert train(shrinkage, weights, 40)[-1] == 8
    assert ((shrinkage.norms().reshape(4, 3) > 0).sum(dim=1) == 1).all()


def test_a_layer_that_is_not_trained_does_not_count():
    (one, weights), (two, more) = layer("a", 3, 4), layer("b", 3, 4)
    more["b"].requires_grad_(False)
    shrinkage = Shrinkage([one, two], weights | more, 0.5)
    assert shrinkage.count == 4 and shrinkage.aim == 2
    shrinkage.step(0, 1)
    assert int((array(weights["a"]) == 0).all(axis=0).sum()) == 2 and array(more["b"]).all()


def test_a_layer_of_zeros_is_no_hindrance():
    family, weights = layer("a", 3, 4)
    with torch.no_grad():
        weights["a"].zero_()
    shrinkage = Shrinkage([family], weights, 0.5)
    for step in range(4):
        shrinkage.step(step, 4)
    assert not weights["a"].detach().any() and shrinkage.cut == (0, 0.0)


@pytest.mark.parametrize("at", [0, 30, 80])
def test_going_on_is_the_same_as_never_having_stopped(at):
    """Nothing but the weights and the number of the step decides: on either side of reaching the goal."""
    family, weights = layer("a", 5, 4, 3, 3)
    start = weights["a"].detach().clone()
    whole = Shrinkage([family], weights, 0.6)
    train(whole, weights, 100)
    other = {"a": torch.nn.Parameter(start.clone())}
    first = Shrinkage([family], other, 0.6)
    targets = torch.from_numpy(np.random.default_rng(0).normal(size=tuple(start.shape)))
    for step in range(at):
        with torch.no_grad():
            other["a"] += 0.05 * (targets - other["a"])
        first.step(step, 100)
    again = Shrinkage([family], other, 0.6)
    again.resume(at / 100)
    train(again, other, 100, begin=at)
    np.testing.assert_array_equal(array(weights["a"]), array(other["a"]))
