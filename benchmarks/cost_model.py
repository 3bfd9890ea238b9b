"""What the cost model says against what is so: multiply-accumulates, latency, which rewrites pay, and its own cost.

    python benchmarks/cost_model.py                                   # everything; about an hour
    python benchmarks/cost_model.py macs                              # MACs against published figures and a counter
    python benchmarks/cost_model.py latency --models 'resnet|vgg'     # predicted and measured milliseconds
    python benchmarks/cost_model.py signs --seconds 0.3               # does a rewrite pay: predicted and measured
    python benchmarks/cost_model.py scale --nodes 20000               # seconds to cost a large graph
    python benchmarks/cost_model.py latency --quick --out rows.csv    # a few models, for a look

No model here served to calibrate a target. `--target` is a name or a file; without it, this machine's calibrated file
or the shipped target that fits. $EFFC_DATA names the folder with models/; what needs it is left out where it is not
set. Models are made once and kept in --work. `latency` times models alone, in fresh sessions until two agree within
3 %, while nothing else disturbs the machine (`effc.quiet`); what never agrees is counted and not judged. Errors are
stated as they are, and once more less what the machine itself has drifted since it was calibrated, by the small network
that is watched.

Exit status 1 when a mark is missed; the marks are listed at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from _cost_model import NEVER, Bench, latency, percent, signs, words
from _zoo import LIGHT
from _zoo_nets import deep
from onnx import helper
from scale import HEAD, Transformer

from effc.capture import load
from effc.cost import cost
from effc.errors import EffcError
from effc.model import Model, collection_paused
from effc.predict import predict

PUBLISHED = 0.01  # allowed of a published figure, which is rounded
SECONDS = 2.0  # allowed for a graph of 20,000 nodes

# macs: network -> published figure in millions, source, and whether it is of this very graph
KNOWN = {
    "resnet20-cifar10": (
        40.55,
        "chenyaofo/CIFAR-pretrained-models: 40.81, with 0.26 in 1x1 shortcuts not in this graph",
        True,
    ),
    "resnet56-cifar10": (125.49, "Li et al. 2017 (pruning filters), table 1: 1.25e8", True),
    "mobilenet_v1_025-imagenet": (41.03, "Howard et al. 2017, table 6: 41 million", True),
    "bvlc_alexnet": (727, "albanie/convnet-burden, of 227 x 227 pixels; this graph takes 224 x 224", False),
    "densenet121": (2830, "torchvision, DenseNet121_Weights: 2.83 G", True),
    "inception_v1": (1430, "Sze et al. 2017, table 2: 1.43 G", True),
    "inception_v2": (2030, "Hu et al. 2018 (squeeze-and-excitation), table 2, BN-Inception: 2.03 G", True),
    "resnet50": (4090, "torchvision, ResNet50_Weights: 4.09 G (He et al. 2016: 3.8 G, strides in the 1x1)", True),
    "squeezenet": (350, "torchvision, SqueezeNet1_1_Weights: 0.35 G", True),
    "vgg19": (19_600, "He et al. 2016, section 3.3: 19.6 billion", True),
}


def macs(bench: Bench) -> str:
    """Returns the summary."""
    entries, done, exact = bench.entries(), 0, 0
    print("\n| network | effc, M | counter, M | nodes unknown | published, M | difference | source |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for entry in sorted(entries, key=lambda e: (e.family != "shared", e.family != "light", e.name)):
        try:
            light = LIGHT / f"light_{entry.name}.onnx"
            path = light if entry.family == "light" else bench.zoo.file(entry)
            found, counted = cost(load(path), 1, entry.dims), counted_macs(onnx.load(path), entry.dims)
        except EffcError as error:
            bench.missed.append(f"macs of {entry.name}: {words(error)}")
            continue
        own, done = found.total.macs, done + 1
        exact += own == counted
        if own != counted:
            bench.missed.append(f"macs of {entry.name}: {own}, counted {counted}; {len(found.unknown)} nodes unknown")
        published, source, same = KNOWN.get(entry.name, (None, "", False))
        off = None if published is None else own / 1e6 / published - 1
        if same and off is not None and abs(off) > PUBLISHED:
            bench.missed.append(f"macs of {entry.name}: {off:+.1%} from the published figure")
        bench.rows.append(
            {"part": "macs", "model": entry.name, "macs": own, "counted": counted, "published": published}
        )
        figures = f"{own / 1e6:.2f} | {counted / 1e6:.2f} | {len(found.unknown)} | {published or NEVER}"
        print(f"| {entry.name} | {figures} | {percent(off)} | {source} |")
    return f"macs: {exact} of {done} networks equal the counter"


def counted_macs(proto: onnx.ModelProto, dims: Mapping[str, int]) -> int:
    """Multiply-accumulates of one sample, from onnx's shape inference and the nodes' attributes alone."""
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    shapes = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        sizes = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(d.dim_value or dims.get(d.dim_param, 1) for d in sizes)
    total = 0
    for node in graph.node:
        has = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("Conv", "ConvTranspose"):
            x, y = shapes[node.input[0]], shapes[node.output[0]]
            met, made = (y, x) if node.op_type == "ConvTranspose" else (x, y)
            kernel = has.get("kernel_shape") or shapes[node.input[1]][2:]
            total += math.prod(made) * met[1] // has.get("group", 1) * math.prod(kernel)
        elif node.op_type in ("Gemm", "MatMul"):
            inner = 0 if has.get("transA") else -1
            total += math.prod(shapes[node.output[0]]) * shapes[node.input[0]][inner]
    return total


def scale(bench: Bench) -> str:
    """Returns the summary."""
    print("\n| graph | nodes | cost, s | prediction without runtime, s |\n| --- | --- | --- | --- |")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "large.onnx", bench.options.nodes
        makers = {
            "residual": lambda: onnx.save(deep(size), path),
            "transformer": lambda: Transformer(path, HEAD).write(round(size / 57), 64),
        }
        for name, make in makers.items():
            make()
            model = load(path)
            work = {"cost": _cost, "predict": _predict}
            took = {key: _seconds(model, lambda fresh, do=do: do(bench, fresh)) for key, do in work.items()}
            nodes = len(model.graph)
            cells = (NEVER if s is None else f"{s:.2f}" for s in took.values())
            print(f"| {name} | {nodes} | {' | '.join(cells)} |", flush=True)
            bench.rows.append({"part": "scale", "graph": name, "nodes": nodes, **took})
            for key, seconds in took.items():
                worst = max(worst, seconds or 0.0)
                if seconds is not None and seconds > SECONDS * max(1.0, nodes / 20_000):
                    bench.missed.append(f"scale: {key} of {name}, {nodes} nodes: {seconds:.1f} s, {SECONDS:g} allowed")
    return f"scale: at most {worst:.2f} s"


def _cost(bench: Bench, model: Model) -> bool:
    return bool(cost(model, 1, {"S": 8}).nodes)


def _predict(bench: Bench, model: Model) -> bool:
    return bool(predict(model, bench.target, dims={"S": 8}).nodes)


def _seconds(model: Model, work: Callable[[Model], bool]) -> float | None:
    """Processor time, the least of three; each time with a model of which nothing is known yet. None: it failed."""
    times = []
    for _ in range(3):
        with collection_paused():
            fresh = Model(model.ir.clone())
        start = time.process_time()
        if not work(fresh):
            return None
        times.append(time.process_time() - start)
    return min(times)


def write(bench: Bench, path: Path) -> None:
    """All rows: as JSON with what they are of, or as CSV."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in bench.rows for key in row)))
            writer.writeheader()
            writer.writerows(bench.rows)
        return
    target = {key: getattr(bench.target, key) for key in ("name", "origin", "source", "processor", "runtime_version")}
    path.write_text(json.dumps({"target": target, "runtime": bench.runtime.version(), "rows": bench.rows}, indent=1))


PARTS = {"macs": macs, "latency": latency, "signs": signs, "scale": scale}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--models", metavar="REGEX", default="", help="those models and rewrites alone")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.6, help="measuring time for each model and setting")
    parser.add_argument("--quick", action="store_true", help="every eighth model, in less time, with one thread")
    parser.add_argument("--target", help="name of a target, or a file of effc calibrate-target")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "effc-cost-model"))
    parser.add_argument("--nodes", type=int, default=20_000, help="size of the large graphs, about")
    parser.add_argument("--out", type=Path, help="write all rows here as well: .json or .csv")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.threads = min(options.seconds, 0.2), [1]
    bench = Bench(options)
    print(f"target {bench.target.name} ({bench.target.origin}); onnxruntime {bench.runtime.version()}")
    print(bench.target.remark or bench.target.source)
    summaries = []
    for part in options.parts or PARTS:
        print(f"\n== {part}\n")
        summaries.append(PARTS[part](bench))
        print(f"\n{summaries[-1]}", flush=True)
        if options.out:
            write(bench, options.out)
    bench.missed += [f"{count} predictions failed: {reason}" for reason, count in bench.unpredicted.items()]
    print("\n" + "\n".join(summaries))
    print(f"\n{len(bench.missed)} marks missed")
    print("".join(f"- {line}\n" for line in bench.missed), end="")
    return int(bool(bench.missed))


if __name__ == "__main__":
    sys.exit(main())
