"""The kernels that onnxruntime runs for a model: their kinds, dimensions and work, and which node's work each does.

Some are read from graphs as onnxruntime writes them, spelled out here; others from what the installed one makes of a
network. Channels are mostly multiples of 16, which is what blocked layouts round up to.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc.backends._onnxruntime_kernels import kernels as read_kernels
from effc.backends._onnxruntime_networks import Net
from effc.capture import from_proto, load
from effc.cost import cost
from effc.kernels import COMMON, FREE, Kernel, describe
from effc.model import Model
from effc.registry import backend
from tests import networks

RUNTIME = backend("onnxruntime")
FLOAT, CODES, HALF = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.FLOAT16
MS, BLOCKED = "com.microsoft", "com.microsoft.nchwc"


def read(op: str, shapes: Mapping[str, Sequence[int]], *, weights: str = "", dtype: int = FLOAT, **options) -> Kernel:
    """One node of an optimised graph as a kernel; its inputs by name with their shapes, last its output `y`."""
    *inputs, y = shapes
    node = helper.make_node(op, inputs, [y], name="node", **options)
    constants = [helper.make_tensor(w, FLOAT, [0], []) for w in weights.split()]
    graph = helper.make_graph([node], "g", [], [], constants)
    known = {name: (tuple(shape), dtype) for name, shape in shapes.items()}
    return read_kernels(graph, known)[0]


def sizes(kernel: Kernel) -> dict[str, float]:
    """Dimensions of its family."""
    return {key: value for key, value in kernel.dims.items() if key not in COMMON}


class TestMatrixProducts:
    @pytest.mark.parametrize(
        ("op", "shapes", "options", "kind", "dims"),
        [
            ("MatMul", {"x": [2, 3, 8], "w": [8, 5], "y": [2, 3, 5]}, {"weights": "w"}, "gemm", (1, 6, 8, 5)),
            ("MatMul", {"x": [1, 1, 8], "w": [8, 5], "y": [1, 1, 5]}, {"weights": "w"}, "gemm-row", (1, 1, 8, 5)),
            ("MatMul", {"x": [8], "w": [8, 5], "y": [5]}, {"weights": "w"}, "gemm-row", (1, 1, 8, 5)),
            ("Gemm", {"x": [3, 8], "w": [5, 8], "y": [3, 5]}, {"weights": "w", "transB": 1}, "gemm", (1, 3, 8, 5)),
            ("Gemm", {"x": [8, 3], "w": [8, 5], "y": [3, 5]}, {"weights": "w", "transA": 1}, "gemm", (1, 3, 8, 5)),
            ("FusedGemm", {"x": [1, 8], "w": [8, 5], "y": [1, 5]}, {"weights": "w"}, "gemm-row", (1, 1, 8, 5)),
            ("MatMul", {"a": [2, 4, 3, 8], "b": [2, 4, 8, 5], "y": [2, 4, 3, 5]}, {}, "gemm-pair", (8, 3, 8, 5)),
            ("FusedMatMul", {"a": [3, 8], "b": [8, 5], "y": [3, 5]}, {"domain": MS}, "gemm-pair", (1, 3, 8, 5)),
            ("MatMulInteger", {"a": [3, 8], "b": [8, 5], "y": [3, 5]}, {"weights": "b"}, "qgemm-integer", (1, 3, 8, 5)),
            (
                "MatMulIntegerToFloat", {"a": [3, 8], "b": [8, 5], "s": [], "t": [5], "y": [3, 5]},
                {"weights": "b s t", "domain": MS}, "qgemm-float", (1, 3, 8, 5),
            ),
            (
                "DynamicQuantizeMatMul", {"a": [3, 8], "b": [8, 5], "s": [5], "y": [3, 5]},
                {"weights": "b s", "domain": MS}, "qgemm-dynamic", (1, 3, 8, 5),
            ),
            (
                "DynamicQuantizeMatMul", {"a": [1, 8], "b": [8, 5], "s": [5], "y": [1, 5]},
                {"weights": "b s", "domain": MS}, "qgemm-dynamic-row", (1, 1, 8, 5),
            ),
        ],
    )  # fmt: skip
    def test_kinds(self, op, shapes, options, kind, dims):
        found = read(op, shapes, **options)
        assert (found.kind, found.macs, found.known) == (kind, math.prod(dims), True)
        assert sizes(found) == dict(zip("bmkn", dims, strict=True))
        assert found.dtype == ("int8" if kind.startswith("q") else "float32")

    @pytest.mark.parametrize(
        ("weights", "a", "kind"), [("b", [3, 8], "qgemm"), ("b", [1, 8], "qgemm-row"), ("", [3, 8], "qgemm-pair")]
    )
    @pytest.mark.parametrize(("op", "domain"), [("QGemm", MS), ("QLinearMatMul", "")])
    def test_codes_times_codes(self, op, domain, weights, a, kind):
        shapes = {"a": a, "as": [], "az": [], "b": [8, 5], "bs": [5], "bz": [5], "y": [a[0], 5]}
        found = read(op, shapes, weights=weights, domain=domain, dtype=CODES)
        assert (found.kind, found.macs, found.dtype) == (kind, a[0] * 40, "int8")
        assert sizes(found) == {"b": 1, "m": a[0], "k": 8, "n": 5}

    @pytest.mark.parametrize(("rows", "kind"), [(3, "nbits"), (1, "nbits-row")])
    def test_blocks_of_a_few_bits(self, rows, kind):
        shapes = {"x": [rows, 64], "w": [5, 2, 16], "s": [10], "y": [rows, 5]}
        found = read(
            "MatMulNBits", shapes, weights="w s", domain=MS, K=64, N=5, bits=4, block_size=32, accuracy_level=4
        )
        assert (found.kind, found.macs) == (kind, rows * 64 * 5)
        assert sizes(found) == {"b": 1, "m": rows, "k": 64, "n": 5, "bits": 4, "block": 32, "level": 4}

    @pytest.mark.parametrize(
        ("bits", "block", "level", "kind"),
        [(8, 32, 4, "nbits"), (2, 64, 4, "nbits"), (2, 16, 4, "nbits-decoded"), (2, 256, 4, "nbits-decoded"),
         (4, 32, 0, "nbits-float"), (8, 32, 1, "nbits-decoded")],
    )  # fmt: skip
    def test_slow_ways_are_kinds_of_their_own(self, bits, block, level, kind):
        shapes = {"x": [3, 256], "w": [5, 256 // block, block * bits // 8], "s": [5 * 256 // block], "y": [3, 5]}
        options = {"K": 256, "N": 5, "bits": bits, "block_size": block, "accuracy_level": level}
        assert read("MatMulNBits", shapes, weights="w s", domain=MS, **options).kind == kind


IMAGE = {"x": [2, 32, 9, 9], "w": [16, 32, 3, 3], "y": [2, 16, 9, 9]}
DIMS = {"n": 2, "c": 32, "m": 16, "g": 1, "h": 9, "w": 9, "kh": 3, "kw": 3, "s": 1, "d": 1, "act": 0, "sum": 0}
MACS = 2 * 81 * 16 * 32 * 9


class TestConvolutions:
    """As onnxruntime spells them: blocked ones in their own domain, integer ones with channels last."""

    @pytest.mark.parametrize(
        ("options", "kind", "dims"),
        [
            ({"kernel_shape": [3, 3], "pads": [1] * 4}, "conv-plain", {}),
            ({"domain": BLOCKED, "pads": [1] * 4}, "conv-image", {}),  # what it reads is in no blocks yet
            ({"domain": BLOCKED, "activation": "Relu"}, "conv-image", {}),
            ({"domain": BLOCKED, "activation": "HardSigmoid"}, "conv-image", {"act": 1}),
            ({"strides": [2, 1], "dilations": [1, 2]}, "conv-plain", {"s": 2, "d": 2}),
        ],
    )
    def test_dense_ones(self, options, kind, dims):
        found = read("Conv", IMAGE, weights="w", **options)
        assert (found.kind, found.macs, found.dtype) == (kind, MACS, "float32")
        assert sizes(found) == DIMS | dims

    def test_an_added_tensor_is_told(self):
        shapes = {"x": [2, 32, 9, 9], "w": [16, 32, 3, 3], "b": [16], "more": [2, 16, 9, 9], "y": [2, 16, 9, 9]}
        assert sizes(read("Conv", shapes, weights="w b", domain=BLOCKED))["sum"] == 1
        assert sizes(read("FusedConv", shapes, weights="w b", domain=MS))["sum"] == 1

    @pytest.mark.parametrize(
        ("inputs", "outputs", "group", "kind"),
        [
            (32, 16, 1, "qconv"),
            (32, 20, 1, "qconv"),
            (32, 12, 1, "qconv-patches"),
            (32, 18, 1, "qconv-patches"),
            (18, 16, 1, "qconv-patches"),
            (32, 32, 32, "qconv-depthwise"),
            (24, 24, 24, "qconv-depthwise-patches"),
            (32, 16, 4, "qconv-grouped"),
            (32, 64, 32, "qconv-grouped"),
        ],
    )
    @pytest.mark.parametrize("last", [True, False])
    def test_integer_ones(self, inputs, outputs, group, kind, last):
        share = inputs // group
        x, y = ([2, 9, 7, c] if last else [2, c, 9, 7] for c in (inputs, outputs))
        w = [outputs, share, 3, 3]
        shapes = {"x": x, "xs": [], "xz": [], "w": w, "ws": [], "wz": [], "ys": [], "yz": [], "y": y}
        options = {"domain": MS, "channels_last": 1} if last else {}
        found = read("QLinearConv", shapes, weights="w", dtype=CODES, group=group, **options)
        assert found.kind == (kind if last else f"{kind}-nchw") and found.dtype == "int8"
        assert found.macs == 2 * 63 * outputs * share * 9
        dims = {"n": 2, "c": share, "m": outputs // group, "g": group, "h": 9, "w": 7}
        assert sizes(found) == DIMS | dims

    def test_a_signal_is_an_image_of_one_row(self):
        found = read("Conv", {"x": [2, 32, 99], "w": [16, 32, 5], "y": [2, 16, 95]}, weights="w")
        assert sizes(found) == DIMS | {"h": 1, "w": 95, "kh": 1, "kw": 5} and found.macs == 2 * 95 * 16 * 32 * 5

    def test_a_volume_is_an_image_of_more_rows(self):
        found = read("Conv", {"x": [1, 4, 6, 6, 6], "w": [8, 4, 3, 3, 3], "y": [1, 8, 4, 4, 4]}, weights="w")
        assert found.macs == 64 * 8 * 4 * 27
        assert {k: found.dims[k] for k in ("h", "w", "kh", "kw")} == {"h": 16, "w": 4, "kh": 9, "kw": 3}

    def test_others(self):
        shapes = {"x": [2, 32, 9, 9], "w": [32, 8, 3, 3], "y": [2, 16, 19, 19]}
        found = read("ConvTranspose", shapes, weights="w", group=2, strides=[2, 2])
        assert (
            found.kind == "conv-transposed" and found.macs == 2 * 81 * 32 * 8 * 9
        )  # every input meets all of a kernel
        assert sizes(found) == DIMS | {"c": 16, "m": 8, "g": 2, "s": 2}
        found = read("ConvInteger", IMAGE, weights="w", dtype=CODES)
        assert (found.kind, found.dtype, found.macs) == ("conv-integer", "int8", MACS)


class TestElements:
    def dims(self, op: str, shapes: Mapping[str, Sequence[int]], **options) -> tuple[float, ...]:
        """Elements, share, run, window, broadcast."""
        return tuple(sizes(read(op, shapes, **options)).values())

    @pytest.mark.parametrize(
        ("perm", "run", "rows", "columns"),
        [
            ([0, 2, 1, 3], 5, 3, 4),
            ([0, 3, 1, 2], 1, 12, 5),  # what stays side by side is one axis
            ([0, 2, 3, 1], 1, 3, 20),
            ([1, 0, 2, 3], 20, 2, 3),
            ([0, 1, 2, 3], 1, 120, 1),
            (None, 1, 2, 3),
        ],
    )
    def test_a_transpose_keeps_together_what_stays_at_the_end(self, perm, run, rows, columns):
        """And makes columns of rows: of the innermost axes that trade places."""
        shape = [2, 3, 4, 5]
        made = [shape[axis] for axis in perm or (3, 2, 1, 0)]
        options = {"perm": perm} if perm else {}
        found = read("Transpose", {"x": shape, "y": made}, **options)
        assert tuple(sizes(found).values()) == (120, 1, run, 1, 0, rows, columns)
        assert found.kind == ("Transpose-runs" if run > 1 else "Transpose")

    def test_axes_of_one_element_do_not_count_in_a_transpose(self):
        apart = self.dims("Transpose", {"x": [1, 32, 1, 8], "y": [1, 8, 1, 32]}, perm=[0, 3, 2, 1])
        assert apart == self.dims("Transpose", {"x": [32, 8], "y": [8, 32]}, perm=[1, 0]) == (256, 1, 1, 1, 0, 32, 8)

    @pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div", "Pow"])
    @pytest.mark.parametrize(
        ("other", "run", "broadcast"),
        [
            ([2, 3, 4, 5], 120, 0),
            ([], 120, 0),
            ([1], 120, 0),
            ([5], 5, 1),
            ([4, 5], 20, 1),
            ([3, 1, 1], 20, 1),
            ([2, 1, 1, 1], 60, 1),
            ([3, 4, 1], 5, 1),
        ],
    )
    def test_what_a_loop_over_two_tensors_takes_at_once(self, op, other, run, broadcast):
        shape = [2, 3, 4, 5]
        assert self.dims(op, {"a": shape, "b": other, "y": shape}) == (120, 1, run, 1, broadcast)
        assert self.dims(op, {"a": other, "b": shape, "y": shape})[2:] == (run, 1, broadcast)

    def test_codes_are_added_likewise(self):
        names = {"a": [2, 3, 4], "as": [], "az": [], "b": [4], "bs": [], "bz": [], "ys": [], "yz": [], "y": [2, 3, 4]}
        found = read("QLinearAdd", names, domain=MS, dtype=CODES)
        assert tuple(sizes(found).values()) == (24, 1, 4, 1, 1) and found.key == "QLinearAdd:int8"

    def test_along_an_axis(self):
        shape = [2, 3, 4, 5]
        assert self.dims("Softmax", {"x": shape, "y": shape}, axis=1)[2] == 3
        assert self.dims("Softmax", {"x": shape, "y": shape})[2] == 5
        assert self.dims("LayerNormalization", {"x": shape, "s": [5], "y": shape})[2] == 5
        assert self.dims("Relu", {"x": shape, "y": shape}) == (120, 1, 120, 1, 0)  # all elements in one run
        assert self.dims("BatchNormalization", {"x": shape, "y": shape})[2] == 5  # the last axis

    def test_what_is_put_together_and_taken_apart(self):
        """Runs are of the smallest part."""
        assert self.dims("Concat", {"a": [2, 6, 4], "b": [2, 3, 4], "y": [2, 9, 4]}, axis=1) == (72, 1, 12, 1, 0)
        assert self.dims("Concat", {"a": [2, 9, 4], "b": [2, 9, 1], "y": [2, 9, 5]}, axis=-1)[2] == 1
        node = helper.make_node("Split", ["x"], ["y", "z"], axis=1)
        known = {"x": ((2, 9, 4), FLOAT), "y": ((2, 3, 4), FLOAT), "z": ((2, 6, 4), FLOAT)}
        assert read_kernels(helper.make_graph([node], "g", [], []), known)[0].dims["run"] == 12

    def test_pools_and_other_shapes(self):
        image, half, point = [1, 16, 8, 8], [1, 16, 4, 4], [1, 16, 1, 1]
        assert self.dims("MaxPool", {"x": image, "y": half}, kernel_shape=[3, 3]) == (1024, 0.25, 4, 9, 0)
        found = read("MaxPool", {"x": image, "y": half}, kernel_shape=[3, 3], domain=BLOCKED)
        assert found.kind == "blocked-MaxPool" and found.dims["window"] == 9
        found = read(
            "NhwcMaxPool", {"x": [1, 8, 8, 16], "y": [1, 4, 4, 16]}, kernel_shape=[3, 3], domain=MS, dtype=CODES
        )
        assert (found.kind, found.key) == ("NhwcMaxPool", "NhwcMaxPool:int8")
        assert self.dims("GlobalAveragePool", {"x": image, "y": point}) == (1024, 1 / 64, 1, 1, 0)
        wide = {"kernel_shape": [448, 448], "ceil_mode": 1}  # as some exporters pool over all there is
        assert self.dims("AveragePool", {"x": image, "y": point}, **wide) == (1024, 1 / 64, 1, 64, 0)
        assert self.dims("Resize", {"x": half, "y": image}) == (1024, 1, 8, 1, 0)
        assert self.dims("ReorderInput", {"x": image, "y": image}, domain=BLOCKED) == (1024, 1, 64, 1, 0, 16)
        made = {"x": image, "y": [1, 12, 8, 8]}
        assert self.dims("ReorderOutput", made, domain=BLOCKED) == (
            1024,
            0.75,
            64,
            1,
            0,
            12,
        )  # channels that are not padding

    def test_recurrent_layers_multiply(self):
        shapes = {"x": [7, 2, 5], "w": [1, 12, 5], "r": [1, 12, 3], "y": [7, 1, 2, 3]}
        assert read("LSTM", shapes, weights="w r", hidden_size=3).macs == 7 * 2 * 12 * (5 + 3)

    @pytest.mark.parametrize(
        ("options", "made", "kind"),
        [
            ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 16, "Resize-doubled"),
            ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 24, "Resize-nearest"),
            ({}, 16, "Resize-nearest"),
            ({"mode": "linear"}, 16, "Resize-linear"),
            ({"mode": "cubic"}, 16, "Resize-cubic"),
        ],
    )
    def test_an_image_is_resized_in_several_ways(self, options, made, kind):
        """Doubling without rounding anything has a kernel of its own."""
        shapes = {"x": [1, 3, 8, 8], "y": [1, 3, made, made]}
        assert read("Resize", shapes, **options).kind == kind
        if made == 16 and "nearest" in str(options):
            assert read("Upsample", shapes, mode="nearest").kind == "Upsample-doubled"
            assert read("Upsample", shapes, mode="nearest", domain=BLOCKED).kind == "blocked-Upsample-nearest"

    def test_codes_with_a_scale_for_each_slice_are_worked_on_slice_by_slice(self):
        shapes = {"x": [4, 6, 5], "s": [6], "y": [4, 6, 5]}
        assert self.dims("DequantizeLinear", shapes)[2] == 5 and self.dims("DequantizeLinear", shapes, axis=-2)[2] == 5
        assert self.dims("DequantizeLinear", shapes | {"s": [4]}, axis=0)[2] == 30
        assert self.dims("DequantizeLinear", shapes | {"s": []})[2] == 120

    @pytest.mark.parametrize("op", ["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape"])
    def test_a_new_name_moves_nothing(self, op):
        found = read(op, {"x": [2, 60], "y": [120]})
        assert (found.kind, found.moved, found.macs, found.dims["elements"]) == (FREE, 0, 0, 1)

    def test_bytes_moved_are_of_each_tensor_s_type(self):
        node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"])
        known = {"x": ((100,), CODES), "s": ((), FLOAT), "z": ((), CODES), "y": ((100,), FLOAT)}
        found = read_kernels(helper.make_graph([node], "g", [], []), known)[0]
        assert (found.moved, found.key, found.name) == (505, "DequantizeLinear:int8", "y")  # it has no name of its own
        assert read("Relu", {"x": [100], "y": [100]}, dtype=HALF).key == "Relu:float16"


def test_what_is_not_known_counts_for_nothing_in_between():
    nodes = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("NonZero", ["a"], ["n"])]
    found = read_kernels(helper.make_graph(nodes, "g", [], []), dict.fromkeys("xa", ((100,), FLOAT)))
    assert [(k.known, k.name, k.moved) for k in found] == [(True, "a", 800), (False, "n", 0)]
    assert found[0].dims["around"] >= 400 and found[1].dims == {}


# What the installed onnxruntime makes of networks.


def lowered(
    build: Callable[[Net], object], shape: Sequence[int], *, quantised: bool = False, batch: int = 0, **options
) -> tuple[Model, tuple[Kernel, ...], Mapping[str, str]]:
    net = Net(np.random.default_rng(0), shape, quantised, **options)
    build(net)
    model = from_proto(net.model())
    found, stands = RUNTIME.kernels(model, batch or shape[0])
    return model, found, stands


def kinds(found: Sequence[Kernel]) -> list[str]:
    """Of kernels that do more than change a layout."""
    moves = ("blocked-Reorder", "Transpose", "QuantizeLinear", "DequantizeLinear", FREE)
    return [k.kind for k in found if not k.kind.startswith(moves)]


def test_convolutions_in_float():
    def build(net: Net) -> None:
        net.conv(32, act="Relu")
        net.conv(32, act="Clip")
        net.conv(48, (1, 1))
        net.conv(48, group=48)
        net.conv(48, group=12)  # of 4 channels each, which fit no blocks
        net.conv(32, stride=2, act="LeakyRelu")

    model, found, _ = lowered(build, (1, 3, 16, 16))
    wanted = ["conv-image", "conv", "conv-pointwise", "depthwise", "conv-plain-grouped", "conv"]
    assert kinds(found) == wanted
    layers = [k for k in found if k.macs]
    assert [(k.dims["act"], k.dims["s"]) for k in layers] == [(0, 1), (1, 1), (0, 1), (0, 1), (0, 1), (1, 2)]
    assert sum(k.macs for k in found) == cost(model).total.macs


def test_blocked_layouts_round_channels_up():
    """18 outputs become 24 or 32, and are multiplied as such."""
    model, found, _ = lowered(lambda net: (net.conv(32), net.conv(18)), (1, 16, 8, 8))
    assert found[-2].dims["m"] in (24, 32)
    assert found[-2].macs == 64 * found[-2].dims["m"] * 32 * 9 > cost(model).nodes["conv1_node"].macs


def test_convolutions_in_integers():
    def build(net: Net) -> None:
        net.conv(32, act="Relu")
        net.conv(48, (1, 1), act="Clip")
        net.conv(48, group=48)
        net.conv(48, group=6)
        net.conv(18)
        net.conv(24, (1, 1))
        net.conv(24, group=24)

    model, found, stands = lowered(build, (1, 16, 16, 16), quantised=True)
    wanted = ["", "", "-depthwise", "-grouped", "-patches", "-patches", "-depthwise-patches"]
    assert kinds(found) == [f"qconv{kind}" for kind in wanted]
    assert sum(k.macs for k in found) == cost(model).total.macs and {k.dtype for k in found if k.macs} == {"int8"}
    # Activations and pairs of Q and DQ are within the layers' kernels.
    by_name = {k.name: k for k in found}
    within = {"Conv", "Relu", "Clip"}
    for node in model.graph:
        if node.op_type in within or (node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()):
            assert by_name[stands[node.name]].macs


def test_signals():
    """One-dimensional convolutions have no blocked kernels."""
    model, found, _ = lowered(lambda net: (net.conv(32, (3,)), net.conv(32, (3,), group=32)), (2, 16, 64))
    assert kinds(found) == ["conv-plain", "conv-plain-depthwise"]
    assert sum(k.macs for k in found) == cost(model, 2).total.macs


@pytest.mark.parametrize(
    ("rows", "quantised", "kind"),
    [(1, False, "gemm-row"), (4, False, "gemm"), (1, True, "qgemm-row"), (4, True, "qgemm")],
)
def test_dense_layers(rows, quantised, kind):
    """An activation is part of each, and where quantised the pairs are."""

    def build(net):
        net.dense(32, "Relu")
        net.dense(16)

    model, found, stands = lowered(build, (rows, 64), quantised=quantised)
    assert kinds(found) == [kind, kind]
    assert [k.macs for k in found if k.macs] == [rows * 64 * 32, rows * 32 * 16]
    assert sum(k.macs for k in found) == cost(model, rows).total.macs
    first = next(k.name for k in found if k.macs)
    relu = next(n.name for n in model.graph if n.op_type == "Relu")
    gemm = next(n.name for n in model.graph if n.op_type == "Gemm")
    assert stands[relu] == stands[gemm] == first


def residual_net(shortcut_first: bool = False) -> onnx.ModelProto:
    """A block of two 3 x 3 convolutions around a shortcut, and one with a projection; all channels fit blocks."""
    net = networks.Net("residual")
    x = net.relu(net.norm(net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16, 3, name="stem", pads=[1] * 4), 16, name="bn"))
    for name, inputs, outputs in (("one", 16, 16), ("two", 16, 32)):
        y = net.relu(net.conv(x, inputs, outputs, 3, name=f"{name}_a", pads=[1] * 4, bias=True))
        y = net.conv(y, outputs, outputs, 3, name=f"{name}_b", pads=[1] * 4, bias=True)
        if inputs != outputs:
            x = net.conv(x, inputs, outputs, 1, name=f"{name}_c", bias=True)
        ends = (x, y) if shortcut_first else (y, x)
        x = net.node("Relu", net.node("Add", *ends, name=f"{name}_add"), name=f"{name}_out")
    net.head(x, 32)
    return net.model()


@pytest.mark.parametrize("shortcut_first", [False, True])
def test_a_residual_network(shortcut_first):
    """All work is there, at any batch; an activation, a norm and a shortcut's end belong to the convolution."""
    model = from_proto(residual_net(shortcut_first))
    for batch in (1, 3):
        found, stands = RUNTIME.kernels(model, batch)
        assert sum(k.macs for k in found) == cost(model, batch).total.macs
        assert {k.dims["n"] for k in found if k.kind.startswith("conv")} == {batch}
    by_name = {k.name: k for k in found}
    for name in ("one", "two"):
        ends = {stands[f"node_{name}_{part}"] for part in ("add", "out")}
        assert len(ends) == 1 and by_name[ends.pop()].dims["sum"] == 1
    assert stands["node_one_add"] == stands["node_one_b"]
    assert stands["node_two_add"] in (stands["node_two_b"], stands["node_two_c"])  # whichever comes later
    assert stands["node_bn"] == stands["node_stem"] and sum(k.dims.get("sum", 0) for k in found) == 2
    assert set(stands) == {node.name for node in model.graph} and set(stands.values()) <= by_name.keys() | {""}


def test_a_transformer():
    """Products of activations are told from those with weights; scale, bias and the norm's sum are fused."""
    model = from_proto(networks.transformer())
    found, stands = RUNTIME.kernels(model, 2, {"T": 6})
    assert sum(k.macs for k in found) == cost(model, 2, {"T": 6}).total.macs
    assert kinds(found).count("gemm-pair") == 2 and kinds(found).count("gemm") == 4
    pair = next(k for k in found if k.kind == "gemm-pair")
    assert sizes(pair) == {"b": 8, "m": 6, "k": 4, "n": 6}
    layers = [k for k in found if k.kind == "gemm"]
    assert [k.dims["m"] for k in layers] == [12] * 4
    scaled = next(n.name for n in model.graph if n.op_type == "Mul")
    assert stands[scaled] == pair.name  # not to Softmax, which reads it
    assert stands["node_q_shape0"] == stands["node_q_split"]  # what shapes are made of, to what takes them


def test_a_bias_added_in_front_is_the_product_s():
    model = from_proto(networks.mlp())
    found, stands = RUNTIME.kernels(model)
    assert stands["node_fc3_add"] == stands["node_fc3"] and stands["node_bn2"] == stands["node_fc2"]
    assert sum(k.macs for k in found) == cost(model).total.macs


def test_an_activation_with_a_kernel_of_its_own_is_not_the_layer_s():
    """SiLU reads the layer's output twice; both of its nodes are one kernel, behind the convolution."""
    net = networks.Net("silu")
    x = net.conv(net.input("x", [1, 16, 8, 8]), 16, 16, 3, name="conv", pads=[1] * 4)
    net.output(net.node("Mul", x, net.node("Sigmoid", x, name="gate"), name="silu"), [1, 16, 8, 8])
    _, stands = RUNTIME.kernels(from_proto(net.model()))
    assert stands["node_gate"] == stands["node_silu"] != stands["node_conv"]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_each_node_stands_for_a_kernel_or_for_none(name):
    model = from_proto(networks.NETWORKS[name]())
    found, stands = RUNTIME.kernels(model, 1, {"T": 6})
    names = [k.name for k in found]
    assert len(set(names)) == len(names) and "" not in names  # told apart, so that times are kept by them
    assert set(stands) == {node.name for node in model.graph}
    assert set(stands.values()) <= {*names, ""}
    work = cost(model, 1, {"T": 6})
    by_name = {k.name: k for k in found}
    for node, macs in ((n, c.macs) for n, c in work.nodes.items() if c.macs):
        assert by_name[stands[node]].macs >= macs, node  # blocked channels are rounded up
    for kernel in found:
        if kernel.known:
            terms, features = describe(kernel.dims, 4)
            assert np.isfinite(terms).all() and np.isfinite(features).all()
            assert 0 <= kernel.dims["far"] <= kernel.dims["near"]
            assert 0 <= kernel.dims["made_far"] <= kernel.dims["made_near"]
            assert kernel.dims["near"] <= kernel.moved or kernel.kind == FREE


def test_a_part_of_the_model_in_half_precision_keeps_its_names():
    """Where the processor has no such kernels, onnxruntime computes in float and renames."""
    model = from_proto(networks.half())
    found, stands = RUNTIME.kernels(model)
    by_name = {k.name: k for k in found}
    assert all(by_name[stands[name]].macs for name in ("node_conv1", "node_conv2", "node_bn2"))
    assert stands["node_conv1"] != stands["node_conv2"]


def test_bodies_are_not_looked_into():
    """Those with large weights of their own, too; what comes behind is known again."""
    net = networks.Net("choice")
    x = net.input("x", ["N", 32])
    flag = net.node("Greater", net.node("ReduceMean", x, keepdims=0), net.weight("zero", np.float32(0)))
    bodies = {}
    for branch in ("then_branch", "else_branch"):
        weight = numpy_helper.from_array(net.random(32, 32), "w")  # 4 KiB, in both by the same name
        node = helper.make_node("MatMul", [x, "w"], [branch], name=f"node_{branch}")
        end = helper.make_tensor_value_info(branch, FLOAT, ["N", 32])
        bodies[branch] = helper.make_graph([node], branch, [], [end], [weight])
    net.output(net.relu(net.node("If", flag, name="choice", **bodies)), ["N", 32])
    model = from_proto(net.model())
    found, stands = RUNTIME.kernels(model, 2)
    assert [(k.kind, k.known) for k in found] == [
        ("ReduceMean", True), ("Greater", True), ("If", False), ("Relu", True)
    ]  # fmt: skip
    assert found[3].dims["elements"] == 64 and stands["node_choice"] == found[2].name


def test_sequences_of_tensors_have_no_shape():
    net = networks.Net("sequence")
    parts = net.node("SplitToSequence", net.input("x", ["N", 6]), axis=1)
    net.output(net.relu(net.node("ConcatFromSequence", parts, axis=1)), ["N", 6])
    found, _ = RUNTIME.kernels(from_proto(net.model()))
    assert [(k.kind, k.known) for k in found] == [
        ("SplitToSequence", False), ("ConcatFromSequence", False), ("Relu", False)
    ]  # fmt: skip


def test_scalars_are_known():
    """onnxruntime reports them as it reports tensors of unknown rank, such as above: without dimensions."""
    scalar = networks.Net("scalar")
    mean = scalar.node("ReduceMean", scalar.input("x", ["N", 6]), keepdims=0, name="mean")
    scalar.output(scalar.node("Mul", mean, scalar.weight("two", np.float32(2))), [])
    assert [(k.kind, k.known) for k in RUNTIME.kernels(from_proto(scalar.model()))[0]] == [
        ("ReduceMean", True), ("Mul", True)
    ]  # fmt: skip


def test_shapes_that_only_a_run_would_tell_are_unknown():
    net = networks.Net("found")
    found = net.node("Cast", net.node("NonZero", net.input("x", ["N", 6])), to=FLOAT)
    net.output(net.relu(found), [2, None])
    kernels, stands = RUNTIME.kernels(from_proto(net.model()))
    assert [k.known for k in kernels] == [False] * 3 and "" not in stands.values()


def test_nodes_of_local_functions_are_told_apart():
    """They need no names; the kernel that makes what a function returns stands for it."""
    net = networks.Net("functions")
    x = net.input("x", ["N", 6])
    for index in (1, 2):
        net.nodes.append(helper.make_node("F", [x], [f"f{index}"], name=f"node_f{index}", domain="local"))
        x = f"f{index}"
    net.output(net.relu(x), ["N", 6])
    body = [helper.make_node("Tanh", ["a"], ["b"]), helper.make_node("Softmax", ["b"], ["c"])]
    function = helper.make_function("local", "F", ["a"], ["c"], body, [helper.make_opsetid("", net.opset)])
    found, stands = RUNTIME.kernels(from_proto(net.model(functions=[function])))
    assert [k.kind for k in found] == ["Tanh", "Softmax", "Tanh", "Softmax", "Relu"]
    assert len({k.name for k in found}) == 5 and "" not in {k.name for k in found}
    assert (stands["node_f1"], stands["node_f2"]) == (found[1].name, found[3].name)


def test_an_open_batch_is_the_stated_one():
    """In float and with quantised tensors; work grows with it."""

    def build(net):
        net.conv(16, act="Relu")
        net.conv(32)

    for quantised in (False, True):
        model, one, _ = lowered(build, (1, 16, 8, 8), quantised=quantised, open_batch=True)
        many, _ = RUNTIME.kernels(model, 5)
        assert [k.kind for k in many] == [k.kind for k in one]
        assert [k.macs for k in many] == [5 * k.macs for k in one]
        assert {k.dims["n"] for k in many if k.macs} == {5}


def test_large_weights_are_not_read():
    """8 MB of them stay where they are; their shapes count."""
    net = networks.Net("large")
    weight = net.weight("w", np.zeros((1024, 2048), np.float32))
    net.output(net.node("MatMul", net.input("x", ["N", 1024]), weight), ["N", 2048])
    (found,), _ = RUNTIME.kernels(from_proto(net.model()), 4)
    assert found.kind == "gemm" and found.macs == 4 * 1024 * 2048
    assert found.moved == 4 * (4 * 1024 + 1024 * 2048 + 4 * 2048)


@pytest.mark.models
@pytest.mark.parametrize("name", ["resnet20-cifar10", "resnet56-cifar10", "vgg-small-cifar10"])
def test_real_networks(name):
    """Whose channels fit blocks: each layer's work is its kernel's."""
    model = load(Path(os.environ["EFFC_DATA"]) / "models" / f"{name}.onnx")
    for batch in (1, 8):
        found, stands = RUNTIME.kernels(model, batch)
        work = {k.name: k.macs for k in found}
        layers = {n: c.macs for n, c in cost(model, batch).nodes.items() if c.macs}
        assert {n: work[stands[n]] for n in layers} == layers and sum(work.values()) == sum(layers.values())
        assert all(k.known for k in found) and set(stands) == {node.name for node in model.graph}
