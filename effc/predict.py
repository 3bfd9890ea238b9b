"""What a model will take on a target, before it runs there: kernel by kernel, each with how sure that is.

The runtime says which kernels it makes of a model (fusions, layouts, integer islands); each kernel's time is a
physical model's, corrected by what was measured of its kind near its shape. Where nothing was, the roofline stands
alone, and is said to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from effc import kernels as family_of
from effc import regression
from effc.cost import cost, operand_type
from effc.kernels import LIKE, Kernel
from effc.model import Model, collection_paused
from effc.runtime import Backend
from effc.target import Samples, Target
from effc.traffic import VIEWS, element_types, traffic

ROOFLINE, MEASURED = "roofline", "measured"
JITTER_US = 0.7  # in a kernel's measured time
FEWEST_ROWS = 10  # of a kind, below which a similar one that was measured more tells as much
OTHER_ERROR = 0.4  # one standard deviation of what another kind tells
GAINED, MEETING_US = 0.9, 10.0  # bounds with more threads: of the share by their number, of what they cost a kernel
ROOFLINE_ERROR = 0.5  # one standard deviation of what only the roofline tells


@dataclass(frozen=True)
class Estimate:
    """Predicted time of some work.

    Attributes:
        seconds: predicted.
        error: one standard deviation, as a share of `seconds`.
        basis: "measured" kernels near this shape, or the "roofline" alone, all bytes from main memory.
    """

    seconds: float
    error: float
    basis: str


@dataclass(frozen=True)
class Prediction:
    """Predicted latency of a model.

    Attributes:
        total: of one inference, all nodes and what any inference costs.
        nodes: node of the model -> its time. A fused group's time stands at its leading node (of most work).
        fused: node -> the leading node of the kernel it became part of; "" where loading did its work.
        moved: what the runtime adds (changes of layout, conversions) -> its time.
        parts: kind of kernel -> seconds, and one standard deviation as a share of them.
        notes: what is not known and why, one sentence each.
    """

    total: Estimate
    nodes: Mapping[str, Estimate]
    fused: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, Estimate] = field(default_factory=dict)
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def predict(
    model: Model,
    target: Target,
    *,
    backend: Backend | None = None,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    threads: int = 1,
) -> Prediction:
    """Predicted latency of one inference.

    Args:
        backend: the target's runtime where it is at hand: it tells which kernels it makes. None: nothing fuses but
            activations, and no kernel is known better than by its roofline.
    """
    work = cost(model, batch, dims)
    if backend is None:
        with collection_paused():
            return _rooflines(model, target, batch, dims, threads)
    kernels, stands_for = backend.kernels(model, batch, dims, threads)
    estimates = estimate(kernels, target, threads)
    members: dict[str, list[str]] = defaultdict(list)
    for node, kernel in stands_for.items():
        members[kernel].append(node)
    nodes, fused, moved = {}, dict.fromkeys(members.pop("", []), ""), {}
    for kernel, found in zip(kernels, estimates, strict=True):
        group = members.get(kernel.name)
        if not group:
            moved[f"{kernel.name} ({kernel.kind})"] = found
            continue
        lead = max(group, key=lambda name: work.nodes[name].macs)
        nodes[lead] = found
        fused |= {name: lead for name in group if name != lead}
    parts = _parts(kernels, estimates)
    total = _total(estimates, parts, target, threads)
    return Prediction(total, nodes, fused, moved, parts, _notes(kernels, estimates))


def _rooflines(model: Model, target: Target, batch: int, dims: Mapping[str, int] | None, threads: int) -> Prediction:
    """Without the runtime: each node by itself, at the roof."""
    work, moved, roof = cost(model, batch, dims), traffic(model, batch, dims), target.roof(threads)
    nodes, fused, types = {}, {}, element_types(model)
    for node in model.graph:
        if node.op_type in VIEWS or node.name in work.unknown:
            fused[node.name] = ""
            continue
        macs = work.nodes[node.name].macs
        dtype = operand_type(node, types) if macs else "float32"
        seconds = roof.seconds(macs, moved[node.name].total, dtype)
        nodes[node.name] = Estimate(seconds, ROOFLINE_ERROR, ROOFLINE)
    seconds = roof.run_overhead + sum(e.seconds for e in nodes.values())
    notes = [f"every node by its roofline alone: {target.runtime} is not at hand to say what it fuses"]
    notes += [f"{len(work.unknown)} nodes count as nothing: their cost is not known"] if work.unknown else []
    return Prediction(Estimate(seconds, ROOFLINE_ERROR, ROOFLINE), nodes, fused, notes=tuple(notes))


def estimate(kernels: Sequence[Kernel], target: Target, threads: int = 1) -> list[Estimate]:
    """Predicted time of each kernel."""
    found: list[Estimate | None] = [None] * len(kernels)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, kernel in enumerate(kernels):
        if kernel.known and (key := _closest(kernel.key, target)):
            groups[key].append(index)
        else:
            found[index] = _roofline(kernel, target, threads)
    for key, places in groups.items():
        for index, value in zip(places, _measured(key, [kernels[i] for i in places], target, threads), strict=True):
            other = kernels[index].key != key
            found[index] = replace(value, error=max(value.error, OTHER_ERROR)) if other else value
    return [e for e in found if e is not None]


def _closest(key: str, target: Target) -> str | None:
    """The kind itself where enough of it was measured, else one that behaves much like it."""
    tables = target.kernels.get(1, {})
    bare, _, width = key.partition(":")
    kinds = [key]
    while bare := LIKE.get(bare, ""):
        kinds.append(f"{bare}:{width}" if f"{bare}:{width}" in tables else bare)
    measured = [kind for kind in kinds if kind in tables]
    return next((kind for kind in measured if len(tables[kind].rows) >= FEWEST_ROWS), measured[0] if measured else None)


def _measured(key: str, kernels: Sequence[Kernel], target: Target, threads: int) -> list[Estimate]:
    size = element_size(key)
    described = [family_of.describe(k.dims, size) for k in kernels]
    terms, features = (np.array(part) for part in zip(*described, strict=True))
    us, error = _model(key, target.kernels[1][key]).predict(terms, features)
    most = max(target.kernels)
    if threads > 1 and most > 1:
        share = math.log(min(threads, most)) / math.log(most)
        samples = target.kernels[most].get(key)
        if samples is None:
            ratio, more = np.maximum(1 / most, np.full(len(us), 0.7)), np.full(len(us), 0.3)
        else:
            ratios = _model(key, samples)
            wider = np.column_stack([features, np.log(us)])
            # Beyond what was measured a share is that of the nearest that was: it levels off.
            wider = np.clip(wider, ratios.features.min(axis=0), ratios.features.max(axis=0))
            ratio, more = ratios.predict(ratio_terms(us), wider)
            # Few samples extrapolate wildly: threads gain no more than their number, and lose but what meeting costs.
            ratio = np.clip(ratio, GAINED / most, 1 + MEETING_US / us)
        us, error = us * ratio**share, np.hypot(error, more * share)
    return [Estimate(u * 1e-6, float(e), MEASURED) for u, e in zip(us, error, strict=True)]


def ratio_terms(us_alone: np.ndarray) -> np.ndarray:
    """Terms of the time with all threads as a share of that with one: [n, 2]."""
    return np.column_stack([np.ones(len(us_alone)), 1 / us_alone])


def element_size(key: str) -> int:
    """Bytes of a weight of such kernels."""
    return 1 if key.startswith("q") else 4


def design(
    columns: Sequence[str], rows: Sequence[Sequence[float]], key: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Samples as a regression: terms [n, j], features [n, d], values [n] and their errors [n], shares.

    Values are microseconds; with more than one thread, shares of what one thread took.
    """
    size = element_size(key)
    described = [family_of.describe(dict(zip(columns, row, strict=True)), size) for row in rows]
    terms, features = (np.array(part) for part in zip(*described, strict=True))
    us = np.array([row[-1] for row in rows])
    errors = np.minimum(JITTER_US / us, 1.0)
    if "us_alone" not in columns:
        return terms, features, us, errors
    alone = np.array([row[-2] for row in rows])
    return ratio_terms(alone), np.column_stack([features, np.log(alone)]), us / alone, errors


_MODELS: dict[int, tuple[Samples, regression.Model]] = {}


def _model(key: str, samples: Samples) -> regression.Model:
    """The fitted model of some samples; they are kept, so that their id stays theirs."""
    if id(samples) not in _MODELS:
        parts = design(samples.columns, samples.rows, key)
        _MODELS[id(samples)] = samples, regression.model_of(samples.fit, *parts)
    return _MODELS[id(samples)][1]


def _roofline(kernel: Kernel, target: Target, threads: int) -> Estimate:
    return Estimate(target.roof(threads).seconds(kernel.macs, kernel.moved, kernel.dtype), ROOFLINE_ERROR, ROOFLINE)


def _parts(kernels: Sequence[Kernel], estimates: Sequence[Estimate]) -> dict[str, tuple[float, float]]:
    """Seconds and error of each kind of kernel. Errors within a kind go together."""
    seconds: dict[str, float] = defaultdict(float)
    errors: dict[str, float] = defaultdict(float)
    for kernel, found in zip(kernels, estimates, strict=True):
        seconds[kernel.key] += found.seconds
        errors[kernel.key] += found.seconds * found.error
    return {key: (value, errors[key] / value if value else 0.0) for key, value in seconds.items()}


def _total(
    estimates: Sequence[Estimate], parts: Mapping[str, tuple[float, float]], target: Target, threads: int
) -> Estimate:
    """The sum. Errors of different kinds of kernels are independent."""
    work = sum(e.seconds for e in estimates)
    seconds = target.roof(threads).run_overhead + work
    known = sum(e.seconds for e in estimates if e.basis == MEASURED)
    error = math.sqrt(sum((part * share) ** 2 for part, share in parts.values()))
    return Estimate(seconds, error / seconds if seconds else 0.0, MEASURED if known > 0.9 * work else ROOFLINE)


def _notes(kernels: Sequence[Kernel], estimates: Sequence[Estimate]) -> tuple[str, ...]:
    alone = defaultdict(int)
    for kernel, found in zip(kernels, estimates, strict=True):
        if found.basis == ROOFLINE:
            why = "no kernel of its kind was measured" if kernel.known else "its shape is not known, or it has a body"
            alone[kernel.kind, why] += 1
    return tuple(f"{count} {kind} by the roofline alone: {why}" for (kind, why), count in sorted(alone.items()))
