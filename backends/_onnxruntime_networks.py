"""A network being written, layer by layer, in float or with quantised tensors, for measuring kernels in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
SCALE = 0.04  # step of quantised activations


class Net:
    """A graph being written. Shapes are known throughout; `x` is the tensor that the walk has come to."""

    def __init__(
        self, rng: np.random.Generator, shape: Sequence[int], quantised: bool, *, open_batch: bool = False
    ) -> None:
        self.rng, self.quantised = rng, quantised
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {"input": tuple(shape)}
        self.x = "input"
        self.batch = "batch" if open_batch else shape[0]  # open: known when it runs, as in most models
        self.step = 1.0  # of the weights written last
        self.scale = 1.0  # of what a layer may take
        if quantised:
            self.x = self.pair("input")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[self.x]

    def constant(self, array: np.ndarray, name: str = "c") -> str:
        name = f"{name}{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, shape: Sequence[int], domain: str = "", **attributes) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{name}_node", domain=domain, **attributes))
        self.shapes[name] = tuple(shape)
        return name

    def pair(self, x: str, positive: bool = False) -> str:
        """Q and DQ, where the network is quantised; codes of a positive tensor begin at 0 and reach 6."""
        if not self.quantised:
            return x
        scale = self.constant(np.float32(6 / 255 if positive else SCALE))
        zero = self.constant(np.uint8(0 if positive else 128))
        codes = self.node("QuantizeLinear", x, scale, zero, shape=self.shapes[x])
        return self.node("DequantizeLinear", codes, scale, zero, shape=self.shapes[x])

    def weight(self, *shape: int, axis: int = 0) -> str:
        """A weight of unit gain; in a quantised network 8-bit codes with a scale for each output."""
        gain = 1 / math.sqrt(max(1, math.prod(shape) // shape[axis]))
        values = self.rng.standard_normal(shape, dtype=np.float32) * gain
        if not self.quantised:
            return self.constant(values)
        scale = np.full(shape[axis], gain / 30, np.float32)
        self.step = gain / 30
        codes = np.clip(np.round(values / (gain / 30)), -127, 127).astype(np.int8)
        zeros = self.constant(np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", self.constant(codes), self.constant(scale), zeros, shape=shape, axis=axis)

    def bias(self, outputs: int) -> str:
        """A bias; in a quantised network 32-bit codes, with the only scale that integer kernels take."""
        values = self.rng.standard_normal(outputs, dtype=np.float32) * 0.1
        if not self.quantised:
            return self.constant(values)
        source = self._maker(self.x)
        step = self.step * float(numpy_helper.to_array(next(w for w in self.weights if w.name == source.input[1])))
        codes, scale = np.round(values / step).astype(np.int32), np.full(outputs, step, np.float32)
        parts = [self.constant(a) for a in (codes, scale, np.zeros(outputs, np.int32))]
        return self.node("DequantizeLinear", *parts, shape=(outputs,), axis=0)

    def _maker(self, x: str) -> onnx.NodeProto:
        return next(n for n in reversed(self.nodes) if n.output[0] == x)

    def _ready(self) -> None:
        """A layer with weights reads codes where the network is quantised."""
        if self.quantised and self._maker(self.x).op_type != "DequantizeLinear":
            self.x = self.pair(self.x)

    def conv(self, outputs: int, kernel: Sequence[int] = (3, 3), stride: int = 1, group: int = 1, act: str = "",
             dilation: int = 1) -> None:  # fmt: skip
        self._ready()
        n, c, *size = self.shape
        pads = [dilation * (k - 1) // 2 for k in kernel] * 2
        reach = [dilation * (k - 1) for k in kernel]
        out = [(s + 2 * (r // 2) - r - 1) // stride + 1 for s, r in zip(size, reach, strict=True)]
        w = self.weight(outputs, c // group, *kernel)
        bias = self.bias(outputs)
        self.x = self.node(
            "Conv", self.x, w, bias, shape=(n, outputs, *out), pads=pads, strides=[stride] * len(kernel), group=group,
            dilations=[dilation] * len(kernel), kernel_shape=list(kernel),
        )  # fmt: skip
        self.act(act)

    def act(self, kind: str) -> None:
        """An activation ("" for none), then the pair that ends a quantised layer."""
        absorbed = kind in ("Relu", "Clip")
        if kind and not absorbed:
            self.x = self.pair(self.x)
        if kind == "SiLU":
            self.x = self.node("Mul", self.x, self.node("Sigmoid", self.x, shape=self.shape), shape=self.shape)
        elif kind == "Clip":
            ends = self.constant(np.float32(0)), self.constant(np.float32(6))
            self.x = self.node("Clip", self.x, *ends, shape=self.shape)
        elif kind:
            self.x = self.node(kind, self.x, shape=self.shape)
        self.x = self.pair(self.x, positive=absorbed)

    def simple(
        self, op: str, shape: Sequence[int] | None = None, *others: str, paired: bool = True, **attributes
    ) -> None:
        self.x = self.node(op, self.x, *others, shape=self.shape if shape is None else shape, **attributes)
        if paired:
            self.x = self.pair(self.x)

    def with_(self, op: str, other: str, **attributes) -> None:
        """Add or Mul with another tensor, broadcast."""
        self.x = self.pair(self.node(op, self.x, other, shape=self.shape, **attributes))

    def dense(self, outputs: int, act: str = "") -> None:
        """MatMul and bias over the last axis."""
        self._ready()
        *rows, inputs = self.shape
        w = self.weight(inputs, outputs, axis=1)
        if len(rows) == 1:
            self.x = self.node("Gemm", self.x, w, self.bias(outputs), shape=(*rows, outputs))
        else:
            bias = self.constant(self.rng.standard_normal(outputs, dtype=np.float32) * 0.1)
            self.x = self.node("MatMul", self.x, w, shape=(*rows, outputs))
            if self.rng.random() < 0.5:  # else the integer product comes out in float
                self.x = self.pair(self.x)
            self.x = self.node("Add", self.x, bias, shape=(*rows, outputs))
        self.act(act)

    def model(self) -> onnx.ModelProto:
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.batch, *self.shapes[name][1:]])
            for name in ("input", self.x)
        ]
        graph = helper.make_graph(self.nodes, "calibration", ends[:1], ends[1:], self.weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)
