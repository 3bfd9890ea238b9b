"""Distillation on MNIST, after Hinton, Vinyals and Dean (2015, section 3).

    python benchmarks/distillation.py [students|temperatures ...] [--epochs 20] [--seeds 3] [--threads 2]

Needs MNIST in $EFFC_DATA and the package torch. A network of 2 x 1200 units, trained with dropout and shifted images,
teaches one of 2 x 800 that sees plain images; the same student learns from labels alone. `students`: errors of both,
seed by seed. `temperatures`: errors of a student of 2 x 30 units by temperature. All errors are for 10,000 images,
counted on the test images of the folder.

Exit status 1 when distilled students make as many errors as plain ones.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from _marks import Parser, data_file
from torch import nn
from torch.nn import functional as F

import effc
from effc.augment import augmented
from effc.data import open_data
from effc.evaluate import evaluate
from effc.model import Model
from effc.recover import Recover, train
from effc.registry import backend

TEACHER, STUDENT, SMALL = 1200, 800, 30
TEMPERATURE = 20.0
TEMPERATURES = (1.0, 2.5, 4.0, 8.0, 20.0)
BATCH, RATE = 128, 0.05
LONGEST = 15.0  # squared norm of what comes into a unit of the teacher (Srivastava et al. 2014)


def network(width: int, dropped: tuple[float, float] = (0.0, 0.0)) -> nn.Module:
    first, rest = dropped
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(first), nn.Linear(784, width), nn.ReLU(), nn.Dropout(rest), nn.Linear(width, width),
        nn.ReLU(), nn.Dropout(rest), nn.Linear(width, 10),
    )  # fmt: skip


def teacher(epochs: int) -> Model:
    """A network with dropout, bounded weights and shifted images, trained in plain PyTorch."""
    torch.manual_seed(0)
    net, rng = network(TEACHER, (0.2, 0.5)), np.random.default_rng(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    data = open_data(data_file("mnist-train"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for part in data.shuffled(epoch).batches(BATCH):
            feeds = augmented(part.feeds, "shift", rng)
            loss = F.cross_entropy(
                net(torch.from_numpy(feeds["input"])), torch.from_numpy(part.labels.astype(np.int64))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for layer in net:
                    if isinstance(layer, nn.Linear):
                        layer.weight.copy_(layer.weight.renorm(2, 0, LONGEST**0.5))
        schedule.step()
    return captured(net)


def captured(net: nn.Module) -> Model:
    return effc.capture(net.eval(), torch.zeros(2, 1, 28, 28), input_names=["input"])


class Bench:
    def __init__(self, epochs: int, teaching: int, seeds: int, threads: int) -> None:
        self.epochs, self.seeds, self.threads = epochs, seeds, threads
        started = time.perf_counter()
        self.teacher = teacher(teaching)
        print(
            f"teacher of 2 x {TEACHER}: {self.errors(self.teacher):.0f} errors in 10,000 after {teaching} epochs of "
            f"batches of {BATCH}, {time.perf_counter() - started:.0f} s\n"
            f"students: {epochs} epochs, batches of {BATCH}, learning rate {RATE} along a cosine to 0, Nesterov "
            "momentum 0.9, no weight decay, nothing done to images; the best of the epochs on 2,048 images held out",
            flush=True,
        )

    def errors(self, model: Model) -> float:
        data = open_data(data_file("mnist-test")).for_model(model)
        session = backend("onnxruntime").session(model, threads=self.threads)
        return 1e4 * (1 - evaluate({"model": session}, data, reference="model")["model"].value)

    def student(self, width: int, seed: int, temperature: float | None) -> float:
        """Errors of a student; without a temperature it learns from labels alone."""
        torch.manual_seed(seed)
        how = Recover(
            epochs=self.epochs, batch=BATCH, learning_rate=RATE, weight_decay=0.0, features=0.0,
            labels=1.0 if temperature is None else 0.1, temperature=temperature or 1.0,
        )  # fmt: skip
        found = train(
            captured(network(width)), how, data=data_file("mnist-train"), teachers=[self.teacher], seed=seed,
            threads=self.threads,
        )  # fmt: skip
        return self.errors(found.model)

    def students(self) -> bool:
        print(f"\n| 2 x {STUDENT} units | " + " | ".join(f"seed {s}" for s in range(self.seeds)) + " | mean |")
        print("| --- " * (self.seeds + 2) + "|")
        means = []
        for name, temperature in (("labels alone", None), (f"distilled, T = {TEMPERATURE:g}", TEMPERATURE)):
            found = [self.student(STUDENT, seed, temperature) for seed in range(self.seeds)]
            means.append(float(np.mean(found)))
            print(f"| {name} | " + " | ".join(f"{e:.0f}" for e in found) + f" | {means[-1]:.0f} |", flush=True)
        return means[1] < means[0]

    def temperatures(self) -> bool:
        print(f"\n| 2 x {SMALL} units | errors, mean of {self.seeds} seeds |\n| --- | --- |")
        for temperature in (None, *TEMPERATURES):
            found = np.mean([self.student(SMALL, seed, temperature) for seed in range(self.seeds)])
            name = "labels alone" if temperature is None else f"T = {temperature:g}"
            print(f"| {name} | {found:.0f} |", flush=True)
        return True


def main() -> int:
    parser = Parser(__doc__, ["students", "temperatures"])
    parser.add_argument("--epochs", type=int, default=20, help="of students")
    parser.add_argument("--teaching", type=int, default=30, help="epochs of the teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.epochs, options.teaching, options.seeds, options.threads)
    held = [getattr(bench, part)() for part in parser.parts(options)]
    return int(not all(held))


if __name__ == "__main__":
    sys.exit(main())
