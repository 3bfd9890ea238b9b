"""Convolutions and dense layers as the low-rank methods see them: where they stand, and what their outputs become.

Behind a layer its batch norm is followed, then a sum with another tensor, then an activation that cuts off: what comes
out there is what later layers see, and what an approximation should keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.layers import (
    WEIGHTED,
    added_behind,
    alpha,
    bias_array,
    constant_weight,
    dilations,
    only_reader,
    output_axis,
    pads,
    set_operand,
    strides,
)
from effc.model import STANDARD_DOMAINS, Model
from effc.placement import clip_bounds

from ._factors import Factors, Layer, blank
from .fold_batchnorm import scale_and_shift


@dataclass(frozen=True)
class Site:
    """A layer that can be factorised.

    Attributes:
        layer: its weight, with the scale of the batch norm behind it.
        scale, shift: [N] of that batch norm: what stands behind it is scale * (layer's own output) + shift.
        bias: [N] or None; beta counted in.
        adding: the Add behind a MatMul whose constant operand is the bias, or None.
        end: name of the tensor before the activation: behind batch norm and sum.
        added: name of the tensor that the sum adds, or None.
        low, high: bounds of the activation; infinite where none follows.
    """

    node: ir.Node
    layer: Layer
    scale: np.ndarray
    shift: np.ndarray
    bias: np.ndarray | None
    end: str
    added: str | None
    low: float
    high: float
    adding: ir.Node | None = None

    @property
    def name(self) -> str:
        return self.node.name or ""

    @property
    def input(self) -> str:
        return self.node.inputs[0].name or ""

    @property
    def output(self) -> str:
        return self.node.outputs[0].name or ""

    @property
    def dense(self) -> bool:
        return self.node.op_type != "Conv"

    @property
    def spatial(self) -> int:
        """Spatial axes of its output."""
        return constant_weight(self.node).ndim - 2

    @property
    def biased(self) -> bool:
        """Whether it can have a bias: a MatMul cannot, but where one is added behind it."""
        return self.node.op_type != "MatMul" or self.adding is not None

    def outline(self) -> Site:
        """The same without the weight's numbers."""
        return replace(self, layer=replace(self.layer, weight=blank(*self.layer.weight.shape)))


def find(model: Model, node: ir.Node, shapes: Mapping[str, tuple | None]) -> Site | str:
    """A layer as a site, or why it is none."""
    weight = constant_weight(node)
    if weight is None:
        return _no_weight(node)
    if not node.inputs[1].is_initializer():
        return "its weight is made by Constant: simplify makes it a weight of the graph"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}; float32 is factorised"
    if model.constant(node.inputs[0]) is not None:
        return "its input is a constant; simplify folds it"
    if others := [use.node.name for use in node.inputs[1].uses() if use.node is not node]:
        return f"its weight is shared with {others[0]!r}: as two chains it would be stored twice"
    axis = output_axis(node, weight.ndim)
    try:
        bias = bias_array(model, node, weight.shape[axis])
    except ValueError as error:
        return str(error)
    layer = _convolution(node, weight, shapes) if node.op_type == "Conv" else _dense(node, weight)
    if isinstance(layer, str):
        return layer
    behind = added_behind(model, node, layer.outputs, len(shapes.get(node.outputs[0].name) or ()))
    adding = None if behind is None else behind[0]
    out = node.outputs[0]
    if behind is not None:
        bias, out = model.constant(adding.inputs[behind[1]]).reshape(-1), adding.outputs[0]
    by_channel = node.op_type != "MatMul" or len(shapes.get(node.outputs[0].name) or ()) == 2  # what a norm goes by
    scale, shift, end = _behind_norm(out, layer.outputs) if by_channel else _plain(out, layer.outputs)
    added, end = _sum(end, shapes)
    low, high = _activation(end)
    scaled = Layer(layer.weight * scale[:, None, None, None], layer.strides, layer.dilations, layer.pads)
    return Site(node, scaled, scale, shift, bias, end.name or "", added, low, high, adding)


def known(model: Model, node: ir.Node, shapes: Mapping[str, tuple | None]) -> Site:
    """A layer that was found before, weights and all; of all layers at once these would take much memory."""
    site = find(model, node, shapes)
    assert isinstance(site, Site), site
    return site


def _no_weight(node: ir.Node) -> str:
    maker = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if maker is None:
        return "its weight is an input of the graph, not a constant"
    if node.op_type == "MatMul" and maker.op_type != "DequantizeLinear":
        return "its right operand is no constant"
    hint = ": split layers before their weights are encoded" if maker.op_type in ("DequantizeLinear", "Gather") else ""
    return f"its weight is made by {maker.op_type}, not a constant{hint}"


def _convolution(node: ir.Node, weight: np.ndarray, shapes: Mapping[str, tuple | None]) -> Layer | str:
    groups, spatial = node.attributes.get_int("group", 1), weight.ndim - 2
    if groups > 1 and weight.shape[1] == 1:
        return "it is depthwise: each channel has a filter of its own, and there is nothing to share"
    if groups > 1:
        return f"it has {groups} groups; convolutions over all their inputs are factorised"
    if spatial not in (1, 2):
        return f"it has {spatial} spatial axes; 1 and 2 are factorised"
    size = (shapes.get(node.inputs[0].name) or ())[2:]
    fixed = len(size) == spatial and all(isinstance(d, int) for d in size)
    if node.attributes.get_string("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER") and not fixed:
        return "it pads by the size of its input (auto_pad), and that is not fixed"
    around = pads(node, size, weight.shape[2:])
    steps, gaps = strides(node, spatial), dilations(node, spatial)
    if spatial == 1:
        weight = weight[:, :, None, :]
        around, steps, gaps = [0, around[0], 0, around[1]], [1, *steps], [1, *gaps]
    return Layer(weight.astype(np.float64), tuple(steps), tuple(gaps), tuple(around))


def _dense(node: ir.Node, weight: np.ndarray) -> Layer | str:
    if weight.ndim != 2:
        return f"its right operand has {weight.ndim} axes; matrices are factorised"
    if node.op_type == "Gemm" and node.attributes.get_int("transA", 0):
        return "its left operand is transposed"
    matrix = weight if output_axis(node, 2) == 0 else weight.T
    return Layer(alpha(node) * matrix.astype(np.float64)[:, :, None, None])


def _behind_norm(out: ir.Value, outputs: int) -> tuple[np.ndarray, np.ndarray, ir.Value]:
    """Scale and shift of a batch norm that alone reads a layer's output, and what comes out behind it."""
    reader = only_reader(out)
    if reader is not None and reader.op_type == "BatchNormalization" and reader.inputs[0] is out:
        numbers = scale_and_shift(reader)
        # What a channel of scale 0 makes is never seen: there is nothing to scale back.
        if not isinstance(numbers, str) and np.all(numbers[0] != 0):
            return *numbers, reader.outputs[0]
    return _plain(out, outputs)


def _plain(out: ir.Value, outputs: int) -> tuple[np.ndarray, np.ndarray, ir.Value]:
    return np.ones(outputs), np.zeros(outputs), out


def _sum(end: ir.Value, shapes: Mapping[str, tuple | None]) -> tuple[str | None, ir.Value]:
    """What a sum adds to a tensor that nothing else reads, and the sum."""
    reader = only_reader(end)
    if reader is None or reader.op_type != "Add":
        return None, end
    others = [v for v in reader.inputs if v is not end]
    if len(others) != 1 or others[0].is_initializer() or others[0].producer() is None:
        return None, end
    shape = shapes.get(end.name)
    if shape is None or shapes.get(others[0].name) != shape:
        return None, end
    return others[0].name, reader.outputs[0]


def _activation(end: ir.Value) -> tuple[float, float]:
    """Bounds of the activation that all readers of a tensor apply."""
    readers = list(end.consumers())
    if end.is_graph_output() or not readers or any(r.domain not in STANDARD_DOMAINS for r in readers):
        return -np.inf, np.inf
    if all(r.op_type == "Relu" for r in readers):
        return 0.0, np.inf
    if len(readers) == 1 and readers[0].op_type == "Clip":
        low, high = clip_bounds(readers[0])
        return (-np.inf if low is None else low), (np.inf if high is None else high)
    return -np.inf, np.inf


def put(model: Model, site: Site, factors: Factors, bias: np.ndarray | None) -> list[ir.Node]:
    """Put a chain in the place of a layer.

    Args:
        factors: for the scaled layer (`Site.layer`).
        bias: [N] for what stands behind the batch norm; None leaves the layer's own.
    """
    *before, last = factors
    own = last.weight / site.scale[:, None, None, None]
    added = site.bias if bias is None else (bias - site.shift) / site.scale
    weights = [*(factor.weight for factor in before), own]
    dtype = constant_weight(site.node).dtype
    nodes, x = [], site.node.inputs[0]
    for number, (factor, weight) in enumerate(zip(factors, weights, strict=True)):
        ends = number == len(factors) - 1
        hint = f"{site.name}_{'abcd'[number]}"
        make = _dense_node if site.dense else _convolution_node
        extra = added.astype(dtype) if ends and added is not None and site.adding is None else None
        node = make(model, site, factor, weight.astype(dtype), x, hint, extra)
        nodes.append(node)
        x = node.outputs[0]
    if site.adding is not None and bias is not None:
        set_added(model, site, added.astype(dtype))
    edit.replace(model, [site.node], nodes, {site.node.outputs[0]: x})
    return nodes


def set_added(model: Model, site: Site, numbers: np.ndarray) -> None:
    """Let the Add behind a MatMul add other numbers."""
    place = 1 if site.adding.inputs[0] is site.node.outputs[0] else 0
    shape = model.constant(site.adding.inputs[place]).shape
    set_operand(model, site.adding, place, numbers.reshape(shape), f"{site.name}_bias")


def stored(site: Site, weight: np.ndarray) -> np.ndarray:
    """A weight of the scaled layer in the form in which the layer's node has it."""
    own = weight / site.scale[:, None, None, None]
    now = constant_weight(site.node)
    if site.dense:
        matrix = own[:, :, 0, 0]
        own = (matrix if output_axis(site.node, 2) == 0 else matrix.T) / alpha(site.node)
    return np.ascontiguousarray(own.reshape(now.shape).astype(now.dtype))


def _convolution_node(model, site, factor, weight, x, hint, bias) -> ir.Node:
    flat = constant_weight(site.node).ndim == 3  # one spatial axis
    weight = weight[:, :, 0] if flat else weight
    top, left, bottom, right = factor.pads
    inputs = [x, edit.add_initializer(model, f"{hint}_weight", np.ascontiguousarray(weight))]
    if bias is not None:
        inputs.append(edit.add_initializer(model, f"{hint}_bias", bias))
    attributes = {
        "kernel_shape": list(weight.shape[2:]),
        "strides": list(factor.strides)[flat:],
        "dilations": list(factor.dilations)[flat:],
        "pads": [left, right] if flat else [top, left, bottom, right],
        "group": factor.groups,
    }
    return edit.make_node(model, "Conv", inputs, attributes, name=hint)


def _dense_node(model, site, factor, weight, x, hint, bias) -> ir.Node:
    matrix = weight[:, :, 0, 0]
    if bias is None:
        operand = edit.add_initializer(model, f"{hint}_weight", np.ascontiguousarray(matrix.T))
        return edit.make_node(model, "MatMul", [x, operand], name=hint)
    transposed = output_axis(site.node, 2) == 0
    operand = edit.add_initializer(model, f"{hint}_weight", np.ascontiguousarray(matrix if transposed else matrix.T))
    inputs = [x, operand, edit.add_initializer(model, f"{hint}_bias", bias)]
    return edit.make_node(model, "Gemm", inputs, {"transB": int(transposed)}, name=hint)


def layers(model: Model) -> Sequence[ir.Node]:
    """The nodes that may be sites."""
    return list(model.nodes(*WEIGHTED))
