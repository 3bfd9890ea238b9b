"""Calibration samples taken through a model step by step, for passes that look at one layer after another.

What has been computed stays as long as a node that has not run yet reads it: all steps together cost one pass over the
samples, however many layers there are, where a run from the inputs for each would cost half as many. What is kept at
once is bounded: the samples are so many that the widest place of the model fits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.data import Data, padded
from effc.errors import BadInput
from effc.extract import between, part
from effc.model import Model, holds_graphs
from effc.runtime import Backend

BYTES = 384 * 2**20  # of what is kept at once for one model
BATCH = 32
LEAST = 8  # samples

Values = dict[str, np.ndarray]


def samples(model: Model, data: Data, most: int) -> list[Values]:
    """Feeds in batches, so many samples in all that a walk over the model stays within `BYTES`, at most `most`."""
    bound = data.for_model(model)
    each = max(_widest(model), 1)
    count = int(min(most, max(LEAST, BYTES // each)))
    batch = model.batch or min(BATCH, count)
    found = []
    for batch_data in bound.first(count).batches(batch):
        found.append({name: np.asarray(values) for name, values in batch_data.feeds.items()})
    if model.batch is not None and found and len(next(iter(found[-1].values()))) < batch:
        found[-1:] = [padded(found[-1], batch)] if len(found) == 1 else []
    return found


class Walk:
    """A model on its way over samples. The part of it that has not run yet may be edited in between.

    Args:
        model: what runs.
        feeds: inputs, in batches that are run one by one (`samples`); they stay.
        keep: tensors that stay once they were computed, until `release`.
    """

    def __init__(
        self, model: Model, backend: Backend, feeds: Sequence[Mapping[str, np.ndarray]], *, threads: int = 1,
        keep: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.model, self.backend, self.threads = model, backend, threads
        self._feeds = list(feeds)
        self._batches: list[Values] = [dict(batch) for batch in feeds]
        self._whole = any(map(holds_graphs, model.graph))  # sub-graphs read what they like: it is run from the inputs
        self._keep = set(keep)
        self._done: set[ir.Node] = set()

    def to(self, *tensors: str) -> list[Values]:
        """Values of these tensors, batch by batch; what they need and has not run yet runs now.

        Raises:
            BadInput: the samples drive the model to NaN or infinity.
        """
        known = self._known()[0]
        missing = [name for name in dict.fromkeys(tensors) if name not in known]
        if missing:
            self._run(missing)
        found = [{name: values[name] for name in tensors} for values in self._known()]
        self._drop()
        return found

    def outputs(self) -> list[Values]:
        """The model's outputs, batch by batch."""
        return self.to(*(v.name for v in self.model.graph.outputs))

    def fork(self, batches: int | None = None) -> Walk:
        """Another walk from here, over the first batches; this one stays where it is."""
        other = copy.copy(self)
        other._batches = [dict(batch) for batch in self._batches[:batches]]
        other._feeds = self._feeds[:batches]
        other._keep, other._done = set(self._keep), set(self._done)
        return other

    def changed(self, node: ir.Node, weight: np.ndarray, shift: np.ndarray, batches: int | None = None) -> Walk:
        """A walk from behind a node, as if its weight (input 1) were another of the same shape.

        Args:
            shift: added to what it makes.
        """
        other = self.fork(batches)
        if self._whole:
            other.model = _shifted(self.model, node, weight, shift)
            other._batches = [dict(feeds) for feeds in other._feeds]
            return other
        entries = [v for v in node.inputs if v is not None and not v.is_initializer()]
        made = node.outputs[0].name
        before = other.to(*(v.name for v in entries))
        alone = other._part({node}, entries, node.outputs)
        edit.set_initializer(alone, alone.value(node.inputs[1].name), weight)
        session = self.backend.session(alone, threads=self.threads)
        for batch, values in zip(other._batches, before, strict=True):
            batch[made] = session.run(values)[made] + shift
        other._done.add(node)
        return other

    def replaced(self, name: str, by: str) -> Walk:
        """A walk from here, as if one tensor of the main graph were another that was computed before it and is kept."""
        other = self.fork()
        if self._whole:
            other.model = _redirected(self.model, name, by)
            other._batches = [dict(feeds) for feeds in other._feeds]
            return other
        other.forget(name)
        for batch, values in zip(other._batches, self._known(), strict=True):
            batch[name] = values[by]
        return other

    def hold(self, names: Collection[str]) -> None:
        """Keep these tensors as well, once they were computed."""
        self._keep |= set(names)

    def feeds(self, batches: int | None = None) -> list[Mapping[str, np.ndarray]]:
        """Inputs of the first batches."""
        return self._feeds[:batches]

    def release(self, name: str) -> None:
        """A tensor that was kept need not be any more."""
        self._keep.discard(name)

    def forget(self, name: str) -> None:
        """What a tensor was, and all that was made of it: the nodes that make it have changed."""
        gone, waiting = {name}, [self.model.value(name)]
        while waiting:
            for node in {node for node in waiting.pop().consumers() if node in self._done}:
                self._done.remove(node)
                gone |= {v.name for v in node.outputs}
                waiting += node.outputs
        for batch in self._batches:
            for each in gone:
                batch.pop(each, None)

    def _run(self, names: Sequence[str]) -> None:
        known = {v.name: v for v in self.model.values()}
        if self._whole:
            session = self.backend.session(edit.cut(self.model, list(names)), threads=self.threads)
            for batch, feeds in zip(self._batches, self._feeds, strict=True):
                batch |= _finite(session.run(feeds))
            return
        needed, entries = between([known[name] for name in names], self._batches[0].keys())
        # What others will read is an output as well.
        outputs = {v.name: v for node in needed for v in node.outputs if v.name in names or self._awaited(v, needed)}
        session = self.backend.session(self._part(needed, entries, list(outputs.values())), threads=self.threads)
        self._done |= needed
        for batch, values in zip(self._batches, self._known(), strict=True):
            batch |= _finite(session.run({v.name: values[v.name] for v in entries}))

    def _known(self) -> list[Values]:
        """What is at hand, inputs included."""
        return [{**feeds, **batch} for feeds, batch in zip(self._feeds, self._batches, strict=True)]

    def _part(self, needed: Collection[ir.Node], entries: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> Model:
        known = self._known()[0]
        return part(self.model, needed, entries, outputs, {v.name: known[v.name].dtype for v in entries})

    def _awaited(self, value: ir.Value, running: Collection[ir.Node]) -> bool:
        if value.name in self._keep or value.is_graph_output():
            return True
        return any(node not in running and node not in self._done for node in value.consumers())

    def _drop(self) -> None:
        """Let go of what no node will read."""
        known = {v.name: v for v in self.model.values()}
        for name in list(self._batches[0]):
            if not (name in self._keep or (name in known and not self._whole and self._awaited(known[name], ()))):
                for batch in self._batches:
                    del batch[name]


def _shifted(model: Model, node: ir.Node, weight: np.ndarray, shift: np.ndarray) -> Model:
    """The model with another weight in a node, and a shift behind it."""
    clone = model.clone()
    there = clone.node(node.name)
    edit.set_initializer(clone, there.inputs[1], weight)
    out = there.outputs[0]
    add = edit.make_node(
        clone, "Add", [out, edit.add_initializer(clone, f"{node.name}_shift", shift)], name=f"{node.name}_shifted"
    )
    edit.insert_after(clone, there, [add])
    edit.replace_uses(clone, out, add.outputs[0], where=lambda reader, _: reader is not add)
    if out.is_graph_output():
        edit.hand_over_output(clone, out, add.outputs[0])
    return clone


def _redirected(model: Model, name: str, by: str) -> Model:
    """The model with every reader of one tensor reading another."""
    clone = model.clone()
    edit.replace_uses(clone, clone.value(name), clone.value(by))
    return clone


def _finite(values: Mapping[str, np.ndarray]) -> Values:
    for name, array in values.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(f"the calibration data drive {name!r} to NaN or infinity; check their preprocessing")
    return {name: np.asarray(array) for name, array in values.items()}


def _widest(model: Model) -> int:
    """Bytes of the tensors that are alive at once, for one sample, at most; of unknown shapes nothing is counted."""
    batch = model.batch or 1
    shapes = model.shapes(batch)

    def size(value: ir.Value) -> int:
        shape = shapes.get(value.name)
        return 0 if shape is None or not all(isinstance(d, int) for d in shape) else 4 * math.prod(shape)

    left = {v: len(v.uses()) for v in model.values() if not v.is_initializer()}
    alive = most = sum(size(v) for v in model.graph.inputs if v in left)
    for node in model.graph:
        alive += sum(size(v) for v in node.outputs)
        most = max(most, alive)
        for value in node.inputs:
            if value in left:
                left[value] -= 1
                alive -= size(value) if left[value] == 0 else 0
        alive -= sum(size(v) for v in node.outputs if not left.get(v))
    return most // batch
