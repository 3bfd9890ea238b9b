"""Where samples come from: .npz files, folders of images, Python functions. Stored samples, not yet prepared."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effc.dataspec import DataSpec
from effc.errors import BadInput

Rows = range | np.ndarray  # indices of samples in their source
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class Source(ABC):
    """Where samples come from. `identity` is a hash of the content, as far as it can be had without reading it all."""

    name: str

    @functools.cached_property
    def identity(self) -> str:
        return self._identify()

    @abstractmethod
    def _identify(self) -> str: ...

    @abstractmethod
    def arrays(self) -> Sequence[str]: ...

    @abstractmethod
    def count(self, names: Sequence[str], stop: int | None) -> int:
        """Number of samples; where they have to be counted, counting may end at `stop`."""

    @abstractmethod
    def chunks(self, rows: Rows, size: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The named arrays of these samples, `size` at a time. Images come as a list of [H, W, C] uint8 arrays."""


class Stored(Source):
    """Whole arrays, name by name; the first axis is that of the samples."""

    @abstractmethod
    def array(self, name: str) -> np.ndarray: ...

    def count(self, names: Sequence[str], stop: int | None) -> int:
        shapes = {name: self.array(name).shape for name in names}
        lengths = {shape[0] if shape else -1 for shape in shapes.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise BadInput(
                f"{self.name}: the arrays differ in samples along their first axis, {shapes}: "
                "name those that belong together with inputs and labels"
            )
        return lengths.pop()

    def chunks(self, rows: Rows, size: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            index = slice(part.start, part.stop, part.step) if isinstance(part, range) else part
            yield {name: self.array(name)[index] for name in names}


class Npz(Stored):
    def __init__(self, path: Path) -> None:
        self.name, self.path = path.name, path
        self._loaded: dict[str, np.ndarray] = {}
        self._open()

    def _open(self, name: str | None = None) -> Any:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return list(file.files) if name is None else file[name]
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            what = f"array {name!r} of " if name else ""
            raise BadInput(f"cannot read {what}{str(self.path)!r} as .npz: {str(error).splitlines()[0]}") from error

    def _identify(self) -> str:
        stat = self.path.stat()
        return _file_hash(self.path.resolve(), stat.st_size, stat.st_mtime_ns)

    def arrays(self) -> list[str]:
        return self._open()

    def array(self, name: str) -> np.ndarray:
        if name not in self._loaded:
            self._loaded[name] = self._open(name)
        return self._loaded[name]


class Arrays(Stored):
    """Arrays in memory."""

    name = "arrays"

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}

    def _identify(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._arrays):
            _add(digest, name, self._arrays[name])
        return digest.hexdigest()

    def arrays(self) -> list[str]:
        return list(self._arrays)

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]


def _add(digest: Any, name: str, array: np.ndarray) -> None:
    digest.update(f"{name}{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())


@functools.cache
def _file_hash(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Folder(Source):
    """Images of a folder, in order of their names: as a csv file lists them, in class folders, or flat."""

    def __init__(self, path: Path, labels: str | None) -> None:
        self.name, self.path = path.name, path
        self.files, self.labels = self._listed(path / labels) if labels else self._found()  # names, in the folder
        if not self.files:
            raise BadInput(f"the folder {str(path)!r} holds no images ({', '.join(IMAGES)})")

    def _listed(self, table: Path) -> tuple[list[str], np.ndarray | None]:
        try:
            with table.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                if not {"file", "label"} <= set(reader.fieldnames or ()):
                    raise BadInput(f"{str(table)!r} has columns {reader.fieldnames}: it needs file,label")
                rows = sorted((row["file"], int(row["label"])) for row in reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise BadInput(f"cannot read the labels {str(table)!r}: {error}") from error
        except (TypeError, ValueError) as error:
            raise BadInput(f"{str(table)!r}: each row needs a file and an integer label ({error})") from error
        return [file for file, _ in rows], np.array([label for _, label in rows], np.int64)

    def _found(self) -> tuple[list[str], np.ndarray | None]:
        flat = sorted(p for p in self.path.iterdir() if _is_image(p))
        classes = sorted(p for p in self.path.iterdir() if p.is_dir() and any(map(_is_image, p.rglob("*"))))
        if flat and classes:
            raise BadInput(
                f"the folder {str(self.path)!r} holds both images and class folders with images: keep one kind, "
                "or name a csv file with columns file,label under labels"
            )
        if not classes:
            return [file.name for file in flat], None
        found = [(file, label) for label, c in enumerate(classes) for file in sorted(filter(_is_image, c.rglob("*")))]
        files = [file.relative_to(self.path).as_posix() for file, _ in found]
        return files, np.array([label for _, label in found], np.int64)

    def _identify(self) -> str:
        try:
            listing = [(file, (self.path / file).stat().st_size) for file in self.files]
        except OSError as error:
            raise BadInput(f"cannot read an image of the folder {str(self.path)!r}: {error}") from error
        labels = None if self.labels is None else self.labels.tolist()
        return hashlib.sha256(repr((listing, labels)).encode()).hexdigest()

    def arrays(self) -> list[str]:
        return ["image"] if self.labels is None else ["image", "label"]

    def count(self, names: Sequence[str], stop: int | None) -> int:
        return len(self.files)

    def chunks(self, rows: Rows, size: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            chunk: dict[str, Any] = {"image": [_decode(self.path / self.files[i]) for i in part]}
            if self.labels is not None:
                chunk["label"] = self.labels[np.asarray(part)]
            yield chunk


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and path.is_file()


def _decode(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {str(path)!r}: {error}") from error


class Function(Source):
    """A function that yields batches: array name -> array with a leading sample axis."""

    TELLING = 1 << 16  # samples that identify a function which no file does; it may never end

    def __init__(self, function: Callable, name: str) -> None:
        self.name, self.function = name, function
        self._count: tuple[int, bool] = (0, False)  # samples seen by counting, and whether these were all

    def _identify(self) -> str:
        function = self.function
        if inspect.isfunction(function) and function.__closure__ is None:
            file = Path(function.__code__.co_filename)
            if file.is_file():
                return hashlib.sha256(file.read_bytes() + function.__qualname__.encode()).hexdigest()
        digest = hashlib.sha256()  # what it yields depends on what it holds: the samples themselves have to tell
        for offset, batch in self._stream():
            for name in sorted(batch):
                _add(digest, name, batch[name])
            if offset > self.TELLING:
                break
        return digest.hexdigest()

    def _stream(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        offset, place = 0, f"data function {self.name!r}"
        try:
            for batch in self.function():
                if not isinstance(batch, Mapping) or not batch:
                    raise BadInput(f"{place} yielded {type(batch).__name__}: it must yield dicts of name -> array")
                arrays = {str(name): np.asarray(array) for name, array in batch.items()}
                lengths = {name: a.shape[0] if a.ndim else -1 for name, a in arrays.items()}
                if len(set(lengths.values())) != 1 or -1 in lengths.values():
                    raise BadInput(f"{place}: the arrays of a batch differ in samples, {lengths}")
                yield offset, arrays
                offset += next(iter(lengths.values()))
        except BadInput:
            raise
        except Exception as error:  # the user's own code, which may raise anything
            raise BadInput(f"{place} raised {type(error).__name__}: {error}") from error

    def arrays(self) -> list[str]:
        return next((list(batch) for _, batch in self._stream()), [])

    def count(self, names: Sequence[str], stop: int | None) -> int:
        seen, all_ = self._count
        if not all_ and (stop is None or seen < stop):
            for offset, batch in self._stream():
                seen = offset + len(next(iter(batch.values())))
                if stop is not None and seen >= stop:
                    break
            else:
                all_ = True
            self._count = seen, all_
        return seen

    def chunks(self, rows: Rows, size: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        held: list[dict[str, np.ndarray]] = []
        for offset, batch in self._stream():
            missing = [name for name in names if name not in batch]
            if missing:
                raise BadInput(f"data function {self.name!r} yielded {list(batch)} without {missing[0]!r}")
            ids = np.arange(offset, offset + len(batch[names[0]]))
            keep = _among(ids, rows)
            if keep.any():
                kept = {name: batch[name][keep] for name in names}
                if held and any(held[-1][name].shape[1:] != kept[name].shape[1:] for name in names):
                    if sum(len(h[names[0]]) for h in held):  # sequences of another length make a batch of their own
                        yield {name: np.concatenate([h[name] for h in held]) for name in names}
                    held = []
                held.append(kept)
            count = sum(len(h[names[0]]) for h in held)
            if count >= size:
                whole = {name: np.concatenate([h[name] for h in held]) for name in names}
                full = count - count % size
                for begin in range(0, full, size):
                    yield {name: array[begin : begin + size] for name, array in whole.items()}
                held = [{name: array[full:] for name, array in whole.items()}]
            if len(ids) and ids[-1] >= rows[-1]:
                break
        if sum(len(h[names[0]]) for h in held):
            yield {name: np.concatenate([h[name] for h in held]) for name in names}


def _among(ids: np.ndarray, rows: Rows) -> np.ndarray:
    if isinstance(rows, range):
        return (ids >= rows.start) & (ids < rows.stop) & ((ids - rows.start) % rows.step == 0)
    return np.isin(ids, rows)


def load_function(text: str, folder: Path) -> Callable:
    """The function `module:function` or `file.py:function` (relative to `folder`). Raises BadInput."""
    place, _, name = text.rpartition(":")
    try:
        if place.endswith(".py"):
            path = (folder / place).resolve()
            unique = f"effc_user_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
            spec = importlib.util.spec_from_file_location(unique, path)
            if spec is None or spec.loader is None:
                raise ImportError(f"{path} is no Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[unique] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # the user's own code, which may raise anything
        hint = "" if place.endswith(".py") else " (a file that is not installed is written file.py:function)"
        raise BadInput(f"cannot import {place!r} for {text!r}{hint}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"{text!r}: {place!r} has no function {name!r}")
    return function


def is_function(text: str) -> bool:
    place, _, name = text.rpartition(":")
    return name.isidentifier() and (place.endswith(".py") or all(part.isidentifier() for part in place.split(".")))


def open_source(spec: DataSpec, folder: Path) -> Source:
    if isinstance(spec.source, Mapping):
        return Arrays(spec.source)
    if callable(spec.source):
        return Function(spec.source, getattr(spec.source, "__name__", "function"))
    path = folder / spec.source
    if os.path.isdir(path):  # unlike pathlib's, false for a name that is too long
        return Folder(path, spec.labels)
    if os.path.isfile(path):
        if path.suffix.lower() != ".npz":
            raise BadInput(f"{str(path)!r} is no data source: allowed are .npz, a folder of images, file.py:function")
        return Npz(path)
    if is_function(spec.source):
        return Function(load_function(spec.source, folder), spec.source)
    hint = " (is a brace left open?)" if "{" in spec.source else ""
    raise BadInput(f"there is no data file or folder {str(path)!r}{hint}")
