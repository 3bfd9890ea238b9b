"""effc.piecewise: which parts there are, that each comes closer to the original's tensor, and that little data do."""

import numpy as np
import onnx
import pytest
from sklearn.datasets import load_digits

from effc import api, edit
from effc.capture import from_proto
from effc.errors import BadInput
from effc.model import Model
from effc.piecewise import Part, parts
from effc.registry import backend
from tests.networks import Net, distance

pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

X = (load_digits().images[:, None] / 16).astype(np.float32)[np.random.default_rng(0).permutation(1797)]
RECIPE = "low-rank{macs=0.4, method=filters, asymmetric=false, nonlinear=false}"


def chain() -> onnx.ModelProto:
    """Three convolutions with a shortcut around two of them, and a dense layer. A tensor is called like its layer."""
    net, same = Net("chain"), {"pads": [1, 1, 1, 1]}
    x = net.relu(net.norm(net.conv(net.input("x", ["N", 1, 8, 8]), 1, 16, 3, name="c1", **same), 16, name="b1"))
    y = net.relu(net.norm(net.conv(x, 16, 16, 3, name="c2", **same), 16, name="b2"))
    total = net.node("Add", x, net.conv(y, 16, 16, 3, name="c3", **same), name="total")
    net.output(net.linear(net.node("Flatten", total), 16 * 64, 10, name="fc"), ["N", 10])
    return net.model()


def optimize(proto: onnx.ModelProto, recipe: str, train: dict | None = None) -> Model:
    few = {"source": {"x": X[:128]}}
    result = api.optimize(
        proto, recipe, calibrate=few, train=train or few, measure=False, force=True, target_name="onnxruntime-avx2"
    )
    return result.model


def apart(original: onnx.ModelProto, model: Model, expose: list[str]) -> dict[str, float]:
    """Relative squared error of tensors and outputs, on samples that served for nothing."""
    session = backend("onnxruntime").session
    wanted, found = (session(m, expose=expose).run({"x": X[1000:]}) for m in (from_proto(original), model))
    return {name: float(((found[name] - a) ** 2).sum() / (a**2).sum()) for name, a in wanted.items()}


def test_layers_end_where_the_original_has_the_tensor_too():
    original, split = from_proto(chain()), optimize(chain(), RECIPE)
    found = parts(split, original, "layer")
    reads = {node.outputs[0].name: node.inputs[0].name for node in original.graph}
    assert len(found) >= 2 and {part.end for part in found} <= {"c1", "c2", "c3", "fc"}
    assert all(part.entries == (reads[part.end],) for part in found)
    assert parts(original, original, "layer") == [] == parts(original, original, "block")


def test_blocks_lie_between_tensors_that_all_paths_lead_through():
    original, split = from_proto(chain()), optimize(chain(), RECIPE)
    assert {"c2", "c3"} & {part.end for part in parts(split, original, "layer")}
    shortcut = original.node("node_total").inputs[0].name
    assert Part((shortcut,), "total") in parts(split, original, "block")
    assert not {"c2", "c3"} & {part.end for part in parts(split, original, "block")}


@pytest.mark.parametrize("by", ["layer", "block"])
def test_each_part_comes_closer_and_so_do_the_outputs(by):
    """From 128 samples without labels, on others."""
    proto = chain()
    split = optimize(proto, RECIPE)
    trained = optimize(proto, f"{RECIPE}, recover{{by={by}, epochs=30, batch=16, learning_rate=0.003}}")
    ends = [part.end for part in parts(split, from_proto(proto), by)]
    before, after = (apart(proto, model, ends) for model in (split, trained))
    assert all(after[name] < before[name] for name in ends), (before, after)
    output = from_proto(proto).outputs[0].name
    assert after[output] < 0.9 * before[output]
    assert [n.op_type for n in trained.graph] == [n.op_type for n in split.graph]


def test_integer_layers_are_parts_and_come_closer():
    """Codes rounded to the nearest leave room that training straight through the rounding takes up."""
    few, recipe = {"source": {"x": X[:512]}}, "fold-batchnorm, int8{rounding=nearest}"
    coded = optimize(chain(), recipe, few)
    found = [part.end for part in parts(coded, from_proto(chain()), "block")]
    assert found == ["b1", "total", "fc"]
    trained = optimize(chain(), f"{recipe}, recover{{by=block, epochs=15, batch=16, learning_rate=0.0001}}", few)
    before, after = (apart(chain(), model, found) for model in (coded, trained))
    assert after["total"] < 0.7 * before["total"]
    assert after["fc"] < 0.7 * before["fc"]


def test_parts_that_seconds_do_not_suffice_for_stay():
    """The first of the layers is trained; the others have the weights that they had."""
    split, few = optimize(chain(), RECIPE), {"source": {"x": X[:128]}}
    first, *others = parts(split, from_proto(chain()), "layer")
    step = "recover{by=layer, epochs=10, batch=16, learning_rate=0.003, seconds=1e-6}"
    found = api.optimize(split, step, train=few, teachers=[chain()], measure=False, force=True)
    notes = found.history.passes[0].notes
    assert notes[-1] == f"recover: {len(others)} of {len(others) + 1} layers stayed: the 1e-06 seconds were over"
    before, after = ({n: v.const_value.numpy() for n, v in m.graph.initializers.items()} for m in (split, found.model))
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed and all(name.startswith(f"node_{first.end}") for name in changed), changed


def test_norms_inside_of_a_block_keep_their_statistics():
    trained = optimize(chain(), f"{RECIPE}, recover{{by=block, epochs=30, batch=16, learning_rate=0.003}}")
    original = from_proto(chain())
    for name in ("b2.running_mean", "b2.running_var"):
        found, expected = (m.graph.initializers[name].const_value.numpy() for m in (trained, original))
        np.testing.assert_array_equal(found, expected)


def test_what_lies_between_layers_stays_as_it_is():
    trained = optimize(chain(), f"{RECIPE}, recover{{by=layer, epochs=2, batch=16}}")
    norms = {name: v for name, v in from_proto(chain()).graph.initializers.items() if name.startswith(("b1", "b2"))}
    assert len(norms) == 8
    for name, value in norms.items():
        found = trained.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(found, value.const_value.numpy())


def test_a_weight_that_others_read_too_is_not_trained():
    net = Net("shared")
    kernel = net.weight("kernel", np.random.default_rng(0).normal(size=(1, 1, 3, 3)).astype(np.float32))
    one = net.node("Conv", net.input("x", ["N", 1, 8, 8]), kernel, name="one", pads=[1, 1, 1, 1])
    net.output(net.node("Conv", net.relu(one), kernel, name="two", pads=[1, 1, 1, 1]), ["N", 1, 8, 8])
    original, student = from_proto(net.model()), from_proto(net.model())
    node = student.node("node_one")
    new = edit.make_node(student, "Conv", list(node.inputs), {"pads": [1, 1, 1, 1]}, name="other")
    edit.replace(student, [node], [new], {node.outputs[0]: new.outputs[0]})
    assert [part.end for part in parts(student, original, "layer")] == ["one"]
    before = run_all(student)
    found = api.optimize(
        student, "recover{by=layer, epochs=2, batch=16}", train={"source": {"x": X[:64]}}, teachers=[original],
        measure=False, force=True,
    )  # fmt: skip
    assert distance(before, run_all(found.model)) == 0
    assert any("nothing was trained" in note for note in found.history.passes[0].notes)


def run_all(model: Model) -> dict[str, np.ndarray]:
    return backend("onnxruntime").session(model).run({"x": X[:8]})


@pytest.mark.parametrize("option", ["checkpoint=a.pt", "labels=1", "augment=flip"])
def test_options_of_the_whole_are_refused(option):
    with pytest.raises(BadInput, match="by=block takes one teacher, no labels=1, augment or checkpoint"):
        optimize(chain(), f"recover{{by=block, {option}}}", {"source": {"x": X[:8]}})
