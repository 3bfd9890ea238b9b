"""The written rules of a valid model, run after every pass; and whether two models compute the same.

Each rule is a row: a function `Model -> iterator of complaints`. `verify` raises on the first complaint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from effc.errors import InvalidModel
from effc.model import Model, shape_tuple
from effc.runtime import Backend
from effc.shapes import proven, skeleton

RULES: list[Callable[[Model], Iterator[str]]] = []


def _rule(function: Callable[[Model], Iterator[str]]) -> Callable[[Model], Iterator[str]]:
    RULES.append(function)
    return function


@_rule
def every_name_is_its_own(model: Model) -> Iterator[str]:
    seen: set[str] = set()
    for value in model.values():
        if value.name in seen:
            yield f"two tensors are called {value.name!r}"
        seen.add(value.name or "")
    names = [node.name for node in model.graph]
    if len(set(names)) != len(names):
        duplicate = next(n for n in names if names.count(n) > 1)
        yield f"two nodes are called {duplicate!r}"


@_rule
def every_input_is_made_before_it_is_read(model: Model) -> Iterator[str]:
    yield from _unmade(model.graph, ())


def _unmade(graph: ir.Graph, outer: tuple[set[str | None], ...]) -> Iterator[str]:
    """What a graph reads before it is made; a sub-graph may read what its node could, by the same name."""
    made: set[str | None] = {v.name for v in graph.inputs} | set(graph.initializers)
    scopes = (*outer, made)
    for node in graph:
        for value in node.inputs:
            if value is not None and not any(value.name in scope for scope in scopes):
                yield f"{node.op_type} {node.name!r} reads {value.name!r}, which nothing before it makes"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                yield from _unmade(attribute.as_graph(), scopes)
        made.update(v.name for v in node.outputs)
    for value in graph.outputs:
        if not any(value.name in scope for scope in scopes):
            yield f"output {value.name!r} is made by no node"


@_rule
def every_weight_has_numbers(model: Model) -> Iterator[str]:
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            yield f"weight {name!r} has no numbers"
        elif value.shape is not None and tuple(value.shape) != tuple(value.const_value.shape):
            yield f"weight {name!r} says {value.shape} and holds {value.const_value.shape}"


@_rule
def the_onnx_checker_accepts_it(model: Model) -> Iterator[str]:
    try:
        onnx.checker.check_model(skeleton(model))
    except onnx.checker.ValidationError as error:
        yield str(error).strip().splitlines()[0]


def verify(model: Model, before: Model | None = None) -> None:
    """Hold a model to the rules, and to the inputs and outputs of the model before the pass.

    Raises:
        InvalidModel: naming the first rule that is broken and what was found.
    """
    for rule in RULES:
        for complaint in rule(model):
            raise InvalidModel(f"{rule.__name__.replace('_', ' ')}: {complaint}")
    if before is None:
        return
    for kind in ("inputs", "outputs"):
        was, now = getattr(before, kind), getattr(model, kind)
        if [(t.name, t.dtype) for t in was] != [(t.name, t.dtype) for t in now]:
            raise InvalidModel(f"the {kind} changed: they were {[t.name for t in was]}, now {[t.name for t in now]}")
        for a, b in zip(was, now, strict=True):
            if a.shape is not None and b.shape is not None and a.shape != b.shape:
                raise InvalidModel(f"{a.name!r} had the shape {a.shape}, now {b.shape}")
    known = stale_shapes(before)
    for name, (recorded, found) in stale_shapes(model).items():
        if name not in known:
            raise InvalidModel(f"{name!r} is recorded as {recorded} and is {found}: see effc.edit.forget_shapes")


def stale_shapes(model: Model) -> Mapping[str, tuple[tuple, tuple]]:
    """Tensors of the main graph whose recorded shape contradicts what follows from the inputs: (recorded, follows).

    Runtimes plan memory by what is recorded. A file may come with such contradictions (and run all the same, where
    nothing relies on them); a pass must not add to them.
    """
    return model.cached("stale shapes", lambda: _stale_shapes(model))


def _stale_shapes(model: Model) -> dict[str, tuple[tuple, tuple]]:
    facts = proven(model)
    found = {}
    for value in (v for node in model.graph for v in node.outputs if v.name):
        recorded, follows = shape_tuple(value.shape), facts[value.name].shape if value.name in facts else None
        if recorded is None or follows is None:
            continue
        pairs = zip(recorded, follows, strict=False)
        if len(recorded) != len(follows) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
            found[value.name] = (recorded, follows)
    return found


def difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    """Largest max|a - b| / max|a| over the outputs; infinite where shapes differ or only one holds NaN."""
    worst = 0.0
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape:
            return float("inf")
        if not x.size or x.dtype.kind not in "fiub":
            worst = max(worst, 0.0 if np.array_equal(x, y) else float("inf"))
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        special = ~np.isfinite(x)
        if special.any() or not np.isfinite(y).all():
            if not np.array_equal(x[special], y[special], equal_nan=True) or not np.isfinite(y[~special]).all():
                return float("inf")
            x, y = x[~special], y[~special]
            if not x.size:
                continue
        scale = np.abs(x).max()
        gap = np.abs(x - y).max()
        worst = max(worst, float(gap / scale) if scale > 0 else float(gap))
    return worst


def equivalent(a: Model, b: Model, feeds: Mapping[str, np.ndarray], tolerance: float, backend: Backend) -> bool:
    """Whether two models give the same outputs: max|a - b| / max|a| <= tolerance, both run without optimisation."""
    return drift(a, b, feeds, backend) <= tolerance


def drift(a: Model, b: Model, feeds: Mapping[str, np.ndarray], backend: Backend) -> float:
    """`difference` of the outputs of two models on the same feeds, both run without the runtime's optimisations."""
    return difference(plain_outputs(a, feeds, backend), plain_outputs(b, feeds, backend))


def deployed_drift(model: Model, feeds: Mapping[str, np.ndarray], backend: Backend, threads: int = 1) -> float:
    """`difference` between a graph run plainly and the session that the runtime makes of it."""
    deployed = backend.session(model, threads=threads).run(feeds)
    return difference(plain_outputs(model, feeds, backend), deployed)


def rounding(model: Model) -> float:
    """What rounding alone may move the outputs of a model by: four units in the last place of its coarsest weights.

    0 for float32 and wider, where an exact pass's own tolerance says it.
    """
    units = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
    return max((4 * units[t.dtype] for t in model.tensors() if t.dtype in units), default=0.0)


def plain_outputs(model: Model, feeds: Mapping[str, np.ndarray], backend: Backend) -> Mapping[str, np.ndarray]:
    """What a model gives without the runtime's optimisations; remembered for these very feeds until the next edit."""

    def run() -> tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]:
        return feeds, backend.session(model, optimize=False).run(feeds)  # holding the feeds keeps their id theirs

    return model.cached(("plain outputs", backend.name, id(feeds)), run, for_clones=True)[1]
