"""Target: a runtime and a device, and what these are known to like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from effc.errors import BadInput


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
    """

    signed: bool
    output_pairs: bool
    reduce_range: bool
    weighted: frozenset[str]
    transparent: frozenset[str]
    computing: frozenset[str]
    inputs_in: int = 4

    def slow_convolution(self, outputs: int, inputs: int, groups: int, *, first: bool) -> str | None:
        """Why a convolution's integer kernel is slower than float, or None.

        The runtime has one fast kernel, for dense layers with inputs in fours and at least 16 outputs in fours, and
        for depthwise ones with channels in sixteens; anything else falls back. An image of three channels is padded
        to four.

        Args:
            outputs, inputs: output channels, and input channels of one group.
            first: no other layer stands before it.
        """
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
class Target:
    """What a model is optimised for.

    Attributes:
        name: for the user.
        runtime: name of the backend that emits and runs.
        device: "cpu" so far.
        flags: instruction sets that matter to kernels, as the operating system names them.
        integer: what it wants of quantised graphs.
    """

    name: str
    runtime: str
    device: str
    integer: IntegerKernels
    flags: frozenset[str] = field(default=frozenset())


def onnxruntime_cpu(flags: frozenset[str]) -> Target:
    """onnxruntime's CPU provider. Without VNNI or AMX, u8 x s8 products saturate 16-bit sums (its own guide)."""
    exact_products = bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
    return Target(
        name="onnxruntime-cpu" + ("-vnni" if exact_products else ""),
        runtime="onnxruntime",
        device="cpu",
        flags=flags,
        integer=IntegerKernels(
            signed=False,
            output_pairs=True,
            reduce_range=not exact_products,
            weighted=frozenset({"Conv", "Gemm", "MatMul"}),
            transparent=frozenset(
                {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Resize"}
            ),
            computing=frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}),
        ),
    )


TARGETS = {
    "onnxruntime-cpu": lambda: onnxruntime_cpu(frozenset()),
    "onnxruntime-cpu-vnni": lambda: onnxruntime_cpu(frozenset({"avx512_vnni"})),
}


def find(name: str | None = None) -> Target:
    """A target by name; None means onnxruntime on this machine's processor. Raises BadInput listing the names."""
    if name is None:
        return onnxruntime_cpu(cpu_flags())
    if name not in TARGETS:
        raise BadInput(f"unknown target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]()


@cache
def cpu_flags() -> frozenset[str]:
    """Flags of this machine's processor, from the kernel; where that has no such list, from py-cpuinfo."""
    try:
        lines: Mapping[str, str] = {
            key.strip().lower(): value
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            for key, _, value in [line.partition(":")]
        }
        flags = lines.get("flags") or lines.get("features")
        if flags:
            return frozenset(flags.split())
    except OSError:
        pass
    try:
        from cpuinfo import get_cpu_info
    except ImportError:
        return frozenset()
    return frozenset(get_cpu_info().get("flags", ()))
