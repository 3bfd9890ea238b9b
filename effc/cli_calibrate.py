"""`effc calibrate-target`: measures this machine, for `effc inspect` and `effc optimize` to predict with."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from effc import registry
from effc.calibrate import SECONDS, calibrate
from effc.cli_options import Debug, Quiet, bars
from effc.errors import BadInput
from effc.save import check_place, save_text
from effc.target import Target, calibrated_file
from effc.targetfile import to_json

LEAST_SECONDS = 1


def calibrate_target(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write", show_default="where effc looks first")
    ] = None,
    seconds: Annotated[float, typer.Option(help="To measure; less makes predictions less sure")] = SECONDS,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure onnxruntime's kernels on this machine, which should do nothing else, and keep what they take."""
    if not LEAST_SECONDS <= seconds < math.inf:
        raise BadInput(f"--seconds {seconds:g}: it takes at least {LEAST_SECONDS}; {SECONDS:g} is usual")
    destination = _destination(output)
    with bars(quiet) as progress:
        found = calibrate(registry.backend("onnxruntime"), seconds=seconds, progress=progress)
    save_text(to_json(found), destination)
    if not quiet:
        _tell(found, destination, seconds, at_home=output is None)


def _destination(output: Path | None) -> Path:
    """Where to write; what would be in the way is told before minutes are spent. Raises BadInput."""
    path = calibrated_file() if output is None else output
    if output is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{path.parent} cannot be made: {error.strerror}; choose a file with -o") from error
    check_place(path)
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"{path.parent} cannot be written to; choose a file elsewhere with -o")
    return path


def _tell(found: Target, path: Path, seconds: float, *, at_home: bool) -> None:
    console = Console()
    types = list(dict.fromkeys(dtype for roof in found.roofs.values() for dtype in roof.macs))
    table = Table("threads", *(f"{dtype}, GMAC/s" for dtype in types), "memory, GB/s", "kernels measured", "kinds")
    for column in table.columns:
        column.justify = "right"
    for threads, roof in found.roofs.items():
        peaks = (f"{roof.macs[dtype] / 1e9:.1f}" if dtype in roof.macs else "" for dtype in types)
        kinds = found.kernels.get(threads, {})
        rows = sum(len(samples.rows) for samples in kinds.values())
        table.add_row(str(threads), *peaks, f"{roof.bandwidth / 1e9:.1f}", f"{rows:,}", str(len(kinds)))
    less = f"measured for {seconds:g} s, not {SECONDS:g}: predictions will be less sure than they could be"
    use = "from now on" if at_home else f"with --target {path}"
    above = [f"{found.processor}; {found.runtime} {found.runtime_version}", found.source]
    below = [*([less] if seconds < SECONDS else []), f"written: {path}", f"effc inspect and effc optimize use it {use}"]
    for part in ("\n".join(above), table, "\n".join(below)):
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
