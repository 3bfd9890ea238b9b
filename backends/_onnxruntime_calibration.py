"""How fast onnxruntime's kernels are on this machine, measured in random networks.

Each network runs with onnxruntime's profiler and without. The profiler tells kernels apart; what it adds to each is
found by comparing both over all networks, and taken off. Times are of the calling thread where it does all the work.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from effc.capture import from_proto
from effc.contract import Progress
from effc.kernels import FREE, Kernel
from effc.measure import random_feeds
from effc.model import Model
from effc.quiet import Quiet, lowest
from effc.runtime import Session, Timings
from effc.target import Roof

from ._onnxruntime_graph import optimised_graph
from ._onnxruntime_kernels import kernels, tensors
from ._onnxruntime_plans import family, groups, movements, walk
from ._onnxruntime_sequences import dense, sequence, transformer
from .onnxruntime import OnnxRuntime, load_session, session_options

LEAST_SECONDS, FEWEST_RUNS, MOST_RUNS = 0.04, 2, 30  # of undisturbed runs
PATIENCE = 0.25  # seconds to wait for them
HALF_TICK = 0.5  # the profiler cuts microseconds off
BUFFER = 1 << 26  # bytes: far beyond caches
LEAST_US = 0.3
LEAST_MACS = 1e9  # a second
LONG_US, PEAK = 20, 0.98  # kernels that tell how fast a type is, and the share of them that the best is above
HARDLY_KNOWN = 15  # undisturbed samples of a kind
USUAL = (2.5, 3.0, 2.5, 7.0)  # microseconds: added to a free, an integer, a float kernel; of a run

# Random networks: how many of each family, where there is time.
NETWORKS = (
    (family, 140), (walk, 60), (movements, 60), (groups, 30), (dense, 70), (transformer, 30), (sequence, 12),
)  # fmt: skip
EVERY = 4  # of so many networks one also runs without the profiler


@dataclass(frozen=True)
class Timed:
    """One network: its kernels, what each took with the profiler, and the whole without (or None); microseconds.

    Attributes:
        undisturbed: whether some of its runs were.
    """

    kernels: tuple[Kernel, ...]
    each: Sequence[float | None]
    whole: float | None
    undisturbed: bool


def calibrate(threads: int, seconds: float, progress: Progress) -> Timings:
    """Measure with so many threads, on as many networks as the time allows."""
    plan = _plan()
    done = progress(f"calibrating with {threads} thread{'s' if threads > 1 else ''}", len(plan))
    timed: list[Timed] = []
    quiet, started = Quiet(OnnxRuntime(), threads), time.perf_counter()
    for number, (maker, seed, quantised) in enumerate(plan):
        if time.perf_counter() - started > seconds:
            break
        proto, batch = maker(seed, quantised)
        found = _timed(from_proto(proto), batch, threads, quiet, whole=number % EVERY == 0)
        timed.append(found)
        done(1)
    added, run_us = _overheads([network for network in timed if network.undisturbed])
    samples = _samples([network for network in timed if network.undisturbed], added)
    known = Counter(kernel.key for kernel, _ in samples)
    # Disturbed times mislead, but tell more of a kind that is hardly known than nothing does.
    others = _samples([network for network in timed if not network.undisturbed], added)
    samples += [(kernel, us) for kernel, us in others if known[kernel.key] < HARDLY_KNOWN]
    undisturbed = sum(network.undisturbed for network in timed)
    return Timings(samples, _roof(samples, run_us, threads, quiet), undisturbed, len(timed))


def _samples(timed: Sequence[Timed], added: Mapping[str, float]) -> list[tuple[Kernel, float]]:
    return [
        (kernel, max(us - added[_class(kernel)], LEAST_US))
        for network in timed
        for kernel, us in zip(network.kernels, network.each, strict=True)
        if kernel.known and us is not None
    ]


def _plan() -> list[tuple[Callable[[int, bool], tuple[onnx.ModelProto, int]], int, bool]]:
    """All networks, so ordered that any beginning has its share of each family."""
    places = [
        ((seed + 0.5) / count, quantised, maker, seed)
        for maker, count in NETWORKS
        for seed in range(count)
        for quantised in (False, True)
    ]
    return [(maker, seed, quantised) for _, quantised, maker, seed in sorted(places, key=lambda p: p[:2])]


def _timed(model: Model, batch: int, threads: int, quiet: Quiet, *, whole: bool) -> Timed:
    feeds = random_feeds(model, batch)
    options = session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        profiled, optimised = optimised_graph(lambda o: load_session(model, o), options)
        sizes = {d: batch for info in model.inputs for d in info.shape or () if isinstance(d, str)}
        known = tensors(optimised, sizes, model.shapes(batch, {}), session_options(1, optimize=False))
        _, good = _run(profiled, feeds, quiet)
        events = json.loads(profiled.end_profiling().read_text())
    del profiled  # its threads would spin beside those of the next
    found = kernels(optimised.graph, known)
    each = _each(optimised.graph, [k.name for k in found], events, good)
    total = None
    if whole:
        times, good = _run(load_session(model, session_options(threads)), feeds, quiet)
        total = lowest(times, good) / 1e3
    return Timed(tuple(found), each, total, bool(good))


def _each(
    graph: onnx.GraphProto, names: Sequence[str], events: Sequence[Mapping], good: Sequence[int]
) -> list[float | None]:
    """What each kernel took: microseconds with the profiler; None where it cannot be told which event is its own."""
    own = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    count = len(names)
    ran = [event["args"]["op_name"] for event in own[:count]]
    if len(own) % max(count, 1) == 0 and ran == [node.op_type for node in graph.node]:
        # In the graph's order; nodes that stood in a function have no names to go by.
        durations = [[e["dur"] for e in own[place::count]] for place in range(count)]
    else:
        by_name = defaultdict(list)
        for event in own:
            by_name[event["name"].removesuffix("_kernel_time")].append(event["dur"])
        runs = max(good, default=0) + 1
        durations = [by_name[n] if n and names.count(n) == 1 and len(by_name[n]) >= runs else [] for n in names]
    return [lowest(d, good) + HALF_TICK if d else None for d in durations]


def _run(session: Session, feeds: Mapping[str, np.ndarray], quiet: Quiet) -> tuple[list[int], list[int]]:
    limits = {"seconds": LEAST_SECONDS, "fewest": FEWEST_RUNS, "most": MOST_RUNS, "patience": PATIENCE}
    return quiet.runs(lambda: session.run(feeds), **limits)


def _class(kernel: Kernel) -> str:
    """What the profiler adds differs little between kernels; these classes are told apart."""
    if kernel.kind == FREE:
        return FREE
    return "integer" if kernel.dtype == "int8" else "float"


def _overheads(timed: Sequence[Timed]) -> tuple[dict[str, float], float]:
    """Microseconds that the profiler adds to a kernel of each class, and that any inference costs beside its nodes.

    Least squares over networks, robust (Huber, by reweighting): sum of kernels - whole = added - run.
    """
    timed = [t for t in timed if t.whole is not None and None not in t.each]
    classes = (FREE, "integer", "float")
    counts = [[*(sum(_class(k) == c for k in t.kernels) for c in classes), -1.0] for t in timed]
    counts = np.array(counts).reshape(-1, 4)
    gaps = np.array([sum(t.each) - t.whole for t in timed])
    noise = np.array([0.02 * t.whole + 3 for t in timed])
    weights = np.ones(len(timed))
    found = np.zeros(4)
    # Few networks with much noise tell nothing: what is usual counts as an observation of its own.
    for _ in range(20):
        root = np.sqrt(weights) / noise
        rows, values = np.vstack([counts * root[:, None], np.eye(4) / 0.5]), [*(gaps * root), *(np.array(USUAL) / 0.5)]
        found = np.linalg.lstsq(rows, values, rcond=None)[0]
        off = np.abs(gaps - counts @ found) / noise
        weights = 1.5 / np.maximum(off, 1.5)
    return dict(zip(classes, map(float, found[:3]), strict=True)), max(float(found[3]), 0.0)


def _roof(samples: Sequence[tuple[Kernel, float]], run_us: float, threads: int, quiet: Quiet) -> Roof:
    rates = defaultdict(list)
    for kernel, us in samples:
        if kernel.macs and us > LONG_US:
            rates[kernel.dtype].append(kernel.macs / us * 1e6)
    best = {dtype: float(np.quantile(found, PEAK)) for dtype, found in rates.items()}
    best.setdefault("float32", LEAST_MACS)  # where too little was measured, what any processor reaches stands in
    idle = [us for kernel, us in samples if kernel.kind == FREE]
    overhead = float(np.median(idle)) if idle else 1.0
    return Roof(best, _bandwidth(threads, quiet.clock), overhead * 1e-6, run_us * 1e-6, quiet.best * 1e-9)


def _bandwidth(threads: int, clock: Callable[[], int]) -> float:
    """Bytes a second that a node reads and writes in main memory."""
    shape = [BUFFER // 4]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "copy", infos[:1], infos[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = session_options(threads)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = (ort.OrtValue.ortvalue_from_numpy(np.ones(shape, np.float32)) for _ in range(2))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    times = []
    for _ in range(6):
        start = clock()
        session.run_with_iobinding(binding)
        times.append(clock() - start)
    return 2 * BUFFER / (min(times) * 1e-9)
