"""The `effc` command. Exit status: 0 done, 1 a pass failed, 2 bad input, 3 a stated requirement was not met.

What `check-tensorrt` is asked about is such a requirement: a model that breaks a rule ends with 3.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import effc
from effc import api, cli_calibrate, cli_check, cli_inspect, cli_recover, registry
from effc.cli_options import (
    Debug,
    Dims,
    Evaluate,
    Foreign,
    Quiet,
    TargetName,
    Teachers,
    Threads,
    Train,
    bars,
    check_output,
    sizes,
)
from effc.cost import cost
from effc.data import open_data
from effc.errors import BadInput, EffcError, RequirementNotMet
from effc.evaluate import evaluate
from effc.history import Accuracy, History, Snapshot
from effc.measure import compare as compare_latency
from effc.model import Model
from effc.recipe import load_recipe, options
from effc.report import report, totals, write_html
from effc.shapes import stored_size

# typer carries click under its own name or, in older releases, imports it: this is its base of usage errors.
UsageError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=effc.__doc__)

Batch = Annotated[int | None, typer.Option(min=1, help="Samples an inference when measuring", show_default="1")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version")] = False) -> None:
    if version:
        typer.echo(effc.__version__)
        raise typer.Exit


@app.command()
def optimize(
    model: Annotated[Path, typer.Argument(help="An .onnx or .pt2 file")],
    passes: Annotated[str | None, typer.Option(help="Recipe", show_default=api.DEFAULT_PASSES)] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe as a YAML file")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Data to look at activations with")] = None,
    evaluate: Evaluate = None,
    train: Train = None,
    teacher: Teachers = None,
    max_drop: Annotated[float | None, typer.Option(min=0, help="Points to lose at most", show_default="1")] = None,
    min_speedup: Annotated[float | None, typer.Option(min=0, help="Required speed over the original")] = None,
    max_size: Annotated[float | None, typer.Option(min=0, help="Required size, a share of the original's")] = None,
    goal: Annotated[str, typer.Option(help="What must fall: " + ", ".join(api.GOALS))] = "latency",
    target: TargetName = None,
    foreign_target: Foreign = False,
    batch: Batch = None,
    threads: Threads = 1,
    dim: Dims = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random")] = 0,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time models on the runtime")] = True,
    force: Annotated[bool, typer.Option("--force", help="Keep and write what does not pay")] = False,
    replay: Annotated[Path | None, typer.Option(help="Take over the decisions of this JSON report")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write", show_default="MODEL-effc.onnx")
    ] = None,
    external: Annotated[bool, typer.Option("--external-data", help="Weights in a file of their own")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report here as JSON")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report here as one HTML page")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite MODEL with passes; keep what is right, accurate enough and pays."""
    if passes is not None and recipe is not None:
        raise BadInput("give --passes or --recipe, not both")
    destination = output or model.with_name(f"{model.stem}-effc.onnx")
    check_output(destination, model)
    for path in (json, html):
        if path is not None:
            check_output(path, model)
    told = None if replay is None else History.from_json(_read(replay))
    unmet = None
    with bars(quiet) as progress:
        try:
            result = api.optimize(
                model,
                load_recipe(recipe) if recipe else passes or (told.recipe if told else api.DEFAULT_PASSES),
                calibrate=calibrate,
                evaluate=evaluate,
                train=train,
                teachers=teacher or (),
                max_drop=max_drop,
                min_speedup=min_speedup,
                max_size=max_size,
                goal=goal,
                target_name=target,
                foreign_target=foreign_target,
                batch=batch,
                dims=sizes(dim),
                threads=threads,
                measure=measure,
                force=force,
                seed=seed,
                replay=told,
                progress=progress,
            )
        except RequirementNotMet as error:
            unmet, result = error, error.result
        if unmet is None or force:
            effc.save(result.model, destination, external=external or None)
    history = result.history
    if not quiet:
        console = Console()
        console.print(report(history))
        if unmet is None or force:
            console.print(f"written: {destination}", soft_wrap=True)
    if json is not None:
        json.write_text(history.to_json(), encoding="utf-8")
    if html is not None:
        write_html(history, html)
    if unmet is not None:
        raise unmet


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="An .onnx or .pt2 file")],
    b: Annotated[Path, typer.Argument(help="Another, with the same inputs")],
    evaluate: Evaluate = None,
    batch: Batch = None,
    threads: Threads = 1,
    dim: Dims = None,
    seed: Annotated[int, typer.Option(help="Seed of inputs that are made up")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Set two models beside each other: accuracy, agreement, size, MACs, latency measured in turns."""
    with bars(quiet) as progress:
        before, after, latency = _compared(a, b, evaluate, batch, threads, sizes(dim), seed, progress)
    table = Table("", a.name, b.name, "ratio")
    for row in totals(before, after, latency):
        table.add_row(*row)
    Console().print(table)


app.command()(cli_inspect.inspect)
app.command()(cli_calibrate.calibrate_target)
app.command()(cli_recover.recover)
app.command()(cli_check.check_tensorrt)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its options")] = None,
    debug: Debug = False,
) -> None:
    """List the passes, or the options of one."""
    console = Console()
    if name is None:
        table = Table("pass", "kind", "what it does")
        for known in registry.pass_names():
            cls = registry.pass_class(known)
            table.add_row(known, "exact" if cls.exact else "lossy", (cls.__doc__ or "").strip().splitlines()[0])
        console.print(table)
        return
    cls = registry.pass_class(name)
    console.print((cls.__doc__ or "").strip())
    table = Table("option", "type", "default", "meaning")
    for option in options(cls):
        table.add_row(option.name, option.type_text, option.default or "", option.description)
    console.print(table)


def _compared(a, b, evaluate_on, batch, threads, dims, seed, progress):
    first, second = effc.load(a), effc.load(b)
    inputs = [", ".join(f"{t.name} {t.dtype} {_shown(t.shape)}" for t in m.inputs) for m in (first, second)]
    if inputs[0] != inputs[1]:
        raise BadInput(f"the models take different inputs and cannot be compared: {inputs[0]} and {inputs[1]}")
    backend = registry.backend("onnxruntime")
    batch = first.batch or second.batch or 1 if batch is None else batch
    data = None if evaluate_on is None else open_data(evaluate_on).for_model(first)
    feeds = api.real_feeds(first, batch, dims, data, seed)
    scores: dict[str, Accuracy | None] = {"a": None, "b": None}
    if data is not None:
        sessions = {"a": backend.session(first, threads=threads), "b": backend.session(second, threads=threads)}
        found = evaluate(sessions, data, batch=first.batch or second.batch, reference="a", progress=progress)
        scores = {key: Accuracy.of(score, found["a"]) for key, score in found.items()}
    latency = compare_latency(first, second, feeds, backend=backend, threads=threads, seed=seed, progress=progress)
    snapshots = [
        Snapshot(cost(m, batch, dims).total, _file_size(m_path, m), len(m.graph), scores[key])
        for m, m_path, key in ((first, a, "a"), (second, b, "b"))
    ]
    return *snapshots, latency


def _file_size(path: Path, model: Model) -> int:
    """Bytes; for a .pt2 file those of the ONNX file that it would make."""
    return stored_size(model) if path.suffix == ".pt2" else path.stat().st_size


def _shown(shape: tuple[int | str | None, ...] | None) -> str:
    """A shape whose dynamic dimensions are alike whatever they are called."""
    return "of any rank" if shape is None else "x".join(str(d) if isinstance(d, int) else "?" for d in shape)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def main() -> None:
    """Run the command; every error is one line on standard error."""
    try:
        # What typer ends by itself, it returns the status of: 130 for an interrupt.
        if status := app(standalone_mode=False):
            sys.exit(status)
    except typer.Abort:
        sys.exit(130)
    except (UsageError, EffcError) as error:
        if "--debug" in sys.argv:
            raise
        usage = isinstance(error, UsageError)
        message = error.format_message() if usage else str(error)
        print("effc: error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2 if usage else error.status)
