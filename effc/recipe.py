"""Recipes as text: `low-rank{speedup=2}, int8{calibrator=entropy}` and recipe.yaml  <->  passes.

A pass is a frozen dataclass whose annotated fields are its options; whatever this file knows of a pass it reads there.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import annotated_types
import pydantic
import yaml
from pydantic.fields import FieldInfo

from effc import registry
from effc.calls import Call, format_calls, format_value, parse, split_spec
from effc.contract import Pass
from effc.errors import BadInput

__all__ = [
    "Call",
    "Option",
    "build",
    "describe",
    "dump_recipe",
    "format_calls",
    "format_value",
    "load_recipe",
    "options",
    "parse",
    "split_spec",
]


@dataclass(frozen=True)
class Option:
    """An option of a pass, in words; `default` is None as text when the option must be given."""

    name: str
    type_text: str
    default: str | None
    description: str


def build(calls: Iterable[Call]) -> tuple[Pass, ...]:
    """The passes of a recipe, their options validated. Raises BadInput naming pass, option, value, what is allowed."""
    return tuple(_construct(call) for call in calls)


def _construct(call: Call) -> Pass:
    cls = registry.pass_class(call.name)
    hints = _hints(cls)
    values = {}
    for name, value in call.options.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            known = f"its options are {', '.join(hints)}" if hints else "it has no options"
            raise BadInput(f"{call.name}: there is no option {name!r}{hint}: {known}")
        values[name] = _nested(call.name, name, value) if _takes_passes(hints[name]) else _validated(call, name, hints)
    missing = [f.name for f in _fields(cls) if _default(f) is dataclasses.MISSING and f.name not in values]
    if missing:
        raise BadInput(f"{call.name}: option {missing[0]} must be given: {_type_text(hints[missing[0]])}")
    try:
        return cls(**values)
    except ValueError as error:  # a check across options, in __post_init__
        raise BadInput(f"{format_calls([call])}: {error}") from error


def _validated(call: Call, name: str, hints: dict[str, Any]) -> Any:
    value = call.options[name]
    try:
        # Strict and by way of JSON: lists fit tuples and integers fit floats, but no text is read as a number or flag.
        return _adapter(hints[name]).validate_json(json.dumps(value), strict=True)
    except (pydantic.ValidationError, TypeError) as error:
        own = [e["msg"] for e in getattr(error, "errors", list)() if e["type"] == "value_error"]
        reason = own[0].removeprefix("Value error, ") if own else _allowed(hints[name])
        raise BadInput(f"{call.name}: option {name}={format_value(value)}: {reason}") from error


def _nested(owner: str, option: str, value: Any) -> tuple[Pass, ...]:
    items = value if isinstance(value, list) else [value]
    return build(call for item in items for call in _calls(item, f"{owner}: option {option}"))


def _calls(item: Any, where: str) -> list[Call]:
    """An item of a list of passes: a call, `name{...}` as text, or {name: {options}} as YAML has it."""
    if isinstance(item, Call):
        return [item]
    if isinstance(item, str):
        return parse(item)
    if isinstance(item, dict) and len(item) == 1:
        (name, options), *_ = item.items()
        if isinstance(name, str) and isinstance(options or {}, dict):
            return [Call(name, options or {})]
    raise BadInput(f"{where}: {item!r} is no pass: write a name, name{{option=value}} or a map of name to options")


def describe(pass_: Pass) -> Call:
    """The call that builds this pass: its name and the options that differ from their defaults."""
    hints, options = _hints(type(pass_)), {}
    for f in _fields(type(pass_)):
        value = getattr(pass_, f.name)
        if value == _default(f):
            continue
        if _takes_passes(hints[f.name]):
            inner = [describe(p) for p in value]
            options[f.name] = [call if call.options else call.name for call in inner]
        else:
            options[f.name] = _adapter(hints[f.name]).dump_python(value, mode="json")
    return Call(pass_.name, options)


def options(cls: type[Pass]) -> list[Option]:
    """The options of a pass as its fields' annotations state them."""
    result = []
    for f in _fields(cls):
        hint, default = _hints(cls)[f.name], _default(f)
        if _takes_passes(hint) and default is not dataclasses.MISSING:
            default = [describe(p) for p in default]
        text = None if default is dataclasses.MISSING else format_value(default)
        described = [m.description for m in _metadata(hint) if isinstance(m, FieldInfo) and m.description]
        result.append(Option(f.name, _type_text(hint), text, described[0] if described else ""))
    return result


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    """A pass's own options, then those of its bases."""
    bases = [base for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {f.name for base in bases for f in dataclasses.fields(base)}
    return tuple(sorted(dataclasses.fields(typing.cast(Any, cls)), key=lambda f: f.name in inherited))


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in _fields(cls)}


@cache
def _adapter(hint: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(ser_json_inf_nan="constants"))


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _metadata(hint: Any) -> tuple:
    return hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()


def _takes_passes(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Annotated:
        hint = hint.__origin__
    first = next(iter(typing.get_args(hint)), None)
    return typing.get_origin(hint) is tuple and isinstance(first, type) and issubclass(first, Pass)


def _allowed(hint: Any) -> str:
    inner = typing.get_args(hint)[0] if _metadata(hint) else hint
    return f"allowed{' are' if typing.get_origin(inner) is typing.Literal else ':'} {_type_text(hint)}"


_PLAIN = {float: "number", int: "integer", bool: "true or false", str: "text", Path: "path", type(None): "null"}
_BOUNDS = {annotated_types.Gt: ("> {}", "gt"), annotated_types.Ge: (">= {}", "ge")}
_BOUNDS |= {annotated_types.Lt: ("< {}", "lt"), annotated_types.Le: ("<= {}", "le")}


def _type_text(hint: Any) -> str:
    """What a field takes, in words: `number > 0 and <= 1, or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        metadata = [m for entry in hint.__metadata__ for m in getattr(entry, "metadata", [entry])]
        bounds = [_BOUNDS[type(m)][0].format(getattr(m, _BOUNDS[type(m)][1])) for m in metadata if type(m) in _BOUNDS]
        words = _type_text(hint.__origin__)
        if not bounds:
            return words
        # The bounds are on the number: `number or null` reads `number > 0 or null`.
        head, *rest = words.split(" or null", 1)
        return f"{head} {' and '.join(bounds)}" + ("" if not rest else ", or null")
    if _takes_passes(hint):
        return "list of passes"
    if origin is typing.Literal:
        return ", ".join(map(format_value, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(a) for a in arguments)
    if origin in (tuple, list) or origin is Sequence:
        inner = [_type_text(a) for a in arguments if a is not Ellipsis]
        return f"list of {inner[0]}" if len(set(inner)) == 1 and Ellipsis in arguments else f"list [{', '.join(inner)}]"
    if origin is not None and issubclass(origin, typing.Mapping):
        return f"map of {' to '.join(_type_text(a) for a in arguments)}"
    return _PLAIN.get(hint, getattr(hint, "__name__", str(hint)))


def load_recipe(path: str | Path) -> tuple[Pass, ...]:
    """Read recipe.yaml: `passes:` lists names, `name{...}` texts or {name: {options}} maps. Raises BadInput."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read the recipe {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or list(content) != ["passes"] or not isinstance(content["passes"], list):
        raise BadInput(f"the recipe {str(path)!r} is no map with the one key 'passes' and a list of passes under it")
    return build(call for item in content["passes"] for call in _calls(item, f"the recipe {str(path)!r}"))


def dump_recipe(passes: Iterable[Pass]) -> str:
    """YAML that `load_recipe` turns into these passes."""
    return yaml.safe_dump({"passes": [_as_yaml(describe(p)) for p in passes]}, sort_keys=False, allow_unicode=True)


def _as_yaml(value: Any) -> Any:
    if isinstance(value, Call):
        return {value.name: {k: _as_yaml(v) for k, v in value.options.items()}} if value.options else value.name
    if isinstance(value, list):
        return [_as_yaml(v) for v in value]
    return value
