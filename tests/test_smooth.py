"""effc.passes.smooth: scales against the paper's equation, noise against rounding, outputs against the original's."""

import numpy as np
import onnx
import pytest

from effc.capture import from_proto
from effc.contract import Context, Proposal, Skipped
from effc.data import open_data
from effc.passes.int8 import Int8
from effc.passes.smooth import Extent, Extents, Smooth, noise, scales
from effc.registry import backend
from effc.target import find
from effc.verify import verify
from tests.networks import Net, distance, run

RUNTIME, WIDE = backend("onnxruntime"), find("onnxruntime-avx512-vnni")
EXACT = 1e-5  # of the largest output: rounding of float32 through two layers
WIDTH, OUTLIER = 32, 5


def samples(count: int = 12, lengths: tuple[int, ...] = (7,)):
    rng = np.random.default_rng(3)
    return [{"x": rng.standard_normal((1, lengths[i % len(lengths)], WIDTH)).astype(np.float32)} for i in range(count)]


class Smoothed:
    """A network put through the pass."""

    def __init__(self, net: Net, step: Smooth | None = None, calibrated: bool = True, lengths=(7,)) -> None:
        step = step or Smooth()
        self.proto = net.model()
        self.before = from_proto(self.proto)
        data = open_data({"source": lambda: iter(samples(lengths=lengths))}).for_model(self.before)
        self.context = Context(self.before, WIDE, RUNTIME, calibration=data if calibrated else None)
        found = list(step.propose(self.before, self.context))
        self.settings = {f.site.removeprefix("node_"): f.setting for f in found if isinstance(f, Proposal)}
        self.skipped = {f.site.removeprefix("node_"): f.reason for f in found if isinstance(f, Skipped)}
        self.model = self.before.clone()
        step.rewrite(self.model, [f for f in found if isinstance(f, Proposal)], self.context)
        verify(self.model, self.before)
        self.after = self.model.proto()
        onnx.checker.check_model(self.after, full_check=True)

    def moved(self) -> float:
        inputs = {"x": np.random.default_rng(9).standard_normal((3, 4, WIDTH)).astype(np.float32)}
        return distance(run(self.proto, inputs), run(self.after, inputs))

    def ops(self, op: str) -> tuple[int, int]:
        return sum(1 for _ in self.before.nodes(op)), sum(1 for _ in self.model.nodes(op))


def gamma() -> np.ndarray:
    scale = np.ones(WIDTH, np.float32)
    scale[OUTLIER] = 40
    return scale


def normed(net: Net, spelled: bool = False) -> str:
    """A layer norm with one channel that stands out, as one operator or in seven."""
    x = net.input("x", ["N", "T", WIDTH])
    scale, shift = net.weight("scale", gamma()), net.weight("shift", net.random(WIDTH))
    if not spelled:
        return net.node("LayerNormalization", x, scale, shift, name="norm")
    less = net.node("Sub", x, net.node("ReduceMean", x, axes=[-1]))
    square = net.node("ReduceMean", net.node("Mul", less, less), axes=[-1])
    root = net.node("Sqrt", net.node("Add", square, net.weight("eps", np.float32(1e-5))))
    return net.node("Add", net.node("Mul", net.node("Div", less, root), scale), shift, name="norm")


def dense(net: Net, x: str, name: str, size: int = WIDTH, inner: int = WIDTH) -> str:
    return net.node("MatMul", x, net.weight(f"{name}.weight", net.random(inner, size, scale=inner**-0.5)), name=name)


@pytest.mark.parametrize("spelled", [False, True])
def test_a_norm_takes_the_scales_of_all_that_read_it(spelled):
    net = Net(f"norm {spelled}")
    x = normed(net, spelled)
    for name in "qkv":
        net.output(dense(net, x, name), ["N", "T", WIDTH])
    found = Smoothed(net, lengths=(7, 3, 12))
    assert [*found.settings] == ["q"] and found.settings["q"]["into"] == "before"
    assert len(found.model.graph) == len(found.before.graph) and found.moved() <= EXACT
    before, after = ({v.name: v.const_value.numpy() for v in m.graph.initializers.values()} for m in
                     (found.before, found.model))  # fmt: skip
    s = before["scale"] / after["scale"]
    assert s.argmax() == OUTLIER and s[OUTLIER] > 5 * np.median(s)
    assert np.exp(np.log(s).mean()) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(after["shift"], before["shift"] / s, rtol=1e-5)
    for name in "qkv":
        np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] * s[:, None], rtol=1e-5)


def test_the_scales_are_equation_4():
    rng = np.random.default_rng(0)
    extents = Extents(-rng.random(6), rng.random(6) * 4, rng.random(6))
    weight = rng.standard_normal((6, 3))
    x, w = np.maximum(-extents.low, extents.high), np.abs(weight).max(axis=1)
    s = scales({"power": 0.5, "weights": True}, extents, weight)
    paper = np.sqrt(x) / np.sqrt(w)
    np.testing.assert_allclose(s, paper / np.exp(np.log(paper).mean()), rtol=1e-12)


def test_noise_is_that_of_rounding():
    """Against codes themselves, to a tenth: rounding is even noise where steps are fine."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((4000, WIDTH)) * np.linspace(0.5, 4, WIDTH), rng.standard_normal((WIDTH, 24))
    s = np.linspace(1, 3, WIDTH)
    extents = Extents(x.min(axis=0), x.max(axis=0), (x**2).mean(axis=0))
    step = (max((x / s).max(), 0) - min((x / s).min(), 0)) / 255
    steps = np.abs(s[:, None] * w).max(axis=0) / 127
    rounded = (np.rint(x / s / step) * step) @ (np.rint(s[:, None] * w / steps) * steps)
    assert ((rounded - x @ w) ** 2).sum(axis=1).mean() == pytest.approx(noise(s, extents, w), rel=0.1)


def test_extents_are_streamed():
    batches = [np.random.default_rng(i).standard_normal((2, 3 + i, 4)).astype(np.float32) for i in range(3)]
    accumulator = Extent("x").start()
    for batch in batches:
        accumulator.update(batch)
    rows, found = np.concatenate([b.reshape(-1, 4) for b in batches]), accumulator.result()
    np.testing.assert_allclose(found.low, np.minimum(rows.min(axis=0), 0))
    np.testing.assert_allclose(found.high, rows.max(axis=0))
    np.testing.assert_allclose(found.square, (rows**2).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("between", ["relu", "gate", "bias"])
def test_a_layer_before_takes_them_where_they_pass(between):
    net = Net(f"behind {between}")
    x = net.input("x", ["N", "T", WIDTH])
    y = net.node("MatMul", x, net.weight("v.weight", net.random(WIDTH, WIDTH) * gamma() / 6), name="v")
    y = net.node("Add", y, net.weight("v.bias", net.random(WIDTH)))
    if between == "relu":
        y = net.relu(y)
    if between == "gate":
        y = net.node("Mul", net.node("Sigmoid", dense(net, x, "g")), y)
    net.output(dense(net, y, "out"), ["N", "T", WIDTH])
    found = Smoothed(net, Smooth(insert=1))
    assert found.settings["out"]["into"] == "before" and found.moved() <= EXACT
    assert len(found.model.graph) == len(found.before.graph)


def test_nothing_passes_a_gelu_and_a_mul_stands_behind_it():
    net = Net("gelu", opset=20)
    x = normed(net)
    wide = net.node("MatMul", x, net.weight("up.weight", net.random(WIDTH, WIDTH) * gamma() / 6), name="up")
    net.output(dense(net, net.node("Gelu", wide, name="gelu"), "down"), ["N", "T", WIDTH])
    found = Smoothed(net, Smooth(insert=1e-5))
    assert found.settings["down"]["into"] == "mul" and found.ops("Mul") == (0, 1) and found.moved() <= EXACT
    refused = Smoothed(net, Smooth(insert=1))
    assert refused.skipped["down"].startswith("scales cannot pass Gelu 'node_gelu'; a Mul would lower noise by ")
    assert refused.ops("Mul") == (0, 0)


def test_a_norm_behind_a_sum_is_read_by_the_next_sum():
    net = Net("behind")
    x = normed(net)
    net.output(net.node("Add", x, dense(net, x, "q"), name="sum"), ["N", "T", WIDTH])
    assert Smoothed(net, Smooth(insert=1e-5)).settings["q"]["into"] == "mul"
    reason = Smoothed(net, Smooth(insert=1)).skipped["q"]
    assert reason.startswith("Add 'node_sum' reads its input too; a Mul would lower noise by ")


def test_int8_loses_less():
    net = Net("pays")
    x = normed(net)
    net.output(dense(net, x, "q"), ["N", "T", WIDTH])
    found = Smoothed(net)

    def error(model) -> float:
        lowered = model.clone()
        chosen = [p for p in Int8().propose(lowered, found.context) if isinstance(p, Proposal)]
        Int8().rewrite(lowered, chosen, found.context)
        inputs = samples(1)[0]
        (a,), (b,) = (run(p, inputs).values() for p in (found.proto, lowered.proto()))
        return float(((a - b) ** 2).sum() / (a**2).sum())

    assert error(found.model) < error(found.before) / 4


def test_refusals():
    net = Net("refusals")
    x = normed(net)
    shared = net.weight("shared", net.random(WIDTH, WIDTH))
    a, b = (net.node("MatMul", x, shared, name=n) for n in ("a", "b"))
    net.output(net.node("MatMul", a, net.node("Transpose", b, perm=[0, 2, 1]), name="product"), ["N", "T", "T"])
    found = Smoothed(net)
    assert found.skipped == {
        "a": "its weight is shared with 'node_b'",
        "b": "its weight is shared with 'node_a'",
        "product": "its right operand is no constant",
    }
    plain = Net("without data")
    plain.output(dense(plain, normed(plain), "q"), ["N", "T", WIDTH])
    found = Smoothed(plain, calibrated=False)
    assert found.skipped == {"q": "its scales need calibration data: give --calibrate SPEC"}
