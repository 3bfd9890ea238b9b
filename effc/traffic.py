"""What nodes read and write: the element type of each tensor, and the bytes that move into and out of kernels.

Weights are what needs no input of the model to be known. What is computed from weights alone is made once, when the
model is loaded, and moves nothing at each inference; weights stored as codes behind a DequantizeLinear are read as
these codes. A tensor that stays inside of a fused kernel moves no bytes either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir

from effc.model import STANDARD_DOMAINS, Model, constant_tensor, understood
from effc.shapes import proven

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})  # another name, no copy
LOOKS = frozenset({"Shape", "Size"})  # at the shape, not at the elements
PICKS = frozenset(
    {"Gather", "GatherBlockQuantized", "GatherElements", "GatherND", "Slice"}
)  # read no more than they write
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
LIKE = frozenset({"Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike"})  # unless an attribute says else
# Types that no input and no attribute tells.
DEFAULTS = {
    "QuantizeLinear": ir.DataType.UINT8,
    "ConstantOfShape": ir.DataType.FLOAT,
    "RandomNormal": ir.DataType.FLOAT,
    "RandomUniform": ir.DataType.FLOAT,
}

Types = Mapping[str, ir.DataType]


@dataclass(frozen=True)
class Moved:
    """What a node moves in one inference.

    Attributes:
        weights: bytes of weights that it is the first to read.
        tensors: bytes moved, and bytes of the whole tensor, of each activation that it reads or writes.
        missing: how many tensors it moves whose size is not known.
    """

    weights: int = 0
    tensors: tuple[tuple[int, int], ...] = ()
    missing: int = 0

    @property
    def activations(self) -> int:
        """Bytes of activations."""
        return sum(moved for moved, _ in self.tensors)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.activations


def traffic(
    model: Model, batch: int = 1, dims: Mapping[str, int] | None = None, fused: Mapping[str, str] | None = None
) -> Mapping[str, Moved]:
    """What each node moves at a stated batch; nodes that are not analysed move nothing here.

    Args:
        dims: sizes of other symbolic dimensions by name.
        fused: node -> leading node of the kernel it became part of, or "" where nothing is left to do. A kernel reads
            what several of its nodes read once, and what only its own nodes read never leaves it. None: each node is
            a kernel of its own.
    """
    sizes = tensor_bytes(model, batch, dims)
    if fused:
        return _Walk(model, sizes, fused).nodes()
    key = ("traffic", batch, tuple(sorted((dims or {}).items())))
    return model.cached(key, lambda: _Walk(model, sizes, {}).nodes(), for_clones=True)


def tensor_bytes(model: Model, batch: int = 1, dims: Mapping[str, int] | None = None) -> Mapping[str, int]:
    """Bytes of every tensor of the main graph whose type and shape are known."""
    key = ("tensor bytes", batch, tuple(sorted((dims or {}).items())))

    def sizes() -> dict[str, int]:
        types, found = element_types(model), {}
        for name, shape in model.shapes(batch, dims).items():
            dtype = types.get(name)
            if dtype is not None and shape is not None and all(isinstance(d, int) for d in shape):
                found[name] = -(-math.prod(shape) * dtype.bitwidth // 8)
        return found

    return model.cached(key, sizes, for_clones=True)


class _Walk:
    """One walk over the graph, in order."""

    def __init__(self, model: Model, sizes: Mapping[str, int], fused: Mapping[str, str]) -> None:
        self.model, self.sizes, self.fused = model, sizes, fused
        self.made: set[ir.Value] = set()  # from weights alone, when the model is loaded
        self.coded: set[ir.Value] = set()  # from weights through DequantizeLinear, within the kernel that reads them
        self.read: set[tuple[str, ir.Value]] = set()
        self.weights: set[ir.Value] = set()

    def nodes(self) -> dict[str, Moved]:
        foreign = self.model.not_analysed()
        return {n.name or "": Moved() if n.name in foreign else self._node(n) for n in self.model.graph}

    def _node(self, node: ir.Node) -> Moved:
        op = node.op_type if node.domain in STANDARD_DOMAINS or understood(node) else None
        inputs = list(dict.fromkeys([self._codes(v) if self.fused else v for v in node.inputs if v is not None]))
        if op is not None and op not in RANDOM and all(map(self._is_weight, inputs)):
            if op != "DequantizeLinear" and not any(v in self.coded for v in inputs):
                self.made.update(node.outputs)
                return Moved()
            self.coded.update(node.outputs)
        elif op in VIEWS or self._kernel(node) == "":
            return Moved()
        return self._moved(node, inputs, op)

    def _moved(self, node: ir.Node, inputs: list[ir.Value], op: str | None) -> Moved:
        kernel = self._kernel(node)
        most = 0 if op in LOOKS else sum(self._size(v) or 0 for v in node.outputs) if op in PICKS else math.inf
        weights, tensors, missing = 0, [], 0
        for value in inputs:
            weight = self._is_weight(value)
            if most == 0 or value in self.coded or not (self._new(value) if weight else self._first(value, kernel)):
                continue
            size = self._size(value)
            if size is None:
                missing += 1
            elif weight:
                weights += min(size, most)
            else:
                tensors.append((min(size, most), size))
        for value in node.outputs:
            if value.name and self._leaves(value, kernel) and not self._decoded(value):
                size = self._size(value)
                missing += size is None
                tensors += [] if size is None else [(size, size)]
        return Moved(int(weights), tuple(tensors), missing)

    def _size(self, value: ir.Value) -> int | None:
        return self.sizes.get(value.name or "")

    def _codes(self, value: ir.Value) -> ir.Value:
        """What is read of a tensor: each kernel that takes a fused DequantizeLinear in reads its codes."""
        node = value.producer()
        codes = node.inputs[0] if node is not None and value not in self.coded and self._decoded(value) else None
        return value if codes is None else codes

    def _decoded(self, value: ir.Value) -> bool:
        """Whether a tensor is written nowhere: what reads it reads codes."""
        node = value.producer()
        within = node is not None and node.op_type == "DequantizeLinear" and node.name in self.fused
        return value in self.coded or within

    def _is_weight(self, value: ir.Value) -> bool:
        return value.is_initializer() or value in self.made or value in self.coded

    def _new(self, weight: ir.Value) -> bool:
        """Whether this read of a weight counts: once in a model."""
        if weight in self.weights:
            return False
        self.weights.add(weight)
        return True

    def _first(self, value: ir.Value, kernel: str) -> bool:
        """Whether this read of an activation counts: once in a kernel that did not make it."""
        producer = value.producer()
        if producer is not None and self._kernel(producer) == kernel:
            return False
        new = (kernel, value) not in self.read
        self.read.add((kernel, value))
        return new

    def _leaves(self, value: ir.Value, kernel: str) -> bool:
        return value.is_graph_output() or any(self._kernel(n) != kernel for n, _ in value.uses())

    def _kernel(self, node: ir.Node) -> str:
        return self.fused.get(node.name or "", node.name or "")


def element_types(model: Model) -> Types:
    """Element type of every tensor of the main graph where it is known, from types that are stated and from schemas."""

    def types() -> dict[str, ir.DataType]:
        found: dict[str, ir.DataType] = {}
        told = True
        for value in model.values():
            if not (name := value.name) or name in found:
                continue
            if (dtype := value.dtype) is None and (dtype := element_type(value, found)) is None:
                told = False
            else:
                found[name] = dtype
        if not told:  # what a function or a branch gives
            facts = proven(model)
            found = {name: fact.dtype for name, fact in facts.items() if fact.dtype is not None} | found
        return found

    return model.cached("element types", types, for_clones=True)


def element_type(value: ir.Value | None, known: Types | None = None) -> ir.DataType | None:
    """Element type of a tensor, where need be that of what it is computed from; None where nothing tells.

    Args:
        known: types by name that need not be looked for again.
    """
    known = known or {}
    while value is not None:
        if (dtype := _stated(value, known)) is not None:
            return dtype
        node = value.producer()
        if node is None:
            return None
        found = _source(node, value)
        if isinstance(found, ir.DataType):
            return found
        value = next((v for v in found if _stated(v, known) is not None), found[0] if found else None)
    return None


def _stated(value: ir.Value, known: Types) -> ir.DataType | None:
    if value.name in known:
        return known[value.name]
    if value.dtype is not None:
        return value.dtype
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.dtype


def _source(node: ir.Node, value: ir.Value) -> ir.DataType | list[ir.Value]:
    """An output's type, or the inputs that share it, as the operator's schema says."""
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    imports = {} if node.graph is None else node.graph.opset_imports
    signature = _signature(node.op_type, domain, imports.get(domain, imports.get("ai.onnx", 0)))
    if signature is None:
        return []
    inputs, outputs = signature
    index = node.outputs.index(value)
    kind = outputs[min(index, len(outputs) - 1)]
    if isinstance(kind, ir.DataType):
        return kind
    alike = [v for i, v in enumerate(node.inputs) if v is not None and inputs[min(i, len(inputs) - 1)] == kind]
    if alike:
        return alike
    for key in ("to", "dtype", "output_dtype"):
        if code := node.attributes.get_int(key, 0):
            return ir.DataType(code)
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    return DEFAULTS.get(node.op_type) or [v for v in node.inputs[:1] if v is not None and node.op_type in LIKE]


Kind = ir.DataType | str  # a type, or the name that a schema gives to types that are alike


@cache
def _signature(op_type: str, domain: str, version: int) -> tuple[tuple[Kind, ...], tuple[Kind, ...]] | None:
    try:
        newest = onnx.defs.onnx_opset_version() if domain == "" else 1
        schema = onnx.defs.get_schema(op_type, version or newest, domain)
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}

    def kind(name: str) -> Kind:
        only = allowed.get(name, [name])
        return _type(only[0]) or name if len(only) == 1 else name

    inputs, outputs = (tuple(kind(p.type_str) for p in parameters) for parameters in (schema.inputs, schema.outputs))
    return (inputs, outputs) if outputs else None


def _type(text: str) -> ir.DataType | None:
    """tensor(int64) -> INT64; None for what is no tensor."""
    return ir.DataType.__members__.get(text.removeprefix("tensor(").removesuffix(")").upper())
