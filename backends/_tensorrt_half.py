"""Float32 parts of a graph in float16, on onnx-graphsurgeon; casts stand where the two meet.

Inputs and outputs of the model keep their types. Operators that sum, divide or take exponents stay in float32, as do
layers whose numbers float16 does not hold: weights beyond 65504, and scales below 2^-14, which would lose digits.
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
LARGEST, LEAST_SCALE = float(np.finfo(np.float16).max), float(np.finfo(np.float16).tiny)
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Tensor = Any  # graphsurgeon's base class of tensors declares none of their attributes


def to_half(graph: gs.Graph, floats: Collection[str]) -> None:
    """Let operators of the main graph work in float16 where they may.

    Args:
        floats: names of the tensors that are float32.
    """
    _Halving(graph, floats).run()


class _Halving:
    def __init__(self, graph: gs.Graph, floats: Collection[str]) -> None:
        self.graph, self.floats, self.fresh = graph, floats, fresh_names(graph)
        kept = self._kept()
        self.nodes = [n for n in graph.nodes if n.op in HALVED and not n.domain and id(n) not in kept]
        self.inside = {id(n) for n in self.nodes}
        self.cast: dict[int, Tensor] = {}  # id of a tensor -> its float16 form
        self.held: list[Tensor] = []  # keeps ids their tensors'

    def _kept(self) -> set[int]:
        """Nodes whose own numbers do not fit, with the layers that read what they decode."""
        kept: set[int] = set()
        for node in self.graph.nodes:
            if not all(self._fits(v, node.op in PAIRS and i == 1) for i, v in enumerate(node.inputs)):
                kept.add(id(node))
        for layer in self.graph.nodes:
            if layer.op not in LAYERS:
                continue
            decoders = [v.inputs[0] for v in layer.inputs if v.inputs and v.inputs[0].op == "DequantizeLinear"]
            if id(layer) in kept or any(id(d) in kept for d in decoders):
                kept |= {id(layer), *(id(d) for d in decoders if isinstance(d.inputs[0], gs.Constant))}
        return kept

    def _fits(self, value: Tensor, is_scale: bool) -> bool:
        if not isinstance(value, gs.Constant) or value.dtype != np.float32 or not np.prod(value.shape):
            return True
        sizes = np.abs(value.values)
        return bool(sizes.max() <= LARGEST and not (is_scale and sizes.min() < LEAST_SCALE))

    def run(self) -> None:
        made = {id(v) for n in self.nodes for v in n.outputs if self._float(v)}
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
