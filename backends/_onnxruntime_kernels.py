"""Which kernels onnxruntime runs for a model: its optimised graph, node by node, with physical shapes.

Shapes are onnxruntime's own: the optimised graph is loaded once more without its weights and with all tensors as
outputs, which costs milliseconds and covers its blocked and channels-last operators.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort

from effc.kernels import FREE, Kernel, nbits_kind

from ._onnxruntime_memory import placed

SIZES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4, onnx.TensorProto.UINT8: 1, onnx.TensorProto.INT8: 1, onnx.TensorProto.INT32: 4,
    onnx.TensorProto.INT64: 8, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.DOUBLE: 8, onnx.TensorProto.BOOL: 1,
    onnx.TensorProto.BFLOAT16: 2,
}  # fmt: skip
BLOCKED = "com.microsoft.nchwc"
FREE_OPS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Constant"}  # in place, or tiny
NOTHING = {"elements": 1, "share": 1, "run": 1, "window": 1, "broadcast": 0}
BODIES = {"If", "Loop", "Scan"}
RECURRENT = {"LSTM", "GRU", "RNN"}
# Operators whose time depends on how long the last axis is; others take all elements as one run.
ALONG_AXES = {
    "Slice", "Pad", "Resize", "Upsample", "MaxPool", "NhwcMaxPool", "AveragePool", "QLinearAveragePool", "Gather",
    "GlobalAveragePool", "QLinearGlobalAveragePool", "BatchNormalization", "LRN", "ReduceMean", "Expand", "Tile",
    "SpaceToDepth", "DepthToSpace",
}  # fmt: skip

Shape = tuple[int, ...]
Tensor = tuple[Shape, int]  # shape, element type


def tensors(
    optimised: onnx.ModelProto, sizes: Mapping[str, int], known: Mapping[str, tuple | None], options: ort.SessionOptions
) -> dict[str, Tensor]:
    """Shape and element type of every tensor of an optimised graph, weights included, as far as can be known.

    Args:
        optimised: its large weights lie outside and are not read.
        sizes: symbolic dimension -> its size.
        known: shapes of the model it came from, by name: for what only a run would tell.
        options: for a load without optimisation.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(optimised)
    inner = proto.graph
    found: dict[str, Tensor] = {i.name: (tuple(i.dims), i.data_type) for i in inner.initializer}
    large = [i for i in inner.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
    small = [i for i in inner.initializer if i.data_location != onnx.TensorProto.EXTERNAL]
    inputs = {i.name for i in inner.input}
    for weight in large:
        if weight.name not in inputs:
            inner.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    del inner.initializer[:]
    inner.initializer.extend(small)
    for node in inner.node:
        _without_weights(node)
    del inner.value_info[:]
    shown = {v.name for v in inner.output}
    for node in inner.node:
        inner.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name and name not in shown)
    for dimension, size in sizes.items():
        options.add_free_dimension_override_by_name(dimension, size)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for value in (*session.get_inputs(), *session.get_outputs()):
        shape, kind = tuple(value.shape), _type(value.type)
        if kind is None:
            continue
        if not all(isinstance(d, int) for d in shape):
            shape = tuple(sizes.get(d, d) if isinstance(d, str) else d for d in shape)
        # An empty shape is that of a scalar, or of a tensor whose rank was not found.
        if not shape or not all(isinstance(d, int) for d in shape):
            named = known.get(value.name)
            if named is None or not all(isinstance(d, int) for d in named):
                continue
            shape = tuple(named)
        found.setdefault(value.name, (shape, kind))
    return found


def _without_weights(node: onnx.NodeProto) -> None:
    """Bodies have no inputs: weights of theirs that lie outside become nodes that make such tensors."""
    for body in (graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else a.graphs)):
        for inner in body.node:
            _without_weights(inner)
        makers, weights, nodes = [], list(body.initializer), list(body.node)
        del body.initializer[:], body.node[:]
        for weight in weights:
            if weight.data_location == onnx.TensorProto.EXTERNAL:
                zero = np.zeros(1, onnx.helper.tensor_dtype_to_np_dtype(weight.data_type))
                value, inputs = onnx.numpy_helper.from_array(zero), [f"{weight.name}/shape"]
                makers.append(onnx.helper.make_node("ConstantOfShape", inputs, [weight.name], value=value))
                weight = onnx.numpy_helper.from_array(np.array(weight.dims, np.int64), *inputs)
            body.initializer.append(weight)
        body.node.extend([*makers, *nodes])


def kernels(graph: onnx.GraphProto, known: Mapping[str, Tensor]) -> list[Kernel]:
    """Every node of an optimised graph as a kernel with its dimensions."""
    weights = {i.name for i in graph.initializer}
    blocked: set[str] = set()  # tensors in blocked layout
    found = []
    for node in graph.node:
        makes = node.op_type != "ReorderOutput" if node.domain == BLOCKED else any(n in blocked for n in node.input)
        if makes:
            blocked.update(node.output)
        found.append(_kernel(node, known, weights, blocked))
    return placed(graph, found, {name: _bytes(tensor) for name, tensor in known.items()})


def _kernel(node: onnx.NodeProto, known: Mapping[str, Tensor], weights: set[str], blocked: set[str]) -> Kernel:
    ins = [known.get(name) for name in node.input if name]
    outs = [known.get(name) for name in node.output if name]
    name = node.name or next(filter(None, node.output), "")  # within functions, nodes need none
    if node.op_type in BODIES or any(t is None for t in (*ins, *outs)) or not outs:
        return Kernel(name, _op(node), tuple(node.output), {}, 0, 0, "float32", known=False)
    moved = sum(_bytes(t) for t in (*ins, *outs))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    first, out = (known[node.input[0]] if node.input and node.input[0] else outs[0]), outs[0]
    kind, dims, macs, dtype = _op(node), {}, 0, _dtype(first)
    if node.op_type in ("Conv", "FusedConv", "QLinearConv", "ConvInteger"):
        kind, dims, macs = _convolution(node, known, attributes, blocked)
    elif node.op_type == "ConvTranspose":
        kind, dims, macs = _transposed(known, node, attributes)
    elif node.op_type in MATRIX:
        kind, dims, macs = _matrix(node, known, attributes, weights)
    elif node.op_type in FREE_OPS:
        kind, moved, dims, dtype = FREE, 0, NOTHING, "float32"
    else:
        dims = _elements(node, first, out, attributes, known)
        if node.op_type in RECURRENT:
            macs = math.prod(first[0][:2]) * sum(math.prod(known[n][0]) for n in node.input[1:3])
        if node.op_type in ("Resize", "Upsample"):
            kind += _interpolation(node, attributes, first[0], out[0])
        elif node.op_type == "Transpose" and dims["run"] > 1:
            kind += "-runs"
    if node.op_type in INTEGER or node.op_type.startswith(("QLinear", "QGemm")):
        dtype = "int8"
    return Kernel(name, kind, tuple(node.output), dims, macs, moved, dtype)


INTEGER = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "ConvInteger"}
MATRIX = {  # operator -> places of its two operands; None: a weight of its own form
    "MatMul": (0, 1), "Gemm": (0, 1), "FusedGemm": (0, 1), "FusedMatMul": (0, 1), "MatMulNBits": (0, None),
    "QGemm": (0, 3), "QLinearMatMul": (0, 3), "MatMulIntegerToFloat": (0, 1), "DynamicQuantizeMatMul": (0, 1),
    "MatMulInteger": (0, 1),
}  # fmt: skip


def _convolution(node, known, attributes, blocked) -> tuple[str, dict[str, float], int]:
    """Kind of convolution, its dimensions (of the image that comes out), its multiply-accumulates."""
    quantised = node.op_type == "QLinearConv"
    (x, _), (w, _) = known[node.input[0]], known[node.input[3 if quantised else 1]]
    out = known[node.output[0]][0]
    last = bool(attributes.get("channels_last", 0))
    spatial = out[1:-1] if last else out[2:]
    inputs, outputs = (x[-1], out[-1]) if last else (x[1], out[1])
    group = attributes.get("group", 1)
    kernel = list(attributes.get("kernel_shape") or w[2:])
    strides = list(attributes.get("strides") or [1] * len(kernel))
    inner, filters = math.prod(kernel) * (w[1] if node.domain != BLOCKED else inputs // group), outputs
    activation = attributes.get("activation", b"")
    dims = {
        "n": out[0], "c": inputs // group, "m": filters // group, "g": group,
        "h": math.prod(spatial[:-1]) if len(spatial) > 1 else 1, "w": spatial[-1] if spatial else 1,
        "kh": math.prod(kernel[:-1]) if len(kernel) > 1 else 1, "kw": kernel[-1] if kernel else 1,
        "s": max(strides, default=1), "d": max(attributes.get("dilations") or [1]),
        "act": 0 if activation in (b"", b"Relu") else 1,
        "sum": int(len(node.input) > 3 and not quantised and bool(node.input[3])),
    }  # fmt: skip
    depthwise = group > 1 and inputs == group == outputs
    if node.domain == BLOCKED:
        if depthwise:
            kind = "depthwise"
        elif group > 1:
            kind = "conv-grouped-blocked"
        elif node.input[0] not in blocked:
            kind = "conv-image"
        elif math.prod(kernel) == 1 and not any(attributes.get("pads") or ()):
            kind = "conv-pointwise"
        else:
            kind = "conv"
    else:
        start = "qconv" if quantised else "conv-integer" if node.op_type == "ConvInteger" else "conv-plain"
        kind = start + ("-depthwise" if depthwise else "-grouped" if group > 1 else "")
        # The kernel without patches takes these channels; the others go through patches and a matrix product.
        fitting = outputs % 16 == 0 if depthwise else outputs >= 16 and outputs % 4 == 0 and inputs % 4 == 0
        if quantised and not fitting and (group == 1 or depthwise):
            kind += "-patches"
        if quantised and not last:
            kind += "-nchw"
    return kind, dims, math.prod(spatial) * out[0] * filters * inner


def _transposed(known, node, attributes) -> tuple[str, dict[str, float], int]:
    """A transposed convolution, by the image that goes in."""
    x, w = known[node.input[0]][0], known[node.input[1]][0]
    group, spatial, kernel = attributes.get("group", 1), x[2:], w[2:]
    dims = {
        "n": x[0], "c": w[0] // group, "m": w[1], "g": group,
        "h": math.prod(spatial[:-1]), "w": spatial[-1] if spatial else 1,
        "kh": math.prod(kernel[:-1]), "kw": kernel[-1] if kernel else 1,
        "s": max(attributes.get("strides") or [1]), "d": 1, "act": 0, "sum": 0,
    }  # fmt: skip
    return "conv-transposed", dims, x[0] * math.prod(spatial) * math.prod(w)


def _matrix(node, known, attributes, weights) -> tuple[str, dict[str, float], int]:
    """Kind of matrix product; m, k, n of one product and the number b of products."""
    first, second = MATRIX[node.op_type]
    a = known[node.input[first]][0]
    out = known[node.output[0]][0]
    columns = out[-1] if out else 1
    transposed = attributes.get("transA", 0)
    inner = (a[-2] if transposed else a[-1]) if len(a) > 1 else a[0]
    constant = second is None or node.input[second] in weights
    rows = math.prod(out[:-1])
    count = 1
    if not constant and len(out) > 2:
        count, rows = math.prod(out[:-2]), out[-2]
    kinds = {"QGemm": "qgemm", "QLinearMatMul": "qgemm", "MatMulNBits": "nbits", "MatMulInteger": "qgemm-integer"}
    kind = kinds.get(node.op_type, node.op_type if node.op_type in INTEGER else "gemm")
    kind = {"MatMulIntegerToFloat": "qgemm-float", "DynamicQuantizeMatMul": "qgemm-dynamic"}.get(kind, kind)
    dims = {"b": count, "m": rows, "k": inner, "n": columns}
    if kind == "nbits":
        bits, block = attributes.get("bits", 4), attributes.get("block_size", 32)
        dims |= {"bits": bits, "block": block, "level": attributes.get("accuracy_level", 0)}
        kind = nbits_kind(bits, block, int(dims["level"]))
    if kind in ("gemm", "qgemm") and not constant:
        kind += "-pair"
    elif count * rows == 1:
        kind += "-row"  # a vector: the weights are read once and that is all
    return kind, dims, count * rows * inner * columns


def _elements(node, first: Tensor, out: Tensor, attributes, known) -> dict[str, float]:
    """Elements in and out, and the length of what is worked on as one run."""
    shape, made = first[0], out[0]
    last = node.op_type.startswith("Nhwc") or attributes.get("channels_last", 0)
    spatial = shape[1:-1] if last else shape[2:]
    window = math.prod(map(min, attributes.get("kernel_shape") or [], spatial))  # beyond the image nothing is read
    axis = attributes.get("axis", 1 if node.op_type == "DequantizeLinear" else -1)
    run, broadcast, extra = made[-1] if made else 1, 0, {}
    if node.op_type in ("Softmax", "LayerNormalization", "SkipLayerNormalization", "LogSoftmax") and shape:
        run = shape[axis]
    elif node.op_type == "DequantizeLinear" and shape and math.prod(known[node.input[1]][0]) > 1:
        run = math.prod(shape[axis % len(shape) + 1 :])  # a scale for each slice along the axis
    elif node.op_type == "Transpose":
        run, extra = _swapped(shape, attributes.get("perm"))
    elif node.op_type == "Concat" and made:
        smallest = min(known[n][0][axis] for n in node.input if n in known and known[n][0])
        run = smallest * math.prod(made[axis % len(made) + 1 :])
    elif node.op_type in ("Split", "QLinearConcat") and made:
        run = made[axis] * math.prod(made[axis % len(made) + 1 :])
    elif node.op_type.startswith("Reorder"):
        plain = made if node.op_type == "ReorderOutput" else shape
        run, extra = math.prod(plain[2:]), {"rows": plain[1] if len(plain) > 1 else 1}
    elif node.op_type not in ALONG_AXES:
        run = math.prod(made)
        if len(node.input) > 1 and node.op_type.removeprefix("QLinear") in ("Add", "Mul", "Sub", "Div", "Sum", "Pow"):
            other = known[node.input[3 if node.op_type.startswith("Q") else 1]][0]
            run, broadcast = _broadcast_run(shape, other, made)
    elements = max(math.prod(shape), math.prod(made), 1)
    return {"elements": elements, "share": math.prod(made) / elements, "run": max(run, 1), "window": window,
            "broadcast": broadcast, **extra}  # fmt: skip


def _interpolation(node: onnx.NodeProto, attributes: Mapping[str, object], shape: Shape, made: Shape) -> str:
    """How an image is resized: doubling in the plainest way has a kernel of its own."""
    mode = attributes.get("mode", b"nearest").decode()
    if mode != "nearest" or node.domain == BLOCKED:
        return f"-{mode}"
    plain = node.op_type == "Upsample" or (
        attributes.get("coordinate_transformation_mode") == b"asymmetric" and attributes.get("nearest_mode") == b"floor"
    )
    doubled = len(shape) == 4 and made == (*shape[:2], 2 * shape[2], 2 * shape[3])
    return "-doubled" if plain and doubled else "-nearest"


def _broadcast_run(a: Shape, b: Shape, made: Shape) -> tuple[int, int]:
    """Elements that a loop over two tensors takes together, and whether one of them is repeated."""
    if math.prod(a) == math.prod(b) or 1 in (math.prod(a), math.prod(b)):
        return math.prod(made), 0
    smaller = a if math.prod(a) < math.prod(b) else b
    padded = (1,) * (len(made) - len(smaller)) + tuple(smaller)
    run, repeated = 1, padded[-1] == 1
    for axis in range(len(made) - 1, -1, -1):
        if (padded[axis] == 1) != repeated:
            break
        run *= made[axis]
    return run, 1


def _swapped(shape: Shape, perm: Sequence[int] | None) -> tuple[int, dict[str, int]]:
    """Elements that a transpose keeps together; the innermost axes that trade places, as rows and columns."""
    perm = [axis for axis in perm or range(len(shape))[::-1] if shape[axis] != 1]
    blocks: list[list[int]] = []  # axes that stay side by side
    for axis in perm:
        if blocks and all(shape[a] == 1 for a in range(blocks[-1][-1] + 1, axis)) and axis > blocks[-1][-1]:
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    sizes = [math.prod(shape[a] for a in block) for block in blocks]
    kept = blocks and blocks[-1][-1] == max(perm)
    run = sizes.pop() if kept and len(blocks) > 1 else 1
    return run, {"rows": sizes[-1] if sizes else 1, "columns": sizes[-2] if len(sizes) > 1 else 1}


def _op(node: onnx.NodeProto) -> str:
    prefix = {BLOCKED: "blocked-", "com.microsoft": ""}.get(node.domain, "")
    return prefix + node.op_type


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor[0]) * SIZES.get(tensor[1], 4)


def _dtype(tensor: Tensor) -> str:
    size = SIZES.get(tensor[1], 4)
    return {1: "int8", 2: "float16"}.get(size, "float32")


def _type(text: str) -> int | None:
    """Element type of a tensor; None of a sequence, a map, or what may be missing."""
    if not text.startswith("tensor("):
        return None
    name = text.removeprefix("tensor(").removesuffix(")")
    return onnx.TensorProto.DataType.Value({"float": "FLOAT", "double": "DOUBLE"}.get(name, name.upper()))
