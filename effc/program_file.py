"""Reads .pt2 files, the archives of torch.export, and runs no code that they bring along.

Torch's own reader unpickles some records, loads shared libraries, and evaluates the text of sizes. So what an archive
holds is looked at before.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effc.errors import BadInput

_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Sizes: numbers, symbols, and functions of sympy and torch, which begin with a capital: Mul(Integer(2), Symbol('s77'))
_SIZE = re.compile(r"(?:[A-Z]\w*\(|[A-Za-z]\w*(?!\w|\s*\()|'[A-Za-z]\w*'|\d+(?:\.\d+)?|[\s()+\-*/%,<>=|&~])*")


def read_program(torch: Any, path: Path) -> Any:
    """The `torch.export.ExportedProgram` in a file. Raises BadInput: not one, damaged, or with code inside."""
    if not path.is_file():
        raise BadInput(f"{path} does not exist" if not path.exists() else f"{path} is a folder; a .pt2 file is needed")
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a .pt2 file, or it is truncated ({error})") from error
    try:
        with _weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:  # what a damaged archive makes torch raise is not told
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} cannot be read by torch {torch.__version__}: {said}") from error


def _check(archive: zipfile.ZipFile, path: Path) -> None:
    names = archive.namelist()
    inner = {name.partition("/")[2]: name for name in names}
    if "models/model.json" not in inner:
        raise BadInput(
            f"{path} is not a .pt2 file as torch.export.save of torch 2.8 or newer writes: no models/model.json"
        )
    if code := [name for name in inner if name.startswith("data/aotinductor/") or name.endswith((".so", ".py"))]:
        raise BadInput(f"{path} holds compiled code ({code[0]}); a program of torch.export.save is needed")
    for name in inner:
        if re.fullmatch(r"data/(weights|constants)/.*\.json", name):
            for key, entry in json.loads(archive.read(inner[name]))["config"].items():
                kind = "tensor_" if "/constants/" in name else "weight_"
                if entry.get("use_pickle") or not entry["path_name"].startswith(kind):
                    raise BadInput(f"{path} holds a pickled object ({key}), which is not read as it may run code")
        elif re.fullmatch(r"models/.*\.json", name):
            for text in _sizes(json.loads(archive.read(inner[name]))):
                if "__" in text or not _SIZE.fullmatch(text):
                    raise BadInput(f"{path} holds a size that is no arithmetic: {text[:60]!r}")


def _sizes(item: Any) -> Iterator[str]:
    """Every `expr_str`: torch evaluates these."""
    waiting = [item]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if isinstance(text := item.get("expr_str"), str):
                yield text
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


@contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch unpickle tensors and nothing else, also where it would otherwise try again without that limit."""
    before, level = os.environ.get(_SAFE), logging.root.manager.disable
    os.environ[_SAFE] = "1"
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(level)
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before
