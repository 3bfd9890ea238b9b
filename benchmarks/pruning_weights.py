"""Single weights pruned on MNIST: by damage or by size, in rounds with training, and Dense-Sparse-Dense.

    python benchmarks/pruning_weights.py [obd|groups|lasso|iterative|dsd|fitted ...] [--epochs 4] [--seeds 3]

Needs MNIST in $EFFC_DATA and the package torch. LeNet-5 is Caffe's (431,080 parameters), LeNet-300-100 has two hidden
layers of these widths (266,610); both are trained here, from labels, with plain images.
`obd`: LeNet-5 with so large a share of its weights set to zero and no training after that, on 5,000 training images:
the divergence from what it said before, which half the sum of h w^2 predicts, and the rise of the cross entropy, for
optimal brain damage, magnitude and chance (LeCun, Denker and Solla 1990, figures 1 and 2). `groups`: the same for
groups of the second convolution's weights, all 50 filters at one place of one channel (Lebedev and Lempitsky 2016): by
the sum of their sizes, by the diagonal of the curvature (also step by step, anew for each tenth), by the curvature
within groups, by chance, and with the groups that stay fitted to make up for those that go; means over networks.
`lasso`: such groups trained to zero and removed, against groups chosen without training at as many multiply-
accumulates, trained for as many epochs. `fitted`: single weights at higher shares, what stays fitted to what layers
meet, and with two of every four inputs. `iterative`: both networks pruned twelvefold in rounds (Han et al. 2015, table
1: errors from 1.64 to 1.59 % and from 0.80 to 0.77 %). `dsd`: trained, pruned by 30 %, trained, and trained dense again
(Han et al. 2017), against the same number of epochs at the same rates without pruning.

Errors are those on the test images of the folder. Exit status 1 when a mark is missed; they are listed at the end.
"""

from __future__ import annotations

import sys
import time
from functools import cached_property

import numpy as np
import torch
from _marks import Marks, Parser, data_file
from torch import nn
from torch.nn import functional as F

import effc
from effc import edit
from effc.compressed import compressed_size
from effc.cost import cost
from effc.data import Data, open_data
from effc.evaluate import damage
from effc.model import Model
from effc.passes._elimination import Reader, compensated
from effc.passes._factors import Layer
from effc.passes._group_saliency import Groups
from effc.recover import Recover, train
from effc.registry import backend, trainer
from effc.runtime import Slice

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEEN, JUDGED = 4096, 5000  # images for saliencies, and to measure the loss on
BATCH, RATE = 128, 0.05
LASSO = 20_000  # images to train on in `lasso`
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

    def groups(self) -> None:
        """The second convolution of LeNet-5 with groups at zero: means over networks trained from several seeds."""
        kinds = ("l1", "obd", "steps", "fisher", "random")
        print(f"\nLeNet-5, groups of the second convolution, {self.seeds} networks; ", end="")
        print("in 1e-6 nats: damage (rise of the cross entropy)\n")
        names = ["L1", "OBD, predicted", "OBD", "OBD, step by step", "within groups, predicted", "within groups"]
        names += ["random", "fitted"]
        print(f"| groups removed | {' | '.join(names)} |\n{'| --- ' * (len(names) + 1)}|")
        rows = [[] for _ in SHARES]
        for seed in range(self.seeds):
            model = self.dense("LeNet-5", seed)
            conv = Second(model, open_data(f"{data_file('mnist-train')}{{limit={SEEN}}}"), seed)
            start, wanted = self.loss(model), self._judged(model)[0]
            for row, share in zip(rows, SHARES, strict=True):
                gone = round(share * conv.count)
                removed = [conv.without(conv.order(kind)[:gone]) for kind in kinds]
                removed.append(conv.fitted(conv.order("reconstruction")[:gone]))
                hurt = [damage([{"y": self._judged(m)[0]}], [{"y": wanted}]) for m in removed]
                rises = [self.loss(m) - start for m in removed]
                predicted = [conv.worth(kind)[conv.order(kind)[:gone]].sum() for kind in ("obd", "fisher")]
                row.append([*hurt, *rises, *predicted])
        for share, row in zip(SHARES, rows, strict=True):
            l1, obd, steps, fisher, chance, fitted, *rises, obd_told, fisher_told = 1e6 * np.mean(row, axis=0)
            hurt = l1, obd, steps, fisher, chance, fitted
            told = [f"{d:.0f} ({r:+.0f})" for d, r in zip(hurt, rises, strict=True)]
            told[1:4] = f"{obd_told:.0f}", told[1], told[2], f"{fisher_told:.0f}", told[3]
            print(f"| {100 * share:.0f} % | {' | '.join(told)} |", flush=True)
            self.at_most(f"{100 * share:.0f} % of groups: damage by OBD, 1e-6 nats", obd, l1)

    def lasso(self) -> None:
        """Groups of LeNet-5's convolutions trained to zero, against groups chosen without training, as many epochs."""
        model, data = self.dense("LeNet-5"), f"{data_file('mnist-train')}{{limit={LASSO}}}"
        whole = cost(model).total.macs
        print(f"\nLeNet-5, {self.errors(model):.2f} % errors; {LASSO:,} images, {2 * self.each} epochs in all\n")
        print("| groups at zero | how | MACs | errors, pruned | errors, trained on |\n| --- | --- | --- | --- | --- |")
        for sparsity in (0.8, 0.9, 0.95):
            zeros = f"group-lasso{{sparsity={sparsity}, {self._how()}}}, prune-groups{{zeros=true, min_gain=1}}"
            first = self._made(model, zeros, data)
            share, reached = cost(first).total.macs / whole, {}
            rows = {"group-lasso": first} | {
                f"prune-groups, {saliency}": self._made(
                    model, f"prune-groups{{saliency={saliency}, macs={share}}}", data
                )
                for saliency in ("reconstruction", "l1")
            }
            for how, before in rows.items():
                last = self._how(self.each * (1 if before is first else 2))
                after = self._made(before, f"recover{{{last}}}", data)
                reached[how] = self.errors(after)
                told = f"{cost(after).total.macs / whole:.3f} | {self.errors(before):.2f} % | {reached[how]:.2f} %"
                print(f"| {sparsity:.0%} | {how} | {told} |", flush=True)
            free = min(error for how, error in reached.items() if how != "group-lasso")
            self.at_most(
                f"{sparsity:.0%} of groups trained to zero: errors, to 0.1", reached["group-lasso"], free + 0.1
            )

    def _made(self, model: Model, recipe: str, data: str) -> Model:
        return effc.optimize(
            model, recipe, calibrate=f"{data_file('mnist-train')}{{limit=1024}}", train=data, goal="macs",
            measure=False, force=True, threads=self.threads,
        ).model  # fmt: skip

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

    def _how(self, epochs: int | None = None) -> str:
        how = f"batch={BATCH}, learning_rate={RATE / 2}, labels=1, weight_decay=0.0005, features=0"
        return f"epochs={epochs or self.each}, {how}"

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


class Second:
    """Groups (c, i, j) of a network's second convolution: what they are worth, and the network without some.

    `obd` adds up h w^2 / 2 over a group's weights, `steps` anew for each tenth of the groups; `fisher` is E (sum g w)^2
    / 2 (Theis et al. 2018), the same with the curvature between weights of one group; `reconstruction` is what the
    other groups cannot make up for.
    """

    def __init__(self, model: Model, data: Data, seed: int) -> None:
        node = list(model.nodes("Conv"))[1]
        self.model, self.name, self.seed = model, node.inputs[1].name, seed
        self.weight = model.graph.initializers[self.name].const_value.numpy()
        self.layer = Layer(self.weight.astype(float))
        self.count = self.layer.matrix.shape[1]
        self._feeds = [b.feeds for b in data.for_model(model).batches(256)]
        self._reads = node.inputs[0].name
        self._worth: dict[str, np.ndarray] = {}
        self._orders: dict[str, np.ndarray] = {}

    def worth(self, kind: str) -> np.ndarray:
        """[groups] predicted damage; asked for once."""
        if kind not in self._worth:
            self._worth[kind] = self._damage(self.model) if kind == "obd" else self._within()
        return self._worth[kind]

    def _damage(self, model: Model) -> np.ndarray:
        """The diagonal's prediction, in a network with some groups at zero."""
        h = trainer().curvature(trainer().view(model), self._feeds)[self.name].reshape(self.layer.matrix.shape)
        return 0.5 * (h * self.layer.matrix**2).sum(axis=0)

    def _within(self) -> np.ndarray:
        view = trainer().view(self.model)
        units = np.broadcast_to(np.arange(self.count).reshape(1, *self.weight.shape[1:]), self.weight.shape)
        return 0.5 * trainer().gradients(view, self._feeds[:2], units=[Slice(self.name, None, units)]).fisher

    @cached_property
    def metric(self) -> np.ndarray:
        """Second moments of patches."""
        session = backend("onnxruntime").session(self.model, expose=[self._reads])
        read = session.run({"input": self._feeds[0]["input"]})[self._reads].astype(float)
        patches = np.lib.stride_tricks.sliding_window_view(read, self.layer.kernel, axis=(2, 3))
        rows = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, self.count)
        found = rows.T @ rows / len(rows)
        return found + 1e-6 * np.trace(found) / self.count * np.eye(self.count)

    def order(self, kind: str) -> np.ndarray:
        """In which they go; asked for once."""
        if kind not in self._orders:
            self._orders[kind] = self._ordered(kind)
        return self._orders[kind]

    def _ordered(self, kind: str) -> np.ndarray:
        each = np.arange(self.count)[:, None]
        if kind in ("obd", "fisher"):
            return np.argsort(self.worth(kind), kind="stable")
        if kind == "steps":
            return self._step_by_step()
        groups = Groups(self.layer, self.layer.matrix, self.metric if kind == "reconstruction" else None)
        return groups.order(kind, each, int(kind == "reconstruction"), None, [self.seed])

    def _step_by_step(self) -> np.ndarray:
        """As `obd`, the curvature taken anew behind each share of the groups."""
        gone = np.zeros(0, np.int64)
        for share in (*SHARES, 1.0):
            worth = self._damage(self.without(gone))
            worth[gone] = np.inf
            gone = np.append(gone, np.argsort(worth, kind="stable")[: round(share * self.count) - len(gone)])
        return gone

    def without(self, gone: np.ndarray) -> Model:
        matrix = self.layer.matrix.copy()
        matrix[:, gone] = 0
        return self._with(matrix)

    def fitted(self, gone: np.ndarray) -> Model:
        """The others make up for them by least squares."""
        reader = Reader(self.layer.matrix, self.metric, np.arange(self.count)[:, None])
        return self._with(compensated(reader, gone))

    def _with(self, matrix: np.ndarray) -> Model:
        clone = self.model.clone()
        value = clone.graph.initializers[self.name]
        edit.set_initializer(clone, value, matrix.reshape(self.weight.shape).astype(np.float32))
        return clone


def main() -> int:
    parser = Parser(__doc__, ["obd", "groups", "lasso", "fitted", "iterative", "dsd"])
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
