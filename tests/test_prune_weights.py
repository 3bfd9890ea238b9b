"""effc.passes.prune_weights: which weights go, what stays makes up for them, zeros that last, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from effc import api, registry
from effc.capture import from_proto
from effc.compressed import compressed_size
from effc.contract import Context, Proposal
from effc.data import open_data
from effc.errors import BadInput
from effc.evaluate import damage
from effc.history import KEPT, UNCHANGED, UNDONE, History
from effc.passes.prune_weights import PruneWeights
from effc.target import find
from tests.networks import NETWORKS, Net, distance, feeds, run, scores_of

SAMPLES = 64


def optimize(proto: onnx.ModelProto, recipe: str, **options) -> api.Result:
    settings = {"measure": False, "target_name": "onnxruntime-avx2", "dims": {"T": 6}}
    return api.optimize(proto, recipe, **settings | options)


def images(proto: onnx.ModelProto, seed: int = 7) -> dict:
    return {"source": lambda: iter([feeds(proto, batch=SAMPLES, seed=seed)])}


def arrays(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def layers(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Weights of layers, by name."""
    known = arrays(proto)
    read = [n.input[1] for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    return {name: known[name] for name in read if name in known}


def share(weights: dict[str, np.ndarray]) -> float:
    return sum(int((w == 0).sum()) for w in weights.values()) / sum(w.size for w in weights.values())


def reasons(result: api.Result) -> dict[str, str]:
    ledger = result.history.passes[-1].ledger
    return {e.node.removeprefix("node_"): e.reason for e in ledger if not e.reason.startswith("nothing for ")}


def hurt(proto: onnx.ModelProto, result: api.Result) -> float:
    """Damage on samples that were not seen."""
    inputs = feeds(proto, batch=256, seed=3)
    return damage([run(result.model.proto(), inputs)], [run(proto, inputs)])


def correlated(seed: int, count: int = 512) -> np.ndarray:
    """[count, 24] of 6 causes."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, 6)) @ np.random.default_rng(1).normal(size=(6, 24))
    return (mixed + 0.3 * rng.normal(size=(count, 24)) + 0.5).astype(np.float32)


def wide() -> onnx.ModelProto:
    """24 -> 32 -> 5 on correlated inputs."""
    net = Net("wide")
    x = net.relu(net.linear(net.input("x", ["N", 24]), 24, 32, name="fc1"))
    net.output(net.linear(x, 32, 5, name="fc2"), ["N", 5])
    return net.model()


WIDE = {"source": lambda: iter([{"x": correlated(2)}])}


# which weights go


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_smallest_of_all_layers_together_go(sparsity):
    proto = NETWORKS["plain"]()
    found = optimize(proto, f"prune-weights{{sparsity={sparsity}, remove_dead=false}}")
    onnx.checker.check_model(found.model.proto(), full_check=True)
    before, after = layers(proto), layers(found.model.proto())
    sizes = np.sort(np.abs(np.concatenate([w.ravel() for w in before.values()])))
    bound = sizes[int(sparsity * sizes.size)]
    for name, w in before.items():
        assert np.array_equal(after[name], np.where(np.abs(w) < bound, 0, w))
    assert len(found.history.passes[0].chosen) == 4


def test_of_each_layer_the_same_share_goes():
    proto = NETWORKS["transformer"]()
    after = layers(optimize(proto, "prune-weights{scope=layer, sparsity=0.75}").model.proto())
    assert {name: int((w == 0).sum()) for name, w in after.items()} == {n: int(0.75 * w.size) for n, w in after.items()}


def test_deviations_are_bounds_layer_by_layer():
    proto = NETWORKS["mlp"]()
    before, after = (
        layers(proto),
        layers(optimize(proto, "prune-weights{deviations=0.8, remove_dead=false}").model.proto()),
    )
    for name, w in before.items():
        assert np.array_equal(after[name] == 0, np.abs(w) <= 0.8 * w.std())


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("network", ["plain", "transformer", "sound"])
def test_two_of_every_four_input_channels_stay_the_largest(network, known):
    proto = NETWORKS[network]()
    data = {"calibrate": images(proto)} if known else {}
    recipe = "prune-weights{pattern=2:4, compensate=true}" if known else "prune-weights{pattern=2:4}"
    found = optimize(proto, recipe, **data)
    after, axes = layers(found.model.proto()), {n.input[1]: n for n in proto.graph.node if len(n.input) > 1}
    count = 0
    for name, w in layers(proto).items():
        node = axes[name]
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 1 if node.op_type == "Conv" or transposed else 0
        if w.shape[axis] % 4:
            assert "no multiple of 4" in reasons(found)[node.name.removeprefix("node_")]
            continue
        count += 1
        groups = np.abs(np.moveaxis(w, axis, -1).reshape(-1, 4))
        stays = np.moveaxis(after[name], axis, -1).reshape(-1, 4) != 0
        assert np.array_equal(stays, np.argsort(np.argsort(-groups, kind="stable"), kind="stable") < 2)
    assert count > 1


def test_random_is_seeded():
    proto = NETWORKS["plain"]()
    found = [
        optimize(proto, "prune-weights{saliency=random, remove_dead=false}", seed=seed).model.proto()
        for seed in (0, 0, 1)
    ]
    one, same, other = map(layers, found)
    assert all(np.array_equal(one[n], same[n]) for n in one) and any((one[n] != other[n]).any() for n in one)


def test_by_damage_of_their_absence():
    """The lowest h w^2 / 2 of all go; the sum is what the loss rises by where few go, within a factor of 2."""
    pytest.importorskip("torch")
    backend = registry.trainer()
    proto = wide()
    found = optimize(proto, "prune-weights{saliency=obd, sparsity=0.2}", calibrate=WIDE)
    h = backend.curvature(backend.view(from_proto(proto)), [{"x": correlated(2)}])
    before, after = layers(proto), layers(found.model.proto())
    scores = {n: 0.5 * h[n] * w.astype(np.float64) ** 2 for n, w in before.items()}
    gone = np.concatenate([(after[n] == 0).ravel() for n in before])
    every = np.concatenate([scores[n].ravel() for n in before])
    assert gone.sum() == int(0.2 * every.size) and every[gone].max() <= every[~gone].min()
    x = {"x": correlated(2)}
    actual = damage([run(found.model.proto(), x)], [run(proto, x)])
    assert 0.5 < every[gone].sum() / actual < 2
    plain = optimize(proto, "prune-weights{sparsity=0.2}").model.proto()
    assert actual < damage([run(plain, x)], [run(proto, x)])


# channels that are left without weights


def test_what_is_left_without_weights_is_removed_and_the_same_comes_out():
    """Outputs with and without removal, to 1e-5; the constants of what nothing makes are in the biases behind."""
    for network, sparsity in (("plain", 0.9), ("mlp", 0.9), ("residual", 0.95), ("transformer", 0.9)):
        proto = NETWORKS[network]()
        smaller = optimize(proto, f"prune-weights{{sparsity={sparsity}}}", force=True)
        whole = optimize(proto, f"prune-weights{{sparsity={sparsity}, remove_dead=false}}", force=True)
        inputs = feeds(proto)
        assert distance(run(whole.model.proto(), inputs), run(smaller.model.proto(), inputs)) <= 1e-5
        (told,) = [n for n in smaller.history.passes[0].notes if "nothing makes or reads any more" in n]
        gone = int(told.split()[0])
        assert not any("nothing makes" in note for note in whole.history.passes[0].notes)
        assert (smaller.model.nbytes() < whole.model.nbytes()) is (gone > 0)
        assert (gone > 0) is (network != "transformer")


def test_patterns_keep_channels_whole_unless_told_otherwise():
    """N:M needs multiples of m, so what it leaves without weights stays."""
    proto = scores_of(8, 16, 4)
    weight = next(t for t in proto.graph.initializer if t.name == "fc0.weight")
    array = numpy_helper.to_array(weight).copy()
    array[:3] = 0
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    kept = optimize(proto, "prune-weights{pattern=2:4}", force=True).model
    removed = optimize(proto, "prune-weights{pattern=2:4, remove_dead=true}", force=True).model
    first, second = layers(kept.proto()).values()
    alive = first.any(axis=1) & second.any(axis=0)
    assert len(first) == 16 and alive.sum() <= 13 and len(layers(removed.proto())[weight.name]) == alive.sum()


def test_between_rounds_nothing_is_removed():
    """How many rounds are done is read off the share of zeros: channels go at the end."""
    proto, model = NETWORKS["plain"](), NETWORKS["plain"]()
    sizes = []
    for _ in range(3):
        model = optimize(model, "prune-weights{sparsity=0.9, rounds=3}", force=True).model.proto()
        sizes.append(sum(w.size for w in layers(model).values()))
    whole = sum(w.size for w in layers(proto).values())
    assert sizes[:2] == [whole, whole] and sizes[2] < whole


# rounds


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds_go_further_each_time_and_end_at_the_share(scope):
    """s (1 - (1 - t/T)^3), read off the weights; a fifth run finds nothing more to do. Rounded down: to 1 %."""
    proto, shares = NETWORKS["plain"](), []
    model, recipe = proto, f"prune-weights{{sparsity=0.8, rounds=4, scope={scope}, remove_dead=false}}"
    for _ in range(4):
        model = optimize(model, recipe).model.proto()
        shares.append(share(layers(model)))
    assert np.allclose(shares, [0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)], atol=0.01)
    again = optimize(model, recipe)
    assert again.history.stages[0].status == UNCHANGED
    assert "of its weights are zero already" in next(iter(reasons(again).values()))


def test_zeros_stay_zero_whatever_is_compensated():
    proto = wide()
    first = optimize(proto, "prune-weights{sparsity=0.5}", calibrate=WIDE).model.proto()
    for how in ("saliency=magnitude", "saliency=obs, scope=layer"):
        recipe = f"prune-weights{{sparsity=0.7, compensate=true, remove_dead=false, {how}}}"
        then = optimize(first, recipe, calibrate=WIDE).model.proto()
        for name, w in layers(first).items():
            assert (layers(then)[name][w == 0] == 0).all()
        assert 0.69 < share(layers(then)) < 0.72


# what stays makes up for what goes


@pytest.mark.parametrize("pattern", ["sparsity=0.6, scope=layer", "pattern=2:4"])
def test_fitted_weights_do_less_damage_than_plain_ones(pattern):
    """On correlated inputs, samples not seen: each step at least a third better than the one before, by trial."""
    proto = wide()
    ways = ["saliency=magnitude", "saliency=magnitude, compensate=true", "saliency=obs, compensate=true"]
    recipes = [f"prune-weights{{{pattern}, {how}, remove_dead=false}}" for how in ways]
    results = [optimize(proto, recipe, calibrate=WIDE) for recipe in recipes]
    inputs = {"x": correlated(5)}
    plain, fitted, chosen = (damage([run(r.model.proto(), inputs)], [run(proto, inputs)]) for r in results)
    assert fitted < 0.67 * plain and chosen < fitted
    shares = {round(share(layers(r.model.proto())), 2) for r in results}
    assert len(shares) == 1


def test_a_single_layer_is_the_least_squares_of_its_mask():
    """Against numpy's lstsq on the same inputs, row by row; the ridge of 0.3 % leaves 2 % of the error."""
    net = Net("one")
    net.output(net.linear(net.input("x", ["N", 24]), 24, 5, name="fc"), ["N", 5])
    proto, x = net.model(), correlated(2)
    after = arrays(optimize(proto, "prune-weights{sparsity=0.5, compensate=true}", calibrate=WIDE).model.proto())
    w, b = net.weights["fc.weight"], net.weights["fc.bias"]
    target = x @ w.T + b
    for row in range(5):
        kept = after["fc.weight"][row] != 0
        design = np.c_[x[:, kept], np.ones(len(x))]
        best = np.linalg.lstsq(design, target[:, row], rcond=None)[0]
        least = np.mean((design @ best - target[:, row]) ** 2)
        own = np.mean((x @ after["fc.weight"][row] + after["fc.bias"][row] - target[:, row]) ** 2)
        plain = np.mean((x[:, kept] @ w[row, kept] + b[row] - target[:, row]) ** 2)
        assert own <= 1.02 * least + 1e-6 and own < plain


@pytest.mark.parametrize("network", ["plain", "residual", "depthwise", "sound", "transformer", "two_outputs"])
def test_layers_of_every_form_are_fitted_or_pruned_plainly(network):
    proto = NETWORKS[network]()
    options = {"calibrate": images(proto) if network != "depthwise" else singles(proto)}
    plain, fitted = (
        optimize(proto, f"prune-weights{{scope=layer, sparsity=0.4{more}}}", force=True, **options)
        for more in ("", ", compensate=true")
    )
    onnx.checker.check_model(fitted.model.proto(), full_check=True)
    assert share(layers(fitted.model.proto())) == share(layers(plain.model.proto()))
    told = next(note for note in fitted.history.passes[0].notes if note.startswith("what stays was fitted"))
    assert told.startswith("what stays was fitted in 0 of 1 layers; not in") is (network == "two_outputs")
    inputs = feeds(proto, batch=1 if network == "depthwise" else 16, seed=3)
    off = [distance(run(proto, inputs), run(r.model.proto(), inputs)) for r in (plain, fitted)]
    assert off[1] < 1.05 * off[0]


def singles(proto: onnx.ModelProto) -> dict:
    return {"source": lambda: (feeds(proto, batch=1, seed=s) for s in range(SAMPLES))}


# judging, replay, refusals


def test_it_is_judged_by_compressed_bytes_and_says_what_zeros_save():
    proto = NETWORKS["plain"]()
    found = optimize(proto, "prune-weights{sparsity=0.9, remove_dead=false}", goal="latency")
    (stage,) = found.history.stages
    assert stage.status == KEPT and stage.goals == ("compressed size",)
    a, b = compressed_size(from_proto(proto)), compressed_size(found.model)
    assert b < 0.5 * a
    notes = " ".join(stage.passes[0].notes)
    assert f"compressed (zlib) all weights take {b:,} bytes, {a:,} before" in notes
    assert "zeros save neither time nor memory in a runtime with dense kernels" in notes
    assert found.history.final.size > 0.95 * found.history.original.size


def test_too_few_zeros_to_save_anything_are_undone():
    found = optimize(NETWORKS["plain"](), "prune-weights{sparsity=0.01}")
    assert found.history.stages[0].status == UNDONE
    assert "its weights do not compress better" in found.history.stages[0].reason


def test_damage_is_predicted_where_there_are_data_and_a_replay_gives_the_same():
    proto = NETWORKS["plain"]()
    data = {"calibrate": images(proto)}
    model = from_proto(proto)
    context = Context(
        model, find("onnxruntime-avx2"), registry.backend("onnxruntime"),
        calibration=open_data(data["calibrate"]).for_model(model),
    )  # fmt: skip
    offered = list(PruneWeights(sparsity=0.5).propose(model, context))
    assert len(offered) == 4 and all(isinstance(p, Proposal) and p.damage > 0 for p in offered)
    recipe = "prune-weights{sparsity=0.6, compensate=true}"
    first = optimize(proto, recipe, **data)
    told = History.from_json(first.history.to_json())
    again = optimize(proto, recipe, replay=told, **data)
    assert again.model.proto().SerializeToString() == first.model.proto().SerializeToString()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sparsity=0.5, pattern=2:4", "sparsity= and pattern= each say how many weights go: leave one"),
        ("deviations=1, saliency=random", "deviations= is a bound on magnitudes; the saliency is random"),
        ("pattern=2:4, rounds=3", "rounds= go towards a sparsity; pattern= is reached at once"),
        ("pattern=4:4", "pattern=4:4 keeps everything"),
        ("saliency=obs", "it needs compensate=true"),
        ("saliency=obs, compensate=true", "it needs scope=layer, or a pattern"),
        ("compensate=true", "compensate=true needs calibration data: give --calibrate SPEC"),
        ("saliency=obd", "saliency=obd needs calibration data: give --calibrate SPEC"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        optimize(NETWORKS["plain"](), f"prune-weights{{{options}}}")


def test_without_torch_obd_says_what_it_needs(monkeypatch):
    def missing(name="torch"):
        raise BadInput("training needs PyTorch, which is not installed")

    monkeypatch.setattr(registry, "trainer", missing)
    with pytest.raises(BadInput, match=r"saliency=obd needs PyTorch: pip install 'effc\[torch\]'"):
        optimize(wide(), "prune-weights{saliency=obd}", calibrate=WIDE)


def test_layers_that_are_left_alone():
    proto = NETWORKS["plain"]()
    found = optimize(proto, "fold-batchnorm, int8, prune-weights", calibrate=images(proto), force=True)
    why = "its weight is made by DequantizeLinear, not a constant: prune before weights are encoded"
    assert list(reasons(found).values()).count(why) == 3
