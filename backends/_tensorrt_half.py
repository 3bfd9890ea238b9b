"""Float32 parts of a graph in float16, on onnx-graphsurgeon; casts stand where the two meet.

Inputs and outputs of the model keep their types. Operators that sum, divide or take exponents stay in float32, as do
nodes with numbers beyond 65504. Scales below 2^-17, which float16 would round by more than 8-bit codes are rounded, are
raised to that, and weights coded anew.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from ._tensorrt_form import PAIRS, fresh_names

HALVED = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "QuantizeLinear", "DequantizeLinear", "BatchNormalization",
     "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Add", "Sub", "Mul",
     "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Reshape", "Flatten", "Transpose",
     "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Gather", "Expand", "Identity", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
LARGEST, LEAST_SCALE = float(np.finfo(np.float16).max), 2.0**-17
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Tensor = Any  # graphsurgeon's base class of tensors declares none of their attributes


def to_half(graph: gs.Graph, floats: Collection[str]) -> None:
    """Let operators of the main graph work in float16 where they may.

    Args:
        floats: names of the tensors that are float32.
    """
    _Halving(graph, floats).run()


def _fits(value: Tensor) -> bool:
    if not isinstance(value, gs.Constant) or value.dtype != np.float32 or not np.prod(value.shape):
        return True
    return bool(np.abs(value.values).max() <= LARGEST)


class _Halving:
    def __init__(self, graph: gs.Graph, floats: Collection[str]) -> None:
        self.graph, self.floats, self.fresh = graph, floats, fresh_names(graph)
        kept = self._kept()
        self.nodes = [n for n in graph.nodes if n.op in HALVED and not n.domain and id(n) not in kept]
        self.inside = {id(n) for n in self.nodes}
        self.cast: dict[int, Tensor] = {}  # id of a tensor -> its float16 form
        self.held: list[Tensor] = []  # keeps ids their tensors'

    def _kept(self) -> set[int]:
        """Nodes whose own numbers do not fit; layers among them decode their factors by themselves."""
        kept = [n for n in self.graph.nodes if not all(map(_fits, n.inputs))]
        for layer in [n for n in kept if n.op in LAYERS]:
            for index, value in enumerate(layer.inputs[:2]):
                if value.inputs and value.inputs[0].op == "DequantizeLinear":
                    layer.inputs[index] = self._decoder(value.inputs[0], kept)
        return {id(n) for n in kept}

    def _decoder(self, node: gs.Node, kept: list[gs.Node]) -> Tensor:
        made = gs.Variable(self.fresh(f"{node.outputs[0].name}_single"), np.float32, node.outputs[0].shape)
        kept.append(gs.Node(node.op, self.fresh(f"{node.name}_single"), dict(node.attrs), list(node.inputs), [made]))
        self.graph.nodes.append(kept[-1])
        return made

    def _raise_scales(self, node: gs.Node) -> None:
        """Scales that float16 holds well; constant codes become those of the same numbers."""
        value, scale, *_ = node.inputs
        if not isinstance(scale, gs.Constant) or scale.values.min() >= LEAST_SCALE:
            return
        before, after = scale.values, np.maximum(scale.values, np.float32(LEAST_SCALE))
        if isinstance(value, gs.Constant) and value.dtype == np.int8 and not node.attrs.get("block_size"):
            along = [-1 if i == node.attrs.get("axis", 1) else 1 for i in range(value.values.ndim)]
            ratio = (before.astype(np.float64) / after).reshape(along if before.size > 1 else ())
            codes = np.rint(value.values * ratio).astype(np.int8)
            node.inputs[0] = gs.Constant(self.fresh(f"{value.name}_raised"), codes)
        if id(scale) not in self.cast:
            self.held.append(scale)
            self.cast[id(scale)] = gs.Constant(self.fresh(f"{scale.name}_half"), after.astype(np.float16))

    def run(self) -> None:
        made = {id(v) for n in self.nodes for v in n.outputs if self._float(v)}
        for node in self.nodes:
            if node.op in PAIRS:
                self._raise_scales(node)
        for node in self.nodes:
            node.inputs = [self._half(v, made) if self._float(v) else v for v in node.inputs]
        results = {id(v) for g in (self.graph, *self.graph.subgraphs(recursive=True)) for v in g.outputs}
        for value in [v for n in self.nodes for v in n.outputs if id(v) in made]:
            if id(value) in results or any(id(n) not in self.inside for n in value.outputs):
                self._back(value)
            else:
                value.dtype = np.float16

    def _float(self, value: Tensor) -> bool:
        if isinstance(value, gs.Constant):
            return value.dtype == np.float32
        return value.name in self.floats

    def _half(self, value: Tensor, made: set[int]) -> Tensor:
        if id(value) in made:
            return value
        if id(value) not in self.cast:
            self.held.append(value)
            name = self.fresh(f"{value.name}_half")
            if isinstance(value, gs.Constant):
                found: Tensor = gs.Constant(name, value.values.astype(np.float16))
            else:
                found = gs.Variable(name, np.float16, value.shape)
                self._put([value], found, TensorProto.FLOAT16)
            self.cast[id(value)] = found
        return self.cast[id(value)]

    def _back(self, value: Tensor) -> None:
        """A float16 tensor in the place of this one; this one becomes its cast, for the readers in float32."""
        (maker,) = value.inputs
        half = gs.Variable(self.fresh(f"{value.name}_half"), np.float16, value.shape)
        inner = [n for n in value.outputs if id(n) in self.inside]
        maker.outputs = [half if v is value else v for v in maker.outputs]
        for node in inner:
            node.inputs = [half if v is value else v for v in node.inputs]
        self._put([half], value, TensorProto.FLOAT)

    def _put(self, inputs: list[Tensor], output: Tensor, dtype: int) -> None:
        name = self.fresh(f"{output.name}_cast")
        self.graph.nodes.append(gs.Node("Cast", name, {"to": dtype}, inputs, [output]))
