"""Networks by family, seeded, with He's random weights, written with onnx.helper alone: none of them is a file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 20, 9
STEP = np.float32(1 / 32)  # scale of activations written as codes
Proto = onnx.ModelProto


@dataclass(frozen=True)
class Layer:
    """A convolution of a stack.

    Attributes:
        d: output channels.
        k: kernel, square where it is one number.
        group: 0 is depthwise.
        act: operator behind it, "" for none.
        int8: in codes, with quantize/dequantize pairs before and behind.
    """

    d: int
    k: int | tuple[int, ...] = 3
    stride: int = 1
    group: int = 1
    dilation: int = 1
    act: str = "Relu"
    norm: bool = False
    int8: bool = False


class Net:
    """Writes a graph node by node; methods take and return names of tensors, whose channels (features) are kept."""

    def __init__(self, name: str, *shape: int, tokens: bool = False) -> None:
        self.name, self.rng = name, np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.channels = {"input": shape[0]}
        kind = TensorProto.INT64 if tokens else TensorProto.FLOAT
        self.input = helper.make_tensor_value_info("input", kind, ["N", *shape])
        self._coded: set[str] = set()

    def node(self, op: str, *inputs: str, channels: int = 0, **attributes) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"node_{name}", **attributes))
        self.channels[name] = channels or self.channels.get(inputs[0], 0)
        return name

    def weight(self, array: np.ndarray | np.generic) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(array), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def random(self, *shape: int, inputs: int = 0) -> np.ndarray:
        """He et al. 2015: variance 2 / inputs of a filter."""
        return self.rng.standard_normal(shape, np.float32) * np.float32((2 / (inputs or np.prod(shape[1:]))) ** 0.5)

    def bias(self, d: int) -> str:
        return self.weight(self.rng.standard_normal(d, np.float32) * np.float32(0.1))

    def conv(self, x: str, layer: Layer) -> str:
        n = self.channels[x]
        kernel = (layer.k, layer.k) if isinstance(layer.k, int) else layer.k
        group, rank = layer.group or n, len(kernel)
        spread = [layer.dilation * (k - 1) for k in kernel]
        array = self.random(layer.d, n // group, *kernel)
        x = self.coded(x) if layer.int8 else x
        inputs = self._coded_weights(array, 0) if layer.int8 else (self.weight(array), self.bias(layer.d))
        y = self.node(
            "Conv", x, *inputs, channels=layer.d, kernel_shape=kernel, group=group, strides=[layer.stride] * rank,
            dilations=[layer.dilation] * rank, pads=[s // 2 for s in spread] + [s - s // 2 for s in spread],
        )  # fmt: skip
        y = self.act(self.norm(y) if layer.norm else y, layer.act)
        return self.coded(y) if layer.int8 else y

    def coded(self, x: str) -> str:
        """Q and DQ behind a tensor that has none yet; codes begin at zero behind a ReLU."""
        if x in self._coded:
            return x
        parameters = self.weight(STEP), self.weight(np.uint8(0 if x.startswith("relu") else 128))
        x = self.node("DequantizeLinear", self.node("QuantizeLinear", x, *parameters), *parameters)
        self._coded.add(x)
        return x

    def _coded_weights(self, array: np.ndarray, axis: int) -> tuple[str, str]:
        """DequantizeLinear over codes of a weight, a scale an output channel, and over those of a bias."""
        scales = np.abs(array).max(axis=tuple(i for i in range(array.ndim) if i != axis), keepdims=True) / 127
        codes, flat = np.rint(array / scales).astype(np.int8), scales.ravel().astype(np.float32)
        bias = self.rng.integers(-500, 500, flat.size, np.int32)
        arrays = ((codes, flat, axis), (bias, flat * STEP, 0))
        made = []
        for numbers, scale, along in arrays:
            inputs = (self.weight(a) for a in (numbers, scale, np.zeros(scale.size, numbers.dtype)))
            made.append(self.node("DequantizeLinear", *inputs, axis=along))
        return made[0], made[1]

    def act(self, x: str, kind: str) -> str:
        if kind == "Clip":
            return self.node("Clip", x, self.weight(np.float32(0)), self.weight(np.float32(6)))
        if kind == "Silu":
            return self.node("Mul", x, self.node("Sigmoid", x))
        return self.node(kind, x) if kind else x

    def norm(self, x: str) -> str:
        c = self.channels[x]
        arrays = [0.8 + 0.4 * self.rng.random(c), *(0.1 * self.rng.standard_normal((2, c))), 0.8 + self.rng.random(c)]
        return self.node("BatchNormalization", x, *(self.weight(a.astype(np.float32)) for a in arrays))

    def pool(self, x: str, kind: str = "MaxPool", k: int = 2, stride: int = 2) -> str:
        pads = [(k - 1) // 2] * 4
        return self.node(kind, x, kernel_shape=[k, k], strides=[stride, stride], pads=pads)

    def concat(self, *parts: str) -> str:
        return self.node("Concat", *parts, channels=sum(self.channels[p] for p in parts), axis=1)

    def linear(self, x: str, d: int, act: str = "", *, int8: bool = False) -> str:
        n = self.channels[x]
        if int8:
            array = np.ascontiguousarray(self.random(d, n).T)
            y = self.node("Gemm", self.coded(x), *self._coded_weights(array, 1), channels=d)
            return self.coded(self.act(y, act))
        return self.act(self.node("Gemm", x, self.weight(self.random(d, n)), self.bias(d), channels=d, transB=1), act)

    def matmul(self, x: str, d: int) -> str:
        n = self.channels[x]
        product = self.node("MatMul", x, self.weight(self.random(n, d, inputs=n)), channels=d)
        return self.node("Add", product, self.bias(d))

    def reshape(self, x: str, *shape: int) -> str:
        return self.node("Reshape", x, self.weight(np.array(shape)))

    def layer_norm(self, x: str) -> str:
        c = self.channels[x]
        return self.node("LayerNormalization", x, self.weight(np.ones(c, np.float32)), self.bias(c))

    def head(self, x: str, classes: int = 10) -> Proto:
        return self.model(self.linear(self.node("Flatten", self.node("GlobalAveragePool", x)), classes), classes)

    def model(self, output: str, *shape: int) -> Proto:
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", *shape])]
        graph = helper.make_graph(self.nodes, self.name, [self.input], outputs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def stack(name: str, size: int, inputs: int, layers: Sequence[Layer], *, head: bool = False) -> Proto:
    """Convolutions in a row over [N, inputs, size, size]."""
    net, x = Net(name, inputs, size, size), "input"
    for layer in layers:
        x, size = net.conv(x, layer), -(-size // layer.stride)
    return net.head(x) if head else net.model(x, layers[-1].d, size, size)


def dense(name: str, widths: Sequence[int], int8: Sequence[int] = ()) -> Proto:
    """Dense layers in a row, those at the positions `int8` in codes."""
    net, x = Net(name, widths[0]), "input"
    for index, d in enumerate(widths[1:]):
        x = net.linear(x, d, "Relu" if index < len(widths) - 2 else "", int8=index in int8)
    return net.model(x, widths[-1])


def resnet(name: str, size: int, stem: Layer, stages: Sequence[tuple[int, int]], *, pooled: bool = False) -> Proto:
    """Basic residual blocks (He et al. 2016): stages of (channels, blocks), batch norm unfolded."""
    net = Net(name, 3, size, size)
    x = net.conv("input", stem)
    x = net.pool(x, k=3) if pooled else x
    for index, (d, blocks) in enumerate(stages):
        for block in range(blocks):
            stride = 2 if index and not block else 1
            y = net.conv(x, Layer(d, stride=stride, norm=True))
            y = net.conv(y, Layer(d, act="", norm=True))
            if stride > 1 or net.channels[x] != d:
                x = net.conv(x, Layer(d, 1, stride, act="", norm=True))
            x = net.node("Relu", net.node("Add", y, x))
    return net.head(x)


def resnet_cifar(depth: int, width: float) -> Proto:
    c = round(16 * width)
    stages = [(c << i, (depth - 2) // 6) for i in range(3)]
    return resnet(f"resnet{depth}-{width:g}", 32, Layer(c, norm=True), stages)


def resnet18(size: int) -> Proto:
    return resnet(f"resnet18-{size}", size, Layer(64, 7, 2, norm=True), [(64 << i, 2) for i in range(4)], pooled=True)


def vgg(name: str, size: int, widths: Sequence[int]) -> Proto:
    net, x = Net(name, 3, size, size), "input"
    for d in widths:
        x = net.pool(net.conv(net.conv(x, Layer(d, norm=True)), Layer(d, norm=True)))
    return net.head(x)


def mobilenet_v1(name: str, size: int, width: float) -> Proto:
    """Depthwise and pointwise convolutions (Howard et al. 2017), batch norm folded."""
    net = Net(name, 3, size, size)
    x = net.conv("input", Layer(_eights(32 * width), 3, 2, act="Clip"))
    for d, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]:
        x = net.conv(x, Layer(net.channels[x], 3, stride, group=0, act="Clip"))
        x = net.conv(x, Layer(_eights(d * width), 1, act="Clip"))
    return net.head(x)


def mobilenet_v2(name: str, size: int, width: float, act: str = "Clip", *, squeeze: bool = False) -> Proto:
    """Inverted residuals (Sandler et al. 2018), with squeeze-and-excitation where asked (Howard et al. 2019)."""
    net = Net(name, 3, size, size)
    x = net.conv("input", Layer(_eights(32 * width), 3, 2, act=act, norm=True))
    settings = (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    for t, c, n, s in settings:
        for block in range(n):
            stride, d, inner = s if block == 0 else 1, _eights(c * width), t * net.channels[x]
            y = net.conv(x, Layer(inner, 1, act=act, norm=True)) if t > 1 else x
            y = net.conv(y, Layer(inner, 3, stride, group=0, act=act, norm=True))
            if squeeze:
                gate = net.conv(net.node("GlobalAveragePool", y), Layer(_eights(inner / 4), 1))
                y = net.node("Mul", y, net.conv(gate, Layer(inner, 1, act="HardSigmoid")))
            y = net.conv(y, Layer(d, 1, act="", norm=True))
            x = net.node("Add", y, x) if stride == 1 and net.channels[x] == d else y
    return net.head(net.conv(x, Layer(_eights(1280 * max(width, 1)), 1, act=act, norm=True)))


def _eights(channels: float) -> int:
    return max(8, int(channels + 4) // 8 * 8)


def squeezenet(name: str, size: int, width: float) -> Proto:
    """Fire modules (Iandola et al. 2016)."""
    net = Net(name, 3, size, size)
    x = net.pool(net.conv("input", Layer(64, 3, 2)), k=3)
    for index, squeezed in enumerate((16, 16, 32, 32, 48, 64)):
        s = round(squeezed * width)
        y = net.conv(x, Layer(s, 1))
        x = net.concat(net.conv(y, Layer(4 * s, 1)), net.conv(y, Layer(4 * s, 3)))
        x = net.pool(x, k=3) if index in (1, 3) else x
    return net.head(x)


def densenet(name: str, size: int, growth: int, blocks: Sequence[int]) -> Proto:
    """Dense blocks (Huang et al. 2017): batch norm and ReLU before each convolution."""
    net = Net(name, 3, size, size)
    x = net.conv("input", Layer(2 * growth, act=""))
    for index, layers in enumerate(blocks):
        if index:
            x = net.pool(net.conv(net.node("Relu", net.norm(x)), Layer(net.channels[x] // 2, 1, act="")), "AveragePool")
        for _ in range(layers):
            y = net.conv(net.node("Relu", net.norm(x)), Layer(4 * growth, 1, norm=True))
            x = net.concat(x, net.conv(y, Layer(growth, act="")))
    return net.head(net.node("Relu", net.norm(x)))


def inception(name: str, size: int, width: float, modules: int) -> Proto:
    """Four branches and Concat (Szegedy et al. 2015)."""
    net = Net(name, 3, size, size)
    x = net.pool(net.conv("input", Layer(round(64 * width), 5, 2)), k=3)
    a, b, c, d = (round(n * width) for n in (64, 96, 16, 32))
    for index in range(modules):
        branches = [net.conv(x, Layer(a, 1)), net.conv(net.conv(x, Layer(b, 1)), Layer(b + d))]
        branches += [net.conv(net.conv(x, Layer(c, 1)), Layer(d, 5)), net.conv(net.pool(x, k=3, stride=1), Layer(d, 1))]
        x = net.concat(*branches)
        x = net.pool(x, k=3) if index % 2 else x
    return net.head(x)


def shufflenet(name: str, size: int, groups: int, width: int) -> Proto:
    """Grouped 1x1 convolutions and channel shuffle (Zhang et al. 2018)."""
    net = Net(name, 3, size, size)
    x, size = net.conv("input", Layer(width, 3, 2)), -(-size // 2)
    for stage in range(3):
        for block in range(3):
            d, stride = width << stage, 2 if block == 0 else 1
            y = net.conv(x, Layer(d, 1, group=groups, norm=True))
            y = net.node("Transpose", net.reshape(y, 0, groups, d // groups, -1), perm=[0, 2, 1, 3])
            y, size = net.reshape(y, 0, d, size, size), -(-size // stride)
            y = net.conv(y, Layer(d, 3, stride, group=0, act="", norm=True))
            y = net.conv(y, Layer(d, 1, group=groups, act="", norm=True))
            x = net.node("Relu", net.node("Add", y, x) if stride == 1 else net.concat(y, net.pool(x, "AveragePool", 3)))
            x = net.conv(x, Layer(d, 1, group=groups)) if stride > 1 else x
    return net.head(x)


def transformer(name: str, sequence: int, dim: int, heads: int, layers: int, vocabulary: int = 0) -> Proto:
    """Encoder blocks, normalised behind each half as in BERT; over token numbers where there is a vocabulary."""
    net = Net(name, *(sequence,) if vocabulary else (sequence, dim), tokens=bool(vocabulary))
    x = "input"
    if vocabulary:
        x = net.node("Gather", net.weight(net.random(vocabulary, dim)), x, axis=0)
    net.channels[x] = dim
    for _ in range(layers):
        q, k, v = (
            net.node("Transpose", net.reshape(net.matmul(x, dim), 0, sequence, heads, dim // heads), perm=perm)
            for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scores = net.node("Mul", net.node("MatMul", q, k), net.weight(np.float32((heads / dim) ** 0.5)))
        mixed = net.node("Transpose", net.node("MatMul", net.node("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
        x = net.layer_norm(net.node("Add", net.matmul(net.reshape(mixed, 0, sequence, dim), dim), x))
        x = net.layer_norm(net.node("Add", net.matmul(net.act(net.matmul(x, 4 * dim), "Gelu"), dim), x))
    return net.model(x, sequence, dim)


def sound(name: str, length: int, inputs: int, width: int, k: int, blocks: int) -> Proto:
    """One-dimensional convolutions, ever more dilated, with residuals (Bai et al. 2018)."""
    net = Net(name, inputs, length)
    x = net.conv("input", Layer(width, (k,), 2))
    for block in range(blocks):
        y = net.conv(x, Layer(width, (3,), dilation=1 << block % 5, norm=True))
        x = net.node("Relu", net.node("Add", net.conv(y, Layer(width, (1,), act="")), x))
    return net.head(x)


def unet(name: str, size: int, width: int, depth: int, *, transposed: bool = False) -> Proto:
    """Down and up again with Concat (Ronneberger et al. 2015); up by ConvTranspose, or by Resize and a convolution."""
    net, x, kept = Net(name, 3, size, size), "input", []
    for level in range(depth):
        x = net.conv(net.conv(x, Layer(width << level)), Layer(width << level))
        kept.append(x)
        x = net.pool(x)
    x = net.conv(x, Layer(width << depth))
    for level in reversed(range(depth)):
        d = width << level
        if transposed:
            inputs = net.weight(net.random(net.channels[x], d, 2, 2, inputs=net.channels[x])), net.bias(d)
            x = net.node("ConvTranspose", x, *inputs, channels=d, kernel_shape=[2, 2], strides=[2, 2])
        else:
            x = net.node("Resize", x, "", net.weight(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
            x = net.conv(x, Layer(d))
        x = net.conv(net.concat(x, kept[level]), Layer(d))
    return net.model(net.conv(x, Layer(4, 1, act="")), 4, size, size)


def deep(nodes: int) -> Proto:
    """Residual blocks of seven nodes, so many that there are about `nodes`."""
    return resnet(f"deep-{nodes}", 8, Layer(8), [(8, nodes // 7)])
