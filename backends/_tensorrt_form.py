"""Quantised layers in the form that TensorRT takes, on onnx-graphsurgeon; each change keeps what is computed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

HALF_OPSET = 19  # the first whose Q and DQ take float16
PAIRS = ("QuantizeLinear", "DequantizeLinear")


Fresh = Callable[[str], str]


def legalise(graph: gs.Graph) -> None:
    """Biases as floats, one scale for an activation that has many equal ones; in every graph."""
    fresh = fresh_names(graph)
    for body in (graph, *graph.subgraphs(recursive=True)):
        for node in body.nodes:
            if node.op in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2:
                _float_bias(node, 2, fresh)
            elif node.op == "Add" and any(v.inputs and v.inputs[0].op in ("MatMul", "Gemm") for v in node.inputs):
                for index in (0, 1):
                    _float_bias(node, index, fresh)
            elif node.op in PAIRS and not isinstance(node.inputs[0], gs.Constant):
                _one_scale(node, fresh)


def _float_bias(node: gs.Node, index: int, fresh: Fresh) -> None:
    """Let a node read the numbers that a DQ makes of constant codes."""
    decoder = node.inputs[index].inputs[0] if node.inputs[index].inputs else None
    if decoder is None or decoder.op != "DequantizeLinear" or decoder.attrs.get("block_size"):
        return
    if not all(isinstance(v, gs.Constant) for v in decoder.inputs):
        return
    codes, scale, *zero = (v.values for v in decoder.inputs)
    axis = decoder.attrs.get("axis", 1) % max(codes.ndim, 1)
    along = [-1 if i == axis else 1 for i in range(codes.ndim)] if scale.size > 1 else [1] * codes.ndim
    offset = zero[0].astype(np.float64).reshape(along) if zero else 0.0
    numbers = (codes.astype(np.float64) - offset) * scale.astype(np.float64).reshape(along)
    node.inputs[index] = gs.Constant(fresh(f"{node.inputs[index].name}_float"), numbers.astype(scale.dtype))


def _one_scale(node: gs.Node, fresh: Fresh) -> None:
    """Scales that are all equal along an axis of an activation are one."""
    if not all(isinstance(v, gs.Constant) for v in node.inputs[1:]) or node.attrs.get("block_size"):
        return
    held: list[np.ndarray] = [v.values for v in node.inputs[1:]]
    if held[0].size < 2 or any(np.any(array != array.flat[0]) for array in held):
        return
    for index, array in enumerate(held, start=1):
        node.inputs[index] = gs.Constant(fresh(f"{node.inputs[index].name}_one"), np.asarray(array.flat[0]))
    node.attrs.pop("axis", None)


def fresh_names(graph: gs.Graph) -> Fresh:
    """Names that nothing in the graph has, by hint."""
    taken = {v.name for body in (graph, *graph.subgraphs(recursive=True)) for v in body.tensors().values()}
    taken |= {n.name for body in (graph, *graph.subgraphs(recursive=True)) for n in body.nodes}

    def fresh(hint: str) -> str:
        numbered = (f"{hint}_{i}" for i in itertools.count(1))
        name = next(n for n in itertools.chain([hint], numbered) if n not in taken)
        taken.add(name)
        return name

    return fresh
