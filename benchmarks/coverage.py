"""What loads, what is simplified and folded, and whether the numbers stay: tables over public models and test cases.

    python benchmarks/coverage.py                  # everything
    python benchmarks/coverage.py light            # the networks in the onnx package
    python benchmarks/coverage.py cases --limit 50 # onnx's own test cases
    python benchmarks/coverage.py constants        # the same cases of one node, as constant expressions to be folded
    python benchmarks/coverage.py scale            # seconds on graphs of 5,000 and 20,000 nodes

Exit status 1 when something fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from effc.backends.onnxruntime import REFUSALS
from effc.capture import from_proto, load
from effc.contract import Context, Pass, Proposal
from effc.errors import BadInput
from effc.model import STANDARD_DOMAINS, Model
from effc.opset import ir_version_of
from effc.passes import _constants
from effc.passes.fold_batchnorm import FoldBatchNorm
from effc.passes.simplify import Simplify

# An operator or a type that an opset or onnxruntime does not have.
UNKNOWN = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, *REFUSALS)
TOLERANCE = 1e-5  # largest max|a - b| / max|a|
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool"}


@dataclass
class Tally:
    """Counts by kind, and a line for every failure."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def fail(self, what: str, error: object) -> None:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self.failures.append(f"{what}: {first}")
        self.counts["failed"] += 1


def apply(model: Model, *steps: Pass) -> None:
    """Run passes without a manager, all that they propose."""
    context = cast(Context, None)  # these passes ask it nothing
    for step in steps:
        chosen = [p for p in step.propose(model, context) if isinstance(p, Proposal)]
        step.rewrite(model, chosen, context)


def run(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def distance(a: list, b: list) -> float:
    """Largest max|a - b| / max|a| over all outputs; infinite where types or shapes differ."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if isinstance(x, list):
            worst = max(worst, distance(x, y))
            continue
        x, y = np.asarray(x), np.asarray(y)
        if x.shape != y.shape or x.dtype != y.dtype:
            return np.inf
        if x.dtype.kind in "fc":
            same = (x == y) | (np.isnan(x) & np.isnan(y))
            with np.errstate(invalid="ignore"):
                difference = np.where(same, 0, np.abs(x.astype(np.float64) - y))
            scale = np.abs(x[np.isfinite(x)]).max(initial=0.0)
            worst = max(worst, float(difference.max(initial=0.0) / max(scale, 1e-30)))
        elif not np.array_equal(x, y):
            return np.inf
    return worst


# (a) the networks in the onnx package


def light(tally: Tally) -> None:
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    columns = (
        ("nodes", 7),
        ("KB", 7),
        ("simplified", 12),
        ("KB", 7),
        ("weighted", 10),
        ("folded", 8),
        ("difference", 12),
    )
    print(f"{'network':24}" + "".join(f"{name:>{width}}" for name, width in columns))
    for path in sorted(folder.glob("*.onnx")):
        name = path.stem.removeprefix("light_")
        try:
            print(_light_row(path, name, tally))
        except Exception as error:  # any failure is what is looked for here
            tally.fail(name, error)


def _light_row(path: Path, name: str, tally: Tally) -> str:
    model = load(path)
    size = model.proto().ByteSize()
    small = model.clone()
    apply(small, Simplify(), FoldBatchNorm())
    shrunk = small.proto().ByteSize()
    if shrunk > 1.01 * size:
        tally.fail(name, f"grew from {size} to {shrunk} bytes")
    rng = np.random.default_rng(0)
    proto = with_weights(onnx.load(path), rng)
    shape = [d if isinstance(d, int) else 1 for d in model.inputs[0].shape]
    feeds = {model.inputs[0].name: rng.standard_normal(shape).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        onnx.save(proto, first)
        del proto
        expected = run(first, feeds)
        full = load(first)
        onnx.save(full.proto(), second)
        if (kept := distance(expected, run(second, feeds))) > 0:
            tally.fail(name, f"load and save changed the outputs by {kept:.1e}")
        norms = sum(1 for _ in full.nodes("BatchNormalization"))
        apply(full, Simplify(), FoldBatchNorm())
        left = sum(1 for _ in full.nodes("BatchNormalization"))
        message = full.proto()
        onnx.checker.check_model(message)
        onnx.save(message, second)
        del message
        error = distance(expected, run(second, feeds))
    tally.counts["networks"] += 1
    if not error <= TOLERANCE:
        tally.fail(name, f"outputs differ by {error:.1e}")
    return (
        f"{name:24}{len(model.graph):7}{size // 1024:7}{len(small.graph):12}{shrunk // 1024:7}"
        f"{len(full.graph):10}{f'{norms - left}/{norms}':>8}{error:12.1e}"
    )


def with_weights(proto: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Seeded weights for the ConstantOfShape nodes: He's for filters, positive variances, the rest near its neutral."""
    sizes = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    readers = {name: (node, i) for node in proto.graph.node for i, name in enumerate(node.input)}
    kept, made = [], []
    for node in proto.graph.node:
        if node.op_type != "ConstantOfShape" or node.input[0] not in sizes:
            kept.append(node)
            continue
        shape = sizes[node.input[0]].tolist()
        reader, index = readers[node.output[0]]
        if reader.op_type in LINEAR and index == 1:
            array = rng.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
        elif reader.op_type == "BatchNormalization" and index in (1, 4):
            array = 0.75 + 0.5 * rng.random(shape)
        elif reader.op_type == "Mul":
            array = 1 + 0.1 * rng.standard_normal(shape)
        else:
            array = 0.1 * rng.standard_normal(shape)
        made.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    proto.graph.initializer.extend(made)
    softmax = next((n for n in reversed(kept) if n.op_type == "Softmax"), None)
    if softmax is not None:  # what goes into it shows differences that it would hide
        proto.graph.output.append(helper.make_tensor_value_info(softmax.input[0], onnx.TensorProto.FLOAT, None))
    return proto


# (b) onnx's test cases


def cases(tally: Tally, limit: int | None, opsets: range) -> None:
    """Each case as it stands, and with batch norms behind and before its layer and its other inputs as weights."""
    for number, (name, proto, feeds) in enumerate(test_cases(LINEAR | POOLS)):
        if limit is not None and number >= limit:
            break
        tally.counts["cases"] += 1
        ran = 0
        for opset in opsets:
            for kind, variant, inputs in variants(at_opset(proto, opset), feeds):
                try:
                    onnx.checker.check_model(variant, full_check=True)
                    expected = run(variant, inputs)
                except UNKNOWN:
                    continue
                ran += 1
                _check_case(f"{name}, opset {opset}, {kind}", kind, variant, inputs, expected, tally)
        tally.counts["cases that onnxruntime runs"] += ran > 0
    for key, count in tally.counts.items():
        print(f"{count:7} {key}")


def _check_case(what, kind, proto, feeds, expected, tally: Tally) -> None:
    tally.counts[f"models checked, {kind}"] += 1
    try:
        model = from_proto(proto, what)
        if distance(expected, run(model.proto(), feeds)):
            tally.fail(what, "load and save changed the outputs")
        norms = sum(1 for _ in model.nodes("BatchNormalization"))
        apply(model, Simplify(), FoldBatchNorm())
        left = sum(1 for _ in model.nodes("BatchNormalization"))
        message = model.proto()
        onnx.checker.check_model(message, full_check=True)
        error = distance(expected, run(message, feeds))
    except BadInput as error:
        tally.counts[f"refused: {str(error).split(':')[0][:60]}"] += 1
        return
    except Exception as error:  # any other failure is what is looked for here
        tally.fail(what, f"{type(error).__name__}: {error}")
        return
    tally.counts["batch norms folded"] += norms - left
    tally.counts["batch norms left"] += left
    bound = 4e-3 if any(np.asarray(x).dtype == np.float16 for x in expected) else TOLERANCE
    if not error <= bound:
        tally.fail(what, f"outputs differ by {error:.1e}")


def test_cases(ops: set[str] | None) -> Iterator[tuple[str, onnx.ModelProto, dict[str, np.ndarray]]]:
    """Cases of the onnx package that hold one of these operators (None: any), with the first of their data sets."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            c
            for kind in ("node", "simple", "pytorch-converted", "pytorch-operator")
            for c in load_model_tests(kind=kind)
        ]
    for case in sorted(found, key=lambda c: c.name):
        folder = Path(case.model_dir) if case.model_dir else None
        proto = case.model if case.model is not None else onnx.load(folder / "model.onnx")
        if ops is not None and not any(n.op_type in ops for n in proto.graph.node):
            continue
        weights = {t.name for t in proto.graph.initializer}
        names = [i.name for i in proto.graph.input if i.name not in weights]
        if folder is None:
            arrays = [a for a in case.data_sets[0][0] if isinstance(a, np.ndarray | np.generic)]
        else:
            paths = [folder / "test_data_set_0" / f"input_{i}.pb" for i in range(len(names))]
            arrays = [numpy_helper.to_array(onnx.load_tensor(p)) for p in paths]
        yield case.name, proto, dict(zip(names, arrays, strict=False))


def at_opset(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same graph at another opset: lifted by onnx's converter from 8 and below, else only said to be of it."""
    found = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    if found < 9:
        try:
            copy = onnx.version_converter.convert_version(copy, 9)
        except (RuntimeError, onnx.version_converter.ConvertError):  # the case stays as it is
            return copy
    for entry in copy.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    copy.ir_version = max(ir_version_of(opset), 4)
    return copy


def variants(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]):
    yield "as it stands", proto, feeds
    node = proto.graph.node[0]
    if len(proto.graph.node) != 1 or node.op_type not in LINEAR or not {n for n in node.input if n} <= set(feeds):
        return
    for behind in (True, False):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        data, *others = node.input
        weights = [numpy_helper.from_array(feeds[n], n) for n in others if n]
        del copy.graph.input[1:]
        copy.graph.initializer.extend(weights)
        info = copy.graph.output[0] if behind else copy.graph.input[0]
        shape = info.type.tensor_type.shape.dim
        if len(shape) < 2:
            continue
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        rng = np.random.default_rng(len(shape))
        for kind, centre in (("scale", 1.0), ("bias", 0.0), ("mean", 0.0), ("var", 1.0)):
            array = (centre + 0.3 * rng.uniform(-1, 1, shape[1].dim_value)).astype(dtype)
            copy.graph.initializer.append(numpy_helper.from_array(array, f"bn.{kind}"))
        names = [f"bn.{kind}" for kind in ("scale", "bias", "mean", "var")]
        layer = copy.graph.node[0]
        if behind:
            norm = helper.make_node("BatchNormalization", ["bn.in", *names], [layer.output[0]], name="bn")
            layer.output[0] = "bn.in"
            copy.graph.node.append(norm)
        else:
            norm = helper.make_node("BatchNormalization", [data, *names], ["bn.out"], name="bn")
            layer.input[0] = "bn.out"
            copy.graph.node.insert(0, norm)
        yield f"batch norm {'behind' if behind else 'before'}", copy, {data: feeds[data]}


# (c) constant expressions


def constants(tally: Tally, limit: int | None, opsets: range) -> None:
    """Cases of one operator with all inputs as weights: simplify must compute what onnxruntime computes."""
    room = _constants.NODE_BYTES
    _constants.NODE_BYTES = 1 << 20  # fold whatever can be
    for number, (name, proto, feeds) in enumerate(test_cases(None)):
        if limit is not None and number >= limit:
            break
        alone = len(proto.graph.node) == 1 and proto.graph.node[0].domain in STANDARD_DOMAINS
        tensors = bool(feeds) and all(isinstance(array, np.ndarray | np.generic) for array in feeds.values())
        for opset in opsets if alone and tensors else ():
            try:
                folded = constant_expression(at_opset(proto, opset), feeds)
                onnx.checker.check_model(folded, full_check=True)
                expected = run(folded, {})
                model = from_proto(folded, name)
            except (BadInput, *UNKNOWN):
                continue
            tally.counts["expressions"] += 1
            try:
                apply(model, Simplify())
                tally.counts["folded"] += all(n.op_type == "Identity" for n in model.graph)
                error = distance(expected, run(model.proto(), {}))
            except Exception as fault:  # any failure is what is looked for here
                tally.fail(f"{name}, opset {opset}", fault)
                continue
            if not error <= TOLERANCE and proto.graph.node[0].op_type not in _constants.RANDOM:
                tally.fail(f"{name}, opset {opset}", f"outputs differ by {error:.1e}")
    _constants.NODE_BYTES = room
    for key, count in tally.counts.items():
        print(f"{count:7} {key}")


def constant_expression(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The inputs as weights, and Identity behind each output, since outputs themselves are never folded."""
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in feeds.items())
    del proto.graph.input[:]
    node = proto.graph.node[0]
    for info in proto.graph.output:
        index = list(node.output).index(info.name)
        node.output[index] = f"{info.name}_inner"
        proto.graph.node.append(helper.make_node("Identity", [node.output[index]], [info.name], name=info.name))
    return proto


# (d) large graphs


def scale(tally: Tally, sizes: list[int]) -> None:
    columns = ("nodes", 7), ("load", 8), ("simplify", 10), ("nodes", 7), ("fold", 8), ("nodes", 7), ("save", 8)
    print("".join(f"{name:>{width}}" for name, width in columns) + "   seconds of processor time")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.onnx"
        for size in sizes:
            onnx.save(large(size), path)
            times, nodes = [time.process_time()], []
            model = load(path)
            nodes.append(len(model.graph))
            times.append(time.process_time())
            for step in (Simplify(), FoldBatchNorm()):
                apply(model, step)
                nodes.append(len(model.graph))
                times.append(time.process_time())
            _save(model, Path(folder) / "out.onnx")
            times.append(time.process_time())
            loading, simplify, fold, save = np.diff(times)
            print(f"{nodes[0]:7}{loading:8.2f}{simplify:10.2f}{nodes[1]:7}{fold:8.2f}{nodes[2]:7}{save:8.2f}")
            if loading + simplify + save > 15:
                tally.fail(f"{size} nodes", f"{loading + simplify + save:.1f} s for load, simplify and save")


def _save(model: Model, path: Path) -> None:
    try:
        from effc.save import save
    except ImportError:
        onnx.save(model.proto(), path)
    else:
        save(model, path)


def large(size: int) -> onnx.ModelProto:
    """Residual blocks, each with a repeated node, a flatten spelled at length and back, and nodes that do nothing."""
    rng = np.random.default_rng(0)
    nodes, weights = [], {"axis": np.array([0]), "first": np.array(0), "rest": np.array([8, 16])}

    def node(op: str, *inputs: str, **attributes) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def weight(array: np.ndarray) -> str:
        weights[f"w{len(weights)}"] = array.astype(np.float32)
        return f"w{len(weights) - 1}"

    x = "input"
    while len(nodes) < size:
        conv = node("Conv", x, weight(rng.standard_normal((8, 8, 3, 3)) * 0.1), pads=[1] * 4)
        y = node("BatchNormalization", conv, *(weight(rng.uniform(0.5, 1, 8)) for _ in range(4)))
        gate = node("Mul", node("Sigmoid", y), node("Sigmoid", y))
        shape = node("Unsqueeze", node("Gather", node("Shape", gate), "first"), "axis")
        flat = node("Reshape", gate, node("Concat", shape, "rest", axis=0))
        shape = node("Unsqueeze", node("Gather", node("Shape", flat), "first"), "axis")
        tail = node("Constant", value=numpy_helper.from_array(np.array([8, 4, 4])))
        y = node("Reshape", node("Identity", flat), node("Concat", shape, tail, axis=0))
        y = node("Transpose", node("Transpose", y, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
        x = node("Relu", node("Add", x, y))
    info = helper.make_tensor_value_info
    inputs, outputs = (info(n, 1, ["N", 8, 4, 4]) for n in ("input", x))
    initializers = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "large", [inputs], [outputs], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["light", "cases", "constants", "scale"]
    parser.add_argument("parts", nargs="*", choices=["all", *parts], default="all", help="any of them")
    parser.add_argument("--limit", type=int, help="first so many test cases")
    parser.add_argument("--opset", type=int, help="test cases at this opset only")
    parser.add_argument("--nodes", type=int, nargs="+", default=[5000, 20000], help="sizes of large graphs")
    options = parser.parse_args()
    opsets = range(9, 24) if options.opset is None else range(options.opset, options.opset + 1)
    tallies = {part: Tally() for part in (parts if "all" in options.parts else options.parts)}
    for part, tally in tallies.items():
        print(f"== {part}")
        if part == "light":
            light(tally)
        elif part == "cases":
            cases(tally, options.limit, opsets)
        elif part == "constants":
            constants(tally, options.limit, opsets)
        else:
            scale(tally, options.nodes)
        print(f"{len(tally.failures)} failures")
        print("\n".join(tally.failures))
    return int(any(t.failures for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
