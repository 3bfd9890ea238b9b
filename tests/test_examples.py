"""The examples: what the documentation shows is what is in the files, and it runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import onnx
import pytest

import effc
from effc import cli, registry
from effc.recipe import build, options, parse
from tests.networks import Net, distance, run

ROOT = Path(__file__).parent.parent
OWN_PASS = ROOT / "examples" / "own_pass"
PAGE = (ROOT / "docs" / "writing_a_pass.md").read_text(encoding="utf-8")
PASSES = ("reciprocal", "reciprocal-gs")


def net() -> onnx.ModelProto:
    """Divisions by a float, by a small float, by an integer, and by a computed tensor."""
    net = Net("divisions")
    x = net.input("input", ["N", 3, 8, 8])
    x = net.node("Div", x, net.weight("std", np.array([0.3, 0.5, 0.25], np.float32).reshape(3, 1, 1)), name="scaled")
    x = net.conv(x, 3, 4, 3, name="conv")
    x = net.node("Div", x, net.weight("tiny", np.float32(5e-3)), name="large")
    spread = net.node("ReduceMax", net.node("Abs", x), name="spread", keepdims=1)
    net.output(net.node("Div", x, spread, name="normal"), ["N", 4, 6, 6])
    net.output(net.node("Div", net.node("Shape", x), net.weight("two", np.array(2)), name="half"), [4], np.int64)
    return net.model()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's entry points beside effc's own, as if it were installed."""
    for name in ("own_pass", "own_pass_gs"):
        spec = importlib.util.spec_from_file_location(name, OWN_PASS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    project = tomllib.loads((OWN_PASS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    points = project["entry-points"]["effc.passes"]
    known = {**registry._found("effc.passes"), **{n: EntryPoint(n, v, "effc.passes") for n, v in points.items()}}
    backends = registry._found("effc.backends")
    monkeypatch.setattr(registry, "_found", lambda group: known if group == "effc.passes" else backends)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(net(), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("name", ["own_pass.py", "own_pass_gs.py", "pyproject.toml"])
def test_the_page_shows_the_files(name):
    shown = re.search(rf"`examples/own_pass/{re.escape(name)}`\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    assert shown[1] == (OWN_PASS / name).read_text(encoding="utf-8")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_of_ones_own_gives_the_same_numbers_and_says_what_it_skipped(name):
    result = effc.optimize(net(), name, measure=False)
    (record,) = result.history.passes
    assert record.status == "kept" and record.drift is not None and record.drift <= 1e-6
    onnx.checker.check_model(result.model.proto(), full_check=True)
    assert distance(run(net()), run(result.model.proto())) <= 1e-6
    assert [n.op_type for n in result.model.nodes("Div", "Mul")] == ["Mul", "Mul", "Div", "Div"]
    entries = {e.node: e for e in record.ledger}
    assert entries["node_scaled"].status == entries["node_large"].status == "changed"
    assert entries["node_normal"].reason == "its divisor is no constant"
    assert entries["node_half"].reason == "it divides int64, which has no reciprocals"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", PASSES)
def test_the_options_of_both_are_the_same(name):
    (option,) = options(registry.pass_class(name))
    assert (option.name, option.type_text, option.default) == ("smallest", "number > 0", "0.001")
    (record,) = effc.optimize(net(), build(parse(f"{name}{{smallest=0.01}}")), measure=False).history.passes
    reasons = {e.node: e.reason for e in record.ledger}
    assert reasons["node_large"] == "its divisor is below smallest=0.01"
    with pytest.raises(effc.BadInput, match=f"{name}: option smallest=0: allowed: number > 0"):
        build(parse(f"{name}{{smallest=0}}"))


@pytest.mark.usefixtures("installed")
def test_the_commands_of_the_page_run(folder, monkeypatch, capsys):
    (console,) = blocks("console")
    lines = [line.removeprefix("$ ") for line in console.splitlines()]
    assert len(lines) == 3
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        cli.main()
    assert "smallest" in capsys.readouterr().out
    before = run(net())
    for name in ("out.onnx", "out-gs.onnx"):
        assert distance(before, run(onnx.load(folder / name))) <= 1e-6


@pytest.mark.usefixtures("installed")
def test_the_python_of_the_page_runs(folder, capsys):
    (use,) = [block for block in blocks("python") if block.startswith("import effc\n")]
    exec(compile(use, "docs/writing_a_pass.md", "exec"), {})
    assert "node_large skipped () its divisor is below smallest=0.01\n" in capsys.readouterr().out
    assert (folder / "out.onnx").is_file()
