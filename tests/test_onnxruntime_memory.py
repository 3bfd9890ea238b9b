"""Where tensors lie in onnxruntime's memory, held against memory of which every byte is kept track of."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from effc.backends._onnxruntime_kernels import kernels as read_kernels
from effc.backends._onnxruntime_memory import ALIGNED, BYTES, OTHERS, _Memory
from effc.kernels import Kernel, left

FLOAT = TensorProto.FLOAT


class Plain:
    """Memory as an array: who has each cell, and when each was touched last; cells are of `ALIGNED` bytes."""

    CELLS = 400

    def __init__(self) -> None:
        self.owners: list[set[str]] = [set() for _ in range(self.CELLS)]
        self.touched: list[tuple[int, int] | None] = [None] * self.CELLS
        self.extent = 0

    def put(self, name: str, size: int, over: str = "") -> None:
        if over:
            for owners in self.owners:
                owners |= {name} if over in owners else set()
            return
        cells = -(-size // ALIGNED)
        free, gaps = 0, []
        for place in range(self.CELLS):
            free = 0 if self.owners[place] else free + 1
            if free and (place + 1 == self.CELLS or self.owners[place + 1]):
                gaps.append((free if place + 1 < self.CELLS else np.inf, place + 1 - free))
        start = min(gap for gap in gaps if gap[0] >= cells)[1]
        for place in range(start, start + cells):
            self.owners[place].add(name)
        self.extent = max(self.extent, (start + cells) * ALIGNED)

    def of(self, name: str) -> list[int]:
        return [place for place, owners in enumerate(self.owners) if name in owners]

    def drop(self, name: str) -> None:
        for owners in self.owners:
            owners.discard(name)

    def touch(self, name: str, stamp: tuple[int, int]) -> None:
        for place in self.of(name):
            self.touched[place] = stamp


@pytest.mark.parametrize("seed", range(8))
def test_memory_like_memory_of_which_each_cell_is_known(seed):
    """Tensors come, are touched, share a place and go, at random."""
    rng, found, plain, alive = np.random.default_rng(seed), _Memory(), Plain(), []
    for step in range(250):
        choice = rng.random()
        if (choice < 0.4 and len(alive) < 12) or not alive:
            name, size = f"t{step}", int(rng.integers(1, 20 * ALIGNED))
            over = str(rng.choice(alive)) if alive and rng.random() < 0.2 else ""
            size = len(plain.of(over)) * ALIGNED if over else size
            for memory in (found, plain):
                memory.put(name, size, over)
            alive.append(name)
        elif choice < 0.75:
            name = str(rng.choice(alive))
            for memory in (found, plain):
                memory.touch(name, (step, 2 * step))
        else:
            name = alive.pop(int(rng.integers(len(alive))))
            for memory in (found, plain):
                memory.drop(name)
        for name in alive:
            known = {}
            for size, stamp in found.stamps(name):
                known[stamp] = known.get(stamp, 0) + size
            cells = [plain.touched[place] for place in plain.of(name)]
            assert known == {stamp: cells.count(stamp) * ALIGNED for stamp in cells}
        assert found.extent == plain.extent and all(name in found for name in alive)


def chain(*ops: str, size: int = 64_000) -> list[Kernel]:
    """Operators in a row on so many floats, from x to y."""
    names = ["x", *(f"t{i}" for i in range(len(ops) - 1)), "y"]
    nodes = [helper.make_node(op, [a], [b], name=b) for op, a, b in zip(ops, names, names[1:], strict=False)]
    x, y = (helper.make_tensor_value_info(name, FLOAT, [size]) for name in "xy")
    return read_kernels(helper.make_graph(nodes, "g", [x], [y]), dict.fromkeys(names, ((size,), FLOAT)))


def others(found: list[Kernel]) -> int:
    return sum(round(OTHERS * k.moved / BYTES) for k in found)


def test_a_chain_needs_two_tensors_at_a_time_and_in_place_but_one():
    """Softmax reads one place and writes to another, which trade roles; Relu writes over what it reads."""
    size = 4 * 64_000
    two, one = chain(*["Softmax"] * 6), chain(*["Relu"] * 6)
    assert two[0].dims["around"] == 2 * size + others(two)
    assert one[0].dims["around"] == size + others(one)
    assert chain("Softmax", "Reshape", "Softmax")[0].dims["around"] == 2 * size + others(two[:2])


def test_what_is_written_to_was_touched_by_those_that_had_the_place_before():
    """The second of a chain writes where the first read, the third where the second did: just touched, both."""
    found = chain(*["Softmax"] * 4)
    size = 4 * 64_000
    around, just = (left(found[0].dims["around"]), left(size))
    assert found[0].dims["made_near"] == found[0].dims["near"] == round(size * around[0])  # in the inference before
    assert found[0].dims["made_far"] == round(size * around[1])
    for kernel in found[1:]:
        assert (kernel.dims["made_near"], kernel.dims["made_far"]) == tuple(round(size * share) for share in just)


def test_code_is_warm_where_its_kind_has_just_run():
    found = chain("Softmax", "Softmax", "Tanh", "Softmax")
    each = round(OTHERS * found[0].moved / BYTES)
    around = found[0].dims["around"]
    assert [k.dims["since"] for k in found[:3]] == [around, 0, around]
    assert found[3].dims["since"] == each + 4 * 64_000  # Tanh alone, which wrote over its input


def test_weights_are_as_far_as_all_of_an_inference():
    """A weight that two layers share has been read between."""
    w = helper.make_tensor("w", FLOAT, [0], [])
    nodes = [helper.make_node("MatMul", [a, "w"], [b], name=b) for a, b in ("xa", "ay")]
    known = {"x": ((1, 512), FLOAT), "a": ((1, 512), FLOAT), "y": ((1, 512), FLOAT), "w": ((512, 512), FLOAT)}
    first, second = read_kernels(helper.make_graph(nodes, "g", [], [], [w]), known)
    size, row = 4 * 512 * 512, 4 * 512
    around = first.dims["around"]
    assert around > size + 2 * row
    assert first.dims["near"] == round((size + row) * left(around)[0])  # as the inference before left them
    assert second.dims["near"] == round(size * left(size)[0] + row * left(row)[0])  # both just touched
