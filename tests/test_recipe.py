"""Recipe text, data spec overrides and recipe.yaml: round trips, what is built, what is refused and how it says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, Field

from effc import recipe, registry
from effc.contract import Pass
from effc.errors import BadInput
from effc.recipe import Call, build, describe, dump_recipe, format_calls, load_recipe, options, parse, split_spec


class Idle(Pass):
    def propose(self, model, context):
        return iter(())

    def rewrite(self, model, chosen, context):
        pass


def _even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd, even numbers are needed")
    return value


@dataclass(frozen=True)
class Prune(Idle):
    name: ClassVar[str] = "prune"
    macs: Annotated[float | None, Field(gt=0, le=1, description="share of MACs kept")] = None
    layers: tuple[str, ...] = ()
    method: Literal["minmax", "entropy"] = "minmax"
    steps: Annotated[int, Field(ge=1), AfterValidator(_even)] = 2
    whole: bool = False
    shape: tuple[int, int] | None = None
    per_layer: dict[str, float] | None = None

    def __post_init__(self):
        if self.whole and self.macs is not None:
            raise ValueError("whole and macs exclude each other: give one of them")


@dataclass(frozen=True)
class Recover(Idle):
    name: ClassVar[str] = "recover"


@dataclass(frozen=True)
class Repeat(Idle):
    name: ClassVar[str] = "repeat"
    steps: int
    passes: tuple[Pass, ...] = ()
    last: Annotated[tuple[Pass, ...], Field(description="run once, at the end")] = (Recover(),)


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    known = {cls.name: cls for cls in (Prune, Recover, Repeat)}

    def pass_class(name):
        if name not in known:
            raise BadInput(f"unknown pass {name!r}; there are {', '.join(known)}")
        return known[name]

    monkeypatch.setattr(registry, "pass_class", pass_class)


# --- text -----------------------------------------------------------------------------------------------------------


def test_text_to_calls():
    text = "repeat{steps=5, passes=[prune{macs=0.5}, recover], m={k: v, n=1e-3}}, int8 , "
    text += "x{p=C:/a.b:f, t='a\\b', q=\"ü\\n\"}"
    assert parse(text) == [
        Call("repeat", {"steps": 5, "passes": [Call("prune", {"macs": 0.5}), "recover"], "m": {"k": "v", "n": 0.001}}),
        Call("int8"),
        Call("x", {"p": "C:/a.b:f", "t": "a\\b", "q": "ü\n"}),
    ]
    assert parse("") == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-3", -3), ("0.5", 0.5), (".5", 0.5), ("1e5", 1e5), ("2.", 2.0), ("007", "007"), ("1-2", "1-2"),
        ("true", True), ("null", None), ("True", "True"), (".inf", math.inf), ("inf", "inf"), ("[]", []), ("{}", {}),
        ("[1, [a, {b=2}],]", [1, ["a", {"b": 2}]]), ('"3"', "3"), ("a{}", Call("a")),
        ("layer1.0/conv", "layer1.0/conv"),
    ],
)  # fmt: skip
def test_values(text, value):
    (call,) = parse(f"p{{v={text}}}")
    assert call.options["v"] == value
    assert type(call.options["v"]) is type(value)


WORDS = st.from_regex(r"[A-Za-z][A-Za-z0-9_./-]{0,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12) | WORDS


def calls(values: Any) -> Any:
    return st.builds(Call, WORDS, st.dictionaries(st.text(max_size=6) | WORDS, values, max_size=3))


def nested(values: Any) -> Any:
    return st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=6), values, max_size=3) | calls(values)


VALUES = st.recursive(SCALARS, nested, max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(st.lists(calls(VALUES), max_size=3))
def test_every_call_survives_its_text(items):
    again = parse(format_calls(items))
    assert again == items
    assert repr(again) == repr(items)  # 1 is not 1.0 and not true


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab1{}[]=,:'\" \\\n", max_size=20))
def test_any_text_is_read_or_refused_in_one_line(text):
    refused = ""
    try:
        calls = parse(text)
    except BadInput as error:
        refused = str(error)
    else:
        assert parse(format_calls(calls)) == calls
    assert "\n" not in refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8{a=", "cannot read 'int8{a=': found the end at column 8, allowed is"),
        ("int8{a}", "cannot read 'int8{a}': found '}' at column 7, allowed is ': ', '='"),
        ("int8 prune", "found 'prune' at column 6, allowed is ',', '{', the end"),
        ("int8{a=1, a=2}", "option 'a' is given twice: give it once"),
        ("int8{a=%}", "found '%' at column 8"),
        ('int8{a="\\q"}', "has an escape that is none"),
        ("{a=1}", "found '{' at column 1, allowed is a name or value"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(BadInput) as error:
        parse(text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "path", "overrides"),
    [
        ("data/train.yaml", "data/train.yaml", {}),
        ("data/train.yaml{limit=256, shuffle=0}", "data/train.yaml", {"limit": 256, "shuffle": 0}),
        (
            r"C:\my data\a b.npz{inputs={input: x}, labels: y}",
            r"C:\my data\a b.npz",
            {"inputs": {"input": "x"}, "labels": "y"},
        ),
        ("it's {1}/x.yaml {mean=[0.5, 1]} ", "it's {1}/x.yaml", {"mean": [0.5, 1]}),
        ("{a}{b=2}", "{a}", {"b": 2}),
        ("x.yaml{}", "x.yaml", {}),
        ("x.yaml{t='}'}", "x.yaml", {"t": "}"}),
        ("x.yaml{limit=3", "x.yaml{limit=3", {}),
        ("a:b{limit=3}", "a:b", {"limit": 3}),
    ],
)
def test_specs_are_split_at_the_braces_that_close_at_the_end(text, path, overrides):
    assert split_spec(text) == (path, overrides)


# --- passes ---------------------------------------------------------------------------------------------------------


def test_build():
    text = "repeat{steps=5, passes=[prune{macs=0.5, layers=[a, b], shape=[1, 2], per_layer={a: 1}}, recover]}, recover"
    assert build(parse(text)) == (
        Repeat(5, (Prune(0.5, ("a", "b"), shape=(1, 2), per_layer={"a": 1.0}), Recover())),
        Recover(),
    )
    assert describe(build(parse("prune{macs=1}"))[0]) == Call("prune", {"macs": 1.0})
    assert build(parse("prune{macs=null}")) == (Prune(),)


RECIPES = [
    (Prune(),),
    (Prune(0.5, ("a b", "true"), "entropy", 4, shape=(3, 4), per_layer={"x": 1e-5}), Recover()),
    (Repeat(2, (Prune(1.0), Recover(), Repeat(1, last=()))), Prune(whole=True)),
]


@pytest.mark.parametrize("made", RECIPES)
def test_passes_survive_text_and_yaml(made, tmp_path):
    text = format_calls(describe(p) for p in made)
    assert build(parse(text)) == made
    assert format_calls(describe(p) for p in build(parse(text))) == text
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    assert load_recipe(tmp_path / "recipe.yaml") == made


def test_described_text_is_short():
    assert format_calls(map(describe, RECIPES[2])) == (
        "repeat{steps=2, passes=[prune{macs=1.0}, recover, repeat{steps=1, last=[]}]}, prune{whole=true}"
    )
    assert yaml.safe_load(dump_recipe(RECIPES[2]))["passes"][1] == {"prune": {"whole": True}}


def test_recipe_yaml_takes_names_maps_and_texts(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "passes:\n- recover\n- prune: {macs: 0.5}\n- recover:\n- prune{steps=4}, recover\n"
        "- repeat:\n    steps: 2\n    passes: [recover, 'prune{macs=0.5}', {prune: {steps: 4}}]\n"
    )
    assert load_recipe(tmp_path / "r.yaml") == (
        *(Recover(), Prune(0.5), Recover(), Prune(steps=4), Recover()),
        Repeat(2, (Recover(), Prune(0.5), Prune(steps=4))),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune{method=foo}", "prune: option method=foo: allowed are minmax, entropy"),
        ("prune{macs=2}", "prune: option macs=2: allowed: number > 0 and <= 1, or null"),
        ("prune{macs=abc}", "prune: option macs=abc: allowed: number > 0 and <= 1, or null"),
        ("prune{macs='0.5'}", 'prune: option macs="0.5": allowed: number'),
        ("prune{macs=true}", "prune: option macs=true: allowed: number"),
        ("prune{whole=maybe}", "prune: option whole=maybe: allowed: true or false"),
        ("prune{whole=1}", "prune: option whole=1: allowed: true or false"),
        ("prune{steps=2.5}", "prune: option steps=2.5: allowed: integer >= 1"),
        ("prune{steps=3}", "prune: option steps=3: 3 is odd, even numbers are needed"),
        ("prune{layers=a}", "prune: option layers=a: allowed: list of text"),
        ("prune{shape=[1]}", "prune: option shape=[1]: allowed: list [integer, integer] or null"),
        ("prune{per_layer={a=b}}", "prune: option per_layer={a=b}: allowed: map of text to number or null"),
        ("prune{layers=[recover{}]}", "prune: option layers=[recover{}]: allowed: list of text"),
        (
            "prune{mac=0.5}",
            "prune: there is no option 'mac' (did you mean macs?): its options are macs, layers",
        ),
        ("recover{x=1}", "recover: there is no option 'x': it has no options"),
        ("repeat", "repeat: option steps must be given: integer"),
        ("repeat{steps=1, passes=[prune{macs=7}]}", "prune: option macs=7: allowed:"),
        (
            "repeat{steps=1, passes=[3]}",
            "repeat: option passes: 3 is no pass: write a name, name{option=value}",
        ),
        ("repeat{steps=1, passes=[nix]}", "unknown pass 'nix'; there are prune, recover, repeat"),
        ("prune{whole=true, macs=0.5}", "whole and macs exclude each other: give one of them"),
    ],
)
def test_options_that_are_refused(text, message):
    with pytest.raises(BadInput) as error:
        build(parse(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[recover]", "is no map with the one key 'passes' and a list of passes under it"),
        ("passes: recover", "is no map with the one key 'passes'"),
        ("passes: [recover]\nseed: 1", "is no map with the one key 'passes'"),
        ("passes: [3]", "3 is no pass: write a name, name{option=value} or a map of name to options"),
        ("passes: [{prune: 3}]", "is no pass"),
        ("passes: [", "cannot read the recipe"),
        (None, "cannot read the recipe"),
    ],
)
def test_recipe_yaml_that_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(BadInput) as error:
        load_recipe(tmp_path / "r.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_options_in_words():
    found = {o.name: (o.type_text, o.default, o.description) for o in options(Prune)}
    assert found["macs"] == ("number > 0 and <= 1, or null", "null", "share of MACs kept")
    assert found["method"] == ("minmax, entropy", "minmax", "")
    assert found["layers"] == ("list of text", "[]", "")
    assert [(o.name, o.type_text, o.default) for o in options(Repeat)] == [
        ("steps", "integer", None),
        ("passes", "list of passes", "[]"),
        ("last", "list of passes", "[recover{}]"),
    ]


def test_the_grammar_is_part_of_the_package():
    assert (Path(recipe.__file__).parent / "recipe.lark").is_file()
