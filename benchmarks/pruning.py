"""Pruned channels: what can go and that its removal is exact, what is left without training, and what training adds.

    python benchmarks/pruning.py [PART ...] [--networks resnet56] [--epochs 3] [--precision bfloat16]

Needs networks and data in $EFFC_DATA. `exact`: units that can be removed of every network, and outputs with some of
them removed against outputs with nothing reading them. `saliencies`: half of the multiply-accumulates, unit by each
saliency, with and without fitting what stays. `latency`: what is left of latency and accuracy by predicted speed-ups.
`integers`: pruned for the kernels of int8. `recovery`: pruned, then trained on the 25,000 training images, with the
original trained on their labels for as many epochs beside it, and for six at most as its teacher; `deployed`: the same,
pruned for the kernels of int8 and lowered to them behind the training. `lasso`: groups that training brings to zero,
taps and channels, half of them, then removed and trained on; beside groups chosen without training at as many
multiply-accumulates, trained for as many epochs, and the original trained alike. `peers`: half of the
multiply-accumulates by effc and by Torch-Pruning 1.6 (where that is there: pip install --no-deps torch-pruning),
latencies in one run. The last four need the package torch.

Exit status 1 when a mark is missed; the marks are listed under the tables.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from _marks import Marks, Parser, data_file, model_file
from _zoo import SHARED, catalogue

import effc
from effc.channels import Channels, channels
from effc.cost import cost
from effc.data import open_data
from effc.evaluate import Score, evaluate
from effc.measure import compare_many, random_feeds
from effc.model import Model
from effc.registry import backend
from effc.removal import mute_units, remove_units

EXACT, REACHED, POINTS = 1e-5, 0.9, 78.0  # marks: max|a - b| / max|a|, share of channels, top-1 at half the MACs
NETWORKS = ("resnet56", "vgg-small")
SALIENCIES = ("reconstruction", "fisher", "taylor", "obd", "l2", "l1", "geometric-median", "random")
PEERED = {
    "reconstruction": "macs=0.5",
    "by predicted latency": "speedup=1.5",
    **{f"{s}, not fitted": f"macs=0.5, saliency={s}, correct=false" for s in ("l1", "l2", "taylor")},
}
SPEEDUPS = (1.25, 1.5, 2.0)
FOR_INTEGERS = (1.15, 1.5)  # speed-ups of what int8 makes of the network
TAUGHT, RATE = "labels=0.3, temperature=4, features=0", "augment=flip-shift, learning_rate=0.02"
HOW = "labels=1, augment=flip-shift, batch=64, learning_rate=0.02"
PARTS = ("exact", "saliencies", "latency", "integers", "recovery", "deployed", "lasso", "peers")
CLASSES = 1000  # outputs of the light networks, which cannot go


class Bench(Marks):
    def __init__(
        self, networks: list[str], epochs: int, precision: str, images: int, peer_epochs: int, threads: int
    ) -> None:
        self.networks, self.epochs, self.precision, self.threads = networks, epochs, precision, threads
        self.images, self.peer_epochs = images, peer_epochs
        super().__init__()

    def exact(self) -> None:
        """Units of every network, and a third of them removed."""
        print("\n| network | channels | can go | removed | MACs left | outputs apart | seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for entry in catalogue()[0]:
            if entry.name not in SHARED and entry.family != "light" and entry.name != "bert-384x6":
                continue
            model = simplified(entry.build())
            started = time.perf_counter()
            found = channels(model)
            seconds = time.perf_counter() - started
            made = {u for place, units in found.weights.items() if not place.reads for u in units[units >= 0].tolist()}
            inner = made - outputs(found)
            free = {unit for unit in inner if unit not in found.pinned}
            gone = some(found)
            muted, smaller = model.clone(), model.clone()
            mute_units(muted, gone)
            remove_units(smaller, gone)
            feeds = random_feeds(model, model.batch or 2, dict(entry.dims))
            apart = distance(ran(muted, feeds), ran(smaller, feeds))
            macs = cost(smaller, 1, entry.dims).total.macs / cost(model, 1, entry.dims).total.macs
            share = len(free) / max(len(inner), 1)
            print(
                f"| {entry.name} | {len(inner)} | {share:.1%} | {len(gone)} | {macs:.2f} | {apart:.1e} "
                f"| {seconds:.2f} |", flush=True,
            )  # fmt: skip
            self.at_most(f"{entry.name}: outputs apart", apart, EXACT)
            if entry.name not in ("bert-384x6", "bvlc_alexnet", "inception_v1", "zfnet512"):  # norms over channels
                self.at_least(f"{entry.name}: channels that can go", share, REACHED)

    def saliencies(self) -> None:
        for network in self.networks:
            print(f"\n{network}, half of the multiply-accumulates, no training; 1,024 images to fit to\n")
            print("| saliency | top-1, fitted | damage | seconds | top-1, not fitted | damage | seconds |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for saliency in SALIENCIES:
                cells = []
                for correct in ("true", "false"):
                    recipe = f"prune-channels{{macs=0.5, saliency={saliency}, correct={correct}}}"
                    pruned, seconds = self._forced(network, recipe)
                    score = self._score(network, {"pruned": pruned})["pruned"]
                    cells += [f"{score.points:.2f}", f"{score.damage:.3f}", f"{seconds:.0f}"]
                    if saliency == "reconstruction" and correct == "true" and network == "resnet56":
                        self.at_least("resnet56 at half of its MACs, no training: top-1", score.points, POINTS)
                print(f"| {saliency} | {' | '.join(cells)} |", flush=True)

    def latency(self) -> None:
        self._by_speed("prune-channels{{speedup={}}}", SPEEDUPS, "latency")

    def integers(self) -> None:
        self._by_speed("prune-channels{{speedup={}}}, int8", (1, *SPEEDUPS[:2]), "int8")

    def _by_speed(self, recipe: str, speedups: tuple[float, ...], what: str) -> None:
        for network in self.networks:
            original = effc.load(model_file(network))
            models = {str(s): self._forced(network, recipe.format(s))[0] for s in speedups}
            models = {name: simplified(model) if what == "latency" else model for name, model in models.items()}
            scores = self._score(network, models)
            print(f"\n{network}, {recipe.format('S')}, no training\n")
            print("| predicted | MACs | top-1 | latency, batch 1 | batch 32 |\n| --- | --- | --- | --- | --- |")
            ratios = [measured(original, models, batch) for batch in (1, 32)]
            whole = cost(original).total.macs
            for name, model in models.items():
                share = cost(model).total.macs / whole
                times = " | ".join(f"{ratio[name]:.2f}" for ratio in ratios)
                print(f"| {name} | {share:.2f} | {scores[name].points:.2f} | {times} |", flush=True)

    def recovery(self) -> None:
        """The pruned network trained, and the original trained with labels for as many epochs; batch norms are live."""
        from recover import TEACHING, lowered

        print("\n| network | MACs | before | trained | seconds | original, trained as long |")
        print("| --- | --- | --- | --- | --- | --- |")
        for network in self.networks:
            original = live(network)
            tuned, fair = self._tuned(network, original, min(TEACHING, self.epochs))
            if self.epochs > TEACHING:
                fair = self._tuned(network, original, self.epochs)[1]
            for share in (0.5, 0.33):
                pruned, _ = self._forced(network, f"prune-channels{{macs={share}}}", original)
                before = self._score(network, {"pruned": pruned}, original)["pruned"].points
                trained, seconds = self._made(pruned, self._training(), data_file("cifar10-train"), lowered(tuned))
                after = self._score(network, {"m": trained}, original)["m"].points
                print(f"| {network} | {share} | {before:.2f} | {after:.2f} | {seconds:.0f} | {fair:.2f} |", flush=True)
                self.at_least(f"{network} at {share}: points against the original trained as long", after - fair, 0)

    def deployed(self) -> None:
        """Pruned for int8, trained, lowered, against the float original trained as long and the original as it is."""
        from recover import DEPTHS, TEACHING, captured, hand_written, lowered

        print("\n| network | predicted | MACs | top-1 | original, trained as long | latency, batch 1 | batch 32 |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for network in filter(DEPTHS.__contains__, self.networks):
            original = captured(hand_written(network))
            tuned, fair = self._tuned(network, original, min(TEACHING, self.epochs))
            if self.epochs > TEACHING:
                fair = self._tuned(network, original, self.epochs)[1]
            for speedup in FOR_INTEGERS:
                recipe = f"prune-channels{{speedup={speedup}}}, {self._training()}, simplify, fold-batchnorm, int8"
                model, _ = self._made(original, recipe, data_file("cifar10-train"), lowered(tuned))
                points = self._score(network, {"m": model}, original)["m"].points
                ratios = [measured(_folded(original), {"m": model}, batch)["m"] for batch in (1, 32)]
                share = cost(model).total.macs / cost(original).total.macs
                print(
                    f"| {network} | {speedup} | {share:.2f} | {points:.2f} | {fair:.2f} | {ratios[0]:.2f} "
                    f"| {ratios[1]:.2f} |", flush=True,
                )  # fmt: skip
                if speedup == FOR_INTEGERS[0]:
                    self.at_most(f"{network}, pruned, trained, int8: latency", ratios[0], 0.36)
                    self.at_least(f"{network}, pruned, trained, int8: points against the fair", points - fair, 0)

    def _tuned(self, network: str, original: Model, epochs: int) -> tuple[Model, float]:
        """The original trained with labels alone, and its top-1."""
        alone = self._training("labels=1", epochs)
        tuned, _ = self._made(original, alone, data_file("cifar10-train"), original)
        return tuned, self._score(network, {"m": tuned}, original)["m"].points

    def _training(self, how: str = TAUGHT, epochs: int | None = None) -> str:
        return f"recover{{epochs={epochs or self.epochs}, {how}, {RATE}, precision={self.precision}}}"

    def peers(self) -> None:
        """Half of the multiply-accumulates, no training: Torch-Pruning beside effc, on the same images and network."""
        from _torch_pruning import THERE, pruned
        from recover import DEPTHS, captured, hand_written

        seen = next(iter(open_data(data_file("cifar10-train")).batches(256)))
        x, y = seen.feeds["input"], seen.labels.astype(np.int64)
        for network in filter(DEPTHS.__contains__, self.networks):
            print(f"\n{network}, half of the multiply-accumulates, batch norms folded, no training", end="")
            print(f", then {self.peer_epochs} epochs on {self.images} images\n" if self.peer_epochs else "\n")
            original, models = live(network), {}
            for told, options in PEERED.items():
                models[f"effc, {told}"] = self._forced(network, f"prune-channels{{{options}}}", original)[0]
            if THERE:
                nets = pruned(hand_written(network), *map(torch_of, (x, y)), 0.5)
                models |= {f"Torch-Pruning, {told}": captured(net) for told, net in nets}
            else:
                print("Torch-Pruning is not installed: pip install --no-deps torch-pruning")
            folded = {name: _folded(model) for name, model in models.items()}
            scores = self._score(network, folded, original)
            ratios = [measured(_folded(original), folded, batch) for batch in (1, 32)]
            whole = cost(original).total.macs
            print("| how | MACs | top-1 | damage | latency, batch 1 | batch 32 | trained |")
            print("| --- | --- | --- | --- | --- | --- | --- |")
            for name, model in models.items():
                share, score = cost(model).total.macs / whole, scores[name]
                times = " | ".join(f"{ratio[name]:.2f}" for ratio in ratios)
                after = f"{self._trained_on(network, model, original):.2f}" if self.peer_epochs else ""
                print(
                    f"| {name} | {share:.3f} | {score.points:.2f} | {score.damage:.3f} | {times} | {after} |",
                    flush=True,
                )

    def _trained_on(self, network: str, model: Model, original: Model) -> float:
        data = f"{data_file('cifar10-train')}{{limit={self.images}}}"
        after = self._made(model, f"recover{{epochs={self.peer_epochs}, {HOW}}}", data)[0]
        return self._score(network, {"after": after}, original)["after"].points

    def lasso(self) -> None:
        """Group lasso against pruning without training, at equal multiply-accumulates and epochs in all."""
        data = f"{data_file('cifar10-train')}{{limit={self.images}}}"
        print(f"\n{self.images} images, {2 * self.epochs} epochs in all\n")
        print("| network | groups | how | MACs | pruned | trained on | seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for network in self.networks:
            original = live(network)
            whole = cost(original).total.macs
            for kind, name in (("taps", "prune-groups"), ("channels", "prune-channels")):
                how = f"group-lasso{{sparsity=0.5, groups={kind}, epochs={self.epochs}, {HOW}}}"
                lasso = self._made(original, f"{how}, {name}{{zeros=true}}", data)
                share = cost(lasso[0]).total.macs / whole
                free = self._made(original, f"{name}{{macs={share}}}", data)
                for told, epochs, (before, first) in (("group-lasso", 1, lasso), (name, 2, free)):
                    after, second = self._made(before, f"recover{{epochs={epochs * self.epochs}, {HOW}}}", data)
                    points = self._score(network, {"before": before, "after": after}, original)
                    self._row(network, kind, told, cost(after).total.macs / whole, points, first + second)
                    if told == "group-lasso":
                        reached = points["after"].points
                self.at_least(f"{network}, {kind}: group-lasso over {name}", reached, points["after"].points)
            fair, seconds = self._made(original, f"recover{{epochs={2 * self.epochs}, {HOW}}}", data)
            points = self._score(network, {"before": original, "after": fair}, original)
            self._row(network, "", "the original, trained alike", 1.0, points, seconds)

    def _row(
        self, network: str, kind: str, how: str, share: float, points: Mapping[str, Score], seconds: float
    ) -> None:
        before, after = (f"{points[key].points:.2f}" for key in ("before", "after"))
        print(f"| {network} | {kind} | {how} | {share:.3f} | {before} | {after} | {seconds:.0f} |", flush=True)

    def _made(self, model: Model, recipe: str, data: str, *teachers: Model) -> tuple[Model, float]:
        """What a recipe makes, by force, judged by multiply-accumulates; and seconds."""
        started = time.perf_counter()
        made = effc.optimize(
            model, recipe, calibrate=f"{data_file('cifar10-train')}{{limit=1024}}", train=data, teachers=teachers,
            goal="macs", measure=False, force=True, threads=self.threads,
        ).model  # fmt: skip
        return made, time.perf_counter() - started

    def _forced(self, network: str, recipe: str, original: Model | None = None) -> tuple[Model, float]:
        started = time.perf_counter()
        model = effc.load(model_file(network)) if original is None else original
        result = effc.optimize(
            model, recipe, calibrate=f"{data_file('cifar10-train')}{{limit=1024}}", train=data_file("cifar10-train"),
            measure=False, force=True, threads=self.threads,
        )  # fmt: skip
        return result.model, time.perf_counter() - started

    def _score(self, network: str, models: Mapping[str, Model], original: Model | None = None) -> dict[str, Score]:
        original = effc.load(model_file(network)) if original is None else original
        runtime = backend("onnxruntime")
        sessions = {name: runtime.session(m, threads=self.threads) for name, m in {"o": original, **models}.items()}
        return evaluate(sessions, open_data(data_file("cifar10-test")).for_model(original), reference="o")


def live(network: str) -> Model:
    """A network whose batch norms are not folded."""
    from recover import DEPTHS, captured, hand_written

    return captured(hand_written(network)) if network in DEPTHS else effc.load(model_file(network))


def torch_of(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _folded(model: Model) -> Model:
    return effc.optimize(model, "simplify, fold-batchnorm", measure=False, force=True).model


def simplified(model: Any) -> Model:
    return effc.optimize(model, "simplify", measure=False, force=True).model


def outputs(found: Channels) -> set[int]:
    """Units of the graph's outputs and those under a Softmax that ends it."""
    ends = ("is an output of the model", "depends on how many there are")
    held = [u for u, why in found.pinned.items() if why.endswith(ends[0])]
    last = [u for u, why in found.pinned.items() if why.startswith("Softmax") and why.endswith(ends[1])]
    return set(held) | (set(last) if len(last) >= CLASSES else set())


def some(found: Channels) -> set[int]:
    """About a third of each group."""
    rng, gone = np.random.default_rng(0), set()
    for group in found.groups:
        if group.pinned is None and len(group.units) > 1:
            gone |= set(rng.choice(group.units, max(1, len(group.units) // 3), replace=False).tolist())
    return gone


def ran(model: Model, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return backend("onnxruntime").session(model).run(feeds)


def distance(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(a[n] - b[n]).max() / max(np.abs(a[n]).max(), 1e-30)) for n in a)


def measured(original: Model, models: Mapping[str, Model], batch: int) -> dict[str, float]:
    """Latency over the original's, all measured in turns, one thread."""
    beside = {"original": original, **models}
    feeds = random_feeds(original, batch, {})
    found = compare_many(beside, feeds, backend=backend("onnxruntime"), reference="original")
    return {name: found[name].ratio for name in models}


def main() -> int:
    parser = Parser(__doc__, PARTS)
    parser.add_argument("--networks", nargs="+", choices=("resnet20", *NETWORKS), default=NETWORKS)
    parser.add_argument("--epochs", type=int, default=6, help="of recovery; of each half of lasso")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of recovery")
    parser.add_argument("--images", type=int, default=25_000, help="to train on in lasso and peers")
    parser.add_argument("--peer-epochs", type=int, default=0, help="to train networks of peers for, effc's too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bench = Bench(
        options.networks, options.epochs, options.precision, options.images, options.peer_epochs, options.threads
    )
    return bench.run(parser.parts(options))


if __name__ == "__main__":
    sys.exit(main())
