"""Single weights pruned on MNIST: by damage or by size, in rounds with training, and Dense-Sparse-Dense.

    python benchmarks/pruning_weights.py [obd|iterative|dsd|fitted ...] [--epochs 4] [--seeds 3] [--threads 2]

Needs MNIST in $EFFC_DATA and the package torch. LeNet-5 is Caffe's (431,080 parameters), LeNet-300-100 has two hidden
layers of these widths (266,610); both are trained here, from labels, with plain images.
`obd`: LeNet-5 with so large a share of its weights set to zero and no training after that, on 5,000 training images:
the divergence from what it said before, which half the sum of h w^2 predicts, and the rise of the cross entropy, for
optimal brain damage, magnitude and chance (LeCun, Denker and Solla 1990, figures 1 and 2). `fitted`: the same at higher
shares, what stays fitted to what layers meet, and with two of every four inputs. `iterative`: both networks pruned
twelvefold in rounds (Han et al. 2015, table 1: errors from 1.64 to 1.59 % and from 0.80 to 0.77 %). `dsd`: trained,
pruned by 30 %, trained, and trained dense again (Han et al. 2017), against the same number of epochs at the same rates
without pruning.

Errors are those on the test images of the folder. Exit status 1 when a mark is missed; they are listed at the end.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from _marks import Marks, Parser, data_file
from torch import nn
from torch.nn import functional as F

import effc
from effc.compressed import compressed_size
from effc.data import open_data
from effc.evaluate import damage
from effc.model import Model
from effc.recover import Recover, train
from effc.registry import backend, trainer

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEEN, JUDGED = 4096, 5000  # images for saliencies, and to measure the loss on
BATCH, RATE = 128, 0.05
TWELVEFOLD = 1 - 1 / 12
HAN = {"LeNet-300-100": (1.64, 1.59), "LeNet-5": (0.80, 0.77)}
KEPT = "saliency={}, sparsity={}, remove_dead=false"


def network(name: str) -> nn.Module:
    if name == "LeNet-300-100":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


class Bench(Marks):
    def __init__(self, epochs: int, rounds: int, each: int, seeds: int, threads: int) -> None:
        self.epochs, self.rounds, self.each, self.seeds, self.threads = epochs, rounds, each, seeds, threads
        super().__init__()
        self._dense: dict[tuple[str, int], Model] = {}

    def dense(self, name: str, seed: int = 0) -> Model:
        """The network trained from labels alone."""
        if (name, seed) not in self._dense:
            torch.manual_seed(seed)
            start = effc.capture(network(name), torch.zeros(2, 1, 28, 28), input_names=["input"])
            self._dense[name, seed] = self.trained(start, self.epochs, seed=seed)
        return self._dense[name, seed]

    def trained(self, model: Model, epochs: int, rate: float = RATE, seed: int = 0, keep_zeros: bool = True) -> Model:
        how = Recover(
            epochs=epochs, batch=BATCH, learning_rate=rate, labels=1.0, weight_decay=5e-4, keep_zeros=keep_zeros
        )
        return train(model, how, data=data_file("mnist-train"), seed=seed, threads=self.threads).model

    def pruned(self, model: Model, options: str, **more) -> Model:
        """Without training."""
        return effc.optimize(
            model, f"prune-weights{{{options}}}", calibrate=f"{data_file('mnist-train')}{{limit={SEEN}}}",
            measure=False, force=True, threads=self.threads, **more,
        ).model  # fmt: skip

    def errors(self, model: Model) -> float:
        """Per cent of the test images."""
        data = open_data(data_file("mnist-test"))
        scores, labels = self._scores(model, data)
        return 100 * float(np.mean(scores.argmax(1) != labels))

    def _scores(self, model: Model, data) -> tuple[np.ndarray, np.ndarray]:
        session = backend("onnxruntime").session(model, threads=self.threads)
        (name,) = (info.name for info in model.outputs)
        parts = [(session.run(b.feeds)[name], b.labels) for b in data.for_model(model).batches(500)]
        return np.concatenate([s for s, _ in parts]), np.concatenate([y for _, y in parts])

    def loss(self, model: Model) -> float:
        """Cross entropy on training images that saliencies were not taken from, nats."""
        scores, labels = self._judged(model)
        return float(F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(labels.astype(np.int64))))

    def _judged(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        return self._scores(model, open_data(f"{data_file('mnist-train')}{{start={SEEN}, limit={JUDGED}}}"))

    def obd(self) -> None:
        """Damage, as predicted and as it is; step by step: the curvature anew for each tenth of the weights."""
        model = self.dense("LeNet-5")
        seen = open_data(f"{data_file('mnist-train')}{{limit={SEEN}}}").for_model(model)
        started = time.perf_counter()
        view = trainer().view(model)
        h = trainer().curvature(view, [b.feeds for b in seen.batches(256)])
        seconds = time.perf_counter() - started
        start, wanted = self.loss(model), self._judged(model)[0]
        print(f"\nLeNet-5: cross entropy {start:.5f} nats, {self.errors(model):.2f} % errors; ", end="")
        print(f"curvature on {SEEN} images in {seconds:.1f} s; in 1e-6 nats: damage (rise of the cross entropy)\n")
        names = ["OBD, predicted", "OBD", "OBD, step by step", "magnitude", "random"]
        print(f"| weights removed | {' | '.join(names)} |\n{'| --- ' * (len(names) + 1)}|")
        stepwise = model
        for share in SHARES:
            kinds = ("obd", "magnitude", "random")
            once, size, chance = (self.pruned(model, KEPT.format(kind, share)) for kind in kinds)
            stepwise = self.pruned(stepwise, KEPT.format("obd", share))
            found = [self._judged(each)[0] for each in (once, stepwise, size, chance)]
            hurt = [damage([{"scores": scores}], [{"scores": wanted}]) for scores in found]
            rises = [self.loss(each) - start for each in (once, stepwise, size, chance)]
            predicted = self._predicted(model, once, h)
            told = [f"{1e6 * d:.1f} ({1e6 * r:+.0f})" for d, r in zip(hurt, rises, strict=True)]
            print(f"| {100 * share:.0f} % | {1e6 * predicted:.1f} | {' | '.join(told)} |", flush=True)
            if share <= 0.8:  # beyond, a quadratic model is no guide
                self.at_most(f"{100 * share:.0f} % removed: damage by OBD, step by step", hurt[1], hurt[2])
            if share == 0.3:
                self.at_most("30 % removed: rise of the loss by OBD", rises[0], rises[2])
                off = max(predicted / hurt[0], hurt[0] / predicted)
                self.at_most("30 % removed: actual and predicted damage apart, times", off, 2)

    def _predicted(self, model: Model, pruned: Model, h) -> float:
        total = 0.0
        for name, second in h.items():
            before, after = (m.graph.initializers[name].const_value.numpy().astype(float) for m in (model, pruned))
            total += float(0.5 * np.sum(second * (before**2) * ((after == 0) & (before != 0))))
        return total

    def fitted(self) -> None:
        """What stays fitted, against what stays as it is."""
        model = self.dense("LeNet-5")
        start = self.loss(model)
        print("\n| LeNet-5, no training | as it is | fitted | chosen by what cannot be made up for, fitted |")
        print("| --- | --- | --- | --- |")
        for how in (
            "scope=layer, sparsity=0.8",
            "scope=layer, sparsity=0.9",
            "scope=layer, sparsity=0.95",
            "pattern=2:4",
        ):
            ways = (how, f"{how}, compensate=true", f"{how}, compensate=true, saliency=obs")
            found = [self.pruned(model, options) for options in ways]
            told = [f"{self.loss(each) - start:.4f} nats, {self.errors(each):.2f} %" for each in found]
            print(f"| {how} | {' | '.join(told)} |", flush=True)
            self.at_most(f"{how}: rise with what stays fitted", self.loss(found[1]), self.loss(found[0]))

    def iterative(self) -> None:
        print(f"\n{self.epochs} epochs, then {self.rounds} rounds of pruning and {self.each} epochs")
        names = ["errors before", "as long, dense", "pruned twelvefold", "Han et al.", "kept by layer", "compressed"]
        print(f"\n| network | {' | '.join(names)} | seconds |\n{'| --- ' * (len(names) + 2)}|")
        for name, (_, wanted) in HAN.items():
            model, started = self.dense(name), time.perf_counter()
            steps = f"prune-weights{{sparsity={TWELVEFOLD}, rounds={self.rounds}}}, recover{{{self._how()}}}"
            result = effc.optimize(
                model, f"repeat{{steps={self.rounds}, passes=[{steps}]}}", train=data_file("mnist-train"),
                measure=False, threads=self.threads,
            )  # fmt: skip
            (stage,) = result.history.stages
            weights = {n: v.const_value.numpy() for n, v in result.model.graph.initializers.items()}
            whole = {n: v.const_value.size for n, v in model.graph.initializers.items()}
            kept = [100 * np.count_nonzero(w) / whole.get(n, w.size) for n, w in weights.items() if w.ndim > 1]
            before, after = self.errors(model), self.errors(result.model)
            a, b = compressed_size(model), compressed_size(result.model)
            seconds, shares = time.perf_counter() - started, " ".join(f"{k:.0f}" for k in kept)
            fair = self.errors(self.trained(model, self.rounds * self.each, RATE / 2))
            told = [
                name,
                *(f"{e:.2f} %" for e in (before, fair, after)),
                f"{HAN[name][0]:.2f} -> {wanted:.2f} %",
                f"{shares} %",
            ]
            print(f"| {' | '.join(told)} | {a:,} -> {b:,} bytes | {seconds:.0f}, {stage.status} |", flush=True)
            self.at_most(f"{name}: errors after pruning, to 0.1", after, fair + 0.1)

    def _how(self) -> str:
        return f"epochs={self.each}, batch={BATCH}, learning_rate={RATE / 2}, labels=1, weight_decay=0.0005, features=0"

    def dsd(self) -> None:
        """LeNet-300-100; the same start, the same epochs and rates, with and without zeros in between."""
        print("\n| LeNet-300-100 | first training | dense-sparse-dense | as long, dense |\n| --- | --- | --- | --- |")
        rows = []
        for seed in range(self.seeds):
            model = self.dense("LeNet-300-100", seed)
            sparse = self.trained(
                self.pruned(model, "sparsity=0.3, scope=layer, remove_dead=false"), self.each, seed=seed
            )
            again = self.trained(sparse, self.each, RATE / 10, seed=seed + 100, keep_zeros=False)
            fair = self.trained(model, self.each, seed=seed)
            fair = self.trained(fair, self.each, RATE / 10, seed=seed + 100)
            rows.append([self.errors(m) for m in (model, again, fair)])
            print(f"| seed {seed} | " + " | ".join(f"{e:.2f} %" for e in rows[-1]) + " |", flush=True)
        print("| mean | " + " | ".join(f"{e:.2f} %" for e in np.mean(rows, axis=0)) + " |")


def main() -> int:
    parser = Parser(__doc__, ["obd", "fitted", "iterative", "dsd"])
    parser.add_argument("--epochs", type=int, default=4, help="of the first training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--each", type=int, default=3, help="epochs of a round, and of each phase of dsd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.epochs, options.rounds, options.each, options.seeds, options.threads)
    return bench.run(parser.parts(options))


if __name__ == "__main__":
    sys.exit(main())
