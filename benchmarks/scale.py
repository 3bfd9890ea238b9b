"""How effc grows: a model of 2.5 GB in flat memory, and graphs of thousands of nodes in near-linear time.

    python benchmarks/scale.py                     # both
    python benchmarks/scale.py large --gb 2.5      # needs three times as much room in the folder for temporary files
    python benchmarks/scale.py nodes --nodes 5000 20000

`large`: weights of three layers are replaced and the model is saved; `effc.optimize` simplifies it, and it is saved.
Private memory is what no file stands behind (RssAnon): mapped weights do not count.
`nodes`: seconds of processor time to load, to optimise with `simplify`, and to save.

Exit status 1 when a mark is missed: private memory under 1 GB; 20,000 nodes in 15 s, and time that grows with at most
the power 1.25 of nodes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import onnx
from compile_time import MB, watch
from onnx import TensorProto, helper, numpy_helper

Clock = Callable[[], float]
VOCABULARY, HEAD = 16_384, 64
MEMORY, SECONDS, POWER = 1000 * MB, 15.0, 1.25
EDITED = 3


class Transformer:
    """Writes a transformer encoder with the shape arithmetic that exporters spell out; weights go to a file at once."""

    def __init__(self, path: Path, hidden: int, seed: int = 0) -> None:
        self.path, self.hidden = path, hidden
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._numbers = np.random.default_rng(seed).standard_normal(1 << 20).astype(np.float32)

    def write(self, layers: int, vocabulary: int) -> None:
        with open(self.path.with_suffix(".bin"), "wb") as self._file:
            self._file_weight("embedding", (vocabulary, self.hidden))
            for name, value in (("first", 0), ("second", 1)):
                self._inline(name, np.array(value))
            self._inline("axis", np.array([0]))
            self._inline("split", np.array([self.hidden // HEAD, HEAD]))
            self._inline("merged", np.array([self.hidden]))
            self._inline("root", np.array(HEAD**-0.5, np.float32))
            x = self._node("Gather", "embedding", "tokens", axis=0)
            for layer in range(layers):
                x = self._layer(x, f"layer{layer}")
        value = helper.make_tensor_value_info
        inputs = [value("tokens", TensorProto.INT64, ["N", "S"])]
        outputs = [value(x, TensorProto.FLOAT, ["N", "S", self.hidden])]
        graph = helper.make_graph(self.nodes, "transformer", inputs, outputs, self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), self.path)

    def _layer(self, x: str, name: str) -> str:
        h = self.hidden
        y = self._norm(x, f"{name}.norm1")
        q, k, v = (self._heads(self._linear(y, f"{name}.{part}", h, h)) for part in "qkv")
        scores = self._node("MatMul", q, self._node("Transpose", k, perm=[0, 1, 3, 2]))
        share = self._node("Softmax", self._node("Mul", scores, "root"), axis=-1)
        mixed = self._node("Transpose", self._node("MatMul", share, v), perm=[0, 2, 1, 3])
        mixed = self._node("Reshape", mixed, self._shape(mixed, "merged"))
        x = self._node("Add", x, self._linear(mixed, f"{name}.o", h, h))
        y = self._linear(self._norm(x, f"{name}.norm2"), f"{name}.up", h, 4 * h)
        return self._node("Add", x, self._linear(self._node("Gelu", y), f"{name}.down", 4 * h, h))

    def _heads(self, x: str) -> str:
        return self._node("Transpose", self._node("Reshape", x, self._shape(x, "split")), perm=[0, 2, 1, 3])

    def _shape(self, x: str, tail: str) -> str:
        """[size of axis 0, size of axis 1, tail ...], at length."""
        parts = (self._node("Gather", self._node("Shape", x), which) for which in ("first", "second"))
        return self._node("Concat", *(self._node("Unsqueeze", part, "axis") for part in parts), tail, axis=0)

    def _norm(self, x: str, name: str) -> str:
        for part, value in (("scale", 1.0), ("bias", 0.0)):
            self._inline(f"{name}.{part}", np.full(self.hidden, value, np.float32))
        return self._node("LayerNormalization", x, f"{name}.scale", f"{name}.bias")

    def _linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        self._file_weight(f"{name}.weight", (inputs, outputs))
        self._inline(f"{name}.bias", np.zeros(outputs, np.float32))
        return self._node("Add", self._node("MatMul", x, f"{name}.weight"), f"{name}.bias")

    def _node(self, op: str, *inputs: str, **attributes) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def _inline(self, name: str, array: np.ndarray) -> None:
        self.weights.append(numpy_helper.from_array(array, name))

    def _file_weight(self, name: str, shape: tuple[int, int]) -> None:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        place = {"location": Path(self._file.name).name, "offset": self._file.tell(), "length": 4 * math.prod(shape)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        numbers = self._numbers * np.float32(0.5 * shape[0] ** -0.5)
        for count in _blocks(math.prod(shape), len(numbers)):
            self._file.write(memoryview(numbers[:count]))
        self.weights.append(tensor)


def _blocks(total: int, block: int) -> Iterator[int]:
    yield from itertools.repeat(block, total // block)
    if total % block:
        yield total % block


def editing(path: Path, out: Path, clock_of: Clock) -> Generator[None, None, dict[str, float]]:
    """Load, give a few layers new weights, save; seconds of each."""
    from effc import edit
    from effc.capture import load
    from effc.save import save

    yield
    clock = [clock_of()]
    model = load(path)
    clock.append(clock_of())
    layers = [v for name, v in model.graph.initializers.items() if name.endswith(".o.weight")]
    for value in layers[:: max(1, len(layers) // EDITED)][:EDITED]:
        edit.set_initializer(model, value, np.asarray(model.constant(value)) * np.float32(0.5))
    clock.append(clock_of())
    save(model, out, external=True)
    clock.append(clock_of())
    return dict(zip(("load", "edit", "save"), np.diff(clock).tolist(), strict=True))


def simplifying(path: Path, out: Path, clock_of: Clock) -> Generator[None, None, dict[str, float]]:
    """Load, `effc.optimize` with `simplify`, save; seconds of each, and the nodes before and after."""
    from effc.api import optimize
    from effc.capture import load
    from effc.passes.simplify import Simplify
    from effc.save import save

    yield
    clock = [clock_of()]
    model = load(path)
    clock.append(clock_of())
    result = optimize(model, [Simplify()], measure=False, dims={"S": 8})
    clock.append(clock_of())
    save(result.model, out, external=True)
    clock.append(clock_of())
    nodes = {"before": len(model.graph), "after": len(result.model.graph)}
    return nodes | dict(zip(("load", "simplify", "save"), np.diff(clock).tolist(), strict=True))


def large(gigabytes: float, folder: Path) -> list[str]:
    """One large model; returns the marks missed."""
    hidden = 2048
    layers = max(EDITED, round((gigabytes * 1e9 - 4 * VOCABULARY * hidden) / (48 * hidden**2)))
    path, out, missed = folder / "large.onnx", folder / "out.onnx", []
    Transformer(path, hidden).write(layers, VOCABULARY)
    print(f"a model of {path.with_suffix('.bin').stat().st_size / 1e9:.2f} GB\n")
    print("| | seconds | private memory, MB | of these above imports |\n| --- | --- | --- | --- |")
    for work in (editing, simplifying):
        run = watch(work, path, out, time.perf_counter)
        times = ", ".join(
            f"{key} {run.result[key]:.1f}" for key in ("load", "edit", "simplify", "save") if key in run.result
        )
        print(f"| {work.__name__} | {times} | {run.peak / MB:.0f} | {(run.peak - run.start) / MB:.0f} |", flush=True)
        if run.peak > MEMORY:
            missed.append(f"{work.__name__}: {run.peak / MB:.0f} MB, {MEMORY / MB:.0f} allowed")
    return missed


def many(counts: list[int], folder: Path) -> list[str]:
    """Graphs of many nodes; returns the marks missed."""
    print("| nodes | load s | simplify s | nodes after | save s | in all | private memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    totals, missed = {}, []
    path, out = folder / "nodes.onnx", folder / "out.onnx"
    for count in sorted(counts):
        Transformer(path, HEAD).write(round(count / 57), 64)
        run = watch(simplifying, path, out, time.process_time)
        load, simplify, save = (run.result[key] for key in ("load", "simplify", "save"))
        nodes, total = run.result["before"], load + simplify + save
        totals[nodes] = total
        print(
            f"| {nodes} | {load:.2f} | {simplify:.2f} | {run.result['after']} | {save:.2f} | {total:.2f}"
            f" | {run.peak / MB:.0f} |",
            flush=True,
        )
        if total > SECONDS * max(1.0, nodes / 20_000):
            missed.append(f"{nodes} nodes: {total:.1f} s, {SECONDS:g} allowed")
    for (n, a), (m, b) in itertools.pairwise(totals.items()):
        if (power := math.log(b / a) / math.log(m / n)) > POWER:
            missed.append(f"from {n} to {m} nodes time grows with their power {power:.2f}, {POWER:g} allowed")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["large", "nodes"], help="default: both")
    parser.add_argument("--gb", type=float, default=2.5, help="size of the large model")
    parser.add_argument("--nodes", type=int, nargs="+", default=[5000, 20_000], help="sizes of graphs, about")
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        if options.part != "nodes":
            print("== large")
            missed += large(options.gb, Path(folder))
        if options.part != "large":
            print("== nodes")
            missed += many(options.nodes, Path(folder))
    print(f"\n{len(missed)} marks missed")
    print("".join(f"- {line}\n" for line in missed), end="")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
