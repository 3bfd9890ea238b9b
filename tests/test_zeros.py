"""effc.zeros: pruned weights stay zero through `recover`, unless they are to be trained as well."""

import numpy as np
import pytest

from effc import api, registry
from effc.capture import from_proto
from effc.zeros import hold_zeros
from tests.networks import NETWORKS, Net

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

HOW = "epochs=3, batch=16, learning_rate=0.01, validation=0.25, frozen_norms=true"


def classifier():
    """24 -> 32 -> 5 behind a batch norm."""
    net = Net("classifier")
    x = net.norm(net.linear(net.input("x", ["N", 24]), 24, 32, name="fc1"), 32, name="bn")
    net.output(net.linear(net.relu(x), 32, 5, name="fc2"), ["N", 5])
    return net.model()


def data() -> dict:
    """512 samples of 6 causes: weights can make up for each other."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(512, 6)) @ rng.normal(size=(6, 24)) / 2 + 0.3 * rng.normal(size=(512, 24))).astype(np.float32)
    return {"source": lambda: iter([{"x": x}])}


def optimize(recipe: str, **options) -> api.Result:
    settings = {
        "measure": False,
        "force": True,
        "target_name": "onnxruntime-avx2",
        "train": data(),
        "calibrate": data(),
    }
    return api.optimize(classifier(), recipe, **settings | options)


def zeros(result: api.Result) -> dict[str, np.ndarray]:
    initializers = result.model.graph.initializers
    return {name: initializers[name].const_value.numpy() == 0 for name in ("fc1.weight", "fc2.weight")}


@pytest.mark.parametrize("by", ["whole", "layer", "block"])
@pytest.mark.parametrize("prune", ["prune-weights{sparsity=0.6, remove_dead=false}", "prune-weights{pattern=2:4}"])
def test_zeros_stay_zero_and_the_rest_is_trained(prune, by):
    before, after = optimize(prune), optimize(f"{prune}, recover{{{HOW}, by={by}}}")
    assert {n: z.sum() for n, z in zeros(before).items()} == {n: z.sum() for n, z in zeros(after).items()}
    for name, kept in zeros(before).items():
        assert np.array_equal(kept, zeros(after)[name])
    a, b = (r.model.graph.initializers["fc1.weight"].const_value.numpy() for r in (before, after))
    moved = (a != b).mean()
    assert moved > 0.2
    notes = after.history.passes[-1].notes
    if by == "whole":
        assert f"{sum(z.sum() for z in zeros(before).values())} of 928 weights of 2 sparse layers" in " ".join(notes)


def test_they_are_trained_as_well_where_that_is_asked_for():
    """The last phase of Dense-Sparse-Dense: from zero on."""
    recipe = f"prune-weights{{sparsity=0.5, scope=layer, remove_dead=false}}, recover{{{HOW}}}"
    sparse, dense = optimize(recipe), optimize(f"{recipe}, recover{{{HOW}, keep_zeros=false}}")
    assert all(z.mean() == 0.5 for z in zeros(sparse).values())
    assert all(z.mean() < 0.05 for z in zeros(dense).values())


def test_repeated_rounds_reach_the_share_and_are_judged_as_one():
    steps = f"prune-weights{{sparsity=0.8, rounds=4, remove_dead=false}}, recover{{{HOW}}}"
    found = optimize(f"repeat{{steps=4, passes=[{steps}]}}", force=False)
    (stage,) = found.history.stages
    assert stage.status == "kept" and stage.goals == ("compressed size",)
    shares = [
        float(note.split("%")[0]) for r in stage.passes for note in r.notes if " weights of layers are zero" in note
    ]
    assert np.allclose(shares, [46.2, 70.0, 78.8, 80.0], atol=0.3)  # 80 (1 - (1 - t/4)^3)
    assert sum(z.sum() for z in zeros(found).values()) == int(0.8 * 928)


def test_codes_of_integers_are_held_where_half_of_them_are_zero():
    """Pruned, then quantised, then trained as integers: the zeros are still there."""
    prune = "prune-weights{sparsity=0.75, scope=layer, remove_dead=false}"
    recipe = f"fold-batchnorm, {prune}, int8{{rounding=nearest}}, recover{{{HOW}}}"
    weights = [v.const_value.numpy() for v in optimize(recipe).model.graph.initializers.values()]
    codes = [w for w in weights if w.dtype == np.int8 and w.ndim == 2]
    assert len(codes) == 2 and all((w == 0).mean() >= 0.75 for w in codes)


@pytest.mark.parametrize("network", ["plain", "residual", "transformer"])
def test_dense_weights_are_left_free(network):
    model, trainer = from_proto(NETWORKS[network]()), registry.trainer()
    assert hold_zeros(trainer, trainer.view(model), model) == []
