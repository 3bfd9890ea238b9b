"""effc.registry: passes and backends by name, also those of other distributions."""

import sys

import pytest

from effc import registry
from effc.contract import Pass, Repeat
from effc.errors import BadInput
from effc.passes.int8 import Int8


def test_passes_are_listed_and_found():
    names = registry.pass_names()
    assert names == sorted(names)
    assert {"simplify", "fold-batchnorm", "int8", "repeat"} <= set(names)
    assert registry.pass_class("int8") is Int8
    assert registry.pass_class("repeat") is Repeat


@pytest.mark.parametrize("name", registry.pass_names())
def test_a_pass_is_registered_under_its_own_name(name):
    cls = registry.pass_class(name)
    assert issubclass(cls, Pass) and cls.name == name


def test_an_unknown_pass_is_told_with_all_there_are():
    with pytest.raises(BadInput) as found:
        registry.pass_class("int9")
    assert str(found.value) == (
        f"unknown pass 'int9'; there are {', '.join(registry.pass_names())}; did you mean 'int8'?"
    )
    with pytest.raises(BadInput, match="unknown pass 'zzz'") as found:
        registry.pass_class("zzz")
    assert "did you mean" not in str(found.value)


def test_a_backend_is_made_once():
    assert registry.backend("onnxruntime") is registry.backend("onnxruntime")
    with pytest.raises(BadInput, match=r"unknown backend 'onnxruntme'.*did you mean 'onnxruntime'"):
        registry.backend("onnxruntme")


def test_another_distribution_may_bring_a_pass(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "from effc.contract import Repeat\n\n\nclass Elsewhere(Repeat):\n    name = 'elsewhere'\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[effc.passes]\nelsewhere = elsewhere:Elsewhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._found.cache_clear()
    try:
        assert "elsewhere" in registry.pass_names()
        assert registry.pass_class("elsewhere").__module__ == "elsewhere"
    finally:
        registry._found.cache_clear()
        sys.modules.pop("elsewhere", None)
