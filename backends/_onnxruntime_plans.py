"""Random networks to measure onnxruntime's kernels in: each kernel where it stands in life, its input just made.

Some are built like the families of architectures (a stem, stages of blocks that narrow and widen), at random sizes;
others walk over layers at random, to cover what lies between. All come in float and with quantised tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx

from ._onnxruntime_networks import Net

MOST_MACS = 200e6  # of one layer: more only takes longer
MOST_ELEMENTS = 4e6
LARGE = 4.0  # times as much in some networks, so that large batches are known
Made = tuple[onnx.ModelProto, int]  # a network and its batch


def channels(rng: np.random.Generator, least: int = 8, most: int = 640) -> int:
    """A number of channels, log-uniform: mostly what architectures use, now and then anything."""
    drawn = math.exp(rng.uniform(math.log(least), math.log(most)))
    step = rng.choice([16, 8, 4, 1], p=[0.55, 0.2, 0.1, 0.15])
    return int(max(least, round(drawn / step) * step, 1))


def activation(rng: np.random.Generator) -> str:
    kinds = ["Relu", "", "Clip", "SiLU", "HardSwish", "LeakyRelu", "Sigmoid"]
    return str(rng.choice(kinds, p=[0.55, 0.2, 0.09, 0.06, 0.04, 0.03, 0.03]))


def _fitting(net: Net, outputs: int, taps: int, stride: int = 1, group: int = 1) -> int:
    """Fewer outputs where the layer would take too long."""
    n, c, *size = net.shape
    each = n * math.prod(size) // stride ** len(size) * c // group * taps
    return max(4, min(outputs, int(net.scale * MOST_MACS / max(each, 1))))


def _convolution(net: Net) -> None:
    rng = net.rng
    kernel = [(3, 3), (1, 1), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2), (1, 7), (7, 1)][
        rng.choice(9, p=[0.42, 0.27, 0.09, 0.04, 0.05, 0.05, 0.02, 0.03, 0.03])
    ]
    stride = int(rng.choice([1, 2], p=[0.8, 0.2])) if min(net.shape[2:]) > 4 else 1
    dilation = int(rng.choice([1, 2], p=[0.95, 0.05])) if min(net.shape[2:]) > 8 else 1
    outputs = _fitting(net, channels(rng), math.prod(kernel), stride)
    net.conv(outputs, kernel, stride, act=activation(rng), dilation=dilation)


def _residual(net: Net, width: int = 0, stride: int = 1) -> None:
    """Two convolutions around a shortcut; where the shape changes, the shortcut is a 1 x 1 convolution."""
    c = width or net.shape[1]
    if _fitting(net, c, 9, stride) < c:
        return _pool(net)
    start = net.x
    inner = c if width or net.rng.random() < 0.6 else _fitting(net, channels(net.rng), 9)
    net.conv(inner, stride=stride, act="Relu")
    net.conv(c)
    end = net.x
    if net.shapes[start] != net.shapes[end]:
        net.x = start
        net.conv(c, (1, 1), stride)
        start = net.x
    net.x = net.node("Add", end, start, shape=net.shapes[end])
    net.act("Relu" if width or net.rng.random() < 0.8 else "")


def _bottleneck(net: Net, width: int, stride: int = 1) -> None:
    start = net.x
    net.conv(_fitting(net, max(8, width // 4), 1), (1, 1), act="Relu")
    net.conv(net.shape[1], stride=stride, act="Relu")
    net.conv(_fitting(net, width, 1), (1, 1))
    end = net.x
    if net.shapes[start] != net.shapes[end]:
        net.x = start
        net.conv(net.shapes[end][1], (1, 1), stride)
        start = net.x
    net.x = net.node("Add", end, start, shape=net.shapes[end])
    net.act("Relu")


def _separable(net: Net, width: int = 0, stride: int = 0) -> None:
    """MobileNet's two layers, or an inverted residual, now and then with squeeze-excite."""
    rng, act, skip = net.rng, str(net.rng.choice(["Clip", "Relu", "HardSwish", "SiLU"])), net.x
    c, inverted = net.shape[1], net.rng.random() < 0.5
    if inverted:
        net.conv(_fitting(net, int(c * rng.choice([3, 4, 6])), 1), (1, 1), act=act)
    k = int(rng.choice([3, 3, 3, 5, 7], p=[0.3, 0.3, 0.15, 0.2, 0.05]))
    stride = stride or (int(rng.choice([1, 1, 2])) if min(net.shape[2:]) > 4 else 1)
    net.conv(net.shape[1], (k, k), stride, group=net.shape[1], act=act)
    if rng.random() < 0.2:
        _squeeze_excite(net)
    outputs = width or (c if rng.random() < 0.5 else channels(rng))
    net.conv(_fitting(net, outputs, 1), (1, 1), act="" if inverted else act)
    if inverted and net.shapes[skip] == net.shape:
        net.with_("Add", skip)


def _squeeze_excite(net: Net) -> None:
    x, (n, c, *_) = net.x, net.shape
    net.simple("GlobalAveragePool", (n, c, 1, 1))
    net.conv(max(4, c // 4), (1, 1), act="Relu")
    net.conv(c, (1, 1), act=str(net.rng.choice(["Sigmoid", "HardSigmoid"])))
    gate, net.x = net.x, x
    net.with_("Mul", gate)


def _grouped(net: Net, width: int = 0, stride: int = 1) -> None:
    """Grouped convolutions, plain or with a channel shuffle behind; or several filters for each channel."""
    rng, c = net.rng, net.shape[1]
    if rng.random() < 0.12:
        k = int(rng.choice([3, 3, 5, 7]))
        return net.conv(_fitting(net, 2 * c, k * k, group=c) // c * c or c, (k, k), group=c, act="Relu")
    groups = [g for g in (2, 3, 4, 8, 16, 32) if c % g == 0 and c // g >= 2]
    if not groups:
        return _convolution(net)
    g, k = int(rng.choice(groups)), int(rng.choice([1, 3, 3]))
    outputs = max(1, _fitting(net, width or (c if rng.random() < 0.5 else channels(rng)), k * k, stride, g) // g) * g
    net.conv(outputs, (k, k), stride, group=g, act="Relu")
    n, c, h, w = net.shape
    if rng.random() < 0.5:
        net.simple("Reshape", (n, g, c // g, h, w), net.constant(np.array([0, g, c // g, h, w])), paired=False)
        net.simple("Transpose", (n, c // g, g, h, w), paired=False, perm=[0, 2, 1, 3, 4])
        net.simple("Reshape", (n, c, h, w), net.constant(np.array([0, c, h, w])))


def _branches(net: Net, width: int = 0, stride: int = 1) -> None:
    """Inception, fire or dense block: parts side by side, concatenated."""
    x, parts = net.x, []
    if net.rng.random() < 0.3:
        parts.append(x)
    for k in net.rng.choice([0, 1, 3, 5], size=int(net.rng.integers(2, 4)) - len(parts), p=[0.15, 0.35, 0.4, 0.1]):
        net.x = x
        if k == 0:  # Inception's branch behind a pool
            net.simple("MaxPool", None, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
            k = 1
        net.conv(_fitting(net, channels(net.rng, 8, 192), int(k) ** 2), (int(k), int(k)), act="Relu")
        parts.append(net.x)
    total = sum(net.shapes[p][1] for p in parts)
    n, _, *size = net.shape
    net.x = net.pair(net.node("Concat", *parts, shape=(n, total, *size), axis=1))
    if stride > 1:
        _pool(net)


def _dense_layer(net: Net, width: int = 0, stride: int = 1) -> None:
    """DenseNet: a norm that nothing can absorb, 1 x 1, 3 x 3, concatenated to what was there."""
    x, (n, c, *size) = net.x, net.shape
    if net.rng.random() < 0.5:
        parameters = [net.constant(np.full(c, v, np.float32)) for v in (1, 0, 0, 1)]
        net.simple("BatchNormalization", None, *parameters, paired=False)
    else:
        for op in ("Mul", "Add"):
            net.simple(op, None, net.constant(np.full((1, c, 1, 1), 0.9, np.float32)), paired=False)
    net.act("Relu")
    net.conv(_fitting(net, 4 * (width or 32) // 2, 1), (1, 1), act="Relu")
    net.conv(_fitting(net, max(8, (width or 32) // 2), 9))
    made = net.shape[1]
    net.x = net.pair(net.node("Concat", x, net.x, shape=(n, c + made, *size), axis=1))
    if stride > 1:
        net.conv(_fitting(net, (c + made) // 2, 1), (1, 1), act="Relu")
        _pool(net)


def _plain(net: Net, width: int = 0, stride: int = 1) -> None:
    net.conv(_fitting(net, width or net.shape[1], 9), act="Relu")
    if stride > 1:
        _pool(net)


def _pool(net: Net) -> None:
    n, c, *size = net.shape
    op = str(net.rng.choice(["MaxPool", "MaxPool", "AveragePool"]))
    k, stride, pad = ((2, 2, 0), (3, 2, 1), (3, 1, 1))[net.rng.choice(3, p=[0.45, 0.35, 0.2])]
    if min(size) <= 4:
        k, stride, pad = 3, 1, 1
    out = [(s + 2 * pad - k) // stride + 1 for s in size]
    net.simple(op, (n, c, *out), kernel_shape=[k, k], strides=[stride, stride], pads=[pad] * 4)


def _moves(net: Net) -> None:
    """What only moves data: slice and pad, resize, a part of the channels, other orders of axes."""
    n, c, h, w = net.shape
    choice = net.rng.choice(6, p=[0.25, 0.15, 0.15, 0.15, 0.15, 0.15])
    if choice == 5 and c * h * w % 4 == 0:
        _boxes(net)
    elif choice == 0 and n * c * h * w * 4 <= net.scale * MOST_ELEMENTS:
        scales = net.constant(np.array([1, 1, 2, 2], np.float32))
        mode = str(net.rng.choice(["nearest", "nearest", "linear"]))
        plain = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        extra = plain if mode == "nearest" and net.rng.random() < 0.5 else {}
        net.simple("Resize", (n, c, 2 * h, 2 * w), "", scales, mode=mode, **extra)
    elif choice == 1 and c >= 16:
        ends = [net.constant(np.array(v)) for v in ([0], [c // 2], [1])]
        net.simple("Slice", (n, c // 2, h, w), *ends)
    elif choice == 2:
        steps = (net.constant(np.array(v)) for v in ([0, 0], [h, w], [2, 3], [2, 2]))
        net.simple("Slice", (n, c, -(-h // 2), -(-w // 2)), *steps)
        c, h, w = net.shape[1:]
        net.simple("Pad", (n, 2 * c, h, w), net.constant(np.array([0, c // 2, 0, 0, 0, c - c // 2, 0, 0])))
    elif choice == 3 and n * c * h * w * 4 <= net.scale * MOST_ELEMENTS:
        weight = net.constant(net.rng.standard_normal((c, max(4, c // 2), 2, 2), dtype=np.float32) * 0.1)
        shape = (n, max(4, c // 2), 2 * h, 2 * w)
        net.simple("ConvTranspose", shape, weight, kernel_shape=[2, 2], strides=[2, 2])
    else:
        net.simple("Transpose", (n, h, w, c), paired=False, perm=[0, 2, 3, 1])
        net.simple("Transpose", (n, c, h, w), perm=[0, 3, 1, 2])
        net.act("Relu")


def _boxes(net: Net) -> None:
    """What detectors do to coordinates: halves of the last axis, which is short, apart and together again."""
    shape, count = net.shape, math.prod(net.shape[1:]) // 4
    net.simple("Reshape", (shape[0], count, 4), net.constant(np.array([0, count, 4])))
    x, parts = net.x, []
    for half in (0, 2):
        net.x = x
        ends = [net.constant(np.array(v)) for v in ([half], [half + 2], [2])]
        net.simple("Slice", (shape[0], count, 2), *ends)
        net.with_("Mul", net.constant(np.full((1,), 0.9, np.float32)))
        parts.append(net.x)
    net.x = net.pair(net.node("Concat", *parts, shape=(shape[0], count, 4), axis=2))
    net.simple("Reshape", shape, net.constant(np.array([0, *shape[1:]])))


def _elementwise(net: Net) -> None:
    rng, c = net.rng, net.shape[1]
    choice = rng.integers(6)
    if choice < 2:
        kinds = ["Relu", "Clip", "Sigmoid", "HardSwish", "LeakyRelu", "Tanh", "SiLU", "HardSigmoid", "HardSigmoid"]
        net.act(str(rng.choice(kinds)))
    elif choice == 2:
        net.with_(str(rng.choice(["Mul", "Add"])), net.constant(np.full((1, c, 1, 1), 0.9, np.float32)))
    elif choice == 3:
        other = net.node("Relu", net.x, shape=net.shape)
        net.with_(str(rng.choice(["Mul", "Add", "Sub"])), net.pair(other))
    elif choice == 4:
        parameters = [net.constant(np.full(c, v, np.float32)) for v in (1, 0, 0, 1)]
        net.simple("BatchNormalization", None, *parameters)
    else:
        net.simple("LRN", None, size=5, paired=bool(rng.random() < 0.5))


LAYERS: Sequence[tuple[Callable[[Net], None], float]] = (
    (_convolution, 0.38), (_residual, 0.12), (_separable, 0.18), (_grouped, 0.1), (_branches, 0.08), (_pool, 0.06),
    (_moves, 0.05), (_elementwise, 0.03),
)  # fmt: skip
BLOCKS = _residual, _bottleneck, _separable, _separable, _grouped, _branches, _dense_layer, _plain


def family(seed: int, quantised: bool) -> Made:
    """A network as architectures have them, from an image: a stem, stages of one kind of block, pool, dense layer."""
    rng = np.random.default_rng((1, seed))
    size = int(rng.choice([28, 32, 32, 48, 64, 96, 112, 128, 160, 192, 224]))
    batch = int(rng.choice([1, 1, 1, 1, 1, 4, 16, 32]))
    colours = int(rng.choice([4, 4, 3, 1] if quantised else [3, 3, 3, 1]))  # the integer kernel wants them in fours
    net = Net(rng, (batch, colours, size, size), quantised, open_batch=bool(rng.random() < 0.5))
    net.scale = LARGE if batch > 8 else 1.0
    k, stride = ((3, 1), (3, 2), (7, 2), (5, 2), (11, 4))[rng.choice(5, p=[0.35, 0.35, 0.16, 0.1, 0.04])]
    stride = stride if size > 64 else 1
    most = int(net.scale * MOST_ELEMENTS / (batch * (size // stride) ** 2))
    width = max(8, min(channels(rng, 8, 72), most))
    net.conv(_fitting(net, width, k * k, stride), (k, k), stride, act=str(rng.choice(["Relu", "Clip", "HardSwish"])))
    if size >= 112 and rng.random() < 0.5:
        _pool(net)
    block = BLOCKS[int(rng.integers(len(BLOCKS)))]
    for stage in range(int(rng.integers(2, 5))):
        for step in range(int(rng.integers(1, 4))):
            block(net, width=width, stride=2 if step == 0 and stage and min(net.shape[2:]) > 4 else 1)
            if math.prod(net.shape) > net.scale * MOST_ELEMENTS:
                _pool(net)
        width = int(width * rng.choice([1.5, 2, 2]))
    _head(net)
    return net.model(), batch


def walk(seed: int, quantised: bool) -> Made:
    """Layers at random from a tensor of random size."""
    rng = np.random.default_rng((2, seed))
    batch = int(rng.choice([1, 2, 4, 8, 16, 32], p=[0.5, 0.08, 0.08, 0.09, 0.1, 0.15]))
    size, c = int(rng.choice([4, 7, 8, 14, 16, 20, 28, 32, 40, 56, 64, 80, 112])), channels(rng)
    net = Net(rng, (batch, max(4, min(c, int(MOST_ELEMENTS / 2 / (batch * size * size)))), size, size), quantised)
    steps, weights = zip(*LAYERS, strict=True)
    for _ in range(int(rng.integers(6, 10))):
        steps[rng.choice(len(steps), p=weights)](net)
        if math.prod(net.shape) > MOST_ELEMENTS:
            _pool(net)
    _head(net)
    return net.model(), batch


def movements(seed: int, quantised: bool) -> Made:
    """Everything but convolutions, on images."""
    rng = np.random.default_rng((3, seed))
    batch, size = int(rng.choice([1, 1, 1, 4, 16, 32])), int(rng.choice([4, 7, 8, 14, 16, 28, 32, 56, 64, 112]))
    scale = LARGE if batch >= 16 else 1.0
    c = max(4, min(channels(rng), int(scale * MOST_ELEMENTS / 2 / (batch * size * size))))
    net = Net(rng, (batch, c, size, size), quantised)
    net.scale = scale
    net.conv(c, (1, 1), group=c)
    for _ in range(12):
        (_elementwise, _elementwise, _pool, _pool, _moves, _moves, _squeeze_excite)[rng.integers(7)](net)
        if math.prod(net.shape) > net.scale * MOST_ELEMENTS:
            _pool(net)
    _head(net)
    return net.model(), batch


def groups(seed: int, quantised: bool) -> Made:
    """Grouped convolutions with shuffles, at sizes as ShuffleNet and ResNeXt have them."""
    rng = np.random.default_rng((7, seed))
    batch, size = int(rng.choice([1, 1, 4, 32])), int(rng.choice([7, 14, 24, 28, 48, 56]))
    g = int(rng.choice([2, 3, 4, 8, 8, 32]))
    widths = (4, 8, 16) if g == 32 else (4, 6, 8, 12, 16, 17, 24, 30, 32, 34, 48, 64, 96)
    net = Net(rng, (batch, g * int(rng.choice(widths)), size, size), quantised)
    for _ in range(5):
        n, c, h, w = net.shape
        k, stride = int(rng.choice([1, 1, 3])), int(rng.choice([1, 1, 2])) if h > 6 else 1
        most = max(1, int(MOST_MACS / (n * h * w * k * k * c / g)) // g)
        outputs = g * max(1, min(most, int(rng.choice(widths))))
        net.conv(outputs, (k, k), stride, group=g, act="Relu")
        n, c, h, w = net.shape
        net.simple("Reshape", (n, g, c // g, h, w), net.constant(np.array([0, g, c // g, h, w])), paired=False)
        net.simple("Transpose", (n, c // g, g, h, w), paired=False, perm=[0, 2, 1, 3, 4])
        net.simple("Reshape", (n, c, h, w), net.constant(np.array([0, c, h, w])))
        if rng.random() < 0.5:
            net.conv(c, (3, 3), group=c)
    _head(net)
    return net.model(), batch


def _head(net: Net) -> None:
    n, c, *size = net.shape
    if net.rng.random() < 0.3:
        net.simple("AveragePool", (n, c, 1, 1), kernel_shape=size)
    else:
        net.simple("GlobalAveragePool", (n, c, 1, 1))
    net.simple("Flatten", (n, c))
    net.dense(int(net.rng.choice([10, 100, 1000])))
