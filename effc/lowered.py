"""What a float layer would take in 8-bit integers: its kernel and its cost, before anything is lowered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from effc.cost import Cost
from effc.energy import joules
from effc.kernels import CONVOLUTION, FAR, MATRIX, NEAR, Kernel, family, left, nbits_kind
from effc.target import Target
from effc.traffic import Moved

PARTS = 4  # an 8-bit code takes this part of a float
FLOAT_KINDS = ("conv", "depthwise", "gemm")  # how the kinds of float layers begin


def integer(kernel: Kernel, weight: Sequence[int] | None = None) -> Kernel | None:
    """The integer kernel that onnxruntime runs in a float one's place; None where it is no layer's, or not known.

    The fast kernel takes dense layers of at least 16 outputs in fours with inputs in fours, and depthwise ones with
    channels in sixteens; others go through patches and a matrix product. Activations beyond ReLU and added tensors
    are kernels of their own there.

    Args:
        weight: shape of a convolution's weight as it will be, [outputs, inputs of a group, ...]: float kernels round
            channels up, and integer ones want images padded.
    """
    if not kernel.known or kernel.dtype != "float32" or not kernel.kind.startswith(FLOAT_KINDS):
        return None
    dims, kind, macs, moved = dict(kernel.dims), "", kernel.macs, kernel.moved // PARTS
    if family(dims) == CONVOLUTION:
        if weight is not None:
            group = weight[0] if kernel.kind.endswith("depthwise") else dims["g"]
            dims |= {"g": group, "m": weight[0] // group, "c": weight[1]}
            if len(weight) == 4 and weight[2:] != (dims["kh"], dims["kw"]):
                dims |= {"kh": weight[2], "kw": weight[3], "s": 1}  # the stride has become channels
        kind, macs = _convolution(dims), _product(dims, "nhwmgc", "kh", "kw")
        image = dims["s"] ** 2 * _product(dims, "nhwgc")
        moved = int(image + _product(dims, "mgc", "kh", "kw") + _product(dims, "nhwmg"))
        dims |= {"act": 0, "sum": 0}
    elif kernel.kind in ("gemm", "gemm-row"):
        kind = f"q{kernel.kind}"
    else:
        return None
    dims |= _placed(dims, moved)
    return replace(kernel, kind=kind, dims=dims, moved=moved, macs=macs, dtype="int8")


def blocks(kernel: Kernel, bits: int, block: int, level: int) -> Kernel | None:
    """The kernel on codes in blocks that onnxruntime runs in a dense float layer's place; None for any other.

    Args:
        bits, block, level: of a code; of weights that share a scale; MatMulNBits' accuracy level.
    """
    if not kernel.known or kernel.dtype != "float32" or kernel.kind not in ("gemm", "gemm-row"):
        return None
    dims = dict(kernel.dims)
    weights = dims["b"] * dims["k"] * dims["n"]
    moved = kernel.moved - round(weights * (4 - bits / 8 - 4 / block))
    share = moved / max(kernel.moved, 1)
    for name in ("near", "far"):  # fewer bytes of weights have to come from afar
        dims[name] *= share
    kind = nbits_kind(bits, block, level) + kernel.kind.removeprefix("gemm")
    dims |= {"moved": moved, "bits": bits, "block": block, "level": level}
    return replace(kernel, kind=kind, dims=dims, moved=moved)


def _placed(dims: Mapping[str, float], moved: float) -> dict[str, float]:
    """Where codes lie that a kernel moves: all distances are a part of those of floats, so more of it is in caches."""
    found = {"moved": moved, "around": dims["around"] / PARTS, "since": dims["since"] / PARTS}
    for name in ("near", "far", "made_near", "made_far"):
        index, cache = (0, NEAR) if name.endswith("near") else (1, FAR)
        share = min(dims[name] / max(dims["moved"], 1), 0.999)
        distance = cache * share / (1 - share)  # at which that share would have left the cache
        found[name] = moved * left(distance / PARTS)[index]
    return found


def _product(dims: Mapping[str, float], letters: str, *others: str) -> int:
    return int(math.prod(dims[key] for key in (*letters, *others)))


def _convolution(dims: Mapping[str, float]) -> str:
    outputs, inputs = dims["m"] * dims["g"], dims["c"] * dims["g"]
    if dims["g"] == 1:
        return "qconv" if outputs >= 16 and outputs % 4 == 0 and inputs % 4 == 0 else "qconv-patches"
    if dims["c"] == dims["m"] == 1:
        return "qconv-depthwise" if outputs % 16 == 0 else "qconv-depthwise-patches"
    return "qconv-grouped"


def detour(kernel: Kernel) -> tuple[Kernel, Kernel]:
    """What a float layer between integer ones takes besides itself: codes to floats before, floats to codes behind."""
    d = kernel.dims
    if family(d) == MATRIX:
        read, made = d["b"] * d["m"] * d["k"], d["b"] * d["m"] * d["n"]
    else:
        pixels = d["n"] * d["h"] * d["w"]
        read, made = pixels * d["s"] ** 2 * d["c"] * d["g"], pixels * d["m"] * d["g"]
    back = _conversion("DequantizeLinear", "int8", read, 1, d)
    return back, _conversion("QuantizeLinear", "float32", made, PARTS, d)


def _conversion(kind: str, dtype: str, elements: float, size: int, layer: Mapping[str, float]) -> Kernel:
    """Of elements of `size` bytes, which have just been made."""
    moved, read = int(elements * (1 + PARTS)), elements * size
    made = moved - read
    near, far, made_near, made_far = (some * share for some in (read, made) for share in left(some))
    dims = {"elements": elements, "share": 1.0, "run": elements, "window": 1, "broadcast": 0}
    around = layer["around"] / PARTS  # and as much since another one ran
    dims |= {"moved": moved, "around": around, "since": around, "near": near, "far": far}
    dims |= {"made_near": made_near, "made_far": made_far}
    return Kernel(kind, kind, (), dims, 0, moved, dtype)


def integer_cost(before: Cost, moved: Moved, target: Target, saved: int, *, coded: bool = True) -> Cost:
    """Cost of a float layer once it multiplies codes; how long it then takes is not told.

    Args:
        before: of the layer in float.
        moved: what it moves in float.
        saved: bytes of its weight that are no longer stored.
        coded: its input and output are codes as well; else they are floats, turned into codes as it runs.
    """
    part = PARTS if coded else 1
    codes = Moved(moved.weights // PARTS, tuple((some // part, whole // part) for some, whole in moved.tensors))
    return replace(
        before,
        weight_bytes=before.weight_bytes - saved,
        activation_bytes=before.activation_bytes // part,
        energy=joules(before.macs, "int8", codes, target.cache),
        seconds=0.0,
    )
