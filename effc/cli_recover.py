"""`effc recover`: trains a rewritten model towards the one it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from effc.cli_options import Debug, Evaluate, Quiet, Teachers, Threads, bars, check_output
from effc.recipe import build, parse
from effc.recover import Recover, Recovered, train
from effc.save import save


def recover(
    model: Annotated[Path, typer.Argument(help="An .onnx file")],
    data: Annotated[str, typer.Option("--train", help="Data to train on: SPEC.yaml{key=value,...}")],
    teacher: Teachers = None,
    options: Annotated[
        str, typer.Option(help="Of the pass, as in a recipe: 'epochs=3, augment=flip' (effc passes recover)")
    ] = "",
    evaluate: Evaluate = None,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write", show_default="MODEL-recovered.onnx")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train MODEL towards the outputs of its teachers, and labels where the data have them."""
    destination = output or model.with_name(f"{model.stem}-recovered.onnx")
    check_output(destination, model)
    (how,) = build(parse(f"recover{{{options}}}" if options else "recover"))
    assert isinstance(how, Recover)
    with bars(quiet) as progress:
        found = train(
            model, how, data=data, teachers=teacher or (), evaluate_on=evaluate, threads=threads, seed=seed,
            progress=progress,
        )  # fmt: skip
    save(found.model, destination)
    if not quiet:
        _tell(found, destination)


def _tell(found: Recovered, path: Path) -> None:
    console = Console()
    for note in found.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if found.scores:
        table = Table("", *found.scores)
        metric = next(iter(found.scores.values())).metric
        table.add_row(metric, *(f"{score.points:.2f}" for score in found.scores.values()))
        if all(score.agreement is not None for score in found.scores.values()):
            table.add_row("agreement, %", *(f"{100 * (s.agreement or 0):.2f}" for s in found.scores.values()))
        table.add_row("damage", *(f"{score.damage:.4g}" for score in found.scores.values()))
        console.print(table)
    console.print(f"written: {path}", soft_wrap=True)
