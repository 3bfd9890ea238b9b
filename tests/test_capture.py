"""effc.capture: what loads and how it is said, what is refused and in which words."""

import contextlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.external_data_helper import convert_model_to_external_data

from effc.capture import from_proto, load
from effc.errors import BadInput
from tests import networks
from tests.networks import NETWORKS, Net, distance, feeds, run


@pytest.fixture
def external(tmp_path):
    """A model in its own folder, with all larger weights in weights.bin beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    proto = networks.plain()
    convert_model_to_external_data(proto, location="weights.bin", size_threshold=64)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def refused(path) -> str:
    with pytest.raises(BadInput) as found:
        load(path)
    assert "\n" not in str(found.value)
    return str(found.value)


def relocate(path, location: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("name", NETWORKS)
def test_loading_keeps_the_meaning(tmp_path, name):
    proto = NETWORKS[name]()
    onnx.save(proto, tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    inputs = feeds(proto)
    assert distance(run(proto, inputs), run(model.proto(), inputs)) == 0
    assert [t.name for t in model.inputs] == list(inputs)
    assert model.name == "model"


def test_missing(tmp_path):
    assert refused(tmp_path / "none.onnx").endswith("none.onnx does not exist")


def test_folder(tmp_path):
    assert refused(tmp_path).endswith("is a folder; an .onnx file is needed")


def test_empty(tmp_path):
    (tmp_path / "empty.onnx").touch()
    assert refused(tmp_path / "empty.onnx").endswith("is empty; an .onnx file is needed")


@pytest.mark.parametrize(
    "content", [b"This is not a model.\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(64), bytes(100)]
)
def test_other_files(tmp_path, content):
    (tmp_path / "other.onnx").write_bytes(content)
    assert "is not an ONNX model" in refused(tmp_path / "other.onnx")


def test_truncated_anywhere(tmp_path):
    """A cut file is refused in one line wherever it is cut; it never loads as a smaller network."""
    whole = networks.residual().SerializeToString()
    path = tmp_path / "cut.onnx"
    for end in range(1, len(whole), len(whole) // 60):
        path.write_bytes(whole[:end])
        refused(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_damaged_files_are_refused_or_load(tmp_path, name):
    """Whatever the bytes say: a model or one line, never another exception."""
    whole = NETWORKS[name]().SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    for _ in range(20):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            content[place] = rng.integers(0, 256)
        path.write_bytes(content)
        with contextlib.suppress(BadInput):
            load(path).nbytes()


def test_a_message_of_another_kind(tmp_path):
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "x")
    (tmp_path / "tensor.onnx").write_bytes(tensor.SerializeToString())
    assert "tensor" in refused(tmp_path / "tensor.onnx")


@pytest.mark.parametrize("opset", [6, 99])
def test_opsets_that_are_not_understood(tmp_path, opset):
    proto = networks.plain()
    proto.opset_import[0].version = opset
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    assert f"is of opset {opset}; 7 to" in refused(tmp_path / "model.onnx")


def test_weights_that_are_not_numbers():
    proto = networks.plain()
    array = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    array.flat[5] = np.nan
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "conv1.weight"))
    with pytest.raises(BadInput, match=r"weight 'conv1\.weight' holds NaN; repair the model first"):
        from_proto(proto)


def test_a_weight_too_short_for_its_shape():
    proto = networks.plain()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-8]
    with pytest.raises(BadInput, match=r"weight 'conv1\.weight' cannot be read"):
        from_proto(proto)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{ y = Relu (missing) }", "reads 'missing', which nothing before it makes"),
        ("{ y = NoSuchOperator (x) }", "No Op registered for NoSuchOperator"),
        ("{ y = Relu <alpha = 1.0> (x) }", "Unrecognized attribute: alpha"),
        ("{ a = Relu (x) }", "'y'"),
        ("{ y = Add (x, b) b = Sigmoid (y) }", "its nodes read each other in a circle"),
    ],
)
def test_graphs_that_are_not_sound(source, words):
    proto = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {source}""")
    with pytest.raises(BadInput) as found:
        from_proto(proto, "broken")
    assert str(found.value).startswith("broken ")
    assert words in str(found.value)


def test_nodes_out_of_order_are_put_in_order():
    proto = networks.residual()
    expected = run(proto)
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = from_proto(proto)
    assert model.notes == ("nodes were put in the order in which they are computed",)
    assert distance(expected, run(model.proto(), feeds(proto))) == 0


def test_outputs_without_a_shape_get_one():
    proto = networks.plain()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = from_proto(proto)
    assert model.outputs[0].shape == ("N", 5)


def test_weights_listed_as_inputs_are_plain_weights():
    proto = networks.old()
    model = from_proto(proto)
    assert [t.name for t in model.inputs] == ["input"]
    assert model.ir.ir_version >= 4
    (note,) = model.notes
    assert note.startswith("weights listed among the graph inputs are plain weights now")


def test_what_is_not_analysed_is_noted():
    notes = from_proto(networks.control()).notes
    assert any("node_choice: If holds a sub-graph" in note for note in notes)
    assert any("node_swish: local.Swish is a local function" in note for note in notes)


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_weights_are_made_dense(linear):
    net = Net("sparse")
    x = net.input("x", ["N", 4])
    net.output(net.node("MatMul", x, "w"), ["N", 3])
    proto = net.model()
    dense = np.zeros((4, 3), np.float32)
    dense[0, 1], dense[3, 2] = 2, -1
    places = np.array([1, 11]) if linear else np.array([[0, 1], [3, 2]])
    values = helper.make_tensor("w", TensorProto.FLOAT, [2], [2, -1])
    indices = helper.make_tensor("places", TensorProto.INT64, places.shape, places.ravel())
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 3]))
    model = from_proto(proto)
    np.testing.assert_array_equal(model.constant(model.value("w")), dense)
    assert model.notes == ("1 sparse weights were made dense",)


def test_external_data_stay_in_their_file(external):
    model = load(external)
    tensor = model.value("conv2.weight").const_value
    expected = {t.name: numpy_helper.to_array(t) for t in networks.plain().graph.initializer}
    np.testing.assert_array_equal(tensor.numpy(), expected["conv2.weight"])
    assert type(tensor).__name__ == "ExternalTensor"


def test_external_data_missing(external):
    (external.parent / "weights.bin").unlink()
    assert "external data of 'conv1.weight' are missing: 'weights.bin' is not beside the model" in refused(external)


def test_external_data_too_short(external):
    path = external.parent / "weights.bin"
    path.write_bytes(path.read_bytes()[:-100])
    assert "external data 'weights.bin' end at" in refused(external)


def test_external_data_that_are_not_numbers(external):
    path = external.parent / "weights.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert "holds NaN" in refused(external)


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin"])
def test_external_data_outside_the_folder(external, location):
    (external.parent / "weights.bin").rename(external.parent.parent / "weights.bin")
    relocate(external, location)
    assert f"lie at {location!r}, outside the model's folder" in refused(external)


def test_external_data_at_an_absolute_path(external):
    relocate(external, str(external.parent / "weights.bin"))
    assert "outside the model's folder; put them beside the model" in refused(external)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_external_data_behind_a_link_that_leads_out(external, link):
    outside = external.parent.parent / "outside"
    outside.mkdir()
    (external.parent / "weights.bin").rename(outside / "weights.bin")
    if link == "file":
        (external.parent / "weights.bin").symlink_to(outside / "weights.bin")
    else:
        (external.parent / "sub").symlink_to(outside)
        relocate(external, "sub/weights.bin")
    assert "outside the model's folder" in refused(external)


def test_external_data_without_a_folder(external):
    proto = onnx.load(external, load_external_data=False)
    with pytest.raises(BadInput, match=r"is external data .*, and no folder is known to read from"):
        from_proto(proto)


def test_a_link_to_a_whole_folder_is_followed(external):
    link = external.parent.parent / "link"
    link.symlink_to(external.parent)
    assert load(link / "model.onnx").nbytes() > 0


def test_nodes_without_names_get_their_own():
    proto = networks.plain()
    for node in proto.graph.node:
        node.name = "twice" if node.op_type == "Relu" else ""
    names = [n.name for n in from_proto(proto).graph]
    assert len(set(names)) == len(names)
    assert all(names)
