"""effc.passes._chain_costs: counted against hand arithmetic and finished models, predicted for a told runtime."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from effc import edit
from effc.capture import from_proto
from effc.contract import Context
from effc.cost import Cost, cost
from effc.errors import EffcError
from effc.kernels import FREE, Kernel, left
from effc.model import Model
from effc.passes._chain_costs import ChainCosts, Place
from effc.passes._factors import Factor, Factors, blank
from effc.passes._sites import Site, find, layers, put
from effc.passes.int8 import Int8
from effc.passes.low_rank import METHODS
from effc.predict import estimate
from effc.registry import backend
from effc.target import Target
from effc.target import find as find_target
from tests import fake_kernels
from tests.networks import Net

AVX2 = find_target("onnxruntime-avx2")  # none of its kernels were measured
MEASURED = fake_kernels.measured(["conv", "gemm", "Relu"])
AROUND = 4e6
SIZE = 2, 16, 9, 11


class Told:
    """A runtime that runs each convolution and product by itself, changes layouts at both ends, and fuses Relu."""

    name = "onnxruntime"

    def __init__(self, kind: str = "", fails: bool = False, reorder: str = "blocked-ReorderInput") -> None:
        self.kind, self.fails, self.reorder = kind, fails, reorder
        self.asked: list[tuple[Model, int, int]] = []

    def kernels(
        self, model: Model, batch: int = 1, dims: Mapping[str, int] | None = None, threads: int = 1
    ) -> tuple[tuple[Kernel, ...], dict[str, str]]:
        self.asked.append((model, batch, threads))
        if self.fails:
            raise EffcError("the runtime does not take it")
        shapes, made, stands_for = model.shapes(batch), [], {}
        for node in model.graph:
            assert node.op_type in ("Conv", "MatMul", "Relu")
            if node.op_type == "Relu":
                stands_for[node.name] = made[-1].name
                continue
            kernel = conv_kernel(shapes, node) if node.op_type == "Conv" else gemm_kernel(shapes, node)
            made.append(replace(kernel, name=f"k {node.name}", kind=self.kind or kernel.kind))
            stands_for[node.name] = made[-1].name
        if self.reorder:
            ends = [
                replace(made[0], name=f"reorder{i}", kind=kind, macs=0) for i, kind in enumerate([self.reorder, FREE])
            ]
            made = [ends[0], *made, ends[1]]
        return tuple(made), stands_for


def conv_kernel(shapes: Mapping[str, Any], node: Any) -> Kernel:
    (m, c, kh, kw), (n, _, h, w) = node.inputs[1].const_value.shape, shapes[node.outputs[0].name]
    g = node.attributes.get_int("group", 1)
    step = node.attributes.get_ints("strides", [1, 1])[0]
    dims = {"n": n, "c": c, "m": m // g, "g": g, "h": h, "w": w, "kh": kh, "kw": kw, "s": step, "d": 1, "act": 0}
    return fake_kernels.kernel("conv", {**dims, "sum": 0}, AROUND)


def gemm_kernel(shapes: Mapping[str, Any], node: Any) -> Kernel:
    k, n = node.inputs[1].const_value.shape
    return fake_kernels.kernel("gemm", {"b": 1, "m": shapes[node.outputs[0].name][0], "k": k, "n": n}, AROUND)


def whole_net(**where: Any) -> onnx.ModelProto:
    net = Net("chain costs")
    x = net.relu(net.conv(net.input("x", ["N", 3, 9, 11]), 3, 16, 3, name="stem", pads=[1] * 4))
    x = net.relu(net.conv(x, 16, 20, [3, 5], name="layer", bias=True, **where))
    net.head(x, 20)
    return net.model()


def site_in(proto: onnx.ModelProto, name: str = "layer", batch: int = 2) -> tuple[Model, Site, Place]:
    model = from_proto(proto)
    shapes = model.shapes(batch)
    site = next(find(model, node, shapes) for node in layers(model) if node.name == f"node_{name}")
    assert isinstance(site, Site)
    return model, site, Place(tuple(shapes[site.input]), False, AROUND)


def costs(model: Model, target: Target = AVX2, runtime: Any = None, **options: Any) -> ChainCosts:
    return ChainCosts(Context(model, target, runtime or backend("onnxruntime"), batch=2, **options))


# --- counted --------------------------------------------------------------------------------------------------------


def test_a_layer_by_hand():
    """Two images of 9 x 11, stride 2 x 3, pads 1, 2, 0, 1: outputs of 4 x 4."""
    model, site, place = site_in(whole_net(strides=[2, 3], pads=[1, 2, 0, 1]))
    found = costs(model).of(site, place, [site.layer.whole(site.layer.weight)])
    rows, size = 2 * 4 * 4, 20 * 16 * 3 * 5
    moved = 4 * (2 * 16 * 9 * 11 + rows * 20)
    assert (found.macs, found.parameters, found.weight_bytes) == (rows * size, size + 20, 4 * (size + 20))
    assert (found.activation_bytes, found.seconds) == (moved, 0.0)
    # Horowitz: 3.7 + 0.9 pJ a multiply-accumulate, 640 and 5 pJ for four bytes from memory and from a cache.
    picojoules = rows * size * 4.6 + (640 * 4 * (size + 20) + 5 * moved) / 4
    assert found.energy == pytest.approx(picojoules * 1e-12, rel=1e-9)


def test_a_grouped_chain_by_hand():
    """Columns, depthwise and dilated, then a stride: outputs of 9 x 11, 7 x 11, 4 x 5."""
    model, site, place = site_in(whole_net(pads=[1, 2, 1, 2]))
    chain = (
        Factor(blank(16, 1, 3, 1), 16, pads=(1, 0, 1, 0)),
        Factor(blank(32, 4, 2, 1), 4, dilations=(2, 1)),
        Factor(blank(20, 32, 1, 3), 1, (2, 2)),
    )
    found = costs(model).of(site, place, chain)
    sizes, rows = [16 * 3, 32 * 4 * 2, 20 * 32 * 3], [2 * 9 * 11, 2 * 7 * 11, 2 * 4 * 5]
    assert found.macs == sum(size * row for size, row in zip(sizes, rows, strict=True))
    assert found.parameters == sum(sizes) + 20 and found.weight_bytes == 4 * found.parameters
    tensors = [2 * 16 * 9 * 11, rows[0] * 16, rows[1] * 32, rows[2] * 20]
    assert found.activation_bytes == 4 * (tensors[0] + 2 * tensors[1] + 2 * tensors[2] + tensors[3])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "where", [{"pads": [1, 2, 1, 2]}, {"strides": [2, 1], "dilations": [1, 2], "pads": [0, 1, 2, 3]}]
)
def test_counts_are_those_of_the_model_with_the_chain_in_it(name, where):
    proto = whole_net(**where)
    model, site, place = site_in(proto)
    method = METHODS[name](site.layer)
    setting = [*method.settings(1)][1]
    told = costs(model)
    before = cost(model, 2).total
    whole = told.of(site, place, [site.layer.whole(site.layer.weight)])
    after = told.of(site, place, method.skeleton(setting))
    put(model, site, method.fit(setting), None)
    edit.remove_unused(model)
    found = cost(model, 2).total
    for quantity in ("macs", "parameters", "weight_bytes", "activation_bytes"):
        saved = getattr(whole, quantity) - getattr(after, quantity)
        assert getattr(before, quantity) - getattr(found, quantity) == saved, quantity
    assert after.macs < whole.macs


def test_a_dense_layer_counts_its_rows():
    net = Net("dense")
    net.output(net.node("MatMul", net.input("x", ["N", 5, 24]), net.weight("w", net.random(24, 40)), name="layer"))
    model, site, _ = site_in(net.model())
    found = costs(model).of(site, Place((10, 24), True, AROUND), METHODS["filters"](site.layer).skeleton({"rank": 7}))
    assert found == Cost(10 * 7 * 64, 7 * 64, 4 * 7 * 64, 4 * 10 * (24 + 7 + 7 + 40), found.energy)
    half = costs(model).of(site, Place((10, 24), True, AROUND, 2), METHODS["filters"](site.layer).skeleton({"rank": 7}))
    assert (half.macs, half.weight_bytes) == (found.macs, found.weight_bytes // 2)


def test_codes_to_come_take_less_energy():
    model, site, place = site_in(whole_net(pads=[1, 2, 1, 2]))
    chain = [site.layer.whole(site.layer.weight)]
    found, codes = costs(model).of(site, place, chain), costs(model, later=(Int8(),)).of(site, place, chain)
    # 0.2 + 0.1 pJ in place of 3.7 + 0.9 pJ for each multiply-accumulate.
    assert found.energy - codes.energy == pytest.approx(found.macs * 4.3e-12, rel=1e-9)
    assert replace(codes, energy=found.energy) == found


# --- predicted ------------------------------------------------------------------------------------------------------


def chain_of(site: Site, rank: int = 12) -> Factors:
    return METHODS["filters"](site.layer).skeleton({"rank": rank})


def test_seconds_are_not_known_without_kernels_or_without_their_runtime():
    model, site, place = site_in(whole_net())
    other = Told()
    other.name = "another"
    for target, runtime in [
        (AVX2, Told()), (MEASURED, other), (MEASURED, Told(fails=True)), (MEASURED, Told(kind="strange")),
    ]:  # fmt: skip
        made = costs(model, target, runtime)
        assert made.seconds(place, chain_of(site), dense=False) is None
        assert made.of(site, place, chain_of(site)).seconds == 0.0
        assert bool(runtime.asked) == (runtime.fails or runtime.kind == "strange")


def test_no_seconds_are_asked_for_where_they_do_not_matter():
    model, site, place = site_in(whole_net())
    runtime = Told()
    made = ChainCosts(Context(model, MEASURED, runtime, batch=2), timed=False)
    assert made.of(site, place, chain_of(site)).seconds == 0.0 and not runtime.asked


@pytest.mark.parametrize("reorder", ["", "blocked-ReorderInput"])
@pytest.mark.parametrize("first", [True, False])
def test_seconds_are_those_of_the_chains_own_kernels(first, reorder):
    """What the layers around take is left out, and the image's change of layout, which is there in any case."""
    model, site, place = site_in(whole_net())
    runtime = Told(reorder=reorder)
    found = costs(model, MEASURED, runtime, threads=1).seconds(replace(place, first=first), chain_of(site), dense=False)
    one = {"n": 2, "c": 16, "m": 12, "g": 1, "h": 7, "w": 7, "kh": 3, "kw": 5, "s": 1, "d": 1, "act": 0, "sum": 0}
    other = one | {"c": 12, "m": 20, "kh": 1, "kw": 1}
    expected = [fake_kernels.kernel("conv", dims, AROUND) for dims in (one, other)]
    assert found == pytest.approx(sum(e.seconds for e in estimate(expected, MEASURED)), rel=1e-9)
    assert found == pytest.approx(sum(map(fake_kernels.law, expected)) * 1e-6, rel=0.3)
    (small, batch, threads) = runtime.asked[0]
    assert (batch, threads) == (2, 1)
    wanted = ["factor0", "factor1", "relu", "leave"]
    assert [node.name for node in small.graph] == (wanted if first else ["enter", *wanted])


def test_what_the_chain_itself_adds_in_between_counts():
    """A kernel of the runtime's own between two factors is the chain's."""
    model, site, place = site_in(whole_net())

    class Between(Told):
        def kernels(self, *arguments, **options):
            found, stands_for = super().kernels(*arguments, **options)
            relu = fake_kernels.drawn("Relu", np.random.default_rng(0), "between")
            return (*found[:3], replace(relu, dims={**relu.dims, "around": AROUND}), *found[3:]), stands_for

    plain, more = (costs(model, MEASURED, r).seconds(place, chain_of(site), dense=False) for r in (Told(), Between()))
    relu = fake_kernels.drawn("Relu", np.random.default_rng(0), "between")
    (alone,) = estimate([replace(relu, dims={**relu.dims, "around": AROUND})], MEASURED)
    assert more and plain and more - plain == pytest.approx(alone.seconds, rel=1e-9)


def test_weights_have_left_caches_in_a_larger_model():
    model, site, place = site_in(whole_net())
    far = 5e7
    found = costs(model, MEASURED, Told()).seconds(replace(place, around=far), chain_of(site), dense=False)
    expected = []
    for shape in ((12, 16, 3, 5), (20, 12, 1, 1)):
        m, c, kh, kw = shape
        dims = {"n": 2, "c": c, "m": m, "g": 1, "h": 7, "w": 7, "kh": kh, "kw": kw, "s": 1, "d": 1, "act": 0, "sum": 0}
        made = fake_kernels.kernel("conv", dims, AROUND)
        more = [4 * np.prod(shape) * (after - before) for after, before in zip(left(far), left(AROUND), strict=True)]
        gone = {"around": far, "near": made.dims["near"] + more[0], "far": made.dims["far"] + more[1]}
        expected.append(replace(made, dims={**made.dims, **gone}))
    assert found == pytest.approx(sum(e.seconds for e in estimate(expected, MEASURED)), rel=1e-9)
    near = costs(model, MEASURED, Told()).seconds(place, chain_of(site), dense=False)
    assert found and near and found > near


def test_a_dense_chain_stands_alone():
    net = Net("dense")
    net.output(net.linear(net.input("x", ["N", 240]), 240, 320, name="layer"), ["N", 320])
    model, site, place = site_in(net.model(), batch=8)
    runtime = Told(reorder="")
    found = costs(model, MEASURED, runtime).seconds(place, chain_of(site, 64), dense=True)
    kernels = [fake_kernels.kernel("gemm", {"b": 1, "m": 8, "k": k, "n": n}, AROUND) for k, n in [(240, 64), (64, 320)]]
    assert found == pytest.approx(sum(e.seconds for e in estimate(kernels, MEASURED)), rel=1e-9)
    assert [node.op_type for node in runtime.asked[0][0].graph] == ["MatMul"] * 2


def test_what_was_asked_is_remembered_by_its_shapes():
    model, site, place = site_in(whole_net())
    runtime = Told()
    made = costs(model, MEASURED, runtime)
    fitted = METHODS["filters"](site.layer).fit({"rank": 12})
    seconds = [made.seconds(place, chain, dense=False) for chain in (chain_of(site), fitted, chain_of(site))]
    assert len(set(seconds)) == 1 and len(runtime.asked) == 1
    first, second = chain_of(site)
    others = [(chain_of(site, 8), place), ((replace(first, strides=(2, 2)), second), place),
              ((replace(first, pads=(1, 1, 1, 1)), second), place), ((first, second), replace(place, first=True)),
              ((first, second), replace(place, size=(1, 16, 9, 11)))]  # fmt: skip
    for count, (chain, where) in enumerate(others, start=2):
        made.seconds(where, chain, dense=False)
        assert len(runtime.asked) == count
    unknown = Told(fails=True)
    made = costs(model, MEASURED, unknown)
    assert [made.seconds(place, chain_of(site), dense=False) for _ in range(2)] == [None, None]
    assert len(unknown.asked) == 1


def test_the_runtime_itself_is_asked():
    """onnxruntime's own kernels for the small network: one for each factor, of as many multiply-accumulates."""
    model, site, place = site_in(whole_net())
    runtime, seen = backend("onnxruntime"), []

    class Watched:
        name = "onnxruntime"

        def kernels(self, *arguments):
            seen.append(runtime.kernels(*arguments))
            return seen[-1]

    costs(model, MEASURED, Watched()).seconds(place, chain_of(site, 16), dense=False)
    ((found, stands_for),) = seen
    macs = {k.name: k.macs for k in found}
    rows = 2 * 7 * 7
    assert macs[stands_for["factor0"]] >= rows * 16 * 16 * 15 and macs[stands_for["factor1"]] >= rows * 16 * 20
    assert len({stands_for[n] for n in ("enter", "factor0", "factor1", "leave")}) == 4
