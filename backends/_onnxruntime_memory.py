"""Where tensors lie while a model runs, and so what a kernel finds in caches.

onnxruntime plans one piece of memory for all tensors of an inference, and gives each the smallest gap that it fits
into. The same is done here, and of every byte that a kernel touches it is known how much else was touched since. The
last cache is shared: the longer ago, the more of it others have taken as well.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from effc.kernels import FREE, Kernel, left

ALIGNED = 256  # bytes
# What others move through a shared cache meanwhile, in bytes a second; and how fast a kernel is, roughly.
OTHERS, MACS, BYTES = 8e9, {"int8": 2e11}, 2e10
USUAL_MACS = 5e10
# Operators that write over their first input where nothing else needs it.
IN_PLACE = {
    "Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Elu", "Add", "Mul", "Sub", "Div",
    "Sum",
}  # fmt: skip
Stamp = tuple[int, int]  # bytes before: of weights and by others, and of tensors that share their memory
Part = tuple[int, Stamp | None]  # bytes, and when they were touched last; None: not in this inference


def placed(graph: onnx.GraphProto, found: Sequence[Kernel], sizes: Mapping[str, int]) -> list[Kernel]:
    """Kernels, one a node, with the bytes that they find in caches or beyond.

    Args:
        sizes: bytes of every tensor that is known.
    """
    memory = _Memory()
    steps = _steps(graph, found, sizes, memory)
    room = memory.extent
    around = room + sum(sizes.get(i.name, 0) for i in graph.initializer) + sum(map(_others, found))

    def gap(step: _Step, stamp: Stamp | None, weight: int = 0, tensor: int = 0) -> int:
        """Bytes touched since, its own included; what was not touched in this inference was in the last."""
        if stamp is None:
            return around
        return step.now[0] - stamp[0] + weight + min(step.now[1] - stamp[1] + tensor, room)

    def away(step: _Step, weights: Sequence[Part], tensors: Sequence[Part]) -> list[int]:
        shares = [(size, left(gap(step, stamp, weight=size))) for size, stamp in weights]
        shares += [(size, left(gap(step, stamp, tensor=size))) for size, stamp in tensors]
        return [round(sum(size * share[which] for size, share in shares)) for which in (0, 1)]

    result = []
    for kernel, step in zip(found, steps, strict=True):
        (near, far), (made_near, made_far) = away(step, step.weights, step.reads), away(step, [], step.makes)
        extra = {
            "moved": kernel.moved, "around": around, "since": gap(step, step.ran), "near": near, "far": far,
            "made_near": made_near, "made_far": made_far,
        }  # fmt: skip
        result.append(replace(kernel, dims={**kernel.dims, **extra}) if kernel.known else kernel)
    return result


@dataclass(frozen=True)
class _Step:
    """One node: what it reads and what it makes, when its kind of kernel ran last, and when it is now."""

    weights: list[Part]
    reads: list[Part]
    makes: list[Part]
    ran: Stamp | None
    now: Stamp


def _steps(graph: onnx.GraphProto, found: Sequence[Kernel], sizes: Mapping[str, int], memory: _Memory) -> list[_Step]:
    weights = {i.name for i in graph.initializer}
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    stamps: dict[str, Stamp | None] = dict.fromkeys(weights)
    ran: dict[str, Stamp] = {}
    steps, now = [], (0, 0)
    for value in graph.input:
        if value.name in last and value.name in sizes and value.name not in weights:
            memory.put(value.name, sizes[value.name])
    for place, (node, kernel) in enumerate(zip(graph.node, found, strict=True)):
        ins, outs = ([n for n in dict.fromkeys(names) if n in sizes] for names in (node.input, node.output))
        constants, read = [n for n in ins if n in weights], [n for n in ins if n not in weights]
        gone = [n for n in (*read, *outs) if last.get(n, place) == place]
        for name in read:
            if name not in memory:  # of a graph around this one
                memory.put(name, sizes[name])
        over = ins[0] if ins and (kernel.kind == FREE or node.op_type in IN_PLACE) else ""
        inside = [n for n in outs[:1] if over in gone and sizes[over] == sizes[n]]
        for name in outs:
            memory.put(name, sizes[name], over if name in inside else "")
        reads, makes = ([part for n in names for part in memory.stamps(n)] for names in (read, outs))
        steps.append(_Step([(sizes[n], stamps[n]) for n in constants], reads, makes, ran.get(kernel.kind), now))
        if kernel.kind != FREE:
            moved = sum(sizes[n] for n in (*read, *outs) if n not in inside)
            now = now[0] + sum(sizes[n] for n in constants) + _others(kernel), now[1] + moved
            stamps |= dict.fromkeys(constants, now)
            for name in (*read, *outs):
                memory.touch(name, now)
        ran[kernel.kind] = now
        for name in gone:
            memory.drop(name)
    return steps


def _others(kernel: Kernel) -> int:
    """Bytes that others move through the shared cache while a kernel runs."""
    return round(OTHERS * (kernel.macs / MACS.get(kernel.dtype, USUAL_MACS) + kernel.moved / BYTES))


class _Memory:
    """Memory in which tensors come and go, each in the smallest gap that it fits into.

    Attributes:
        extent: bytes from its start to the end of the furthest tensor there ever was.
    """

    def __init__(self) -> None:
        self.extent = 0
        self._at: dict[str, tuple[int, int]] = {}
        self._taken: list[tuple[int, int]] = []  # start and end, in order
        self._stamps: list[tuple[int, int, Stamp]] = []  # start and end, in order, and when they were touched

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def put(self, name: str, size: int, over: str = "") -> None:
        """A tensor comes; `over` names one that goes, in whose place it is."""
        if over:
            self._at[name] = self._at[over]
            return
        size, end, gaps = -(-size // ALIGNED) * ALIGNED, 0, []
        for start, stop in self._taken:
            if start - end >= size:
                gaps.append((start - end, end))
            end = max(end, stop)
        start = min(gaps)[1] if gaps else end
        self._at[name] = start, start + size
        insort(self._taken, self._at[name])
        self.extent = max(self.extent, start + size)

    def drop(self, name: str) -> None:
        place = self._at.pop(name)
        if place not in self._at.values():
            self._taken.remove(place)

    def stamps(self, name: str) -> list[Part]:
        start, end = self._at[name]
        parts = [(min(stop, end) - max(first, start), stamp) for first, stop, stamp in self._over(start, end)]
        fresh = end - start - sum(size for size, _ in parts)
        return [*parts, (fresh, None)] if fresh else parts

    def touch(self, name: str, stamp: Stamp) -> None:
        start, end = self._at[name]
        if start == end:
            return
        old = self._over(start, end)
        first = self._stamps.index(old[0]) if old else bisect_left(self._stamps, (start,))
        new = [(s, start, t) for s, _, t in old if s < start] + [(start, end, stamp)]
        self._stamps[first : first + len(old)] = new + [(end, e, t) for _, e, t in old if e > end]

    def _over(self, start: int, end: int) -> list[tuple[int, int, Stamp]]:
        return [part for part in self._stamps if part[0] < end and part[1] > start]
