"""Weights that may be pruned, and which of them go: so many of the least, or all but n of every m.

    N:M    of m consecutive input channels, for each filter and kernel position, at most n weights are not zero

The second is what sparse tensor cores take (Mishra et al., "Accelerating sparse deep neural networks", 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.contract import Skipped
from effc.layers import WEIGHTED, constant_weight, output_axis
from effc.model import STANDARD_DOMAINS, Model

FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Prunable:
    """A weight of one layer, or of several that share it.

    Attributes:
        nodes: that read it; the first gives the site its name.
        axis: of its input channels.
    """

    nodes: tuple[ir.Node, ...]
    value: ir.Value
    weight: np.ndarray
    axis: int

    @property
    def site(self) -> str:
        return self.nodes[0].name or ""

    @property
    def name(self) -> str:
        return self.value.name or ""

    @property
    def zeros(self) -> int:
        return int(self.weight.size - np.count_nonzero(self.weight))


def prunable(model: Model) -> Iterator[Prunable | Skipped]:
    """The weights of convolutions and dense layers, each once, or why one is left alone."""
    seen: set[ir.Value] = set()
    for node in model.nodes(*WEIGHTED):
        value = node.inputs[1]
        if value in seen:
            continue
        seen.add(value)
        readers = [reader for reader, _ in value.uses()]
        found = _why_not(node, value, readers)
        if found is not None:
            yield from (Skipped(n.name or "", found) for n in dict.fromkeys((node, *readers)) if n.op_type in WEIGHTED)
            continue
        weight = constant_weight(node)
        axis = 1 if node.op_type == "Conv" else weight.ndim - 2 + (output_axis(node, weight.ndim) == 0)
        yield Prunable((node, *(r for r in readers if r is not node)), value, weight, axis)


def _why_not(node: ir.Node, value: ir.Value, readers: Sequence[ir.Node]) -> str | None:
    weight = constant_weight(node)
    if weight is None:
        maker = value.producer()
        if maker is None:
            return "its weight is an input of the graph, not a constant"
        if node.op_type == "MatMul" and maker.op_type not in ("DequantizeLinear", "Gather"):
            return "its right operand is no constant"
        return f"its weight is made by {maker.op_type}, not a constant: prune before weights are encoded"
    if not value.is_initializer():
        return "its weight is made by Constant: simplify makes it a weight of the graph"
    if weight.dtype.name not in FLOATS:
        return f"its weight is {weight.dtype.name}; floats of {', '.join(FLOATS)} are pruned"
    if not weight.size or weight.ndim < 2:
        return f"its weight of shape {weight.shape} is no matrix"
    for other in readers:
        alike = other.op_type in WEIGHTED and other.domain in STANDARD_DOMAINS and other.inputs[1] is value
        if not alike or _reads(other) != _reads(node):
            return f"its weight is also read by {other.name!r} ({other.op_type}), in another way"
    return None


def _reads(node: ir.Node) -> tuple[bool, int]:
    return node.op_type == "Conv", output_axis(node, 2)


def fewest(scores: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Which to keep so that the `count` lowest scores of all arrays together go; of equals the first. Booleans."""
    flat = np.concatenate([array.reshape(-1) for array in scores])
    kept = np.ones(flat.size, bool)
    if count:
        bound = np.partition(flat, count - 1)[count - 1]
        kept = flat > bound
        equal = np.flatnonzero(flat == bound)
        kept[equal[count - int(np.count_nonzero(flat < bound)) :]] = True
    ends = np.cumsum([array.size for array in scores])[:-1]
    return [part.reshape(array.shape) for part, array in zip(np.split(kept, ends), scores, strict=True)]


def best_of(scores: np.ndarray, axis: int, n: int, m: int) -> np.ndarray:
    """Which to keep so that of every m along an axis the n with the highest scores stay; of equals the first."""
    last = np.moveaxis(scores, axis, -1)
    groups = last.reshape(*last.shape[:-1], -1, m)
    ranks = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.moveaxis((ranks < n).reshape(last.shape), -1, axis)


def next_share(share: float, rounds: int, zeros: int, total: int) -> float:
    """The share of zeros to reach next on the way to `share`: s_t = s (1 - (1 - t / T)^3), the first above what is.

    Zhu and Gupta, "To prune, or not to prune" (2017), equation 1. The round is read off the weights, so a stage that is
    run again goes on where the model is.
    """
    steps = (share * (1 - (1 - t / rounds) ** 3) for t in range(1, rounds + 1))
    return next((s for s in steps if int(s * total) > zeros), share)


def counts(
    layers: Sequence[Prunable],
    scores: Mapping[str, np.ndarray],
    *,
    share: float,
    rounds: int,
    together: bool,
) -> dict[str, int]:
    """Site -> how many of its weights are to be zero.

    Args:
        together: the lowest scores of all layers go; else of each layer the same share.
    """
    if not together:
        reached = {p.site: next_share(share, rounds, p.zeros, p.weight.size) for p in layers}
        return {p.site: int(reached[p.site] * p.weight.size) for p in layers}
    total = sum(p.weight.size for p in layers)
    aim = int(next_share(share, rounds, sum(p.zeros for p in layers), total) * total)
    kept = fewest([scores[p.site] for p in layers], aim) if layers else []
    return {p.site: int(k.size - np.count_nonzero(k)) for p, k in zip(layers, kept, strict=True)}
