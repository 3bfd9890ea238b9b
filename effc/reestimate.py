"""Batch norms whose layers have changed get their statistics anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effc.data import Data


def reestimate(view: Any, inputs: Sequence[str], data: Data, batch: int, batches: int) -> None:
    """Statistics of batch norms from data, as plain averages over so many batches; other weights stay."""
    import torch

    norms = [m for m in view.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms or not batches:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    view.train()
    with torch.no_grad():
        for number, part in enumerate(data.batches(batch)):
            if number == batches:
                break
            view(*(torch.from_numpy(part.feeds[name]) for name in inputs))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    view.eval()
