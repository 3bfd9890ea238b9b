"""Training what passes left: the view against networks written by hand, and what recovery brings back.

    python benchmarks/recover.py [view|recovery|integers|killed ...] [--networks resnet56 vgg-small] [--epochs 14]

Needs networks and data in $EFFC_DATA and the packages torch and safetensors. `view`: outputs, the gradients of one step
of SGD, and the time of an epoch, of the trainable view and of the same network written in PyTorch. `recovery`: the
networks, batch norm live, at a half and a third of their multiply-accumulates (low-rank, by force), then trained on
the 25,000 training images, beside the original trained on them with their labels for as many epochs. Where they have
labels their teacher is the original trained on these for six epochs at most (more do not make it better); where they
have none, the original as it is, for two epochs of small steps. Top-1 on the 5,000 test images.
`integers`: a MobileNet in int8, and trained as it is deployed, without labels, on images that it is not judged on.
`killed`: `effc recover`, killed in the middle of an epoch and started again, against the same run left alone.

Exit status 1 when a mark is missed; the marks are listed under the tables.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from _marks import Marks, Parser, data_file, model_file
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import effc
from effc.data import open_data
from effc.evaluate import evaluate
from effc.model import Model
from effc.recover import Recover, train
from effc.registry import backend, trainer
from effc.schedule import Precision

CLOSE = 1e-5  # max|a - b| / max|a|
DEPTHS = {"resnet20": 3, "resnet56": 9}
SHARES = (0.5, 0.33)
BATCH, STEPS = 128, 20
TEACHING = 6  # epochs of a teacher
FEW = 350  # images to learn from
TAUGHT = {"labels": 0.3, "temperature": 4.0, "features": 0.0, "augment": "flip-shift"}
UNTAUGHT = {"labels": 0.0, "temperature": 4.0, "features": 0.0, "augment": "flip", "epochs": 2, "learning_rate": 0.003}
QAT = "epochs=8, batch=32, learning_rate=0.001, augment=flip, labels=0, temperature=1, frozen_norms=true"


class Block(nn.Module):
    """Two 3 x 3 convolutions, a shortcut that drops pixels and pads channels (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(x + y)


class ResNet(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [Block(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


class Bench(Marks):
    def __init__(self, networks: list[str], epochs: int, rate: float, precision: Precision, threads: int) -> None:
        self.networks, self.epochs, self.rate, self.threads = networks, epochs, rate, threads
        self.precision: Precision = precision
        super().__init__()

    def view(self) -> None:
        """Outputs, gradients and time of the view against the hand-written network's."""
        print("\n| network | outputs apart | a step's gradients apart | an epoch's time over the hand-written one's |")
        print("| --- | --- | --- | --- |")
        part = next(iter(open_data(data_file("cifar10-train")).batches(BATCH)))
        x, y = (torch.from_numpy(np.asarray(a)) for a in (part.feeds["input"], part.labels.astype(np.int64)))
        for network in filter(DEPTHS.__contains__, self.networks):
            own = hand_written(network)
            model = captured(own)
            view = trainer().view(model)
            with torch.no_grad():
                outputs = apart(own(x), view(x))
            gradients = max(
                apart(a.grad, b.grad) for a, b in zip(*(stepped(net, x, y) for net in (own, view)), strict=True)
            )
            ratio = self._ratio(own, view, x, y)
            print(f"| {network} | {outputs:.1e} | {gradients:.1e} | {ratio:.2f} |", flush=True)
            self.at_most(f"{network}: outputs", outputs, CLOSE)
            self.at_most(f"{network}: gradients", gradients, CLOSE)
            self.at_most(f"{network}: an epoch's time", ratio, 1.1)

    def _ratio(self, own: nn.Module, view: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
        """Median of the ratio of steps in turns, single images apart: an epoch is 196 of them."""
        ratios = []
        for _ in range(STEPS):
            times = []
            for net in (own, view):
                started = time.perf_counter()
                stepped(net, x, y)
                times.append(time.perf_counter() - started)
            ratios.append(times[1] / times[0])
        return float(np.median(ratios))

    def recovery(self) -> None:
        """Accuracy of split networks before and after training, beside the originals trained with labels alone."""
        columns = ("before", "with labels", "without labels", "seconds", "teacher", "original, trained as long")
        print(f"\n| network | MACs | {' | '.join(columns)} |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for network in self.networks:
            original = captured(hand_written(network)) if network in DEPTHS else effc.load(model_file(network))
            alone = {"labels": 1.0, "augment": "flip-shift"}
            tuned, _ = self._trained(original, original, **alone, epochs=min(TEACHING, self.epochs))
            fair = tuned if self.epochs <= TEACHING else self._trained(original, original, **alone)[0]
            teacher, points = self._points(tuned), self._points(fair)
            for share in SHARES:
                split = effc.optimize(
                    original, f"low-rank{{macs={share}}}",
                    calibrate=f"{data_file('cifar10-train')}{{limit=512}}", measure=False, force=True,
                    threads=self.threads,
                ).model  # fmt: skip
                hard, seconds = self._trained(split, lowered(tuned), **TAUGHT)
                soft, _ = self._trained(split, lowered(original), **UNTAUGHT)
                before, after, free = (self._points(m) for m in (split, hard, soft))
                cells = f"{before:.2f} | {after:.2f} | {free:.2f} | {seconds:.0f} | {teacher:.2f} | {points:.2f}"
                print(f"| {network} | {share} | {cells} |", flush=True)
                if share == SHARES[0]:
                    self.at_most(f"{network} at {share}: points lost against the fair baseline", points - after, 0)

    def _trained(self, model: Model, teacher: Model, **options: Any) -> tuple[Model, float]:
        started = time.perf_counter()
        usual = {"epochs": self.epochs, "learning_rate": self.rate, "precision": self.precision}
        how = Recover(**usual | options)
        found = train(model, how, data=data_file("cifar10-train"), teachers=[teacher], threads=self.threads)
        return found.model, time.perf_counter() - started

    def integers(self) -> None:
        """Quantisation-aware training from few images without labels, against int8 without training."""
        images = data_file("imagenet-500")
        few, rest = f"{images}{{shuffle=0, limit={FEW}}}", open_data(f"{images}{{shuffle=0, start={FEW}}}")
        original = effc.load(model_file("mobilenet_v1_025", "imagenet"))
        start = time.perf_counter()
        models, seconds = {"original": original}, {"original": 0.0}
        for name, more in (("int8", ""), ("int8, trained", f", recover{{{QAT}}}")):
            models[name] = effc.optimize(
                original, f"simplify, fold-batchnorm, int8{more}", calibrate=few, train=few, measure=False, force=True,
                threads=self.threads,
            ).model  # fmt: skip
            seconds[name], start = time.perf_counter() - start, time.perf_counter()
        sessions = {name: backend("onnxruntime").session(m, threads=self.threads) for name, m in models.items()}
        scores = evaluate(sessions, rest.for_model(original), reference="original")
        print(f"\nMobileNet v1 0.25, {FEW} images to learn from, {len(rest)} others to judge by; {QAT}")
        print("\n| model | top-1 | agrees with the original | damage | seconds |\n| --- | --- | --- | --- | --- |")
        for name, s in scores.items():
            print(f"| {name} | {s.points:.1f} | {100 * s.agreement:.1f} | {s.damage:.4f} | {seconds[name]:.0f} |")
        self.at_most("int8, trained: damage", scores["int8, trained"].damage, scores["int8"].damage)

    def killed(self) -> None:
        """The same final weights, whether the run was killed or not."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            once, again = ([*self._command(folder, run)] for run in ("once", "again"))
            subprocess.run(once, check=True)
            state = folder / "again.pt"
            process = subprocess.Popen(again)
            written: list[float] = []
            while len(written) < 2:  # before training, and after the first epoch
                time.sleep(0.01)
                if state.exists() and state.stat().st_mtime not in written:
                    written.append(state.stat().st_mtime)
            time.sleep((written[1] - written[0]) / 2)
            process.kill()
            print(f"\nkilled in the second epoch: exit status {process.wait()}")
            subprocess.run(again, check=True)
            first, second = (effc.load(folder / f"{run}.onnx").graph.initializers for run in ("once", "again"))
            off = max(
                float(np.abs(v.const_value.numpy() - second[k].const_value.numpy()).max()) for k, v in first.items()
            )
        print(f"weights of the run that was killed, from the other's: {off:g} apart")
        self.at_most("a killed run: weights apart", off, 0)

    def _command(self, folder: Path, run: str) -> list[str]:
        options = f"epochs=3, augment=flip-shift, checkpoint={folder / run}.pt"
        return [
            sys.executable, "-c", "from effc.cli import main; main()", "recover", str(model_file("resnet20")),
            "--train", f"{data_file('cifar10-train')}{{limit=3000}}", "--options", options,
            "-o", str(folder / f"{run}.onnx"), "--quiet", "--threads", str(self.threads),
        ]  # fmt: skip

    def _points(self, model: Model) -> float:
        session = backend("onnxruntime").session(model, threads=self.threads)
        data = open_data(data_file("cifar10-test")).for_model(model)
        return evaluate({"model": session}, data, reference="model")["model"].points


def hand_written(network: str) -> ResNet:
    net = ResNet(DEPTHS[network])
    net.load_state_dict(load_file(Path(os.environ["EFFC_DATA"], "models", f"{network}-cifar10.safetensors")))
    return net.eval()


def captured(net: nn.Module) -> Model:
    return effc.capture(net, torch.zeros(2, 3, 32, 32), input_names=["input"])


def lowered(teacher: Model) -> Model:
    """A teacher in int8, which is as good and takes a third of the time."""
    few = f"{data_file('cifar10-train')}{{limit=256}}"
    return effc.optimize(teacher, "simplify, fold-batchnorm, int8", calibrate=few, measure=False, force=True).model


def stepped(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[Any]:
    """The parameters of a network, in the order of their sizes and sums, after forward and backward in train mode."""
    net.train()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        return sorted(net.parameters(), key=lambda p: (p.ndim, p.numel(), float(p.double().sum())))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def main() -> int:
    parser = Parser(__doc__, ["view", "recovery", "integers", "killed"])
    known = [*DEPTHS, "vgg-small"]
    parser.add_argument("--networks", nargs="+", choices=known, default=known)
    parser.add_argument("--epochs", type=int, default=14, help="of recovery")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of recovery")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="of training")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.networks, options.epochs, options.rate, options.precision, options.threads)
    return bench.run(parser.parts(options))


if __name__ == "__main__":
    sys.exit(main())
