"""From a Model to a file that is right, or to no file at all.

Everything is written into a folder beside the destination, checked and loaded there, and only then moved in place.
External data lie in one file named after their content, so that a model being replaced never reads half of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import onnx
import onnx_ir as ir

from effc.errors import BadInput, EffcError, InvalidModel
from effc.model import Model, collection_paused
from effc.shapes import skeleton

if TYPE_CHECKING:
    from effc.runtime import Backend

INLINE_LIMIT = 1_900_000_000  # bytes of weights up to which a model is one file; a message ends at 2 GiB
MESSAGE_LIMIT = 2_100_000_000  # bytes of weights that a message can hold at all
SMALL_BYTES = 1024  # weights up to this stay in the message: shapes and axes that a loader has to read early

Place = Callable[[str, ir.TensorProtocol], ir.TensorProtocol | None]


def save(
    model: Model, path: str | os.PathLike, *, external: bool | None = None, backend: Backend | None = None
) -> Path:
    """Write a model, at the opset and IR version that the runtime takes; an existing file is replaced on success only.

    The same model gives the same bytes. Weights that are memory-mapped are copied one at a time, so that with
    external data private memory stays flat. A file that the model itself was loaded from may be replaced.

    Args:
        external: put the weights into `NAME.<8 hex digits of their content>.data` beside the file; None: above 1.9 GB.
        backend: the runtime that has to load the file; None: onnxruntime.

    Raises:
        BadInput: the folder does not exist or cannot be written, or the path is that of a folder.
        InvalidModel: the ONNX checker refuses the model.
        EffcError: the runtime does not load it, in its words.
    """
    path = Path(os.path.realpath(path))  # a link stays a link: what it points to is replaced
    _check_destination(model, path)
    if backend is None:
        from effc.registry import backend as find_backend

        backend = find_backend("onnxruntime")
    copy = model.clone()
    copy.touch()  # what is written is what is there, and nothing that was remembered
    backend.emit(copy)
    if external is None:
        external = copy.nbytes() > INLINE_LIMIT
    try:
        previous = _own_data(path)
        with _beside(path) as written:
            data = _write(copy, written, external)
            _check(written, backend)
            _move(written, path, data)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {_said(error)}") from error
    with contextlib.suppress(OSError):  # the model is written; what is left over does no harm
        _remove_unused_data(model, path, previous - ({path.with_name(data.name)} if data else set()))
    return path


def save_text(text: str, path: str | os.PathLike) -> Path:
    """Write a file in one step; one that is there already is replaced on success only.

    Raises:
        BadInput: the folder does not exist or cannot be written, or the path is that of a folder.
    """
    path = Path(os.path.realpath(path))
    check_place(path)
    try:
        with _beside(path) as written:
            written.write_text(text, encoding="utf-8")
            _move(written, path, None)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {_said(error)}") from error
    return path


@collection_paused()
def message(model: Model, place: Place, *, without: Collection[str] = ()) -> onnx.ModelProto:
    """The model as a protobuf message that holds all its numbers, save for the weights that `place` puts elsewhere.

    Args:
        place: (name, tensor) of a weight of the main graph -> the external tensor to write in its stead, or None.
        without: weights of the main graph to leave out.

    Raises:
        EffcError: what is left is over 2 GiB, more than a message can hold.
    """
    tensors = {
        n: t for n, v in model.graph.initializers.items() if n not in without and (t := v.const_value) is not None
    }
    placed = {name: found for name, tensor in tensors.items() if (found := place(name, tensor)) is not None}
    kept = [tensor for name, tensor in tensors.items() if name not in placed] + list(_inner_weights(model))
    if (left := sum(tensor.nbytes for tensor in kept)) > MESSAGE_LIMIT:
        raise EffcError(f"{model.name} keeps {left / 1e9:.1f} GB of weights that cannot lie outside the model file")
    proto = skeleton(model)
    graph, names, inputs = proto.graph, set(model.graph.initializers), {v.name for v in model.graph.inputs}
    # A weight states its own type and shape.
    _keep(graph.value_info, lambda info: info.name not in names)
    _keep(graph.input, lambda info: info.name in inputs or info.name not in names)
    small = {tensor.name: tensor for tensor in graph.initializer}
    del graph.initializer[:]
    for name, tensor in tensors.items():
        if name in small and name not in placed:
            graph.initializer.append(small[name])
        else:
            weight = graph.initializer.add()
            ir.serde.serialize_tensor_into(weight, placed[name] if name in placed else _in_memory(tensor))
            weight.name = name
    return proto


def _inner_weights(model: Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.ir.graphs():
        if graph is not model.graph:
            yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)


def _keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Drop the other items of a repeated field."""
    kept = [item for item in items if wanted(item)]
    if len(kept) < len(items):
        del items[:]
        items.extend(kept)


def reference(name: str, tensor: ir.TensorProtocol, location: str, offset: int) -> ir.ExternalTensor:
    """A stand-in for a weight that says where its bytes lie."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name)


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Where to write what is to stand at `path`; what was not moved there is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name


def _check_destination(model: Model, path: Path) -> None:
    check_place(path)
    if any(Path(os.path.realpath(file)) == path for file in _sources(model)):
        raise BadInput(f"{path} holds weights of {model.name}; choose another name")


def check_place(path: Path) -> None:
    """Whether a file can stand there. Raises BadInput."""
    if path.is_dir():
        raise BadInput(f"{path} is a folder; name the file to write")
    if not path.parent.is_dir():
        raise BadInput(f"{path.parent} does not exist; make the folder first")
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a regular file")


def _sources(model: Model) -> set[str]:
    """Files that weights are mapped from."""
    return {tensor.path for tensor in model.tensors() if isinstance(tensor, ir.ExternalTensor)}


def _write(model: Model, path: Path, external: bool) -> Path | None:
    """Write the model to `path`, and its weights beside it; returns their file, None when they are inline."""
    places: dict[str, tuple[str, int]] = {}
    data = _write_data(model, path, places) if external else None

    def place(name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        return reference(name, tensor, *places[name]) if name in places else None

    path.write_bytes(message(model, place).SerializeToString(deterministic=True))
    return data


def _write_data(model: Model, path: Path, places: dict[str, tuple[str, int]]) -> Path | None:
    """Stream the larger weights into one file named by its content; `places` gets (file name, offset) of each."""
    data, offsets = path.with_suffix(".data"), {}
    with open(data, "w+b") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= SMALL_BYTES or tensor.dtype == ir.DataType.STRING:
                continue
            file.write(b"\0" * (-file.tell() % 64))  # aligned for vector loads when it is mapped
            offsets[name] = file.tell()
            if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
                # From its map: the file behind it may have another content by now, or be gone.
                start = tensor.offset or 0
                file.write(memoryview(tensor.raw)[start : start + (tensor.length or tensor.nbytes)])
            else:
                cast(Any, tensor).tofile(file)  # every class of tensor has it; the protocol leaves it out
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        os.fsync(file.fileno())
    if not offsets:
        data.unlink()
        return None
    final = data.rename(path.with_name(f"{path.stem}.{digest}.data"))
    places.update({name: (final.name, offset) for name, offset in offsets.items()})
    return final


def _check(path: Path, backend: Backend) -> None:
    try:
        onnx.checker.check_model(str(path))  # by path: a message over 2 GiB cannot be passed
    except onnx.checker.ValidationError as error:
        raise InvalidModel(f"the ONNX checker refuses the model: {_said(error)}") from error
    backend.session(path, optimize=False)


def _move(written: Path, path: Path, data: Path | None) -> None:
    """Weights first; the model's own move is the moment from which the new one counts."""
    if path.exists():
        os.chmod(written, path.stat().st_mode & 0o777)
    target = existed = None
    if data is not None:
        target = path.with_name(data.name)
        existed = target.exists()
        os.replace(data, target)
    try:
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    except OSError:
        if target is not None and not existed:
            target.unlink(missing_ok=True)
        raise


def _own_data(path: Path) -> set[Path]:
    """Data files that an earlier `save` wrote for the model at `path`; files named otherwise are the user's."""
    pattern = re.compile(re.escape(path.stem) + r"\.[0-9a-f]{8}\.data")
    return {f for f in path.parent.iterdir() if pattern.fullmatch(f.name) and _mentions(path, f.name)}


def _remove_unused_data(model: Model, path: Path, candidates: set[Path]) -> None:
    for file in candidates:
        if any(_mentions(other, file.name) for other in path.parent.glob("*.onnx")):
            continue
        for tensor in model.tensors():
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve() == file:
                tensor.numpy()  # opens the map, which outlives the file's name
        file.unlink(missing_ok=True)


def _mentions(path: Path, name: str) -> bool:
    """Whether a file holds a name anywhere in it, as a model does that keeps weights there."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
