"""What several commands share: options, the reading of those that are texts, and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from effc.contract import Progress, no_progress
from effc.errors import BadInput

TargetName = Annotated[str | None, typer.Option("--target", help="Name or file", show_default="this machine")]
Foreign = Annotated[bool, typer.Option("--foreign-target", help="Accept a target measured on another machine")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the runtime")]
Dims = Annotated[list[str] | None, typer.Option("--dim", help="Size of a symbolic dimension, name=value")]
Evaluate = Annotated[str | None, typer.Option(help="Data to judge accuracy on: SPEC.yaml{key=value,...}")]
Train = Annotated[str | None, typer.Option(help="Data to train on, for passes that do")]
Teachers = Annotated[
    list[Path] | None, typer.Option("--teacher", help="Model to learn from; several: their mean", show_default="MODEL")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]


def sizes(texts: list[str] | None) -> dict[str, int]:
    """name=value, as --dim takes it. Raises BadInput."""
    dims = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if not name or not value.isdigit() or int(value) < 1:
            raise BadInput(f"--dim {text}: it takes name=value with a whole number, as in --dim sequence=128")
        dims[name] = int(value)
    return dims


@contextmanager
def bars(quiet: bool) -> Iterator[Progress]:
    """Progress bars on standard error, when a person is there to see them."""
    if quiet or not sys.stderr.isatty():
        yield no_progress
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as shown:

        def start(what: str, total: int | None = None) -> Callable[[int], None]:
            for finished in [task.id for task in shown.tasks]:
                shown.remove_task(finished)
            task = shown.add_task(what, total=total)
            return lambda steps: shown.advance(task, steps)

        yield start


def check_output(path: Path, model: Path) -> None:
    """Refuse, before work is done, a file that cannot be written or would replace the input. Raises BadInput."""
    if not path.parent.is_dir():
        raise BadInput(f"the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise BadInput(f"{path} is a folder; a file name is needed")
    if path.resolve() == model.resolve():
        raise BadInput(f"{path} is the input itself; choose another output")
