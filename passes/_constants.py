"""f(constants) -> constant, where the file does not grow by it.

The numbers come from onnx's reference implementation, where it is known to agree with runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from effc import edit
from effc.model import Model, constant_tensor
from effc.shapes import Fact, ShapeNumbers

NODE_BYTES = 256  # about what a node takes in a file: a constant up to this size is worth as much
LARGEST = 1 << 26  # bytes: larger weights stay on disk
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
RANDOM |= {"Dropout"}  # in training, that is
KEPT = {
    *RANDOM,
    # quantised weights are encodings that runtimes and other passes read
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    # here onnx's reference and onnxruntime give different numbers, at some opsets at least
    *("Attention", "BatchNormalization", "Hardmax", "LogSoftmax", "Resize", "Softmax", "Upsample"),
}


def fold(model: Model, node: ir.Node, numbers: ShapeNumbers) -> bool:
    """Let weights take the place of a node that reads constants only; returns whether it is gone.

    It stays where its result is an output of the graph or takes more room than the node and the weights it alone reads.
    """
    read = [v for v in node.outputs if v.uses()]
    if node.op_type in KEPT or not read or any(v.is_graph_output() for v in node.outputs):
        return False
    if node.op_type == "Constant":
        tensor = constant_tensor(node.outputs[0])
        return tensor is not None and replace(model, node, {node.outputs[0]: tensor})
    known = constants(node)
    if known is None:
        return False
    facts = [numbers.fact(v) for v in read]
    sizes = [_nbytes(fact) for fact in facts]
    freed = sum(t.nbytes for v, t in known.items() if all(use.node is node for use in v.uses()))
    if None in sizes or sum(sizes) > min(max(NODE_BYTES, freed), LARGEST):
        return False
    results = _evaluate(node, known, model.opset)
    if not results or not all(_agrees(results[v], fact) for v, fact in zip(read, facts, strict=True)):
        return False
    return replace(model, node, {v: results[v] for v in read})


def constants(node: ir.Node) -> dict[ir.Value, ir.TensorProtocol] | None:
    """The inputs with their numbers, when there are any and each is a constant."""
    found = {}
    for value in node.inputs:
        tensor = constant_tensor(value)
        if value is not None and (tensor is None or tensor.dtype == ir.DataType.STRING):
            return None
        found[value] = tensor
    return {v: t for v, t in found.items() if v is not None} or None


def replace(model: Model, node: ir.Node, tensors: Mapping[ir.Value, np.ndarray | ir.TensorProtocol]) -> bool:
    """Put weights in a node's place and remove those that it alone has read."""
    inputs = list(node.inputs)
    edit.to_weights(model, node, tensors)
    edit.discard(model, inputs)
    return True


def unproven(node: ir.Node, numbers: ShapeNumbers) -> bool:
    """Whether a node reads constants only, and stays for now because the size of its result is not known."""
    return any(_nbytes(numbers.fact(v)) is None for v in node.outputs) and constants(node) is not None


def _nbytes(fact: Fact) -> int | None:
    if (
        fact.dtype in (None, ir.DataType.STRING)
        or fact.shape is None
        or not all(isinstance(d, int) for d in fact.shape)
    ):
        return None
    return int(np.prod(fact.shape, dtype=np.int64) * fact.dtype.itemsize)


def _evaluate(node: ir.Node, known: Mapping[ir.Value, ir.TensorProtocol], opset: int) -> dict[ir.Value, object]:
    """The outputs by onnx's reference implementation; nothing where that has none."""
    message, names = ir.to_proto(node), [v.name for v in known]
    imports = [onnx.helper.make_opsetid("", opset)]
    outputs = [v for v in node.outputs if v.name]
    function = onnx.helper.make_function("effc", "fold", names, [v.name for v in outputs], [message], imports)
    try:
        with np.errstate(all="ignore"):
            feeds = {v.name: t.numpy() for v, t in known.items()}
            results = ReferenceEvaluator(function).run(None, feeds, attributes={})
    except Exception:  # a faulty implementation raises anything, down to ZeroDivisionError; the node then stays
        return {}
    return dict(zip(outputs, (np.asarray(r) if isinstance(r, np.generic) else r for r in results), strict=True))


def _agrees(array: object, fact: Fact) -> bool:
    """The reference has slips in types and shapes: what it returns must be what inference says, and a number."""
    if not isinstance(array, np.ndarray) or array.dtype != fact.dtype.numpy() or array.shape != fact.shape:
        return False
    return not (array.dtype.kind == "f" and np.isnan(array).any())
