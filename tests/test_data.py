"""Data specs: what is fed, against NumPy, Pillow and hand-made references; selection; refusals with their text."""

import csv
import os
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml
from PIL import Image

from effc.data import Batch, Data, DataSpec, open_data
from effc.errors import BadInput
from effc.model import Model

MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])


def model(*inputs: tuple[str, type, list]) -> Model:
    """A model that passes its inputs through: (name, NumPy type, shape)."""
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(t)), s)
        for n, t, s in inputs
    ]
    outs = [
        onnx.helper.make_tensor_value_info(n + "_out", v.type.tensor_type.elem_type, s)
        for v, (n, _, s) in zip(values, inputs, strict=True)
    ]
    nodes = [onnx.helper.make_node("Identity", [n], [n + "_out"]) for n, _, _ in inputs]
    return Model(ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values, outs))))


def whole(data: Data, size: int = 7) -> dict[str, np.ndarray]:
    batches = list(data.batches(size))
    return {name: np.concatenate([b.feeds[name] for b in batches]) for name in batches[0].feeds}


def labels(*batches: Batch) -> np.ndarray:
    return np.concatenate([np.asarray(b.labels) for b in batches])


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (25, 8, 6, 3), np.uint8), rng.integers(0, 10, 25, np.uint8)
    np.savez_compressed(tmp_path / "some data.npz", x=x, y=y)
    spec = {"source": "some data.npz", "inputs": {"input": "x"}, "labels": "y", "layout": "NHWC", "scale": 255}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(spec | {"mean": MEAN.tolist(), "std": STD.tolist()}))
    return tmp_path / "train.yaml", x, y


# --- what is fed ----------------------------------------------------------------------------------------------------


def test_arrays_are_fed_as_the_spec_says(images):
    path, x, y = images
    data = open_data(path)
    expected = ((x.astype(np.float64) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    batches = list(data.batches(10))
    assert [len(labels(b)) for b in batches] == [10, 10, 5]
    assert np.array_equal(labels(*batches), y)
    found = whole(data)["input"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert data.labelled
    assert len(data) == 25


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NHW"])
def test_layouts_resize_and_crop_agree_with_pillow(tmp_path, layout):
    x = np.random.default_rng(1).integers(0, 256, (3, 20, 30, 1 if layout == "NHW" else 3), np.uint8)
    stored = {"NCHW": x.transpose(0, 3, 1, 2), "NHWC": x, "NHW": x[..., 0]}[layout]
    np.savez(tmp_path / "x.npz", x=stored)
    found = whole(open_data({"source": tmp_path / "x.npz", "layout": layout, "resize": 10, "crop": [8, 10]}))["x"]
    scaled = []
    for sample in x:
        image = Image.fromarray(sample.squeeze()).resize((15, 10), Image.Resampling.BILINEAR)
        scaled.append(np.asarray(image).reshape(10, 15, -1)[1:9, 2:12].transpose(2, 0, 1))
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.stack(scaled))


def test_a_model_of_channels_last_gets_them_last(images):
    path, x, _ = images
    bound = open_data(path).for_model(model(("input", np.float32, ["N", 8, 6, 3])))
    expected = ((x.astype(np.float64) / 255 - MEAN) / STD).astype(np.float32)
    np.testing.assert_allclose(whole(bound)["input"], expected, atol=1e-6)


def test_float_images_are_resized_as_floats(tmp_path):
    x = np.random.default_rng(1).normal(size=(2, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    found = whole(open_data(f"{tmp_path / 'x.npz'}{{resize=[4, 4]}}"))["x"]
    expected = [np.asarray(Image.fromarray(s[0]).resize((4, 4), Image.Resampling.BILINEAR)) for s in x]
    np.testing.assert_array_equal(found[:, 0], expected)


def test_layout_touches_images_alone(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.arange(12.0).reshape(3, 4))
    found = whole(open_data({"source": str(tmp_path / "x.npz"), "layout": "NHWC", "resize": 2, "mean": [0, 1, 2, 3]}))[
        "x"
    ]
    np.testing.assert_array_equal(found, [[0, 0, 0, 0], [4, 4, 4, 4], [8, 8, 8, 8]])


def test_inputs_have_keys_of_their_own(tmp_path):
    ids, image = np.arange(12).reshape(4, 3), np.full((4, 1, 2, 2), 255, np.uint8)
    np.savez(tmp_path / "both.npz", a=ids, x=image, mask=np.ones((4, 3), np.int64))
    spec = {
        "ids": {"array": "a", "dtype": "int64", "scale": None},
        "image": "x",
        "mask": {"dtype": "bool", "scale": None},
    }
    data = open_data({"source": tmp_path / "both.npz", "scale": 255, "inputs": spec})
    found = whole(
        data.for_model(
            model(("ids", np.int64, ["N", 3]), ("image", np.float32, ["N", 1, 2, 2]), ("mask", np.bool_, ["N", 3]))
        )
    )
    assert {k: v.dtype for k, v in found.items()} == {"ids": np.int64, "image": np.float32, "mask": np.bool_}
    assert np.array_equal(found["ids"], ids)
    assert (found["image"] == 1).all()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    for name in ("b.png", "a.png", "c.PNG"):
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8)).save(tmp_path / name, format="png")
    return tmp_path


def pixels(*paths: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p).convert("RGB")).transpose(2, 0, 1) for p in paths])


def test_a_folder_of_images_in_order_of_names(folder):
    data = open_data(folder)
    np.testing.assert_array_equal(whole(data, 2)["image"], pixels(folder / "a.png", folder / "b.png", folder / "c.PNG"))
    assert not data.labelled


def test_labels_csv_lists_the_images(folder):
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), ("b.png", 7), ("a.png", 3)])
    data = open_data(f"{folder}{{labels=labels.csv}}")
    assert len(data) == 2
    (batch,) = data.batches(8)
    assert labels(batch).tolist() == [3, 7]
    np.testing.assert_array_equal(batch.feeds["image"], pixels(folder / "a.png", folder / "b.png"))


def test_class_folders_are_labels(folder):
    for name, label in (("a.png", "cat"), ("b.png", "ant"), ("c.PNG", "cat")):
        (folder / label).mkdir(exist_ok=True)
        (folder / name).rename(folder / label / name)
    (batch,) = open_data(folder).batches(8)
    assert labels(batch).tolist() == [0, 1, 1]
    np.testing.assert_array_equal(batch.feeds["image"][0], pixels(folder / "ant" / "b.png")[0])


def test_a_model_that_sees_grey_gets_grey(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (5, 5), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    found = whole(open_data(tmp_path).for_model(model(("input", np.float32, ["N", 1, 5, 5]))))["input"]
    np.testing.assert_array_equal(found[0, 0], grey)


FUNCTION = """
import numpy as np
calls = 0
def batches():
    global calls
    calls += 1
    for i in range(4):
        yield {"x": np.arange(i * 5, i * 5 + 5, dtype=np.float32)[:, None], "y": np.arange(i * 5, i * 5 + 5)}
def endless():
    i = 0
    while True:
        yield {"x": np.full((3, 1), i, np.float32)}
        i += 1
def broken():
    yield {"x": np.zeros((2, 1)), "y": np.zeros(3)}
def raises():
    yield {"x": np.zeros((2, 1))}
    raise RuntimeError("disk gone")
"""


@pytest.fixture
def function(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTION)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("size", [1, 4, 5, 7, 50])
def test_functions_are_streamed_in_batches_of_any_size(function, size):
    data = open_data(f"{function}:batches{{labels=y, start=3, limit=12}}")
    batches = list(data.batches(size))
    assert [len(labels(b)) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert labels(*batches).tolist() == list(range(3, 15))
    assert np.concatenate([b.feeds["x"][:, 0] for b in batches]).tolist() == list(range(3, 15))
    assert len(data) == 12


def test_sequences_of_another_length_make_a_batch_of_their_own():
    lengths = [3, 3, 3, 5, 5, 2, 3]
    made = [{"x": np.full((1, n), i, np.float32)} for i, n in enumerate(lengths)]
    batches = [b.feeds["x"] for b in open_data({"source": lambda: iter(made)}).batches(2)]
    assert [b.shape for b in batches] == [(2, 3), (1, 3), (2, 5), (1, 2), (1, 3)]
    assert np.concatenate([b[:, 0] for b in batches]).tolist() == list(range(7))


def test_parts_of_a_function(function):
    data = open_data(f"{function}:batches{{labels=y}}")
    even, odd = data.split()
    assert whole(odd)["x"][:, 0].tolist() == list(range(1, 20, 2))
    quarter, rest = even.split(0.25)
    assert (len(quarter), len(rest), quarter.overlap(rest), quarter.overlap(data)) == (2, 8, 0, 2)
    assert sorted([*whole(quarter)["x"][:, 0], *whole(rest)["x"][:, 0]]) == list(range(0, 20, 2))


def test_an_endless_function_with_a_limit_ends(function):
    data = open_data(f"{function}:endless{{limit=8}}")
    assert len(data) == 8
    assert whole(data, 5)["x"][:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_samples_of_a_function_are_mixed_stretch_by_stretch(monkeypatch):
    monkeypatch.setattr("effc.data.MIXED", 10)
    data = open_data({"source": lambda: ({"x": np.arange(i, i + 5)} for i in range(0, 25, 5)), "start": 2})
    found = [list(batch.feeds["x"]) for batch in data.shuffled(1).batches(4)]
    assert [len(batch) for batch in found] == [4, 4, 4, 4, 4, 3]
    first, second, third = found[0] + found[1], found[2] + found[3], found[4] + found[5]
    assert sorted(first) == [*range(2, 10)] and sorted(second) == [*range(10, 18)] and sorted(third) == [*range(18, 25)]
    assert first != sorted(first) and first != [x - 8 for x in second]
    again, other = ([list(b.feeds["x"]) for b in data.shuffled(seed).batches(4)] for seed in (1, 2))
    assert again == found != other
    assert [x for b in data.batches(4) for x in b.feeds["x"]] == [*range(2, 25)]


def test_a_module_function_and_a_python_function(function, monkeypatch):
    monkeypatch.syspath_prepend(str(function.parent))
    assert len(open_data("mine:batches")) == 20
    held = np.ones((3, 2), np.float32)

    def batches():
        yield {"x": held}

    data = open_data(DataSpec(source=batches))
    first = data.digest
    held[0] = 2
    assert open_data({"source": batches}).digest != first  # what a closure holds is part of what it yields


# --- which samples --------------------------------------------------------------------------------------------------


def test_start_limit_and_shuffle(images):
    path, _, y = images
    order = np.random.default_rng(3).permutation(25)
    data = open_data(f"{path}{{shuffle=3, start=5, limit=8}}")
    assert np.array_equal(labels(*data.batches(3)), y[order[5:13]])
    assert data.name == "train{shuffle=3, start=5, limit=8}"


def test_first_split_and_overlap(images):
    data = open_data(images[0])
    even, odd = data.split("parity")
    assert (len(even), len(odd), even.overlap(odd), even.overlap(data)) == (13, 12, 0, 13)
    part, rest = data.split(0.2)
    assert (len(part), len(rest), part.overlap(rest)) == (5, 20, 0)
    assert np.ptp(part.rows) >= 20  # spread over the data, not its first fifth
    assert len(data.first(4)) == 4
    assert len(data.first(99)) == 25
    assert open_data(f"{images[0]}{{limit=10}}").overlap(open_data(f"{images[0]}{{start=6, scale=1}}")) == 4


def test_arrays_of_one_file_do_not_overlap(tmp_path):
    np.savez(tmp_path / "m.npz", x_train=np.zeros((6, 2)), x_test=np.zeros((3, 2)))
    train, test = (
        open_data({"source": tmp_path / "m.npz", "inputs": {"input": name}}) for name in ("x_train", "x_test")
    )
    assert (len(train), len(test), train.overlap(test), train.overlap(train)) == (6, 3, 0, 6)


def test_digest_is_of_the_content_and_of_what_is_fed(images, tmp_path):
    path, x, y = images
    data = open_data(path)
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "some data.npz").write_bytes((path.parent / "some data.npz").read_bytes())
    (again / "b.yaml").write_text(path.read_text())
    assert open_data(again / "b.yaml").digest == data.digest
    assert open_data(f"{path}{{metric=top5}}").digest == data.digest
    parts = [
        data,
        data.first(3),
        *data.split(),
        *(open_data(f"{path}{o}") for o in ("{limit=4}", "{shuffle=1}", "{scale=2}")),
    ]
    assert len({d.digest for d in parts}) == len(parts)
    np.savez_compressed(again / "some data.npz", x=x[::-1], y=y)
    assert open_data(again / "b.yaml").digest != data.digest


def test_paths_may_hold_anything(images, tmp_path, monkeypatch):
    odd = tmp_path / "it's {1} here, or: there"
    odd.mkdir()
    (images[0].parent / "some data.npz").rename(odd / "x.npz")
    assert len(open_data(f"{odd / 'x.npz'}{{inputs={{input=x}}, limit=3}}")) == 3
    monkeypatch.chdir(odd)
    assert len(open_data("x.npz{inputs={input: x}, labels: y}")) == 25


def test_memory_holds_no_float_copy(tmp_path):
    x = np.zeros((2000, 3, 32, 32), np.uint8)  # 6 MB; 25 MB as float32
    np.savez(tmp_path / "x.npz", x=x)
    tracemalloc.start()
    for _ in open_data({"source": tmp_path / "x.npz", "scale": 255, "shuffle": 0}).batches(50):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes + 6e6, peak


# --- binding to a model ---------------------------------------------------------------------------------------------


def test_arrays_in_memory_are_as_those_of_a_file(images):
    path, x, y = images
    how = {"labels": "y", "shuffle": 3}
    there = open_data({"source": path.with_name("some data.npz"), **how})
    here = open_data({"source": {"x": x, "y": y}, **how})
    np.testing.assert_array_equal(whole(here)["x"], whole(there)["x"])
    np.testing.assert_array_equal(labels(*here.batches(7)), labels(*there.batches(7)))
    assert len(here) == len(x) and not here.streamed
    same, other = ({"source": {"x": a, "y": y}, **how} for a in (x.copy(), x + 1))
    assert open_data(same).digest == here.digest != open_data(other).digest
    with pytest.raises(BadInput, match="the arrays differ in samples along their first axis"):
        open_data({"source": {"x": x, "y": y[1:]}})
    with pytest.raises(BadInput, match=r"source: .* is not allowed"):
        open_data({"source": {"x": x.tolist()}})


def test_a_model_with_one_input_needs_no_names(images, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 4), np.float64), y=np.zeros(3))
    data = open_data(f"{tmp_path / 'x.npz'}{{labels=y}}")
    assert list(next(data.batches(2)).feeds) == ["x"]
    bound = data.for_model(model(("in", np.float32, [None, 4])))
    assert whole(bound)["in"].dtype == np.float32
    assert (bound.digest, bound.overlap(data)) == (data.digest, 3)


def test_inputs_are_found_by_name(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros((3, 4), np.float32), b=np.zeros((3, 2), np.int32), other=np.zeros((3, 9)))
    bound = open_data(tmp_path / "x.npz").for_model(model(("b", np.int64, ["N", "T"]), ("a", np.float32, [1, 4])))
    assert {k: v.shape for k, v in whole(bound).items()} == {"a": (3, 4), "b": (3, 2)}


@pytest.mark.parametrize(
    ("arrays", "inputs", "text"),
    [
        ({"x": np.zeros((2, 28, 28))}, [("input", np.float32, ["N", 3, 32, 32])],
         "give samples of shape (28, 28); the model's input 'input' takes (3, 32, 32): check layout, resize, crop"),
        ({"x": np.zeros((2, 5))}, [("input", np.float32, ["N", 4])],
         "of shape (5,); the model's input 'input' takes (4,):"),
        ({"x": np.zeros((2, 5))}, [("a", np.float32, ["N", 5]), ("b", np.float32, ["N", 5])],
         "feed x; the model takes a, b: name the array of each input with inputs: {input: array}"),
        ({"x": np.zeros((2, 5)), "z": np.zeros((2, 5))}, [("a", np.float32, ["N", 5])],
         "feed x, z; the model takes a:"),
        ({"x": np.zeros((2, 5))}, [("a", np.int64, ["N", 5])],
         "the data are float64, the model's input takes int64: cast"),
        ({"x": np.full((2, 5), 2**40)}, [("a", np.int32, ["N", 5])], "1099511627776 do not fit int32"),
        ({"x": np.full((2, 5), 1e6)}, [("a", np.float16, ["N", 5])], "sample 0 holds NaN or infinity"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_the_model(tmp_path, arrays, inputs, text):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(BadInput) as error:
        open_data(tmp_path / "x.npz").for_model(model(*inputs))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("{limit=abc}", "limit: 'abc' is not allowed: the number of samples, an integer > 0"),
        ("{limit=0}", "limit: 0 is not allowed"),
        ("{shuffle=true}", "shuffle: True is not allowed: a seed >= 0"),
        ("{layuot=NHW}", "there is no key 'layuot' (did you mean layout?): allowed are"),
        ("{mean=[0.5, x]}", "mean: [0.5, 'x'] is not allowed: a number, or a list of one per channel"),
        ("{std=[1, 0, 1]}", "std: [1, 0, 1] is not allowed: it divides, so it must not be 0"),
        ("{std=[1, 2]}", "std has 2 numbers, the samples 3 channels: give one or 3"),
        ("{layout=HWC}", "layout: 'HWC' is not allowed: NCHW (default), NHWC or NHW"),
        ("{inputs={input={array=x, dtipe=int8}}}", "there is no key 'inputs.input.dtipe' (did you mean dtype?)"),
        ("{inputs={input={dtype=foo}}}", "inputs.input.dtype: 'foo' is not allowed: allowed are NumPy types"),
        ("{inputs={input=z}}", "have no array 'z' for the input 'input': there are x, y"),
        ("{labels=z}", "have no array 'z' for the labels: there are x, y"),
        ("{start=25}", "have no sample from start=25 on"),
        ("{metric=top7}", "metric 'top7': allowed are top1, top5, agreement, sqnr, cosine, kl, module:function"),
        ("{crop=9}", "crop 9 x 9 of images 8 x 6: resize first"),
        ("{limit=3", "(is a brace left open?)"),
        ("{limit=3" + 300 * "0", "(is a brace left open?)"),
        ("{limit=3, limit=4}", "option 'limit' is given twice"),
        ("{source=nothing.npz}", "there is no data file or folder"),
        ("{source=train.yaml}", "is no data source: allowed are .npz, a folder of images, file.py:function"),
        ("{source='mine.py:f'}", "cannot import 'mine.py' for 'mine.py:f': FileNotFoundError"),
        ("{source='os.path:nix'}", "'os.path' has no function 'nix'"),
    ],
)
def test_refusals(images, overrides, text):
    with pytest.raises(BadInput) as error:
        next(open_data(f"{images[0]}{overrides}").batches(2))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("- 1\n", "holds no map of keys such as source, inputs, labels"),
        ("a: [1\n", "cannot read the data file"),
        ("limit: 3\n", "the key 'source' is missing: it is a .npz file, folder of images"),
        ("source: broken.npz\n", "as .npz:"),
        ("source: pickled.npz\n", "cannot read array 'x' of"),
        ("source: ragged.npz\n", "the arrays differ in samples along their first axis"),
        ("source: nan.npz\n", "sample 3 holds NaN or infinity"),
        ("source: text.npz\n", "the array is of type <U1: allowed are numbers and booleans"),
        ("source: empty\n", "holds no images"),
        ("source: sizes\n", "images differ in size, such as [(4, 4), (5, 4)]: give resize and crop"),
        ("source: torn\n", "cannot read the image"),
        ("source: sizes\nlabels: labels.csv\n", "cannot read the labels"),
        ("source: sizes\nlayout: NCHW\n", "images from files are NHWC, not NCHW: leave layout out"),
        ("source: mine.py:broken\n", "the arrays of a batch differ in samples, {'x': 2, 'y': 3}"),
        ("source: mine.py:raises\n", "raised RuntimeError: disk gone"),
        ("source: mine.py:batches\nshuffle: 1\n", "a function's samples come as they come: leave shuffle out"),
        ("source: mine.py:batches\nstart: 20\n", "have no sample from start=20 on"),
    ],
)
def test_bad_data(function, content, text):
    folder = function.parent
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 no zip")
    np.savez(folder / "pickled.npz", x=np.array([{}, {}], object))
    np.savez(folder / "ragged.npz", x=np.zeros((2, 3)), z=np.zeros((3, 3)))
    np.savez(folder / "nan.npz", x=np.array([[0], [1], [2], [np.nan]]))
    np.savez(folder / "text.npz", x=np.array(["a", "b"]))
    for name in ("empty", "sizes", "torn"):
        (folder / name).mkdir()
    for i, size in enumerate([(4, 4), (4, 5)]):
        Image.new("RGB", size).save(folder / "sizes" / f"{i}.png")
    Image.effect_noise((40, 40), 50).save(folder / "torn" / "a.jpg")
    (folder / "torn" / "a.jpg").write_bytes((folder / "torn" / "a.jpg").read_bytes()[:700])
    (folder / "d.yaml").write_text(content)
    with pytest.raises(BadInput) as error:
        list(open_data(folder / "d.yaml").batches(2))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([("name", "label"), ("a.png", 1)], "has columns ['name', 'label']: it needs file,label"),
        ([("file", "label"), ("a.png", "cat")], "each row needs a file and an integer label"),
        ([("file", "label"), ("zz.png", 1)], "cannot read the image"),
    ],
)
def test_bad_labels(folder, rows, text):
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(BadInput) as error:
        next(open_data({"source": folder, "labels": "labels.csv"}).batches(1))
    assert text in str(error.value)


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.2])
def test_a_share_is_between_0_and_1(images, share):
    with pytest.raises(BadInput, match="allowed is 0 < share < 1"):
        open_data(images[0]).split(share)


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [("cifar10-test", 5000, (3, 32, 32)), ("mnist-test", 5000, (1, 28, 28)), ("imagenet-500", 500, (3, 224, 224))],
)
def test_real_specs(name, count, shape):
    data = open_data(Path(os.environ["EFFC_DATA"]) / "data" / f"{name}.yaml")
    batch = next(data.batches(5))
    (feed,) = batch.feeds.values()
    assert len(data) == count
    assert feed.shape == (5, *shape)
    assert feed.dtype == np.float32
    assert np.abs(feed).max() < 3
    assert data.labelled
