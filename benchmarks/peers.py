"""Other tools' int8 models of an ONNX file, to stand beside effc's in a benchmark.

    python benchmarks/peers.py PEER MODEL.onnx BATCHES.npz OUT.onnx

PEER is one of `onnxruntime-default`, `onnxruntime-best`, `onnxruntime-dynamic`, `nncf-mixed`; BATCHES.npz holds, for
each input, an array whose first axis counts batches. As a command this also runs under the interpreter of another
environment, where NNCF need not agree with effc on its dependencies.

Nothing here imports effc: a peer is given the file that a user would give it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

Feeds = dict[str, np.ndarray]
OLDEST_PER_CHANNEL_OPSET = 13  # DequantizeLinear has an axis since this opset


def onnxruntime_default(model_path: str | os.PathLike, batches: Iterable[Feeds], out: str | os.PathLike) -> Path:
    """onnxruntime's static quantisation as it comes: int8 activations and weights, per tensor, no preparation."""
    quantize_static(os.fspath(model_path), os.fspath(out), _Reader(batches))
    return Path(out)


def onnxruntime_best(
    model_path: str | os.PathLike,
    batches: Iterable[Feeds],
    out: str | os.PathLike,
    nodes_to_exclude: Iterable[str] = (),
) -> Path:
    """onnxruntime's static quantisation as an expert calls it: prepared, uint8 activations, int8 weights per channel.

    These are the settings that its x86-64 kernels fuse. An opset that cannot say "per channel" is raised first.

    Args:
        model_path: the float32 model.
        batches: calibration data.
        out: where the int8 model goes.
        nodes_to_exclude: nodes left in float32, by name; finding good ones is the user's work.
    """
    with tempfile.TemporaryDirectory() as folder:
        raised, prepared = Path(folder, "raised.onnx"), Path(folder, "prepared.onnx")
        model = _with_constant_weights(_at_least_opset(onnx.load(model_path), OLDEST_PER_CHANNEL_OPSET))
        onnx.save(model, raised)
        _prepare(raised, prepared)
        quantize_static(
            os.fspath(prepared),
            os.fspath(out),
            _Reader(batches),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=list(nodes_to_exclude),
        )
    return Path(out)


def onnxruntime_dynamic(
    model_path: str | os.PathLike, batches: Iterable[Feeds], out: str | os.PathLike, per_channel: bool = False
) -> Path:
    """onnxruntime's dynamic quantisation: int8 weights, activations quantised anew at each run.

    Args:
        model_path: the float32 model.
        batches: not read; dynamic quantisation needs no data.
        out: where the int8 model goes.
        per_channel: one weight scale for each output channel instead of one for the tensor.
    """
    quantize_dynamic(os.fspath(model_path), os.fspath(out), per_channel=per_channel)
    return Path(out)


def nncf_mixed(model_path: str | os.PathLike, batches: Iterable[Feeds], out: str | os.PathLike) -> Path | None:
    """NNCF's static quantisation, preset MIXED (asymmetric activations), with its full bias correction.

    Batches are handed over sample by sample, which is how NNCF counts its calibration subset, except for inputs of a
    fixed size. An opset that cannot say "per channel" is raised first.

    Returns:
        Where the model was written, or None, with a warning that says why, when NNCF is not installed.
    """
    try:
        import nncf  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        warnings.warn(f"no NNCF model was made: {error}; `pip install nncf` to have this row", stacklevel=2)
        return None
    model = _at_least_opset(onnx.load(model_path), OLDEST_PER_CHANNEL_OPSET)
    samples = list(_samples(batches, model))
    quantized = nncf.quantize(
        model,
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        fast_bias_correction=False,
    )
    onnx.save(quantized, out)
    return Path(out)


PEERS: dict[str, Callable[[str | os.PathLike, Iterable[Feeds], str | os.PathLike], Path | None]] = {
    "onnxruntime-default": onnxruntime_default,
    "onnxruntime-best": onnxruntime_best,
    "onnxruntime-dynamic": onnxruntime_dynamic,
    "nncf-mixed": nncf_mixed,
}


def _prepare(source: Path, out: Path) -> None:
    """onnxruntime's preparation: optimised, shapes inferred; without symbolic shapes where those cannot be had.

    Its symbolic inference fails on `Constant` nodes that hold their value as `value_ints`, for one.
    """
    try:
        quant_pre_process(os.fspath(source), os.fspath(out))
    except Exception:  # it raises what its own defects raise: AttributeError, IndexError, bare Exception
        quant_pre_process(os.fspath(source), os.fspath(out), skip_symbolic_shape=True)


class _Reader(CalibrationDataReader):
    """Feeds, one after the other, in the form that onnxruntime's quantiser reads."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> Any:
        """The next feeds, or None behind the last; the base class says dict for both."""
        return next(self._batches, None)


def _at_least_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    if all(x.version >= opset for x in model.opset_import if x.domain in ("", "ai.onnx")):
        return model
    return version_converter.convert_version(model, opset)


def _with_constant_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights that are graph inputs too, as files before IR version 4 list them, are no constants to onnxruntime."""
    inputs = _data_inputs(model)
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)
    return model


def _data_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {x.name for x in model.graph.initializer}
    return [x for x in model.graph.input if x.name not in weights]


def _samples(batches: Iterable[Feeds], model: onnx.ModelProto) -> Iterator[Feeds]:
    """Batches as single samples, when every input leaves its first dimension open; else the batches as they are."""
    shapes = [x.type.tensor_type.shape.dim for x in _data_inputs(model)]
    free = all(shape and not shape[0].HasField("dim_value") for shape in shapes)
    for feeds in batches:
        if not free:
            yield feeds
            continue
        for i in range(len(next(iter(feeds.values())))):
            yield {name: array[i : i + 1] for name, array in feeds.items()}


def _read_batches(path: str | os.PathLike) -> list[Feeds]:
    with np.load(path) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    return [dict(zip(columns, rows, strict=True)) for rows in zip(*columns.values(), strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    written = PEERS[options.peer](options.model, _read_batches(options.batches), options.out)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
