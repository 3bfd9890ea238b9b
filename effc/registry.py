"""Finds passes and backends by name, through entry points: effc's own and those of other distributions alike."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from effc.contract import Pass
from effc.errors import BadInput
from effc.runtime import Backend, Checker, Trainer

PASSES, BACKENDS = "effc.passes", "effc.backends"


@cache
def _found(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def pass_names() -> list[str]:
    """All known passes, sorted."""
    return sorted(_found(PASSES))


def pass_class(name: str) -> type[Pass]:
    """The class of a pass. Raises BadInput listing what there is."""
    return _load(PASSES, "pass", name)


@cache
def backend(name: str) -> Backend:
    """The backend of that name, made once. Raises BadInput listing what there is."""
    return _load(BACKENDS, "backend", name)()


def trainer(name: str = "torch") -> Trainer:
    """The backend of that name, as one that trains. Raises BadInput: it does not, or what it needs is not installed."""
    if not hasattr(_load(BACKENDS, "backend", name), "write_back"):
        able = sorted(n for n in _found(BACKENDS) if hasattr(_load(BACKENDS, "backend", n), "write_back"))
        raise BadInput(f"the backend {name!r} does not train; there are {', '.join(able)}")
    return cast(Trainer, backend(name))


def checker(name: str) -> Checker:
    """The backend of that name, as one that knows the rules of its runtime. Raises BadInput: it states none."""
    if not hasattr(_load(BACKENDS, "backend", name), "check"):
        able = sorted(n for n in _found(BACKENDS) if hasattr(_load(BACKENDS, "backend", n), "check"))
        raise BadInput(f"the backend {name!r} states no rules; those of {', '.join(able)} can be checked")
    return cast(Checker, backend(name))


def _load(group: str, kind: str, name: str):
    found = _found(group)
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise BadInput(f"unknown {kind} {name!r}; there are {', '.join(sorted(found))}{hint}")
    return found[name].load()
