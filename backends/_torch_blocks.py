"""Products with codes in blocks, and rows of tables of them: decoded once; the codes stay as they are.

What is trained is around them: biases, norms, layers in float. Activations are floats here; onnxruntime may round those
before a product to 8 bits (accuracy level 4), which trained weights then have to bear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from effc.block_codes import BlockCodes
from effc.model import RUNTIME_DOMAIN, constant_tensor

from ._torch_ops import TABLE, attributes, refuse
from ._torch_shapes import wrap

if TYPE_CHECKING:
    from ._torch_build import Builder


class CodedLinear(nn.Module):
    """x W^T + b with a weight [N, K] that is not trained."""

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(weight), persistent=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CodedEmbedding(nn.Module):
    """Rows of a table [V, K] that is not trained."""

    weight: Tensor

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(weight), persistent=False)

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(wrap(indices.to(self.weight.device), size=len(self.weight)), self.weight)


@TABLE.rule("MatMulNBits", domain=RUNTIME_DOMAIN)
def matmul_nbits_rule(build: Builder, node: ir.Node) -> fx.Node:
    options = {"bits": 4, "block_size": 0} | attributes(node)
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise refuse(build, node, "a group index")
    codes = _constant(build, node, 1)
    decoded = _decoded(build, node, codes.reshape(len(codes), -1), 2, options["K"], options)
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    found = build.source(bias)
    made = build.module(node, CodedLinear(decoded), {"bias": found}, build(node.inputs[0]))
    return made if bias is None or found is not None else build.call(torch.add, made, build(bias))


@TABLE.rule("GatherBlockQuantized", domain=RUNTIME_DOMAIN)
def gather_block_quantized_rule(build: Builder, node: ir.Node) -> fx.Node:
    options = {"bits": 4, "block_size": 128, "gather_axis": 0, "quantize_axis": 1} | attributes(node)
    codes = _constant(build, node, 0)
    if codes.ndim != 2 or options["gather_axis"] not in (0, -2) or options["quantize_axis"] not in (1, -1):
        raise refuse(build, node, "a table that is not looked up by rows of blocks")
    if codes.dtype != np.uint8:
        raise refuse(build, node, f"codes of type {codes.dtype}")
    columns = codes.shape[1] * (8 // options["bits"])
    decoded = _decoded(build, node, codes, 2, columns, options)
    return build.module(node, CodedEmbedding(decoded), {}, build(node.inputs[1]))


def _decoded(
    build: Builder, node: ir.Node, codes: np.ndarray, first: int, columns: int, options: dict[str, int]
) -> np.ndarray:
    """[N, K] float32 of codes by rows; scales and zero points are the inputs from `first` on."""
    zeros = _constant(build, node, first + 1) if len(node.inputs) > first + 1 and node.inputs[first + 1] else None
    if zeros is not None and zeros.dtype != np.uint8:
        raise refuse(build, node, f"zero points of type {zeros.dtype}")
    scales = _constant(build, node, first).reshape(len(codes), -1)
    if scales.dtype in (np.float16, ml_dtypes.bfloat16):
        raise refuse(build, node, f"scales of type {scales.dtype}")
    packed = None if zeros is None else zeros.reshape(len(codes), -1)
    return BlockCodes.unpacked(codes, scales, packed, options["bits"], options["block_size"], columns).decoded()


def _constant(build: Builder, node: ir.Node, place: int) -> np.ndarray:
    """An operand's numbers, where need be behind a Reshape that only says how its bytes are seen."""
    value = node.inputs[place]
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "Reshape":
        inner, shape = (constant_tensor(v) for v in maker.inputs)
        if inner is not None and shape is not None:
            return inner.numpy().reshape(shape.numpy())
    tensor = constant_tensor(value)
    if tensor is None:
        raise refuse(build, node, "codes that are computed")
    return tensor.numpy()
