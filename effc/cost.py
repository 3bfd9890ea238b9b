"""What a model costs: multiply-accumulates, parameters, weights and traffic, per node and in all.

MACs are those of convolutions, matrix products and recurrent layers, the unit in which architectures are published;
other operators count none. A node that the table lacks, or whose shape is not known, is reported as unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from effc.model import RUNTIME_DOMAIN, STANDARD_DOMAINS, Model, collection_paused, size_of, understood
from effc.table import OpTable
from effc.traffic import VIEWS, Types, element_type, traffic

Shapes = Mapping[str, tuple | None]


@dataclass(frozen=True)
class Cost:
    """Cost of some nodes, for one inference of the stated batch.

    Attributes:
        macs: multiply-accumulates.
        parameters: numbers that were trained.
        weight_bytes: bytes in which weights are stored.
        activation_bytes: bytes read and written that are no weights.
        energy: joules; 0 where no target was given (`effc.energy`).
        seconds: predicted latency; 0 where nothing was predicted.
    """

    macs: int = 0
    parameters: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    energy: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.parameters + other.parameters,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
            self.energy + other.energy,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class ModelCost:
    """Cost of a model.

    Attributes:
        total: sum over all nodes; a weight that several nodes read counts once.
        nodes: node name -> its cost.
        unknown: node name -> why its cost is not known.
    """

    total: Cost
    nodes: Mapping[str, Cost]
    unknown: Mapping[str, str] = field(default_factory=dict)


macs: OpTable = OpTable("MACs")
MATRIX_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
INTEGER_OPS = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
CONSTANTS = frozenset({"Constant", "ConstantOfShape"})
MOVES = VIEWS | {"Transpose"}  # between DequantizeLinear and a product: the codes are the same
FAR = 4  # so many of them are looked through


@macs.rule("Conv", "ConvInteger")
def _conv(node: ir.Node, shapes: Shapes) -> int | None:
    return _product(shapes, node.outputs[0], _weight_share(shapes, node.inputs[1]))


@macs.rule("QLinearConv")
def _qlinear_conv(node: ir.Node, shapes: Shapes) -> int | None:
    return _product(shapes, node.outputs[0], _weight_share(shapes, node.inputs[3]))


@macs.rule("ConvTranspose")
def _conv_transpose(node: ir.Node, shapes: Shapes) -> int | None:
    # Every input element meets the whole kernel: weights are [C, N/groups, kh, kw].
    return _product(shapes, node.inputs[0], _weight_share(shapes, node.inputs[1]))


@macs.rule("Gemm")
def _gemm(node: ir.Node, shapes: Shapes) -> int | None:
    a = _shape(shapes, node.inputs[0])
    transposed = node.attributes.get_int("transA", 0)
    return None if a is None else _product(shapes, node.outputs[0], a[0] if transposed else a[1])


@macs.rule("MatMul", "MatMulInteger")
def _matmul(node: ir.Node, shapes: Shapes) -> int | None:
    a = _shape(shapes, node.inputs[0])
    return _product(shapes, node.outputs[0], a[-1]) if a else None


@macs.rule("QLinearMatMul")
def _qlinear_matmul(node: ir.Node, shapes: Shapes) -> int | None:
    return _matmul(node, shapes)


@macs.rule("LSTM", "GRU", "RNN")
def _recurrent(node: ir.Node, shapes: Shapes) -> int | None:
    # Each step of each sequence meets both matrices of a direction: [directions, gates x hidden, inputs or hidden].
    x, *matrices = (_shape(shapes, value) for value in node.inputs[:3])
    return None if x is None or None in matrices else math.prod(x[:2]) * sum(math.prod(m) for m in matrices)


@macs.rule("MatMulNBits", domain=RUNTIME_DOMAIN)
def _matmul_nbits(node: ir.Node, shapes: Shapes) -> int | None:
    return _product(shapes, node.outputs[0], node.attributes.get_int("K", 0))


def _shape(shapes: Shapes, value: ir.Value | None) -> tuple[int, ...] | None:
    shape = shapes.get(value.name) if value is not None else None
    return shape if shape is not None and all(isinstance(d, int) for d in shape) else None


def _weight_share(shapes: Shapes, weight: ir.Value | None) -> int | None:
    """Products per output element of a convolution: all of a filter, [N, C/groups, kh, kw] without N."""
    shape = _shape(shapes, weight)
    return math.prod(shape[1:]) if shape else None


def _product(shapes: Shapes, value: ir.Value, per_element: int | None) -> int | None:
    shape = _shape(shapes, value)
    return None if shape is None or per_element is None else math.prod(shape) * per_element


def operand_type(node: ir.Node, types: Types | None = None) -> str:
    """Type of the numbers that a node multiplies: "float32", "float16", "int8", ...

    Codes behind DequantizeLinear count as what they are when both factors are codes, and the wider of the two decides;
    signed and unsigned ones count alike. A float activation makes it a float product, however the weight is stored.

    Args:
        types: element types by tensor name (`effc.traffic.element_types`); without them each call looks for itself,
            which in a long chain of nodes without weights takes a walk along it. What is not known is "float32".
    """
    if node.op_type in INTEGER_OPS:
        return "int8"
    if node.op_type == "MatMulNBits":  # its accuracy level says how activations are rounded
        return "int8" if node.attributes.get_int("accuracy_level", 0) == 4 else "float32"
    factors = [v for v in node.inputs[: 2 if node.op_type in MATRIX_OPS else 1] if v is not None]
    widths = [_code_width(value, types) for value in factors]
    if widths and None not in widths:
        return f"int{max([4, *filter(None, widths)])}"
    dtype = next((t for v in factors if (t := element_type(v, types)) is not None), ir.DataType.FLOAT)
    named = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
    return named.get(dtype, dtype.name.lower().removeprefix("u"))


def _code_width(value: ir.Value | None, types: Types | None) -> int | None:
    """Bits of the integer codes that a tensor is dequantised from, else None."""
    for _ in range(FAR):
        node = None if value is None else value.producer()
        if node is None or node.domain not in STANDARD_DOMAINS:
            return None
        if node.op_type == "DequantizeLinear":
            dtype = element_type(node.inputs[0], types)
            return dtype.bitwidth if dtype is not None and dtype.is_integer() else None
        if node.op_type not in MOVES:
            return None
        value = node.inputs[0]
    return None


def cost(model: Model, batch: int = 1, dims: Mapping[str, int] | None = None) -> ModelCost:
    """MACs, parameters, weight and activation bytes of a model at a stated batch; each node is a kernel of its own."""
    key = ("cost", batch, tuple(sorted((dims or {}).items())))
    return model.cached(key, lambda: _cost(model, batch, dims or {}))


@collection_paused()
def _cost(model: Model, batch: int, dims: Mapping[str, int]) -> ModelCost:
    shapes = model.shapes(batch, dims)
    moved = traffic(model, batch, dims)
    nodes, unknown = {}, dict(model.not_analysed())
    counted: set[ir.Value] = set()
    for node in model.graph:
        count = parameters = weight_bytes = 0
        rule = macs.find(node)
        if rule is not None:
            found = rule(node, shapes)
            if found is None:
                unknown[node.name] = f"the shapes of {node.op_type} are not known"
            count = found or 0
        if moved[node.name].missing:
            unknown.setdefault(node.name, f"the sizes of what {node.op_type} reads or writes are not known")
        stored = [_constant_cost(node, shapes)] if node.op_type in CONSTANTS and node.domain in STANDARD_DOMAINS else []
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in counted:
                counted.add(value)
                stored.append(_weight_cost(node, value))
        for numbers, size in stored:
            parameters, weight_bytes = parameters + numbers, weight_bytes + size
        nodes[node.name] = Cost(count, parameters, weight_bytes, moved[node.name].activations)
    found = nodes.values()
    total = Cost(
        sum([c.macs for c in found]),
        sum([c.parameters for c in found]),
        sum([c.weight_bytes for c in found]),
        sum([c.activation_bytes for c in found]),
    )
    return ModelCost(total, nodes, unknown)


def _weight_cost(node: ir.Node, value: ir.Value) -> tuple[int, int]:
    """Parameters and bytes of a weight."""
    tensor = value.const_value
    if tensor is None:
        return 0, 0
    size, dtype = size_of(tensor), tensor.dtype
    if understood(node):
        product = node.op_type == "MatMulNBits"
        if product and list(node.inputs).index(value) == 5:  # its bias
            return size, tensor.nbytes
        codes = value is node.inputs[int(product)]
        each = 8 // node.attributes.get_int("bits", 4) if dtype == ir.DataType.UINT8 else 1  # bytes hold several
        return (size * each if codes else 0), tensor.nbytes
    scale_or_zero = node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[0] is not value
    is_parameter = not scale_or_zero and (
        dtype.is_floating_point() or node.op_type == "DequantizeLinear" or "Integer" in node.op_type
    )
    nbytes = tensor.nbytes if dtype == ir.DataType.STRING else -(-size * dtype.bitwidth // 8)
    return size if is_parameter else 0, nbytes


def _constant_cost(node: ir.Node, shapes: Shapes) -> tuple[int, int]:
    """Parameters and bytes of a constant node's tensor: it is stored (Constant), or made at run time, without bytes."""
    shape = _shape(shapes, node.outputs[0])
    value = node.attributes.get("value")
    if node.op_type == "Constant":
        if value is None:
            return 0, 0
        tensor = value.as_tensor()
        return tensor.size if tensor.dtype.is_floating_point() else 0, tensor.nbytes
    is_float = value is None or value.as_tensor().dtype.is_floating_point()
    return math.prod(shape) if shape and is_float else 0, 0
