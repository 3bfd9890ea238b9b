"""The text form of recipes and of data spec overrides: `name{option=value, ...}`  <->  Call. Grammar: recipe.lark."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import lark

from effc.errors import BadInput


@dataclass(frozen=True)
class Call:
    """`name{option=value, ...}`: a pass as text says it. Values are plain data (numbers, texts, lists ...) or calls."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


_WORD = re.compile(r"(?:[A-Za-z0-9_./+-]|:(?=[A-Za-z0-9_./+-]))+")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)")  # 0001 stays a word
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")
# Spelt as in YAML, so that the words inf and nan stay words.
_CONSTANTS = {"true": True, "false": False, "null": None, ".inf": float("inf"), "-.inf": -float("inf")}
_CONSTANTS[".nan"] = float("nan")
_TOKENS = {"WORD": "a name or value", "QUOTED": '"text"', "LITERAL": "'text'", "COMMA": "','", "LBRACE": "'{'"}
_TOKENS |= {"RBRACE": "'}'", "LSQB": "'['", "RSQB": "']'", "EQUAL": "'='", "COLON": "': '", "$END": "the end"}


def _interpret(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if _FLOAT.fullmatch(word) else word


def _unquote(text: str) -> str:
    try:
        return json.loads(text, strict=False)
    except ValueError as error:
        raise BadInput(
            f"{text} has an escape that is none: inside \"...\" a backslash is written \\\\, inside '...' as it is"
        ) from error


class _Builder(lark.Transformer):
    recipe = list
    list = list
    pair = tuple
    word = staticmethod(lambda children: _interpret(str(children[0])))
    quoted = staticmethod(lambda children: _unquote(children[0]))
    literal = staticmethod(lambda children: str(children[0][1:-1]))

    def item(self, children: typing.Sequence) -> Call:
        return Call(str(children[0]), children[1] if len(children) > 1 else {})

    call = item

    def key(self, children: typing.Sequence) -> str:
        token = children[0]
        if token.type == "QUOTED":
            return _unquote(token)
        return str(token[1:-1] if token.type == "LITERAL" else token)

    def braces(self, children: typing.Sequence) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for key, value in children:
            if key in options:
                raise BadInput(f"option {key!r} is given twice: give it once")
            options[key] = value
        return options


@cache
def _parser() -> lark.Lark:
    grammar = resources.files("effc").joinpath("recipe.lark").read_text(encoding="utf-8")
    return lark.Lark(grammar, parser="lalr", start=["recipe", "braces"], transformer=_Builder())


def _parse(text: str, start: str) -> Any:
    try:
        return _parser().parse(text, start=start)
    except lark.exceptions.UnexpectedInput as error:
        if isinstance(error, lark.exceptions.UnexpectedToken):
            found = "the end" if error.token.type == "$END" else repr(str(error.token))
            expected = error.accepts or error.expected
        else:
            found, expected = repr(text[error.pos_in_stream or 0]), getattr(error, "allowed", None) or ()
        at = len(text) if found == "the end" else error.pos_in_stream or 0
        allowed = ", ".join(sorted(_TOKENS.get(str(name), str(name)) for name in expected))
        raise BadInput(f"cannot read {text!r}: found {found} at column {at + 1}, allowed is {allowed}") from error


def parse(text: str) -> list[Call]:
    """The items of a recipe. Raises BadInput with the column of what cannot be read."""
    return _parse(text, "recipe")


def split_spec(text: str) -> tuple[str, dict[str, Any]]:
    """`path{option=value}` -> (path, options): the braces begin at the first `{` that closes at the end of the text.

    What stands before is not looked at: spaces, colons, backslashes and braces of its own may be in the path.
    """
    stripped = text.rstrip()
    if stripped.endswith("}"):
        for match in re.finditer(r"\{", stripped):
            if _closing(stripped, match.start()) == len(stripped) - 1:
                return text[: match.start()].strip(), _parse(stripped[match.start() :], "braces")
    return text.strip(), {}


def _closing(text: str, start: int) -> int | None:
    """Position of the brace that closes the one at `start`; braces inside quotes do not count."""
    depth = 0
    for match in re.compile(r"""\"(?:[^"\\]|\\.)*\"|'[^']*'|[{}]""").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def format_calls(calls: Iterable[Call]) -> str:
    """The text that `parse` turns into these calls."""
    return ", ".join(call.name + (_braces(call.options) if call.options else "") for call in calls)


def format_value(value: Any) -> str:
    """A value as it is written in a recipe."""
    if isinstance(value, Call):
        return value.name + _braces(value.options)  # name{}: a bare name would be a word
    if isinstance(value, dict):
        return _braces(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_value, value)) + "]"
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) and isinstance(_interpret(value), str) else _quote(value)
    if isinstance(value, float) and value not in (float("inf"), -float("inf")) and value == value:
        return repr(float(value))
    for word, constant in _CONSTANTS.items():
        if value is constant or (isinstance(value, float) and repr(value) == repr(constant)):
            return word
    return str(value)


def _braces(options: dict[str, Any]) -> str:
    pairs = (f"{k if _WORD.fullmatch(k) else _quote(k)}={format_value(v)}" for k, v in options.items())
    return "{" + ", ".join(pairs) + "}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
