"""Ranges by what layers make of a tensor's codes, not by the codes' own error.

    min_range  sum over readers of  E |f(Q(x)) - f(x)|^2 / Var f(x),   f = W x for a layer, x itself for others

What is cut off is cut off in many channels and places at once: a layer may add it up, or take it off again, as it does
not with rounding. Where a bias takes up the shift of the mean, that does not count. Nahshan et al. ("Loss aware
post-training quantization", Machine Learning, 2021) choose ranges by the loss of the network; this is the same a layer
at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from effc.contract import Context
from effc.extract import between, part
from effc.layers import WEIGHTED
from effc.model import Model
from effc.placement import Placement
from effc.quantize import Affine, affine
from effc.statistics import Bins
from effc.walk import Values, Walk, samples

SAMPLES = 32
SHARES = np.linspace(1.0, 0.4, 25)  # of the range that was seen


def output_ranges(
    model: Model, placement: Placement, start: Mapping[ir.Value, Affine], seen: Mapping[ir.Value, Bins],
    context: Context, *, corrected: bool,
) -> dict[ir.Value, Affine]:  # fmt: skip
    """Codes of each tensor, chosen anew where layers read it.

    Args:
        start: codes that stay where none are better.
        corrected: biases keep the mean outputs of layers that have one.
    """
    walk = Walk(model, context.backend, samples(model, context.calibration, SAMPLES), threads=context.threads)
    advance = context.progress("choosing ranges by what is made of them", len(start))
    found = dict(start)
    for value in (v for v in model.values() if v in start):
        targets = _targets(value, placement)
        if any(target is not value for target in targets):
            readers = _Readers(model, value, targets, walk, context, corrected)
            signed = start[value].zero.dtype.kind == "i"
            found[value] = min([start[value], *_options(seen[value], signed=signed)], key=readers.lost)
        advance(1)
    return found


class _Readers:
    """What is made of one tensor on calibration samples.

    Args:
        walk: on its way through the model, up to the tensor.
    """

    def __init__(
        self, model: Model, value: ir.Value, targets: Sequence[ir.Value], walk: Walk, context: Context, corrected: bool
    ) -> None:
        self.name, self.targets, self.corrected = value.name, targets, corrected
        layers = [target for target in targets if target is not value]
        nodes, entries = between(layers, {value.name})
        self.batches = walk.to(*(v.name for v in entries))
        alone = part(model, nodes, entries, layers, {v.name: self.batches[0][v.name].dtype for v in entries})
        self.session = context.backend.session(alone, threads=context.threads)
        self.wanted = [self._made(batch) for batch in self.batches]

    def lost(self, q: Affine) -> float:
        """Relative squared error of all that is made of the tensor's codes, without shifts that biases take up."""
        made = [self._made(batch | {self.name: q.decoded(batch[self.name])}) for batch in self.batches]
        return sum(_lost(made, self.wanted, t, centred=self.corrected and _has_bias(t)) for t in self.targets)

    def _made(self, batch: Values) -> Values:
        return batch | self.session.run(batch)


def _targets(value: ir.Value, placement: Placement) -> list[ir.Value]:
    """What the next layers make of a tensor's codes; where others read these, the tensor as it is there."""
    targets, waiting = [], [value]
    while waiting:
        here = waiting.pop()
        for node in here.consumers():
            if node in placement.passing:
                waiting.append(node.outputs[0])
            elif node in placement.integer and node.op_type in WEIGHTED:
                targets.append(node.outputs[0])
            else:
                targets.append(here)
    return list(dict.fromkeys(targets))


def _has_bias(target: ir.Value) -> bool:
    node = target.producer()
    return node is not None and node.op_type in WEIGHTED and node.op_type != "MatMul"


def _options(bins: Bins, *, signed: bool) -> list[Affine]:
    low, high = min(bins.minimum, 0.0), max(bins.maximum, 0.0)
    reach = max(-low, high)
    return [affine(max(low, -reach * s), min(high, reach * s), signed=signed) for s in SHARES]


def _lost(
    made: Sequence[Values], wanted: Sequence[Values], target: ir.Value, *, centred: bool
) -> float:  # fmt: skip
    """Mean squared distance over the variance of what is wanted, channels summed; centred: without the mean shift."""
    axis = -1 if target.producer() is not None and target.producer().op_type in ("Gemm", "MatMul") else 1
    count = moved = off = total = power = 0.0
    for a, b in zip(made, wanted, strict=True):
        have, aim = (np.moveaxis(t[target.name], min(axis, t[target.name].ndim - 1), -1) for t in (a, b))
        aim = aim.reshape(-1, aim.shape[-1]).astype(np.float64)
        apart = have.reshape(aim.shape) - aim
        count += len(aim)
        moved, off = moved + apart.sum(axis=0), off + (apart**2).sum(axis=0)
        total, power = total + aim.sum(axis=0), power + (aim**2).sum(axis=0)
    error = off / count - ((moved / count) ** 2 if centred else 0.0)
    variance = power / count - (total / count) ** 2
    return float(np.sum(error) / max(float(np.sum(variance)), 1e-30))
