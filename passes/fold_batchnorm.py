"""Batch normalisation as a part of the layer beside it. With s = gamma / sqrt(var + eps) and t = beta - s mean:

    BN(W x + b)         ->  (s W) x + (s b + t)             Conv, ConvTranspose, Gemm, MatMul (+ Add)
    W BN(x) + b         ->  (W s) x + (b + W t)             Gemm, and Conv without padding
    BN(gamma x^ + b)    ->  (s gamma) x^ + (s b + t)        batch norm behind batch norm, where nothing else is left

Computed in float64 and stored in the weight's own type. Weights keep their names; a norm's output keeps its name.
Source: Ioffe and Szegedy 2015, section 3.1 (at inference a batch norm is a linear map).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.errors import PassFailed
from effc.model import STANDARD_DOMAINS, Model, constant_tensor
from effc.shapes import proven

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")  # weight at input 1, bias at input 2


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """BN(Conv(x)) -> Conv'(x), and alike for ConvTranspose, Gemm, MatMul and a layer behind the norm."""

    name: ClassVar[str] = "fold-batchnorm"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        ranks = _ranks(model)
        for norm in model.nodes("BatchNormalization"):
            found = _plan(norm, ranks)
            if isinstance(found, str):
                yield Skipped(norm.name, found)
            else:
                yield Proposal(norm.name, (found.layer.name, norm.name), {"into": found.layer.name}, damage=0.0)
        for name, reason in model.not_analysed().items():
            yield from (Skipped(inner, f"it is inside {name!r}: {reason}") for inner in _inner_norms(model, name))

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        ranks, sites = _ranks(model), {proposal.site for proposal in chosen}
        for norm in [n for n in model.nodes("BatchNormalization") if n.name in sites]:
            found = _plan(norm, ranks)
            if isinstance(found, str):
                raise PassFailed(f"{self.name}: {norm.name!r} cannot be folded: {found}")
            _apply(model, norm, found)


@dataclass(frozen=True)
class _Fold:
    """The layer that takes a norm in, and its new weight and bias."""

    layer: ir.Node
    weight: np.ndarray
    bias: np.ndarray
    add: ir.Node | None = None  # holds the bias of a MatMul


def _plan(norm: ir.Node, ranks: Mapping[str, int]) -> _Fold | str:
    """How to fold one norm, or why it stays."""
    numbers = scale_and_shift(norm)
    if isinstance(numbers, str):
        return numbers
    ways = [_into_previous, _into_next]
    before = norm.inputs[0].producer()
    if before is not None and before.op_type in ("BatchNormalization", "MatMul"):
        ways.reverse()  # into these it costs an Add, or saves less
    reasons = []
    for way in ways:
        found = way(norm, *numbers, ranks)
        if isinstance(found, _Fold):
            return found
        reasons.append(found)
    return "; ".join(reasons)


def scale_and_shift(norm: ir.Node) -> tuple[np.ndarray, np.ndarray] | str:
    """s and t of y = s x + t, one number a channel, in float64."""
    if norm.attributes.get_int("training_mode", 0) or sum(bool(v.name) for v in norm.outputs) > 1:
        return "it runs in training mode, with the statistics of each batch"
    if not norm.attributes.get_int("spatial", 1):
        return "it has statistics for each position (spatial=0)"
    arrays = []
    for kind, value in zip(("scale", "bias", "mean", "variance"), norm.inputs[1:], strict=True):
        tensor = constant_tensor(value)
        if tensor is None:
            return f"its {kind} is {_origin(value)}, not a constant"
        arrays.append(tensor.numpy().astype(np.float64))
    gamma, beta, mean, var = arrays
    with np.errstate(all="ignore"):
        s = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", 1e-5))
        t = beta - s * mean
    return (s, t) if np.isfinite(s).all() and np.isfinite(t).all() else "its statistics give no finite scale"


def _into_previous(norm: ir.Node, s: np.ndarray, t: np.ndarray, ranks: Mapping[str, int]) -> _Fold | str:
    source = norm.inputs[0]
    layer, add = source.producer(), None
    if layer is not None and layer.op_type == "Add" and layer.domain in STANDARD_DOMAINS:
        layer, add = _matmul_below(layer), layer
    if layer is None or layer.op_type not in LAYERS or layer.domain not in STANDARD_DOMAINS:
        return f"it stands behind {_origin(source)}"
    for value in {source, layer.outputs[0]}:
        if len(value.uses()) != 1 or value.is_graph_output():
            return f"what {layer.name!r} makes is read by others too"
    W = _weight(layer)
    b = _bias(layer, add)
    if isinstance(W, str) or isinstance(b, str):
        return W if isinstance(W, str) else b
    if layer.op_type == "MatMul" and not (W.ndim == 2 and ranks.get(source.name) == 2):
        return f"the last axis of {layer.name!r} is not known to be the channel axis"
    if layer.op_type == "Gemm":
        b = b * layer.attributes.get_float("beta", 1.0)
    if layer.op_type == "ConvTranspose":
        groups = layer.attributes.get_int("group", 1)
        by_group = W.reshape(groups, W.shape[0] // groups, W.shape[1], -1) * s.reshape(groups, 1, W.shape[1], 1)
        weight = by_group.reshape(W.shape)
    else:
        weight = W * _along(s, W.ndim, _output_axis(layer))
    return _fold(layer, weight, s * b + t, add)


def _into_next(norm: ir.Node, s: np.ndarray, t: np.ndarray, ranks: Mapping[str, int]) -> _Fold | str:
    output = norm.outputs[0]
    uses = list(output.uses())
    if output.is_graph_output() or len(uses) != 1:
        return f"its output is read by {'the caller' if output.is_graph_output() else f'{len(uses)} nodes'}"
    layer, index = uses[0]
    if layer.graph is not norm.graph or layer.domain not in STANDARD_DOMAINS or layer.op_type not in ("Conv", "Gemm"):
        return f"{layer.op_type} {layer.name!r} follows"
    if index or layer.attributes.get_int("transA", 0):
        return f"{layer.name!r} does not read it as rows of features"
    if any(layer.attributes.get_ints("pads", ())) or layer.attributes.get_string("auto_pad", "NOTSET")[:4] == "SAME":
        return f"{layer.name!r} pads its input with zeros, which the norm would have shifted"
    W = _weight(layer)
    b = _bias(layer, None)
    if isinstance(W, str) or isinstance(b, str):
        return W if isinstance(W, str) else b
    if layer.op_type == "Gemm":
        axis = 1 - _output_axis(layer)
        shift = layer.attributes.get_float("alpha", 1.0) * np.tensordot(t, W, (0, axis))
        return _fold(layer, W * _along(s, 2, axis), b * layer.attributes.get_float("beta", 1.0) + shift, None)
    groups = layer.attributes.get_int("group", 1)
    # Row o of these are the numbers of the input channels that output channel o reads.
    S, T = (np.repeat(v.reshape(groups, -1), W.shape[0] // groups, axis=0) for v in (s, t))
    tail = (1,) * (W.ndim - 2)
    shift = (W * T.reshape(*T.shape, *tail)).reshape(W.shape[0], -1).sum(axis=1)
    return _fold(layer, W * S.reshape(*S.shape, *tail), b + shift, None)


def _fold(layer: ir.Node, weight: np.ndarray, bias: np.ndarray, add: ir.Node | None) -> _Fold | str:
    old = constant_tensor(layer.inputs[1])
    dtype = old.dtype.numpy()
    if weight.shape != tuple(old.shape.numpy()):
        return f"{layer.name!r} and the norm differ in their number of channels"
    with np.errstate(over="ignore"):
        weight, bias = weight.astype(dtype), bias.astype(dtype)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return f"the new weight of {layer.name!r} does not fit into {dtype}"
    return _Fold(layer, weight, bias, add)


def _weight(layer: ir.Node) -> np.ndarray | str:
    value = layer.inputs[1]
    tensor = constant_tensor(value)
    if tensor is None:
        return f"the weight of {layer.name!r} is {_origin(value)}, not a constant"
    if len(value.uses()) != 1 or value.is_graph_output():
        return f"the weight of {layer.name!r} is shared with another node"
    return tensor.numpy().astype(np.float64)


def _bias(layer: ir.Node, add: ir.Node | None) -> np.ndarray | str:
    index = _bias_index(layer, add)
    node = add or layer
    value = node.inputs[index] if index is not None and index < len(node.inputs) else None
    if value is None:
        return np.zeros(1)
    tensor = constant_tensor(value)
    return f"the bias of {layer.name!r} is no constant" if tensor is None else tensor.numpy().astype(np.float64)


def _bias_index(layer: ir.Node, add: ir.Node | None) -> int | None:
    if add is not None:
        return next(i for i, v in enumerate(add.inputs) if constant_tensor(v) is not None)
    return None if layer.op_type == "MatMul" else 2


def _matmul_below(add: ir.Node) -> ir.Node | None:
    """The MatMul in MatMul(x, W) + constant."""
    makers = [v.producer() for v in add.inputs if v is not None and constant_tensor(v) is None]
    return makers[0] if len(makers) == 1 and makers[0] is not None and makers[0].op_type == "MatMul" else None


def _output_axis(layer: ir.Node) -> int:
    """The axis of the weight that counts output channels; a grouped ConvTranspose has none."""
    return {"Gemm": 1 - layer.attributes.get_int("transB", 0), "MatMul": 1}.get(layer.op_type, 0)


def _along(vector: np.ndarray, rank: int, axis: int) -> np.ndarray:
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def _origin(value: ir.Value | None) -> str:
    producer = None if value is None else value.producer()
    return "an input" if producer is None else f"{producer.op_type} {producer.name!r}"


def _apply(model: Model, norm: ir.Node, fold: _Fold) -> None:
    layer, parameters = fold.layer, list(norm.inputs[1:])
    hint = layer.inputs[1].name
    hint = f"{hint[:-6]}bias" if hint.endswith("weight") else f"{layer.name}_bias"
    behind = layer.outputs[0] is norm.inputs[0] or fold.add is not None
    result = layer.outputs[0] if fold.add is None else fold.add.outputs[0]
    _store(model, layer, 1, fold.weight, hint)
    index = _bias_index(layer, fold.add)
    if index is not None:
        _store(model, fold.add or layer, index, fold.bias, hint)
    else:
        bias = edit.add_initializer(model, hint, fold.bias)
        add = edit.make_node(model, "Add", [result, bias], name=f"{layer.name}_add", origin=[layer, norm])
        edit.insert_after(model, layer, [add])
        result = add.outputs[0]
    if layer.op_type == "Gemm" and "beta" in layer.attributes:
        edit.set_attributes(model, layer, beta=None)
    for node in [layer] if fold.add is None else [layer, fold.add]:
        edit.absorb(node, norm)
    edit.bypass(model, norm, result if behind else norm.inputs[0], keep_name=behind)
    edit.discard(model, parameters)


def _store(model: Model, node: ir.Node, index: int, array: np.ndarray, hint: str) -> None:
    """Give a node new numbers at one input, under the old name where nothing else reads it."""
    old = node.inputs[index] if index < len(node.inputs) else None
    if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
        edit.set_initializer(model, old, array)
        return
    edit.set_input(model, node, index, edit.add_initializer(model, hint, array))
    edit.discard(model, [old])


def _ranks(model: Model) -> dict[str, int]:
    """Tensor -> rank where it is proven; nothing where no layer needs it."""
    if not any(True for _ in model.nodes("MatMul")):
        return {}
    return {name: len(fact.shape) for name, fact in proven(model).items() if fact.shape is not None}


def _inner_norms(model: Model, name: str) -> list[str]:
    """Names of the batch norms in a node's sub-graphs."""
    graphs = [a.as_graph() for a in model.node(name).attributes.values() if a.type == ir.AttributeType.GRAPH]
    inner = [n for graph in graphs for n in graph.all_nodes() if n.op_type == "BatchNormalization"]
    return [n.name or n.outputs[0].name for n in inner]
