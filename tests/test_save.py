"""Saving: right or not at all, the same bytes again, weights streamed, nothing of the old model lost half-way."""

import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from effc.backends.onnxruntime import OnnxRuntime
from effc.capture import from_proto, load
from effc.edit import set_initializer
from effc.errors import BadInput, EffcError, InvalidModel
from effc.model import Model
from effc.save import save

RUNTIME = OnnxRuntime()
SIZE = 64


def network(seed: int = 0, layers: int = 2) -> Model:
    """x -> MatMul(w0) -> ..., and a Constant that adds one."""
    rng = np.random.default_rng(seed)
    ws = [numpy_helper.from_array(rng.standard_normal((SIZE, SIZE), np.float32), f"w{i}") for i in range(layers)]
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"mm{i}") for i in range(layers)]
    nodes.append(helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.ones(1, np.float32))))
    nodes.append(helper.make_node("Add", [f"x{layers}", "one"], ["y"], name="add"))
    info = helper.make_tensor_value_info
    x, y = info("x0", TensorProto.FLOAT, ["N", SIZE]), info("y", TensorProto.FLOAT, ["N", SIZE])
    graph = helper.make_graph(nodes, "g", [x], [y], ws)
    opsets = [helper.make_opsetid("", 17)]
    return from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8), "net")


X = {"x0": np.random.default_rng(9).standard_normal((3, SIZE)).astype(np.float32)}


def result(source: Model | Path) -> np.ndarray:
    return RUNTIME.session(source, optimize=False).run(X)["y"]


def files(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


@pytest.mark.parametrize("external", [None, False, True])
def test_a_saved_model_gives_the_same_numbers(tmp_path, external):
    model = network()
    path = save(model, tmp_path / "m.onnx", external=external, backend=RUNTIME)
    assert path == tmp_path / "m.onnx"
    assert len(files(tmp_path)) == (2 if external else 1)
    assert np.array_equal(result(path), result(model))
    assert np.array_equal(result(load(path)), result(model))
    assert not any(info.name.startswith("w") for info in onnx.load(path).graph.value_info)


def test_the_default_backend_is_onnxruntime(tmp_path):
    assert save(network(), tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("external", [False, True])
def test_bytes_are_the_same_again(tmp_path, external):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(network(), tmp_path / name / "m.onnx", external=external, backend=RUNTIME)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_weights_that_were_external_but_small_come_out_inline(tmp_path):
    save(network(), tmp_path / "a.onnx", external=True, backend=RUNTIME)
    (tmp_path / "out").mkdir()
    save(load(tmp_path / "a.onnx"), tmp_path / "out" / "b.onnx", backend=RUNTIME)
    assert files(tmp_path / "out") == ["b.onnx"]
    assert np.array_equal(result(tmp_path / "out" / "b.onnx"), result(network()))


def test_the_data_file_is_named_after_its_content(tmp_path):
    save(network(0), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    first = files(tmp_path)
    assert re.fullmatch(r"m\.[0-9a-f]{8}\.data", first[0])
    held = load(tmp_path / "m.onnx")
    save(network(1), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    second = files(tmp_path)
    assert len(second) == 2
    assert second != first  # the new one is there, the old one went
    assert np.array_equal(result(tmp_path / "m.onnx"), result(network(1)))
    assert np.array_equal(result(held), result(network(0)))  # its maps outlive the file


def test_a_model_may_replace_the_file_it_came_from(tmp_path):
    path = save(network(0), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    model = load(path)
    w = model.value("w0")
    array = model.constant(w)
    assert array is not None
    set_initializer(model, w, array * 2)
    save(model, path, external=True, backend=RUNTIME)
    assert len(files(tmp_path)) == 2
    assert np.allclose(result(path) - 1, 2 * (result(network(0)) - 1), atol=1e-3)
    save(model, path, external=True, backend=RUNTIME)  # the same content: its data file stays
    assert len(files(tmp_path)) == 2
    assert np.array_equal(result(path), result(model))


def test_data_that_another_model_reads_or_that_the_user_named_are_kept(tmp_path):
    path = save(network(0), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    shared = files(tmp_path)[0]
    (tmp_path / "copy.onnx").write_bytes(path.read_bytes())
    save(network(1), path, backend=RUNTIME)
    assert files(tmp_path) == ["copy.onnx", shared, "m.onnx"]
    assert np.array_equal(result(tmp_path / "copy.onnx"), result(network(0)))
    onnx.save(network(2).proto(), tmp_path / "n.onnx", save_as_external_data=True, location="n.bin", size_threshold=0)
    save(network(1), tmp_path / "n.onnx", backend=RUNTIME)
    assert (tmp_path / "n.bin").exists()


def test_a_file_of_weights_is_not_written_over(tmp_path):
    path = save(network(0), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    data = tmp_path / files(tmp_path)[0]
    with pytest.raises(BadInput, match="holds weights of m; choose another name"):
        save(load(path), data, backend=RUNTIME)
    assert np.array_equal(result(path), result(network(0)))


class Refusing(OnnxRuntime):
    def session(self, model, **options):
        raise EffcError("onnxruntime does not load it")


def invalid() -> Model:
    model = network()
    next(model.nodes("Add")).op_type = "NoSuchOperator"
    return model


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("model", "backend", "error", "text"),
    [
        (network(1), Refusing(), EffcError, "onnxruntime does not load it"),
        (invalid(), RUNTIME, InvalidModel, "the ONNX checker refuses the model: .*NoSuchOperator"),
    ],
)
def test_on_failure_nothing_is_left_and_nothing_touched(tmp_path, external, model, backend, error, text):
    with pytest.raises(error, match=text) as raised:
        save(model, tmp_path / "m.onnx", external=external, backend=backend)
    assert files(tmp_path) == []
    assert "\n" not in str(raised.value)
    save(network(0), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(error):
        save(model, tmp_path / "m.onnx", external=external, backend=backend)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_failing_move_leaves_no_data(tmp_path, monkeypatch):
    save(network(0), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    replace = os.replace

    def failing(source, target):
        if Path(target).suffix == ".onnx":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(BadInput, match=r"m\.onnx cannot be written: No space left on device"):
        save(network(1), tmp_path / "m.onnx", external=True, backend=RUNTIME)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_destinations_that_cannot_be(tmp_path):
    with pytest.raises(BadInput, match="is a folder; name the file to write"):
        save(network(), tmp_path, backend=RUNTIME)
    with pytest.raises(BadInput, match="nowhere does not exist; make the folder first"):
        save(network(), tmp_path / "nowhere" / "m.onnx", backend=RUNTIME)
    with pytest.raises(BadInput, match="is not a regular file"):
        save(network(), "/dev/null", backend=RUNTIME)


def test_links_and_permissions_stay(tmp_path):
    (tmp_path / "real").mkdir()
    target = save(network(0), tmp_path / "real" / "m.onnx", backend=RUNTIME)
    os.chmod(target, 0o640)
    (tmp_path / "link.onnx").symlink_to(target)
    save(network(1), tmp_path / "link.onnx", backend=RUNTIME)
    assert (tmp_path / "link.onnx").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert np.array_equal(result(target), result(network(1)))


def test_the_model_itself_is_not_changed(tmp_path):
    model = network()
    model.ir.ir_version, revision = 3, model.revision
    path = save(model, tmp_path / "m.onnx", external=True, backend=RUNTIME)
    assert model.ir.ir_version == 3
    assert model.revision == revision
    assert not any(isinstance(t, ir.ExternalTensor) for t in model.tensors())
    assert onnx.load(path, load_external_data=False).ir_version == 8


def private_megabytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) // 1024


def save_large(path: str) -> int:
    """Save a mapped model to external data; returns by how many MB private memory rose at its highest."""
    model = load(path)
    gc.collect()
    start, highest, stop = private_megabytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            highest[0] = max(highest[0], private_megabytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    save(model, f"{path}.copy.onnx", external=True, backend=RUNTIME)
    stop.set()
    watcher.join()
    return highest[0] - start


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="private memory is read from /proc")
def test_large_models_are_streamed(tmp_path):
    """300 MB of weights pass through with private memory flat; in a process of its own, whose heap is not in use."""
    layers, width = 3, 5000
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(layers)]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x0", TensorProto.FLOAT, ["N", width])],
        [info(f"x{layers}", TensorProto.FLOAT, ["N", width])],
    )
    with open(tmp_path / "w.bin", "wb") as file:
        for i in range(layers):
            length = width * width * 4
            np.full(width * width, 0.01 * i, np.float32).tofile(file)
            weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            weight.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "w.bin"), ("offset", i * length), ("length", length)):
                weight.external_data.add(key=key, value=str(value))
            graph.initializer.append(weight)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('t', sys.argv[1]);"
        " t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t); print(t.save_large(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, __file__, str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40  # of 300
    assert (tmp_path / "m.onnx.copy.onnx").exists()
