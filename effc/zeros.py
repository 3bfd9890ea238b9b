"""Weights that were pruned stay zero in training. That they were is read off them: nothing else marks a mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from effc.layers import WEIGHTED
from effc.model import Model
from effc.runtime import Trainer

# Trained floats are next to never exactly 0; codes of 8 bits are, where few codes do for most weights.
LEAST, LEAST_CODES = 0.05, 0.5
LAYERS = (*WEIGHTED, "ConvTranspose")


def sparser(model: Model, original: Model) -> set[str]:
    """Tensors that layers make whose weights hold more zeros than in the original."""
    found, known = set(), original.graph.initializers
    for node in model.nodes(*LAYERS):
        name = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
        here, there = (own.get(name) for own in (model.graph.initializers, known))
        if here is None or there is None or here.const_value is there.const_value:
            continue
        left = [np.count_nonzero(v.const_value.numpy()) / max(v.const_value.size, 1) for v in (here, there)]
        if left[0] < left[1]:
            found |= {value.name for value in node.outputs}
    return found


def is_sparse(weight: np.ndarray) -> bool:
    """Whether so many weights of a layer are zero that they were made so: 5 %."""
    return np.count_nonzero(weight) <= (1 - LEAST) * weight.size


def hold_zeros(trainer: Trainer, view: Any, model: Model) -> list[str]:
    """Mask the weights of layers of which so large a share is zero: 5 %, of integer codes 50 %; what to tell of it."""
    zeros = total = layers = 0
    for name, weight in trainer.weights(view).items():
        value = model.graph.initializers.get(name)
        if value is None or weight.ndim < 2:
            continue
        readers = [(reader.op_type, place) for reader, place in value.uses()]
        coded = ("DequantizeLinear", 0) in readers
        if not coded and not any(op in LAYERS and place == 1 for op, place in readers):
            continue
        kept = (weight.detach() != 0).cpu().numpy()
        own = int(kept.size - np.count_nonzero(kept))
        if own >= (LEAST_CODES if coded else LEAST) * kept.size:
            trainer.mask(view, name, kept)
            zeros, total, layers = zeros + own, total + kept.size, layers + 1
    if not layers:
        return []
    return [f"recover: {zeros:,} of {total:,} weights of {layers} sparse layers are zero and stayed so"]
