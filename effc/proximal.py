"""Group lasso by proximal steps: groups of weights shrink while a network is trained, until so many of them are zero.

    w_g <- w_g max(0, 1 - s / |w_g|)

is the proximal operator of s |w_g|: a step along a subgradient would only come near zero (Yuan and Lin, "Model
selection and estimation in regression with grouped variables", 2006, section 2). It follows each step of the optimizer.
The penalty is truncated, as in the gradual sparsification of Lebedev and Lempitsky ("Fast ConvNets using group-wise
brain damage", CVPR 2016): only the smallest groups shrink, and how many these are rises to the goal k along
k (1 - (1 - t / T)^3) (Zhu and Gupta, "To prune, or not to prune", 2017, equation 1). A group that the loss needs grows
faster than it shrinks, and another takes its place among the smallest.

Groups of several layers are compared by LAMP, |w_g|^2 / sum of |w_h|^2 over those of its family that are not smaller
(Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021): no scale of a layer, which a batch
norm behind it takes back, counts for anything, and of each family the largest group stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

REACHED = 0.75  # share of the training after which the goal is reached, and zeros stay zero
TINY = 1e-300
WINDOW = 0.05  # share of the training in which the largest of the groups that shrink would be gone


@dataclass(frozen=True)
class Part:
    """A weight and the groups that its numbers belong to.

    Attributes:
        weight: initializer.
        groups: number of each number's group in its family, -1 for none; of the weight's rank, and of length 1 along
            axes where nothing changes.
    """

    weight: str
    groups: np.ndarray


@dataclass(frozen=True)
class Family:
    """Groups of one kind, numbered from 0: of one layer, or channels that are coupled alike."""

    name: str
    count: int
    parts: tuple[Part, ...]


class Shrinkage:
    """Shrinks groups of a network's weights in place, step by step.

    Args:
        families: the groups; weights that are not trained are left out, and families of no others.
        weights: initializer -> tensor that is trained for it (`effc.runtime.Trainer.weights`).
        goal: share of all groups to bring to zero.

    Attributes:
        count: of groups.
        aim: how many of them are to be zero.
        cut: how many had to be set to zero when the time for shrinking was over, and the largest share of its family's
            largest group that one of these still had; None before that, and where it was in a run gone on with.
    """

    def __init__(self, families: Sequence[Family], weights: Mapping[str, Any], goal: float) -> None:
        import torch

        trained = {name for name, weight in weights.items() if weight.requires_grad}
        families = [family for family in families if any(part.weight in trained for part in family.parts)]
        starts = np.cumsum([0, *(family.count for family in families)])
        self.count = int(starts[-1])
        self.aim = min(round(goal * self.count), self.count - len(families))
        self.cut: tuple[int, float] | None = None
        self._family = torch.from_numpy(np.repeat(np.arange(len(families)), np.diff(starts)))
        self._ends = torch.from_numpy(starts[1:] - 1)
        self._parts = [
            (weights[part.weight], torch.from_numpy(np.where(part.groups < 0, self.count, part.groups + start)))
            for family, start in zip(families, starts.tolist(), strict=False) for part in family.parts
            if part.weight in trained
        ]  # fmt: skip
        self._zero: torch.Tensor | None = None

    def settled(self, done: float) -> bool:
        """Whether the goal is reached when so large a share of the training is done."""
        return done >= REACHED

    def resume(self, done: float) -> None:
        """Go on with weights of a training that was interrupted there."""
        if self.settled(done):
            self._zero = self.norms() == 0

    def norms(self) -> torch.Tensor:
        """[count] |w_g|."""
        import torch

        total = torch.zeros(self.count + 1, dtype=torch.float64)
        for weight, groups in self._parts:
            squares = weight.detach().square()
            if alike := [axis for axis, size in enumerate(groups.shape) if size == 1]:
                squares = squares.sum(alike, keepdim=True, dtype=torch.float64)
            total.index_add_(0, groups.reshape(-1), squares.reshape(-1).double().cpu())
        return total[:-1].sqrt()

    def step(self, step: int, steps: int) -> None:
        """Shrink what is to shrink behind a step of the optimizer, the first being 0, of so many in all."""
        import torch

        if self._zero is not None:
            self._scale(torch.where(self._zero, 0.0, 1.0))
            return
        done = (step + 1) / steps
        norms, factors = self.norms(), torch.ones(self.count, dtype=torch.float64)
        least = self._least(norms, round(self.aim * (1 - (1 - min(done / REACHED, 1.0)) ** 3)))
        by = self._largest(norms, least)[self._family[least]] / max(WINDOW * steps, 1.0)
        factors[least] = shrunk(norms[least], by)
        if self.settled(done):
            self._zero = torch.zeros(self.count, dtype=torch.bool).index_fill_(0, least, True)
            left = (norms * factors / self._largest(norms)[self._family].clamp_min(TINY))[least]
            self.cut = int((left > 0).sum()), float(left.max()) if len(left) else 0.0
            factors[least] = 0.0
        self._scale(factors)

    def _least(self, norms: torch.Tensor, number: int) -> torch.Tensor:
        """So many groups with the lowest LAMP scores; of equals the first."""
        import torch

        order = torch.argsort(norms, stable=True)
        order = order[torch.argsort(self._family[order], stable=True)]  # family by family, the smallest first
        squares = (norms / self._largest(norms)[self._family].clamp_min(TINY))[order].square()
        sums = squares.cumsum(0)
        not_smaller = sums[self._ends][self._family[order]] - sums + squares
        scores = squares / not_smaller.clamp_min(TINY)
        scores[self._ends] = torch.inf  # the largest of each family
        return order[torch.argsort(scores, stable=True)[:number]]

    def _largest(self, norms: torch.Tensor, groups: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """[families] the largest norm among groups of each, 0 where none is among them."""
        zeros = norms.new_zeros(len(self._ends))
        return zeros.scatter_reduce_(0, self._family[groups], norms[groups], "amax")

    def _scale(self, factors: torch.Tensor) -> None:
        """Multiply the weights of each group with a number."""
        import torch

        every = torch.cat([factors, torch.ones(1, dtype=factors.dtype)])
        with torch.no_grad():
            for weight, groups in self._parts:
                weight.mul_(every[groups].to(weight))


def shrunk(norms: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """What the proximal operator of `by` |w| multiplies vectors of such norms with: max(0, 1 - by / norm)."""
    import torch

    return torch.where(norms > by, 1 - by / norms.clamp_min(TINY), 0.0)
