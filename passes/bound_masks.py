"""softmax(s + m) -> softmax(s + max(m, -60)): what a mask hides gets a weight of e^-60 in place of 0.

    softmax(Where(c, s, -inf))  ->  softmax(Where(c, s, min(s) - 30))        with calibration data, which tell min(s)

A weight of e^-60 is lost in float32's rounding of the sum, so outputs stay. But masks of -3.4e38, -1e9 or -inf send the
exponential to where it makes zeros and denormal numbers, and there onnxruntime's Softmax is ten times slower (4.1
instead of 0.4 ns an element on a processor with AVX-512).

A row that is masked throughout has no right answer (uniform weights with -3.4e38, NaN with -inf); it gets the unmasked
one here. How far scores spread is looked at where there are calibration data; else the check of an exact pass is all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.errors import PassFailed
from effc.model import STANDARD_DOMAINS, Model, constant_tensor
from effc.statistics import Request

# Spread of the scores in a row, at most -> mask: a hidden score weighs e^(spread + mask) at most, 2e-8 and less; the
# exponential is fast down to e^-87, the least normal number of float32.
BOUNDS = {27.0: -60.0, 36.0: -54.0}
BELOW = 30.0  # a filled-in score lies so far below the least that was seen: e^-30 = 9e-14
HUGE = 1e3  # constants of this size make masks
NODES = 200  # that may make one mask
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Min", "Max", "Concat", "Sum")  # all inputs are numbers of the mask
MOVING = (
    "Cast", "CastLike", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Pad", "Reshape", "Slice", "Split",
    "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
)  # the first input is  # fmt: skip
MADE = (
    "And", "Constant", "ConstantOfShape", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual",
    "Not", "Or", "Range", "Shape", "Size", "Xor",
)  # none is  # fmt: skip
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast")


@dataclass(frozen=True)
class Scores(Request):
    """Least value of a tensor, and the widest range within a row, its last axis -> (least, spread)."""

    def start(self) -> _ScoresAccumulator:
        return _ScoresAccumulator()


class _ScoresAccumulator:
    def __init__(self) -> None:
        self.least, self.spread = np.inf, 0.0

    def update(self, values: np.ndarray, *beside: np.ndarray) -> None:
        if values.size:
            low, high = values.min(axis=-1), values.max(axis=-1)
            self.least = min(self.least, float(low.min()))
            self.spread = max(self.spread, float((high - low).max()))

    def result(self) -> tuple[float, float]:
        return self.least, self.spread


@dataclass(frozen=True)
class BoundMasks(Pass):
    """Masks before Softmax that are no lower than they must be."""

    name: ClassVar[str] = "bound-masks"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        sites = {node: _masked(node) for node in model.nodes("Softmax")}
        requests = {found[0]: Scores(found[0].name) for found in sites.values() if not isinstance(found, str)}
        known = context.statistics(model, requests.values()) if requests and context.calibration is not None else {}
        for node, found in sites.items():
            if isinstance(found, str):
                yield Skipped(node.name, found)
                continue
            score, reader, index = found
            bound = _level(known.get(requests[score]), reader.op_type == "Where")
            if isinstance(bound, str):
                yield Skipped(node.name, bound)
            elif _lowest(reader.inputs[index]) >= bound and constant_tensor(reader.inputs[index]) is not None:
                yield Skipped(node.name, "its mask is low enough and no lower")
            else:
                yield Proposal(node.name, (reader.name, node.name), {"bound": bound}, damage=0.0)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        bounded: dict[tuple, ir.Value] = {}
        for node, bound in [(model.node(p.site), p.setting["bound"]) for p in chosen]:
            found = _masked(node)
            if isinstance(found, str):
                raise PassFailed(f"{self.name}: {node.name!r} has no mask to bound: {found}")
            _, reader, index = found
            mask = reader.inputs[index]
            key = (mask, bound)
            if key not in bounded:
                bounded[key] = _bound(model, mask, bound, reader)
            edit.set_input(model, reader, index, bounded[key])


def _level(seen: tuple[float, float] | None, filled: bool) -> float | str:
    """How low a mask has to be, or why that is not known. `seen`: least score, and spread of a row."""
    if filled:
        if seen is None:
            return "masked positions are filled in: how far down is enough takes calibration data"
        return float(seen[0] - BELOW) if seen[0] > -HUGE / 10 else f"scores go down to {seen[0]:.3g} by themselves"
    spread = 0.0 if seen is None else seen[1]
    fitting = [bound for most, bound in BOUNDS.items() if spread <= most]
    return (
        fitting[0] if fitting else f"its scores spread over {spread:.3g} in a row; {max(BOUNDS):g} can be masked by -54"
    )


def _bound(model: Model, mask: ir.Value, bound: float, reader: ir.Node) -> ir.Value:
    """max(mask, bound), computed now for a constant, else once for all that read it."""
    tensor = constant_tensor(mask)
    if tensor is not None:
        numbers = tensor.numpy()
        return edit.add_initializer(model, f"{mask.name}_bounded", np.maximum(numbers, numbers.dtype.type(bound)))
    least = edit.add_initializer(model, f"{mask.name}_bound", np.asarray(bound, np.float32))
    node = edit.make_node(model, "Max", [mask, least], name=f"{mask.name}_bounded", origin=[mask.producer()])
    node.outputs[0].shape, node.outputs[0].type = mask.shape, ir.TensorType(ir.DataType.FLOAT)
    edit.insert_after(model, mask.producer(), [node])
    return node.outputs[0]


def _masked(softmax: ir.Node) -> tuple[ir.Value, ir.Node, int] | str:
    """Scores, the Add or Where that masks them, and which of its inputs is the mask; or why nothing is found."""
    reader = softmax.inputs[0].producer()
    while reader is not None and reader.op_type in VIEWS and len(reader.outputs[0].uses()) == 1:
        reader = reader.inputs[0].producer()
    if reader is None or reader.domain not in STANDARD_DOMAINS or reader.op_type not in ("Add", "Where"):
        return "nothing masks its input"
    out = reader.outputs[0]
    if out.dtype not in (ir.DataType.FLOAT, None):
        return f"its input is {out.dtype}; float32 is bounded"
    if out.is_graph_output() or not _leads_to_softmax(out):
        return "its input is read elsewhere"
    places = (1, 2) if reader.op_type == "Where" else (0, 1)
    for index, other in (places, places[::-1]):
        mask, score = reader.inputs[index], reader.inputs[other]
        if reader.op_type == "Where" and constant_tensor(mask) is None:
            continue
        if makes_mask(mask) and not makes_mask(score):
            return score, reader, index
    return "nothing masks its input"


def _leads_to_softmax(value: ir.Value) -> bool:
    readers = [use.node for use in value.uses()]
    return all(r.op_type == "Softmax" or (r.op_type in VIEWS and _leads_to_softmax(r.outputs[0])) for r in readers)


def makes_mask(value: ir.Value) -> bool:
    """Whether a tensor's numbers come of constants and logic alone, a huge constant among them."""
    waiting, seen, huge = [value], {value}, False
    while waiting:
        each = waiting.pop()
        maker = each.producer()
        if constant_tensor(each) is not None:
            huge = huge or _lowest(each) <= -HUGE or _highest(each) >= HUGE
        elif maker is None:
            if each.dtype is None or each.dtype.is_floating_point():
                return False  # an input with numbers of any kind
        else:
            numbers = _numbers(maker)
            if numbers is None or len(seen) > NODES:
                return False
            filler = maker.attributes.get("value") if maker.op_type == "ConstantOfShape" else None
            huge = huge or (filler is not None and abs(float(filler.as_tensor().numpy().flat[0])) >= HUGE)
            seen.update(numbers)
            waiting += numbers
    return huge


def _numbers(node: ir.Node) -> list[ir.Value] | None:
    """The inputs whose numbers may come out of a node; None where it computes others."""
    if node.domain not in STANDARD_DOMAINS:
        return None
    if node.op_type in MADE:
        return []
    if node.op_type == "Max" and any(-HUGE < _lowest(v) < np.inf for v in node.inputs):
        return []  # bounded already
    if node.op_type == "Where":
        return list(node.inputs[1:])
    if node.op_type in ("ScatterND", "ScatterElements"):
        return [node.inputs[0], node.inputs[2]]
    if node.op_type in MOVING:
        return list(node.inputs[:1])
    return [v for v in node.inputs if v is not None] if node.op_type in ARITHMETIC else None


def _lowest(value: ir.Value) -> float:
    tensor = constant_tensor(value)
    return float(tensor.numpy().min(initial=np.inf)) if _floats(tensor) else np.inf


def _highest(value: ir.Value) -> float:
    tensor = constant_tensor(value)
    return float(tensor.numpy().max(initial=-np.inf)) if _floats(tensor) else -np.inf


def _floats(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
