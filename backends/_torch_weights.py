"""Weights with structure as parametrizations: what is trained is what is emitted.

    mask        W = M * V          zeros stay zero
    codebook    W = C[I]           one gradient a centroid, the sum over the weights that share it
    integers    W = S * (clip(round(V / S) + Z) - Z)
    layout      W = V^T, or V in another shape: ONNX and PyTorch store some weights differently

The parameter (V or C) is named after the ONNX initializer and has its layout; parametrizations follow in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from effc.errors import BadInput
from effc.model import constant_tensor

from ._torch_quantize import along, codes, dequantize, limits

HUGE = 1e30  # stands for infinity in attention masks


class Mask(nn.Module):
    """Zeros where the mask is zero, whatever the parameter holds there."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, weight.new_zeros(()))


class Codebook(nn.Module):
    """Rows of the parameter along `axis`, picked by fixed indices."""

    indices: Tensor

    def __init__(self, indices: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", indices, persistent=False)

    def forward(self, codebook: Tensor) -> Tensor:
        picked = codebook.index_select(self.axis, self.indices.reshape(-1))
        return picked.reshape(*codebook.shape[: self.axis], *self.indices.shape, *codebook.shape[self.axis + 1 :])


class Integers(nn.Module):
    """What DequantizeLinear makes of the parameter's codes; gradients pass where these are in range.

    Args:
        stored: the model's codes. int8 codes that keep to 7 bits stay there: they may have to, so that kernels
            without wide accumulators do not saturate.
        scale, zero: one number, or one for each index of `axis`.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, stored: np.ndarray, scale: Tensor, zero: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.low, self.high = limits(ir.DataType.from_numpy(stored.dtype))
        if stored.dtype == np.int8 and stored.size and stored.min() >= -64 and stored.max() <= 63:
            self.low, self.high = -64, 63
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        scale, zero = (along(v, self.axis, weight.dim()) for v in (self.scale, self.zero))
        return (self._codes(weight) - zero).to(weight.dtype) * scale

    def store(self, weight: Tensor, stored: np.ndarray) -> np.ndarray:
        """Codes of a trained weight, of the type of those stored; a weight that was not trained keeps its code."""
        before = dequantize(to_torch(stored).to(weight.device), self.scale, self.zero, axis=self.axis)
        found = self._codes(weight).cpu().numpy().astype(stored.dtype)
        return np.where((weight == before).cpu().numpy(), stored, found)

    def _codes(self, weight: Tensor) -> Tensor:
        """As the forward pass rounds, so that a tie is stored as it was trained; float32 has no codes of 32 bits."""
        wide = weight.double() if self.high > 2**24 else weight
        scale, zero = (along(v, self.axis, weight.dim()) for v in (self.scale, self.zero))
        return codes(wide, scale.to(wide.dtype), zero, self.low, self.high)


class Transposed(nn.Module):
    """A matrix [K, N] as PyTorch's [N, K]."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.T


class Reshaped(nn.Module):
    """The same numbers in the shape that a module asks for."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.shape)


@dataclass(frozen=True)
class Source:
    """A constant operand that can be trained.

    Attributes:
        name: the initializer that holds it: the weight itself, its codebook, or its integers.
        start: the parameter's first numbers, in the initializer's layout.
        encoding: how the weight is made of it, None where it is the weight.
        shape: of the weight.
    """

    name: str
    start: Tensor
    encoding: nn.Module | None
    shape: tuple[int, ...]


def trainable(value: ir.Value) -> bool:
    """Whether an initializer holds numbers to train: floats of at least one axis, finite and no mask's infinities."""
    tensor = value.const_value
    if not value.is_initializer() or tensor is None or not tensor.dtype.is_floating_point() or not tensor.shape:
        return False
    if tensor.dtype.bitwidth < 16 or tensor.size == 0:
        return False
    array = tensor.numpy().astype(np.float32, copy=False)
    return bool(np.abs(array).max() < HUGE)


def source(value: ir.Value) -> Source | None:
    """What is trained where a node reads this tensor, or None: it is no constant, or none to train."""
    if trainable(value):
        start = to_torch(value.const_value.numpy())
        return Source(value.name, start, None, tuple(start.shape))
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gather":
        return _codebook(node)
    return _integers(node) if node.op_type == "DequantizeLinear" else None


def _codebook(node: ir.Node) -> Source | None:
    table, index = node.inputs
    caster = index.producer()
    if caster is not None and caster.op_type == "Cast":
        index = caster.inputs[0]
    picks = constant_tensor(index)
    if picks is None or not picks.dtype.is_integer() or not trainable(table):
        return None
    start = to_torch(table.const_value.numpy())
    axis = node.attributes.get_int("axis", 0) % start.dim()
    places = torch.from_numpy(picks.numpy().astype(np.int64))
    places = torch.where(places < 0, places + start.shape[axis], places)
    shape = (*start.shape[:axis], *places.shape, *start.shape[axis + 1 :])
    return Source(table.name, start, Codebook(places, axis), shape)


def _integers(node: ir.Node) -> Source | None:
    q, scale, *zeros = node.inputs
    constants = [constant_tensor(v) for v in (scale, *zeros) if v is not None]
    if not q.is_initializer() or q.const_value is None or None in constants or node.attributes.get_int("block_size", 0):
        return None
    if not q.const_value.dtype.is_integer() or q.const_value.dtype.bitwidth < 8:
        return None
    stored = q.const_value.numpy()
    scales, *offsets = (to_torch(c.numpy()) for c in constants)
    offset = offsets[0] if offsets else torch.zeros_like(scales)
    axis = node.attributes.get_int("axis", 1)
    start = dequantize(to_torch(stored), scales, offset, axis=axis)
    return Source(q.name, start, Integers(stored, scales, offset, axis), stored.shape)


def place(module: nn.Module, attribute: str, parameter: nn.Parameter, steps: Sequence[nn.Module]) -> None:
    """Let a module's weight be the parameter, or what these steps make of it."""
    setattr(module, attribute, parameter)
    for step in steps:
        parametrize.register_parametrization(module, attribute, step, unsafe=True)
    if steps:
        _steps(module, attribute).original = parameter  # as given: it may be shared with other modules


def _steps(module: nn.Module, attribute: str) -> Any:
    """The list of parametrizations of a module's attribute, whose `original` is the parameter."""
    return cast(nn.ModuleDict, module.parametrizations)[attribute]


def resolve(root: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a place, behind its parametrizations."""
    prefix, _, attribute = path.rpartition(".")
    module = root.get_submodule(prefix)
    if parametrize.is_parametrized(module, attribute):
        return _steps(module, attribute).original
    return getattr(module, attribute)


def steps_of(root: nn.Module, path: str) -> list[nn.Module]:
    """The parametrizations at a place, first one first."""
    prefix, _, attribute = path.rpartition(".")
    module = root.get_submodule(prefix)
    return list(_steps(module, attribute)) if parametrize.is_parametrized(module, attribute) else []


def attach(root: nn.Module, path: str, mask: Mask) -> None:
    """Put a mask, the first of its parametrizations, on the parameter at a place; one that is there goes."""
    prefix, _, attribute = path.rpartition(".")
    module = root.get_submodule(prefix)
    steps = steps_of(root, path)
    if not steps:
        place(module, attribute, getattr(module, attribute), [mask])
    elif isinstance(steps[0], Mask):
        _steps(module, attribute)[0] = mask
    else:
        _steps(module, attribute).insert(0, mask)


def to_torch(array: np.ndarray) -> Tensor:
    """A copy as a tensor. Raises BadInput for types that PyTorch has not."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise BadInput(f"PyTorch has no tensors of {array.dtype}") from error


def to_numpy(tensor: Tensor, dtype: np.dtype) -> np.ndarray:
    """A copy in main memory, of the given type."""
    values = tensor.detach().cpu()
    return values.float().numpy().astype(dtype) if values.dtype == torch.bfloat16 else values.numpy().astype(dtype)
