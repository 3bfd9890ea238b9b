"""effc.target: which target stands for this machine, files of others, roofs, and what integer kernels want."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from effc import target
from effc.errors import BadInput
from effc.target import (
    KERNEL_FLAGS,
    MEASURED,
    PUBLISHED,
    Roof,
    Target,
    calibrated_file,
    cores,
    cpu_flags,
    find,
    names,
    onnxruntime_kernels,
    processor,
    read,
    stranger,
    tensorrt_kernels,
)
from effc.targetfile import to_json

AVX2, VNNI, A100 = "onnxruntime-avx2", "onnxruntime-avx512-vnni", "tensorrt-a100"
GPUS = "tensorrt", A100, "tensorrt-fp16"
VERSION = "1.2.3"  # of the runtime that a file was measured with


@pytest.fixture
def machine(monkeypatch):
    """Says what /proc/cpuinfo and py-cpuinfo tell; None: they are not there."""
    asked = (target._cpuinfo, cpu_flags, processor)
    real = Path.read_text

    def tell(listed: str | None, known: list[str] | None = None) -> None:
        def read_text(self: Path, *args, **options) -> str:
            if str(self) != "/proc/cpuinfo":
                return real(self, *args, **options)
            if listed is None:
                raise FileNotFoundError
            return listed

        module = None if known is None else SimpleNamespace(get_cpu_info=lambda: {"flags": known})
        monkeypatch.setitem(sys.modules, "cpuinfo", module)
        monkeypatch.setattr(Path, "read_text", read_text)
        for function in asked:
            function.cache_clear()

    yield tell
    monkeypatch.undo()
    for function in asked:
        function.cache_clear()


@pytest.fixture
def calibrated():
    """Keeps a target as this machine's own."""
    file = calibrated_file()

    def keep(text: str | Target) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if isinstance(text, str) else to_json(text))
        return file

    yield keep
    file.unlink(missing_ok=True)


def measured(**changes) -> Target:
    """As if measured here, with onnxruntime VERSION."""
    found = {"name": "mine", "origin": MEASURED, "processor": processor(), "runtime_version": VERSION} | changes
    return replace(read(target.SHIPPED / f"{AVX2}.json"), **found)


def test_shipped_targets_are_found_by_their_name():
    assert names() == [AVX2, VNNI, *GPUS]
    for name in names():
        found = find(name)
        assert found.name == name and found.source and found.remark == ""
        assert name.startswith(found.runtime) and found.device == ("gpu" if name in GPUS else "cpu")
        assert found.cache >= 1 << 20 and (1 in found.roofs or name in ("tensorrt", "tensorrt-fp16"))
        for roof in found.roofs.values():
            assert min(*roof.macs.values(), roof.bandwidth, roof.overhead, roof.run_overhead) > 0
        assert found.origin in (PUBLISHED, MEASURED) and not (found.origin == PUBLISHED and found.kernels)


def test_the_a100_has_nvidia_s_published_figures():
    """Datasheet of the 40 GB card, dense; half as many multiply-accumulates as operations."""
    found = find(A100)
    assert (found.origin, found.local, found.flags) == (PUBLISHED, False, frozenset())
    tera = {"float32": 156, "float16": 312, "bfloat16": 312, "int8": 624, "int4": 1248}
    assert found.roof().macs == pytest.approx({key: 1e12 * value / 2 for key, value in tera.items()}, rel=1e-12)
    assert found.roof().bandwidth == 1555e9 and found.cache == 40 << 20
    assert found.integer == tensorrt_kernels()
    assert found.integer.signed and not found.integer.output_pairs and not found.integer.reduce_range


def test_an_unknown_target_lists_those_there_are():
    told = "unknown target 'gpu'; there are onnxruntime-avx2, onnxruntime-avx512-vnni, tensorrt, tensorrt-a100,"
    told += " tensorrt-fp16, or a file"
    with pytest.raises(BadInput, match=re.escape(told)):
        find("gpu")
    with pytest.raises(BadInput, match="unknown target"):
        find(str(target.SHIPPED))  # a folder


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8", "asimddp"])
def test_weights_keep_to_7_bits_where_products_saturate(flag):
    assert not onnxruntime_kernels(["avx2", flag]).reduce_range
    plain = onnxruntime_kernels(["avx2", "avx512f"])
    assert plain.reduce_range and not plain.signed and plain.output_pairs
    assert find(AVX2).integer.reduce_range and not find(VNNI).integer.reduce_range


class TestThisMachine:
    def test_without_a_calibrated_target_its_flags_pick_a_shipped_one(self, machine):
        """All of a target's flags have to be there; of two that fit, the one with more of them."""
        for flags, name in (
            ("fpu avx2 fma", AVX2),
            ("avx2 fma avx512f", AVX2),
            ("avx2 fma avx512f avx512_vnni", VNNI),
            ("avx2 fma avx512f avx512_vnni amx_int8", VNNI),
        ):
            machine(f"flags : {flags}\n")
            found = find()
            assert (found.name, found.local, found.remark) == (name, True, "")

    def test_a_processor_of_another_kind_is_told_that_figures_stand_in(self, machine):
        machine("Features : fp asimd asimddp\n")
        found = find()
        assert (found.name, found.local) == (AVX2, True)
        assert found.remark == (
            "no shipped target is of this processor's kind: AVX2's figures stand in; run effc calibrate-target"
        )
        assert found.flags == {"fp", "asimd", "asimddp"} and not found.integer.reduce_range

    def test_a_shipped_target_is_local_where_the_flags_are_the_same(self, machine):
        machine("flags : fpu avx2 fma\n")
        assert find(AVX2).local and not find(VNNI).local and not find(A100).local
        machine(f"flags : {' '.join(find(VNNI).flags)} sse\n")
        assert find(VNNI).local and not find(AVX2).local

    def test_its_calibrated_file_comes_first(self, calibrated):
        calibrated(measured())
        found = find(version=VERSION)
        assert (found.name, found.origin, found.local, found.remark) == ("mine", MEASURED, True, "")
        assert not find(A100).local and find(AVX2).name == AVX2  # by name all the same

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"processor": "another"}, "was measured on 'another', and this is "),
            ({"runtime_version": "1.0"}, "was measured with onnxruntime 1.0, and this is 1.2.3"),
        ],
    )
    def test_a_stale_calibrated_file_is_left_out_with_a_remark(self, calibrated, changes, why):
        file = calibrated(measured(**changes))
        found = find(version=VERSION)
        assert found.name in names() and found.local
        assert found.remark.startswith(f"the calibrated target {file} {why}")
        assert ": it was left out; run effc calibrate-target again." in found.remark
        assert found.remark == found.remark.strip()

    def test_a_calibrated_file_of_another_version_of_effc_is_left_out_with_a_remark(self, calibrated):
        file = calibrated('{"effc_target": 0}')
        found = find()
        assert found.name in names() and "\n" not in found.remark
        told = f"the calibrated target {file} is no target file of this version of effc: effc_target: Input should be 1"
        assert found.remark.startswith(told) and found.remark.count(str(file)) == 1

    def test_the_user_s_own_cache_is_out_of_reach_of_tests(self):
        assert calibrated_file().is_relative_to(os.environ["XDG_CACHE_HOME"])
        code = "from effc.target import calibrated_file; print(calibrated_file())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(calibrated_file())


class TestFiles:
    def test_one_measured_here_is_taken_and_local(self, tmp_path):
        file = tmp_path / "mine.json"
        file.write_text(to_json(measured()))
        found = find(str(file), version=VERSION)
        assert found == replace(measured(), local=True)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"processor": "another, 2 cores"}, "was measured on 'another, 2 cores', and this is "),
            ({"runtime_version": "1.0"}, "was measured with onnxruntime 1.0, and this is 1.2.3"),
        ],
    )
    def test_one_measured_elsewhere_has_to_be_accepted(self, tmp_path, changes, why):
        file = tmp_path / "far.json"
        file.write_text(to_json(measured(**changes)))
        with pytest.raises(BadInput) as caught:
            find(str(file), version=VERSION)
        assert str(caught.value).startswith(f"{file} {why}") and "\n" not in str(caught.value)
        assert str(caught.value).endswith(": run effc calibrate-target here, or accept it with --foreign-target")
        found = find(str(file), foreign=True, version=VERSION)
        assert not found.local and found == replace(measured(), **changes)

    def test_the_installed_runtime_is_asked_where_no_version_is_stated(self, tmp_path):
        import onnxruntime

        assert stranger(measured(runtime_version=onnxruntime.__version__)) == ""
        assert "and this is not installed" in stranger(measured(runtime="tensorrt", runtime_version="10"))

    def test_published_figures_are_nobody_s(self, tmp_path):
        file = tmp_path / "published.json"
        file.write_text(to_json(replace(measured(), origin=PUBLISHED, processor="another")))
        assert not find(str(file)).local

    def test_one_that_cannot_be_read(self, tmp_path):
        with pytest.raises(BadInput, match=r"gone\.json cannot be read: No such file"):
            read(tmp_path / "gone.json")


class TestProcessor:
    @pytest.mark.parametrize(
        ("listed", "known", "flags"),
        [
            ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\nbugs\t: none\n", None, {"fpu", "avx2", "avx512_vnni"}),
            ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", None, {"fp", "asimd", "asimddp"}),
            (None, ["avx2", "avx_vnni"], {"avx2", "avx_vnni"}),
            ("processor : 0\n", ["avx2"], {"avx2"}),
            (None, None, set()),
        ],
    )
    def test_flags(self, machine, listed, known, flags):
        machine(listed, known)
        assert cpu_flags() == flags

    def test_its_name_tells_processors_apart(self, machine):
        machine("model name : Fast 9\ncpu family : 6\nmodel : 85\nstepping : 7\nflags : avx2\n")
        assert processor() == f"Fast 9, cpu family 6 model 85 stepping 7, {cores()} cores"
        machine(None)
        assert processor().endswith(f", {cores()} cores") and "model" not in processor()

    def test_kernels_depend_on_flags_that_onnxruntime_looks_at(self):
        assert {"avx2", "avx512f", "avx512_vnni"} <= KERNEL_FLAGS
        assert cores() >= 1


ROOF = Roof({"float32": 1e9, "int8": 4e9}, bandwidth=1e8, overhead=1e-6, run_overhead=5e-6)


@pytest.mark.parametrize(
    ("macs", "moved", "dtype", "seconds"),
    [
        (2_000_000, 100_000, "float32", 2e-3),  # work decides: 2e6 / 1e9 against 1e5 / 1e8
        (2_000_000, 300_000, "float32", 3e-3),  # traffic decides
        (2_000_000, 10_000, "int8", 0.5e-3),
        (2_000_000, 10_000, "float16", 2e-3),  # without a peak of its own
        (0, 0, "float32", 0),
    ],
)
def test_the_roofline_by_hand(macs, moved, dtype, seconds):
    assert ROOF.seconds(macs, moved, dtype) == pytest.approx(seconds + 1e-6, rel=1e-12)


def test_threads_have_the_roof_of_the_next_smaller_number_that_is_known():
    roofs = {n: replace(ROOF, bandwidth=1e8 * n) for n in (2, 4)}
    some = replace(measured(), roofs=roofs)
    assert [some.roof(n).bandwidth / 1e8 for n in (1, 2, 3, 4, 64)] == [2, 2, 2, 4, 4]


@pytest.mark.parametrize(
    ("outputs", "inputs", "groups", "first", "reason"),
    [
        (16, 4, 1, False, None),
        (20, 64, 1, False, None),
        (16, 3, 1, True, None),
        (16, 3, 1, False, "the integer kernel for 3 inputs is slow (a multiple of 4 is fast)"),
        (12, 16, 1, True, "the integer kernel for 12 outputs is slow (at least 16, a multiple of 4, is fast)"),
        (18, 16, 1, False, "the integer kernel for 18 outputs is slow (at least 16, a multiple of 4, is fast)"),
        (32, 1, 32, False, None),
        (24, 1, 24, False, "the integer kernel for 24 depthwise channels is slow (a multiple of 16 is fast)"),
        (32, 1, 16, False, "there is no fast integer kernel for 16 groups of 1 inputs"),
        (32, 8, 4, True, "there is no fast integer kernel for 4 groups of 8 inputs"),
    ],
)
def test_slow_convolutions(outputs, inputs, groups, first, reason):
    assert find(AVX2).integer.slow_convolution(outputs, inputs, groups, first=first) == reason
