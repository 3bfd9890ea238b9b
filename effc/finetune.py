"""The training loop of recovery: SGD on a trainable view, towards teachers and labels; the best state is kept.

Gradients are clipped by their norm, weight decay is on matrices and kernels alone. A part of the training data is held
out and judges each epoch. All that is random follows from the seed and the epoch's number, so that a run that was
killed and resumed from its checkpoint ends as one that was not.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effc.augment import augmented
from effc.contract import Progress, no_progress
from effc.data import Batch, Data
from effc.distillation import Loss
from effc.errors import BadInput
from effc.evaluate import class_labels
from effc.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from effc.proximal import Shrinkage

EXPLODED = 1e3  # times the loss at the start, or times 1 where that was less
Wanted = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass
class Fitted:
    """What training came to.

    Attributes:
        losses: mean training loss, epoch by epoch.
        scores: on what was held out, before training and after each epoch: (top-1 share or None, loss).
        best: the epoch whose state was kept; 0 for the state before training.
        ended: why before the last epoch, or None.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[float | None, float]] = field(default_factory=list)
    best: int = 0
    ended: str | None = None


class Finetune:
    """Trains a view in place.

    Args:
        view: a trainable view: called with the inputs in order, it gives one tensor or a tuple of the outputs.
        inputs, outputs: names of both.
        features: names of inner tensors that the view gives behind its outputs, and the teachers too.
        data: training data, bound to the model.
        held_out: what judges epochs; no sample of `data`.
        wanted: the teachers' outputs for feeds, or None.
        labels: whether the data's labels count.
        shrinkage: what follows each step; but for the start, no state is kept before its goal is reached.
        device: "cpu" or "cuda".
        checkpoint: file to which each epoch's end is written, and from which training goes on where there is one.
        key: what the checkpoint must have been made with.
    """

    def __init__(
        self, view: Any, inputs: Sequence[str], outputs: Sequence[str], data: Data, held_out: Data, loss: Loss,
        schedule: Schedule, *, features: Sequence[str] = (), wanted: Wanted | None = None,
        labels: bool = False, shrinkage: Shrinkage | None = None, device: str = "cpu", seed: int = 0,
        checkpoint: Path | None = None, key: str = "", progress: Progress = no_progress,
    ) -> None:  # fmt: skip
        self.view, self.inputs, self.outputs, self.features = view, inputs, outputs, features
        self.data, self.held_out, self.loss, self.schedule = data, held_out, loss, schedule
        self.wanted, self.labels, self.device, self.seed = wanted, labels, device, seed
        self.checkpoint, self.key, self.progress, self.shrinkage = checkpoint, key, progress, shrinkage
        self.fitted = Fitted()
        self._best: dict[str, torch.Tensor] = {}

    def run(self) -> Fitted:
        """Train, and leave the best state in the view.

        Raises:
            BadInput: labels that are no class of the model; a loss that is no number from the start; a checkpoint of
                another run.
        """
        import torch

        schedule, view = self.schedule, self.view.to(self.device)
        for weight in view.parameters():
            if weight.ndim == 4:  # channels last: chains of small convolutions take half the time on a processor
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        rate, momentum = schedule.learning_rate, schedule.momentum
        optimizer = (
            torch.optim.SGD(self._groups(), lr=rate, momentum=momentum, nesterov=momentum > 0)
            if schedule.optimizer == "sgd"
            else torch.optim.AdamW(self._groups(), lr=rate)
        )
        began = time.monotonic()
        start, steps = self._resumed(optimizer), sum(1 for _ in self._sizes())
        if self.shrinkage is not None:
            self.shrinkage.resume(start / max(schedule.epochs, 1))
        if not self.fitted.scores:
            self._judge()
            if not math.isfinite(self.fitted.scores[0][1]):
                raise BadInput("the loss of the model as it is given is no number: check the data and the teacher")
            self._save(0, optimizer)  # a place that cannot be written to shows before any training
        for epoch in range(start, schedule.epochs):
            if (why := self._epoch(epoch, steps, optimizer)) is not None:
                self.fitted.ended = f"{why} in epoch {epoch + 1}; a lower learning rate may help"
                break
            self._judge()
            self._save(epoch + 1, optimizer)
            if epoch + 1 < schedule.epochs and (why := self._enough(epoch + 1, time.monotonic() - began)) is not None:
                self.fitted.ended = why
                break
        view.load_state_dict(self._best)
        view.eval().to("cpu", memory_format=torch.contiguous_format)
        return self.fitted

    def _enough(self, epoch: int, seconds: float) -> str | None:
        """Why no epoch follows this one, or None."""
        schedule = self.schedule
        if schedule.patience is not None and epoch - self.fitted.best >= schedule.patience and self._counts(epoch):
            return f"no better state in {schedule.patience} epochs"
        if schedule.seconds is not None and seconds >= schedule.seconds:
            return f"after epoch {epoch} the {schedule.seconds:g} seconds were over"
        return None

    def _groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.view.parameters() if p.requires_grad]
        if not trained:
            raise BadInput("the model has no float weight that could be trained")
        decayed = [p for p in trained if p.ndim > 1]
        rest = [p for p in trained if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": self.schedule.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _sizes(self) -> Iterator[int]:
        """Samples of each step; a last one of a single sample is left out, of which a batch norm knows no spread."""
        count, batch = len(self.data), self.schedule.batch
        for begin in range(0, count, batch):
            if (size := min(batch, count - begin)) > 1 or count == 1:
                yield size

    def _epoch(self, epoch: int, steps: int, optimizer: torch.optim.Optimizer) -> str | None:
        """One pass over the data; why it had to stop, or None."""
        import torch

        rng = np.random.default_rng([self.seed, epoch])
        torch.manual_seed(int(rng.integers(2**31)))
        self._train_mode()
        limit = EXPLODED * max(self.fitted.scores[0][1], 1.0)
        total = count = 0
        advance = self.progress(f"epoch {epoch + 1} of {self.schedule.epochs}{self._told()}", len(self.data))
        batches = self.data.shuffled(int(rng.integers(2**31))).batches(self.schedule.batch)
        for number, (size, part) in enumerate(zip(self._sizes(), batches, strict=False)):
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.rate(epoch * steps + number, steps)
            feeds = augmented(part.feeds, self.schedule.augment, rng)
            with self._precision():
                loss, _ = self._loss(feeds, part)
            value = float(loss.detach())
            if not math.isfinite(value) or value > limit:
                return f"the loss became {value:.3g}, from {self.fitted.scores[0][1]:.3g} at the start,"
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.view.parameters(), self.schedule.clip)
            if not math.isfinite(float(norm)):
                return f"gradients became {float(norm):.3g}"
            optimizer.step()
            if self.shrinkage is not None:
                self.shrinkage.step(epoch * steps + number, self.schedule.epochs * steps)
            total, count = total + value * size, count + size
            advance(size)
        self.fitted.losses.append(total / max(count, 1))
        return None

    def _told(self) -> str:
        """How the state is, for the bar."""
        share, loss = self.fitted.scores[-1]
        return f" (loss {loss:.4f}" + ("" if share is None else f", top-1 {100 * share:.1f} %") + ")"

    def _train_mode(self) -> None:
        import torch

        self.view.train()
        if self.schedule.frozen_norms:
            for module in self.view.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _loss(self, feeds: Mapping[str, np.ndarray], part: Batch) -> tuple[torch.Tensor, int]:
        import torch

        wanted = {} if self.wanted is None else self.wanted(feeds)
        tensors = self.view(*(self._fed(feeds[name]) for name in self.inputs))
        names = [*self.outputs, *self.features]
        tensors = tensors if len(names) > 1 else (tensors,)
        made = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in zip(names, tensors, strict=True)}
        for name, array in wanted.items():
            if name not in made or tuple(made[name].shape) != array.shape:
                found = f"one of {tuple(made[name].shape)}" if name in made else f"only {', '.join(made)}"
                raise BadInput(
                    f"the teacher has an output {name!r} of {array.shape}, the model {found}: they must match"
                )
        labels, hits = None, 0
        if self.labels:
            scores = next(
                (made[name] for name in self.outputs if made[name].ndim == 2 and made[name].shape[1] > 1), None
            )
            if scores is None:
                raise BadInput("labels need an output of class scores [N, C > 1]; train without labels (labels=0)")
            labels = torch.from_numpy(class_labels(part.labels, scores.shape[1], self.data.name)).to(self.device)
            hits = int((scores.argmax(1) == labels).sum())
        targets = {name: torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for name, a in wanted.items()}
        inner = [(made.pop(name), targets.pop(name)) for name in self.features if name in targets]
        return self.loss(made, targets, labels, inner), hits

    def _fed(self, array: np.ndarray) -> torch.Tensor:
        import torch

        tensor = torch.from_numpy(array).to(self.device)
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def _judge(self) -> None:
        """Score the state on what was held out, and remember it if it is the best."""
        import torch

        self.view.eval()
        total = count = right = 0
        with torch.no_grad():
            for part in self.held_out.batches(self.schedule.batch):
                size = len(next(iter(part.feeds.values())))
                loss, hits = self._loss(part.feeds, part)
                total, count, right = total + float(loss) * size, count + size, right + hits
        self.fitted.scores.append((right / count if self.labels else None, total / count))
        if len(self.fitted.scores) == 1 or self._better():
            self.fitted.best = len(self.fitted.scores) - 1
            self._best = {name: value.detach().cpu().clone() for name, value in self.view.state_dict().items()}

    def _better(self) -> bool:
        (own, loss), (before, least) = self.fitted.scores[-1], self.fitted.scores[self.fitted.best]
        if not self._counts(len(self.fitted.scores) - 1) or not math.isfinite(loss):
            return False
        if not self._counts(self.fitted.best):
            return True
        if own is None or before is None:
            return loss < least
        # Top-1 of so few samples tells states apart to its standard error alone; below that the loss does. The state
        # before training is given up for none that is right less often.
        counted = {number: share for number, (share, _) in enumerate(self.fitted.scores) if self._counts(number)}
        peak = max(counted.values())
        doubt = math.sqrt(peak * (1 - peak) / len(self.held_out))
        return own > before + doubt or (own >= max(peak - doubt, counted.get(0, 0.0)) and loss < least)

    def _counts(self, epoch: int) -> bool:
        """Whether the state after an epoch is one to keep."""
        return self.shrinkage is None or self.shrinkage.settled(epoch / self.schedule.epochs)

    def _precision(self) -> Any:
        import torch

        wanted = self.schedule.precision
        low = self.device == "cuda" if wanted == "auto" else wanted == "bfloat16"
        return torch.autocast(self.device, dtype=torch.bfloat16) if low else nullcontext()

    # --- checkpoints

    def _save(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        import torch

        if self.checkpoint is None:
            return
        content = {
            "key": self.key, "epoch": epoch, "state": self.view.state_dict(), "optimizer": optimizer.state_dict(),
            "best": self._best, "fitted": vars(self.fitted),
        }  # fmt: skip
        part = self.checkpoint.with_name(f"{self.checkpoint.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(content, file)
            os.replace(part, self.checkpoint)  # at once: a kill leaves the one before
        except OSError as error:
            raise BadInput(f"the checkpoint {self.checkpoint} cannot be written: {error.strerror}") from error

    def _resumed(self, optimizer: torch.optim.Optimizer) -> int:
        """The epoch to go on with."""
        import torch

        if self.checkpoint is None or not self.checkpoint.exists():
            return 0
        try:
            content = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except OSError as error:  # it may be a good one: no word of removing it
            raise BadInput(f"the checkpoint {self.checkpoint} cannot be read: {error.strerror}") from error
        except Exception as error:  # unpickling raises whatever the bytes make it raise
            raise BadInput(f"{self.checkpoint} is no checkpoint of effc: {type(error).__name__}; remove it") from error
        if not isinstance(content, dict) or content.get("key") != self.key:
            raise BadInput(
                f"{self.checkpoint} is of another model, other data or other options; remove it, or name another"
            )
        self.view.load_state_dict(content["state"])
        optimizer.load_state_dict(content["optimizer"])
        self._best, self.fitted = content["best"], Fitted(**copy.deepcopy(content["fitted"]))
        return content["epoch"]


def device(wanted: str) -> str:
    """ "cpu" or "cuda" for one of these or "auto". Raises BadInput where there is no CUDA."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("device=cuda: PyTorch sees no CUDA device here; take cpu or auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
