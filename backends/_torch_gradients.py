"""Gradients of the loss by the weights, sample by sample: their mean, their squares, and what units add up to.

    fisher_k = E_n g_nk^2        taylor_u = E_n |sum_(k in u) g_nk w_k|        fisher_u = E_n (sum_(k in u) g_nk w_k)^2

The square of a sum of samples is no sum of squares, so samples go backwards one by one. sum g w is to first order the
rise of a sample's loss when all weights of u are taken away (Molchanov et al., "Importance estimation for neural
network pruning", CVPR 2019, equations 6 and 8; Theis et al., "Faster gaze prediction with dense networks and Fisher
pruning", 2018, section 2.1: half its mean square is the rise to second order).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from effc.errors import BadInput
from effc.evaluate import class_labels
from effc.runtime import Gradients, Slice

from ._torch_outputs import Outputs, feeding, judged


def gradients(
    view: fx.GraphModule,
    feeds: Iterable[Mapping[str, np.ndarray]],
    labels: Sequence[np.ndarray] | None = None,
    *,
    units: Sequence[Slice] = (),
    seed: int = 0,
) -> Gradients:
    """See `effc.runtime.Trainer.gradients`."""
    with judged(view, feeds) as (batches, outputs, trained):
        sums = _Sums(trained, units)
        generator = torch.Generator().manual_seed(seed)
        for number, batch in enumerate(batches):
            given = None if labels is None else np.asarray(labels[number])
            for at, inputs in enumerate(_single(view, batch)):
                made = outputs.differentiable(view(*inputs))
                loss = _loss(outputs, made, None if given is None else given[at : at + 1], generator)
                sums.add(torch.autograd.grad(loss, list(trained.values()), allow_unused=True))
    return sums.result(outputs.samples)


def _single(view: fx.GraphModule, batch: Mapping[str, np.ndarray]) -> Iterable[list[Tensor]]:
    """The inputs of each sample."""
    inputs = feeding(view, batch)
    count = max((len(x) for x in inputs if x.dim()), default=1)
    if any(not x.dim() or len(x) != count for x in inputs):
        raise BadInput("gradients are taken sample by sample: every input needs the batch as its first axis")
    return ([x[at : at + 1] for x in inputs] for at in range(count))


def _loss(outputs: Outputs, made: Mapping[str, Tensor], label: np.ndarray | None, draw: torch.Generator) -> Tensor:
    if not made:
        raise BadInput("no output depends on a trained weight")
    if label is None:
        return sum((outputs.drawn(name, y, draw) for name, y in made.items()), torch.zeros(()))
    name = next((name for name in made if name in outputs.scores), None)
    if name is None:
        raise BadInput("labels need an output of class scores [N, C > 1]; leave them out")
    y = made[name]
    return outputs.cross_entropy(name, y, torch.from_numpy(class_labels(label, y.shape[1], "labels")).to(y.device))


class _Sums:
    """Over samples, of gradients, of their squares, and of what each unit adds up to."""

    def __init__(self, trained: Mapping[str, Tensor], units: Sequence[Slice]) -> None:
        self.trained = trained
        self.mean = {name: torch.zeros_like(w) for name, w in trained.items()}
        self.squares = {name: torch.zeros_like(w) for name, w in trained.items()}
        self.slices = [(s.weight, s.axis, _labels(s, trained)) for s in units]
        count = max((int(labels.max()) + 1 for *_, labels in self.slices if labels.numel()), default=0)
        self.signed, self.absolute, self.squared = (torch.zeros(count, dtype=torch.float64) for _ in range(3))

    def add(self, found: Sequence[Tensor | None]) -> None:
        """One sample more."""
        named = {n: g for n, g in zip(self.trained, found, strict=True) if g is not None}
        for name, g in named.items():
            self.mean[name] += g
            self.squares[name] += g.square()
        if not self.slices:
            return
        products = {s[0]: named[s[0]] * self.trained[s[0]].detach() for s in self.slices if s[0] in named}
        unit = torch.zeros_like(self.signed)
        for name, axis, labels in self.slices:
            if name not in products:
                continue
            each = products[name]
            each = each if axis is None else each.movedim(axis, 0).flatten(1).sum(1) if each.dim() > 1 else each
            unit.index_add_(0, labels[labels >= 0], each.reshape(-1)[labels >= 0].cpu().double())
        self.signed += unit
        self.absolute += unit.abs()
        self.squared += unit.square()

    def result(self, samples: int) -> Gradients:
        mean, squares = (
            {name: (t / samples).cpu().float().numpy() for name, t in each.items()}
            for each in (self.mean, self.squares)
        )
        per_unit = [(each / samples).numpy() for each in (self.signed, self.absolute, self.squared)]
        return Gradients(mean, squares, *per_unit)


def _labels(one: Slice, trained: Mapping[str, Tensor]) -> Tensor:
    """Unit of each index along the slice's axis, or of each number. Raises BadInput for what does not fit."""
    if one.weight not in trained:
        raise BadInput(f"no trained weight {one.weight!r} to take units of; there are {', '.join(trained)}")
    shape = tuple(trained[one.weight].shape)
    wanted = shape if one.axis is None else shape[one.axis : one.axis + 1]
    if np.shape(one.units) != wanted:
        raise BadInput(f"units of {one.weight!r} are {np.shape(one.units)}, along axis {one.axis} there are {wanted}")
    return torch.from_numpy(np.asarray(one.units, np.int64).reshape(-1))
