"""onnxruntime on the CPU: runs models, states what it takes, and tells what it made of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

from effc.capture import load
from effc.contract import Progress
from effc.errors import BadInput, EffcError
from effc.kernels import Kernel
from effc.model import Model
from effc.opset import ir_version_of
from effc.runtime import Deployment, Timings
from effc.save import SMALL_BYTES, message, reference
from effc.verify import difference, plain_outputs

from ._onnxruntime_graph import optimised_graph, read_back, standing
from ._onnxruntime_kernels import kernels, tensors

SHAPES_BYTES = 1 << 16  # int64 weights up to this stay in the message: they may be shapes, which loading has to read
FILE_BYTES = 1 << 20  # weights from this size on stay in their file, if they lie in one
KEPT_BYTES = 1 << 24  # weights of a model up to which its message is kept for the next session
FLAT_BYTES = 1 << 30  # weights of a model from which on reading it back keeps memory flat
NO_PREPACKING = "session.disable_prepacking"
RESTING = "session.force_spinning_stop"
FOLDER = "session.model_external_initializers_file_folder_path"
# What it raises: exceptions of its own, which have no base in common; RuntimeError for those of C++; ValueError and
# TypeError where its Python side or its bindings do not take an argument.
REFUSALS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    TypeError,
    ValueError,
)


class OnnxRuntime:
    """The backend of that name; see `effc.runtime.Backend`.

    Attributes:
        runs_in_caller: with one thread a session works in the thread that calls it, so that thread's time is its cost.
    """

    name = "onnxruntime"
    runs_in_caller = True

    def version(self) -> str:
        return ort.__version__

    def session(
        self, model: Model | Path, *, threads: int = 1, optimize: bool = True, expose: Sequence[str] = ()
    ) -> OnnxRuntimeSession:
        """See `effc.runtime.Backend`. Weights of a Model are handed over by address; onnxruntime copies them once.

        Large weights that lie in a file are mapped from there, and not copied.

        Raises:
            BadInput: `expose` names a tensor that the main graph does not have.
            EffcError: onnxruntime does not take the model, in its words.
        """
        if expose and not isinstance(model, Model):
            model = load(model)
        options = session_options(threads, optimize)
        if not isinstance(model, Model):
            return OnnxRuntimeSession(os.fspath(model), options, Path(model).name)
        return load_session(model, options, expose)

    def emit(self, model: Model) -> None:
        """Set the file format version to one that the opset needs and the installed onnxruntime reads.

        Raises:
            BadInput: the model's opset is newer than the installed onnxruntime.
        """
        newest_opset, newest_ir = newest_versions()
        if model.opset > newest_opset:
            raise BadInput(
                f"{model.name} is of opset {model.opset}; onnxruntime {ort.__version__} runs up to {newest_opset}:"
                " export it at an older opset or install a newer onnxruntime"
            )
        # Weights that are no graph inputs need version 4, local functions version 8.
        lowest = max(ir_version_of(model.opset), 8 if model.ir.functions else 4)
        version = min(max(model.ir.ir_version or 0, lowest), newest_ir)
        if version != model.ir.ir_version:
            model.ir.ir_version = version
            model.touch()

    def deployment(self, model: Model, feeds: Mapping[str, np.ndarray] | None = None, threads: int = 1) -> Deployment:
        """See `effc.runtime.Backend`. Remembered for these very feeds until the next edit."""
        key = ("onnxruntime deployment", threads, id(feeds))
        # Holding the feeds keeps their id theirs.
        return model.cached(key, lambda: (feeds, self._deploy(model, feeds, threads)), for_clones=True)[1]

    def kernels(
        self, model: Model, batch: int = 1, dims: Mapping[str, int] | None = None, threads: int = 1
    ) -> tuple[tuple[Kernel, ...], dict[str, str]]:
        """See `effc.runtime.Backend`. Remembered until the next edit."""
        key = ("onnxruntime kernels", batch, tuple(sorted((dims or {}).items())))
        return model.cached(key, lambda: self._lower(model, batch, dims or {}, threads), for_clones=True)

    def calibrate(self, threads: int, seconds: float, progress: Progress) -> Timings:
        """See `effc.runtime.Backend`."""
        from ._onnxruntime_calibration import calibrate

        return calibrate(threads, seconds, progress)

    def _lower(
        self, model: Model, batch: int, dims: Mapping[str, int], threads: int
    ) -> tuple[tuple[Kernel, ...], dict[str, str]]:
        options = session_options(threads)
        options.add_session_config_entry(NO_PREPACKING, "1")  # the same kernels, sooner
        _, optimised = optimised_graph(lambda o: load_session(model, o), options)
        symbols = {d for info in model.inputs for d in info.shape or () if isinstance(d, str)}
        sizes = {symbol: dims.get(symbol, batch) for symbol in symbols}
        known = tensors(optimised, sizes, model.shapes(batch, dims), session_options(1, optimize=False))
        found = kernels(optimised.graph, known)
        return tuple(found), standing(model, found)

    def _deploy(self, model: Model, feeds: Mapping[str, np.ndarray] | None, threads: int) -> Deployment:
        options = session_options(threads)
        if model.nbytes() > FLAT_BYTES:
            options.add_session_config_entry(NO_PREPACKING, "1")  # the same kernels, without a copy of the weights
        session, (fused, fell_back, notes) = read_back(model, lambda o: load_session(model, o), options)
        gap = None
        if feeds is not None:
            gap = difference(plain_outputs(model, feeds, self), session.run(feeds))
        return Deployment(fused, fell_back, gap, notes)


class OnnxRuntimeSession:
    """A loaded model; see `effc.runtime.Session`.

    Attributes:
        inputs, outputs: their names, in the model's order.
    """

    def __init__(self, source: str | bytes, options: ort.SessionOptions, name: str) -> None:
        try:
            self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except REFUSALS as error:
            raise EffcError(f"onnxruntime does not load {name}: {one_line(error)}") from error
        self._name = name
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name. Raises EffcError, in onnxruntime's words."""
        try:
            results: Sequence[Any] = self._session.run(None, feeds)
        except REFUSALS as error:
            raise EffcError(f"onnxruntime does not run {self._name}: {one_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))

    def end_profiling(self) -> Path:
        """The file with what the profiler saw, where the options asked for it."""
        return Path(self._session.end_profiling())


def session_options(threads: int = 1, optimize: bool = True) -> ort.SessionOptions:
    """Options of every session here: workers rest between inferences, for spinning they would slow other sessions."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry(RESTING, "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(NO_PREPACKING, "1")
    return options


def load_session(model: Model, options: ort.SessionOptions, expose: Sequence[str] = ()) -> OnnxRuntimeSession:
    """A model of any size as a session; weights are handed over by address, or left in their files."""
    proto, weights = _split(model, expose)
    if files := _files(model):
        options.add_session_config_entry(FOLDER, _folder(files))
    # Read while the session is made; what is kept alive until then is kept by this frame.
    options.add_external_initializers(list(weights), list(weights.values()))
    return OnnxRuntimeSession(proto.SerializeToString(), options, model.name)


def _files(model: Model) -> dict[str, str]:
    """Large weights that lie in files -> the file, where that still is the one they were mapped from."""
    return {
        name: os.path.realpath(tensor.path)
        for name, value in model.graph.initializers.items()
        if isinstance(tensor := value.const_value, ir.ExternalTensor) and tensor.nbytes >= FILE_BYTES and _same(tensor)
    }


def _folder(files: Mapping[str, str]) -> str:
    return os.path.commonpath([os.path.dirname(file) for file in files.values()])


def _same(tensor: ir.ExternalTensor) -> bool:
    """Whether a weight's file holds what is mapped, as far as its first bytes tell: it may have been replaced."""
    if tensor.raw is None:
        return True
    start = tensor.offset or 0
    mapped = bytes(memoryview(tensor.raw)[start : start + SMALL_BYTES])
    try:
        with open(tensor.path, "rb") as file:
            file.seek(start)
            return file.read(len(mapped)) == mapped
    except OSError:
        return False


def _split(model: Model, expose: Sequence[str] = ()) -> tuple[onnx.ModelProto, dict[str, ort.OrtValue]]:
    """The model as a message without its larger weights, and those by name, not copied, save for what lies in files.

    Remembered until the next edit: measuring and evaluating load the same model many times.
    """
    files = _files(model)
    if expose:
        known = {v.name for v in (*model.graph.inputs, *model.values())}
        if unknown := next((name for name in expose if name not in known), None):
            raise BadInput(f"no tensor is called {unknown!r}")
        return _split_anew(model, files, expose)
    key = ("onnxruntime message", frozenset(files))
    if model.nbytes() > KEPT_BYTES:
        return _split_anew(model, files, ())
    return model.cached(key, lambda: _split_anew(model, files, ()), for_clones=True)


def _split_anew(
    model: Model, files: Mapping[str, str], expose: Sequence[str]
) -> tuple[onnx.ModelProto, dict[str, ort.OrtValue]]:
    weights: dict[str, ort.OrtValue] = {}

    def place(name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if name in files and isinstance(tensor, ir.ExternalTensor):
            return reference(name, tensor, os.path.relpath(files[name], _folder(files)), tensor.offset or 0)
        if tensor.nbytes <= (SHAPES_BYTES if tensor.dtype == ir.DataType.INT64 else SMALL_BYTES):
            return None
        value = _ort_value(tensor)
        if value is None:
            return None
        weights[name] = value
        return reference(name, tensor, "in-memory", 0)

    # A weight that nothing reads is gone by the time onnxruntime looks for those handed over.
    unread = {n for n, v in model.graph.initializers.items() if not (_read(v) or n in expose)}
    proto = message(model, place, without=unread)
    shown = {v.name for v in model.graph.outputs}
    for name in dict.fromkeys(expose):
        if name not in shown:
            proto.graph.output.add(name=name)  # onnxruntime infers the type itself; a recorded one may be stale
    return proto, weights


def _read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output() or value.is_graph_input()


def _ort_value(tensor: ir.TensorProtocol) -> ort.OrtValue | None:
    """The tensor's own memory as an OrtValue, which keeps the array alive; None for what has no such form."""
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        return None
    array = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype.numpy().isbuiltin == 1:  # asked of the type: an array of mapped memory says 0
        return ort.OrtValue.ortvalue_from_numpy(array)
    if tensor.dtype.bitwidth in (8, 16):  # bfloat16 and the 8-bit floats, which NumPy has not by itself
        array = array.view(f"u{tensor.dtype.bitwidth // 8}")
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype))
    return None


@functools.cache
def newest_versions() -> tuple[int, int]:
    """The newest opset and file format version that the installed onnxruntime reads, found by trying."""

    def runs(opset: int, ir_version: int) -> bool:
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
        opsets = [helper.make_opsetid("", opset)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
        options = session_options()
        options.log_severity_level = 4
        try:
            ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except REFUSALS:
            return False
        return True

    opset, version = 17, 8
    while runs(opset + 1, version):
        opset += 1
    while runs(17, version + 1):
        version += 1
    return opset, version


def one_line(error: BaseException) -> str:
    """onnxruntime's words without its prefix and line breaks."""
    words = " ".join(str(error).split())
    return words.removeprefix("[ONNXRuntimeError] : ") or type(error).__name__
