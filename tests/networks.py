"""Small networks, seeded, for tests of everything that takes a model. `NETWORKS` names them all."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


class Net:
    """Writes a graph node by node; each method returns the name of the tensor it makes."""

    def __init__(self, name: str, opset: int = 17, dtype: type = np.float32) -> None:
        self.name, self.opset, self.dtype = name, opset, dtype
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str | None], dtype: type | None = None) -> str:
        self.inputs.append(_info(name, dtype or self.dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str | None] | None = None, dtype: type | None = None) -> None:
        self.outputs.append(_info(name, dtype or self.dtype, shape))

    def weight(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = array
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        made = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op, list(inputs), made, name=f"node_{name}", **attributes))
        return name

    def random(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def conv(
        self, x: str, n: int, d: int, k: int | Sequence[int], *, name: str, bias: bool = False, group: int = 1,
        transposed: bool = False, **attributes,
    ) -> str:  # fmt: skip
        kernel = (k, k) if isinstance(k, int) else tuple(k)
        shape = (n, d // group, *kernel) if transposed else (d, n // group, *kernel)
        scale = (2 / (shape[1] * np.prod(kernel))) ** 0.5
        inputs = [x, self.weight(f"{name}.weight", self.random(*shape, scale=scale))]
        if bias:
            inputs.append(self.weight(f"{name}.bias", self.random(d, scale=0.2)))
        op = "ConvTranspose" if transposed else "Conv"
        return self.node(op, *inputs, name=name, kernel_shape=kernel, group=group, **attributes)

    def norm(self, x: str, channels: int, *, name: str, **attributes) -> str:
        """Batch norm with statistics well away from the identity."""
        arrays = {
            "weight": 1 + self.random(channels, scale=0.3),
            "bias": self.random(channels, scale=0.3),
            "running_mean": self.random(channels, scale=0.3),
            "running_var": (0.5 + self.rng.random(channels)).astype(self.dtype),
        }
        inputs = [self.weight(f"{name}.{key}", array.astype(self.dtype)) for key, array in arrays.items()]
        return self.node("BatchNormalization", x, *inputs, name=name, **attributes)

    def linear(self, x: str, n: int, d: int, *, name: str, bias: bool = True) -> str:
        inputs = [x, self.weight(f"{name}.weight", self.random(d, n, scale=n**-0.5))]
        if bias:
            inputs.append(self.weight(f"{name}.bias", self.random(d, scale=0.2)))
        return self.node("Gemm", *inputs, name=name, transB=1)

    def relu(self, x: str) -> str:
        return self.node("Relu", x)

    def head(self, x: str, channels: int, classes: int = 5, batch: int | str = "N") -> None:
        """Global pool, flatten, linear: the outputs of a classifier."""
        pooled = self.node("GlobalAveragePool", x, name="pool")
        flat = self.node("Flatten", pooled, name="flat")
        self.output(self.linear(flat, channels, classes, name="fc"), [batch, classes])

    def model(self, *, ir_version: int | None = None, functions: Sequence[onnx.FunctionProto] = ()) -> onnx.ModelProto:
        initializers = [numpy_helper.from_array(a, n) for n, a in self.weights.items()]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
        version = ir_version or helper.find_min_ir_version_for(imports, ignore_unknown=True)
        return helper.make_model(graph, opset_imports=imports, ir_version=max(version, 4), functions=functions)


def plain() -> onnx.ModelProto:
    """Conv, batch norm and ReLU in a row: one with a bias, one with a stride."""
    net = Net("plain")
    x = net.input("input", ["N", 3, 12, 12])
    x = net.relu(net.norm(net.conv(x, 3, 8, 3, name="conv1", pads=[1] * 4), 8, name="bn1"))
    x = net.relu(net.norm(net.conv(x, 8, 16, 3, name="conv2", pads=[1] * 4, strides=[2, 2], bias=True), 16, name="bn2"))
    x = net.relu(net.conv(x, 16, 16, 3, name="conv3", pads=[1] * 4, bias=True))
    net.head(x, 16)
    return net.model()


def residual() -> onnx.ModelProto:
    """Two residual blocks, the second with a projection."""
    net = Net("residual")
    x = net.input("input", ["N", 3, 12, 12])
    x = net.relu(net.norm(net.conv(x, 3, 8, 3, name="stem", pads=[1] * 4), 8, name="stem_bn"))
    for index, (n, d, stride) in enumerate([(8, 8, 1), (8, 16, 2)], start=1):
        conv = net.conv(x, n, d, 3, name=f"b{index}_conv1", pads=[1] * 4, strides=[stride, stride])
        y = net.relu(net.norm(conv, d, name=f"b{index}_bn1"))
        y = net.norm(net.conv(y, d, d, 3, name=f"b{index}_conv2", pads=[1] * 4), d, name=f"b{index}_bn2")
        if n != d:
            x = net.conv(x, n, d, 1, name=f"b{index}_conv3", strides=[stride, stride])
            x = net.norm(x, d, name=f"b{index}_bn3")
        x = net.relu(net.node("Add", y, x, name=f"b{index}_add"))
    net.head(x, 16)
    return net.model()


def depthwise() -> onnx.ModelProto:
    """Depthwise and pointwise convolutions with Clip, a grouped convolution, at a fixed batch of 1."""
    net = Net("depthwise", opset=13)
    low, high = net.weight("low", np.float32(0)), net.weight("high", np.float32(6))
    x = net.input("input", [1, 3, 12, 12])
    x = net.norm(net.conv(x, 3, 8, 3, name="conv", pads=[1] * 4, strides=[2, 2]), 8, name="bn")
    x = net.node("Clip", x, low, high, name="clip")
    x = net.norm(net.conv(x, 8, 8, 3, name="dw", pads=[1] * 4, group=8), 8, name="dw_bn")
    x = net.node("Clip", x, low, high, name="dw_clip")
    x = net.norm(net.conv(x, 8, 16, 1, name="pw"), 16, name="pw_bn")
    x = net.relu(net.norm(net.conv(x, 16, 16, 3, name="grouped", group=4, bias=True), 16, name="grouped_bn"))
    net.head(x, 16, batch=1)
    return net.model()


def branches() -> onnx.ModelProto:
    """Parallel branches joined by Concat; batch norm and ReLU before a 1x1 convolution, as in a dense block."""
    net = Net("branches")
    x = net.input("input", ["N", 3, 12, 12])
    x = net.relu(net.conv(x, 3, 8, 3, name="stem", pads=[1] * 4, bias=True))
    a = net.relu(net.norm(net.conv(x, 8, 6, 1, name="a"), 6, name="a_bn"))
    b = net.relu(net.norm(net.conv(x, 8, 10, 3, name="b", pads=[1] * 4), 10, name="b_bn"))
    c = net.node("MaxPool", x, name="c", kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    x = net.node("Concat", a, b, c, name="concat", axis=1)
    x = net.relu(net.norm(x, 24, name="dense_bn"))
    x = net.conv(x, 24, 12, 1, name="dense")
    x = net.conv(net.norm(x, 12, name="mid_bn"), 12, 12, 3, name="last", bias=True)
    net.head(net.relu(x), 12)
    return net.model()


def mlp() -> onnx.ModelProto:
    """Gemm and MatMul with batch norm behind and before, and one Add as bias."""
    net = Net("mlp", opset=15)
    x = net.input("input", ["N", 20])
    x = net.relu(net.norm(net.linear(x, 20, 16, name="fc1"), 16, name="bn1"))
    x = net.node("MatMul", x, net.weight("fc2.weight", net.random(16, 12, scale=0.25)), name="fc2")
    x = net.relu(net.norm(x, 12, name="bn2"))
    x = net.node("MatMul", x, net.weight("fc3.weight", net.random(12, 12, scale=0.25)), name="fc3")
    x = net.node("Add", net.weight("fc3.bias", net.random(12)), x, name="fc3_add")
    x = net.relu(net.norm(x, 12, name="bn3"))
    net.output(net.linear(net.norm(x, 12, name="bn4"), 12, 5, name="fc4"), ["N", 5])
    return net.model()


def scores_of(*sizes: int, softmax: bool = False) -> onnx.ModelProto:
    """Dense layers fc0, fc1, ... of these sizes with ReLUs between them, on x [N, sizes[0]]."""
    net = Net("dense")
    x = net.input("x", ["N", sizes[0]])
    for number, (n, d) in enumerate(pairwise(sizes)):
        x = net.linear(net.relu(x) if number else x, n, d, name=f"fc{number}")
    net.output(net.node("Softmax", x, axis=1) if softmax else x, ["N", sizes[-1]])
    return net.model()


def transformer() -> onnx.ModelProto:
    """One block of attention over a dynamic sequence, its heads split by Shape, Gather, Concat and Reshape."""
    net = Net("transformer")
    x = net.input("input", ["N", "T", 16])
    heads = []
    for part in "qkv":
        y = net.node("MatMul", x, net.weight(f"{part}.weight", net.random(16, 16, scale=0.25)), name=part)
        y = net.node("Reshape", y, _dynamic_shape(net, y, part, [4, 4]), name=f"{part}_split")
        heads.append(net.node("Transpose", y, name=f"{part}_heads", perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]))
    scores = net.node("Mul", net.node("MatMul", *heads[:2]), net.weight("half", np.float32(0.5)))
    y = net.node("MatMul", net.node("Softmax", scores, axis=-1), heads[2])
    y = net.node("Transpose", y, perm=[0, 2, 1, 3])
    y = net.node("Reshape", y, _dynamic_shape(net, y, "join", [16]), name="join")
    y = net.node("Add", x, y)
    scale, bias = net.weight("ln.weight", 1 + net.random(16)), net.weight("ln.bias", net.random(16))
    y = net.node("LayerNormalization", y, scale, bias, name="ln")
    y = net.node("MatMul", y, net.weight("out.weight", net.random(16, 5, scale=0.25)), name="out")
    net.output(y, ["N", "T", 5])
    return net.model()


def masked() -> onnx.ModelProto:
    """An encoder's block with its norms behind the sums, some positions hidden; one channel stands out."""
    net = Net("masked")
    x, seen = net.input("input", ["N", "T", 16]), net.input("seen", ["N", "T"])
    value = net.node("MatMul", x, net.weight("v.weight", net.random(16, 16, scale=0.25)), name="v")
    hidden = net.node("Less", seen, net.weight("least", np.float32(-1)))
    mask = net.node("Where", hidden, net.weight("low", np.float32(-1e9)), net.weight("none", np.float32(0)))
    mask = net.node("Unsqueeze", mask, net.weight("axis", np.array([1])), name="mask")
    alike = net.node("MatMul", x, net.node("Transpose", x, perm=[0, 2, 1]))
    alike = net.node("Mul", alike, net.weight("quarter", np.float32(0.25)))
    y = net.node("MatMul", net.node("Softmax", net.node("Add", alike, mask, name="scores"), axis=-1), value)
    for name, sizes in (("a", [16]), ("f", [32, 16])):
        inner, kept = 16, x
        y = x if name == "f" else y
        for place, size in enumerate(sizes):
            y = net.node("MatMul", y, net.weight(f"{name}{place}.w", net.random(inner, size, scale=inner**-0.5)))
            y = net.node("Add", y, net.weight(f"{name}{place}.b", net.random(size, scale=0.2)))
            y, inner = net.node("Mul", y, net.node("Sigmoid", y)) if size == 32 else y, size
        scale = 1 + net.random(16, scale=0.2)
        scale[3] = 3
        norm = [net.weight(f"{name}.scale", scale), net.weight(f"{name}.shift", net.random(16, scale=0.1))]
        y = x = net.node("LayerNormalization", net.node("Add", kept, y, name=f"{name}_sum"), *norm, name=f"{name}_norm")
    net.output(y, ["N", "T", 16])
    return net.model()


def _dynamic_shape(net: Net, x: str, name: str, tail: list[int]) -> str:
    """[size of axis 0, size of axis 1, *tail], as torch's first exporter spells it."""
    sizes = []
    for axis in (0, 1):
        shape = net.node("Shape", x, name=f"{name}_shape{axis}")
        index = net.node("Constant", name=f"{name}_index{axis}", value=numpy_helper.from_array(np.array(axis)))
        size = net.node("Gather", shape, index, name=f"{name}_gather{axis}", axis=0)
        zero = net.node("Constant", name=f"{name}_zero{axis}", value=numpy_helper.from_array(np.array([0])))
        sizes.append(net.node("Unsqueeze", size, zero, name=f"{name}_unsqueeze{axis}"))
    sizes.append(net.node("Constant", name=f"{name}_tail", value=numpy_helper.from_array(np.array(tail))))
    return net.node("Concat", *sizes, name=f"{name}_target", axis=0)


def old() -> onnx.ModelProto:
    """Opset 9, IR 3: weights are graph inputs, axes are attributes, a flatten spelled with Shape and Gather."""
    net = Net("old", opset=9)
    x = net.input("input", ["N", 3, 12, 12])
    x = net.relu(net.norm(net.conv(x, 3, 8, 3, name="conv1", pads=[1] * 4), 8, name="bn1", momentum=0.9))
    x = net.node("Dropout", x, name="dropout", ratio=0.5)
    x = net.node("MaxPool", x, name="pool", kernel_shape=[4, 4], strides=[4, 4])
    shape = net.node("Shape", x, name="shape")
    index = net.node("Constant", name="index", value=numpy_helper.from_array(np.array(0)))
    size = net.node("Unsqueeze", net.node("Gather", shape, index, name="gather"), name="unsqueeze", axes=[0])
    rest = net.node("Constant", name="rest", value=numpy_helper.from_array(np.array([-1])))
    x = net.node("Reshape", x, net.node("Concat", size, rest, name="target", axis=0), name="flat")
    net.output(net.linear(x, 72, 5, name="fc"), ["N", 5])
    model = net.model()
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    return model


def control() -> onnx.ModelProto:
    """An If whose branches read a tensor and a weight from outside, and a local function."""
    net = Net("control")
    x = net.input("input", ["N", 3, 12, 12])
    x = net.norm(net.conv(x, 3, 8, 3, name="conv1", pads=[1] * 4), 8, name="bn1")
    net.nodes.append(helper.make_node("Swish", [x], ["swish"], name="node_swish", domain="local"))
    mean = net.node("ReduceMean", "swish", name="mean", keepdims=0)
    decision = net.node("Greater", mean, net.weight("zero", np.float32(0)), name="decision")
    y = net.norm(net.conv("swish", 8, 8, 1, name="conv2"), 8, name="bn2")
    outside = net.weight("outside", net.random(8, 1, 1))
    graphs = {}
    for branch, op in (("then_branch", "Add"), ("else_branch", "Mul")):
        node = helper.make_node(op, [y, outside], [branch], name=f"node_{branch}")
        graphs[branch] = helper.make_graph([node], branch, [], [_info(branch, np.float32, ["N", 8, 12, 12])])
    x = net.node("If", decision, name="choice", **graphs)
    net.head(net.relu(x), 8)
    body = [helper.make_node("Sigmoid", ["a"], ["b"]), helper.make_node("Mul", ["a", "b"], ["c"])]
    swish = helper.make_function("local", "Swish", ["a"], ["c"], body, [helper.make_opsetid("", net.opset)])
    return net.model(ir_version=8, functions=[swish])


def transposed() -> onnx.ModelProto:
    """Down and up again: transposed convolutions, one of them grouped."""
    net = Net("transposed")
    x = net.input("input", ["N", 4, 8, 8])
    x = net.relu(net.norm(net.conv(x, 4, 8, 3, name="down", strides=[2, 2], pads=[1] * 4), 8, name="down_bn"))
    x = net.conv(x, 8, 12, 2, name="up1", transposed=True, group=4, strides=[2, 2])
    x = net.relu(net.norm(x, 12, name="up1_bn"))
    x = net.conv(x, 12, 4, 3, name="up2", transposed=True, pads=[1] * 4, bias=True)
    net.output(net.norm(x, 4, name="up2_bn"), ["N", 4, 8, 8])
    return net.model()


def sound() -> onnx.ModelProto:
    """One-dimensional convolutions, dilated, over a signal of dynamic length."""
    net = Net("sound", opset=18)
    x = net.input("input", ["N", 2, "T"])
    x = net.relu(net.norm(net.conv(x, 2, 8, [5], name="conv1", pads=[2, 2]), 8, name="bn1"))
    x = net.relu(net.norm(net.conv(x, 8, 8, [3], name="conv2", dilations=[2], pads=[2, 2]), 8, name="bn2"))
    net.output(net.conv(x, 8, 3, [1], name="conv3", bias=True), ["N", 3, "T"])
    return net.model()


def half() -> onnx.ModelProto:
    """The plain net's first layers in float16."""
    net = Net("half", dtype=np.float16)
    x = net.input("input", ["N", 3, 8, 8])
    x = net.relu(net.norm(net.conv(x, 3, 8, 3, name="conv1", pads=[1] * 4), 8, name="bn1"))
    net.output(net.norm(net.conv(x, 8, 4, 3, name="conv2", bias=True), 4, name="bn2"), ["N", 4, 6, 6])
    return net.model()


def two_outputs() -> onnx.ModelProto:
    """Two inputs, two outputs, one of which is read inside as well; nodes that do nothing; a weight used twice."""
    net = Net("two_outputs")
    x = net.input("left", ["N", 4, 6, 6])
    y = net.input("right", ["N", 4, 6, 6])
    shared = net.weight("shared.weight", net.random(4, 4, 3, 3, scale=0.2))
    x = net.norm(net.node("Conv", x, shared, name="conv_left", pads=[1] * 4), 4, name="left_bn")
    y = net.norm(net.node("Conv", y, shared, name="conv_right", pads=[1] * 4), 4, name="right_bn")
    total = net.node("Add", net.node("Identity", x, name="same"), y, name="sum")
    net.output(total, ["N", 4, 6, 6])
    first = net.node("Transpose", net.node("Relu", total, name="relu"), name="t1", perm=[0, 2, 3, 1])
    net.output(net.node("Transpose", first, name="t2", perm=[0, 3, 1, 2]), ["N", 4, 6, 6])
    return net.model()


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f
    for f in (
        plain, residual, depthwise, branches, mlp, transformer, old, control, transposed, sound, half, two_outputs,
        masked,
    )
}  # fmt: skip


def feeds(model: onnx.ModelProto, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Normally distributed inputs; a named dimension is the batch where it is first, else 6."""
    rng = np.random.default_rng(seed)
    weights = {t.name for t in model.graph.initializer}
    arrays = {}
    for info in model.graph.input:
        if info.name not in weights:
            tensor = info.type.tensor_type
            shape = [d.dim_value or (6 if index else batch) for index, d in enumerate(tensor.shape.dim)]
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            arrays[info.name] = rng.standard_normal(shape).astype(dtype)
    return arrays


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """All outputs by onnxruntime with its own optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds(model) if inputs is None else inputs), strict=True))


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Largest max|a - b| / max|a| over the outputs, which must be the same in name and shape."""
    assert a.keys() == b.keys()
    worst = 0.0
    for name, array in a.items():
        assert array.shape == b[name].shape and array.dtype == b[name].dtype, name
        difference = np.abs(array.astype(np.float64) - b[name].astype(np.float64)).max(initial=0.0)
        worst = max(worst, difference / max(np.abs(array).max(initial=0.0), 1e-30))
    return float(worst)


def agree(a: np.ndarray, b: np.ndarray, tolerance: float) -> None:
    """max|a - b| is at most so large a share of max|b|."""
    assert a.shape == b.shape and b.any()
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def _info(name: str, dtype: type, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert code != TensorProto.UNDEFINED
    return helper.make_tensor_value_info(name, code, shape)
