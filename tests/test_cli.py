"""effc.cli: exit status, the one line of each error, and which files are there afterwards."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

import effc
import effc.guard
from effc import cli, cli_calibrate, cli_inspect, target
from effc.calibrate import SECONDS
from effc.history import History
from effc.kernels import COMMON, ELEMENTS, describe
from effc.measure import Latency
from effc.model import Model
from effc.predict import ROOFLINE, Estimate, Prediction
from effc.regression import Hyper
from effc.target import MEASURED, Roof, Samples, Target, find, processor
from effc.targetfile import to_json
from tests import networks
from tests.networks import distance, feeds, run

DIGITS = Path(__file__).parent.parent / "examples" / "digits"
ADD = dict.fromkeys((*ELEMENTS, *COMMON), 1.0)  # a kernel's dimensions


class Said(NamedTuple):
    status: int
    out: str
    error: str


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `effc ...` in an empty folder of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["effc", *map(str, arguments)])
        status = 0
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return call


@pytest.fixture
def model() -> Path:
    """plain.onnx, in the folder where the command runs once `command` is asked for."""
    onnx.save(networks.plain(), "plain.onnx")
    return Path("plain.onnx")


@pytest.fixture
def ratio(monkeypatch) -> list[float]:
    """What every measurement finds."""
    told = [0.5]

    def fake(before, after, feeds, **options):
        return Latency(2.0, 2 * told[0], told[0], told[0] - 0.001, told[0] + 0.001, 9, 1, 1)

    monkeypatch.setattr(effc.guard, "compare", fake)
    monkeypatch.setattr(cli, "compare_latency", fake)
    return told


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def refused(said: Said, *words: str) -> None:
    """One line on standard error, status 2, nothing else said."""
    assert said.status == 2, said
    assert said.error.startswith("effc: error: ") and said.error.endswith("\n") and said.error.count("\n") == 1
    assert said.out == ""
    for word in words:
        assert word in said.error, said.error


def bad(name: str) -> tuple[str, ...]:
    """Writes an input that cannot be used; returns words of its refusal."""
    proto = networks.plain()
    whole = proto.SerializeToString()
    if name == "empty":
        Path("bad.onnx").touch()
        return ("bad.onnx is empty; an .onnx file is needed",)
    if name == "text":
        Path("bad.onnx").write_text("This is no model, but a letter to a friend.\n")
        return ("bad.onnx is not an ONNX model",)
    if name == "truncated":
        Path("bad.onnx").write_bytes(whole[: len(whole) * 2 // 3])
        return ("bad.onnx is not an ONNX model, or it is truncated",)
    if name == "missing":
        return ("bad.onnx does not exist",)
    if name == "folder":
        Path("bad.onnx").mkdir()
        return ("bad.onnx is a folder; an .onnx file is needed",)
    if name == "NaN":
        weight = next(t for t in proto.graph.initializer if t.name == "conv2.weight")
        array = onnx.numpy_helper.to_array(weight).copy()
        array[0, 0, 0, 0] = np.nan
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    elif name == "unknown operator":
        proto.graph.node[0].op_type = "Convolve"
    elif name == "outside":
        convert_model_to_external_data(proto, location="w.bin", size_threshold=64)
        Path("inner").mkdir()
        onnx.save(proto, "inner/bad.onnx")
        proto = onnx.load("inner/bad.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../w.bin"
        Path("w.bin").write_bytes(Path("inner/w.bin").read_bytes())
        for path in Path("inner").iterdir():
            path.unlink()
        Path("inner").rmdir()
    Path("bad.onnx").write_bytes(proto.SerializeToString())
    return {
        "NaN": ("weight 'conv2.weight' holds NaN; repair the model first",),
        "unknown operator": ("bad is not a valid ONNX model", "Convolve"),
        "outside": ("external data of", "'../w.bin', outside the model's folder; put them beside the model"),
    }[name]


@pytest.mark.parametrize(
    "name", ["empty", "text", "truncated", "missing", "folder", "NaN", "unknown operator", "outside"]
)
def test_an_input_that_is_no_sound_model(command, name):
    words = bad(name)
    before = files()
    refused(command("optimize", "bad.onnx", "--passes", "simplify", "--no-measure"), *words)
    assert files() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--passes", "int9"], ["unknown pass 'int9'; there are", "did you mean 'int8'?"]),
        (["--passes", "int8{bits=4}"], ["int8: there is no option 'bits'", "its options are calibrator"]),
        (["--passes", "int8{percentile=high}"], ["int8: option percentile=high: allowed: number > 50"]),
        (["--passes", "int8{calibrator=best}"], ["option calibrator=best: allowed are minmax, percentile"]),
        (["--passes", "int8{"], ["cannot read 'int8{': found the end at column 6"]),
        (["--passes", "int8", "--recipe", "r.yaml"], ["give --passes or --recipe, not both"]),
        (["--recipe", "r.yaml"], ["cannot read the recipe 'r.yaml'"]),
        (["--goal", "speed"], ["unknown goal 'speed'; there are latency, size, energy, macs"]),
        (["--target", "tpu"], ["unknown target 'tpu'"]),
        (["--max-drop", "1"], ["a largest drop needs evaluation data: give --evaluate SPEC"]),
        (["--passes", "int8{max_drop=1}"], ["max_drop needs evaluation data: give --evaluate SPEC"]),
        (["--min-speedup", "2"], ["leave out --no-measure or --min-speedup"]),
        (["--calibrate", "none.npz"], ["there is no data file or folder 'none.npz'"]),
        (["--calibrate", "small.npz"], ["samples of shape (3, 9, 9); the model's input 'input' takes (3, 12, 12)"]),
        (["--calibrate", "nan.npz"], ["sample 0 holds NaN or infinity"]),
        (["--evaluate", "small.npz{limit=none}"], ["limit"]),
        (["-o", "nowhere/out.onnx"], ["the folder nowhere does not exist; make it first"]),
        (["-o", "plain.onnx"], ["plain.onnx is the input itself; choose another output"]),
        (["-o", "../here/plain.onnx"], ["is the input itself; choose another output"]),
        (["-o", "."], ["is a folder; a file name is needed"]),
        (["--json", "nowhere/r.json"], ["the folder nowhere does not exist; make it first"]),
        (["--html", "plain.onnx"], ["plain.onnx is the input itself"]),
        (["--replay", "none.json"], ["none.json cannot be read: No such file or directory"]),
        (["--replay", "plain.onnx"], ["this is no report of effc"]),
        (["--batch", "0"], ["Invalid value for '--batch'"]),
        (["--threads", "two"], ["Invalid value for '--threads'"]),
        (["--dim", "T"], ["--dim T: it takes name=value with a whole number"]),
        (["--dim", "T=0"], ["--dim T=0: it takes name=value with a whole number"]),
        (["--speed"], ["No such option: --speed"]),
    ],
)
def test_options_that_cannot_be_used(command, model, arguments, words):
    np.savez("small.npz", input=np.zeros((4, 3, 9, 9), np.float32))
    np.savez("nan.npz", input=np.full((4, 3, 12, 12), np.nan, np.float32))
    before, content = files(), model.read_bytes()
    passes = [] if {"--passes", "--recipe", "--replay"} & set(arguments) else ["--passes", "simplify"]
    refused(command("optimize", model, "--no-measure", *passes, *arguments), *words)
    assert files() == before
    assert model.read_bytes() == content


def test_an_output_that_is_a_link_to_the_input_is_refused(command, model):
    Path("link.onnx").symlink_to(model)
    refused(command("optimize", model, "--no-measure", "--passes", "simplify", "-o", "link.onnx"), "the input itself")
    assert Path("link.onnx").is_symlink()


def test_debug_shows_where_an_error_comes_from(command, model):
    with pytest.raises(effc.BadInput):
        command("optimize", model, "--passes", "int9", "--debug")


def test_a_plain_run_writes_beside_the_model_and_says_so(command, model):
    said = command("optimize", model, "--passes", "simplify,fold-batchnorm", "--no-measure")
    assert (said.status, said.error) == (0, "")
    assert "written: plain-effc.onnx" in said.out
    assert re.search(r"fold-batchnorm\W+kept\W+4 of 11", said.out)
    assert "unproven: latency was not measured" in said.out
    assert files() == {"plain.onnx", "plain-effc.onnx"}
    written = onnx.load("plain-effc.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert not any(node.op_type == "BatchNormalization" for node in written.graph.node)
    inputs = feeds(networks.plain())
    assert distance(run(networks.plain(), inputs), run(written, inputs)) <= 1e-5


def test_quiet_says_nothing(command, model):
    assert command("optimize", model, "--passes", "simplify", "--no-measure", "--quiet") == Said(0, "", "")
    assert "plain-effc.onnx" in files()


def test_reports_are_written_and_replayed_to_the_same_file(command, model, ratio):
    said = command(
        "optimize", model, "--passes", "fold-batchnorm", "-o", "a.onnx", "--json", "a.json", "--html", "a.html"
    )
    assert said.status == 0
    told = History.from_json(Path("a.json").read_bytes())
    assert (told.recipe, told.latency.ratio, told.stages[0].status) == ("fold-batchnorm", 0.5, "kept")
    assert json.loads(Path("a.json").read_text())["model"] == "plain"
    assert "fold-batchnorm" in Path("a.html").read_text()
    ratio[:] = [3.0]
    said = command("optimize", model, "--replay", "a.json", "-o", "b.onnx")
    assert said.status == 0
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_a_recipe_may_be_a_file(command, model):
    Path("r.yaml").write_text("passes:\n- simplify\n- fold-batchnorm\n")
    assert command("optimize", model, "--recipe", "r.yaml", "--no-measure", "-o", "r.onnx").status == 0
    assert {p.value for p in onnx.load("r.onnx").metadata_props} >= {"simplify, fold-batchnorm"}


def test_external_data_lie_beside_the_output(command, model):
    assert command("optimize", model, "--passes", "simplify", "--no-measure", "--external-data").status == 0
    assert {re.sub(r"[0-9a-f]{8}", "X", name) for name in files()} == {
        "plain.onnx", "plain-effc.onnx", "plain-effc.X.data",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("requirement", "words"),
    [
        (["--min-speedup", "2.5"], "the result is 2.00x as fast as the original, 2.5x was required"),
        (["--max-size", "0.5"], "of the original's size, 0.5 was required"),
    ],
)
def test_a_requirement_that_is_not_met_writes_nothing_unless_forced(command, model, ratio, requirement, words):
    arguments = ["optimize", model, "--passes", "fold-batchnorm", *requirement, "--json", "r.json"]
    said = command(*arguments)
    assert said.status == 3
    assert said.error.startswith("effc: error: the result ") and words in said.error and said.error.count("\n") == 1
    assert "not met" in said.out and "written" not in said.out
    assert files() == {"plain.onnx", "r.json"}
    assert History.from_json(Path("r.json").read_bytes()).unmet
    said = command(*arguments, "--force")
    assert said.status == 3
    assert "written: plain-effc.onnx" in said.out
    assert files() == {"plain.onnx", "r.json", "plain-effc.onnx"}


def test_a_requirement_that_is_met_is_no_news(command, model, ratio):
    assert command("optimize", model, "--passes", "fold-batchnorm", "--min-speedup", "2").status == 0


def test_when_everything_was_undone_the_original_is_written(command, model, ratio):
    ratio[:] = [1.5]
    said = command("optimize", model, "--passes", "fold-batchnorm")
    assert said.status == 0
    assert "nothing was kept: the result is the original" in said.out
    assert "fold-batchnorm: undone, slower: 3.000 ms against 2.000 ms" in said.out
    assert distance(run(networks.plain()), run(onnx.load("plain-effc.onnx"))) == 0


def test_an_existing_output_is_replaced_on_success_only(command, model, ratio):
    Path("out.onnx").write_bytes(b"old")
    assert command("optimize", model, "--passes", "fold-batchnorm", "--min-speedup", "9", "-o", "out.onnx").status == 3
    assert Path("out.onnx").read_bytes() == b"old"
    assert command("optimize", model, "--passes", "fold-batchnorm", "-o", "out.onnx").status == 0
    onnx.checker.check_model(onnx.load("out.onnx"))


def test_a_pass_that_breaks_its_contract_is_status_1(command, model, monkeypatch):
    from effc.passes.simplify import Simplify

    def broken(self, model, chosen, context):
        raise ZeroDivisionError("no rank")

    monkeypatch.setattr(Simplify, "rewrite", broken)
    said = command("optimize", model, "--passes", "simplify", "--no-measure")
    assert said == Said(1, "", "effc: error: simplify: ZeroDivisionError: no rank; leave this pass out\n")
    assert files() == {"plain.onnx"}


def test_comparing_sets_two_models_beside_each_other(command, model, ratio):
    onnx.save(networks.two_outputs(), "other.onnx")
    assert command("optimize", model, "--passes", "fold-batchnorm", "--no-measure", "-o", "b.onnx").status == 0
    np.savez("d.npz", input=feeds(networks.plain(), batch=20)["input"])
    said = command("compare", model, "b.onnx", "--evaluate", "d.npz")
    assert said.status == 0
    assert re.search(r"latency, ms\W+2\.000\W+1\.000\W+0\.50", said.out)
    assert re.search(r"nodes\W+11\W+9", said.out)
    assert re.search(r"agreement on 20\W+100\.00\W+100\.00", said.out)
    refused(command("compare", model, "none.onnx"), "none.onnx does not exist")
    refused(command("compare", model, "other.onnx"), "different inputs and cannot be compared: input float32 ?x3x")


@pytest.fixture
def predicted(monkeypatch) -> list[dict]:
    """Every node takes a microsecond; what was asked is kept."""
    asked = []

    def fake(model: Model, target: Target, **options) -> Prediction:
        asked.append({"model": model.name, "target": target.name, **options})
        nodes = {node.name: Estimate(1e-6, 0.2, ROOFLINE) for node in model.graph}
        return Prediction(Estimate(1e-6 * len(nodes) + 1e-5, 0.2, ROOFLINE), nodes)

    monkeypatch.setattr(cli_inspect, "predict", fake)
    return asked


def test_inspecting_tells_where_the_time_goes(command, model, predicted, monkeypatch):
    said = command("inspect", model, "--target", "onnxruntime-avx2", "--batch", "4", "--threads", "2")
    assert (said.status, said.error) == (0, "")
    assert said.out.startswith("plain on onnxruntime-avx2 (published), batch 4, 2 threads")
    assert re.search(r"node_conv2 +Conv +4x16x6x6 +166k", said.out)
    assert re.search(r"total +622k +3\.88k +15\.5kB", said.out)
    (asked,) = predicted
    assert (asked["model"], asked["batch"], asked["threads"], asked["dims"]) == ("plain", 4, 2, {})
    assert asked["backend"].name == "onnxruntime"
    monkeypatch.delenv("COLUMNS")  # a pipe: rich would take 80
    said = command("inspect", model, "--target", "tensorrt-a100", "--top", "3")
    assert said.status == 0 and predicted[1]["backend"] is None
    assert re.search(r"and \d+ more, \d+% of the time; --top 0 shows all", said.out)
    assert 80 < max(len(line.rstrip()) for line in said.out.splitlines()) <= 120
    assert files() == {"plain.onnx"}


def test_inspecting_for_programs(command, model, predicted):
    said = command("inspect", model, "--json")
    data = json.loads(said.out)
    assert (said.status, said.error) == (0, "")
    assert (data["model"], data["batch"], data["totals"]["nodes"], len(data["layers"])) == ("plain", 1, 11, 11)
    assert data["totals"]["macs"] == sum(layer["macs"] for layer in data["layers"]) == 155_600
    rows = list(csv.DictReader(io.StringIO(command("inspect", model, "--csv").out)))
    assert sum(int(row["macs"] or 0) for row in rows) == 155_600
    assert len(json.loads(command("inspect", model, "--json", "--top", "2").out)["layers"]) == 2


def test_inspecting_with_the_runtime_at_hand(command, model):
    """Nothing made up: each node has its own time, is part of another's kernel, or has nothing left to do."""
    said = command("inspect", model, "--target", "onnxruntime-avx2", "--json")
    assert (said.status, said.error) == (0, "")
    data = json.loads(said.out)
    layers = {layer["name"]: layer for layer in data["layers"]}
    assert layers["node_bn1"]["fused_into"] == "node_conv1" and "Relu" in layers["node_conv1"]["fuses"]
    told = [row["predicted_seconds"] or 0 for row in (*data["layers"], *data["added"])]
    assert sum(told) == pytest.approx(data["totals"]["predicted_seconds"], rel=1e-6, abs=0)
    assert data["totals"]["macs"] == 155_600 and not data["unknown"]
    bare = json.loads(command("inspect", model, "--target", "tensorrt-a100", "--json").out)
    assert bare["totals"]["basis"] == "roofline" and bare["totals"]["macs"] == 155_600


def test_inspecting_two_models(command, model, predicted):
    onnx.save(networks.residual(), "residual.onnx")
    said = command("inspect", model, "residual.onnx")
    assert said.status == 0 and re.search(r"nodes +11 +\d+", said.out) and "gone" in said.out and "new" in said.out
    data = json.loads(command("inspect", model, "residual.onnx", "--json").out)
    assert data["models"] == ["plain", "residual"] and len(data["totals"]) == 2
    assert command("inspect", model, "residual.onnx", "--csv").out.startswith(
        "name,status,difference_seconds,a_op,b_op"
    )


def test_inspecting_what_training_takes(command, model, predicted):
    """1.3 G parameters on 26 G tokens: 2.03e20 operations, of which an A100 reaches 0.21 of 312 T a second."""
    plan = ["--training", "--utilisation", "0.21", "--target", "tensorrt-a100"]
    said = command("inspect", *plan, "--parameters", "1.3e9", "--tokens", "26e9", "--devices", "256", "--price", "2.33")
    assert (said.status, said.error, predicted) == (0, "", [])
    assert re.search(r"2\.03e\+20 +859\.8 +0\.14 +\$2,003\.31", said.out)
    said = command("inspect", model, *plan, "--samples", "1e6", "--batch", "4", "--json")
    found = json.loads(said.out)["training"]
    assert found["flops"] == 6 * 155_600 * 1e6 and found["dollars"] is None
    assert found["peak_flops_per_second"] == 3.12e14
    assert found["device_hours"] == pytest.approx(found["flops"] / (3.12e14 * 0.21) / 3600, rel=1e-12, abs=0)
    said = command("inspect", model, *plan, "--tokens", "1e6", "--peak", "1e12")
    assert said.status == 0 and f"{6 * 3_877 * 1e6:.3g}" in said.out and "at 21% of 1TFLOP/s, 1 device" in said.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "an .onnx or .pt2 file is needed, or --training with --parameters and --tokens"),
        (["none.onnx"], "none.onnx does not exist"),
        (["plain.onnx", "none.onnx"], "none.onnx does not exist"),
        (["plain.onnx", "--json", "--csv"], "give --json or --csv, not both"),
        (["plain.onnx", "--target", "abacus"], "unknown target 'abacus'; there are onnxruntime-avx2"),
        (["plain.onnx", "--dim", "T=4"], "the model has no dimension 'T'; its dynamic dimensions are N"),
        (["plain.onnx", "--dim", "T"], "--dim T: it takes name=value"),
        (["plain.onnx", "--top", "-1"], "--top"),
        (["plain.onnx", "--samples", "3"], "--samples belongs to --training; give that too"),
        (["plain.onnx", "--training", "--samples", "3"], "--training needs --utilisation"),
        (["plain.onnx", "--training", "--utilisation", "0.3"], "--training needs --samples"),
        (["--training", "--utilisation", "0.3", "--samples", "9"], "without a model needs --parameters and --tokens"),
        (["--training", "--utilisation", "0.3", "--tokens", "9"], "without a model needs --parameters and --tokens"),
        (["--training", "--utilisation", "3", "--tokens", "9", "--parameters", "9"], "a utilisation of 3 cannot be"),
        (
            ["plain.onnx", "--training", "--utilisation", "0.3", "--tokens", "9", "--parameters", "9"],
            "the model's own parameters are counted: leave out --parameters or the model",
        ),
        (
            ["plain.onnx", "plain.onnx", "--training", "--utilisation", "0.3", "--tokens", "9"],
            "--training takes one model",
        ),
    ],
)
def test_inspecting_refuses_what_makes_no_sense(command, model, predicted, arguments, words):
    refused(command("inspect", *arguments), words)


@pytest.fixture
def elsewhere():
    """Writes target files as other machines would have measured them: afar.json, old.json."""
    here = replace(find("onnxruntime-avx2"), origin=MEASURED, processor=processor(), runtime_version="1.0")
    Path("afar.json").write_text(to_json(replace(here, name="afar", processor="another")))
    Path("old.json").write_text(to_json(replace(here, name="old")))


def test_inspecting_with_a_target_measured_elsewhere(command, model, elsewhere, predicted):
    refused(command("inspect", model, "--target", "afar.json"), "was measured on 'another'", "--foreign-target")
    refused(command("inspect", model, "--target", "old.json"), "with onnxruntime 1.0, and this is", "--foreign-target")
    said = command("inspect", model, "--target", "afar.json", "--foreign-target")
    assert said.status == 0 and "plain on afar (measured)" in said.out


def test_optimizing_for_a_target_measured_elsewhere(command, model, elsewhere):
    arguments = "optimize", model, "--passes", "fold-batchnorm", "--target"
    before = files()
    refused(command(*arguments, "afar.json"), "was measured on 'another'", "--foreign-target")
    refused(command(*arguments, "old.json"), "with onnxruntime 1.0, and this is", "--foreign-target")
    refused(command(*arguments, "afar.json", "--foreign-target", "--min-speedup", "2"), "no speed can be measured")
    assert files() == before
    said = command(*arguments, "afar.json", "--foreign-target", "--json", "r.json")
    assert (said.status, said.error) == (0, "") and "written: plain-effc.onnx" in said.out
    told = History.from_json(Path("r.json").read_bytes())
    assert (told.target, told.latency) == ("afar", None)
    assert "latency was not measured: target 'afar' is another machine's" in told.unproven


@pytest.fixture
def measured(monkeypatch, tmp_path) -> list[float]:
    """The machine is measured in no time, and its folder for caches is an empty one; for how long was asked is kept."""
    asked = []
    samples = Samples((*ADD, "us"), ((*ADD.values(), 1.0),) * 3, Hyper((1.0,) * len(describe(ADD, 4)[0])))

    def fake(backend, *, seconds, progress):
        assert backend.name == "onnxruntime"
        asked.append(seconds)
        progress("calibrating", 1)(1)
        here = replace(find("onnxruntime-avx2"), name="mine", origin=MEASURED, processor=processor(), source="just now")
        one = Roof({"float32": 81.25e9, "int8": 2.5e11}, bandwidth=2e10)
        roofs, kernels = {1: one, 2: Roof({"float32": 1.5e11}, 3e10)}, {1: {"Add": samples, "Mul": samples}}
        return replace(here, runtime_version=backend.version(), roofs=roofs, kernels=kernels)

    monkeypatch.setattr(cli_calibrate, "calibrate", fake)
    monkeypatch.setattr(target, "calibrated_file", lambda: tmp_path / "cache" / "effc" / "target.json")
    monkeypatch.setattr(cli_calibrate, "calibrated_file", target.calibrated_file)
    return asked


def test_calibrating_is_for_all_that_follows(command, model, measured, predicted):
    kept = target.calibrated_file()
    said = command("calibrate-target")
    assert (said.status, said.error, measured) == (0, "", [SECONDS])
    assert f"written: {kept}" in said.out and "effc inspect and effc optimize use it from now on" in said.out
    assert re.search(r"1 +│ +81\.2 +│ +250\.0 +│ +20\.0 +│ +6 +│ +2", said.out)
    assert re.search(r"2 +│ +150\.0 +│ +│ +30\.0 +│ +0 +│ +0", said.out)
    assert f"{processor()}; onnxruntime " in said.out and "just now" in said.out and "less sure" not in said.out
    assert [path.name for path in kept.parent.iterdir()] == ["target.json"] and files() == {"plain.onnx"}
    assert "plain on mine (measured)" in command("inspect", model).out
    assert command("optimize", model, "--passes", "simplify", "--no-measure", "--json", "r.json").status == 0
    assert History.from_json(Path("r.json").read_bytes()).target == "mine"


def test_calibrating_into_a_file(command, model, measured, predicted):
    Path("mine.json").write_text("old")
    said = command("calibrate-target", "-o", "mine.json", "--seconds", "20")
    assert (said.status, measured) == (0, [20.0])
    assert "measured for 20 s, not 255: predictions will be less sure than they could be" in said.out
    assert "use it with --target mine.json" in said.out and not target.calibrated_file().exists()
    assert find("mine.json").local and files() == {"plain.onnx", "mine.json"}
    assert "plain on mine (measured)" in command("inspect", model, "--target", "mine.json").out
    assert command("calibrate-target", "-o", "mine.json", "--quiet") == Said(0, "", "")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), effc.EffcError("no such luck")])
def test_calibrating_that_ends_early_leaves_what_was_there(command, measured, monkeypatch, error):
    def broken(*arguments, **options):
        raise error

    Path("mine.json").write_text("old")
    if isinstance(error, KeyboardInterrupt):
        monkeypatch.setattr(os, "replace", broken)  # the new file is written, and not in its place yet
    else:
        monkeypatch.setattr(cli_calibrate, "calibrate", broken)
    said = command("calibrate-target", "-o", "mine.json")
    assert said.status == (130 if isinstance(error, KeyboardInterrupt) else 1) and "written" not in said.out
    assert Path("mine.json").read_text() == "old" and files() == {"mine.json"}
    assert command("calibrate-target").status == said.status
    assert not target.calibrated_file().exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "nowhere/t.json"], "nowhere does not exist; make the folder first"),
        (["-o", "."], "is a folder; name the file to write"),
        (["--seconds", "0.5"], "--seconds 0.5: it takes at least 1; 255 is usual"),
        (["--seconds", "nan"], "--seconds nan: it takes at least 1"),
        (["--seconds", "inf"], "--seconds inf: it takes at least 1"),
        (["--seconds", "many"], "Invalid value for '--seconds'"),
        (["t.json"], "unexpected extra argument"),
    ],
)
def test_calibrating_refuses_what_makes_no_sense(command, measured, arguments, words):
    refused(command("calibrate-target", *arguments), words)
    assert measured == [] and files() == set()


def test_calibrating_where_nothing_can_be_kept(command, measured, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    refused(command("calibrate-target"), "cannot be made: Not a directory; choose a file with -o")
    assert measured == []


def test_passes_are_listed_with_their_options(command):
    said = command("passes")
    assert said.status == 0
    for name in ("simplify", "fold-batchnorm", "int8", "repeat"):
        assert re.search(rf"^\W*{name}\W+(exact|lossy)", said.out, re.MULTILINE)
    said = command("passes", "int8")
    assert re.search(r"calibrator\W+minmax, percentile, entropy, mse, output\W+mse", said.out)
    refused(command("passes", "int9"), "unknown pass 'int9'")


def test_the_version(command):
    assert command("--version") == Said(0, f"{effc.__version__}\n", "")


def test_the_command_itself_gives_its_status_and_no_traceback(tmp_path):
    """Once as a process of its own: the entry point, and what is printed outside of Python's hands."""
    (tmp_path / "bad.onnx").write_bytes(b"\x08")
    code = "from effc.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "optimize", "bad.onnx"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 2
    assert found.stderr.startswith("effc: error: bad.onnx is not an ONNX model")
    assert found.stderr.count("\n") == 1 and found.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]


def test_the_file_does_not_depend_on_the_process(tmp_path):
    """Python orders sets of texts anew in each process."""
    onnx.save(networks.residual(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", input=feeds(networks.residual(), batch=8)["input"])
    code = "from effc.cli import main; main()"
    for seed in ("1", "2"):
        arguments = ["optimize", "m.onnx", "--calibrate", "d.npz", "--no-measure", "--quiet", "-o", f"{seed}.onnx"]
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=120,
        )  # fmt: skip
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_the_example(command):
    """examples/digits by its recipe: right, smaller, and within a point of the original on 100 test images."""
    pytest.importorskip("sklearn")
    said = command(
        "optimize", DIGITS / "digits.onnx", "--passes", "simplify,fold-batchnorm,int8", "--no-measure",
        "--calibrate", f"{DIGITS / 'digits-train.yaml'}{{limit=64}}",
        "--evaluate", f"{DIGITS / 'digits-test.yaml'}{{limit=100}}",
        "-o", "digits-effc.onnx", "--json", "r.json",
    )  # fmt: skip
    assert said.status == 0, said.error
    history = History.from_json(Path("r.json").read_bytes())
    assert {record.name: record.status for record in history.passes}["int8"] == "kept"
    assert history.final.accuracy.samples <= 100 and history.final.accuracy.drop <= 1.0
    assert history.final.cost.weight_bytes < 0.3 * history.original.cost.weight_bytes  # 8 of 32 bits, and scales
    onnx.checker.check_model(onnx.load("digits-effc.onnx"), full_check=True)
    assert Path("digits-effc.onnx").stat().st_size < 0.35 * (DIGITS / "digits.onnx").stat().st_size
    assert {"image"} == {i.name for i in onnx.load("digits-effc.onnx").graph.input}
