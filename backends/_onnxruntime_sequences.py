"""Random networks of dense layers, attention and 1-d convolutions, to measure onnxruntime's kernels in."""

from __future__ import annotations

import math

import numpy as np

from ._onnxruntime_networks import Net
from ._onnxruntime_plans import MOST_MACS, Made, channels


def dense(seed: int, quantised: bool) -> Made:
    """Dense layers of random sizes; of quantised ones some quantise as they run, or hold blocks of 2, 4 or 8 bits."""
    rng = np.random.default_rng((4, seed))
    rows, most = int(rng.choice([1, 1, 1, 1, 1, 2, 4, 8, 16, 32, 64, 128])), int(rng.choice([256, 1024, 2048, 4096]))
    form = str(rng.choice(["pairs", "dynamic", "blocks"], p=[0.5, 0.25, 0.25])) if quantised else "float"
    wide = rng.random() < 0.3  # all layers near the largest: weights that no cache holds
    net = Net(rng, (rows, channels(rng, most // 2 if wide else 16, most)), form == "pairs")
    for _ in range(int(rng.integers(3, 6))):
        drawn = channels(rng, most // 2 if wide else 10, most)
        outputs = max(8, min(drawn, int(MOST_MACS / (rows * net.shape[-1]))))
        if form == "dynamic":
            _dynamic(net, outputs)
        elif form == "blocks":
            _blocks(net, outputs)
        else:
            net.dense(outputs, act=str(rng.choice(["Relu", "", "Tanh"])))
    return net.model(), rows


def _dynamic(net: Net, outputs: int) -> None:
    inputs = net.shape[-1]
    codes = net.constant(net.rng.integers(-127, 128, (inputs, outputs)).astype(np.int8))
    scale, zero = net.constant(np.full(outputs, 0.01, np.float32)), net.constant(np.zeros(outputs, np.int8))
    net.simple(
        "DynamicQuantizeMatMul", (*net.shape[:-1], outputs), codes, scale, zero, paired=False, domain="com.microsoft"
    )
    net.act("Relu")


def _blocks(net: Net, outputs: int) -> None:
    bits, block = int(net.rng.choice([4, 4, 8, 2])), int(net.rng.choice([32, 64, 128]))
    level = int(net.rng.choice([4, 4, 4, 1]))  # activations in 8 bits, or in float
    inputs = net.shape[-1]
    count = -(-inputs // block)
    codes = net.constant(net.rng.integers(0, 256, (outputs, count, block * bits // 8)).astype(np.uint8))
    scales = net.constant(np.full((outputs, count), 0.01, np.float32))
    net.simple(
        "MatMulNBits", (*net.shape[:-1], outputs), codes, scales, paired=False, domain="com.microsoft",
        K=inputs, N=outputs, bits=bits, block_size=block, accuracy_level=level,
    )  # fmt: skip
    net.act("Relu")


def transformer(seed: int, quantised: bool) -> Made:
    """One or two encoder blocks, norms before or behind. Norms, Softmax and products of activations stay float."""
    rng = np.random.default_rng((5, seed))
    heads = int(rng.choice([2, 4, 6, 8, 12]))
    width = heads * int(rng.choice([16, 32, 64]))
    batch, length = int(rng.choice([1, 1, 1, 1, 4, 16])), int(rng.choice([8, 16, 32, 32, 64, 128, 196, 256]))
    batch = max(1, min(batch, 1024 // length))
    net = Net(rng, (batch, length, width), quantised=False, open_batch=bool(rng.random() < 0.5))
    behind = bool(rng.random() < 0.5)
    for _ in range(int(rng.integers(1, 3))):
        _block(net, heads, quantised, behind)
    return net.model(), batch


def _block(net: Net, heads: int, quantised: bool, behind: bool) -> None:
    batch, length, width = net.shape
    each = width // heads

    def norm() -> None:
        gain, shift = (net.constant(np.full(width, v, np.float32)) for v in (1, 0))
        net.simple("LayerNormalization", None, gain, shift, paired=False, axis=-1, epsilon=1e-5)

    def layer(outputs: int, act: str = "") -> None:
        net.quantised = quantised
        net.x = net.pair(net.x)
        net.dense(outputs, act)
        net.quantised = False

    def split(transposed: bool) -> str:
        shape = net.constant(np.array([0, 0, heads, each]))
        part = net.node("Reshape", net.x, shape, shape=(batch, length, heads, each))
        perm, out = ([0, 2, 3, 1], (each, length)) if transposed else ([0, 2, 1, 3], (length, each))
        return net.node("Transpose", part, perm=perm, shape=(batch, heads, *out))

    def close(skip: str) -> None:
        net.simple("Add", None, skip, paired=False)
        if behind:
            norm()

    skip = net.x
    if not behind:
        norm()
    source, parts = net.x, []
    for transposed in (False, True, False):
        net.x = source
        layer(width)
        parts.append(split(transposed))
    scores = net.node("MatMul", parts[0], parts[1], shape=(batch, heads, length, length))
    scale = net.constant(np.float32(math.sqrt(each)))
    scores = net.node(str(net.rng.choice(["Mul", "Div"])), scores, scale, shape=(batch, heads, length, length))
    scores = net.node("Softmax", scores, shape=(batch, heads, length, length), axis=-1)
    mixed = net.node("MatMul", scores, parts[2], shape=(batch, heads, length, each))
    mixed = net.node("Transpose", mixed, perm=[0, 2, 1, 3], shape=(batch, length, heads, each))
    net.x = net.node("Reshape", mixed, net.constant(np.array([0, 0, width])), shape=(batch, length, width))
    layer(width)
    close(skip)
    skip = net.x
    if not behind:
        norm()
    layer(4 * width, str(net.rng.choice(["Gelu", "Gelu", "Relu"])))
    layer(width)
    close(skip)


def sequence(seed: int, quantised: bool) -> Made:
    """1-d convolutions over a signal."""
    rng = np.random.default_rng((6, seed))
    batch, length = int(rng.choice([1, 1, 8, 32])), int(rng.choice([64, 100, 256, 500, 1000]))
    net = Net(rng, (batch, channels(rng, 8, 128), length), quantised)
    for _ in range(int(rng.integers(4, 8))):
        k, c = int(rng.choice([1, 3, 3, 5, 9])), channels(rng, 8, 256)
        dilation = int(rng.choice([1, 1, 2, 4]))
        most = int(MOST_MACS / (batch * net.shape[-1] * net.shape[1] * k))
        net.conv(max(4, min(c, most)), (k,), int(rng.choice([1, 1, 2])), act="Relu", dilation=dilation)
    n, c, _ = net.shape
    net.simple("GlobalAveragePool", (n, c, 1))
    net.simple("Flatten", (n, c))
    net.dense(10)
    return net.model(), batch
