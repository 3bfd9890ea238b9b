"""effc.target: names, flags of processors, and which convolutions have a fast integer kernel."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from effc import target
from effc.errors import BadInput
from effc.target import TARGETS, cpu_flags, find, onnxruntime_cpu

KERNELS = find("onnxruntime-cpu").integer


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_found_by_their_name(name):
    found = find(name)
    assert (found.name, found.runtime, found.device) == (name, "onnxruntime", "cpu")


def test_an_unknown_target_lists_those_there_are():
    with pytest.raises(
        BadInput, match=re.escape("unknown target 'gpu'; there are onnxruntime-cpu, onnxruntime-cpu-vnni")
    ):
        find("gpu")


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni", "amx_int8", "asimddp"])
def test_weights_keep_to_7_bits_where_products_saturate(flag):
    assert not onnxruntime_cpu(frozenset({"avx2", flag})).integer.reduce_range
    plain = onnxruntime_cpu(frozenset({"avx2", "avx512f"}))
    assert plain.integer.reduce_range and plain.name == "onnxruntime-cpu"


def test_no_name_means_this_machine():
    assert find().flags == cpu_flags()


@pytest.fixture
def machine(monkeypatch):
    """Says what /proc/cpuinfo and py-cpuinfo tell; None: they are not there."""

    def tell(listed: str | None, known: list[str] | None) -> None:
        def read(self: Path, *args, **options) -> str:
            if listed is None:
                raise FileNotFoundError
            return listed

        module = None if known is None else SimpleNamespace(get_cpu_info=lambda: {"flags": known})
        monkeypatch.setitem(sys.modules, "cpuinfo", module)
        monkeypatch.setattr(target.Path, "read_text", read)
        cpu_flags.cache_clear()

    yield tell
    monkeypatch.undo()
    cpu_flags.cache_clear()


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
def test_flags_of_a_processor(machine, listed, known, flags):
    machine(listed, known)
    assert cpu_flags() == flags


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
    assert KERNELS.slow_convolution(outputs, inputs, groups, first=first) == reason
