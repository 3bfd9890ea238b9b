"""What single weights are worth: their size, the damage of their absence, or nothing (at random)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from effc import registry
from effc.contract import Context
from effc.errors import BadInput
from effc.finetune import torch_threads
from effc.model import Model
from effc.walk import samples

from ._prunable import Prunable

Saliency = Literal["magnitude", "obd", "obs", "random"]
SAMPLES = 4096  # of what is surely classified little is learnt: the curvature is that of a few


def scores(kind: Saliency, model: Model, layers: Sequence[Prunable], context: Context) -> dict[str, np.ndarray]:
    """Site -> a number for each weight: -1 for those that are zero already, which go first.

    magnitude: |w|. obd: h w^2 / 2, in nats a sample (LeCun, Denker, Solla 1990, equation 6). random: uniform.

    Raises:
        BadInput: obd without PyTorch, without calibration data, or of a model whose curvature is not known.
    """
    if kind == "obd":
        h = curvature(model, context)
        found = {p.site: 0.5 * h[p.name].astype(np.float64) * np.square(p.weight, dtype=np.float64) for p in layers}
    elif kind == "random":
        seeds = {p.site: [context.seed, zlib.crc32(p.name.encode())] for p in layers}
        found = {p.site: np.random.default_rng(seeds[p.site]).random(p.weight.shape) for p in layers}
    else:
        found = {p.site: np.abs(p.weight) for p in layers}
    return {p.site: np.where(p.weight == 0, -1, found[p.site]) for p in layers}


def curvature(model: Model, context: Context) -> Mapping[str, np.ndarray]:
    """Initializer -> d^2E/dw^2 on calibration data; known until the next edit."""
    if context.calibration is None:
        raise BadInput("saliency=obd needs calibration data: give --calibrate SPEC (Python: calibrate=...)")
    try:
        trainer = registry.trainer()
    except BadInput as error:
        raise BadInput("saliency=obd needs PyTorch: pip install 'effc[torch]'; magnitude does without") from error
    data = context.calibration

    def compute() -> Mapping[str, np.ndarray]:
        with torch_threads(context.threads):
            return trainer.curvature(trainer.view(model), samples(model, data, SAMPLES))

    return model.cached(("curvature", data.digest), compute, for_clones=True)
