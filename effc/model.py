"""Model: an onnx_ir model with what the compiler needs to know of it.

One in-memory form for everything: weights stay lazily read or memory-mapped, names and metadata are kept, use-def
chains are there. A `Model` is changed by `effc.edit` alone, which advances `revision`; whatever is derived from a
model (shapes, costs, statistics) is cached under that number.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from effc.errors import BadInput

STANDARD_DOMAINS = ("", "ai.onnx")
RUNTIME_DOMAIN = "com.microsoft"  # of onnxruntime
UNDERSTOOD = frozenset({"MatMulNBits", "GatherBlockQuantized"})  # of that domain: products with, and rows of, codes
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_revisions = itertools.count(1)
SMALL = 1024  # elements: constants up to this size may hold shapes, axes and bounds that shape inference reads


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output: name, NumPy dtype, and shape (int: fixed, str: named and dynamic, None: unknown)."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None


class Model:
    """A neural network as a graph of ONNX operators.

    Attributes:
        ir: the `onnx_ir.Model`. Read it freely; change it through `effc.edit` only.
        name: what the user calls it, usually the file name.
        revision: a number that no other state of any model has: an edit draws a new one, a clone keeps it.
        notes: what capture passed through without analysing it, one sentence each.
        file: where it came from, when capture changed what a runtime can make of it; latency refers to that file.
    """

    file: Path | None = None

    def __init__(self, model: ir.Model, name: str = "model", notes: Sequence[str] = ()) -> None:
        self.ir = model
        self.name = name
        self.notes = tuple(notes)
        self.revision = next(_revisions)
        self._cache: dict[object, object] = {}
        self._for_clones: dict[object, object] = {}
        self._cached_revision = self.revision
        self._names: set[str] | None = None
        self._former_names: frozenset[str] = frozenset()
        _name_nodes(model.graph)

    @property
    def graph(self) -> ir.Graph:
        return self.ir.graph

    @property
    def opset(self) -> int:
        """Version of the standard operator set (0 when the model imports none)."""
        imports = self.ir.opset_imports
        return imports.get("", imports.get("ai.onnx", 0))

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """The inputs that a caller has to feed, that is without weights listed among the graph inputs."""
        return tuple(_info(v) for v in self.graph.inputs if not v.is_initializer())

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return tuple(_info(v) for v in self.graph.outputs)

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Nodes of the main graph in order; with `op_types`, standard operators of these types only."""
        for node in self.graph:
            if not op_types or (node.op_type in op_types and node.domain in STANDARD_DOMAINS):
                yield node

    def node(self, name: str) -> ir.Node:
        """The node of that name. Raises KeyError."""
        return self.cached("nodes by name", lambda: {n.name: n for n in self.graph})[name]

    def value(self, name: str) -> ir.Value:
        """The tensor of that name in the main graph. Raises KeyError."""
        return self.cached("values by name", lambda: {v.name: v for v in self.values()})[name]

    def values(self) -> Iterator[ir.Value]:
        """All tensors of the main graph: inputs, weights, node outputs."""
        for value in self.graph.inputs:
            if not value.is_initializer():
                yield value
        yield from self.graph.initializers.values()
        for node in self.graph:
            yield from (v for v in node.outputs if v.name)

    @property
    def batch(self) -> int | None:
        """The fixed batch, or None when the first axis of the first input is dynamic (or there is none)."""
        shape = self.inputs[0].shape if self.inputs else None
        return shape[0] if shape and isinstance(shape[0], int) else None

    def names(self) -> set[str]:
        """Every name of a node or tensor in the model, sub-graphs and functions included.

        Names of the models that it was cloned from stay taken: one name means one tensor through a whole recipe.
        """
        if self._names is None:
            self._names = _all_names(self.ir) | self._former_names
        return self._names

    def touch(self) -> None:
        """Draw a new revision. For `effc.edit`; whoever changed the graph otherwise has broken a rule."""
        self.revision = next(_revisions)

    def cached(self, key: object, compute: Callable[[], Any], *, for_clones: bool = False) -> Any:
        """`compute()`, remembered until the next edit.

        `for_clones`: clones take it over; it then holds no node or tensor of this model, only their names.
        """
        if self._cached_revision != self.revision:
            self._cache.clear()
            self._for_clones.clear()
            self._cached_revision = self.revision
        cache = self._for_clones if for_clones else self._cache
        if key not in cache:
            cache[key] = compute()
        return cache[key]

    def clone(self) -> Model:
        """An independent copy of the graph. Weights are shared: they are never changed in place."""
        with collection_paused():
            copy = Model(self.ir.clone(), self.name, self.notes)
        copy.revision = copy._cached_revision = self.revision
        copy._former_names = frozenset(self.names())
        if self._cached_revision == self.revision:
            copy._for_clones = dict(self._for_clones)
        return copy

    def proto(self) -> onnx.ModelProto:
        """The model as a protobuf message; external weights stay references to their files."""
        return ir.to_proto(self.ir)

    def nbytes(self) -> int:
        """Bytes of all weights, constants and sub-graphs included."""
        return self.cached("nbytes", lambda: sum(t.nbytes for t in self.tensors()), for_clones=True)

    def tensors(self) -> Iterator[ir.TensorProtocol]:
        """All constant tensors: initializers and tensor attributes, in every graph and function."""
        for graph in self.ir.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value.const_value
        for graph in (self.graph, *self.ir.functions.values()):
            for node in graph.all_nodes():
                for attribute in node.attributes.values():
                    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                        yield attribute.as_tensor()

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The numbers of a constant tensor (a weight, or the output of Constant), else None. Do not write to it."""
        tensor = constant_tensor(value)
        return None if tensor is None else tensor.numpy()

    def shapes(self, batch: int | None = None, dims: Mapping[str, int] | None = None) -> dict[str, tuple | None]:
        """Shape of every tensor of the main graph at a stated batch.

        Args:
            batch: size of the first axis of each input where that axis is dynamic; None keeps symbols.
            dims: sizes of other symbolic dimensions by name.

        Returns:
            tensor name -> shape (ints; str where a symbol is left; None for an unknown dimension), or None when
            even the rank is unknown.
        """
        from effc.shapes import infer

        key = ("shapes", batch, tuple(sorted((dims or {}).items())))
        return self.cached(key, lambda: infer(self, batch, dims or {}), for_clones=True)

    def not_analysed(self) -> dict[str, str]:
        """Nodes that the compiler passes through untouched -> why: control flow, functions, foreign domains."""
        return self.cached("not analysed", lambda: _not_analysed(self.ir), for_clones=True)


@contextmanager
def collection_paused() -> Iterator[None]:
    """No search for circular garbage while many objects are made that all stay: it would go over them again and again.

    A graph of 6,000 nodes is copied in a third of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a weight or of a Constant node's output, else None."""
    if value is None:
        return None
    if value.is_initializer():
        # A weight that is also a graph input may be overridden by the caller; capture removes these.
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain in STANDARD_DOMAINS:
        attribute = node.attributes.get("value")
        if attribute is not None:
            return attribute.as_tensor()
        for kind in ("value_int", "value_ints", "value_float", "value_floats"):
            if kind in node.attributes:
                dtype = np.int64 if "int" in kind else np.float32
                return ir.tensor(np.asarray(node.attributes[kind].value, dtype))
    return None


def _info(value: ir.Value) -> TensorInfo:
    try:
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    except TypeError as error:
        raise BadInput(f"{value.name!r} is a tensor of {value.dtype}, which has no NumPy form") from error
    return TensorInfo(value.name or "", np.dtype(dtype), shape_tuple(value.shape))


def shape_tuple(shape: ir.Shape | None) -> tuple[int | str | None, ...] | None:
    """An onnx_ir shape as plain ints, names and Nones."""
    if shape is None:
        return None
    return tuple([d if isinstance(d, int) else d.value for d in shape])


def size_of(tensor: ir.TensorProtocol) -> int:
    """Elements of a tensor. For one that lies in a message, `tensor.size` makes a shape of objects first: 4 us each."""
    return math.prod(tensor.raw.dims) if isinstance(tensor, ir.serde.TensorProtoTensor) else tensor.size


def attributes_of(node: ir.Node) -> Collection[ir.Attr]:
    """A node's attributes, in half the time of `node.attributes.values()`, which looks each up by its name."""
    return node.attributes.data.values()


def understood(node: ir.Node) -> bool:
    """Whether a node is of the runtime's own operators on codes in blocks, which are analysed like standard ones."""
    return node.domain == RUNTIME_DOMAIN and node.op_type in UNDERSTOOD


def holds_graphs(node: ir.Node) -> bool:
    return any(a.type in GRAPHS for a in attributes_of(node))


def in_files(graph: ir.Graph | ir.Function) -> bool:
    """Whether a tensor that an attribute or a sub-graph holds lies in a file."""
    for node in graph:
        for attribute in attributes_of(node):
            value = attribute.value
            if isinstance(value, ir.ExternalTensor):
                return True
            if attribute.type in GRAPHS:
                for inner in (value,) if isinstance(value, ir.Graph) else value or ():
                    weights = (v.const_value for v in inner.initializers.values())
                    if any(isinstance(w, ir.ExternalTensor) for w in weights) or in_files(inner):
                        return True
    return False


def placeholder(weight: ir.Value) -> ir.Value:
    """An input in a weight's stead."""
    tensor = weight.const_value
    return _stand_in(weight, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))


def loaded(weight: ir.Value) -> ir.Value:
    """The weight, or one in its stead where its numbers lie in a file."""
    tensor = weight.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return weight
    return _stand_in(weight, shape=weight.shape, type=weight.type, const_value=in_memory(tensor))


def _stand_in(value: ir.Value, **what: object) -> ir.Value:
    other = ir.Value(name=value.name, doc_string=value.doc_string, metadata_props=value.metadata_props, **what)
    other.meta.update(value.meta)
    return other


def in_memory(tensor: ir.ExternalTensor) -> ir.Tensor:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _name_nodes(graph: ir.Graph) -> None:
    """Give nodes without a name, or with one taken, a name of their own: the ledger speaks of nodes by name."""
    seen: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        while name in seen:
            name = f"{name}_{index}"
        if name != node.name:
            node.name = name
        seen.add(name)


def _all_names(model: ir.Model) -> set[str]:
    names: set[str] = set()
    for graph in (*model.graphs(), *model.functions.values()):
        names.update(v.name for v in graph.inputs if v.name)
        if isinstance(graph, ir.Graph):
            names.update(graph.initializers)
        for node in graph:
            names.add(node.name or "")
            names.update(v.name for v in node.outputs if v.name)
    return names


def _not_analysed(model: ir.Model) -> dict[str, str]:
    reasons = {}
    for node in model.graph:
        if holds_graphs(node):
            reasons[node.name] = f"{node.op_type} holds a sub-graph, which is passed through untouched"
        elif node.op_identifier() in model.functions:
            reasons[node.name] = f"{node.domain}.{node.op_type} is a local function, passed through untouched"
        elif node.domain not in STANDARD_DOMAINS and not understood(node):
            reasons[node.name] = f"{node.op_type} is of the foreign domain {node.domain!r}, passed through untouched"
    return reasons
