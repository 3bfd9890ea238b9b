"""A graph of onnx-graphsurgeon as a model again: what was left alone is the model's own, the rest is built anew."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from effc import edit
from effc.errors import PassFailed
from effc.surgery_there import Scope, Tensor, There, Weight, description, functions, message, values_of

_HELD = tuple(ir.AttributeType[t] for t in ("INT", "INTS", "FLOAT", "FLOATS", "STRING", "STRINGS", "TENSOR", "GRAPH"))


class Back:
    """The graph as the function left it, as a model again."""

    def __init__(self, there: There) -> None:
        self.there, self.model = there, there.model
        self.made: dict[ir.Node, ir.Node | None] = {}  # new node -> the model's, where the function kept it
        self.weights: dict[ir.Value, bool] = {}  # new weight -> whether the graph had a constant for it
        self.resized: list[ir.Value] = []

    def take_over(self) -> None:
        there, old = self.there, self.model.ir
        self._check()
        graph = self._graph(there.graph, ChainMap())
        new = ir.Model(
            graph,
            ir_version=old.ir_version,
            producer_name=old.producer_name,
            producer_version=old.producer_version,
            domain=old.domain,
            model_version=old.model_version,
            doc_string=old.doc_string,
            functions=list(old.functions.values()),
            metadata_props=dict(old.metadata_props),
            device_configurations=old.device_configurations,
        )
        new.meta.update(old.meta)
        if _same_message(there.message, message(new)):
            return
        self._note_origins(graph)
        edit.substitute(self.model, new)
        for weight in self.resized:
            edit.forget_shapes(self.model, *(use.node for use in weight.uses()))

    def _check(self) -> None:
        there, graph = self.there, self.there.graph
        if functions(graph) != there.functions:
            raise PassFailed(
                "it changed a local function, and these pass through as they are"
                " (cleanup and fold_constants take recurse_functions=False)"
            )
        now = {d.domain: d.version for d in graph.import_domains or ()}
        if (graph.opset, graph.ir_version) != there.versions or {k: now.get(k) for k in there.imports} != there.imports:
            raise PassFailed("it changed the opset or the IR version, which only effc.opset.lift_opset may")

    def _graph(self, graph: gs.Graph, outer: Scope) -> ir.Graph:
        _, source = self.there.graphs.get(id(graph), (graph, None))
        known = {} if source is None else {v.name: v for v in values_of(source)}
        scope: Scope = outer.new_child()
        inputs = [self._declare(t, scope, known, "an input") for t in graph.inputs]
        outputs = [[self._declare(t, scope, known, f"made by {n.name!r}") for t in n.outputs] for n in graph.nodes]
        for value in source.initializers.values() if source is not None else ():
            if value.name not in scope.maps[0]:
                scope[value.name] = weight = _like(value)
                weight.const_value, weight.shape, weight.type = value.const_value, value.shape, value.type
                self.weights[weight] = False
        nodes = [self._node(n, made, scope) for n, made in zip(graph.nodes, outputs, strict=True)]
        results = [v for t in graph.outputs if (v := self._read(t, scope, "the list of outputs")) is not None]
        new = ir.Graph(
            inputs,
            results,
            nodes=nodes,
            initializers=[v for v in scope.maps[0].values() if v in self.weights],
            doc_string=_kept(graph.doc_string, None if source is None else source.doc_string),
            opset_imports=self._imports(graph) if source is self.model.graph else None,
            name=_kept(graph.name, None if source is None else source.name),
            metadata_props=dict(source.metadata_props) if source is not None else None,
        )
        if source is not None:
            new.meta.update(source.meta)
        if not _in_order(new):
            new.sort()
        return new

    def _imports(self, graph: gs.Graph) -> dict[str, int]:
        imports = dict(self.model.graph.opset_imports)
        stated = {d.domain: d.version for d in graph.import_domains or ()}
        for g in (graph, *graph.subgraphs(recursive=True)):
            for node in g.nodes:
                if node.domain and node.domain not in imports:
                    imports[node.domain] = stated.get(node.domain, 1)
        return imports

    def _declare(self, tensor: Tensor, scope: Scope, known: dict[str | None, ir.Value], what: str) -> ir.Value:
        """A tensor that an input or a node brings into being."""
        if not tensor.name:
            return ir.Value(name="")
        if isinstance(tensor, gs.Constant):
            raise PassFailed(f"{tensor.name!r} is a constant and {what}: clear the node's outputs")
        if tensor.name in scope:
            raise PassFailed(f"two tensors are called {tensor.name!r}; one of them is {what}")
        _, noted, described = self.there.tensors.get(id(tensor), (tensor, None, None))
        old = noted if noted is not None else known.get(tensor.name)
        value = scope[tensor.name] = _like(old, tensor.name)
        if described is not None and described == description(tensor) and noted is not None:
            value.shape, value.type = noted.shape, noted.type
            return value
        if tensor.type != "tensor_type":
            raise PassFailed(f"{tensor.name!r} is a {tensor.type}; only tensors can be described anew")
        if tensor.dtype is not None:
            value.type = ir.TensorType(_data_type(tensor.dtype))
        elif old is not None:
            value.type = old.type
        if tensor.shape is not None:
            value.shape = ir.Shape([None if isinstance(d, int) and d < 0 else d for d in tensor.shape])
        return value

    def _read(self, tensor: Tensor, scope: Scope, reader: str) -> ir.Value | None:
        """The tensor of that name, as seen from a graph; a new constant becomes a weight of that graph."""
        if not tensor.name:
            return None
        value = scope.get(tensor.name)
        if not isinstance(tensor, gs.Constant):
            if value is None:
                raise PassFailed(f"{reader} reads {tensor.name!r}, which nothing makes")
            return value
        if value is None:
            value = scope[tensor.name] = ir.Value(name=tensor.name)
            self.weights[value] = False
        elif value not in self.weights:
            raise PassFailed(f"{tensor.name!r} is a constant and computed as well")
        numbers = self._numbers(tensor, value.const_value)
        if numbers is value.const_value:
            self.weights[value] = True
            return value
        if self.weights[value]:
            raise PassFailed(f"two constants with different numbers are called {tensor.name!r}")
        if value.const_value is not None and tuple(value.const_value.shape) != tuple(numbers.shape):
            self.resized.append(value)
        value.const_value, value.type = numbers, ir.TensorType(numbers.dtype)
        value.shape = ir.Shape(numbers.shape.numpy())
        self.weights[value] = True
        return value

    def _numbers(self, constant: Tensor, before: ir.TensorProtocol | None) -> ir.TensorProtocol:
        """A constant's tensor; the one before where the numbers are the same, even if they were looked at."""
        values, target = constant._values, constant._export_dtype
        if isinstance(values, SparseValues):
            raise PassFailed(f"{constant.name!r} is sparse; weights have to be dense")
        if isinstance(values, Weight) and target is None:
            tensor = values.source
        else:
            array = values.load() if isinstance(values, LazyValues) else values
            array = array if target is None else array.astype(_data_type(target).numpy())
            tensor = _tensor(array, constant.name)
        return before if before is not None and _same_numbers(tensor, before) else tensor

    def _node(self, node: gs.Node, outputs: list[ir.Value], scope: Scope) -> ir.Node:
        _, old = self.there.nodes.get(id(node), (node, None))
        if old is not None and (old.op_type, old.domain) != (node.op, node.domain or ""):
            old = None
        inputs = [self._read(t, scope, repr(node.name or node.op)) for t in node.inputs]
        hint = f"{node.op}_{next((t.name for t in node.outputs if t.name), '')}"
        made = ir.Node(
            node.domain or "",
            node.op,
            inputs,
            self._attributes(node, old, scope),
            outputs=outputs,
            overload=old.overload if old is not None else "",
            version=old.version if old is not None else None,
            name=node.name or edit.fresh(self.model, hint),
            doc_string=old.doc_string if old is not None else None,
            metadata_props=dict(old.metadata_props) if old is not None else None,
        )
        if old is not None:
            made.meta.update(old.meta)
        self.made[made] = old
        return made

    def _attributes(self, node: gs.Node, old: ir.Node | None, scope: Scope) -> list[ir.Attr]:
        result = {}
        for key, attribute in old.attributes.items() if old is not None else ():
            if key in node.attrs:
                result[key] = self._attribute(node, key, attribute, scope)
            elif attribute.type not in _HELD:
                result[key] = attribute  # graphsurgeon never had it, so it was not the function that took it away
        for key, value in node.attrs.items():
            if key not in result and value is not None:
                result[key] = self._attribute(node, key, None, scope)
        return list(result.values())

    def _attribute(self, node: gs.Node, key: str, old: ir.Attr | None, scope: Scope) -> ir.Attr:
        value = node.attrs[key]
        if isinstance(value, gs.Graph):
            return ir.AttrGraph(key, self._graph(value, scope), doc_string=None if old is None else old.doc_string)
        if isinstance(value, gs.Constant):
            before = old.as_tensor() if old is not None and old.type == ir.AttributeType.TENSOR else None
            tensor = self._numbers(value, before)
            return old if old is not None and tensor is before else ir.AttrTensor(key, tensor)
        if old is not None and not old.is_ref() and _plain(old) == (type(value), value):
            return old
        kind = old.type if old is not None else self._kind(node, key)
        try:
            return _attribute(key, value, kind)
        except (TypeError, ValueError) as error:
            raise PassFailed(f"{node.name or node.op!r}: attribute {key}={value!r} has no form in ONNX") from error

    def _kind(self, node: gs.Node, key: str) -> ir.AttributeType | None:
        """What the operator's definition says of an attribute, None where there is none."""
        try:
            version = self.model.graph.opset_imports.get(node.domain or "", 1)
            attributes = onnx.defs.get_schema(node.op, version, node.domain or "").attributes
        except onnx.defs.SchemaError:
            return None
        return ir.AttributeType(attributes[key].type.value) if key in attributes else None

    def _note_origins(self, graph: ir.Graph) -> None:
        """Say of each node what it stands for: a new one for those that made its outputs before, and what fed these."""
        kept = {old for node in graph if (old := self.made[node]) is not None}
        makers = {v.name: node for node in self.model.graph for v in node.outputs if v.name}
        counted: set[ir.Node] = set()
        for node in reversed(graph):
            own = self.made[node]
            origin = list(edit.origin_of(own)) if own is not None else []
            gone = [m for v in node.outputs if (m := makers.get(v.name or "")) is not None and m not in kept]
            while gone:
                maker = gone.pop()
                origin += edit.origin_of(maker)
                counted.add(maker)
                before = (v.producer() for v in maker.inputs if v is not None)
                gone += [m for m in before if m is not None and m not in kept and m not in counted]
            if not origin:  # a step on the way to a new node
                readers = [r for v in node.outputs for r in v.consumers() if self.made.get(r, node) is None]
                origin += [name for r in readers for name in r.meta.get(edit.ORIGIN, ())]
            node.meta[edit.ORIGIN] = tuple(dict.fromkeys(origin))


def _like(old: ir.Value | None, name: str | None = None) -> ir.Value:
    """A new value with an old one's name, metadata and annotations."""
    if old is None:
        return ir.Value(name=name)
    value = ir.Value(name=name or old.name, doc_string=old.doc_string, metadata_props=dict(old.metadata_props))
    value.meta.update(old.meta)
    return value


def _kept(now: str, before: str | None) -> str | None:
    """Empty and absent are one to graphsurgeon."""
    return before if now == (before or "") else now


def _data_type(dtype: Any) -> ir.DataType:
    if isinstance(dtype, int):
        return ir.DataType(dtype)
    dtype = np.dtype(dtype)
    return ir.DataType.STRING if dtype.kind in "OSU" else ir.DataType.from_numpy(dtype)


def _tensor(array: np.ndarray | np.generic, name: str | None) -> ir.TensorProtocol:
    array = np.asarray(array, order="C")
    if _data_type(array.dtype) == ir.DataType.STRING:
        texts = [t if isinstance(t, bytes) else str(t).encode() for t in array.ravel().tolist()]
        return ir.StringTensor(texts, shape=ir.Shape(array.shape), name=name)
    if array.dtype.kind == "f" and array.size and np.isnan(array.max()):
        raise PassFailed(f"weight {name!r} would hold NaN")
    return ir.Tensor(array, name=name)


def _same_numbers(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    if a is b:
        return True
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    x, y = (np.ascontiguousarray(t.numpy()).reshape(-1) for t in (a, b))
    return np.array_equal(x, y) if x.dtype.kind == "O" else np.array_equal(x.view(np.uint8), y.view(np.uint8))


def _plain(attribute: ir.Attr) -> tuple[type, Any]:
    """An attribute as graphsurgeon shows it, with its type: 1 and 1.0 are not one."""
    value = attribute.value
    value = list(value) if isinstance(value, tuple | list) else value
    return type(value), value


def _attribute(key: str, value: Any, kind: ir.AttributeType | None) -> ir.Attr:
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(key, _tensor(value, None))
    if isinstance(value, type | np.dtype):
        return ir.AttrInt64(key, int(_data_type(value)))
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple):
        value = [v.item() if isinstance(v, np.generic) else v for v in value]
        if not value and kind is None:
            raise ValueError("an empty list says nothing of its type")
        numbers = all(isinstance(v, int | float) for v in value)
        if kind == ir.AttributeType.FLOATS and numbers:
            value = [float(v) for v in value]
        return ir.convenience.convert_attribute(key, value, kind if not value else None)
    if kind == ir.AttributeType.FLOAT and isinstance(value, int):
        value = float(value)
    if isinstance(value, bool):
        value = int(value)
    return ir.convenience.convert_attribute(key, value)


def _same_message(a: onnx.ModelProto, b: onnx.ModelProto) -> bool:
    return a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)


def _in_order(graph: ir.Graph) -> bool:
    """Whether every node, with what its sub-graphs read from outside, comes after what it reads."""
    seen: set[ir.Node] = set()
    for node in graph:
        bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        for reader in (node, *(n for body in bodies for n in body.all_nodes())):
            for value in reader.inputs:
                maker = None if value is None else value.producer()
                if maker is not None and maker.graph is graph and maker not in seen:
                    return False
        seen.add(node)
    return True
