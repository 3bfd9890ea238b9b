"""Calibration and evaluation data: .npz files, folders of images, Python functions; one spec says how they are fed.

A spec is a YAML file beside the data (or the same keys inline, or in Python). Samples stay as they are stored until
their batch is due: nothing in memory is proportional to the data set but the stored arrays and one index a sample.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from PIL import Image

from effc.calls import format_value, split_spec
from effc.dataspec import METRICS, DataSpec, InputSpec, make_spec
from effc.errors import BadInput
from effc.model import Model, TensorInfo
from effc.preprocess import cast, prepare
from effc.sources import Folder, Function, Rows, Source, is_function, open_source

MIXED = 4096  # samples of a stream that are held to be mixed

__all__ = ["Batch", "Data", "DataSpec", "InputSpec", "open_data"]


@dataclass(frozen=True)
class Batch:
    """feeds: input name -> [n, ...]; labels: [n, ...] as stored, or None."""

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None


class Data:
    """Samples of a source, in order, with how they are fed. Made by `open_data`; never changes.

    Attributes:
        name: short text for messages and reports.
        metric: what evaluation should count, or None.
        labelled: whether batches carry labels.
        folder: what relative names in the spec are relative to.
    """

    def __init__(self, spec: DataSpec, source: Source, folder: Path, name: str) -> None:
        self.spec, self.folder, self.name, self.metric = spec, folder, name, spec.metric
        self._source = source
        self._mixed: int | None = None  # the seed that a stream is mixed by
        known = source.arrays()
        self._label = "label" if isinstance(source, Folder) and "label" in known else spec.labels
        self._inputs = {i: spec.of_input(i) for i in spec.inputs}
        if not self._inputs:
            self._inputs = {a: spec.of_input(a).model_copy(update={"array": a}) for a in known if a != self._label}
        for role, array in [*((f"input {i!r}", self._array(i)) for i in self._inputs), ("labels", self._label)]:
            if array is not None and array not in known:
                raise BadInput(f"data {name!r} have no array {array!r} for the {role}: there are {', '.join(known)}")
        self._infos: dict[str, TensorInfo] = {}  # of the model's inputs, once bound
        stop = None if spec.limit is None else spec.start + spec.limit
        self._rows: Rows
        if isinstance(source, Function):
            if spec.shuffle is not None:
                raise BadInput(f"data {name!r}: a function's samples come as they come: leave shuffle out")
            self._rows = range(spec.start, sys.maxsize if stop is None else stop)
        else:
            count = source.count(self._names(), stop)
            self._rows = range(count)
            if spec.shuffle is not None:
                self._rows = np.random.default_rng(spec.shuffle).permutation(count)
            self._rows = self._rows[spec.start : stop]
            self._check_some(len(self._rows))

    def _array(self, name: str) -> str:
        # A folder has one array of images: whatever an input is fed from it, it is that.
        return self._inputs[name].array or ("image" if isinstance(self._source, Folder) else name)

    def _names(self) -> list[str]:
        names = [self._array(i) for i in self._inputs]
        return list(dict.fromkeys(names if self._label is None else [*names, self._label]))

    def _check_some(self, found: int) -> None:
        if not found:
            raise BadInput(f"data {self.name!r} have no sample from start={self.spec.start} on")

    @property
    def streamed(self) -> bool:
        """True when the samples come from a function, so that to ask for their number is to count them."""
        return isinstance(self._source, Function)

    @property
    def labelled(self) -> bool:
        return self._label is not None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what is fed: content identity of the source, the spec, which samples in which order."""
        how = self.spec.model_dump(exclude={"source", "inputs", "start", "limit", "shuffle", "metric"})
        how["inputs"] = {i: self.spec.of_input(i).model_dump() for i in sorted(self.spec.inputs)}
        digest = hashlib.sha256(json.dumps(how, sort_keys=True).encode() + self._source.identity.encode())
        digest.update(repr(self._rows).encode() if isinstance(self._rows, range) else self._rows.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def rows(self) -> Rows:
        """Indices of the samples in the source, in order. The samples of a function have to be counted for it."""
        if not isinstance(self._source, Function) or not isinstance(self._rows, range):
            return self._rows
        count = self._source.count(self._names(), None if self._rows.stop == sys.maxsize else self._rows.stop)
        rows = range(min(self._rows.start, count), min(self._rows.stop, count), self._rows.step)
        self._check_some(len(rows))
        return rows

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` samples, the last one smaller. Before `for_model` the feeds are named as in the spec.

        Raises:
            BadInput: an image or array cannot be read or prepared as the spec says; NaN or infinity.
        """
        if size < 1:
            raise BadInput(f"batches of {size} samples: allowed is 1 or more")
        done = 0
        for chunk in self._chunks(size):
            feeds = {name: self._feed(name, chunk[self._array(name)], done) for name in self._inputs}
            yield Batch(feeds, None if self._label is None else np.asarray(chunk[self._label]))
            done += len(next(iter(chunk.values())))
        self._check_some(done)

    def _chunks(self, size: int) -> Iterator[dict[str, Any]]:
        if self._mixed is None:
            yield from self._source.chunks(self._rows, size, self._names())
            return
        rng = np.random.default_rng(self._mixed)
        for chunk in self._source.chunks(self._rows, max(MIXED // size, 1) * size, self._names()):
            order = rng.permutation(len(next(iter(chunk.values()))))
            for begin in range(0, len(order), size):
                yield {name: array[order[begin : begin + size]] for name, array in chunk.items()}

    def _feed(self, name: str, raw: Any, offset: int) -> np.ndarray:
        how, info, where = self._inputs[name], self._infos.get(name), f"data {self.name!r}, input {name!r}"
        if isinstance(raw, list) and info is not None and info.shape is not None and info.shape[1:2] == (1,):
            raw = [np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in raw]  # the model sees grey
        array = prepare(raw, how, where)
        if info is not None and _takes_channels_last(info.shape, array.shape):
            array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        if how.dtype is not None:
            array = array.astype(how.dtype)
        if info is not None:
            array = cast(array, info, where)
        if array.dtype.kind not in "biu" and not np.isfinite(array).all():
            bad = offset + int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
            raise BadInput(f"{where}: sample {bad} holds NaN or infinity")
        return array

    def first(self, n: int) -> Data:
        """The first n samples (all, where there are fewer)."""
        return self._with(self._rows[: max(n, 0)], f"first {n}")

    def shuffled(self, seed: int) -> Data:
        """The same samples in another order; those of a function are mixed within stretches of `MIXED`."""
        if not self.streamed:
            return self._with(np.random.default_rng(seed).permutation(self.rows), None)
        other = self._with(self._rows, None)
        other._mixed = seed
        return other

    def split(self, share: float | Literal["parity"] = "parity") -> tuple[Data, Data]:
        """Two parts without a common sample: even and odd ones, or a share evenly spread over the data, and the rest.

        Spread, because stored data are often sorted by class.
        """
        if share == "parity":
            return self._with(self._rows[0::2], "even"), self._with(self._rows[1::2], "odd")
        if not 0 < share < 1:
            raise BadInput(f"data {self.name!r}: cannot split off a share of {share}: allowed is 0 < share < 1")
        rows = np.asarray(self.rows)
        steps = np.floor(np.arange(len(rows) + 1) * share + 1e-9)
        taken = steps[1:] > steps[:-1]
        return self._with(rows[taken], f"share {share:g}"), self._with(rows[~taken], f"rest of {share:g}")

    def _with(self, rows: Rows, what: str | None) -> Data:
        if not len(rows):
            raise BadInput(f"data {self.name!r} have too few samples to take '{what}' of them")
        other = copy.copy(self)
        for key in ("digest", "rows"):  # cached, and not true of other samples
            other.__dict__.pop(key, None)
        other._rows, other.name = rows, f"{self.name} ({what})" if what else self.name
        return other

    def overlap(self, other: Data) -> int:
        """Number of samples that both hold: the same samples of the same content, however it is fed."""
        mine, its = ({d._array(i) for i in d._inputs} for d in (self, other))
        if self._source.identity != other._source.identity or not mine & its:
            return 0
        return len(np.intersect1d(np.asarray(self.rows), np.asarray(other.rows)))

    def for_model(self, model: Model) -> Data:
        """The same samples, fed as this model takes them: inputs found by name, or the only one; dtypes cast.

        Raises:
            BadInput: names, shape or dtype of the first sample do not fit the model's inputs.
        """
        infos = {info.name: info for info in model.inputs}
        bound = self._with(self._rows, None)
        if self.spec.inputs or set(infos) <= set(self._inputs):
            bound._inputs = {i: how for i, how in self._inputs.items() if i in infos or self.spec.inputs}
        elif len(infos) == 1 and len(self._inputs) == 1:
            bound._inputs = dict(zip(infos, self._inputs.values(), strict=True))
        if set(bound._inputs) != set(infos):
            raise BadInput(
                f"data {self.name!r} feed {', '.join(bound._inputs) or 'nothing'}; the model takes {', '.join(infos)}: "
                "name the array of each input with inputs: {input: array}"
            )
        bound._infos = infos
        sample = next(bound.batches(1)).feeds
        for name, info in infos.items():
            _check_shape(sample[name].shape[1:], info, f"data {self.name!r}")
        return bound


def _takes_channels_last(taken: tuple[int | str | None, ...] | None, made: tuple[int, ...]) -> bool:
    """Whether images [N, C, H, W] were made for a model that takes [N, H, W, C], as TensorFlow's do."""
    if taken is None or len(taken) != 4 or len(made) != 4 or made[1] not in (1, 3, 4):
        return False
    return taken[3] == made[1] and taken[1] != made[1]


def _check_shape(found: tuple[int, ...], info: TensorInfo, where: str) -> None:
    if info.shape is None:
        return
    taken = info.shape[1:]
    fits = len(found) == len(taken) and all(t == f for t, f in zip(taken, found, strict=True) if isinstance(t, int))
    if not info.shape or not fits:
        words = ", ".join("?" if t is None else str(t) for t in taken) + ("," if len(taken) == 1 else "")
        raise BadInput(
            f"{where} give samples of shape {found}; the model's input {info.name!r} takes ({words}): "
            "check layout, resize, crop"
        )


def open_data(spec: str | Path | Mapping[str, Any] | DataSpec | Data) -> Data:
    """Open data: `file.yaml`, `file.npz`, a folder or `module:function`, each with overrides `{limit=256}`; or a spec.

    Paths in a YAML file are relative to it, others to the current folder.

    Raises:
        BadInput: the spec, or what it names, cannot be used.
    """
    if isinstance(spec, Data):
        return spec
    if isinstance(spec, DataSpec):
        return _open(spec, Path(), _short(spec.source))
    if isinstance(spec, Mapping):
        return _open(make_spec(spec, "the data spec"), Path(), _short(spec.get("source")))
    text = os.fspath(spec)
    path, overrides = (text, {}) if os.path.exists(text) else split_spec(text)
    values, folder = {"source": path}, Path()
    if path.lower().endswith((".yaml", ".yml")):
        values, folder = _read_yaml(Path(path)), Path(path).parent
    shown = {k: v for k, v in overrides.items() if k in ("start", "limit", "shuffle")}
    name = _short(path) + (format_value(shown) if shown else "")
    return _open(make_spec({**values, **overrides}, f"data {text!r}"), folder, name)


def _open(spec: DataSpec, folder: Path, name: str) -> Data:
    if spec.metric is not None and spec.metric not in METRICS and not is_function(spec.metric):
        raise BadInput(f"data {name!r}: metric {spec.metric!r}: allowed are {', '.join(METRICS)}, module:function")
    return Data(spec, open_source(spec, folder), folder, name)


def _short(source: Any) -> str:
    text = source if isinstance(source, str | Path) else getattr(source, "__name__", "data")
    return Path(text).name.removesuffix(".yaml").removesuffix(".yml").removesuffix(".npz") or str(text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"there is no data file {str(path)!r}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read the data file {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BadInput(f"the data file {str(path)!r} holds no map of keys such as source, inputs, labels")
    return content


def padded(feeds: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """The last sample repeated up to the batch."""
    return {name: np.concatenate([a, np.repeat(a[-1:], batch - len(a), axis=0)]) for name, a in feeds.items()}


def unpadded(outputs: Mapping[str, np.ndarray], count: int, batch: int | None) -> dict[str, np.ndarray]:
    """Outputs of the samples alone; one whose first axis is not the batch stays whole."""
    arrays = {name: np.asarray(output) for name, output in outputs.items()}
    return {name: a[:count] if a.ndim and a.shape[0] == batch else a for name, a in arrays.items()}
