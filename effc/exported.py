"""From the graph that torch's exporter writes to one that reads like the module.

Reshape(x, Concat(Squeeze(Shape(x)), -1))  ->  Reshape(x, [0, -1])
Transpose(weight)                          ->  weight, transposed
Conv(x, w, Expand(0))                      ->  Conv(x, w)
node_conv2d_3                              ->  layer1.0.conv1
s77                                        ->  N
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes
from onnxscript import optimizer

from effc import registry
from effc.contract import Proposal
from effc.edit import ORIGIN
from effc.model import Model, constant_tensor

BATCH = "N"
ENDLESS = np.iinfo(np.int64).max  # the end of a slice that has none
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node: "['', 'layer1', 'layer1.0', 'conv2d']"
_BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}  # operator -> input that is its bias


def canonical(model: ir.Model, input_names: Sequence[str] | None) -> ir.Model:
    """The exporter's graph with weights of its own, in as few nodes as the module has, without the exporter's metadata.

    Args:
        input_names: for the graph's inputs, as many as there are; None leaves them.
    """
    parameters = set(model.graph.initializers)
    _own_weights(model.graph)
    _name_batch(model)
    _make_static(model.graph)
    _transpose_weights(model.graph)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    _drop_zero_biases(model.graph, parameters)
    _drop_whole_slices(model.graph)
    model = _simplified(model)
    _name_nodes(model.graph, parameters)
    _name_inputs(model.graph, input_names)
    _strip(model)
    return model


def batch_symbol(graph: ir.Graph) -> str | None:
    """The symbol on the first axis of the first input that has one there."""
    for value in graph.inputs:
        size = value.shape[0] if value.shape else None
        if isinstance(size, ir.SymbolicDim) and size.value and not size.value.isdigit():
            return size.value
    return None


def _own_weights(graph: ir.Graph) -> None:
    """The exporter's weights are the module's memory, which training would change."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)


def _name_batch(model: ir.Model) -> None:
    """Call the batch N wherever it is recorded; a symbol that was proven to be a number becomes it."""
    symbol = batch_symbol(model.graph)
    pattern = re.compile(rf"\b{re.escape(symbol)}\b") if symbol else None
    for graph in model.graphs():
        outputs = (v for node in graph for v in node.outputs)
        for value in (*graph.inputs, *outputs):
            if value.shape is not None:
                value.shape = ir.Shape([_size(d, pattern) for d in value.shape])


def _size(size: int | ir.SymbolicDim, pattern: re.Pattern | None) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    text = pattern.sub(BATCH, size.value) if pattern else size.value
    return int(text) if text.isdigit() else text


def _make_static(graph: ir.Graph) -> None:
    """Reshape(x, computed sizes) -> Reshape(x, [0, 2048]), by the shapes torch recorded: 0 for an axis that stays."""
    for node in graph:
        if node.op_type != "Reshape":
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape
        if before is None or after is None or constant_tensor(node.inputs[1]) is not None:
            continue
        kept = [i < len(before) and not isinstance(size, int) and size == before[i] for i, size in enumerate(after)]
        sizes = [0 if keep else size for keep, size in zip(kept, after, strict=True)]
        open_places = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        if len(open_places) > 1 or 0 in tuple(after):
            continue
        for place in open_places:
            sizes[place] = -1
        shape = np.array(sizes, np.int64)
        weight = ir.Value(name=f"{node.name}_shape", shape=ir.Shape(shape.shape), type=ir.TensorType(ir.DataType.INT64))
        weight.const_value = ir.Tensor(shape, name=weight.name)
        graph.register_initializer(weight)
        node.replace_input_with(1, weight)
        node.attributes.pop("allowzero", None)


def _transpose_weights(graph: ir.Graph) -> None:
    """A weight that is read transposed and no other way is stored so, under its name."""
    for value in graph.initializers.values():
        readers = [use.node for use in value.uses()]
        turns = {tuple(node.attributes.get_ints("perm", ())) for node in readers if node.op_type == "Transpose"}
        alone = not value.is_graph_output() and all(n.op_type == "Transpose" for n in readers)
        if not readers or not alone or len(turns) != 1 or not (turn := turns.pop()):
            continue
        tensor = value.const_value
        turned = np.ascontiguousarray(tensor.numpy().transpose(turn))
        value.const_value = ir.Tensor(turned, dtype=tensor.dtype, name=value.name)
        value.shape = ir.Shape(turned.shape)
        for node in readers:
            if node.outputs[0].is_graph_output():
                node.attributes["perm"] = ir.AttrInt64s("perm", tuple(range(len(turn))))
            else:
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)


def _drop_zero_biases(graph: ir.Graph, parameters: set[str]) -> None:
    """The exporter gives a layer without a bias one of zeros."""
    for node in graph:
        place = _BIASED.get(node.op_type)
        bias = node.inputs[place] if place is not None and len(node.inputs) > place else None
        if bias is None or bias.name in parameters or not bias.is_initializer():
            continue
        if not np.any(bias.const_value.numpy()):
            node.replace_input_with(place, None)
            node.resize_inputs(place)


def _drop_whole_slices(graph: ir.Graph) -> None:
    """x[:, :, None] is exported with a slice for each colon."""
    for node in list(graph):
        if node.op_type != "Slice" or node.outputs[0].is_graph_output():
            continue
        bounds = [constant_tensor(v) for v in node.inputs[1:]]
        if None in bounds:
            continue
        start, end, _, step = [*(b.numpy() for b in bounds), *[np.ones(1)] * (4 - len(bounds))]
        if not start.any() and (end == ENDLESS).all() and (step == 1).all():
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def _simplified(model: ir.Model) -> ir.Model:
    rough = Model(model)
    step = registry.pass_class("simplify")()
    chosen = [found for found in step.propose(rough, None) if isinstance(found, Proposal)]
    step.rewrite(rough, chosen, None)
    return rough.ir


def _name_nodes(graph: ir.Graph, parameters: set[str]) -> None:
    """Nodes are called after their modules.

    A module's only node, or the only one that reads a weight of it, has the module's name (`layer1.0.conv1`); what
    stands beside it has the operator's as well (`attention/Softmax`); what stands in the forward method of the whole
    has the operator's alone.
    """
    modules = defaultdict(list)
    for node in graph:
        modules[_module(node)].append(node)
    names: dict[ir.Node, str] = {}
    for module, nodes in modules.items():
        layers = {node: owner for node in nodes if (owner := _owner(node, parameters)) is not None}
        whole = nodes if len(nodes) == 1 else list(layers) if len(layers) == 1 else []
        for node in nodes:
            owner = layers.get(node, "")
            if module and node in whole:
                names[node] = module
            elif owner.startswith(f"{module}." if module else "") and owner not in ("", module):
                names[node] = owner
            else:
                names[node] = f"{module}/{node.op_type}" if module else node.op_type
    taken, counts = set(), Counter()
    for node in graph:
        hint = name = names[node]
        while name in taken:
            counts[hint] += 1
            name = f"{hint}_{counts[hint]}"
        taken.add(name)
        node.name = name
        node.meta.pop(ORIGIN, None)


def _module(node: ir.Node) -> str:
    """Path of the module that a node comes from, '' for the whole."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
    path = scopes[-2] if len(scopes) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else path.partition("@")[0]  # @: the module's second call


def _owner(node: ir.Node, parameters: set[str]) -> str | None:
    """Path of the module whose weight a node reads, the first with more than one axis; None where it reads none."""
    read = [v for v in node.inputs if v is not None and v.name in parameters]
    for value in sorted(read, key=lambda v: len(v.shape) < 2):
        if len(value.shape) > 1 or node.op_type not in ("Add", "Mul"):
            return value.name.rpartition(".")[0]
    return None


def _name_inputs(graph: ir.Graph, names: Sequence[str] | None) -> None:
    if names is None:
        return
    others = [v for v in (*graph.initializers.values(), *(v for n in graph for v in n.outputs)) if v.name in names]
    taken = {v.name for v in graph.inputs} | set(names) | set(graph.initializers)
    taken |= {v.name for n in graph for v in n.outputs}
    for value in others:
        number = next(i for i in range(1, len(taken) + 2) if f"{value.name}_{i}" not in taken)
        taken.add(f"{value.name}_{number}")
        value.name = f"{value.name}_{number}"
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name


def _strip(model: ir.Model) -> None:
    """Names say all that is needed of metadata that may take more room than the weights."""
    for graph in model.graphs():
        values = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
        for item in (graph, *graph, *values):
            item.metadata_props.clear()
            item.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
    used = {node.domain for graph in model.graphs() for node in graph}
    for domain in [d for d in model.opset_imports if d and d not in used and not model.functions]:
        del model.opset_imports[domain]
