"""Kernels of made-up dimensions, what they take by a known law, and targets that were measured by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from effc.kernels import CONVOLUTION, MATRIX, Kernel, columns, left
from effc.predict import design
from effc.regression import fit
from effc.target import Roof, Samples, Target, find

KINDS = {"conv": CONVOLUTION, "qconv": CONVOLUTION, "gemm": MATRIX, "nbits": MATRIX, "Relu": (), "Relu:int8": ()}
ROOF = Roof({"float32": 5e10, "int8": 2e11}, bandwidth=1e10, overhead=1e-6, run_overhead=7e-6)


def kernel(kind: str, dims: dict[str, float], around: float = 4e6, name: str = "k") -> Kernel:
    """A kernel whose input has just been made, all of whose weights were read in the inference before."""
    bare, _, dtype = kind.partition(":")
    size = 1 if dtype or kind.startswith("q") else 4
    if "kh" in dims:
        pixels, taps = dims["n"] * dims["h"] * dims["w"], dims["kh"] * dims["kw"]
        read, weights = pixels * dims["s"] ** 2 * dims["c"] * dims["g"], dims["m"] * dims["g"] * dims["c"] * taps
        made = pixels * dims["m"] * dims["g"] * (1 + dims["sum"])
        macs = pixels * weights
    elif "k" in dims:
        read, weights = dims["b"] * dims["m"] * dims["k"], dims["b"] * dims["k"] * dims["n"]
        made, macs = dims["b"] * dims["m"] * dims["n"], dims["m"] * weights
    else:
        read, weights, made, macs = dims["elements"], 0, dims["elements"] * dims["share"], 0
    moved = int(size * (read + weights + made))
    shares = zip(left(size * read), left(around), strict=True)
    near, far = (round(size * (read * just + weights * before)) for just, before in shares)
    made_near, made_far = (round(size * made * share) for share in left(size * made))
    placed = dims | {"moved": moved, "around": around, "since": around / 2, "near": near, "far": far}
    placed |= {"made_near": made_near, "made_far": made_far}
    return Kernel(name, bare, (f"{name} out",), placed, int(macs), moved, dtype or ("int8" if size == 1 else "float32"))


def drawn(kind: str, rng: np.random.Generator, name: str = "k") -> Kernel:
    """Any kernel of a kind."""

    def size(least: float, most: float, step: int = 1) -> int:
        return max(1, round(math.exp(rng.uniform(math.log(least), math.log(most))) / step)) * step

    if KINDS[kind] == CONVOLUTION:
        k = int(rng.choice([1, 3, 5]))
        dims = {"n": 1, "c": size(8, 256, 4), "m": size(8, 256, 4), "g": 1, "h": size(4, 56), "w": size(4, 56)}
        dims |= {"kh": k, "kw": k, "s": int(rng.choice([1, 1, 2])), "d": 1, "act": 0, "sum": int(rng.integers(2))}
    elif KINDS[kind] == MATRIX:
        dims = {"b": 1, "m": size(1, 256), "k": size(16, 1024, 4), "n": size(16, 1024, 4)}
        dims |= {"bits": 4, "block": 32, "level": 4} if kind == "nbits" else {}
    else:
        dims = {"elements": size(64, 1 << 21), "share": 1, "run": size(1, 256), "window": 1, "broadcast": 0}
    return kernel(kind, dims, size(1e5, 1e8), name)


def law(kernel: Kernel) -> float:
    """Microseconds with one thread: 40 multiply-accumulates and 8 bytes a nanosecond, fewer of few channels.

    Four times as many in 8 bits; bytes that come from main memory take twice as long.
    """
    d = kernel.dims
    narrow = d.get("c", d.get("k", 1e9))
    work = kernel.macs / (40e3 * (4 if kernel.dtype == "int8" else 1)) * (1 + 8 / narrow)
    return 1.5 + work + (kernel.moved + d["far"]) / 8e3


def law_together(kernel: Kernel) -> float:
    """Microseconds with all threads."""
    return 2 + 0.4 * law(kernel)


def noisy(us: float, rng: np.random.Generator, share: float = 0.02) -> float:
    return us * math.exp(share * rng.standard_normal())


def samples(kernels: Sequence[Kernel], us: Sequence[float], alone: Sequence[float] | None = None) -> Samples:
    """A table as calibration makes it."""
    names = columns(kernels[0].dims)
    ends = [(u,) for u in us] if alone is None else list(zip(alone, us, strict=True))
    rows = tuple((*(float(k.dims[n]) for n in names), *end) for k, end in zip(kernels, ends, strict=True))
    titles = (*names, "us") if alone is None else (*names, "us_alone", "us")
    return Samples(titles, rows, fit(*design(titles, rows, kernels[0].key)))


def measured(kinds: Sequence[str], count: int = 40, *, together: int = 0, seed: int = 0, **changes) -> Target:
    """A target some of whose kernels were measured, with one thread and with `together`."""
    tables: dict[int, dict[str, Samples]] = {1: {}} | ({together: {}} if together else {})
    for kind in kinds:
        rng = np.random.default_rng((seed, *kind.encode()))
        found = [drawn(kind, rng) for _ in range(count)]
        alone = [noisy(law(k), rng) for k in found]
        tables[1][kind] = samples(found, alone)
        if together:
            tables[together][kind] = samples(found, [noisy(law_together(k), rng) for k in found], alone)
    roofs = {threads: replace(ROOF, bandwidth=ROOF.bandwidth * threads**0.5) for threads in tables}
    return replace(find("onnxruntime-avx2"), name="made up", roofs=roofs, kernels=tables, **changes)
