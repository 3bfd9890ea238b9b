"""The trainable view's operators, each in its corner cases against onnxruntime: max|a - b| / max|a| of at most 2e-6."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from effc.backends.torch import Torch
from effc.capture import from_proto
from tests.networks import distance, run

pytest.importorskip("torch")
TORCH = Torch()
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return (0.1 + 0.8 * RNG.random(shape)).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def single(
    op: str, inputs: Sequence[np.ndarray | None], opset: int, fed: int = 1, outputs: int = 1, **attributes
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node and what to feed it: the first `fed` inputs are fed, others are weights."""
    names = ["" if a is None else f"x{i}" for i, a in enumerate(inputs)]
    given = {name: np.asarray(a) for name, a in zip(names, inputs, strict=True) if a is not None}
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name="the_node", **attributes)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in list(given.items())[:fed]
    ]
    weights = [numpy_helper.from_array(a, n) for n, a in list(given.items())[fed:]]
    graph = helper.make_graph(
        [node], "g", infos, [helper.make_empty_tensor_value_info(o) for o in node.output], weights
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    feeds = {info.name: given[info.name] for info in infos}
    made = run(proto, feeds)
    del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in made.items()
    )
    return proto, feeds


def agree(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], tolerance: float = 2e-6) -> None:
    found = TORCH.session(TORCH.view(from_proto(proto))).run(feeds)
    assert distance(run(proto, feeds), found) <= tolerance


X = normal(2, 4, 7, 6)
CASES: dict[str, tuple] = {}


def case(name: str, op: str, *inputs: np.ndarray | None, opset: int = 17, **attributes) -> None:
    assert name not in CASES
    CASES[name] = (op, inputs, opset, attributes)


ELEMENTWISE = """
    Abs Atan Ceil Cos Cosh Erf Exp Floor HardSwish Identity IsNaN Neg Reciprocal Relu Round Sigmoid Sign Sin Sinh
    Softplus Softsign Tan Tanh Elu Celu Selu LeakyRelu ThresholdedRelu HardSigmoid Shrink Asinh
"""
for op in ELEMENTWISE.split():
    case(op, op, X)
for op in ("Sqrt", "Log", "Acos", "Asin", "Atanh"):
    case(op, op, positive(2, 3))
case("Acosh", "Acosh", 1 + positive(2, 3))
case("Round ties", "Round", np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32))
case("Mish", "Mish", X, opset=18)
case("Not", "Not", X > 0)
case("IsInf", "IsInf", np.array([1, np.inf, -np.inf], np.float32), detect_negative=0)
case("Gelu", "Gelu", X, opset=20)
case("Gelu tanh", "Gelu", X, opset=20, approximate="tanh")
case("Elu alpha", "Elu", X, alpha=0.5)
case("Selu gamma", "Selu", X, alpha=1.5, gamma=2.0)
case("HardSigmoid alpha", "HardSigmoid", X, alpha=0.5, beta=0.6)
case("LeakyRelu alpha", "LeakyRelu", X, alpha=0.3)
for op in ("Add", "Sub", "Mul", "Div"):
    case(f"{op} broadcast", op, X, normal(4, 1, 6))
for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    case(op, op, ints(1, 2, 3), ints(3, 2, 1))
for op in ("And", "Or", "Xor"):
    case(op, op, np.array([True, True, False]), np.array([True, False, False]))
case("Div integers", "Div", ints(7, -7, 7, -7), ints(2, 2, -2, -2))
case("Mod integers", "Mod", ints(7, -7, 7, -7), ints(2, 3, -3, -2))
case("Mod fmod", "Mod", normal(5) * 3, normal(5), fmod=1)
case("Pow", "Pow", positive(2, 3), np.float32(2.5))
case("Pow integer exponent", "Pow", normal(2, 3), ints(3))
case("Sum", "Sum", X, normal(1, 4, 1, 1), normal(6))
case("Mean", "Mean", X, normal(1, 4, 1, 1), normal(6))
case("Max", "Max", X, normal(4, 1, 1), normal(6))
case("Min", "Min", X, normal(4, 1, 1))
case("Max one", "Max", X)
case("Where", "Where", X > 0, X, np.float32(-1))
case("Clip both", "Clip", X, np.float32(-0.5), np.float32(0.5))
case("Clip low", "Clip", X, np.float32(-0.5))
case("Clip high", "Clip", X, None, np.float32(0.5))
case("Clip none", "Clip", X)
case("Clip integers", "Clip", ints(1, 5, 9), np.int64(2), np.int64(6))
case("Clip attributes", "Clip", X, opset=10, min=-0.5, max=0.5)
case("Clip one attribute", "Clip", X, opset=7, min=-0.5)
case("Cast to integers", "Cast", X * 3, to=7)
case("Cast to bool", "Cast", ints(0, 1, 2), to=9)
case("Cast to half", "Cast", X, to=10)
case("CastLike", "CastLike", X, ints(1))

for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSumExp"):
    case(f"{op} all", op, X, opset=18)
    case(f"{op} axes", op, X, ints(-1, 1), opset=18, keepdims=0)
    case(f"{op} attribute", op, X, opset=12, axes=[1, -1])
case("ReduceProd", "ReduceProd", positive(2, 3, 4), ints(0, -1), opset=18)
case("ReduceSumSquare", "ReduceSumSquare", X, ints(1), opset=18)
case("ReduceLogSum", "ReduceLogSum", positive(2, 3, 4), ints(1), opset=18)
case("ReduceSum no axes", "ReduceSum", X, ints(), opset=13, noop_with_empty_axes=1)
case("ReduceSum empty axes", "ReduceSum", X, ints(), opset=13)
case("ReduceSum integers", "ReduceSum", np.arange(6, dtype=np.int32).reshape(2, 3), ints(0), opset=13)
case("ArgMax", "ArgMax", X, axis=1)
case("ArgMax last", "ArgMax", np.array([[1, 3, 3], [2, 2, 1]], np.float32), axis=1, keepdims=0, select_last_index=1)
case("ArgMin", "ArgMin", X, axis=-1, keepdims=0)
case("TopK", "TopK", X, ints(2), axis=1, outputs=2)
case("TopK smallest", "TopK", X, ints(3), largest=0, outputs=2)
case("CumSum", "CumSum", X, np.int64(1))
case("CumSum exclusive reverse", "CumSum", X, np.int64(-1), exclusive=1, reverse=1)
case("Softmax", "Softmax", X)
case("Softmax axis", "Softmax", X, axis=1)
case("Softmax old", "Softmax", X, opset=11)
case("Softmax old axis", "Softmax", X, opset=11, axis=2)
case("LogSoftmax old", "LogSoftmax", X, opset=9)
case("LRN", "LRN", X, size=3, alpha=0.2, beta=0.5, bias=2.0)
case("InstanceNormalization", "InstanceNormalization", X, positive(4), normal(4))
case("GroupNormalization", "GroupNormalization", X, positive(4), normal(4), opset=21, num_groups=2)
case("LayerNormalization", "LayerNormalization", X, positive(6), normal(6))
case("LayerNormalization no bias", "LayerNormalization", X, positive(6), epsilon=0.1)
case("LayerNormalization axis", "LayerNormalization", X, positive(7, 6), normal(7, 6), axis=2)
case("LayerNormalization broadcast", "LayerNormalization", X, positive(6), normal(6), axis=1)
case("RMSNormalization", "RMSNormalization", X, positive(6), opset=23)
case("LpNormalization", "LpNormalization", X, axis=1, p=1)
case("Einsum", "Einsum", normal(2, 3, 4), normal(2, 4, 5), equation="bij, bjk -> bik")

case("MatMul vector", "MatMul", normal(4), normal(4, 3))
case("MatMul stacked", "MatMul", normal(2, 3, 4), normal(2, 4, 5))
case("MatMul weight left", "MatMul", normal(2, 3, 4), normal(4))
case("Gemm", "Gemm", normal(3, 4), normal(4, 5), normal(5))
case("Gemm transposed", "Gemm", normal(4, 3), normal(5, 4), normal(5), transA=1, transB=1)
case("Gemm scaled", "Gemm", normal(3, 4), normal(5, 4), normal(5), transB=1, alpha=0.5, beta=2.0)
case("Gemm no bias", "Gemm", normal(3, 4), normal(5, 4), transB=1)
case("Gemm bias of a row", "Gemm", normal(3, 4), normal(4, 5), normal(1, 5))
case("Gemm bias of one", "Gemm", normal(3, 4), normal(4, 5), normal(1))
case("Gemm full bias", "Gemm", normal(3, 4), normal(4, 5), normal(3, 5))

W = normal(6, 4, 3, 3)
case("Conv asymmetric", "Conv", X, W, normal(6), pads=[0, 1, 2, 0], strides=[2, 1])
case("Conv dilated", "Conv", X, W, pads=[2, 2, 2, 2], dilations=[2, 2])
case("Conv grouped", "Conv", X, normal(6, 2, 3, 3), normal(6), group=2)
case("Conv same upper", "Conv", X, normal(6, 4, 2, 3), auto_pad="SAME_UPPER", strides=[2, 2])
case("Conv same lower", "Conv", X, normal(6, 4, 2, 3), auto_pad="SAME_LOWER", strides=[2, 1])
case("Conv valid", "Conv", X, W, auto_pad="VALID")
case("Conv 1d", "Conv", normal(2, 3, 9), normal(4, 3, 3), normal(4), pads=[1, 0])
case("Conv 3d", "Conv", normal(1, 2, 5, 4, 3), normal(3, 2, 2, 2, 2), pads=[1, 0, 0, 1, 0, 0])
V = normal(4, 3, 3, 3)
case("ConvTranspose", "ConvTranspose", X, V, normal(3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 0])
case("ConvTranspose asymmetric", "ConvTranspose", X, V, normal(3), strides=[2, 2], pads=[0, 1, 1, 0])
case("ConvTranspose grouped", "ConvTranspose", X, V, group=2, dilations=[2, 1])
case("ConvTranspose same upper", "ConvTranspose", X, V, auto_pad="SAME_UPPER", strides=[2, 2])
case("ConvTranspose same lower", "ConvTranspose", X, V, auto_pad="SAME_LOWER", strides=[2, 2])
case("ConvTranspose sized", "ConvTranspose", X, V, strides=[2, 2], output_shape=[14, 12])
case("ConvTranspose padded far", "ConvTranspose", X, V, strides=[3, 2], dilations=[2, 2], output_padding=[2, 1])
case("ConvTranspose 1d", "ConvTranspose", normal(2, 3, 5), normal(3, 4, 3), strides=[3])

pool = {"kernel_shape": [3, 2], "strides": [2, 2]}
for op in ("MaxPool", "AveragePool"):
    case(f"{op}", op, X, **pool)
    case(f"{op} asymmetric", op, X, pads=[0, 1, 2, 0], **pool)
    case(f"{op} ceil", op, X, ceil_mode=1, **pool)
    case(f"{op} ceil pads", op, X, ceil_mode=1, pads=[1, 0, 1, 1], kernel_shape=[3, 3], strides=[2, 3])
    case(f"{op} same upper", op, X, auto_pad="SAME_UPPER", **pool)
    case(f"{op} same lower", op, X, auto_pad="SAME_LOWER", **pool)
    case(f"{op} over all", op, X, ceil_mode=1, pads=[0, 1, 0, 0], kernel_shape=[99, 99], strides=[99, 99])
    case(f"{op} 1d", op, normal(2, 3, 9), kernel_shape=[4])
    case(f"{op} 3d", op, normal(1, 2, 5, 4, 5), kernel_shape=[2, 2, 3], pads=[1, 0, 0, 0, 1, 0])
case("MaxPool dilated", "MaxPool", X, kernel_shape=[2, 3], dilations=[3, 2])
case(
    "MaxPool integers", "MaxPool", RNG.integers(0, 255, (1, 2, 4, 4), np.uint8), kernel_shape=[2, 2], pads=[1, 1, 0, 0]
)
case("AveragePool counted", "AveragePool", X, pads=[1, 1, 1, 1], count_include_pad=1, kernel_shape=[3, 3])
case("AveragePool counted ceil", "AveragePool", X, pads=[1, 1, 1, 1], count_include_pad=1, ceil_mode=1,
     kernel_shape=[3, 3], strides=[2, 3], opset=19)  # fmt: skip
case("AveragePool dilated", "AveragePool", X, kernel_shape=[2, 2], dilations=[3, 2], opset=19)
case("GlobalAveragePool", "GlobalAveragePool", X)
case("GlobalMaxPool", "GlobalMaxPool", X)

R = normal(1, 2, 4, 5)
scales = np.array([1, 1, 2.3, 0.6], np.float32)
for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
    for kind in ("nearest", "linear"):
        case(f"Resize {kind} {mode}", "Resize", R, None, scales, mode=kind, coordinate_transformation_mode=mode)
for how in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
    twice = np.array([1, 1, 2, 1.5], np.float32)
    case(f"Resize {how}", "Resize", R, None, twice, nearest_mode=how, coordinate_transformation_mode="asymmetric")
case("Resize sizes", "Resize", R, None, None, ints(1, 2, 7, 3), mode="linear")
case(
    "Resize to one",
    "Resize",
    R,
    None,
    None,
    ints(1, 2, 1, 1),
    mode="linear",
    coordinate_transformation_mode="align_corners",
)
case("Resize axes", "Resize", R, None, None, ints(6, 9), axes=[2, 3], mode="linear", opset=18)
case("Resize symmetric", "Resize", R, None, scales, mode="linear", opset=19,
     coordinate_transformation_mode="half_pixel_symmetric")  # fmt: skip
case("Resize cubic", "Resize", R, None, np.array([1, 1, 2, 1.5], np.float32), mode="cubic", cubic_coeff_a=-0.5)
case("Resize cubic excluding", "Resize", R, None, np.array([1, 1, 2, 1.5], np.float32), mode="cubic", exclude_outside=1)
case("Resize 10", "Resize", R, np.array([1, 1, 2, 2], np.float32), opset=10)
case("Resize 10 linear", "Resize", R, np.array([1, 1, 2, 2], np.float32), opset=10, mode="linear")
case("Upsample 9", "Upsample", R, np.array([1, 1, 2, 3], np.float32), opset=9)
case("Upsample 7", "Upsample", R, opset=7, scales=[1.0, 1.0, 2.0, 2.0], mode="linear")

case("Shape part", "Shape", X, start=1, end=-1)
case("Size", "Size", X)
case("Reshape", "Reshape", X, ints(0, -1, 2))
case("Reshape zero allowed", "Reshape", np.zeros((0, 3), np.float32), ints(3, 0), allowzero=1)
case("Flatten", "Flatten", X)
case("Flatten axis", "Flatten", X, axis=-1)
case("Flatten first", "Flatten", X, axis=0)
case("Transpose", "Transpose", X)
case("Squeeze", "Squeeze", normal(1, 3, 1, 2))
case("Squeeze axes", "Squeeze", normal(1, 3, 1, 2), ints(-2))
case("Squeeze attribute", "Squeeze", normal(1, 3, 1, 2), opset=11, axes=[0])
case("Unsqueeze", "Unsqueeze", normal(3, 2), ints(-1, 0))
case("Unsqueeze attribute", "Unsqueeze", normal(3, 2), opset=11, axes=[0, 2])
case("Concat", "Concat", X, normal(2, 3, 7, 6), axis=-3)
case("Split", "Split", X, outputs=2, axis=1, opset=13)
case("Split sizes", "Split", X, ints(1, 0, 3), outputs=3, axis=1)
case("Split attribute", "Split", X, opset=11, split=[2, 5], axis=2, outputs=2)
case("Split uneven", "Split", X, opset=18, num_outputs=3, axis=2, outputs=3)
case("Slice", "Slice", X, ints(1, -4), ints(-1, 100), ints(3, -2), ints(2, 1))
case("Slice backwards", "Slice", X, ints(-1, 4), ints(-100, 0), ints(2, 3), ints(-1, -2))
case("Slice plain", "Slice", X, ints(0, 1), ints(1, 3))
case("Slice attributes", "Slice", X, opset=9, starts=[1], ends=[5], axes=[2])
case("Gather", "Gather", X, np.array([[0, -1], [2, 1]]), axis=2)
case("Gather scalar", "Gather", X, np.int64(-1), axis=-3)
case("GatherElements", "GatherElements", normal(3, 3), np.array([[0, -1, 2], [1, 0, 0]]), axis=0)
case("GatherND", "GatherND", X, np.array([[0, 1], [-1, 2]]))
case("GatherND batch", "GatherND", X, np.array([[[0], [1]], [[-1], [2]]]), batch_dims=1)
case("ScatterND", "ScatterND", normal(4, 3), np.array([[0], [2]]), normal(2, 3))
case("ScatterND add", "ScatterND", normal(4, 3), np.array([[0], [0]]), normal(2, 3), reduction="add")
case("ScatterElements", "ScatterElements", normal(3, 3), np.array([[0, -1, 2]]), normal(1, 3), axis=0)
case("Expand", "Expand", normal(3, 1), ints(2, 1, 4))
case("Tile", "Tile", normal(2, 3), ints(2, 3))
case("ConstantOfShape", "ConstantOfShape", ints(2, 3), value=helper.make_tensor("v", 7, [1], [5]))
case("ConstantOfShape empty", "ConstantOfShape", ints())
case("Range", "Range", np.int64(3), np.int64(-4), np.int64(-2))
case("Range floats", "Range", np.float32(0), np.float32(1), np.float32(0.3))
case("NonZero", "NonZero", np.array([[1, 0], [0, 2]], np.float32))
case("OneHot", "OneHot", ints(0, -1, 7), np.int64(3), np.array([-1, 2], np.float32))
case("OneHot axis", "OneHot", ints(0, 2), np.int64(3), np.array([0, 1], np.float32), axis=0)
case("Trilu", "Trilu", normal(3, 4))
case("Trilu lower", "Trilu", normal(3, 4), np.int64(-1), upper=0)
case("DepthToSpace", "DepthToSpace", normal(1, 8, 2, 3), blocksize=2)
case("DepthToSpace CRD", "DepthToSpace", normal(1, 8, 2, 3), blocksize=2, mode="CRD")
case("SpaceToDepth", "SpaceToDepth", normal(1, 2, 4, 6), blocksize=2)
for mode in ("constant", "reflect", "edge"):
    case(f"Pad {mode}", "Pad", X, ints(0, 1, 2, 3, 0, 1, 0, 2), mode=mode)
case("Pad wrap", "Pad", X, ints(0, 0, 2, 3, 0, 0, 0, 2), mode="wrap", opset=19)
case("Pad value", "Pad", X, ints(1, 0, -1, 0, 0, 0, 2, -2), np.float32(1.5))
case("Pad axes", "Pad", X, ints(1, 0, 2, 1), None, ints(-1, 1), opset=18)
case("Pad attribute", "Pad", X, opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 0], value=2.0)

case("BatchNormalization", "BatchNormalization", X, positive(4), normal(4), normal(4), positive(4), epsilon=0.1)
case("PRelu", "PRelu", X, normal(4, 1, 1))
case("PRelu one", "PRelu", X, normal(1))
case("PRelu last axis", "PRelu", X, normal(6))
case("Dropout", "Dropout", X, np.float32(0.3), np.bool_(False))
case("Dropout mask", "Dropout", X, outputs=2)

S = np.array([0.1, 0.02, 0.5, 0.07], np.float32)
case("QuantizeLinear", "QuantizeLinear", X * 3, np.float32(0.05), np.uint8(100))
case("QuantizeLinear ties", "QuantizeLinear", np.arange(-6, 6, dtype=np.float32) / 2, np.float32(1), np.int8(3))
case("QuantizeLinear axis", "QuantizeLinear", X, S, np.array([0, 3, -5, 9], np.int8), axis=1)
case("QuantizeLinear no zero", "QuantizeLinear", X, np.float32(0.05))
case(
    "DequantizeLinear",
    "DequantizeLinear",
    RNG.integers(-128, 127, (2, 4, 3)).astype(np.int8),
    S,
    np.array([0, 3, -5, 9], np.int8),
)
case("DequantizeLinear 32", "DequantizeLinear", RNG.integers(-9999, 9999, (4,)).astype(np.int32), S, axis=0)
case("DynamicQuantizeLinear", "DynamicQuantizeLinear", X, outputs=3)
case("DynamicQuantizeLinear positive", "DynamicQuantizeLinear", positive(3, 3), outputs=3)
case("MatMulInteger", "MatMulInteger", RNG.integers(0, 255, (3, 700)).astype(np.uint8),
     RNG.integers(-127, 127, (700, 5)).astype(np.int8), np.uint8(7), np.arange(5, dtype=np.int8))  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_agrees_with_onnxruntime(name):
    """Its first input fed, the others weights; where that is possible also with all of them fed."""
    op, inputs, opset, attributes = CASES[name]
    agree(*single(op, inputs, opset, **attributes))


@pytest.mark.parametrize("name", [name for name, (_, inputs, *_) in CASES.items() if len(inputs) > 1])
def test_an_operator_agrees_with_all_inputs_fed(name):
    op, inputs, opset, attributes = CASES[name]
    agree(*single(op, inputs, opset, fed=len(inputs), **attributes))
