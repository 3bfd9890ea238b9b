"""effc check-tensorrt, and effc optimize --target tensorrt, as commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from effc import cli
from tests import networks
from tests.networks import Net, feeds


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `effc ...` in a folder of its own: exit status, standard output and error."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["effc", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def broken() -> onnx.ModelProto:
    """Two violations and one piece of advice."""
    net = Net("broken")
    x = net.input("x", ["N", 8, 8, 8])
    pair = net.weight("scale", np.float32(0.1)), net.weight("zero", np.uint8(7))
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, *pair, name="q"), *pair, name="dq")
    codes = net.weight("w", np.ones((16, 8, 1, 1), np.int8))
    w = net.node("DequantizeLinear", codes, net.weight("s", np.full(16, 0.1, np.float32)), name="wdq", axis=0)
    net.output(net.node("Conv", x, w, name="conv"), ["N", 16, 8, 8])
    return net.model()


def test_a_clean_model_is_one_line(command):
    onnx.save(networks.plain(), "m.onnx")
    assert command("check-tensorrt", "m.onnx") == (0, "m.onnx: keeps TensorRT's rules\n", "")


def test_each_violation_is_a_line_and_the_status_says_so(command):
    onnx.save(broken(), "m.onnx")
    status, out, error = command("check-tensorrt", "m.onnx")
    lines = out.splitlines()
    assert (status, error, len(lines)) == (3, "", 3)
    assert lines[0].startswith("error: QuantizeLinear 'node_q': rule 1 (symmetric codes): its codes are uint8; ")
    assert "zero point 7" in lines[1] and lines[2].startswith("warning: Conv 'node_conv': rule 11 (narrow layers): ")


def test_as_json(command):
    onnx.save(broken(), "m.onnx")
    status, out, _ = command("check-tensorrt", "m.onnx", "--json")
    data = json.loads(out)
    assert status == 3 and data["model"] == "m.onnx" and data["ok"] is False
    keys = {"number", "rule", "error", "node", "op", "found", "allowed", "remedy"}
    assert [set(f) for f in data["findings"]] == [keys] * 3
    assert [(f["number"], f["error"]) for f in data["findings"]] == [(1, True), (1, True), (11, False)]
    onnx.save(networks.plain(), "m.onnx")
    assert json.loads(command("check-tensorrt", "m.onnx", "--json")[1]) == {
        "model": "m.onnx",
        "ok": True,
        "findings": [],
    }


def test_advice_alone_is_no_violation(command):
    proto = broken()
    for tensor in proto.graph.initializer:
        if tensor.name == "zero":
            tensor.CopyFrom(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
    onnx.save(proto, "m.onnx")
    status, out, _ = command("check-tensorrt", "m.onnx")
    assert status == 0 and out.splitlines()[1:] == ["m.onnx: keeps TensorRT's rules"]


def test_what_onnx_itself_refuses_is_looked_at_all_the_same(command):
    """An opset that effc does not load, and a node of no known operator."""
    proto = networks.plain()
    proto.opset_import[0].version = 6
    proto.graph.node.append(helper.make_node("Nonesuch", ["input"], ["nothing"], domain="com.example"))
    onnx.save(proto, "m.onnx")
    status, out, _ = command("check-tensorrt", "m.onnx")
    assert status == 3 and "rule 8 (opsets): opset 6" in out and "com.example.Nonesuch is no operator" in out


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_what_is_no_model_is_bad_input(command, content):
    if content is not None:
        Path("m.onnx").write_bytes(content)
    status, out, error = command("check-tensorrt", "m.onnx")
    assert status == 2 and out == "" and error.startswith("effc: error: m.onnx is ") and error.count("\n") == 1


def wide() -> onnx.ModelProto:
    net = Net("wide")
    x = net.relu(net.conv(net.input("input", ["N", 16, 8, 8]), 16, 32, 3, name="a", pads=[1] * 4, bias=True))
    net.head(net.relu(net.conv(x, 32, 32, 3, name="b", bias=True)), 32, classes=20)
    return net.model()


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fp16"])
def test_optimising_for_tensorrt(command, target):
    proto = wide()
    onnx.save(proto, "m.onnx")
    np.savez("data.npz", input=feeds(proto, batch=16)["input"])
    Path("data.yaml").write_text("source: data.npz\ninputs: {input: input}\n")
    recipe = ["--passes", "simplify,fold-batchnorm,int8", "--calibrate", "data.yaml", "-o", "o.onnx"]
    status, out, error = command("optimize", "m.onnx", "--target", target, *recipe, "--json", "r.json")
    assert (status, error) == (0, "")
    assert "unproven: no TensorRT engine was built: accuracy is that of the same graph run by onnxruntime" in out
    history = json.loads(Path("r.json").read_text())
    assert history["target"] == target and history["latency"] is None
    assert command("check-tensorrt", "o.onnx")[0] == 0
    kinds = {node.op_type for node in onnx.load("o.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert command("optimize", "m.onnx", "--target", target, *recipe, "--min-speedup", "1.1")[0] == 2


def test_a_model_that_is_nothing_for_tensorrt_is_refused_at_once(command):
    onnx.save(broken(), "m.onnx")
    status, _, error = command("optimize", "m.onnx", "--target", "tensorrt", "--passes", "simplify", "-o", "o.onnx")
    assert status == 2 and "broken is nothing" not in error and "m is nothing for TensorRT: error: " in error
    assert "(and 1 more: effc check-tensorrt lists all)" in error and not Path("o.onnx").exists()


def test_a_target_without_figures_predicts_nothing(command):
    onnx.save(networks.plain(), "m.onnx")
    status, _, error = command("inspect", "m.onnx", "--target", "tensorrt")
    assert status == 2 and "target 'tensorrt' has no figures of a device to predict latency with" in error
