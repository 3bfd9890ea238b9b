"""What a student is to come close to, as a loss: the outputs of a teacher, labels, and inner tensors.

    L = (1 - a) T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + a CE(y, softmax(z_s)) + b sum_l |f_l - f'_l|^2 / |f_l|^2

Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network" (2015, section 2): T^2 keeps the soft part's
gradients at the scale of the hard part's. Outputs that are no class scores are compared by their relative squared
error. The features are those that a rewrite should have kept (FitNets, Romero et al. 2015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from effc.errors import BadInput
from effc.evaluate import are_probabilities

if TYPE_CHECKING:
    import torch

FLOOR = 1e-12  # of a probability whose logarithm is taken


@dataclass(frozen=True)
class Loss:
    """The loss of a student's outputs on a batch.

    Attributes:
        temperature: T.
        labels: a, weight of the labels; the teacher has the rest. 0 without labels, 1 without a teacher.
        features: b.
        probabilities: outputs of class scores that are probabilities already: their logarithm takes the place of z.
    """

    temperature: float = 4.0
    labels: float = 0.1
    features: float = 0.0
    probabilities: frozenset[str] = frozenset()

    def __call__(
        self,
        made: Mapping[str, torch.Tensor],
        wanted: Mapping[str, torch.Tensor],
        labels: torch.Tensor | None,
        inner: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> torch.Tensor:
        """The mean over samples, a scalar.

        Args:
            made: the student's outputs; none where inner tensors alone count.
            wanted: the teacher's; empty without one.
            labels: [N] classes, or None.
            inner: pairs of the student's and the teacher's inner tensors.
        """
        import torch
        from torch.nn import functional as F

        some = next((own for own, _ in inner), None) if not made else next(iter(made.values()))
        total = torch.zeros((), device=None if some is None else some.device)
        if labels is not None and self.labels:
            name = next(name for name, output in made.items() if _scores(output))
            total = total + self.labels * F.cross_entropy(self._logits(name, made[name]), labels)
        share = 1.0 - self.labels if labels is not None else 1.0
        if wanted and share:
            parts = [self._apart(name, made[name], wanted[name]) for name in wanted]
            total = total + share * sum(parts) / len(parts)
        for own, other in inner if self.features else ():
            total = total + self.features * _relative(own, other)
        return total

    def _apart(self, name: str, made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional as F

        if not _scores(wanted):
            return _relative(made, wanted)
        t = self.temperature
        soft = F.log_softmax(self._logits(name, wanted) / t, dim=1)
        own = F.log_softmax(self._logits(name, made) / t, dim=1)
        return t * t * F.kl_div(own, soft, reduction="batchmean", log_target=True)

    def _logits(self, name: str, output: torch.Tensor) -> torch.Tensor:
        output = output.float()
        return output.clamp_min(FLOOR).log() if name in self.probabilities else output


def _scores(output: torch.Tensor) -> bool:
    return output.ndim == 2 and output.shape[1] > 1 and output.is_floating_point()


def _relative(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """|made - wanted|^2 / |wanted|^2."""
    made, wanted = made.float(), wanted.float()
    return (made - wanted).square().sum() / wanted.square().sum().clamp_min(FLOOR)


def ensemble(
    outputs: Sequence[Mapping[str, np.ndarray]], mean: Literal["arithmetic", "geometric"]
) -> dict[str, np.ndarray]:
    """What several teachers say together, output by output.

    Class scores [N, C]: the logarithm of the mean of probabilities (arithmetic), or the mean of logits (geometric:
    the normalised geometric mean of probabilities). Probabilities stay probabilities. Other outputs: their mean.
    """
    first = outputs[0]
    for other in outputs[1:]:
        for name, array in first.items():
            if name not in other or other[name].shape != array.shape:
                found = f"one of {other[name].shape}" if name in other else f"only {', '.join(other)}"
                raise BadInput(f"a teacher has an output {name!r} of {array.shape}, another {found}: they must match")
    if len(outputs) == 1:
        return dict(first)
    found = {}
    for name, array in first.items():
        each = [np.asarray(o[name], np.float64) for o in outputs]
        if array.ndim != 2 or array.shape[1] < 2:
            found[name] = np.mean(each, axis=0)
        elif are_probabilities(array):
            joint = np.mean(each, axis=0) if mean == "arithmetic" else np.exp(np.mean(np.log(_floored(each)), axis=0))
            found[name] = joint / joint.sum(axis=1, keepdims=True)
        elif mean == "geometric":
            found[name] = np.mean(each, axis=0)
        else:
            shares = [np.exp(a - a.max(axis=1, keepdims=True)) for a in each]
            found[name] = np.log(_floored(np.mean([s / s.sum(axis=1, keepdims=True) for s in shares], axis=0)))
    return {name: array.astype(first[name].dtype) for name, array in found.items()}


def _floored(array: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    return np.maximum(np.asarray(array), FLOOR)
