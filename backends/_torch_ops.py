"""ONNX operator -> Python function of tensors: the table of the trainable view, and what works element by element.

An attribute and an input of one name are one parameter, so a function serves the opsets before and after its axes
became an input. A tensor of shape values is an int64 tensor in main memory.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from effc.errors import BadInput
from effc.table import OpTable

if TYPE_CHECKING:
    from ._torch_build import Builder


class Rule(Protocol):
    """Puts a node into the view; returns what stands for its output, or for its outputs."""

    def __call__(self, build: Builder, node: ir.Node) -> fx.Node | Sequence[fx.Node]: ...


TABLE: OpTable[Rule] = OpTable("trainable forms")


def refuse(build: Builder, node: ir.Node, what: str) -> BadInput:
    """The error for a node that has a rule and is of a kind that the rule does not know."""
    return BadInput(
        f"{build.model.name} cannot be trained: {node.op_type} ({node.name}) has {what}, which has no trainable form;"
        f" a rule for it belongs into {TABLE._file}"
    )


def function(
    *op_types: str,
    static: Sequence[int] = (),
    only: Mapping[str, Sequence[object]] | None = None,
    needs: Mapping[str, object] | None = None,
    results: int = 99,
) -> Callable[[Callable], Callable]:
    """Decorator: this function of tensors computes these operators.

    It is given the inputs by position (None where one is left out) and the attributes by name; `op_type`, `opset` and
    `outputs`, the number of outputs, if it has parameters of these names.

    Args:
        static: inputs that are handed over as numbers when they are constants: axes, sizes, bounds.
        only: attribute -> the values that the function knows.
        needs: attribute -> the value that it must have, where ONNX's default is another.
        results: how many outputs it can make.
    """

    def register(compute: Callable) -> Callable:
        known = inspect.signature(compute).parameters

        def rule(build: Builder, node: ir.Node) -> fx.Node:
            options = attributes(node)
            for key, value in options.items():
                if key not in known or value not in (only or {}).get(key, (value,)):
                    raise refuse(build, node, f"{key}={value!r}")
            for key, value in (needs or {}).items():
                if options.get(key) != value:
                    raise refuse(build, node, f"{key}={options.get(key, 'its default')!r}")
            if len(node.outputs) > results:
                raise refuse(build, node, f"{len(node.outputs)} outputs")
            given = {"op_type": node.op_type, "opset": build.model.opset, "outputs": len(node.outputs)}
            options |= {key: value for key, value in given.items() if key in known}
            inputs = [build.numbers(v) if i in static else build(v) for i, v in enumerate(node.inputs)]
            return build.call(compute, *inputs, **options)

        TABLE.rule(*op_types)(rule)
        return compute

    return register


def attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as plain Python values, those that hold tensors or graphs left out."""
    plain = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING)
    several = (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS)
    found = {k: a.value for k, a in node.attributes.items() if a.type in plain}
    return found | {k: tuple(a.value) for k, a in node.attributes.items() if a.type in several}


def align(*tensors: Tensor) -> list[Tensor]:
    """The same tensors on one device: shape values and small constants lie in main memory."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    return list(tensors) if device is None else [t.to(device) for t in tensors]


def ints(values: Tensor | Sequence[int] | int) -> list[int]:
    """Axes or sizes, however they came."""
    if isinstance(values, Tensor):
        values = values.reshape(-1).tolist()
    return [int(values)] if isinstance(values, int | float) else [int(v) for v in values]


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan,
    "Tanh": torch.tanh,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Equal": operator.eq, "Greater": operator.gt,
    "GreaterOrEqual": operator.ge, "Less": operator.lt, "LessOrEqual": operator.le, "And": torch.logical_and,
    "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip


def _unary(build: Builder, node: ir.Node) -> fx.Node:
    return build.call(UNARY[node.op_type], build(node.inputs[0]))


def _binary(build: Builder, node: ir.Node) -> fx.Node:
    return build.call(BINARY[node.op_type], *(build(v) for v in node.inputs))


TABLE.rule(*UNARY)(_unary)
TABLE.rule(*BINARY)(_binary)


@TABLE.rule("Identity")
def identity(build: Builder, node: ir.Node) -> fx.Node:
    return build(node.inputs[0])


@function("Div")
def div(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@function("Mod")
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@function("Pow")
def power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


@function("Sum")
def total(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = first + other
    return first


@function("Mean")
def mean(*values: Tensor) -> Tensor:
    return total(*values) / len(values)


@function("Max")
def largest(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.maximum(*align(first, other))
    return first


@function("Min")
def least(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.minimum(*align(first, other))
    return first


@function("Where")
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(*align(condition, a, b))


@function("Clip", static=(1, 2))
def clip(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    low, high = (torch.as_tensor(bound).to(x) if bound is not None else None for bound in (min, max))
    return x if low is None and high is None else torch.clamp(x, low, high)


@function("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    return (torch.isposinf(x) & bool(detect_positive)) | (torch.isneginf(x) & bool(detect_negative))


@function("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@function("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * F.elu(x, alpha)


@function("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@function("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@function("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.threshold(x, alpha, 0.0)


@function("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    return torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, torch.zeros_like(x)))


@function("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@function("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@function("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


@function("Cast", only={"saturate": (1,)})
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(DTYPES[to])


@function("CastLike", only={"saturate": (1,)})
def cast_like(x: Tensor, other: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(other.dtype)


DTYPES: dict[int, torch.dtype] = {
    int(ir.DataType.FLOAT): torch.float32,
    int(ir.DataType.DOUBLE): torch.float64,
    int(ir.DataType.FLOAT16): torch.float16,
    int(ir.DataType.BFLOAT16): torch.bfloat16,
    int(ir.DataType.INT8): torch.int8,
    int(ir.DataType.INT16): torch.int16,
    int(ir.DataType.INT32): torch.int32,
    int(ir.DataType.INT64): torch.int64,
    int(ir.DataType.UINT8): torch.uint8,
    int(ir.DataType.UINT16): torch.uint16,
    int(ir.DataType.UINT32): torch.uint32,
    int(ir.DataType.UINT64): torch.uint64,
    int(ir.DataType.BOOL): torch.bool,
}
