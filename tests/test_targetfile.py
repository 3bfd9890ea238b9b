"""effc.targetfile: a target survives its file, and a file that is not one is refused in one clear line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effc.errors import BadInput
from effc.predict import estimate
from effc.regression import Hyper
from effc.target import MEASURED, SHIPPED, Samples, Target, names, onnxruntime_kernels, read, tensorrt_kernels
from effc.targetfile import from_json, to_json
from tests.fake_kernels import drawn, measured

KINDS = ("conv", "nbits", "Relu:int8")


@pytest.fixture(scope="module")
def target() -> Target:
    texts = {"origin": MEASURED, "source": 'by "hand", in 3 µs', "processor": "Fast 9", "runtime_version": "1.2.3"}
    return measured(KINDS, 12, together=2, **texts)


@pytest.fixture(scope="module")
def text(target) -> str:
    return to_json(target)


def test_a_file_read_and_written_again_is_the_same_byte_for_byte(text, tmp_path):
    assert to_json(from_json(text, "here")) == text
    assert to_json(from_json(text.encode(), "here")) == text
    assert to_json(from_json(json.dumps(json.loads(text)), "here")) == text  # however it was laid out
    file = tmp_path / "target.json"
    file.write_text(text)
    assert to_json(read(file)) == text


@pytest.mark.parametrize("name", names())
def test_shipped_files_load_and_survive(name):
    found = read(SHIPPED / f"{name}.json")
    assert from_json(to_json(found), "here") == found and found.name == name
    assert to_json(from_json(to_json(found), "here")) == to_json(found)


def test_all_of_a_target_comes_back(target, text):
    """Rows to 6 digits, fits to 5; the rest as it was."""
    found = from_json(text, "here")
    assert replace(found, kernels={}) == replace(target, kernels={})
    assert found.integer == onnxruntime_kernels(target.flags) and not found.local and found.remark == ""
    assert {n: list(kinds) for n, kinds in found.kernels.items()} == {1: list(KINDS), 2: list(KINDS)}
    for threads, kinds in found.kernels.items():
        for kind, samples in kinds.items():
            before = target.kernels[threads][kind]
            assert samples.columns == before.columns and isinstance(samples.fit, Hyper)
            np.testing.assert_allclose(samples.rows, before.rows, rtol=5e-6)
            np.testing.assert_allclose(samples.fit.terms, before.fit.terms, rtol=5e-5)
            np.testing.assert_allclose(samples.fit.lengths, before.fit.lengths, rtol=5e-5)
            np.testing.assert_allclose(samples.fit.noise, before.fit.noise, rtol=5e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_predictions_are_those_of_the_target_that_was_written(target, text, threads):
    """Within 0.2 %, what the digits left out are worth."""
    found, rng = from_json(text, "here"), np.random.default_rng(5)
    kernels = [drawn(kind, rng) for kind in KINDS for _ in range(20)]
    before, after = ([e.seconds for e in estimate(kernels, t, threads)] for t in (target, found))
    np.testing.assert_allclose(after, before, rtol=2e-3)


def test_numbers_of_any_size_survive(target):
    rng = np.random.default_rng(3)
    samples = target.kernels[1]["Relu:int8"]
    rows = tuple(tuple(np.exp(rng.uniform(-20, 40, len(samples.columns))).tolist()) for _ in range(200))
    some = replace(target, kernels={1: {"Relu:int8": replace(samples, rows=rows)}})
    text = to_json(some)
    assert to_json(from_json(text, "here")) == text
    np.testing.assert_allclose(from_json(text, "here").kernels[1]["Relu:int8"].rows, rows, rtol=5e-6)


def test_a_person_can_read_it(text):
    """A line for each measured kernel, whole numbers as such, names of numbers above them."""
    lines = text.splitlines()
    assert lines[1:3] == [' "effc_target": 1,', ' "name": "made up",']
    assert sum(line.startswith("     [") for line in lines) == 12 * 2 * len(KINDS)
    columns = next(line for line in lines if '"columns"' in line)
    assert columns.strip().startswith('"columns": ["n", "c", "m", "g", "h", "w", "kh", "kw", "s", "d", "act", "sum"')
    assert columns.endswith('"moved", "around", "since", "near", "far", "made_near", "made_far", "us"],')
    assert next(line for line in lines if line.startswith("     [")).startswith("     [1, ")
    assert text.endswith("}\n") and max(map(len, lines)) < 600


def test_the_runtime_says_what_integer_kernels_want(text):
    for runtime in ("tensorrt", "tensorrt-fp16"):
        assert edited(text, runtime=runtime).integer == tensorrt_kernels()
    assert edited(text, flags=["avx2"]).integer.reduce_range
    assert not edited(text, flags=["avx2", "avx512_vnni"]).integer.reduce_range
    bare = json.loads(text)
    for key in ("kernels", "processor", "runtime_version"):
        del bare[key]
    assert from_json(json.dumps(bare), "here").kernels == {}


def test_a_gpu_of_any_speed_has_no_roofs(text):
    found = edited(text, device="gpu", roofs={}, kernels={}, runtime="tensorrt")
    assert not found.roofs and from_json(to_json(found), "here") == found
    with pytest.raises(BadInput, match=r"has no figures of a device .* such as tensorrt-a100"):
        found.roof()


def edited(text: str, **changes: object) -> Target:
    return from_json(json.dumps(json.loads(text) | changes), "my.json")


def told(text: str, **changes: object) -> str:
    with pytest.raises(BadInput) as caught:
        edited(text, **changes)
    return one_line(caught.value)


def one_line(error: BadInput) -> str:
    message = str(error)
    assert message.startswith("my.json") and "\n" not in message
    assert message.endswith("with effc calibrate-target")  # what to do
    return message


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"effc_target": 2}, "my.json is no target file of this version of effc: effc_target: Input should be 1"),
        ({"runtime": "tvm"}, "runtime: Input should be 'onnxruntime', 'tensorrt' or 'tensorrt-fp16'"),
        ({"device": "tpu"}, "device: Input should be 'cpu' or 'gpu'"),
        ({"origin": "heard"}, "origin: Input should be 'published' or 'measured'"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"cache": "large"}, "cache: Input should be a valid integer"),
        ({"roofs": {}}, "my.json has no roofs"),
        ({"roofs": {"one": {"macs": {"float32": 1}, "bandwidth": 1}}}, "roofs.one"),
        ({"roofs": {"0": {"macs": {"float32": 1}, "bandwidth": 1}}}, "roofs.0"),
        ({"roofs": {"1": {"macs": {"float32": 1}}}}, "roofs.1.bandwidth: "),
        ({"roofs": {"1": {"macs": {"int8": 1}, "bandwidth": 1}}}, "without rates above 0 for float32"),
        ({"roofs": {"1": {"macs": {"float32": 1}, "bandwidth": 0}}}, "without rates above 0 for float32"),
    ],
)
def test_what_is_no_target_is_refused(text, changes, what):
    assert what in told(text, **changes)


@pytest.mark.parametrize("content", [b"", b"model", b"\xff\xfe\x00", b"[1]", b"{}", b'{"effc_target": 1'])
def test_what_is_no_json_is_refused(content):
    with pytest.raises(BadInput) as caught:
        from_json(content, "my.json")
    assert one_line(caught.value).startswith("my.json is no target file of this version of effc: ")


def test_a_file_is_named_as_it_was_given(tmp_path):
    file = Path(tmp_path) / "broken.json"
    file.write_text("{}")
    with pytest.raises(BadInput, match=r"broken\.json is no target file of this version of effc: effc_target: Field"):
        read(file)


class TestTables:
    @pytest.fixture
    def refused(self, target):
        """What is said of a table, with one thread or with two, that was changed after it was measured."""

        def ask(threads: int = 1, kind: str = "conv", **changes: object) -> str:
            samples = replace(target.kernels[threads][kind], **changes)
            written = to_json(replace(target, kernels={threads: {kind: samples}}))
            return told(written)

        return ask

    def test_other_columns(self, refused, target):
        samples: Samples = target.kernels[1]["conv"]
        said = refused(columns=(*samples.columns[1:], "n"))
        assert said.startswith("my.json: conv has the columns c, m, g,")
        names = "n, c, m, g, h, w, kh, kw, s, d, act, sum, moved, around, since, near, far, made_near, made_far, us"
        assert f"this version of effc takes {names}" in said

    def test_columns_of_another_number_of_threads(self, refused, target):
        two = target.kernels[2]["conv"]
        assert "made_far, us with 1 thread:" in refused(columns=two.columns, rows=two.rows, fit=two.fit)
        one = target.kernels[1]["conv"]
        assert "made_far, us_alone, us with 2 threads:" in refused(2, columns=one.columns, rows=one.rows, fit=one.fit)

    def test_a_row_of_another_length(self, refused, target):
        rows = target.kernels[1]["conv"].rows
        for some in ((*rows[:3], rows[3][:-1]), (*rows[:3], (*rows[3], 1.0)), ()):
            assert "conv has a row of another length than its 20 columns, or none at all" in refused(rows=some)

    @pytest.mark.parametrize(("place", "number", "what"), [(0, 0, "n is 0"), (3, -1, "g is -1"), (-1, 0, "us is 0")])
    def test_a_row_that_is_no_kernel(self, refused, target, place, number, what):
        rows = [list(row) for row in target.kernels[1]["conv"].rows]
        rows[7][place] = number
        assert f"my.json: conv has a kernel whose {what}:" in refused(rows=tuple(map(tuple, rows)))

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_fit_of_another_length(self, refused, target, threads):
        fit = target.kernels[threads]["conv"].fit
        told = "conv was fitted by another version of effc"
        assert told in refused(threads, fit=replace(fit, terms=fit.terms[1:]))
        assert told in refused(threads, fit=replace(fit, lengths=(1.0,)))

    def test_a_fit_without_a_process_is_one(self, target):
        samples = target.kernels[1]["conv"]
        some = replace(target, kernels={1: {"conv": replace(samples, fit=replace(samples.fit, lengths=()))}})
        assert from_json(to_json(some), "here").kernels[1]["conv"].fit.lengths == ()
