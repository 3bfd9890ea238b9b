"""Gradients sample by sample: against a loop over autograd, the curvature that their squares come close to, units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from effc.backends.torch import Torch
from effc.capture import from_proto
from effc.channels import channels
from effc.errors import BadInput
from effc.runtime import Slice
from tests.networks import NETWORKS, agree, feeds, scores_of

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")
TORCH = Torch()
RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 6)).astype(np.float32)
Y = RNG.integers(0, 4, 12)


def by_hand(view, x: np.ndarray, labels: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Gradients of the cross entropy, one sample after another."""
    rows = []
    for sample, label in zip(x, labels, strict=True):
        view.zero_grad()
        scores = view(torch.from_numpy(sample[None]))
        torch.nn.functional.cross_entropy(scores, torch.tensor([label])).backward()
        rows.append({name: w.grad.numpy().copy() for name, w in TORCH.weights(view).items()})
    return rows


def test_means_and_squares_are_those_of_single_samples():
    view = TORCH.view(from_proto(scores_of(6, 8, 4)))
    found = TORCH.gradients(view, [{"x": X[:5]}, {"x": X[5:]}], [Y[:5], Y[5:]])
    rows = by_hand(view, X, Y)
    for name in TORCH.weights(view):
        each = np.stack([row[name] for row in rows])
        agree(found.mean[name], each.mean(0), 1e-5)
        agree(found.squares[name], (each**2).mean(0), 1e-5)
        assert (
            np.abs(found.squares[name] - each.mean(0) ** 2).max() > 0.1 * found.squares[name].max()
        )  # not of the mean
    assert found.taylor.size == 0


@pytest.mark.parametrize("axis", [0, 1, None])
def test_units_add_up_before_they_are_squared(axis):
    """Rows of one weight with the bias and the columns of the next, as channels are; labels of single numbers."""
    view = TORCH.view(from_proto(scores_of(6, 8, 4)))
    shapes = {"fc0.weight": (8, 6), "fc0.bias": (8,), "fc1.weight": (4, 8)}
    rows = by_hand(view, X, Y)
    weights = {name: w.detach().numpy() for name, w in TORCH.weights(view).items()}
    if axis == 0:  # unit 2 left out
        number = np.array([0, 1, -1, 2, 3, 4, 5, 6])
        slices = [Slice("fc0.weight", 0, number), Slice("fc0.bias", 0, number), Slice("fc1.weight", 1, number)]
        labels = [np.broadcast_to(number[:, None], (8, 6)), number, np.broadcast_to(number, (4, 8))]
    else:
        first = np.arange(6) if axis == 1 else RNG.integers(-1, 5, (8, 6))
        slices = [Slice("fc0.weight", axis, first)]
        labels = [np.broadcast_to(first, (8, 6))]
    found = TORCH.gradients(view, [{"x": X}], [Y], units=slices)
    count = max(int(s.units.max()) for s in slices) + 1
    sums = np.zeros((len(X), count))
    for s, each in zip(slices, labels, strict=True):
        assert each.shape == shapes[s.weight]
        for n, row in enumerate(rows):
            for unit in range(count):
                sums[n, unit] += (row[s.weight] * weights[s.weight])[each == unit].sum()
    agree(found.products, sums.mean(0), 1e-5)
    agree(found.taylor, np.abs(sums).mean(0), 1e-5)
    agree(found.fisher, (sums**2).mean(0), 1e-5)


def test_drawn_targets_give_the_curvature_of_the_last_layer():
    """E g^2 = E p (1 - p) x^2 over draws; 12 samples seen 200 times, to 15 % of the largest."""
    view = TORCH.view(from_proto(scores_of(6, 4)))
    many = np.repeat(X, 200, axis=0)
    found = TORCH.gradients(view, [{"x": many}], seed=1).squares["fc0.weight"]
    agree(found, TORCH.curvature(view, [{"x": X}])["fc0.weight"], 0.15)


def test_drawn_targets_of_other_outputs_give_the_curvature_too():
    """Squared error of an output that is no class score, to 15 %."""
    view = TORCH.view(from_proto(scores_of(6, 1)))
    many = np.repeat(X, 200, axis=0)
    found = TORCH.gradients(view, [{"x": many}], seed=1).squares["fc0.weight"]
    agree(found, TORCH.curvature(view, [{"x": X}])["fc0.weight"], 0.15)


def test_the_seed_decides_the_draws():
    view = TORCH.view(from_proto(scores_of(6, 4)))
    first, same, other = (TORCH.gradients(view, [{"x": X}], seed=s).mean["fc0.weight"] for s in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_the_units_of_a_residual_network_are_those_of_its_channels():
    """What `effc.channels` calls a unit is one here."""
    proto = NETWORKS["residual"]()
    model = from_proto(proto)
    view = TORCH.view(model)
    places = channels(model).weights
    trained = {name for name, w in TORCH.weights(view).items() if w.requires_grad}
    slices = [Slice(place.weight, place.axis, units) for place, units in places.items() if place.weight in trained]
    found = TORCH.gradients(view, [feeds(proto, batch=3)], units=slices)
    assert found.fisher.shape == (1 + max(int(s.units.max()) for s in slices),)
    shown = np.unique(np.concatenate([s.units for s in slices]))
    assert (found.fisher[shown[shown >= 0]] > 0).any() and (found.fisher >= found.taylor**2 - 1e-9).all()


def test_what_does_not_fit_is_refused():
    view, one = TORCH.view(from_proto(scores_of(6, 4))), TORCH.view(from_proto(scores_of(6, 1)))
    with pytest.raises(BadInput, match=r"no trained weight 'w' to take units of; there are fc0\.weight, fc0\.bias"):
        TORCH.gradients(view, [{"x": X}], units=[Slice("w", 0, np.arange(4))])
    with pytest.raises(BadInput, match=r"units of 'fc0.weight' are \(5,\), along axis 0 there are \(4,\)"):
        TORCH.gradients(view, [{"x": X}], units=[Slice("fc0.weight", 0, np.arange(5))])
    with pytest.raises(BadInput, match="labels need an output of class scores"):
        TORCH.gradients(one, [{"x": X}], [Y])
