"""Greedy order in which residual branches can go: next is always what hurts least, with those before it gone already.

A branch's damage is the rise of the output divergence when it goes as well. Measured anew it mostly is larger than
before others went: so the least of the old numbers is measured again, and taken when it still is the least (lazy
greedy, Minoux 1978). Each measurement runs only what is behind the branch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from effc import edit
from effc.contract import Context
from effc.evaluate import damage
from effc.model import Model
from effc.walk import Values, Walk, samples

from ._blocks import Block

SAMPLES = 128
TIE = 1e-9
BYTES = 256 * 2**20  # of shortcuts, kept for all samples


@dataclass(frozen=True)
class Step:
    """One branch of the order.

    Attributes:
        rise: of the divergence of the outputs when it goes after those before it, in nats a sample.
    """

    block: Block
    rise: float


def order(model: Model, blocks: Sequence[Block], context: Context, saved: Callable[[Block], float]) -> Iterator[Step]:
    """The blocks, the best first, measured as far as they are asked for; what is left of a block gone is left out.

    Args:
        blocks: of `model`, which stays as it is.
        saved: what dropping a block saves; a branch is worth its damage for that.
    """
    clone = model.clone()
    inside = {block.name: {node.name for node in block.nodes} for block in blocks}
    keeps = {block.name: block.keep for block in blocks}
    feeds = samples(model, context.calibration, _count(model, blocks, context))
    session = context.backend.session(context.original, threads=context.threads)
    reference = [session.run(batch) for batch in feeds]
    names = {block.name: (block.output.name, block.shortcut.name) for block in blocks}
    walk = Walk(clone, context.backend, feeds, threads=context.threads, keep={s for _, s in names.values()})
    now = damage(_advance(walk, names), reference)
    rises = {block.name: 0.0 for block in blocks}
    advance = context.progress("measuring residual branches", len(blocks))
    heap: list[tuple[float, int, int]] = []  # price, number, how many were gone when it was measured
    gone: set[str] = set()

    def measured(number: int) -> tuple[float, int, int]:
        block = blocks[number]
        out, shortcut = names[block.name]
        rises[block.name] = damage(walk.replaced(out, shortcut).outputs(), reference) - now
        return max(rises[block.name], 0.0) / max(saved(block), 1e-30), number, len(gone)

    for number in range(len(blocks)):
        heap.append(measured(number))
        advance(1)
    heapq.heapify(heap)
    while heap:
        _, number, when = heapq.heappop(heap)
        block = blocks[number]
        if block.name not in names:
            continue
        if when < len(gone):
            heapq.heappush(heap, measured(number))
            continue
        yield Step(block, max(rises[block.name], 0.0))
        now += rises[block.name]
        gone.add(block.name)
        _drop(clone, walk, names.pop(block.name))
        for name in [name for name in names if name in inside[block.name]]:  # blocks within its branch
            del names[name]
        # A shortcut that was the sum dropped is another tensor now.
        left = {node.name: node for node in clone.graph if node.name in names}
        names = {name: (left[name].outputs[0].name, left[name].inputs[keeps[name]].name) for name in names}
        if names:
            walk.hold({shortcut for _, shortcut in names.values()})
            _advance(walk, names)


def levelled(damages: Sequence[float], savings: Sequence[float]) -> list[float]:
    """Damages of the same sum whose price, for what is saved, never falls along the order.

    A branch that hurts nothing once ten others are gone may do so only then: whoever chooses by damage and saving has
    to take those before it first. Prices are the isotonic regression of those measured, by pooling neighbours.
    """
    pools: list[list[float]] = []  # damage, saving, members
    for hurt, saved in zip(damages, savings, strict=True):
        pools.append([hurt, saved, 1])
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] >= pools[-1][0] * pools[-2][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    prices = [hurt / saved for hurt, saved, members in pools for _ in range(int(members))]
    # Among equals the order decides, whatever rounding says.
    return [price * saved * (1 + TIE * n) for n, (price, saved) in enumerate(zip(prices, savings, strict=True))]


def _advance(walk: Walk, names: dict[str, tuple[str, str]]) -> list[Values]:
    """Outputs, with all shortcuts at hand on the way."""
    walk.to(*{shortcut for _, shortcut in names.values()})
    return walk.outputs()


def _drop(clone: Model, walk: Walk, names: tuple[str, str]) -> None:
    """Take a branch out of the model that is walked over; what was computed behind it is forgotten."""
    out, shortcut = names
    walk.forget(out)
    edit.replace_uses(clone, clone.value(out), clone.value(shortcut))


def _count(model: Model, blocks: Sequence[Block], context: Context) -> int:
    """Samples of which all shortcuts can be kept."""
    shapes = model.shapes(1, context.dims)
    each = 0
    for name in {block.shortcut.name for block in blocks}:
        shape = shapes.get(name)
        each += 4 * math.prod(shape) if shape is not None and all(isinstance(d, int) for d in shape) else 0
    return int(min(SAMPLES, max(8, BYTES // max(each, 1))))
