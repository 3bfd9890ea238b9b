"""Target: a runtime and a device, what these are known to like, and how fast they are.

A target is a JSON file, readable and versioned: shipped beside this module (`targets/`), or measured on a machine by
`effc calibrate-target`. Published figures and measured ones are told apart by `origin`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from pathlib import Path

import platformdirs

from effc.errors import BadInput
from effc.regression import Hyper

SHIPPED = Path(__file__).with_name("targets")
PUBLISHED, MEASURED = "published", "measured"
# Instruction sets that decide which of onnxruntime's kernels run.
KERNEL_FLAGS = frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
EXACT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


@dataclass(frozen=True)
class IntegerKernels:
    """How a runtime wants quantised graphs.

    Attributes:
        signed: activations are int8 with zero point 0; else uint8 with a zero point.
        output_pairs: a fused kernel needs Q/DQ on its output as well.
        reduce_range: weights must keep to 7 bits, for 16-bit partial sums saturate.
        weighted: operators with weights that have an integer kernel.
        transparent: operators that run on codes as they are, with the scale of their input.
        computing: other operators with an integer kernel of their own.
        inputs_in: multiple of input channels that fast convolutions take.
        any_convolution: no convolution's integer kernel is slower than float for its shape.
        narrowest: layers with fewer inputs or outputs than this stay in float.
        dynamic: products of matrices can be quantised as they run, without calibration.
        float_bias: biases stay floats; else they are 32-bit integers.
        residual_pairs: a convolution takes in the Add behind it when the other operand, and that one alone, is coded.
        blocks: how many weights may share a scale where codes come in blocks; the first is what is taken unasked.
    """

    signed: bool
    output_pairs: bool
    reduce_range: bool
    weighted: frozenset[str]
    transparent: frozenset[str]
    computing: frozenset[str]
    inputs_in: int = 4
    any_convolution: bool = False
    narrowest: int = 1
    dynamic: bool = True
    float_bias: bool = False
    residual_pairs: bool = False
    blocks: tuple[int, ...] = (32, 16, 64, 128, 256)

    def slow_convolution(self, outputs: int, inputs: int, groups: int, *, first: bool) -> str | None:
        """Why a convolution's integer kernel is slower than float, or None.

        The runtime has one fast kernel, for dense layers with inputs in fours and at least 16 outputs in fours, and
        for depthwise ones with channels in sixteens; anything else falls back. An image of three channels is padded
        to four.

        Args:
            outputs, inputs: output channels, and input channels of one group.
            first: no other layer stands before it.
        """
        if self.any_convolution:
            return None
        if groups == 1:
            if outputs < 16 or outputs % 4:
                return f"the integer kernel for {outputs} outputs is slow (at least 16, a multiple of 4, is fast)"
            if inputs % self.inputs_in and not first:
                return f"the integer kernel for {inputs} inputs is slow (a multiple of 4 is fast)"
            return None
        if inputs == 1 and outputs == groups:
            if outputs % 16:
                return f"the integer kernel for {outputs} depthwise channels is slow (a multiple of 16 is fast)"
            return None
        return f"there is no fast integer kernel for {groups} groups of {inputs} inputs"


@dataclass(frozen=True)
class Roof:
    """The best that a number of threads can reach (Williams, Waterman, Patterson: Roofline, CACM 2009).

    Attributes:
        macs: type of the operands -> multiply-accumulates a second ("float32", "int8", "float16", ...).
        bandwidth: main memory, bytes a second.
        overhead: seconds that any node costs beside its work.
        run_overhead: seconds that any inference costs beside its nodes.
        watch: seconds that the network of `effc.quiet` took at best, when the rest was measured; 0: not measured.
    """

    macs: Mapping[str, float]
    bandwidth: float
    overhead: float = 0.0
    run_overhead: float = 0.0
    watch: float = 0.0

    def seconds(self, macs: int, bytes_moved: int, dtype: str = "float32") -> float:
        """max(work / peak, traffic / bandwidth) + overhead. A type without a peak of its own runs at float32's."""
        peak = self.macs.get(dtype, self.macs["float32"])
        return max(macs / peak, bytes_moved / self.bandwidth) + self.overhead


@dataclass(frozen=True)
class Samples:
    """Measured kernels of one kind, and what was fitted to them.

    Attributes:
        columns: names of a row's numbers: the kernel's dimensions, then `us`, microseconds; with more than one thread
            `us_alone` before it, what one thread took.
        rows: one measured kernel each.
        fit: parameters of the model that `effc.predict` makes of them.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    fit: Hyper


@dataclass(frozen=True)
class Target:
    """What a model is optimised for.

    Attributes:
        name: for the user.
        runtime: name of the backend that emits and runs.
        device: "cpu" or "gpu".
        integer: what it wants of quantised graphs.
        roofs: number of threads -> the best that these reach; none where the target stands for devices of many speeds.
        cache: bytes of the last cache before main memory.
        flags: instruction sets that matter to kernels, as the operating system names them.
        origin: "published" figures, or "measured" ones.
        source: where the figures come from, one sentence.
        processor, runtime_version: what was measured, and with what.
        kernels: number of threads -> kind of kernel -> what was measured.
        remark: what the user should know about the choice of this target.
        local: this machine is such a device, so that what is measured here is true of it.
    """

    name: str
    runtime: str
    device: str
    integer: IntegerKernels
    roofs: Mapping[int, Roof]
    cache: int
    flags: frozenset[str] = field(default=frozenset())
    origin: str = PUBLISHED
    source: str = ""
    processor: str = ""
    runtime_version: str = ""
    kernels: Mapping[int, Mapping[str, Samples]] = field(default_factory=dict)
    remark: str = ""
    local: bool = False

    def roof(self, threads: int = 1) -> Roof:
        """The roof of so many threads, or of the next smaller number that is known. Raises BadInput: there is none."""
        if not self.roofs:
            raise BadInput(
                f"target {self.name!r} has no figures of a device to predict latency with:"
                f" name one that has, such as {self.runtime.partition('-')[0]}-a100, or a file with its roofs"
            )
        known = [n for n in self.roofs if n <= threads]
        return self.roofs[max(known) if known else min(self.roofs)]


def onnxruntime_kernels(flags: Iterable[str]) -> IntegerKernels:
    """onnxruntime's CPU provider. Without VNNI or AMX, u8 x s8 products saturate 16-bit sums (its own guide)."""
    return IntegerKernels(
        signed=False,
        output_pairs=True,
        reduce_range=not EXACT_PRODUCTS & set(flags),
        weighted=frozenset({"Conv", "Gemm", "MatMul"}),
        transparent=frozenset(
            {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Resize"}
        ),
        computing=frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}),
    )


def tensorrt_kernels() -> IntegerKernels:
    """TensorRT's explicit quantisation: int8 with zero point 0, no Q on outputs (NVIDIA's developer guide).

    It moves Q and DQ over operators that only move values by itself, so that none has to run on codes in the file.
    """
    return IntegerKernels(
        signed=True,
        output_pairs=False,
        reduce_range=False,
        weighted=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"}),
        transparent=frozenset(),
        computing=frozenset({"AveragePool", "GlobalAveragePool"}),
        inputs_in=1,
        any_convolution=True,
        narrowest=16,
        dynamic=False,
        float_bias=True,
        residual_pairs=True,
        blocks=(64, 128),
    )


def names() -> list[str]:
    """Names of the shipped targets."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def find(name: str | None = None, *, foreign: bool = False, version: str = "") -> Target:
    """A target.

    Args:
        name: of a shipped one, or a file's path. None: the file calibrated on this machine, else the shipped one that
            matches this processor's instruction sets.
        foreign: accept a file that was measured on another machine.
        version: of the runtime here; "" asks the installed one.

    Raises:
        BadInput: there is no such target, or it was measured on another processor or runtime version.
    """
    if name is None:
        return _of_this_machine(version)
    if name in names():
        shipped = _shipped(name)
        here = shipped.device == "cpu" and KERNEL_FLAGS & cpu_flags() == KERNEL_FLAGS & shipped.flags
        return replace(shipped, local=here)
    path = Path(name)
    if not path.is_file():
        raise BadInput(f"unknown target {name!r}; there are {', '.join(names())}, or a file of effc calibrate-target")
    found = read(path)
    if not foreign and (why := stranger(found, version)):
        raise BadInput(f"{path} {why}: run effc calibrate-target here, or accept it with --foreign-target")
    return replace(found, local=found.origin == MEASURED and not stranger(found, version))


def read(path: Path) -> Target:
    """A target file, whoever measured it. Raises BadInput."""
    from effc.targetfile import from_json

    try:
        return from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def stranger(target: Target, version: str = "") -> str:
    """Why measured figures are not of this machine, or ""."""
    if target.origin != MEASURED:
        return ""
    here, version = processor(), version or _runtime_version(target.runtime)
    if target.processor != here:
        return f"was measured on {target.processor!r}, and this is {here!r}"
    if target.runtime_version != version:
        return f"was measured with {target.runtime} {target.runtime_version}, and this is {version}"
    return ""


def calibrated_file() -> Path:
    """Where `effc calibrate-target` keeps this machine's target."""
    return Path(platformdirs.user_cache_dir("effc", appauthor=False)) / "target-onnxruntime.json"


def _of_this_machine(version: str) -> Target:
    remark = ""
    if calibrated_file().is_file():
        try:
            found = read(calibrated_file())
            why = stranger(found, version)
        except BadInput as error:
            found, why = None, str(error).removeprefix(str(calibrated_file())).lstrip(": ")
        if found is not None and not why:
            return replace(found, local=True)
        remark = f"the calibrated target {calibrated_file()} {why}: it was left out; run effc calibrate-target again. "
    flags = cpu_flags()
    fitting = [t for t in map(_shipped, names()) if t.device == "cpu" and t.flags <= flags]
    best = max(fitting, key=lambda t: len(t.flags), default=None)
    if best is None:
        remark += "no shipped target is of this processor's kind: AVX2's figures stand in; run effc calibrate-target"
        best = replace(_shipped("onnxruntime-avx2"), flags=flags, integer=onnxruntime_kernels(flags))
    return replace(best, remark=remark.strip(), local=True)


@cache
def _shipped(name: str) -> Target:
    return read(SHIPPED / f"{name}.json")


def _runtime_version(runtime: str) -> str:
    try:
        return metadata.version(runtime)
    except metadata.PackageNotFoundError:
        return "not installed"


@cache
def processor() -> str:
    """This machine's processor: vendor's name, family and model, number of cores that this process may use."""
    lines = _cpuinfo()
    name = lines.get("model name") or platform.processor() or platform.machine()
    kind = " ".join(f"{key} {lines[key]}" for key in ("cpu family", "model", "stepping") if key in lines)
    return f"{name}, {kind}, {cores()} cores" if kind else f"{name}, {cores()} cores"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of this machine's processor, from the kernel; where that has no such list, from py-cpuinfo."""
    lines = _cpuinfo()
    if flags := lines.get("flags") or lines.get("features"):
        return frozenset(flags.split())
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return frozenset()
    return frozenset(get_cpu_info().get("flags", ()))


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    return {k.strip().lower(): v.strip() for line in text.splitlines() for k, _, v in [line.partition(":")]}
