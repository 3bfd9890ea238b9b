"""Targets as files: JSON that a person can read, one line a measured kernel, with a version."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel, PositiveInt, ValidationError

from effc import kernels
from effc.errors import BadInput
from effc.predict import design
from effc.target import Roof, Samples, Target, onnxruntime_kernels, tensorrt_kernels

FORMAT = 1
TEXTS = ("name", "runtime", "device", "origin", "source", "processor", "runtime_version")
ZERO = {"act", "sum", "broadcast", "level", *kernels.COMMON}  # numbers of a row that may be 0


class _File(BaseModel, extra="forbid"):
    """What a target file holds."""

    effc_target: Literal[1]
    name: str
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-fp16"]
    device: Literal["cpu", "gpu"]
    origin: Literal["published", "measured"]
    source: str
    processor: str = ""
    runtime_version: str = ""
    flags: frozenset[str]
    cache: int
    roofs: dict[PositiveInt, Roof]
    kernels: dict[PositiveInt, dict[str, Samples]] = {}


def from_json(text: str | bytes, where: str) -> Target:
    """Read a target file. Raises BadInput naming the place that is wrong."""
    try:
        file = _File.model_validate_json(text)
        unknown = file.device == "gpu" and not file.roofs  # any of them: then nothing is predicted
        if not unknown and not (file.roofs and all(_stands(roof) for roof in file.roofs.values())):
            raise BadInput(
                f"{where} has no roofs, or one without rates above 0 for float32 and main memory;"
                " write a target file with effc calibrate-target"
            )
        for threads, kinds in file.kernels.items():
            for kind, samples in kinds.items():
                _check(kind, samples, threads, where)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BadInput(
            f"{where} is no target file of this version of effc: {place}: {first['msg']};"
            " write one with effc calibrate-target"
        ) from error
    integer = onnxruntime_kernels(file.flags) if file.runtime == "onnxruntime" else tensorrt_kernels()
    fields = {name: getattr(file, name) for name in (*TEXTS, "flags", "cache", "roofs", "kernels")}
    return Target(integer=integer, **fields)


def _stands(roof: Roof) -> bool:
    return "float32" in roof.macs and min(*roof.macs.values(), roof.bandwidth) > 0


def _check(kind: str, samples: Samples, threads: int, where: str) -> None:
    """Raises BadInput where a table is not one that this version of effc writes."""
    columns = samples.columns
    dims = kernels.columns(dict.fromkeys(columns, 1.0))
    wanted = (*dims, "us") if threads == 1 else (*dims, "us_alone", "us")
    if columns != wanted:
        raise BadInput(
            f"{where}: {kind} has the columns {', '.join(columns)}, and this version of effc takes {', '.join(wanted)}"
            f" with {threads} thread{'s' * (threads > 1)}: write the file anew with effc calibrate-target"
        )
    if any(len(row) != len(columns) for row in samples.rows) or not samples.rows:
        raise BadInput(
            f"{where}: {kind} has a row of another length than its {len(columns)} columns, or none at all:"
            " write the file anew with effc calibrate-target"
        )
    for row in samples.rows:
        for name, number in zip(columns, row, strict=True):
            if not (0 < number < math.inf or (number == 0 and name in ZERO)):
                raise BadInput(
                    f"{where}: {kind} has a kernel whose {name} is {number:g}:"
                    " write the file anew with effc calibrate-target"
                )
    terms, features = (part.shape[1] for part in design(columns, samples.rows[:1], kind)[:2])
    if len(samples.fit.terms) != terms or len(samples.fit.lengths) not in (0, features):
        raise BadInput(
            f"{where}: {kind} was fitted by another version of effc: write the file anew with effc calibrate-target"
        )


def to_json(target: Target) -> str:
    """As a file holds it."""
    head = {
        "effc_target": FORMAT,
        **{name: getattr(target, name) for name in TEXTS},
        "flags": sorted(target.flags),
        "cache": target.cache,
        "roofs": {str(n): asdict(roof) for n, roof in target.roofs.items()},
    }
    parts = []
    for threads, kinds in target.kernels.items():
        tables = ",\n".join(f"   {json.dumps(kind)}: {_table(samples)}" for kind, samples in kinds.items())
        parts.append(f'  "{threads}": {{\n{tables}\n  }}')
    return json.dumps(head, indent=1)[:-2] + ',\n "kernels": {\n' + ",\n".join(parts) + "\n }\n}\n"


def _table(samples: Samples) -> str:
    rows = ",\n".join("     " + json.dumps([_short(x, 6) for x in row]) for row in samples.rows)
    found = asdict(samples.fit).items()
    fit = {k: [_short(x, 5) for x in v] if isinstance(v, tuple) else _short(v, 5) for k, v in found}
    return f'{{\n    "fit": {json.dumps(fit)},\n    "columns": {json.dumps(samples.columns)},\n    "rows": [\n{rows}]}}'


def _short(number: float, digits: int) -> float:
    """Without digits that say nothing."""
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded == int(rounded) else rounded
