"""Passes written against onnx-graphsurgeon: there and back without loss, or a refusal that says what would be lost.

graphsurgeon's graph holds less than a model does: no metadata, no doc strings of nodes, no quantisation annotations,
weights of some types under another type, and a copy of a captured weight in every branch. So the way back does not go
through its exporter. What the function left alone is taken from the model itself, matched by the Python objects that
were handed out (`surgery_there`); only what it changed or made is built from its words (`surgery_back`).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from effc.contract import Context, Pass, Proposal, Skipped
from effc.cost import cost
from effc.history import ledger
from effc.model import Model, collection_paused
from effc.surgery_back import Back
from effc.surgery_there import There

SITE = "graph"  # the one site of such a pass: the function sees the graph as a whole


class GraphSurgeonPass(Pass):
    """Base of the passes that `graphsurgeon_pass` makes."""

    function: ClassVar[Callable[..., Iterable[Skipped] | None]]

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        """One proposal for the whole graph, found by doing it on a clone; nothing where nothing would change."""
        after = model.clone()
        yield from self._run(after)
        if after.revision == model.revision:
            return
        changed = tuple(r.node for r in ledger(model, after, (), {}, self) if r.status == "changed")
        costs = [cost(m, context.batch, context.dims).total for m in (model, after)]
        yield Proposal(SITE, changed, {}, *costs, damage=0.0 if self.exact else None)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        if chosen:
            self._run(model)

    def _run(self, model: Model) -> list[Skipped]:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(typing.cast(Any, self))}
        with surgery(model) as graph:
            return list(type(self).function(graph, **options) or ())


def graphsurgeon_pass(
    *, name: str, exact: bool = False, tolerance: float = 0.0
) -> Callable[[Callable[..., Iterable[Skipped] | None]], type[GraphSurgeonPass]]:
    """Decorator: a function that edits a `gs.Graph` in place becomes a pass, registered and used as any other.

    >>> @graphsurgeon_pass(name="drop-identity", exact=True)
    ... def drop_identity(graph: gs.Graph, *, keep: tuple[str, ...] = ()) -> None:
    ...     '''Identity(x) -> x'''

    The keyword arguments are the pass's options, validated by their annotations; with `Annotated[..., Field(...)]`
    they carry bounds and a description. The function may return `Skipped`s for what it left alone, with reasons. It
    runs once to propose and once more to rewrite, so it must do the same each time. Local functions, the opset, and
    the names of inputs and outputs are not its to change.

    Args:
        name, exact, tolerance: as the class variables of `Pass`.

    Raises:
        TypeError: the function takes something else than one graph and keyword arguments with annotations.
    """

    def make(function: Callable[..., Iterable[Skipped] | None]) -> type[GraphSurgeonPass]:
        graph, *options = inspect.signature(function).parameters.values()
        hints = typing.get_type_hints(function, include_extras=True)
        wrong = [p.name for p in options if p.kind is not p.KEYWORD_ONLY or p.name not in hints]
        if wrong or graph.kind not in (graph.POSITIONAL_ONLY, graph.POSITIONAL_OR_KEYWORD):
            raise TypeError(
                f"{function.__name__} takes {', '.join(wrong) or graph.name}: it may take one graph and, behind a *,"
                " keyword arguments with annotations"
            )
        fields = [
            (p.name, hints[p.name]) if p.default is p.empty else (p.name, hints[p.name], _field(p.default))
            for p in options
        ]
        body = {"name": name, "exact": exact, "tolerance": tolerance, "function": staticmethod(function)}
        about = {"__doc__": function.__doc__, "__module__": function.__module__, "__qualname__": function.__qualname__}
        return dataclasses.make_dataclass(
            function.__name__, fields, bases=(GraphSurgeonPass,), namespace=body | about, frozen=True, kw_only=True
        )

    return make


def _field(default: Any) -> Any:
    if default.__hash__ is not None:
        return dataclasses.field(default=default)
    return dataclasses.field(default_factory=lambda: copy.copy(default))


@contextmanager
def surgery(model: Model) -> Iterator[gs.Graph]:
    """Edit a model as a `gs.Graph`: what stands there at the end of the block takes the place of the model's graph.

    Nodes that are out of order are sorted; unused ones stay (the pass manager removes them). When the block raises, or
    the graph cannot be taken over, the model is as it was; when nothing changed, its revision stays too.

    Raises:
        PassFailed: the way there or back would lose something; the message says what.
    """
    with collection_paused():
        there = There(model)
    yield there.graph
    with collection_paused():
        Back(there).take_over()
