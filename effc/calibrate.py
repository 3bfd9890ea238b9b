"""`effc calibrate-target`: measures a runtime's kernels on this machine and makes a target file of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np

from effc import kernels
from effc.contract import Progress, no_progress
from effc.kernels import Kernel
from effc.predict import design
from effc.regression import fit
from effc.runtime import Backend
from effc.target import KERNEL_FLAGS, MEASURED, Samples, Target, cores, cpu_flags, onnxruntime_kernels, processor

SECONDS, ALONE = 255.0, 0.6  # to measure, and the share of it with one thread
MOST_ROWS = {kernels.CONVOLUTION: 450, kernels.MATRIX: 260, kernels.ELEMENTS: 200}  # of one kind of kernel


def calibrate(backend: Backend, *, seconds: float = SECONDS, progress: Progress = no_progress) -> Target:
    """Measure this machine with one thread and with all.

    Args:
        seconds: to measure, most of them with one thread; with less than the default predictions are worse.
    """
    started = time.perf_counter()
    everyone = cores()
    alone = backend.calibrate(1, seconds * (ALONE if everyone > 1 else 1.0), progress)
    roofs, tables = {1: alone.roof}, {1: _alone(alone.samples)}
    if everyone > 1:
        together = backend.calibrate(everyone, seconds * (1 - ALONE), progress)
        roofs[everyone] = together.roof
        tables[everyone] = _together(together.samples, alone.samples)
    flags = KERNEL_FLAGS & cpu_flags()
    took = time.perf_counter() - started
    busy = alone.networks - alone.undisturbed
    besides = f"; other work disturbed {busy} of {alone.networks} networks all the time" if busy else ""
    return Target(
        name=f"{backend.name}-calibrated",
        runtime=backend.name,
        device="cpu",
        integer=onnxruntime_kernels(flags),
        roofs=roofs,
        cache=last_cache(),
        flags=flags,
        origin=MEASURED,
        source=f"measured on {date.today()} in {took:.0f} s by effc calibrate-target{besides}",
        processor=processor(),
        runtime_version=backend.version(),
        kernels=tables,
        local=True,
    )


def last_cache() -> int:
    """Bytes of the last cache before main memory."""
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        units = {"K": 1 << 10, "M": 1 << 20}
        if text[-1:] in units and text[:-1].isdigit():
            found.append(int(text[:-1]) * units[text[-1]])
    return max(found[1:], default=found[0])


def _alone(samples: Sequence[tuple[Kernel, float]]) -> dict[str, Samples]:
    parts = []
    for key, group in sorted(_by_key(samples).items()):
        names = kernels.columns(group[0][0].dims)
        rows = tuple((*(float(k.dims[name]) for name in names), us) for k, us in group)
        parts.append(((*names, "us"), rows, key))
    return _fitted(parts)


def _together(samples: Sequence[tuple[Kernel, float]], alone: Sequence[tuple[Kernel, float]]) -> dict[str, Samples]:
    """All threads, beside what one took for the same kernel."""
    single = defaultdict(list)
    for kernel, us in alone:
        single[_same(kernel)].append(us)
    paired = [(k, us) for k, us in samples if _same(k) in single]
    parts = []
    for key, group in sorted(_by_key(paired).items()):
        names = kernels.columns(group[0][0].dims)
        rows = tuple((*(float(k.dims[n]) for n in names), float(np.median(single[_same(k)])), us) for k, us in group)
        parts.append(((*names, "us_alone", "us"), rows, key))
    return _fitted(parts)


def _same(kernel: Kernel) -> tuple:
    return kernel.key, *sorted(kernel.dims.items())


def _by_key(samples: Sequence[tuple[Kernel, float]]) -> dict[str, list[tuple[Kernel, float]]]:
    """Samples of each kind, at most so many, drawn evenly over their times."""
    groups = defaultdict(list)
    for kernel, us in samples:
        groups[kernel.key].append((kernel, us))
    chosen = {}
    for key, group in groups.items():
        most = MOST_ROWS[kernels.family(group[0][0].dims)]
        group.sort(key=lambda pair: pair[1])
        places = np.unique(np.linspace(0, len(group) - 1, min(most, len(group))).round().astype(int))
        chosen[key] = [group[i] for i in places]
    return chosen


def _fitted(parts: Sequence[tuple[tuple[str, ...], tuple[tuple[float, ...], ...], str]]) -> dict[str, Samples]:
    """Samples with the models fitted to them, the kinds side by side."""
    with ThreadPoolExecutor(cores()) as pool:
        return {part[2]: samples for part, samples in zip(parts, pool.map(_fit, parts), strict=True)}


def _fit(part: tuple[tuple[str, ...], tuple[tuple[float, ...], ...], str]) -> Samples:
    columns, rows, key = part
    return Samples(columns, rows, fit(*design(columns, rows, key)))
