"""Training part by part: each part that was rewritten, towards the tensor that the original has behind it.

A part has few weights and a target for every one of its numbers, so that a few hundred samples without labels suffice,
where training the whole would learn them by heart. What a part reads comes from the model as trained so far, so that
later parts make up for what earlier ones left (layer by layer: Zhang et al., TPAMI 2016, section 3.2, with gradients in
place of regression; block by block: Li et al., "BRECQ", ICLR 2021, section 3.2).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from effc import edit, registry
from effc.contract import Context
from effc.data import Data, open_data
from effc.distillation import Loss
from effc.extract import between, part
from effc.finetune import Finetune, Fitted, torch_threads
from effc.model import Model, constant_tensor
from effc.schedule import Schedule
from effc.walk import Walk, samples
from effc.zeros import LAYERS, hold_zeros, sparser

SAMPLES = 4096  # at most; fewer where they take too much memory (`walk.samples`)
By = Literal["whole", "block", "layer"]


@dataclass(frozen=True)
class Part:
    """What lies between some tensors and one behind it.

    Attributes:
        entries: what it reads.
        end: what it makes, and the original makes too.
    """

    entries: tuple[str, ...]
    end: str


def made(model: Model) -> dict[str, tuple]:
    """Float tensor of known shape -> the node that makes it, and the shape."""
    shapes = model.shapes()
    values = [(value, node) for node in model.graph for value in node.outputs]
    return {
        value.name: (node.name, shapes[value.name]) for value, node in values
        if shapes.get(value.name) and value.dtype in (None, ir.DataType.FLOAT)
    }  # fmt: skip


def rewritten(model: Model, others: Sequence[Model]) -> list[str]:
    """Tensors that all models have, of one shape, and that other nodes make in the model than in the others."""
    own, *rest = (made(each) for each in (model, *others))
    return [
        name for name, (node, *kind) in own.items()
        if all(name in o and o[name][0] != node and o[name][1:] == (*kind,) for o in rest)
    ] if rest else []  # fmt: skip


def coded(model: Model) -> set[str]:
    """What layers make whose weights are decoded from integers."""
    found = set()
    for node in model.nodes(*LAYERS):
        decoder = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if decoder is not None and decoder.op_type == "DequantizeLinear" and decoder.inputs[0].is_initializer():
            found |= {value.name for value in node.outputs}
    return found


def parts(model: Model, original: Model, by: By) -> list[Part]:
    """The parts that hold rewritten nodes, in order.

    Layers lie between tensors that both models have. Blocks lie between those of them that all paths lead through.
    """
    own, there = made(model), made(original)
    changed = set(rewritten(model, [original])) | sparser(model, original) | coded(model)
    common = {name for name, (_, *kind) in own.items() if name in there and there[name][1:] == (*kind,)}
    ends = common if by == "layer" else common & _through(model)
    found = []
    for node in model.graph:
        for value in node.outputs:
            if value.name not in ends:
                continue
            nodes, entries = between([value], ends - {value.name})
            if changed & {v.name for n in nodes for v in n.outputs}:
                found.append(Part(tuple(v.name for v in entries), value.name))
    return found


def _through(model: Model) -> set[str]:
    """Tensors that all paths from inputs to outputs lead through, and the outputs."""
    readers = {v: len(v.uses()) for v in model.values() if not v.is_initializer() and constant_tensor(v) is None}
    outputs = set(model.graph.outputs)
    waiting = {v for v in model.graph.inputs if v in readers}
    found = {v.name for v in outputs}
    for node in model.graph:
        for value in node.inputs:
            if value in readers:
                readers[value] -= 1
                if not readers[value]:
                    waiting.discard(value)
        waiting |= {v for v in node.outputs if readers.get(v) and v not in outputs}
        if len(waiting) == 1:
            found |= {v.name for v in waiting}
    return found


def train_parts(
    model: Model, original: Model, by: By, schedule: Schedule, validation: float, where: str, context: Context,
    *, keep_zeros: bool = True,
) -> list[str]:  # fmt: skip
    """Train the rewritten parts of a model in place; what is worth telling, one sentence each.

    Args:
        schedule: of each part.
        validation: share of the samples that is held out, to judge epochs.
        where: "cpu" or "cuda".
        keep_zeros: weights that were pruned stay zero.

    Raises:
        BadInput: data do not fit.
    """
    assert context.training is not None
    feeds = samples(model, context.training.for_model(model).shuffled(context.seed), SAMPLES)
    planned = parts(model, original, by)
    keep = {name for each in planned for name in each.entries}
    here = Walk(model, context.backend, feeds, threads=context.threads, keep=keep)
    there = Walk(original, context.backend, feeds, threads=context.threads, keep={each.end for each in planned})
    advance = context.progress(f"training {by} by {by}", len(planned))
    began, seconds = time.monotonic(), schedule.seconds
    schedule = replace(schedule, frozen_norms=True, seconds=None)  # too few samples for statistics
    fitted: list[Fitted] = []
    count, late = 0, []
    for number, each in enumerate(planned):
        if seconds is not None and fitted and time.monotonic() - began >= seconds:
            left = f"{len(planned) - number} of {len(planned)} {by}s"
            late = [f"recover: {left} stayed: the {seconds:g} seconds were over"]
            break
        inputs, target = here.to(*each.entries), there.to(each.end)
        data = _data([{**read, _TARGET: wanted[each.end]} for read, wanted in zip(inputs, target, strict=True)])
        count = len(data)
        if (one := _fit(model, each, data, schedule, validation, where, context, keep_zeros)) is not None:
            fitted.append(one)
        there.release(each.end)
        for name in set(each.entries).difference(*(later.entries for later in planned[number + 1 :])):
            here.release(name)
        advance(1)
    return [_told(fitted, by, count), *late]


_TARGET = "target of the part"


def _data(batches: Sequence[Mapping[str, np.ndarray]]) -> Data:
    return open_data({"source": {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}})


def _fit(
    model: Model, each: Part, data: Data, schedule: Schedule, validation: float, where: str, context: Context,
    keep_zeros: bool,
) -> Fitted | None:  # fmt: skip
    """Train one part and put its weights into the model; None where it has none of its own."""
    trainer = registry.trainer()
    nodes, entries = between([model.value(each.end)], each.entries)
    first = next(data.batches(1)).feeds
    alone = part(model, nodes, entries, [model.value(each.end)], {v.name: first[v.name].dtype for v in entries})
    view = trainer.view(alone)
    trainer.compose(view)
    if keep_zeros:
        hold_zeros(trainer, view, alone)
    for name, weight in trainer.weights(view).items():
        if any(reader not in nodes for reader in model.value(name).consumers()):
            weight.requires_grad_(False)  # others read it too
    if not any(p.requires_grad for p in view.parameters()):
        return None
    held_out, rest = data.split(validation)
    with torch_threads(context.threads):
        fitted = Finetune(
            view, [v.name for v in entries], [], rest, held_out, Loss(features=1.0), schedule, features=[each.end],
            wanted=lambda feeds: {each.end: feeds[_TARGET]}, device=where, seed=context.seed,
        ).run()  # fmt: skip
    trainer.write_back(view, alone)
    for name in trainer.weights(view):
        edit.set_initializer(model, model.value(name), alone.graph.initializers[name].const_value)
    return fitted


def _told(fitted: Sequence[Fitted], by: By, count: int) -> str:
    if not fitted:
        return f"recover: no {by} was rewritten between tensors that the original has too: nothing was trained"
    before, after = np.mean([(f.scores[0][1], f.scores[f.best][1]) for f in fitted], axis=0)
    kept, stopped = sum(f.best == 0 for f in fitted), sum(f.ended is not None for f in fitted)
    what = by if len(fitted) == 1 else f"{by}s"
    return (
        f"recover: {len(fitted)} {what} on {count} samples, mean relative squared error {before:.3g} to {after:.3g} on "
        f"those held out; {kept} stayed as they were, {stopped} ended early"
    )
