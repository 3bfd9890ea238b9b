"""What onnxruntime made of a model: its optimised graph, read back and compared with the graph it was given.

Fused nodes keep the name of the node they stand for (with `_token_<n>` where two would share it); channel-blocked
convolutions are named after their output. So a quantised node is looked up by name, then by what it makes.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from effc.kernels import FREE, Kernel
from effc.model import STANDARD_DOMAINS, Model

INTEGER_KERNELS = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}  # of the standard domain
FUSES = {"Conv", "MatMul", "Gemm", "Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Sigmoid", "LeakyRelu"}
WEIGHTED = {"Conv", "ConvTranspose", "MatMul", "Gemm"}  # their second input has to be quantised as well
ACTIVATIONS = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Gelu", "Swish"}
MOVES = {"Transpose", "ReorderInput", "Identity", "Reshape"}  # layout changes that the runtime puts before a kernel
LOWERED = "InsertedPrecisionFreeCast_"  # how names begin of what was lowered from float16 to float32
# What a layer's kernel may do besides.
PARTS = {
    "QuantizeLinear", "Relu", "Clip", "BatchNormalization", "LeakyRelu", "Sigmoid", "Add", "Identity", "Dropout",
}  # fmt: skip
MOVED = ("Transpose", "Cast", FREE)  # where the runtime put them, others have computed what comes out
EXTERNAL = "session.optimized_model_external_initializers_"

Session = TypeVar("Session")
Verdict = tuple[dict[str, int], dict[str, str], tuple[str, ...]]


def read_back(
    model: Model, load: Callable[[ort.SessionOptions], Session], options: ort.SessionOptions
) -> tuple[Session, Verdict]:
    """The session as deployed, and what it holds: fused kernels by kind, quantised nodes in float and why, notes.

    Args:
        load: makes a session with these options from the same model.
        options: as deployed.
    """
    session, optimised = optimised_graph(load, options)
    graph = optimised.graph
    made = _Made(graph)
    fell_back = {}
    for node, after in _quantised(model):
        found = made.find(node, after)
        if found is not None and made.reads_float(found):
            fell_back[node.name] = f"still {node.op_type} in float: {_reason(model, node, after)}"
    return session, (dict(sorted(_kinds(graph).items())), fell_back, tuple(_notes(model, made)))


def optimised_graph(
    load: Callable[[ort.SessionOptions], Session], options: ort.SessionOptions
) -> tuple[Session, onnx.ModelProto]:
    """A session, and the graph that it runs; weights from 1 KiB on are left where they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        # Weights apart: they need not be read, and a message would end at 2 GiB.
        options.add_session_config_entry(EXTERNAL + "file_name", "weights.bin")
        options.add_session_config_entry(EXTERNAL + "min_size_in_bytes", "1024")
        session = load(options)
        return session, onnx.load(path, load_external_data=False)


class _Made:
    """The optimised graph, searchable."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = graph.node
        self.makers = {output: node for node in graph.node for output in node.output if output}
        self.names = {re.sub(r"_token_\d+$", "", node.name): node for node in graph.node}

    def find(self, node: ir.Node, after: list[ir.Value]) -> onnx.NodeProto | None:
        """What stands for a node; `after` are its output and those of the activations that follow."""
        outputs = [v.name or "" for v in after]
        found = self.names.get(node.name or "") or self.names.get(f"fused {node.name}")
        found = found or next((self.names[f"{o}_nchwc"] for o in outputs if f"{o}_nchwc" in self.names), None)
        return found or self.makers.get(outputs[0])

    def source(self, tensor: str) -> onnx.NodeProto | None:
        """What makes a tensor, layout changes aside."""
        maker = self.makers.get(tensor)
        while maker is not None and maker.op_type in MOVES:
            maker = self.makers.get(maker.input[0])
        return maker

    def reads_float(self, node: onnx.NodeProto, inputs: slice = slice(None)) -> bool:
        """Whether one of the inputs is dequantised just before. An integer kernel reads the integers themselves."""
        if node.domain == "com.microsoft" and node.op_type.startswith(("Q", "MatMulNBits", "MatMulInteger", "Dynamic")):
            return False
        makers = (self.source(name) for name in node.input[inputs])
        return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _kinds(graph: onnx.GraphProto) -> Counter[str]:
    """Fused, channel-blocked and integer kernels, with the activation they absorbed."""
    kinds: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type.startswith("Reorder"):
            continue
        blocked = node.domain == "com.microsoft.nchwc"
        if blocked or node.domain == "com.microsoft" or node.op_type in INTEGER_KERNELS:
            activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
            kinds["Nchwc" * blocked + node.op_type + (f"+{activation}" if activation else "")] += 1
    return kinds


def _quantised(model: Model) -> Iterator[tuple[ir.Node, list[ir.Value]]]:
    """Nodes meant to run in integers, each with its output and those of the activations that follow it."""
    for node in model.graph:
        if node.domain not in STANDARD_DOMAINS or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        weighted = node.op_type in WEIGHTED
        data = node.inputs[:2] if weighted else [v for v in node.inputs if v is not None and model.constant(v) is None]
        if not data or not all(_dequantised(v) for v in data) or all(_weight(model, v) for v in data):
            continue
        after = _followed(node)
        # Without weights a node that ends in float is no more than the way out of the integers.
        if weighted or not _float_reader(after[-1]):
            yield node, after


def _dequantised(value: ir.Value | None) -> bool:
    maker = value.producer() if value is not None else None
    return maker is not None and maker.op_type == "DequantizeLinear"


def _weight(model: Model, value: ir.Value | None) -> bool:
    """Whether a tensor is constant, as it stands or behind DequantizeLinear."""
    maker = value.producer() if value is not None else None
    if maker is not None and maker.op_type == "DequantizeLinear":
        value = maker.inputs[0]
    return value is not None and model.constant(value) is not None


def _followed(node: ir.Node) -> list[ir.Value]:
    values = [node.outputs[0]]
    while len(values[-1].uses()) == 1 and not values[-1].is_graph_output():
        reader = next(iter(values[-1].uses())).node
        if reader.op_type not in ACTIVATIONS:
            break
        values.append(reader.outputs[0])
    return values


def _float_reader(value: ir.Value) -> str:
    """Who reads a tensor other than through QuantizeLinear: a node's name, the graph's output, or nobody ('')."""
    if value.is_graph_output():
        return "the graph's output"
    return next((f"{n.op_type} {n.name!r}" for n, _ in value.uses() if n.op_type != "QuantizeLinear"), "")


def _reason(model: Model, node: ir.Node, after: list[ir.Value]) -> str:
    """Why a node was not fused, as far as its surroundings tell; onnxruntime itself does not say."""
    if reader := _float_reader(after[-1]):
        quantised = any(n.op_type == "QuantizeLinear" for n, _ in after[-1].uses())
        return f"its output is {'read in float as well' if quantised else 'not quantised'}, by {reader}"
    quantizers = [n for n, _ in after[-1].uses()]
    zeros = [model.constant(n.inputs[2]) for n in quantizers if len(n.inputs) > 2]
    signed = [zero for zero in zeros if zero is not None and zero.dtype == np.int8]
    for maker in (value.producer() for value in after[1:]):
        kind = maker.op_type if maker is not None else ""
        if kind not in ("Relu", "Clip"):
            return f"{kind} before QuantizeLinear is not absorbed"
        if any(np.any(zero != -128) for zero in signed):
            return f"{kind} is not absorbed by QuantizeLinear to int8 unless the zero point is -128; use uint8"
    if len(quantizers) > 1:
        return f"its output is quantised {len(quantizers)} times"
    if node.op_type in WEIGHTED and _bias_off(model, node):
        return "the scale of its int32 bias is not the product of those of its input and its weights"
    if signed and node.op_type in FUSES:
        return "its output is quantised to int8, which onnxruntime fuses in part only; use uint8"
    return f"onnxruntime found no integer kernel for this form of {node.op_type}"


def _bias_off(model: Model, node: ir.Node) -> bool:
    if len(node.inputs) < 3 or not _dequantised(node.inputs[2]):
        return False
    makers = [v.producer() for v in node.inputs[:3] if v is not None]
    scales = [s for m in makers if m is not None and (s := model.constant(m.inputs[1])) is not None]
    return len(scales) == 3 and not np.allclose(scales[2], scales[0] * scales[1], rtol=1e-3, atol=0)


def _notes(model: Model, made: _Made) -> Iterator[str]:
    by_itself, each_run = [], []
    for node in model.nodes(*WEIGHTED):
        x, w = node.inputs[:2]
        found = made.find(node, _followed(node))
        if found is None or not _weight(model, w):
            continue
        if _dequantised(x) and not _dequantised(w) and found.op_type.startswith("Q"):
            by_itself.append(node.name)
        elif _dequantised(w) and not _dequantised(x) and made.reads_float(found, slice(1, 2)):
            each_run.append(node.name)
    if by_itself:
        yield (
            f"onnxruntime quantised the float weights of {_listed(by_itself)} by itself, per tensor, which ruins"
            " depthwise convolutions: leave no float layer between DequantizeLinear and QuantizeLinear, or run with the"
            " session entry optimization.disable_specified_optimizers=WeightBiasQuantization"
        )
    if each_run:
        yield f"the weights of {_listed(each_run)} are dequantised at every run"
    given = sum(1 for node in model.graph if node.op_type == "MatMulNBits")
    made_here = sum(1 for node in made.nodes if node.op_type == "MatMulNBits") - given
    if made_here > 0:
        yield (
            f"{made_here} MatMul with dequantised weights run as MatMulNBits, which rounds activations to 8 bits;"
            " the session entry session.qdq_matmulnbits_accuracy_level=1 is exact"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def standing(model: Model, found: Sequence[Kernel]) -> dict[str, str]:
    """Node of the model -> name of the kernel that does its work, alone or fused; "" where loading did it.

    Kernels carry the name of a node that they stand for, or that of a tensor that they make.
    """
    nodes = {node.name for node in model.graph}
    makers = {value.name: node.name for node in model.graph for value in node.outputs}
    order = {kernel.name: place for place, kernel in enumerate(found)}
    adding = {kernel.name for kernel in found if kernel.dims.get("sum") or "AddFusion" in kernel.name}
    done: dict[str, str] = {}  # those first that kernels are named after
    for kernel in found:
        base = re.sub(r"_token_\d+$", "", kernel.name).removeprefix("fused ").split("/")[0]
        base = base if kernel.kind == "Cast" else base.removeprefix(LOWERED)
        node = base if base in nodes else makers.get(base.removesuffix("_nchwc"))
        if node is not None:
            done.setdefault(node, kernel.name)
    made = [(makers[name], k) for k in found if "Reorder" not in k.kind for name in k.outputs if name in makers]
    for node, kernel in made:
        if kernel.kind not in MOVED:
            done.setdefault(node, kernel.name)
    ordered = list(model.graph)
    # A layer's activation, quantiser and shortcut belong to it, where nothing else reads what comes between; what
    # comes before a layer belongs to what reads it.
    for node in ordered:
        if node.name not in done and node.op_type in PARTS:
            alone = [v for v in node.inputs if v is not None and len(v.uses()) == 1 and not v.is_graph_output()]
            makes = [v.producer().name for v in alone if v.producer() is not None]
            before = [name for n in makes if (name := done.get(n)) and (node.op_type != "Add" or name in adding)]
            if before:
                done[node.name] = max(before, key=order.__getitem__)  # of two ends, the one that comes later
    for node, kernel in made:
        done.setdefault(node, kernel.name)
    for node in reversed(ordered):
        if node.name not in done:
            readers = [reader for value in node.outputs for reader, _ in value.uses()]
            done[node.name] = next((done[r.name] for r in readers if done.get(r.name)), "")
    return done
