"""Shapes of all tensors: onnx's inference on a copy without weights, onnxruntime's symbolic one for what is left."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from copy import copy as shallow_copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from effc.model import (
    SMALL,
    STANDARD_DOMAINS,
    Model,
    collection_paused,
    constant_tensor,
    in_files,
    in_memory,
    loaded,
    placeholder,
    shape_tuple,
    size_of,
)
from effc.stand_ins import with_stand_ins

SYMBOLIC = "effc.symbolic_shape_infer"


@collection_paused()
def infer(model: Model, batch: int | None, dims: Mapping[str, int]) -> dict[str, tuple | None]:
    """Shape of every tensor of the main graph; see `Model.shapes`."""
    if batch is None and not dims:
        proto = skeleton(model)
    else:  # numbers stated here may contradict the inner shapes that are recorded
        proto = _message(model, recorded=False)
        _fix_dims(proto.graph, batch, dims)
    with_stand_ins(proto)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
    shapes = _read(proto.graph)

    def unknown(name: str) -> bool:
        # With a batch stated, a symbol left is one that inference made up.
        shape = shapes.get(name)
        return shape is None or any(d is None or (batch is not None and isinstance(d, str)) for d in shape)

    # A node's output may be missing altogether, or be there with unknown dimensions.
    wanted = [v.name for node in model.graph for v in node.outputs if v.name]
    if len(wanted) < 5000 and any(map(unknown, wanted)):
        for name, shape in _symbolic(proto).items():
            if unknown(name):
                shapes[name] = shape
    for value in model.graph.initializers.values():
        shapes[value.name] = shape_tuple(value.shape)
    return {value.name: shapes.get(value.name) for value in model.values()}


@dataclass(frozen=True)
class Fact:
    """Element type and shape of a tensor, each None where it is not known; unknown dimensions are None."""

    dtype: ir.DataType | None
    shape: tuple[int | str | None, ...] | None


def proven(model: Model) -> dict[str, Fact]:
    """What follows from the graph's inputs and operators alone, for rewrites that must be right for every input.

    Shapes that the file records for inner tensors and outputs do not count: they may be those of another batch. Nor do
    onnxruntime's symbolic shapes, which take two symbols for equal where an addition makes that likely.
    """
    return model.cached("proven", lambda: _proven(model), for_clones=True)


def _proven(model: Model) -> dict[str, Fact]:
    proto = skeleton(model)
    del proto.graph.value_info[:]
    for info in proto.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    with_stand_ins(proto)
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True).graph
    shapes = _read(graph)
    facts = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        code = info.type.tensor_type.elem_type
        facts[info.name] = Fact(ir.DataType(code) if code else None, shapes.get(info.name))
    for value in model.graph.initializers.values():
        facts[value.name] = Fact(value.dtype, shape_tuple(value.shape))
    return facts


# A number in a shape tensor: known, a dimension by its symbol, or (tensor, index) where only its place is known.
Number = int | str | tuple[ir.Value, int]
LONGEST = 32  # numbers in a tensor that may be a shape


class ShapeNumbers:
    """Which numbers stand in the tensors that hold shapes; nodes are followed in the order of the graph.

    It may be asked while the graph is being rewritten: what it knows is kept by tensor, not by name.
    """

    def __init__(self, model: Model) -> None:
        facts = proven(model)
        self._facts = {v: facts[v.name] for v in model.values() if v.name in facts}
        self._numbers: dict[ir.Value, tuple[Number, ...]] = {}

    def fact(self, value: ir.Value | None) -> Fact:
        """Type and shape that are proven; see `proven`."""
        tensor = constant_tensor(value)
        if tensor is not None:
            return Fact(tensor.dtype, tuple(tensor.shape.numpy()))
        return Fact(None, None) if value is None else self._facts.get(value, Fact(None, None))

    def dimensions(self, value: ir.Value | None) -> tuple[Number, ...] | None:
        """The tensor's own shape, as Shape would give it."""
        shape = self.fact(value).shape
        if value is None or shape is None:
            return None
        return tuple((value, axis) if d is None else d for axis, d in enumerate(shape))

    def of(self, value: ir.Value | None) -> tuple[Number, ...] | None:
        """The numbers in an int64 tensor of rank 0 or 1 and known length, else None."""
        fact = self.fact(value)
        if value is None or fact.dtype != ir.DataType.INT64 or fact.shape is None or len(fact.shape) > 1:
            return None
        length = fact.shape[0] if fact.shape else 1
        if not isinstance(length, int) or length > LONGEST:
            return None
        if value not in self._numbers:
            tensor = constant_tensor(value)
            places = tuple((value, index) for index in range(length))
            self._numbers[value] = places if tensor is None else tuple(tensor.numpy().ravel().tolist())
        return self._numbers[value]

    def follow(self, node: ir.Node) -> tuple[Number, ...] | None:
        """The numbers in a node's output, where the node only moves them; they are remembered."""
        rule = _MOVES.get(node.op_type)
        if rule is None or node.domain not in STANDARD_DOMAINS or len(node.outputs) != 1:
            return None
        places, numbers = self.of(node.outputs[0]), rule(self, node)
        if places is None or numbers is None or len(numbers) != len(places):
            return None
        self._numbers[node.outputs[0]] = numbers
        return numbers

    def _shape(self, node: ir.Node) -> tuple[Number, ...] | None:
        numbers = self.dimensions(node.inputs[0])
        start, end = (node.attributes.get_int(key, None) for key in ("start", "end"))
        return None if numbers is None else numbers[start:end]

    def _size(self, node: ir.Node) -> tuple[Number, ...] | None:
        numbers = self.dimensions(node.inputs[0])
        known = numbers is not None and all(isinstance(n, int) for n in numbers)
        return (math.prod(numbers),) if known else None

    def _same(self, node: ir.Node) -> tuple[Number, ...] | None:
        return self.of(node.inputs[0])

    def _gather(self, node: ir.Node) -> tuple[Number, ...] | None:
        numbers, indices = self.of(node.inputs[0]), constant_tensor(node.inputs[1])
        if numbers is None or indices is None or self.fact(node.inputs[0]).shape == ():
            return None
        places = indices.numpy().ravel().tolist()
        return tuple(numbers[i] for i in places) if all(-len(numbers) <= i < len(numbers) for i in places) else None

    def _concat(self, node: ir.Node) -> tuple[Number, ...] | None:
        parts = [self.of(value) for value in node.inputs]
        return None if None in parts else tuple(n for part in parts for n in part)

    def _slice(self, node: ir.Node) -> tuple[Number, ...] | None:
        numbers = self.of(node.inputs[0])
        bounds = slice_bounds(node)
        if numbers is None or bounds is None or len(bounds[0]) != 1:
            return None
        (start,), (end,), _, (step,) = bounds
        return numbers[start:end:step]


_MOVES = {
    "Shape": ShapeNumbers._shape,
    "Size": ShapeNumbers._size,
    "Identity": ShapeNumbers._same,
    "Cast": ShapeNumbers._same,
    "Squeeze": ShapeNumbers._same,
    "Unsqueeze": ShapeNumbers._same,
    "Reshape": ShapeNumbers._same,
    "Gather": ShapeNumbers._gather,
    "Concat": ShapeNumbers._concat,
    "Slice": ShapeNumbers._slice,
}


def slice_bounds(node: ir.Node) -> tuple[list[int], list[int], list[int] | None, list[int]] | None:
    """Starts, ends, axes (None: all from the first) and steps of a Slice of any opset; None unless all are constant."""
    found: list[list[int] | None] = []
    for index, key in enumerate(("starts", "ends", "axes", "steps"), start=1):
        value = node.inputs[index] if index < len(node.inputs) else None
        tensor = constant_tensor(value)
        if value is not None and tensor is None:
            return None
        found.append(node.attributes.get_ints(key, None) if tensor is None else tensor.numpy().ravel().tolist())
    starts, ends, axes, steps = found
    if starts is None or ends is None:
        return None
    return list(starts), list(ends), axes, steps or [1] * len(starts)


def skeleton(model: Model) -> onnx.ModelProto:
    """The model as a message without its large weights, which become graph inputs of the same name and shape."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.cached("skeleton", lambda: _message(model), for_clones=True))  # the caller's own to change
    return proto


@collection_paused()
def _message(model: Model, recorded: bool = True) -> onnx.ModelProto:
    """What `strip` would leave of the model, without a copy; `recorded`: with types and shapes of inner tensors."""
    source = model.ir
    if any(map(in_files, (source.graph, *source.functions.values()))):
        source = source.clone()
        strip(source)
    graph, serde = source.graph, ir.serde
    weights = graph.initializers.values()
    large = {v: placeholder(v) for v in weights if v.const_value is not None and size_of(v.const_value) > SMALL}
    small = [loaded(v) for v in weights if v not in large]
    shell = shallow_copy(source)
    shell.graph = ir.GraphView(
        [large.get(v, v) for v in graph.inputs] + [v for old, v in large.items() if not old.is_graph_input()],
        [large.get(v, v) for v in graph.outputs],
        nodes=graph if recorded else (),
        initializers=small if recorded else (),
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    proto = ir.to_proto(shell)
    if not recorded:  # a whole graph is written with what is recorded; nodes and tensors are not
        for node in graph:
            serde.serialize_node_into(proto.graph.node.add(), node, model_ir_version=source.ir_version)
        for value in small:
            if value.const_value is not None:
                tensor = proto.graph.initializer.add()
                serde.serialize_tensor_into(tensor, value.const_value)
                tensor.name = value.name
    return proto


def strip(copy: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Make the large weights of a clone inputs of its graph; returns them by name. What is left lies in memory."""
    weights = {}
    for value in list(copy.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or size_of(tensor) <= SMALL:
            continue
        weights[value.name] = tensor
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
        del copy.graph.initializers[value.name]
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    for graph in copy.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = in_memory(value.const_value)
    for graph in (copy.graph, *copy.functions.values()):
        for node in graph.all_nodes():
            for key, attribute in list(node.attributes.items()):
                if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[key] = ir.AttrTensor(key, in_memory(attribute.value))
    return weights


def _fix_dims(graph: onnx.GraphProto, batch: int | None, dims: Mapping[str, int]) -> None:
    """Put numbers for symbols into the inputs; forget recorded inner shapes, which would contradict them."""
    values = dict(dims)
    for info in graph.input:
        shape = info.type.tensor_type.shape.dim
        if batch is not None and shape and not shape[0].HasField("dim_value"):
            if shape[0].dim_param:
                values.setdefault(shape[0].dim_param, batch)
            else:
                shape[0].dim_value = batch
    for info in (*graph.input, *graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param in values:
                dim.dim_value = values[dim.dim_param]
    del graph.value_info[:]


def _read(graph: onnx.GraphProto) -> dict[str, tuple | None]:
    shapes: dict[str, tuple | None] = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        tensor = info.type.tensor_type
        if tensor.HasField("shape"):
            shapes[info.name] = tuple(
                [d.dim_value or (0 if d.HasField("dim_value") else d.dim_param or None) for d in tensor.shape.dim]
            )
    return shapes


def _symbolic(proto: onnx.ModelProto) -> dict[str, tuple | None]:
    """What onnxruntime's symbolic inference finds; nothing when it gives up, which it does by many exceptions."""
    lifted = ir.from_proto(proto)  # it stumbles over Constant nodes that hold plain numbers
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(lifted)
    logger = logging.getLogger(SYMBOLIC)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # Its one public function saves a file to the working folder when some shape stays open, and drops the rest.
        engine = _symbolic_module().SymbolicShapeInference
        inference = engine(2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
        inference._preprocess(ir.to_proto(lifted))
        while inference.run_:
            inference._infer_impl()
        inference._update_output_from_vi()
        return _read(inference.out_mp_.graph)
    except Exception:  # it raises bare Exception itself, and what its slips raise; it is a second opinion only
        return {}
    finally:
        logger.setLevel(level)


@cache
def _symbolic_module() -> ModuleType:
    """onnxruntime's module by its file: the package that it lies in imports torch where there is one."""
    package = importlib.util.find_spec("onnxruntime")
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location(SYMBOLIC, folder / "tools" / "symbolic_shape_infer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored_size(model: Model) -> int:
    """Bytes that the model takes as files, its external data included."""
    return skeleton(model).ByteSize() + sum(t.nbytes for t in model.tensors() if size_of(t) > SMALL)
