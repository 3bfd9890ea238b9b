"""Where integer codes run through a graph: which tensors get a quantize/dequantize pair and which share one.

The weighted operators to lower are given; the operators between them follow when the target has integer kernels for
them and all their inputs are coded. An activation that an integer kernel absorbs is passed over: its output is coded.
Where outputs of layers stay floats (`IntegerKernels.output_pairs`), a tensor is coded for its readers' sake alone:
layers, the shortcut of an Add that a convolution takes in, and what lies between coded tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.model import STANDARD_DOMAINS, Model, constant_tensor
from effc.target import IntegerKernels

ABSORBED = ("Relu", "Clip")


@dataclass(frozen=True)
class Placement:
    """Where codes run.

    Attributes:
        coded: tensor -> tensor whose scale its codes have: itself, or the input of operators that pass codes on.
        integer: nodes that compute on codes, the weighted ones included; of an Add that a convolution takes in, the
            operand that is coded.
        passing: nodes that run on the codes themselves, without a pair in between.
        settled: integer node -> its output behind the activation that its kernel absorbs.
        made: tensors that come out of integer kernels as codes.
    """

    coded: dict[ir.Value, ir.Value]
    integer: frozenset[ir.Node]
    passing: frozenset[ir.Node]
    settled: dict[ir.Node, ir.Value]
    made: frozenset[ir.Value]

    def made_in_codes(self, value: ir.Value) -> bool:
        """Whether a tensor comes out of integer kernels, so that every reader should see its decoded form."""
        return value in self.made


def plan(model: Model, weighted: Collection[str], kernels: IntegerKernels) -> Placement:
    """Place codes for the weighted nodes of these names."""
    chosen = {node for node in model.graph if node.name in weighted}
    shortcuts = _shortcuts(model, chosen) if kernels.residual_pairs else {}
    demanded = {node.inputs[0] for node in chosen} | set(shortcuts.values())
    coded: dict[ir.Value, ir.Value] = {v: v for v in model.graph.inputs if v in demanded}
    integer, passing, settled = set(chosen), set(), {}
    shapes = model.shapes()
    for node in model.graph:
        if node in chosen:
            settled[node] = behind_activation(node)
            if _needs_codes(node, settled[node], chosen, kernels, shapes):
                coded[settled[node]] = settled[node]
        elif node in shortcuts:
            integer.add(node)
        elif node.inputs and node.inputs[0] in coded and passes_codes(node, kernels):
            passing.add(node)
            integer.add(node)
            coded[node.outputs[0]] = coded[node.inputs[0]]
        elif computes(node, kernels, shapes) and all(v in coded for v in _operands(node)):
            out = behind_activation(node)
            if not out.is_graph_output() and (kernels.output_pairs or out in demanded):
                integer.add(node)
                settled[node] = out
                coded[out] = out
        for value in node.outputs:
            if value in demanded:
                coded.setdefault(value, value)
    made = frozenset(settled.values()) | {node.outputs[0] for node in passing}
    if not kernels.output_pairs:
        made = frozenset()
    return Placement(coded, frozenset(integer), frozenset(passing), settled, made)


def _shortcuts(model: Model, chosen: Collection[ir.Node]) -> dict[ir.Node, ir.Value]:
    """Add behind a chosen convolution -> its other operand, which is to be coded.

    Of two convolutions the one with more layers behind it is taken in: the other one is the projection.
    """
    depth: dict[ir.Node, int] = {}
    found = {}
    for node in model.graph:
        behind = [depth[v.producer()] for v in node.inputs if v is not None and v.producer() in depth]
        depth[node] = max(behind, default=0) + (node in chosen)
        if node.op_type != "Add" or node.domain not in STANDARD_DOMAINS:
            continue
        convolutions = [v for v in node.inputs if taken_in(v) and v.producer() in chosen]
        if convolutions and all(constant_tensor(v) is None for v in node.inputs):
            main = max(convolutions, key=lambda v: depth[v.producer()])
            found[node] = node.inputs[1 - node.inputs.index(main)]
    return found


def taken_in(value: ir.Value) -> bool:
    """Whether a tensor comes from a convolution for a single reader, which that may take in."""
    maker = value.producer()
    if maker is None or maker.op_type != "Conv" or maker.domain not in STANDARD_DOMAINS:
        return False
    return len(value.uses()) == 1 and not value.is_graph_output()


def behind_activation(node: ir.Node) -> ir.Value:
    """A node's output, or that of the activation after it when a kernel can absorb this one."""
    out = node.outputs[0]
    uses = list(out.uses())
    if len(uses) != 1 or out.is_graph_output():
        return out
    reader, index = uses[0]
    return reader.outputs[0] if index == 0 and reader.graph is node.graph and is_absorbed(reader) else out


def is_absorbed(node: ir.Node) -> bool:
    """Relu, or Clip from zero with constant bounds: clipping that the range of unsigned codes can do by itself."""
    if node.op_type not in ABSORBED or node.domain not in STANDARD_DOMAINS:
        return False
    return node.op_type == "Relu" or clip_bounds(node)[0] == 0.0


def clip_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Constant bounds of a Clip of any opset; None where there is none or it is not constant."""
    bounds = []
    for index, key in ((1, "min"), (2, "max")):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None:
            tensor = constant_tensor(value)
            bounds.append(None if tensor is None else float(tensor.numpy().reshape(-1)[0]))
        else:
            bounds.append(node.attributes.get_float(key, None) if key in node.attributes else None)
    return bounds[0], bounds[1]


def computes(node: ir.Node, kernels: IntegerKernels, shapes: Mapping[str, tuple | None]) -> bool:
    """Whether a target computes this operator on codes; a mean over all positions counts as GlobalAveragePool."""
    if node.domain not in STANDARD_DOMAINS:
        return False
    means = "GlobalAveragePool" in kernels.computing and is_global_mean(node, shapes)
    return node.op_type in kernels.computing or means


def _operands(node: ir.Node) -> Sequence[ir.Value | None]:
    """The inputs of a computing operator that have to be coded."""
    return node.inputs[:1] if node.op_type == "ReduceMean" else node.inputs


def is_global_mean(node: ir.Node, shapes: Mapping[str, tuple | None]) -> bool:
    """ReduceMean over both spatial axes of a rank-4 tensor."""
    if node.op_type != "ReduceMean" or node.domain not in STANDARD_DOMAINS:
        return False
    shape = shapes.get(node.inputs[0].name)
    if shape is None or len(shape) != 4:
        return False
    if "axes" in node.attributes:
        axes = list(node.attributes.get_ints("axes", ()))
    else:
        tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if tensor is None else tensor.numpy().tolist()
    return sorted(a % 4 for a in axes) == [2, 3]


def passes_codes(node: ir.Node, kernels: IntegerKernels) -> bool:
    """Whether an operator may run on codes: it moves values or takes the largest, and makes none but zero."""
    if node.op_type not in kernels.transparent or node.domain not in STANDARD_DOMAINS:
        return False
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    if node.op_type == "Resize":
        return node.attributes.get_string("mode", "nearest") == "nearest"
    if node.op_type == "Pad":
        return node.attributes.get_string("mode", "constant") != "constant" or _pads_zero(node)
    return True


def _pads_zero(node: ir.Node) -> bool:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    tensor = constant_tensor(node.inputs[2])
    return tensor is not None and not np.any(tensor.numpy())


def _needs_codes(
    node: ir.Node,
    out: ir.Value,
    chosen: Collection[ir.Node],
    kernels: IntegerKernels,
    shapes: Mapping[str, tuple | None],
) -> bool:
    """A convolution's kernel wants codes on its output; a matrix product can hand out floats where these are read.

    Not so a Gemm with an activation: without codes behind both, onnxruntime fuses them in float first, and decodes the
    weights at each inference.
    """
    if node.op_type == "Conv" or not kernels.output_pairs:
        return kernels.output_pairs
    if out.is_graph_output():
        return False
    if node.op_type == "Gemm" and out is not node.outputs[0]:
        return True
    return any(n in chosen or _may_compute(n, kernels, shapes) or passes_codes(n, kernels) for n in out.consumers())


def _may_compute(node: ir.Node, kernels: IntegerKernels, shapes: Mapping[str, tuple | None]) -> bool:
    """Whether an operator between layers can end up on codes: one that adds a constant, as a bias, cannot."""
    return computes(node, kernels, shapes) and all(constant_tensor(v) is None for v in _operands(node))
