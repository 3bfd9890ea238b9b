"""effc.passes._unit_saliency against the formulas, unit by unit, in NumPy and PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from effc.capture import from_proto
from effc.contract import Context
from effc.data import open_data
from effc.errors import BadInput
from effc.model import Model
from effc.passes._unit_saliency import by_saliency
from effc.passes._widths import Coupled, prunable
from effc.registry import backend
from effc.target import find
from tests.networks import NETWORKS, Net

EQUAL = 1e-5


def two(norm: bool = False) -> onnx.ModelProto:
    net = Net("two")
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 3, name="a")
    x = net.relu(net.norm(x, 8, name="bn") if norm else x)
    net.head(net.relu(net.conv(x, 8, 6, 1, name="b")), 6)
    return net.model()


def opened(proto: onnx.ModelProto, samples: int = 0) -> tuple[Model, list[Coupled], Context]:
    model = from_proto(proto)
    data = None
    if samples:
        x = np.random.default_rng(0).standard_normal((samples, 3, 6, 6)).astype(np.float32)
        data = open_data({"source": {"x": x}})
    groups = [item for item in prunable(model) if isinstance(item, Coupled)]
    return model, groups, Context(model, find("onnxruntime-avx2"), backend("onnxruntime"), calibration=data)


def filters(model: Model, name: str) -> np.ndarray:
    return model.graph.initializers[f"{name}.weight"].const_value.numpy().astype(np.float64).reshape(-1, 27)


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None] - rows[None], axis=2).sum(axis=1)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("l1", lambda w: np.abs(w).sum(axis=1)),
        ("l2", lambda w: np.linalg.norm(w, axis=1)),
        ("geometric-median", distances),
    ],
)
def test_saliencies_of_filters(kind, formula):
    model, groups, context = opened(two())
    expected = formula(filters(model, "a"))
    found = by_saliency(kind, model, groups, context)[groups[0].name]
    order = np.argsort(expected)[:7]
    np.testing.assert_array_equal(found.units, np.asarray(groups[0].group.units)[order])
    np.testing.assert_allclose(found.damage, np.append(0, np.cumsum(expected[order])) / expected.mean(), rtol=EQUAL)
    assert not found.scaled


def test_filters_of_all_makers_count():
    """Behind a sum, a unit is made by both of its terms."""
    model, groups, context = opened(NETWORKS["residual"]())
    stem = next(g for g in groups if len(g.makers) > 1)
    weights = [model.node(name).inputs[1].const_value.numpy() for name in stem.makers]
    expected = sum(np.abs(w.reshape(len(w), -1)).sum(axis=1) for w in weights)
    found = by_saliency("l1", model, [stem], context)[stem.name]
    np.testing.assert_array_equal(found.units, np.asarray(stem.group.units)[np.argsort(expected)[:-1]])


def test_batch_norms_scale():
    proto = two(norm=True)
    model, groups, context = opened(proto)
    scale = np.abs(next(model.nodes("BatchNormalization")).inputs[1].const_value.numpy())
    found = by_saliency("batch-norm", model, groups[:1], context)[groups[0].name]
    np.testing.assert_array_equal(found.units, np.asarray(groups[0].group.units)[np.argsort(scale)[:-1]])
    with pytest.raises(BadInput, match="no batch norm scales the channels of 'node_b'; take another"):
        by_saliency("batch-norm", model, groups, context)


def test_random_is_the_same_for_the_same_seed():
    model, groups, context = opened(two())
    first, again = (by_saliency("random", model, groups, context) for _ in range(2))
    context.seed = 1
    other = by_saliency("random", model, groups, context)
    np.testing.assert_array_equal(first["node_a"].units, again["node_a"].units)
    assert (first["node_a"].units != other["node_a"].units).any()


@pytest.mark.parametrize("kind", ["taylor", "fisher"])
def test_gradients_need_data(kind):
    model, groups, context = opened(two())
    with pytest.raises(BadInput, match=f"saliency={kind} needs calibration data: give --calibrate SPEC"):
        by_saliency(kind, model, groups, context)


def test_labels_need_to_be_there():
    pytest.importorskip("torch")
    model, groups, context = opened(two(), samples=4)
    with pytest.raises(BadInput, match="labels=true needs calibration data with labels"):
        by_saliency("taylor", model, groups, context, labels=True)


def test_dead_units_are_worth_nothing():
    """A filter whose output never leaves zero has no gradient; what is worth most stays."""
    pytest.importorskip("torch")
    proto = two()
    weight = next(t for t in proto.graph.initializer if t.name == "a.weight")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[3] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "a.weight"))
    model, groups, context = opened(proto, samples=8)
    for kind in ("taylor", "fisher", "obd"):
        found = by_saliency(kind, model, groups, context)["node_a"]
        assert found.units[0] == groups[0].group.units[3] and found.damage[1] == 0 and found.damage[2] > 0
        assert found.scaled


def test_fisher_is_half_the_mean_square_of_a_common_factors_gradient():
    """Against finite differences of the loss by a factor on a filter, sample by sample."""
    pytest.importorskip("torch")
    import torch

    from effc.registry import trainer

    model, groups, context = opened(two(), samples=6)
    x = next(iter(context.calibration.for_model(model).batches(6))).feeds["x"]
    labels = np.arange(6) % 5
    view = trainer().view(model)
    weight = trainer().weights(view)["a.weight"]
    expected = np.zeros(8)
    for unit in range(8):
        losses = []
        for factor in (1 + 1e-2, 1 - 1e-2):
            with torch.no_grad():
                kept = weight[unit].clone()
                weight[unit] *= factor
                made = view(torch.from_numpy(x))
                losses.append(torch.nn.functional.cross_entropy(made, torch.from_numpy(labels), reduction="none"))
                weight[unit] = kept
        slope = ((losses[0] - losses[1]) / 2e-2).double().numpy()
        expected[unit] = 0.5 * np.mean(slope**2)
    context.calibration = open_data({"source": {"x": x, "y": labels}, "labels": "y"})
    found = by_saliency("fisher", model, groups[:1], context, labels=True)["node_a"]
    order = np.argsort(expected)[:7]
    np.testing.assert_array_equal(found.units, np.asarray(groups[0].group.units)[order])
    np.testing.assert_allclose(np.diff(found.damage), expected[order], rtol=0.02)
