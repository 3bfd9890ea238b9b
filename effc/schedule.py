"""How long training goes on and how fast: a linear warm-up, then a cosine to 0.

Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts" (2017), equation 5, no restarts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from effc.augment import Augment

Optimizer = Literal["sgd", "adam"]
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: passes over the training data.
        batch: samples a step.
        optimizer: SGD with Nesterov momentum, or Adam with the decay of weights apart (AdamW).
        learning_rate: at its highest.
        warmup: epochs over which it rises from 0.
        clip: largest norm of all gradients together.
        patience: epochs without a better state after which training ends; None: never.
        seconds: after which no epoch begins; None: all of them do.
        augment: what is done to images: mirrored, shifted by up to an eighth of their size, or both.
        frozen_norms: batch norms keep their statistics.
        precision: of a step's products (Micikevicius et al. 2018; weights, losses and what judges epochs stay float32);
            auto: bfloat16 on CUDA, float32 on processors.
    """

    epochs: int = 10
    batch: int = 128
    optimizer: Optimizer = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.0
    clip: float = 5.0
    patience: int | None = None
    seconds: float | None = None
    augment: Augment = "none"
    frozen_norms: bool = False
    precision: Precision = "auto"

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, given the number of steps of an epoch."""
        warm, total = self.warmup * steps, self.epochs * steps
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))
