"""Random small graphs through random sequences of passes: right, within bounds, and every node accounted for."""

from collections.abc import Iterator

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import shape_inference

import effc
from effc.history import KEPT, UNCHANGED
from tests.conformance import pass_names
from tests.networks import Net, distance, feeds, run

COMMON = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
EXACT_BOUND = 3e-4  # of the largest output: each exact pass promises less
INT8_BOUND = 0.15  # 7-bit weights through up to eight layers; ranges are those of the very samples compared
SAMPLES = 8
SPLIT = "low-rank{damage=0.01}"
TRAIN = "recover{epochs=1, batch=8, learning_rate=0.001, validation=0.25}"
LASSO = TRAIN.replace("recover{", "group-lasso{sparsity=0.2, ")
SPLIT_BOUND = 0.6  # random weights are far from low rank, and the samples are few
PRUNED = ["prune-channels{macs=0.8}", "prune-blocks{count=1}", "prune-groups{macs=0.8}", "prune-weights{sparsity=0.3}"]
PRUNED_BOUND = 1.5  # random weights are all needed
CODED, CODED_BOUND = "weight-only", 0.15  # 4 bits in the last two layers
EXACT = ["simplify", "fold-batchnorm", "equalize", "smooth", "bound-masks", "unfuse"]
PASSES = [
    *EXACT, "int8", "int8{calibrator=minmax, rounding=nearest, bias_correction=false}", SPLIT, *PRUNED, CODED,
    *([TRAIN, LASSO] if "recover" in pass_names() else []),
]  # fmt: skip


@st.composite
def graphs(draw) -> onnx.ModelProto:
    """Convolutions, norms, activations, sums, concatenations and pools over [N, C, S, S], with a dense layer or two.

    What is drawn is the number of layers and a seed: drawn choice by choice most graphs would be of one kind.
    """
    layers, seed = draw(st.integers(3, 12)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng([layers, seed])

    def choose(*options):
        return options[rng.integers(len(options))]

    net = Net(f"graph {layers} {seed}", opset=choose(11, 13, 17, 18))
    size, channels = choose(6, 8), choose(1, 3, 4, 16)
    alive = [(net.input("x", ["N", channels, size, size]), channels)]  # of one size, each with its channels
    for index in range(layers):
        kind = choose(
            "conv", "normed", "normed", "depthwise", "relu", "clip", "norm", "add", "concat", "max", "average", "same"
        )
        x, n = choose(alive[-1], alive[-1], *alive)
        name = f"{kind}_{index}"
        if kind in ("conv", "normed"):
            k, d = choose(1, 3), choose(4, 16, 20)
            bias = choose(True, False)
            y = net.conv(x, n, d, k, name=name, pads=[k // 2] * 4, bias=bias)
            alive.append((net.relu(net.norm(y, d, name=f"{name}_bn")) if kind == "normed" else y, d))
        elif kind == "depthwise":
            y = net.conv(x, n, n, 3, name=name, pads=[1] * 4, group=n, bias=True)
            alive.append((y, n))
        elif kind == "norm":
            alive.append((net.norm(x, n, name=name), n))
        elif kind == "clip":
            alive.append((net.node("Clip", x, _scalar(net, "low", 0), _scalar(net, "high", 6), name=name), n))
        elif kind == "add":
            others = [v for v, c in alive if c == n]
            alive.append((net.node("Add", x, choose(*others), name=name), n))
        elif kind == "concat":
            y, m = choose(*alive)
            alive.append((net.node("Concat", x, y, name=name, axis=1), n + m))
        elif kind in ("max", "average"):
            op = "MaxPool" if kind == "max" else "AveragePool"
            y = net.node(op, x, name=name, kernel_shape=[3, 3], pads=[1] * 4)
            alive.append((y, n))
        else:
            alive.append((net.node("Relu" if kind == "relu" else "Identity", x, name=name), n))
    x, n = alive[-1]
    if choose(True, False):
        net.output(
            net.node("Identity", alive[len(alive) // 2][0], name="seen"), ["N", alive[len(alive) // 2][1]] + [size] * 2
        )
    if net.opset < 18 and choose(True, False):
        x = net.node("ReduceMean", x, name="pooled", axes=[2, 3], keepdims=0)
    else:
        x = net.node("Flatten", net.node("GlobalAveragePool", x, name="pool"), name="pooled")
    if choose(True, False):
        x, n = net.relu(net.linear(x, n, 8, name="hidden")), 8
    net.output(net.linear(x, n, 5, name="classes", bias=choose(True, False)), ["N", 5])
    proto = net.model()
    return shape_inference.infer_shapes(proto) if choose(True, False) else proto


def _scalar(net: Net, name: str, value: float) -> str:
    return net.weight(name, np.float32(value))


def batches(proto: onnx.ModelProto) -> Iterator[dict[str, np.ndarray]]:
    yield feeds(proto, batch=SAMPLES, seed=11)


def accounted(result: effc.Result, before: onnx.ModelProto) -> None:
    """Every node of the model before a pass stands once in its ledger, changed or with a reason."""
    present = [n.name for n in before.graph.node]
    for record in result.history.passes:
        assert len({e.node for e in record.ledger}) == len(record.ledger)
        assert all(e.status == "changed" or e.reason for e in record.ledger), record.name
        assert record.status in (KEPT, UNCHANGED), record.reason
        assert record.status == KEPT or not record.counts["changed"]
    assert sorted(e.node for e in result.history.passes[0].ledger) == sorted(present)
    alive = {n.name for n in result.model.graph}
    assert result.history.node_map.keys() == {*present}
    assert all(name in alive for names in result.history.node_map.values() for name in names)


@settings(COMMON, max_examples=30)
@given(proto=graphs(), recipe=st.lists(st.sampled_from(EXACT), min_size=1, max_size=4))
def test_exact_passes_in_any_order_change_no_number_beyond_rounding(proto, recipe):
    result = effc.optimize(
        proto, ",".join(recipe), calibrate={"source": lambda: batches(proto)}, measure=False, force=True,
        target_name="onnxruntime-avx2",
    )  # fmt: skip
    after = result.model.proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = feeds(proto, batch=3, seed=1)
    assert distance(run(proto, inputs), run(after, inputs)) <= EXACT_BOUND
    assert len(after.graph.node) <= len(proto.graph.node)
    accounted(result, proto)


@settings(COMMON, max_examples=40)
@given(proto=graphs(), recipe=st.permutations(PASSES).flatmap(lambda p: st.integers(1, 4).map(lambda n: p[:n])))
def test_passes_in_any_order_stay_near_the_original(proto, recipe):
    """Compared on the calibration samples themselves, whose ranges the codes were made for."""
    result = effc.optimize(
        proto,
        ",".join(recipe),
        calibrate={"source": lambda: batches(proto)},
        train={"source": lambda: batches(proto)},
        measure=False,
        force=True,
        target_name="onnxruntime-avx2",
    )
    after = result.model.proto()
    onnx.checker.check_model(after, full_check=True)
    inputs = next(batches(proto))
    bound = INT8_BOUND + SPLIT_BOUND * (SPLIT in recipe) + CODED_BOUND * (CODED in recipe)
    bound += PRUNED_BOUND * any(name in recipe for name in (*PRUNED, LASSO))
    assert distance(run(proto, inputs), run(after, inputs)) <= bound
    names = {new for n in proto.graph.node for new in (n.name, *result.history.node_map[n.name])}
    lowered = {site for r in result.history.passes if r.name == "int8" and r.status == KEPT for site, _ in r.chosen}
    assert lowered <= names
    assert bool(lowered) == any(n.op_type in ("DequantizeLinear", "MatMulInteger") for n in after.graph.node)
    accounted(result, proto)
    assert run(after, feeds(proto, batch=1)).keys() == run(proto, feeds(proto, batch=1)).keys()  # any batch still runs


@settings(COMMON, max_examples=10)
@given(proto=graphs())
def test_the_same_model_gives_the_same_bytes(proto):
    made = [
        effc.optimize(
            proto, "simplify,fold-batchnorm,int8", calibrate={"source": lambda: batches(proto)}, measure=False,
            force=True, target_name="onnxruntime-avx2",
        ).model.proto().SerializeToString()
        for _ in range(2)
    ]  # fmt: skip
    assert made[0] == made[1]


def test_every_registered_pass_is_tried():
    assert {name.partition("{")[0] for name in PASSES} == {*pass_names()}
