"""The only place that changes a graph. Each function checks before it writes, then advances the model's revision.

Nodes carry where they come from: a new node states the names of the nodes it stands for (`origin`), and so the
history can say what became of every node of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from effc.errors import BadInput, InvalidModel, PassFailed
from effc.model import Model

ORIGIN = "effc.origin"  # key in ir.Node.meta: names of the nodes of the model before the pass

FORGOTTEN = "effc.forgotten"  # key in ir.Value.meta: the recorded shape was dropped


def fresh(model: Model, hint: str) -> str:
    """A name like `hint` that neither a node nor a tensor of the model has; it is reserved by this call."""
    names = model.names()
    name, number = hint, 0
    while not name or name in names:
        number += 1
        name = f"{hint}_{number}"
    names.add(name)
    return name


def add_initializer(model: Model, hint: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    """A new weight; `hint` becomes its name, numbered if that name is taken. Raises PassFailed on NaN."""
    name = fresh(model, hint)
    value = _initializer(name, array)
    model.graph.register_initializer(value)
    model.touch()
    return value


def set_initializer(model: Model, value: ir.Value, array: np.ndarray | ir.TensorProtocol) -> None:
    """Give a weight new numbers, of any shape and type, under the same name. Raises PassFailed."""
    if not value.is_initializer() or value.graph is not model.graph:
        raise PassFailed(f"{value.name!r} is not a weight of the main graph")
    new = _initializer(value.name, array)
    if value.shape is not None and tuple(value.shape) != tuple(new.shape):
        forget_shapes(model, *(use.node for use in value.uses()))
    value.const_value, value.shape, value.type = new.const_value, new.shape, new.type
    model.touch()


def _initializer(name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    if isinstance(array, np.ndarray | np.generic):
        array = np.asarray(array, order="C")
        if array.dtype.kind == "f" and array.size and np.isnan(array.max()):
            raise PassFailed(f"weight {name!r} would hold NaN")
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def make_node(
    model: Model,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, object] | None = None,
    *,
    name: str,
    outputs: int = 1,
    origin: Iterable[ir.Node | str] = (),
    domain: str = "",
) -> ir.Node:
    """A new node, not yet in the graph.

    Args:
        name: hint for the node's name; its outputs are named after it.
        origin: the nodes that it stands for, or their names.
    """
    node = ir.node(op_type, list(inputs), attributes=dict(attributes or {}), domain=domain, num_outputs=outputs)
    node.name = fresh(model, name)
    for index, value in enumerate(node.outputs):
        value.name = fresh(model, f"{node.name}_output" + (f"_{index}" if index else ""))
    node.meta[ORIGIN] = tuple(dict.fromkeys(o for item in origin for o in origin_of(item)))
    return node


def origin_of(node: ir.Node | str) -> tuple[str, ...]:
    """Names, in the model before the pass, of the nodes that a node stands for: by default its own name."""
    if isinstance(node, str):
        return (node,)
    return node.meta.get(ORIGIN, (node.name or "",))


def absorb(node: ir.Node, *others: ir.Node) -> None:
    """Note that a node that stays stands for others as well."""
    node.meta[ORIGIN] = tuple(dict.fromkeys(name for n in (node, *others) for name in origin_of(n)))


def insert_after(model: Model, anchor: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put new nodes, in order, behind a node of the main graph."""
    _require_in_graph(model, anchor)
    model.graph.insert_after(anchor, nodes)
    model.touch()


def insert_before(model: Model, anchor: ir.Node | None, nodes: Sequence[ir.Node]) -> None:
    """Put new nodes, in order, before a node of the main graph; at the graph's end when the anchor is None."""
    if anchor is None:
        model.graph.extend(nodes)
    else:
        _require_in_graph(model, anchor)
        model.graph.insert_before(anchor, nodes)
    model.touch()


def set_input(model: Model, node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Let one input of a node read another tensor; optional inputs in between are left empty."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    model.touch()


def forget_shapes(model: Model, *nodes: ir.Node) -> None:
    """Drop the shapes recorded for what these nodes make, and for all that is computed from it.

    For rewrites after which inner tensors are of other sizes: a runtime that believes a stale record fails, or reuses
    a buffer that is too small. Outputs of the graph keep theirs: they are a promise to the caller.
    """
    waiting = [v for node in nodes for v in node.outputs]
    while waiting:
        value = waiting.pop()
        if FORGOTTEN in value.meta:
            continue  # so was all behind it: every tensor is visited once, however many weights change
        value.meta[FORGOTTEN] = True
        if not any(v is value for v in model.graph.outputs):
            value.shape = None
        waiting += [v for use in value.uses() for v in use.node.outputs]
    model.touch()


def set_attributes(model: Model, node: ir.Node, **attributes: object) -> None:
    """Set attributes of a node; None removes one."""
    for key, value in attributes.items():
        node.attributes.pop(key, None)
        if value is not None:
            attribute = value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
            node.attributes[key] = attribute
    model.touch()


def replace_uses(
    model: Model, old: ir.Value, new: ir.Value, *, where: Callable[[ir.Node, int], bool] | None = None
) -> None:
    """Let the nodes that read `old` read `new`; `where(node, input index)` picks among them. Graph outputs stay."""
    for node, index in old.uses():
        if where is None or where(node, index):
            node.replace_input_with(index, new)
    model.touch()


def replace(model: Model, old: Sequence[ir.Node], new: Sequence[ir.Node], outputs: Mapping[ir.Value, ir.Value]) -> None:
    """Put `new` in the place of `old`.

    Args:
        old: nodes of the main graph that go.
        new: nodes not yet in the graph, in order; they are put where the last old node stands.
        outputs: for every tensor of the old nodes that something else reads: the tensor that takes its place. It
            takes over the name, and shape and type where it has none. A tensor of a node that stays may be given
            too, when nothing else carries the old name: then a graph output is fed through Identity.

    Raises:
        PassFailed: an output that is still read has no replacement; nothing was changed.
    """
    gone = set(old)
    for node in old:
        _require_in_graph(model, node)
        for value in node.outputs:
            read = value.is_graph_output() or any(use.node not in gone for use in value.uses())
            if read and value not in outputs:
                raise PassFailed(f"{value.name!r} of {node.name!r} is still read, and nothing replaces it")
    origin = tuple(dict.fromkeys(o for node in old for o in origin_of(node)))
    for node in new:
        if not node.meta.get(ORIGIN):
            node.meta[ORIGIN] = origin
    model.graph.insert_after(old[-1], new)
    made = {v for node in new for v in node.outputs}
    for before, after in outputs.items():
        if before.is_graph_output() and after not in made:
            identity = make_node(model, "Identity", [after], name=f"{before.name}_identity", origin=origin)
            model.graph.insert_after(after.producer() or old[-1], identity)
            after = identity.outputs[0]
            made.add(after)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        if after.type is None:
            after.type = before.type
        if after.shape is None:
            after.shape = before.shape
        if after in made:
            name, before.name = before.name, None
            after.name = name
    model.graph.remove(old, safe=True)
    model.touch()


def make_conditional(
    model: Model, nodes: Sequence[ir.Node], condition: ir.Value, instead: Mapping[ir.Value, ir.Value], *, name: str
) -> ir.Node:
    """Move nodes into the else branch of a new If, so that they run only where the condition is false.

    What they read from outside they capture; a node that holds sub-graphs may be among them, so exits nest from the
    last to the first.

    Args:
        nodes: of the main graph.
        condition: one boolean, computed before all of them.
        instead: output of these nodes that is read elsewhere -> tensor computed before, of the same type, that takes
            its place where the condition is true. The If's outputs take over the names.
        name: hint for the If's name.

    Raises:
        PassFailed: an output that is read elsewhere has no replacement; nothing was changed.
    """
    for node in nodes:
        _require_in_graph(model, node)
    inside = set(nodes)
    body = [node for node in model.graph if node in inside]
    inner = {n for node in body for n in (node, *_held(node))}
    for value in (v for node in body for v in node.outputs):
        if (value.is_graph_output() or any(u.node not in inner for u in value.uses())) and value not in instead:
            raise PassFailed(f"{value.name!r} is still read, and nothing stands for it where the condition holds")
    choice = make_node(model, "If", [condition], name=name, outputs=len(instead), origin=body)
    model.graph.insert_after(body[-1], choice)
    model.graph.remove(body)
    passing = [make_node(model, "Identity", [v], name=f"{choice.name}_exit") for v in instead.values()]
    for before, other, after in zip(instead, passing, choice.outputs, strict=True):
        for node, index in list(before.uses()):
            if node not in inner:
                node.replace_input_with(index, after)
        for index, output in enumerate(model.graph.outputs):
            if output is before:
                model.graph.outputs[index] = after
        after.type, after.shape, other.outputs[0].type = before.type, before.shape, before.type
        outer, before.name = before.name, None
        before.name, after.name = fresh(model, f"{outer}_else"), outer
    branches = {
        "then_branch": ir.Graph([], [n.outputs[0] for n in passing], nodes=passing, name=f"{choice.name}_then"),
        "else_branch": ir.Graph([], list(instead), nodes=body, name=f"{choice.name}_else"),
    }
    for key, graph in branches.items():
        choice.attributes[key] = ir.AttrGraph(key, graph)
    model.touch()
    return choice


def _held(node: ir.Node) -> list[ir.Node]:
    """The nodes of a node's sub-graphs, nested ones included."""
    graphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    return [n for graph in graphs for n in graph.all_nodes()]


def may_bypass(model: Model, node: ir.Node, source: ir.Value, *, keep_name: bool = False) -> bool:
    """Whether `bypass` can do it; see there."""
    output = node.outputs[0]
    if node.graph is not model.graph or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return False
    if not output.is_graph_output():
        return not keep_name or _renameable(model, source)
    # A flag tells that some graph has it as output; it may be a sub-graph that captures it.
    return any(v is output for v in model.graph.outputs) and _renameable(model, source)


def bypass(model: Model, node: ir.Node, source: ir.Value, *, keep_name: bool = False) -> None:
    """Take out a node whose first output equals `source`: what read that output reads `source` from now on.

    Args:
        source: a tensor computed before the node.
        keep_name: `source` takes over the output's name. An output of the graph always keeps its name.

    Raises:
        PassFailed: another output of the node is read, or `source` has to take over a name and cannot, being an
            input, a weight or an output of the graph; nothing was changed.
    """
    if not may_bypass(model, node, source, keep_name=keep_name):
        raise PassFailed(f"{node.name!r} cannot be taken out: {source.name!r} cannot stand for all that it makes")
    output = node.outputs[0]
    rename = keep_name or output.is_graph_output()
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    source.type = source.type or output.type
    if source.shape is None or (rename and output.shape is not None):
        source.shape = output.shape
    model.graph.remove(node, safe=True)
    if rename:
        name, output.name = output.name, None
        source.name = name
    model.touch()


def _renameable(model: Model, value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.graph is model.graph and not value.is_graph_output()


def to_weights(model: Model, node: ir.Node, tensors: Mapping[ir.Value, np.ndarray | ir.TensorProtocol]) -> None:
    """Let weights of the same names take the place of a node's outputs; the node goes.

    Raises:
        PassFailed: an output that is read has no tensor, is an output of a graph, or would hold NaN.
    """
    _require_in_graph(model, node)
    for value in node.outputs:
        if value.is_graph_output() or (value.uses() and value not in tensors):
            raise PassFailed(f"{value.name!r} of {node.name!r} is still read, and no weight can take its place")
    weights = {value: _initializer(value.name, tensor) for value, tensor in tensors.items() if value.uses()}
    for value, weight in weights.items():
        weight.metadata_props.update(value.metadata_props)
        value.replace_all_uses_with(weight)
    model.graph.remove(node, safe=True)
    for weight in weights.values():
        model.graph.register_initializer(weight)
    model.touch()


def discard(model: Model, values: Iterable[ir.Value | None]) -> None:
    """Remove those of these weights (or Constant nodes) that nothing reads any more."""
    for value in values:
        if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        producer = value.producer()
        if value.is_initializer() and value.graph is model.graph:
            del model.graph.initializers[value.name]
        elif producer is not None and producer.op_type == "Constant" and producer.graph is model.graph:
            model.graph.remove(producer, safe=True)
    model.touch()


def rename(model: Model, value: ir.Value) -> None:
    """Give a tensor another name, for it no longer means what it did. Raises PassFailed for outputs and inputs."""
    if not _renameable(model, value):
        raise PassFailed(f"{value.name!r} is not a tensor that the main graph makes and keeps")
    value.name = fresh(model, value.name)
    model.touch()


def hand_over_output(model: Model, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be the graph output that `old` is, under its name; `old` gets another. Readers of `old` stay."""
    if not old.is_graph_output():
        raise PassFailed(f"{old.name!r} is no graph output")
    name = old.name
    for index, output in enumerate(model.graph.outputs):
        if output is old:
            model.graph.outputs[index] = new
    old.name = fresh(model, f"{name}_inner")
    new.name = name
    new.shape, new.type = old.shape, old.type
    model.touch()


def remove_unused(model: Model) -> int:
    """Remove the nodes and weights that no output depends on, in every graph; returns how many nodes went."""
    before = _extent(model)
    ir_passes.RemoveUnusedNodesPass()(model.ir)
    after = _extent(model)
    if after != before:
        model._names = None
        model.touch()
    return before[0] - after[0]


def _extent(model: Model) -> tuple[int, int, int]:
    """Numbers of nodes, of outputs that have a name, and of weights. The pass does not count outputs as a change."""
    nodes = list(model.graph.all_nodes())
    return len(nodes), sum(bool(v.name) for n in nodes for v in n.outputs), len(model.graph.initializers)


def apply(model: Model, *passes: ir.passes.PassBase) -> bool:
    """Run onnx_ir's own in-place passes; returns whether one of them changed something."""
    changed = False
    for step in passes:
        changed |= bool(step(model.ir).modified)
    if changed:
        model._names = None
        model.touch()
    return changed


def substitute(model: Model, new: ir.Model) -> None:
    """Take over another graph for the whole model, as libraries that rewrite copies hand back.

    Raises:
        PassFailed: it has other inputs or outputs; nothing was changed.
    """
    for kind in ("inputs", "outputs"):
        here = [v.name for v in getattr(model.graph, kind) if not v.is_initializer()]
        there = [v.name for v in getattr(new.graph, kind) if not v.is_initializer()]
        if here != there:
            raise PassFailed(f"the rewritten graph has the {kind} {there}, the model had {here}")
    fresh_model = Model(new, model.name)
    model.ir, model._names = fresh_model.ir, None
    model.touch()


def cut(model: Model, tensors: Sequence[str]) -> Model:
    """A copy that computes these tensors of the main graph and nothing else; inputs stay. Raises BadInput."""
    copy = model.clone()
    for name in tensors:
        try:
            copy.value(name)
        except KeyError:
            raise BadInput(f"no tensor is called {name!r}") from None
    values = [copy.value(name) for name in tensors]
    for value in values:
        value.shape = None if value.producer() is not None else value.shape  # it may be stale; a runtime infers it
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values)
    remove_unused(copy)
    copy.touch()
    return copy


def import_domain(model: Model, domain: str, version: int = 1) -> None:
    """State that operators of a domain are used; a version that is stated already stays."""
    model.ir.opset_imports.setdefault(domain, version)
    model.touch()


def set_metadata(model: Model, properties: Mapping[str, str]) -> None:
    """Add entries to the file's metadata; others are kept."""
    model.ir.metadata_props.update(properties)
    model.touch()


def _require_in_graph(model: Model, node: ir.Node) -> None:
    if node.graph is not model.graph:
        raise InvalidModel(f"node {node.name!r} is not in the main graph")
