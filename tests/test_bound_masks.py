"""effc.passes.bound_masks: which masks are found, and that outputs stay."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from effc.capture import from_proto
from effc.contract import Context, Proposal, Skipped
from effc.data import open_data
from effc.passes.bound_masks import BoundMasks, Scores
from effc.registry import backend
from effc.target import find
from effc.verify import verify
from tests.networks import Net, distance, feeds, run

RUNTIME, TARGET = backend("onnxruntime"), find("onnxruntime-avx2")
SAME = 1e-6  # of the largest output: the order of float32's sums
LENGTH = 6


def scores(net: Net, size: float = 1.0) -> str:
    x = net.input("x", ["N", LENGTH, 8])
    y = net.node("MatMul", x, net.weight("w", net.random(8, LENGTH, scale=size)), name="score")
    net.input("seen", ["N", LENGTH])
    return y


def hidden(net: Net) -> str:
    """[N, 1, LENGTH]: true where `seen` is low."""
    low = net.node("Less", "seen", net.weight("least", np.float32(-1)))
    return net.node("Unsqueeze", low, net.weight("axis", np.array([1])))


def added(net: Net, value: float) -> str:
    mask = net.node("Where", hidden(net), net.weight("low", np.float32(value)), net.weight("zero", np.float32(0)))
    return net.node("Add", scores(net), mask, name="masked")


def multiplied(net: Net, value: float) -> str:
    """(1 - m) times a huge number, as BERT's first exports have it."""
    shown = net.node("Cast", net.node("Not", hidden(net)), to=onnx.TensorProto.FLOAT)
    mask = net.node(
        "Mul", net.node("Sub", net.weight("one", np.float32(1)), shown), net.weight("low", np.float32(value))
    )
    return net.node("Add", mask, scores(net), name="masked")


def causal(net: Net, value: float) -> str:
    mask = np.triu(np.full((LENGTH, LENGTH), value, np.float32), 1)
    return net.node("Add", scores(net), net.weight("mask", mask), name="masked")


def filled(net: Net, value: float) -> str:
    return net.node("Where", hidden(net), net.weight("low", np.float32(value)), scores(net), name="masked")


def finish(net: Net, x: str) -> onnx.ModelProto:
    net.output(net.node("Softmax", x, axis=-1, name="softmax"), ["N", LENGTH, LENGTH])
    return net.model()


def put(proto: onnx.ModelProto, calibrated: bool = True):
    model = from_proto(proto)
    data = open_data({"source": lambda: (feeds(proto, batch=1, seed=i) for i in range(16))}).for_model(model)
    context = Context(model, TARGET, RUNTIME, calibration=data if calibrated else None)
    found = list(BoundMasks().propose(model, context))
    after = model.clone()
    BoundMasks().rewrite(after, [f for f in found if isinstance(f, Proposal)], context)
    verify(after, model)
    onnx.checker.check_model(after.proto(), full_check=True)
    return found, after


@pytest.mark.parametrize("value", [-np.inf, np.finfo(np.float32).min, -1e4])
@pytest.mark.parametrize("form", [added, multiplied, causal, filled])
def test_masks_are_bounded_and_outputs_stay(form, value):
    if form is multiplied and np.isinf(value):
        value = -1e9  # 0 times infinity is no mask
    net = Net(f"{form.__name__} {value}")
    proto = finish(net, form(net, float(value)))
    (found,), after = put(proto)
    assert found.site == "node_softmax" and found.damage == 0
    assert found.setting["bound"] == -60 if form is not filled else -60 < found.setting["bound"] < -30
    inputs = feeds(proto, batch=4, seed=3)
    assert (inputs["seen"] < -1).any() and not (inputs["seen"] < -1).all(axis=1).any()
    assert distance(run(proto, inputs), run(after.proto(), inputs)) <= SAME
    session = RUNTIME.session(after, expose=["masked"])
    assert session.run(inputs)["masked"].min() >= found.setting["bound"] - 30


def test_one_bound_serves_all_that_share_a_mask():
    net = Net("shared")
    mask = net.node("Where", hidden(net), net.weight("low", np.float32(-1e9)), net.weight("zero", np.float32(0)))
    y = scores(net)
    for name in ("first", "second"):
        net.output(net.node("Softmax", net.node("Add", y, mask), name=name, axis=-1), ["N", LENGTH, LENGTH])
    proto = net.model()
    found, after = put(proto, calibrated=False)
    assert len(found) == 2 and sum(1 for _ in after.nodes("Max")) == 1
    inputs = feeds(proto, batch=4, seed=3)
    assert distance(run(proto, inputs), run(after.proto(), inputs)) <= SAME


def test_a_mask_by_way_of_shapes_is_found():
    """Made of sizes alone: ConstantOfShape with a huge number, above the diagonal."""
    net = Net("shapes")
    y = scores(net)
    size = net.node("Slice", net.node("Shape", y), *(net.weight(n, np.array([v])) for n, v in (("b", 1), ("e", 3))))
    low = numpy_helper.from_array(np.array([-3e38], np.float32))
    full = net.node("ConstantOfShape", size, value=low)
    proto = finish(net, net.node("Add", y, net.node("Trilu", full, net.weight("k", np.array(1))), name="masked"))
    (found,), after = put(proto)
    inputs = feeds(proto, batch=2)
    assert isinstance(found, Proposal) and distance(run(proto, inputs), run(after.proto(), inputs)) <= SAME


def test_refusals():
    def reason(make, calibrated=True) -> str:
        net = Net(f"refused {make}")
        (found,), _ = put(finish(net, make(net)), calibrated)
        assert isinstance(found, Skipped)
        return found.reason

    def bias(net: Net) -> str:  # learned, and small
        return net.node("Add", scores(net), net.weight("bias", net.random(LENGTH, LENGTH)), name="masked")

    def wide(net: Net) -> str:
        mask = net.weight("mask", np.triu(np.full((LENGTH, LENGTH), -1e9, np.float32), 1))
        return net.node("Add", scores(net, 30.0), mask, name="masked")

    def low(net: Net) -> str:
        mask = net.weight("mask", np.triu(np.full((LENGTH, LENGTH), -50, np.float32), 1))
        return net.node("Add", scores(net), mask, name="masked")

    def read(net: Net) -> str:
        x = added(net, -1e9)
        net.output(net.node("Relu", x), ["N", LENGTH, LENGTH])
        return x

    assert reason(bias) == reason(low) == reason(scores) == "nothing masks its input"
    assert reason(wide).startswith("its scores spread over ") and reason(wide).endswith(
        " in a row; 36 can be masked by -54"
    )
    assert reason(read) == "its input is read elsewhere"
    unknown = "masked positions are filled in: how far down is enough takes calibration data"
    assert reason(lambda net: filled(net, -np.inf), calibrated=False) == unknown


def test_scores_are_streamed():
    batches = [np.random.default_rng(i).standard_normal((2, 3, 4 + i)).astype(np.float32) for i in range(3)]
    accumulator = Scores("x").start()
    for batch in batches:
        accumulator.update(batch)
    least, spread = accumulator.result()
    assert least == min(b.min() for b in batches)
    assert spread == pytest.approx(max(np.ptp(b, axis=-1).max() for b in batches))


def test_half_precision_is_left_alone():
    net = Net("half", dtype=np.float16)
    mask = net.weight("mask", np.triu(np.full((LENGTH, LENGTH), -6e4, np.float16), 1))
    proto = finish(net, net.node("Add", scores(net), mask, name="masked"))
    proto.graph.value_info.append(helper.make_tensor_value_info("masked", onnx.TensorProto.FLOAT16, None))
    (found,), _ = put(proto)
    assert isinstance(found, Skipped) and found.reason == "its input is FLOAT16; float32 is bounded"
