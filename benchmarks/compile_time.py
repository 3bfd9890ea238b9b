"""What compiling costs: seconds and memory of int8, beside the bare forward passes over the same calibration data.

    python benchmarks/compile_time.py [--models resnet20 ...] [--samples 256] [--json OUT.json]

Networks and data lie in $EFFC_DATA. Nothing is evaluated and nothing measured: what remains is calibration, and the
work that every compilation needs. Each run has a process of its own; its private memory (RssAnon, which leaves out
mapped files) is watched from outside, above that after imports and reading the data.

Exit status 1 when a mark is missed: seconds <= 3 x bare + 5, memory <= 3 x model + activations of a batch + 100 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RECIPES = "int8", "simplify,fold-batchnorm,int8"
MODELS = {
    "resnet20": ("resnet20-cifar10.onnx", {}),
    "resnet56": ("resnet56-cifar10.onnx", {}),
    "vgg-small": ("vgg-small-cifar10.onnx", {}),
    "mobilenet": ("mobilenet_v1_025-imagenet.onnx", {"scale": 127.5, "mean": 1}),
    "ultraface": ("ultraface-rfb-320.onnx", {"scale": 128, "mean": 127 / 128, "resize": [240, 320]}),
}
TICK = 0.002  # seconds between two looks at a process
MB = 1e6


@dataclass(frozen=True)
class Watched:
    """What a process did.

    Attributes:
        result: what its work returned.
        start: private bytes when it was ready to begin.
        peak: the most from then on.
    """

    result: Any
    start: int
    peak: int


def watch(work: Callable[..., Generator[None, None, Any]], *arguments: Any) -> Watched:
    """Run a generator function in a process of its own, and watch its private memory.

    Args:
        work: yields once, when it is ready; what it returns has to be picklable.
        arguments: given to it.

    Raises:
        RuntimeError: it ended without a result; what it said is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, work, arguments), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        start = peak = private_bytes(process.pid)
        here.send(None)
        while not here.poll(TICK):
            peak = max(peak, private_bytes(process.pid))
        result = here.recv()
        peak = max(peak, private_bytes(process.pid))
        here.send(None)
    except EOFError as error:
        raise RuntimeError(f"{work.__name__}{arguments} ended without a result") from error
    finally:
        process.join()
    return Watched(result, start, peak)


def _run(pipe: Connection, work: Callable[..., Generator[None, None, Any]], arguments: tuple) -> None:
    steps = work(*arguments)
    next(steps)
    pipe.send(None)
    pipe.recv()
    try:
        next(steps)
    except StopIteration as end:
        pipe.send(end.value)
        pipe.recv()  # the other side looks once more


def private_bytes(process: int | None) -> int:
    """Bytes of memory that no file stands behind (Linux)."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def calibration_data(name: str, samples: int):
    """The data of a network; CIFAR images for the networks that take them, else photographs."""
    from effc.data import open_data

    data = Path(os.environ["EFFC_DATA"], "data")
    how = MODELS[name][1]
    if not how:
        return open_data(f"{data}/cifar10-train.yaml{{limit={samples}}}")
    return open_data({"source": str(data / "imagenet-500"), "shuffle": 0, "limit": samples, **how})


def model_path(name: str) -> Path:
    return Path(os.environ["EFFC_DATA"], "models", MODELS[name][0])


def bare(name: str, samples: int, size: int) -> Generator[None, None, dict]:
    """Forward passes over the data in batches of `size`, with all optimisations of the runtime."""
    from effc.capture import load
    from effc.registry import backend

    model = load(model_path(name))
    data = calibration_data(name, samples).for_model(model)
    session = backend("onnxruntime").session(model, threads=1)
    yield
    start, running = time.perf_counter(), 0.0
    for batch in data.batches(model.batch or size):
        begin = time.perf_counter()
        session.run(batch.feeds)
        running += time.perf_counter() - begin
    return {"seconds": time.perf_counter() - start, "running": running}


def compiling(name: str, samples: int, recipe: str) -> Generator[None, None, dict]:
    """`effc.optimize` without evaluation and measurement."""
    from effc.api import optimize
    from effc.recipe import build, parse

    steps = build(parse(recipe))
    data = calibration_data(name, samples)
    next(data.batches(1))
    path = model_path(name)
    yield
    start, processor = time.perf_counter(), time.process_time()
    result = optimize(path, steps, calibrate=data, measure=False)
    took = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
    return {**took, "passes": {p.recipe: p.seconds for p in result.history.passes}}


def sizes(name: str) -> Generator[None, None, dict]:
    """Samples in a batch of calibration, and the bytes of all activations that int8 looks at in one."""
    from effc.capture import load
    from effc.statistics import batch_size

    yield
    model = load(model_path(name))
    # All that nodes make is the most that can be asked for; int8 asks for nearly all of it.
    tensors = [v.name for node in model.graph for v in node.outputs if v.name]
    size = batch_size(model, tensors)
    shapes = (s for t in tensors if (s := model.shapes(batch=size).get(t)))
    elements = sum(math.prod(s) for s in shapes if all(isinstance(d, int) for d in s))
    return {"batch": size, "activations": 4 * elements, "model": model_path(name).stat().st_size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the least time counts")
    parser.add_argument("--json", type=Path, help="write all rows here as well")
    options = parser.parse_args()
    if "EFFC_DATA" not in os.environ:
        print("skipped: set EFFC_DATA to the folder that holds models/ and data/")
        return 0
    print(f"{options.samples} calibration samples; seconds by the clock, the least of {options.repeats} runs\n")
    print("| model | batch | recipe | bare s | effc s | allowed | memory MB | allowed |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows, missed = [], []
    for name in options.models:
        size = watch(sizes, name).result
        forward = min(
            watch(bare, name, options.samples, size["batch"]).result["seconds"] for _ in range(options.repeats)
        )
        memory = 3 * size["model"] + size["activations"] + 100 * MB
        for recipe in RECIPES:
            runs = [watch(compiling, name, options.samples, recipe) for _ in range(options.repeats)]
            best = min(runs, key=lambda run: run.result["seconds"])
            used = max(run.peak - run.start for run in runs)
            seconds, limit = best.result["seconds"], 3 * forward + 5
            rows.append({"model": name, "recipe": recipe, "bare": forward, "memory": used, **size, **best.result})
            print(
                f"| {name} | {size['batch']} | {recipe} | {forward:.2f} | {seconds:.2f} | {limit:.1f}"
                f" | {used / MB:.0f} | {memory / MB:.0f} |",
                flush=True,
            )
            if seconds > limit:
                missed.append(f"{name}, {recipe}: {seconds:.1f} s, {limit:.1f} allowed")
            if used > memory:
                missed.append(f"{name}, {recipe}: {used / MB:.0f} MB, {memory / MB:.0f} allowed")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(f"\n{len(missed)} marks missed")
    print("".join(f"- {line}\n" for line in missed), end="")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
