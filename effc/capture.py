"""From whatever holds a network to a Model; what is not a sound one is refused here, in one line, before anything runs.

ONNX is read in this file. Modules and programs of torch come through `effc.capture_torch`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes import common as ir_passes

from effc.errors import BadInput, InvalidModel
from effc.model import Model
from effc.verify import verify

_FAULTS = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # what onnx_ir raises on broken messages
OVERRIDABLE = "weights listed among the graph inputs are plain weights now: a runtime can fold and fuse these"
OLDEST_OPSET, NEWEST_OPSET = 7, onnx.defs.onnx_opset_version()


def capture(
    source: Any,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    input_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Model:
    """A Model of a torch module or program, of an ONNX message, or of a file.

    Args:
        source: an `nn.Module` (an `fx.GraphModule` is one), a `torch.export.ExportedProgram`, an `onnx.ModelProto`,
            an `onnx_ir.Model`, a Model, or the path of an .onnx or .pt2 file.
        example_inputs: for a module: a tensor, a tuple of arguments, or a dict of keyword arguments.
        dynamic_batch: let the first axis be of any size, N, where the module allows; `notes` says where it does not.
            For a module; a program has been exported with the sizes it has.
        input_names: of the graph's inputs in order, in place of those of the forward method; for torch alone.
        name: what the model is called; None: the file's or the class's name.

    A module is exported in eval mode and left as it was, and its weights are copied. The result was run on the example
    inputs: its outputs on onnxruntime are the module's. Weights have the names of the state dict, nodes those of their
    modules; a dense layer over more than one axis reads its weight transposed, [in, out].

    Raises:
        BadInput: no model, or not a sound one; what ONNX cannot express, with the operator's name.
    """
    if _is_torch(source) or _is_program_file(source):
        from effc.capture_torch import capture_torch

        return capture_torch(source, example_inputs, dynamic_batch, input_names, name)
    if example_inputs is not None or input_names is not None:
        given = "example_inputs" if example_inputs is not None else "input_names"
        raise BadInput(f"{given} belong to a module of torch; leave them out for a {type(source).__name__}")
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return from_proto(source, name or "model")
    if isinstance(source, ir.Model):
        return Model(source, name or "model")
    if isinstance(source, str | os.PathLike):
        model = load(source)
        model.name = name or model.name
        return model
    if isinstance(source, Mapping):
        raise BadInput("a dict is no model, as a state_dict is weights alone: load it into its module and give that")
    raise BadInput(
        f"a {type(source).__name__} is no model: give an .onnx or .pt2 file, an onnx.ModelProto, an nn.Module or a"
        " torch.export.ExportedProgram"
    )


def load(path: str | os.PathLike) -> Model:
    """Read an .onnx file, or a .pt2 file through torch. External weights stay memory-mapped in their file.

    Raises:
        BadInput: not an ONNX model, truncated, external data missing or outside the model's folder, NaN weights.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; an .onnx file is needed")
    if path.stat().st_size == 0:
        raise BadInput(f"{path} is empty; an .onnx file is needed")
    if path.suffix in (".pt", ".pth"):
        raise BadInput(
            f"{path} is a checkpoint, which holds weights or code and no graph: in Python load it into its module and"
            " call effc.capture(module, example_inputs), or torch.export.save it as .pt2"
        )
    if _is_program_file(path):
        return capture(path)
    try:
        # The binary form whatever the file's ending: textual forms are not what deployment tools write.
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise BadInput(f"{path} is not an ONNX model, or it is truncated ({first_line(error)})") from error
    model = from_proto(proto, name=path.stem, folder=path.parent)
    if OVERRIDABLE in model.notes:
        model.file = path
    return model


def as_written(path: str | os.PathLike) -> Model:
    """The graph of an .onnx file as it stands, to look at: nothing is repaired, and it may break rules of ONNX.

    Raises:
        BadInput: not an ONNX model, truncated, or external data missing or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise BadInput(f"{path} is no file, or empty; an .onnx file is needed")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
        if not proto.HasField("graph") or not proto.opset_import:
            raise BadInput(f"{path} is not an ONNX model: it has no graph or no operator set")
        _densify(proto.graph)
        with _quiet("onnx_ir"):
            model = ir.from_proto(proto)
    except (DecodeError, OSError, *_FAULTS) as error:
        raise BadInput(f"{path} is not an ONNX model, or it is truncated ({first_line(error)})") from error
    _check_external_data(model, path.parent)
    return Model(model, path.stem)


def from_proto(proto: onnx.ModelProto, name: str = "model", folder: Path | None = None) -> Model:
    """A Model from a protobuf message; external data are looked for in `folder`. Raises BadInput as `load`."""
    _check_proto(proto, name)
    notes = []
    if proto.graph.sparse_initializer:
        notes.append(f"{len(proto.graph.sparse_initializer)} sparse weights were made dense")
        _densify(proto.graph)
    try:
        with _quiet("onnx_ir"):  # what it warns of is an error below
            model = ir.from_proto(proto)
    except _FAULTS as error:
        raise BadInput(f"{name} is not a valid ONNX model: {first_line(error)}") from error
    _check_external_data(model, folder)
    return sound(model, name, notes)


def sound(model: ir.Model, name: str, notes: Sequence[str] = ()) -> Model:
    """A Model of a graph that keeps the rules, with what had to be changed in its notes. Raises BadInput."""
    notes = list(notes)
    if any(v.is_initializer() for v in model.graph.inputs):
        # Weights that a caller may override can be neither folded nor quantised; from IR 4 on they need not be inputs.
        ir_passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = max(model.ir_version or 0, 4)
        notes.append(OVERRIDABLE)
    _check_weights(model)
    if not _in_order(model.graph):
        try:
            model.graph.sort()
        except ValueError as error:
            raise BadInput(f"{name} is not a valid ONNX model: its nodes read each other in a circle") from error
        notes.append("nodes were put in the order in which they are computed")
    captured = Model(model, name, notes)
    if reasons := captured.not_analysed():
        notes += [f"not analysed: {node}: {reason}" for node, reason in list(reasons.items())[:20]]
        if len(reasons) > 20:
            notes.append(f"not analysed: {len(reasons) - 20} more nodes")
        captured.notes = tuple(notes)
    try:
        _complete_outputs(captured)
        verify(captured)
    except InvalidModel as error:
        found = str(error).partition(": ")[2]  # behind the name of the rule
        raise BadInput(f"{name} is not a valid ONNX model: {found}") from error
    except _FAULTS as error:
        raise BadInput(f"{name} is not a valid ONNX model: {first_line(error)}") from error
    return captured


def _is_torch(source: object) -> bool:
    """Told by its class alone, so that torch need not be there."""
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(source).__mro__)


def _is_program_file(source: object) -> bool:
    return isinstance(source, str | os.PathLike) and Path(source).suffix == ".pt2"


def _complete_outputs(model: Model) -> None:
    """Runtimes take an output without a shape, and the ONNX checker does not."""
    bare = [v for v in model.graph.outputs if v.shape is None and isinstance(v.type, ir.TensorType)]
    found = model.shapes() if bare else {}
    for value in bare:
        if (shape := found.get(value.name)) is not None:
            value.shape = ir.Shape(shape)
            model.touch()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _in_order(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in seen:
                return False
        seen.add(node)
    return True


def _check_proto(proto: onnx.ModelProto, name: str) -> None:
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise BadInput(f"{name} is not an ONNX model: it has no IR version, no graph or no operator set")
    if not proto.graph.output:
        raise BadInput(f"{name} has no outputs, or it is truncated")
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and not OLDEST_OPSET <= entry.version <= NEWEST_OPSET:
            raise BadInput(
                f"{name} is of opset {entry.version}; {OLDEST_OPSET} to {NEWEST_OPSET} are understood:"
                " export it again at one of these"
            )


def _check_external_data(model: ir.Model, folder: Path | None) -> None:
    """Every external tensor lies in the model's own folder, whole, and not behind a link that leads out of it."""
    root = None if folder is None else folder.resolve()
    sizes: dict[Path, int] = {}
    for tensor in list(Model(model).tensors()):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = os.fspath(tensor.location)
        if root is None:
            raise BadInput(f"weight {tensor.name!r} is external data ({location}), and no folder is known to read from")
        path = (root / location).resolve()
        if os.path.isabs(location) or not path.is_relative_to(root):
            raise BadInput(
                f"external data of {tensor.name!r} lie at {location!r}, outside the model's folder;"
                " put them beside the model"
            )
        if path not in sizes:
            if not path.is_file():
                raise BadInput(f"external data of {tensor.name!r} are missing: {location!r} is not beside the model")
            sizes[path] = path.stat().st_size
        needed = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if needed > sizes[path]:
            raise BadInput(f"external data {location!r} end at {sizes[path]} bytes; {tensor.name!r} needs {needed}")
    if root is not None:
        for graph in model.graphs():
            ir.external_data.set_base_dir(graph, root)


def _check_weights(model: ir.Model) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point() or tensor.size == 0:
                continue
            try:
                array = tensor.numpy()
            except (ValueError, TypeError) as error:
                raise BadInput(f"weight {value.name!r} cannot be read: {first_line(error)}") from error
            # The largest element is NaN when any is, and no array of flags is made of a weight of gigabytes.
            if np.isnan(array.max() if array.dtype.kind == "f" else array.astype(np.float32).max()):
                raise BadInput(f"weight {value.name!r} holds NaN; repair the model first")


def _densify(graph: onnx.GraphProto) -> None:
    """onnx_ir knows no sparse weights, and the runtime makes them dense when it loads them anyway."""
    for sparse in graph.sparse_initializer:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        dense = np.zeros(sparse.dims, values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        graph.initializer.append(onnx.numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def first_line(error: BaseException) -> str:
    """What was said first: onnx_ir wraps errors in others that print whole messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
