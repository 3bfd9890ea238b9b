"""A model as a graph of onnx-graphsurgeon, and which of its objects stands for what.

Weights stay where they are, memory-mapped or not: the graph holds a stand-in for each, which reads the numbers when
asked for `values`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from effc.errors import PassFailed
from effc.model import Model
from effc.save import reference

Scope = ChainMap[str | None, ir.Value]
Tensor = Any  # graphsurgeon's base class of tensors declares none of their attributes


class Weight(LazyValues):
    """Stands for a weight in the graph; reading `values` copies the numbers, in the type that they have."""

    def __init__(self, source: ir.TensorProtocol, described: LazyValues) -> None:
        self.source = source
        self.shape, self.dtype, self.nbytes = described.shape, described.dtype, described.nbytes

    @property
    def tensor(self) -> onnx.TensorProto:
        """What graphsurgeon's own exporter asks for, as in `fold_constants`."""
        held = self.source
        return ir.to_proto(ir.Tensor(held.numpy(), held.dtype, name=held.name) if _external(held) else held)

    def load(self) -> np.ndarray:
        if self.source.dtype == ir.DataType.STRING:
            return onnx.numpy_helper.to_array(self.tensor)
        return np.array(self.source.numpy())


class There:
    """A model as a `gs.Graph`, and which of its objects stands for what."""

    def __init__(self, model: Model) -> None:
        self.model = model
        for node in model.graph.all_nodes():
            _refuse_foreign(node)
        self.message = message(model.ir)
        # What it warns of is handled here: types that NumPy has not, attributes that it leaves out.
        with G_LOGGER.suppress():
            try:
                self.graph = gs.import_onnx(self.message)
            except UnicodeDecodeError as error:
                raise PassFailed("an attribute is a text that is no UTF-8, which graphsurgeon cannot hold") from error
        # By id: graphsurgeon's objects have no hash and compare by content. The tuples keep them alive.
        self.nodes: dict[int, tuple[gs.Node, ir.Node]] = {}
        self.tensors: dict[int, tuple[Tensor, ir.Value, tuple]] = {}
        self.graphs: dict[int, tuple[gs.Graph, ir.Graph]] = {}
        self._pair(self.graph, model.graph, ChainMap())
        self.functions = functions(self.graph)
        self.imports = {d.domain: d.version for d in self.graph.import_domains or ()}
        self.versions = (self.graph.opset, self.graph.ir_version)

    def _pair(self, graph: gs.Graph, source: ir.Graph, outer: Scope) -> None:
        self.graphs[id(graph)] = (graph, source)
        values = outer.new_child({v.name: v for v in values_of(source) if v.name})
        for tensor in (*graph.inputs, *graph.outputs):
            self._note(tensor, values)
        for theirs, ours in zip(graph.nodes, source, strict=True):
            self.nodes[id(theirs)] = (theirs, ours)
            for tensor in (*theirs.inputs, *theirs.outputs):
                self._note(tensor, values)
            for key, held in theirs.attrs.items():
                if isinstance(held, gs.Graph):
                    self._pair(held, ours.attributes[key].as_graph(), values)
                elif isinstance(held, gs.Constant):
                    _stand_in(held, ours.attributes[key].as_tensor())

    def _note(self, tensor: Tensor, values: Scope) -> None:
        if id(tensor) in self.tensors or tensor.name not in values:
            return
        value = values[tensor.name]
        if isinstance(tensor, gs.Constant) and value.const_value is not None:
            _stand_in(tensor, value.const_value)
        self.tensors[id(tensor)] = (tensor, value, description(tensor))


def _stand_in(constant: Tensor, source: ir.TensorProtocol) -> None:
    constant._values, constant.data_location = Weight(source, constant._values), None


def _refuse_foreign(node: ir.Node) -> None:
    if any(a.type == ir.AttributeType.GRAPHS for a in node.attributes.values()):
        raise PassFailed(f"{node.name!r} holds a list of sub-graphs, which graphsurgeon cannot hold")
    if node.device_configurations:
        raise PassFailed(f"{node.name!r} is bound to devices, which graphsurgeon cannot hold")


def values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def description(tensor: Tensor) -> tuple:
    if isinstance(tensor, gs.Constant):
        return ()
    return tensor.dtype, None if tensor.shape is None else tuple(tensor.shape), tensor.type


def _external(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, ir.ExternalTensor)


def functions(graph: gs.Graph) -> dict[tuple, bytes]:
    return {f.unique_id: OnnxExporter.export_function(f).SerializeToString(deterministic=True) for f in graph.functions}


def message(model: ir.Model) -> onnx.ModelProto:
    """The model with a reference in the place of every tensor's numbers; equal references mean the same tensor."""
    copied = model.clone()
    for graph in copied.graphs():
        for value in graph.initializers.values():
            value.const_value = None if value.const_value is None else _reference(value.const_value)
        for node in graph:
            for key, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    node.attributes[key] = ir.AttrTensor(key, _reference(attribute.as_tensor()))
    return ir.to_proto(copied)


def _reference(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.STRING:
        return tensor
    return reference(tensor.name or "", tensor, "held-by-the-model", id(tensor))
