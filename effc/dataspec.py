"""What a data spec may say, and how it is told that a key or value is not allowed."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from effc.errors import BadInput

METRICS = ("top1", "top5", "agreement", "sqnr", "cosine", "kl")


# Numbers are strict: no text is read as a number, no flag either.
_Positive = Annotated[int, Field(gt=0, strict=True)]
_Natural = Annotated[int, Field(ge=0, strict=True)]
_Side = _Positive | tuple[_Positive, _Positive]
_Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
_Numbers = _Number | Annotated[tuple[_Number, ...], Field(min_length=1)]


def _no_zero(value: Any) -> Any:
    if value is not None and 0 in np.atleast_1d(value):
        raise ValueError("it divides, so it must not be 0")
    return value


_Divisor = Annotated[_Numbers | None, pydantic.AfterValidator(_no_zero)]


class How(pydantic.BaseModel):
    """How stored samples are fed: (crop(resize(x)) / scale - mean) / std, images in NCHW."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    dtype: str | None = Field(default=None, description="a NumPy type to cast to, at last")
    layout: Literal["NCHW", "NHWC", "NHW"] | None = Field(default=None, description="NCHW (default), NHWC or NHW")
    scale: _Divisor = Field(default=None, description="a number, or a list of one per channel, to divide by")
    mean: _Numbers | None = Field(default=None, description="a number, or a list of one per channel, then subtracted")
    std: _Divisor = Field(default=None, description="a number, or a list of one per channel, to divide by then")
    resize: _Side | None = Field(default=None, description="n (the shorter side) or [height, width], each > 0")
    crop: _Side | None = Field(default=None, description="n or [height, width] of the centre, each > 0")

    @pydantic.field_validator("dtype")
    @classmethod
    def _is_dtype(cls, value: str | None) -> str | None:
        try:
            return value if value is None else np.dtype(value).name
        except TypeError as error:
            raise ValueError("allowed are NumPy types such as int64, float32, bool") from error


class InputSpec(How):
    """How one input is fed; what is not given here is taken from the spec."""

    array: str | None = Field(default=None, description="name of a stored array")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"array": value} if isinstance(value, str) else value


class DataSpec(How):
    """What data there are and how they are fed. The keys of a data YAML file; each can be overridden inline."""

    source: str | dict[str, np.ndarray] | Callable[[], Iterator[Mapping[str, np.ndarray]]] = Field(
        description=".npz file, folder of images, or module:function / file.py:function that yields batches"
        " (Python: the function, or a dict of arrays)"
    )
    inputs: dict[str, InputSpec] = Field(default={}, description="a map of model input to array, or to its own keys")
    labels: str | None = Field(default=None, description="name of an array, or of a csv file in a folder")
    shuffle: _Natural | None = Field(default=None, description="a seed >= 0, applied before start and limit")
    start: _Natural = Field(default=0, description="the first sample, an integer >= 0")
    limit: _Positive | None = Field(default=None, description="the number of samples, an integer > 0")
    metric: str | None = Field(default=None, description=f"one of {', '.join(METRICS)}, or module:function")

    def of_input(self, name: str) -> InputSpec:
        """The complete keys of one input: its own before the spec's."""
        own = self.inputs.get(name, InputSpec())
        common = {key: getattr(self, key) for key in How.model_fields}
        return InputSpec(**(common | own.model_dump(exclude_unset=True)))


def make_spec(values: Mapping[str, Any], where: str) -> DataSpec:
    values = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in values.items()}
    try:
        return DataSpec.model_validate(values)
    except pydantic.ValidationError as error:
        raise BadInput(f"{where}: {_first_error(error, values)}") from error


def _first_error(error: pydantic.ValidationError, values: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    inner = path[0] == "inputs" and len(path) > 2
    key, fields = (path[2], InputSpec.model_fields) if inner else (path[0], DataSpec.model_fields)
    where = ".".join(path[:3] if inner else path[:1])
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, fields, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"there is no key {where!r}{hint}: allowed are {', '.join(fields)}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing: it is a {fields[key].description}"
    reason = first["msg"].removeprefix("Value error, ") if first["type"] == "value_error" else fields[key].description
    value = first["input"] if inner else values.get(key)
    return f"{where}: {value!r} is not allowed: {reason}"
