"""effc.capture of modules and programs of torch: the same outputs, names of the module, and refusals in their words."""

import functools
import json
import sys
import zipfile
from collections import Counter

import numpy as np
import onnx
import pytest

import effc
from effc import BadInput, cli, registry

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
torch.set_num_threads(1)
CLOSE = 1e-5


def block(n: int, d: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(block(3, 8), block(8, 16, 2))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(16 * 16, 5)

    def forward(self, image):
        return self.fc(self.drop(torch.flatten(self.layer1(image), 1)))


class Residual(nn.Module):
    """With the shortcut of a narrower block: every other position, zeros for the channels it lacks."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


class Mobile(nn.Module):
    """Depthwise, hard swish, and squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.dw, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Hardswish()
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.act(self.bn(self.dw(x))))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(self.pool(x)))))
        x = self.pool(x)
        return self.head(x.view(x.size(0), -1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(8, 5)

    def forward(self, x):
        a, b = self.up(x.flatten(1)).chunk(2, 1)
        return self.down(a * torch.sigmoid(b))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(2, 4, 3, dilation=2), nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, signal):
        return self.lstm(self.bn(self.conv(signal)).transpose(1, 2))[0]


class Two(nn.Module):
    """Two inputs, two outputs, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)

    def forward(self, left, right):
        total = self.shared(left) + self.shared(right)
        return total, torch.tanh(total)


MODULES = {
    "plain": (Plain, [(3, 8, 8)]),
    "residual": (Residual, [(4, 8, 8)]),
    "mobile": (Mobile, [(8, 6, 6)]),
    "mlp": (Mlp, [(3, 4)]),
    "attention": (Attention, [(7, 16)]),
    "sound": (Sound, [(2, 20)]),
    "two": (Two, [(6,), (6,)]),
}
CASES = [(name, "module") for name in MODULES]
CASES += [(name, form) for name in ("plain", "residual", "two") for form in ("traced", "program", "pt2")]


@functools.cache
def network(name):
    """A module whose batch norms do something."""
    torch.manual_seed(0)
    made = MODULES[name][0]().eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            for values in (part.running_mean, part.bias.data, part.weight.data):
                values.add_(0.3 * torch.randn_like(values))
            part.running_var.uniform_(0.5, 1.5)
    return made


def inputs(name, batch):
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in MODULES[name][1])


@functools.cache
def program(name):
    size = torch.export.Dim("batch")
    made = network(name)
    return torch.export.export(made, inputs(name, 2), dynamic_shapes=tuple({0: size} for _ in MODULES[name][1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `effc ...`; returns status, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["effc", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


_captured: dict[tuple[str, str], effc.Model] = {}


def captured(name, form, folder=None):
    if (name, form) not in _captured:
        if form == "program":
            made = effc.capture(program(name))
        elif form == "pt2":
            torch.export.save(program(name), folder / f"{name}.pt2")
            made = effc.load(folder / f"{name}.pt2")
        else:
            source = torch.fx.symbolic_trace(network(name)) if form == "traced" else network(name)
            made = effc.capture(source, inputs(name, 1))
        _captured[name, form] = made
    return _captured[name, form]


def run(model, arrays):
    feeds = {info.name: array.numpy() for info, array in zip(model.inputs, arrays, strict=True)}
    return list(registry.backend("onnxruntime").session(model).run(feeds).values())


def far(model, module, arrays):
    with torch.no_grad():
        wanted = module(*arrays)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    found = run(model, arrays)
    assert [a.shape for a in found] == [tuple(b.shape) for b in wanted]
    return max(float(np.abs(a - b.numpy()).max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def types(model):
    return Counter(node.op_type for node in model.graph)


def refused(source, *arguments, **options):
    with pytest.raises(BadInput) as found:
        effc.capture(source, *arguments, **options)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_outputs_are_those_of_the_module_at_any_batch(name, form, folder):
    model = captured(name, form, folder)
    onnx.checker.check_model(model.proto(), full_check=True)
    assert [info.shape[0] for info in model.inputs] == ["N"] * len(MODULES[name][1])
    assert model.notes == ()
    for batch in (1, 3):
        assert far(model, network(name), inputs(name, batch)) <= CLOSE


@pytest.mark.parametrize(("name", "form"), CASES)
def test_parameters_and_batch_norms_survive(name, form, folder):
    model, module = captured(name, form, folder), network(name)
    norms = sum(isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d) for part in module.modules())
    assert types(model)["BatchNormalization"] == norms
    wanted = {key for key, v in module.state_dict().items() if v.ndim and not key.startswith("lstm")}
    assert wanted <= set(model.graph.initializers)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_nothing_is_left_of_what_the_exporter_spells_at_length(name, form, folder):
    model = captured(name, form, folder)
    if name != "sound":  # an LSTM's first state has as many rows as the batch
        assert not types(model).keys() & {"Shape", "Identity", "Constant", "CastLike", "Dropout", "Expand", "Concat"}
    assert model.proto().ByteSize() < model.nbytes() + 300 * len(model.graph)
    assert all(not node.metadata_props for node in model.graph)


@pytest.mark.parametrize("form", ["module", "traced", "program", "pt2"])
def test_nodes_are_called_after_their_modules(form, folder):
    named = {node.name: node.op_type for node in captured("plain", form, folder).graph}
    layers = {f"layer1.{i}.{j}": op for i in "01" for j, op in enumerate(("Conv", "BatchNormalization", "Relu"))}
    assert named == {**layers, "Reshape": "Reshape", "fc": "Gemm"}


def test_names_within_attention():
    model = captured("attention", "module")
    assert {model.node(name).op_type for name in ("up", "down")} == {"MatMul"}
    assert model.node("attention.out_proj").op_type == "Gemm"
    assert model.node("attention/Softmax").op_type == "Softmax"
    assert model.value("up.weight").shape.numpy() == (16, 32)


def test_a_flatten_is_one_node():
    assert types(captured("plain", "module")) == {
        "Conv": 2,
        "BatchNormalization": 2,
        "Relu": 2,
        "Reshape": 1,
        "Gemm": 1,
    }
    for name in ("plain", "mobile", "mlp"):
        model = captured(name, "module")
        (reshape,) = model.nodes("Reshape")
        assert model.constant(reshape.inputs[1])[0] == 0


def test_inputs_have_the_names_of_the_signature_or_those_given():
    assert [info.name for info in captured("two", "module").inputs] == ["left", "right"]
    left, right = inputs("two", 2)
    model = effc.capture(network("two"), {"right": right, "left": left}, input_names=["linear", "b"], name="other")
    assert [info.name for info in model.inputs] == ["linear", "b"] and model.name == "other"
    assert far(model, network("two"), (left, right)) <= CLOSE


def test_a_module_is_left_as_it_was():
    module = Plain().train()
    module.layer1[0][1].eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    model = effc.capture(module, inputs("plain", 2), dynamic_batch=False)
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert model.batch == 2 and model.notes == () and model.name == "Plain"
    weight = model.constant(model.value("fc.weight")).copy()
    with torch.no_grad():
        module.fc.weight.add_(1)
    np.testing.assert_array_equal(model.constant(model.value("fc.weight")), weight)


class Stubborn(nn.Module):
    def forward(self, x):
        return x.view(2, 4) * 2 if x.shape[0] == 2 else x


def test_a_batch_that_cannot_be_dynamic_is_noted():
    model = effc.capture(Stubborn(), torch.randn(2, 4))
    assert model.batch == 2
    assert model.notes == ("the batch is fixed at 2: the module takes one size, or goes another way for others",)
    fixed = torch.export.export(network("mlp"), inputs("mlp", 2))
    note = "the batch is fixed at 2, as the program was exported: torch.export takes dynamic_shapes"
    assert effc.capture(fixed).notes == (note,)


class OneApart(nn.Module):
    def forward(self, x):
        return x if x.shape[0] == 1 else x * 2


def test_a_batch_of_one_is_tried_as_well():
    model = effc.capture(OneApart(), torch.randn(3, 4))
    assert model.batch == 3
    assert model.notes[0].startswith("the batch is fixed at 3: at one sample, what was exported is not right: ")


class Nested(nn.Module):
    def forward(self, *pairs, scale=1):
        return pairs[0]["a"] * scale + pairs[1][0]


def test_nested_inputs_become_flat_ones_and_numbers_constants():
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    model = effc.capture(Nested(), ({"a": a}, [b]))
    assert [info.shape for info in model.inputs] == [("N", 4)] * 2
    np.testing.assert_allclose(run(model, (a, b))[0], a + b, rtol=1e-6)


class Odd(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.does = forward

    def forward(self, x):
        return self.does(self, x)


REFUSED = {
    "operator": (lambda s, x: torch.linalg.eigh(x @ x.T)[0], "uses aten._linalg_eigh, which torch's exporter cannot"),
    "control flow": (lambda s, x: x if x.sum() > 0 else -x, "goes another way by the numbers in a tensor"),
    "complex": (lambda s, x: torch.complex(x, x), "output 0 of Odd is complex, which ONNX has no type for"),
    "constant": (lambda s, x: (x * 2, 3), "output 1 of Odd is 3 and no tensor: leave it out"),
    "state": (lambda s, x: x + s.count.add_(1), "writes to count, which a graph cannot"),
    "random": (lambda s, x: F.dropout(x, 0.5, training=True), "is anything in it drawn at random"),
    "wrong": (lambda s, x: x @ x, "Odd does not run on the example inputs: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_onnx_cannot_hold_is_refused(what):
    function, text = REFUSED[what]
    assert text in refused(Odd(function), torch.randn(60, 3), dynamic_batch=False)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "a module is captured with example inputs: give example_inputs, a tensor, a tuple of arguments or"),
        (np.zeros((1, 3)), "example inputs are a ndarray; a tensor, a tuple or a dict is needed"),
        ((np.zeros((1, 3)),), "example inputs hold a ndarray; tensors are needed: torch.from_numpy makes one"),
        ((3,), "example inputs hold no tensor"),
        (torch.zeros(1, dtype=torch.complex64), "an example input is complex"),
    ],
)
def test_example_inputs_of_the_wrong_kind(given, text):
    assert text in refused(network("mlp"), given)


def test_what_is_no_model():
    assert "a dict is no model, as a state_dict is weights alone" in refused(dict(network("mlp").state_dict()))
    assert "a state_dict is weights alone" in refused(network("mlp").state_dict())
    assert "a Tensor of torch is no model" in refused(torch.zeros(1))
    assert "a int is no model: give an .onnx or .pt2 file" in refused(3)
    assert "example_inputs belong to a module of torch" in refused("model.onnx", 3)
    assert "an exported program has inputs of its own" in refused(program("two"), inputs("two", 2))
    assert "2 different input_names are needed, for left, right" in refused(program("two"), input_names=["a", "a"])


@pytest.mark.parametrize("ending", [".pt", ".pth"])
def test_checkpoints(command, tmp_path, ending):
    path = tmp_path / f"model{ending}"
    torch.save(network("mlp").state_dict(), path)
    assert "is a checkpoint, which holds weights or code and no graph" in refused(path)
    status, _, error = command("inspect", path)
    assert status == 2 and error.startswith(f"effc: error: {path} is a checkpoint")


def altered(source, target, change):
    """A copy of an archive in which `change(name, content)` says what stands where."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_program_files_that_are_none(tmp_path, folder):
    captured("two", "pt2", folder)
    path = tmp_path / "other.pt2"
    assert refused(path).endswith("other.pt2 does not exist")
    path.write_bytes(b"not an archive")
    assert "is not a .pt2 file, or it is truncated" in refused(path)
    path.write_bytes((folder / "two.pt2").read_bytes()[:-200])
    assert "is not a .pt2 file" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
    assert "is not a .pt2 file as torch.export.save of torch 2.8 or newer writes" in refused(path)


def test_code_in_a_program_file_is_not_run(tmp_path, folder):
    captured("two", "pt2", folder)

    def pickled(name, content):
        if name.endswith("weights_config.json"):
            found = json.loads(content)
            for entry in found["config"].values():
                entry["use_pickle"] = True
            return json.dumps(found)
        return content

    def evaluated(name, content):
        if not name.endswith("models/model.json"):
            return content
        assert b'"expr_str": "' in content
        return content.replace(b'"expr_str": "', b'"expr_str": "exec(chr(49))+')

    bad = altered(folder / "two.pt2", tmp_path / "pickled.pt2", pickled)
    assert "holds a pickled object (shared." in refused(bad)
    bad = altered(folder / "two.pt2", tmp_path / "evaluated.pt2", evaluated)
    assert 'holds a size that is no arithmetic: "exec(chr(49))' in refused(bad)


def test_without_torch(monkeypatch, tmp_path):
    module = network("mlp")
    monkeypatch.setitem(sys.modules, "torch", None)
    text = "torch is needed for this model and is not installed: pip install 'effc[torch]'"
    assert refused(module, ()) == text
    assert refused(tmp_path / "model.pt2") == text


def test_optimize_takes_a_module():
    module = network("plain")
    result = effc.optimize(module, "simplify,fold-batchnorm", example_inputs=inputs("plain", 2), measure=False)
    assert types(result.model)["BatchNormalization"] == 0
    assert {"layer1.0.0", "layer1.1.0", "fc"} <= {node.name for node in result.model.graph}
    assert "layer1.0.0" in result.history.node_map
    assert far(result.model, module, inputs("plain", 3)) <= CLOSE


PASSES = ["simplify", "low-rank{macs=0.7, min_gain=1}", "recover{epochs=1, batch=16}", "fold-batchnorm", "int8"]


@pytest.mark.parametrize("count", range(1, 1 + len(PASSES)))
def test_optimize_gives_a_module_that_trains_after_every_pass(count):
    """It is what onnxruntime runs: to rounding in float32, with codes of 8 bits to a step of the last; after a step of
    SGD as well."""
    rng = np.random.default_rng(0)
    data = {"source": lambda: iter([{"image": rng.normal(size=(64, 3, 8, 8)).astype(np.float32)}])}
    result = effc.optimize(
        network("plain"), ",".join(PASSES[:count]), example_inputs=inputs("plain", 2), calibrate=data, train=data,
        measure=False, force=True,
    )  # fmt: skip
    assert all(stage.status == "kept" for stage in result.history.stages[1:])
    assert isinstance(result.module, torch.fx.GraphModule) and result.module is result.module
    x, integers = inputs("plain", 5)[0], "int8" in PASSES[:count]
    session = registry.backend("onnxruntime").session

    def apart() -> float:
        (made,) = session(result.model, optimize=False).run({"image": x.numpy()}).values()
        return float(np.abs(made - result.module(x).detach().numpy()).max() / np.abs(made).max())

    limit = 2 / 255 if integers else CLOSE
    before = result.module(x).detach()
    assert apart() <= limit
    optimizer = torch.optim.SGD(result.module.parameters(), lr=0.1)
    result.module(x).square().sum().backward()
    optimizer.step()
    registry.trainer().write_back(result.module, result.model)
    assert apart() <= limit and (result.module(x) - before).abs().max() > 10 * limit * before.abs().max()


def test_the_command_takes_program_files(command, monkeypatch, tmp_path, folder):
    captured("plain", "pt2", folder)
    path, small = folder / "plain.pt2", tmp_path / "small.onnx"
    assert command("optimize", path, "--passes", "fold-batchnorm", "--no-measure", "--quiet", "-o", small) == (
        0,
        "",
        "",
    )
    assert far(effc.load(small), network("plain"), inputs("plain", 3)) <= CLOSE
    status, shown, _ = command("inspect", path)
    assert status == 0 and "layer1.0.0" in shown
    monkeypatch.setattr(cli, "compare_latency", lambda *models, **options: None)
    status, shown, _ = command("compare", path, small, "--quiet")
    assert status == 0 and "plain.pt2" in shown
