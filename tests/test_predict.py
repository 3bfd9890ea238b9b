"""effc.predict: sums and errors by hand, what stands in where nothing was measured, and whole models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from effc.capture import from_proto
from effc.kernels import COMMON, ELEMENTS, LIKE, Kernel
from effc.model import Model
from effc.predict import (
    FEWEST_ROWS,
    MEASURED,
    OTHER_ERROR,
    ROOFLINE,
    ROOFLINE_ERROR,
    design,
    estimate,
    predict,
)
from effc.registry import backend
from effc.regression import Hyper
from effc.target import Roof, Samples, Target
from tests import networks
from tests.fake_kernels import ROOF, drawn, kernel, law, law_together, measured, samples

RUNTIME = backend("onnxruntime")
US = 1e-6


def told(kernels: Sequence[Kernel], stands_for: Mapping[str, str]) -> Any:
    """A runtime that makes these kernels of any model."""
    return SimpleNamespace(kernels=lambda model, batch, dims, threads: (tuple(kernels), stands_for))


def relu(elements: int, name: str = "k", kind: str = "Relu") -> Kernel:
    dims = {"elements": elements, "share": 1, "run": elements, "window": 1, "broadcast": 0}
    return replace(kernel("Relu", dims, name=name), kind=kind)


def table(us: float, count: int = FEWEST_ROWS, noise: float = 0.1, alone: float | None = None) -> Samples:
    """Samples of Relu that all took as long, with an error as stated: nothing but a constant is fitted."""
    rows = [relu(100 * (i + 1)) for i in range(count)]
    ends = (us,) if alone is None else (alone, us)
    names = (*ELEMENTS, *COMMON)
    numbers = tuple((*(float(k.dims[name]) for name in names), *ends) for k in rows)
    titles = (*names, *(("us",) if alone is None else ("us_alone", "us")))
    terms = design(titles, numbers, "Relu")[0].shape[1]
    share = us if alone is None else us / alone
    return Samples(titles, numbers, Hyper((share, *[0.0] * (terms - 1)), noise=noise))


def of(tables: Mapping[int, Mapping[str, Samples]], roof: Roof = ROOF) -> Target:
    return replace(measured([]), kernels=tables, roofs={1: roof})


@pytest.fixture(scope="module")
def target() -> Target:
    return measured(["conv", "gemm", "Relu", "Relu:int8"], 40, together=4)


class TestKernels:
    @pytest.mark.parametrize(("kind", "tail"), [("conv", 0.4), ("gemm", 0.1), ("Relu", 0.1), ("Relu:int8", 0.1)])
    @pytest.mark.parametrize(("threads", "law"), [(1, law), (4, law_together)])
    def test_shapes_that_were_not_measured(self, target, kind, tail, threads, law):
        """From 40 samples with 2 % noise: half within 10 %, 95 % within the stated tail."""
        rng = np.random.default_rng(9)
        kernels = [drawn(kind, rng) for _ in range(100)]
        found = estimate(kernels, target, threads)
        off = [abs(math.log(e.seconds / US / law(k))) for e, k in zip(found, kernels, strict=True)]
        assert np.median(off) < 0.1 and np.quantile(off, 0.95) < tail
        assert {e.basis for e in found} == {MEASURED} and all(0 < e.error <= 1.1 for e in found)

    def test_a_kernel_alone_is_told_as_among_others(self, target):
        rng = np.random.default_rng(9)
        kernels = [drawn(kind, rng) for kind in ("conv", "Relu", "gemm", "conv", "Relu:int8")]
        together = estimate(kernels, target, 2)
        alone = [estimate([k], target, 2)[0] for k in kernels]
        assert [e.seconds for e in together] == pytest.approx([e.seconds for e in alone], rel=1e-9)
        assert estimate([], target) == []

    def test_a_row_of_a_table_is_one_sample(self):
        terms, features, us, errors = design(table(5.0).columns, table(5.0, 3).rows, "Relu")
        assert terms.shape[0] == features.shape[0] == 3 and us.tolist() == [5, 5, 5]
        assert errors == pytest.approx([0.7 / 5] * 3)  # the clock's jitter, as a share
        terms, wider, share, _ = design(table(5.0, alone=20.0).columns, table(5.0, 3, alone=20.0).rows, "Relu")
        assert share.tolist() == [0.25] * 3 and terms[0].tolist() == [1, 1 / 20]
        assert wider.shape == (3, features.shape[1] + 1) and wider[0, -1] == math.log(20)


class TestThreads:
    """Relu takes 100 us with one thread, and 25 us with four."""

    TARGET = of({1: {"Relu": table(100.0)}, 4: {"Relu": table(25.0, alone=100.0, noise=0.3)}})

    @pytest.mark.parametrize(("threads", "share"), [(1, 0), (2, 0.5), (3, math.log(3, 4)), (4, 1)])
    def test_between_one_and_all_threads_times_fall_by_a_power(self, threads, share):
        """Of the number of threads; and the ratio's error counts by its share."""
        (found,) = estimate([relu(300)], self.TARGET, threads)
        assert found.seconds == pytest.approx(100 * US * 0.25**share, rel=1e-6)
        assert found.error == pytest.approx(math.hypot(0.1, 0.3 * share), rel=1e-6)

    def test_more_threads_than_were_measured_are_as_all(self):
        assert estimate([relu(300)], self.TARGET, 64) == estimate([relu(300)], self.TARGET, 4)

    def test_a_kind_that_was_measured_with_one_thread_only(self):
        """Four threads are taken to need 0.7 of the time, give or take 0.3."""
        (found,) = estimate([relu(300)], of({1: {"Relu": table(100.0)}, 4: {}}), 4)
        assert found.seconds == pytest.approx(70 * US, rel=1e-6)
        assert found.error == pytest.approx(math.hypot(0.1, 0.3), rel=1e-6)

    @pytest.mark.parametrize(
        ("alone", "together", "told"),
        [(100.0, 60.0, 60.0), (100.0, 10.0, 45.0), (100.0, 300.0, 110.0), (2.0, 9.0, 9.0), (2.0, 30.0, 12.0)],
    )
    def test_threads_gain_no_more_than_their_number_and_lose_what_meeting_costs(self, alone, together, told):
        """Two: at least 0.45 of the time alone (0.9 / 2), at most 10 microseconds more; between, what was measured."""
        target = of({1: {"Relu": table(alone)}, 2: {"Relu": table(together, alone=alone)}})
        (found,) = estimate([relu(300)], target, threads=2)
        assert found.seconds == pytest.approx(told * US)

    def test_beyond_what_was_measured_the_share_levels_off(self):
        """It rises from 0.5 to 0.9 over the sizes measured and falls to 0.6; of one far larger it is the largest's."""
        kernels = [relu(round(100 * 1.3**i)) for i in range(25)]
        alone = [float(k.dims["elements"]) for k in kernels]
        together = [us * (0.5 + i / 45 if i < 18 else 0.9 - (i - 18) / 20) for i, us in enumerate(alone)]
        target = of({1: {"Relu": samples(kernels, alone)}, 2: {"Relu": samples(kernels, together, alone)}})
        for elements, share in ((round(100 * 1.3**12), 0.77), (10**11, 0.6)):
            one, two = (estimate([relu(elements)], target, threads)[0].seconds for threads in (1, 2))
            assert two / one == pytest.approx(share, abs=0.06)

    def test_without_any_measured_with_more_threads_one_is_all_that_is_known(self):
        (found,) = estimate([relu(300)], of({1: {"Relu": table(100.0)}}), 4)
        assert found.seconds == pytest.approx(100 * US, rel=1e-6)


class TestFallbacks:
    def test_a_kind_like_it_stands_in_and_widens_the_error(self):
        """LeakyRelu takes as long as Relu, with an error of 40 % at least."""
        assert LIKE["LeakyRelu"] == "Relu"
        (found,) = estimate([relu(300, kind="LeakyRelu")], of({1: {"Relu": table(9.0)}}))
        assert (found.basis, found.error) == (MEASURED, OTHER_ERROR) and found.seconds == pytest.approx(9 * US)
        (found,) = estimate([relu(300, kind="LeakyRelu")], of({1: {"Relu": table(9.0, noise=0.6)}}))
        assert found.error == pytest.approx(0.6)

    def test_a_kind_of_which_enough_was_measured_speaks_for_itself(self):
        target = of({1: {"Relu": table(9.0), "LeakyRelu": table(5.0)}})
        (found,) = estimate([relu(300, kind="LeakyRelu")], target)
        assert found.seconds == pytest.approx(5 * US) and found.error == pytest.approx(0.1)

    def test_of_too_few_samples_and_a_kind_like_it_the_latter_counts(self):
        few = table(5.0, FEWEST_ROWS - 1)
        (found,) = estimate([relu(300, kind="LeakyRelu")], of({1: {"Relu": table(9.0), "LeakyRelu": few}}))
        assert found.seconds == pytest.approx(9 * US) and found.error == OTHER_ERROR

    @pytest.mark.parametrize("other", [{}, {"Relu": table(9.0, 3)}])
    def test_few_samples_are_better_than_none(self, other):
        """Where no more was measured of what is like it either."""
        (found,) = estimate([relu(300, kind="LeakyRelu")], of({1: {"LeakyRelu": table(5.0, 2), **other}}))
        assert found.basis == MEASURED and found.seconds == pytest.approx(5 * US)

    def test_the_same_width_comes_first(self):
        """Of codes, a kernel like it on codes; else on floats."""
        codes = replace(relu(300, kind="Cast"), dtype="int8")
        tables = {"Relu": table(9.0), "Relu:int8": table(3.0)}
        assert estimate([codes], of({1: tables}))[0].seconds == pytest.approx(3 * US)
        assert estimate([codes], of({1: {"Relu": table(9.0)}}))[0].seconds == pytest.approx(9 * US)
        assert LIKE["Cast"] == "Relu"

    def test_a_chain_of_kinds_is_followed(self):
        assert (LIKE["qgemm-dynamic-row"], LIKE["qgemm-row"]) == ("qgemm-row", "qgemm")
        row = replace(drawn("gemm", np.random.default_rng(0)), kind="qgemm-dynamic-row", dtype="int8")
        target = measured(["gemm"])
        known = replace(target, kernels={1: {"qgemm": target.kernels[1]["gemm"]}})
        (found,) = estimate([row], known)
        assert found.basis == MEASURED and found.error >= OTHER_ERROR

    def test_the_roofline_is_all_where_nothing_like_it_was_measured(self):
        conv = drawn("conv", np.random.default_rng(0))
        (found,) = estimate([conv], of({1: {"Relu": table(9.0)}}))
        assert (found.basis, found.error) == (ROOFLINE, ROOFLINE_ERROR)
        assert found.seconds == ROOF.seconds(conv.macs, conv.moved)
        codes = drawn("qconv", np.random.default_rng(0))
        assert estimate([codes], of({}))[0].seconds == ROOF.seconds(codes.macs, codes.moved, "int8")

    def test_what_is_not_known_costs_as_much_as_any_node(self):
        shapeless = Kernel("k", "Relu", ("y",), {}, 0, 0, "float32", known=False)
        (found,) = estimate([shapeless], of({1: {"Relu": table(9.0)}}))
        assert (found.seconds, found.basis) == (ROOF.overhead, ROOFLINE)


def three_nodes() -> Model:
    """A convolution of 16 channels, an activation, a pool."""
    net = networks.Net("three")
    x = net.conv(net.input("x", [1, 16, 8, 8]), 16, 16, 3, name="conv", pads=[1] * 4)
    x = net.node("Relu", x, name="relu")
    net.output(net.node("GlobalAveragePool", x, name="pool"), [1, 16, 1, 1])
    return from_proto(net.model())


class TestSums:
    """Three nodes: a and b of one kind, c of another; the convolution and its activation are one of them."""

    A, B, C = relu(100, "a"), relu(200, "b"), relu(300, "c", kind="Sigmoid")
    TARGET = of({1: {"Relu": table(10.0, noise=0.1), "Sigmoid": table(30.0, noise=0.2)}})

    def found(self, target: Target = TARGET, kernels: Sequence[Kernel] = (A, B, C), **stands: str):
        stands_for = {"node_conv": "a", "node_relu": "a", "node_pool": "c"} | stands
        return predict(three_nodes(), target, backend=told(kernels, stands_for))

    def test_the_total_is_all_kernels_and_what_any_inference_costs(self):
        found = self.found()
        assert found.total.seconds == pytest.approx((10 + 10 + 30 + 7) * US, rel=1e-6)
        assert found.total.basis == MEASURED and found.notes == ()

    def test_errors_of_a_kind_go_together_and_those_of_kinds_do_not(self):
        """10 % of 20 us, and 20 % of 30 us, of 57 us in all."""
        found = self.found()
        assert found.total.error == pytest.approx(math.hypot(0.1 * 20, 0.2 * 30) / 57, rel=1e-6)
        parts = {"Relu": (20 * US, 0.1), "Sigmoid": (30 * US, 0.2)}
        assert {k: pytest.approx(v, rel=1e-6) for k, v in found.parts.items()} == parts

    def test_a_group_s_time_stands_at_the_node_of_most_work(self):
        """What the runtime adds has a place of its own."""
        found = self.found()
        assert {n: round(e.seconds / US) for n, e in found.nodes.items()} == {"node_conv": 10, "node_pool": 30}
        assert found.fused == {"node_relu": "node_conv"}
        assert {n: round(e.seconds / US) for n, e in found.moved.items()} == {"b (Relu)": 10}

    def test_what_loading_did_takes_no_time(self):
        found = self.found(node_pool="")
        assert found.fused == {"node_relu": "node_conv", "node_pool": ""} and set(found.nodes) == {"node_conv"}
        assert set(found.moved) == {"b (Relu)", "c (Sigmoid)"}

    def test_what_was_not_measured_is_noted(self):
        shapeless = Kernel("c", "NonZero", ("y",), {}, 0, 0, "float32", known=False)
        unmeasured = [replace(relu(300, name), kind="LRN") for name in "ab"]
        found = self.found(kernels=[*unmeasured, shapeless])
        assert found.notes == (
            "2 LRN by the roofline alone: no kernel of its kind was measured",
            "1 NonZero by the roofline alone: its shape is not known, or it has a body",
        )
        assert found.total.basis == ROOFLINE
        each = [ROOF.seconds(0, 8 * 300)] * 2 + [ROOF.overhead]
        assert found.total.seconds == pytest.approx(ROOF.run_overhead + sum(each), rel=1e-9)
        assert found.total.error == pytest.approx(0.5 * math.hypot(sum(each[:2]), each[2]) / found.total.seconds)

    def test_nine_tenths_have_to_be_measured(self):
        """Of all kernels: first 2 of 3 us are, then 20 of 21."""
        other = replace(relu(1, "c"), kind="LRN", known=False)
        for us, basis in ((1.0, ROOFLINE), (10.0, MEASURED)):
            target = of({1: {"Relu": table(us)}})
            assert self.found(target, (self.A, self.B, other)).total.basis == basis


class TestWithoutTheRuntime:
    def test_each_node_by_its_roofline(self):
        """Work 16 x 16 x 9 x 64 against traffic of image, weights and result; an activation is a node of its own."""
        found = predict(three_nodes(), of({}))
        assert set(found.nodes) == {"node_conv", "node_relu", "node_pool"} and not found.fused and not found.moved
        image, weights = 4 * 16 * 64, 4 * 16 * 16 * 9
        assert found.nodes["node_conv"].seconds == ROOF.seconds(147456, 2 * image + weights)
        assert found.nodes["node_relu"].seconds == ROOF.seconds(0, 2 * image)
        assert found.total.seconds == pytest.approx(ROOF.run_overhead + sum(e.seconds for e in found.nodes.values()))
        assert (found.total.basis, found.total.error) == (ROOFLINE, ROOFLINE_ERROR)
        assert found.notes == ("every node by its roofline alone: onnxruntime is not at hand to say what it fuses",)

    def test_more_threads_have_another_roof(self):
        target = replace(of({}), roofs={1: ROOF, 4: Roof({"float32": 2e11}, 2e10, 1e-6, 7e-6)})
        model = three_nodes()
        assert predict(model, target, threads=4).total.seconds < predict(model, target).total.seconds

    def test_views_are_no_kernels_and_what_is_not_known_is_told(self):
        found = predict(from_proto(networks.plain()), of({}))
        assert found.fused == {"node_flat": ""}
        found = predict(from_proto(networks.control()), of({}))
        assert found.fused["node_choice"] == "" and "node_choice" not in found.nodes
        assert any("nodes count as nothing: their cost is not known" in note for note in found.notes)


def complete(model: Model, target: Target, batch: int = 1, **dims: int):
    """A prediction by the real runtime that tells of every node once, and adds up."""
    found = predict(model, target, backend=RUNTIME, batch=batch, dims=dims)
    names = {node.name for node in model.graph}
    assert set(found.nodes) | set(found.fused) == names and not set(found.nodes) & set(found.fused)
    assert set(found.fused.values()) <= set(found.nodes) | {""}
    parts = [*found.nodes.values(), *found.moved.values()]
    assert found.total.seconds == pytest.approx(ROOF.run_overhead + sum(e.seconds for e in parts), rel=1e-9)
    assert found.total.seconds == pytest.approx(ROOF.run_overhead + sum(s for s, _ in found.parts.values()), rel=1e-9)
    assert all(np.isfinite([e.seconds, e.error]).all() and e.seconds > 0 for e in (*parts, found.total))
    return found


@pytest.fixture(scope="module")
def made_up() -> Target:
    return measured(["conv", "gemm", "Relu"], 20, together=2)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_node_of_a_model_is_told_of(name, made_up):
    found = complete(from_proto(networks.NETWORKS[name]()), made_up, T=6)
    assert found.nodes


def test_layers_lead_what_is_fused_with_them(made_up):
    found = complete(from_proto(networks.residual()), made_up, 3)
    assert found.fused["node_stem_bn"] == found.fused["node_relu2"] == "node_stem"
    assert found.fused["node_b1_add"] == found.fused["node_relu9"] == found.fused["node_b1_bn2"] == "node_b1_conv2"
    assert "node_flat" in found.nodes  # a name's change costs a node's overhead all the same


def test_functions_count_all_of_their_nodes(made_up):
    """Twice Tanh and Softmax, of which the latter stand for the function."""
    net = networks.Net("functions")
    x = net.input("x", ["N", 6])
    for index in (1, 2):
        net.nodes.append(helper.make_node("F", [x], [f"f{index}"], name=f"node_f{index}", domain="local"))
        x = f"f{index}"
    net.output(net.relu(x), ["N", 6], np.float32)
    body = [helper.make_node("Tanh", ["a"], ["b"]), helper.make_node("Softmax", ["b"], ["c"])]
    function = helper.make_function("local", "F", ["a"], ["c"], body, [helper.make_opsetid("", net.opset)])
    found = complete(from_proto(net.model(functions=[function])), made_up)
    assert set(found.nodes) == {"node_f1", "node_f2", "node_relu2"} and len(found.moved) == 2


def test_larger_batches_take_longer(made_up):
    model = from_proto(networks.mlp())
    times = [predict(model, made_up, backend=RUNTIME, batch=batch).total.seconds for batch in (1, 16, 256)]
    assert times == sorted(times) and times[2] > 2 * times[0]


def test_shapes_that_are_not_known_are_noted(made_up):
    net = networks.Net("found")
    indices = net.node("Cast", net.node("NonZero", net.input("x", ["N", 6])), to=TensorProto.FLOAT)
    net.output(net.relu(indices), [2, None])
    found = complete(from_proto(net.model()), made_up)
    assert "1 NonZero by the roofline alone: its shape is not known, or it has a body" in found.notes
    assert "1 Relu by the roofline alone: its shape is not known, or it has a body" in found.notes
