"""What a network's error is made of where weights are judged: cross entropy of class scores, squared error of the rest.

The targets are the network's own outputs, or labels. Then the error's second derivative by the outputs is known, and so
is the distribution that gradients are drawn from in the Fisher information (Martens, "New insights and perspectives on
the natural gradient method", JMLR 2020, section 9).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from effc.errors import BadInput
from effc.evaluate import are_probabilities

from ._torch_view import names_of, weights
from ._torch_weights import to_torch

Batch = Mapping[str, np.ndarray]
FLOOR = 1e-12  # of a probability that is divided by, or whose logarithm is taken


def feeding(view: fx.GraphModule, feeds: Mapping[str, np.ndarray]) -> list[Tensor]:
    """Inputs in the view's order, on its device. Raises BadInput for one that is missing."""
    names = names_of(view).inputs
    if missing := [name for name in names if name not in feeds]:
        raise BadInput(f"input {missing[0]!r} is missing; there are {', '.join(sorted(feeds)) or 'none'}")
    device = next((p.device for p in view.parameters()), torch.device("cpu"))
    return [to_torch(np.asarray(feeds[name])).to(device) for name in names]


@contextmanager
def judged(view: fx.GraphModule, feeds: Iterable[Batch]) -> Iterator[tuple[list[Batch], Outputs, dict[str, Tensor]]]:
    """A view in eval mode as long as its weights are judged: its batches, its outputs, and the weights it trains."""
    batches, training = list(feeds), view.training
    view.eval()
    try:
        yield batches, Outputs.of(view, batches), {n: w for n, w in weights(view).items() if w.requires_grad}
    finally:
        view.train(training)


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network that count, and how.

    Attributes:
        names: of all outputs, in order.
        scores: output of class scores [N, C > 1] -> whether they are probabilities.
        power: any other output of floats -> mean |y|^2 of a sample.
        samples: how many there are.
    """

    names: tuple[str, ...]
    scores: Mapping[str, bool]
    power: Mapping[str, float]
    samples: int

    @classmethod
    def of(cls, view: fx.GraphModule, batches: Sequence[Mapping[str, np.ndarray]]) -> Outputs:
        """As one run over the samples shows them. Raises BadInput where there are none."""
        if not batches:
            raise BadInput("there are no samples to judge weights by")
        names, samples, power = names_of(view).outputs, 0, {}
        scores: dict[str, bool] = {}
        for batch in batches:
            inputs = feeding(view, batch)
            samples += len(inputs[0]) if inputs and inputs[0].dim() else 1
            if scores and not power:
                continue  # nothing more to learn: class scores alone
            with torch.no_grad():
                made = dict(zip(names, _tuple(view(*inputs)), strict=True))
            for name, y in made.items():
                if y.is_floating_point() and y.dim() == 2 and y.shape[1] > 1:
                    scores[name] = scores.get(name, True) and are_probabilities(y.float().cpu().numpy())
                elif y.is_floating_point():
                    power[name] = power.get(name, 0.0) + float(y.double().square().sum())
        if not scores and not power:
            raise BadInput(f"none of the outputs {', '.join(names)} holds floats: weights cannot be judged by them")
        return cls(names, scores, {name: max(p / samples, FLOOR) for name, p in power.items()}, samples)

    def differentiable(self, made: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """The outputs that count and depend on a trained weight."""
        named = zip(self.names, _tuple(made), strict=True)
        return {n: y for n, y in named if (n in self.scores or n in self.power) and y.requires_grad}

    def curvature(self, name: str, y: Tensor) -> Tensor:
        """d^2E/dy^2 of an output, number by number, for each sample of its own."""
        if name in self.power:
            return torch.full_like(y, 2 / self.power[name]) / self._count
        if self.scores[name]:
            return 1 / y.clamp_min(FLOOR) / self._count
        p = F.softmax(y, 1)
        return p * (1 - p) / self._count

    def drawn(self, name: str, y: Tensor, generator: torch.Generator) -> Tensor:
        """A loss whose gradients have d^2E/dy^2 as their mean outer product: targets are drawn from the output."""
        root = self._count**0.5
        if name in self.power:
            noise = torch.randn(y.shape, generator=generator).to(y)
            return (noise * (2 / self.power[name]) ** 0.5 * y).sum() / root
        p = (y if self.scores[name] else F.softmax(y, 1)).detach()
        classes = torch.multinomial(p.float().cpu().clamp_min(FLOOR), 1, generator=generator)[:, 0].to(y.device)
        return self.cross_entropy(name, y, classes) / root

    def cross_entropy(self, name: str, y: Tensor, classes: Tensor) -> Tensor:
        """Summed over samples, in nats."""
        logits = y.clamp_min(FLOOR).log() if self.scores[name] else y
        return F.cross_entropy(logits, classes, reduction="sum")

    @property
    def _count(self) -> int:
        return len(self.scores) + len(self.power)


def _tuple(made: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (made,) if isinstance(made, Tensor) else made
