"""`effc inspect`: what a model costs on a target, before anything is changed or run."""

from __future__ import annotations

import json as jsons
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from effc import registry
from effc import target as targets
from effc.capture import load
from effc.channels_report import channels_table
from effc.cli_options import Debug, Dims, Foreign, TargetName, Threads, sizes
from effc.cost import cost
from effc.errors import BadInput
from effc.inspection import Inspection, stated_batch
from effc.inspection import compare as compare_inspections
from effc.inspection import inspect as inspect_model
from effc.inspection_data import as_csv, as_data, comparison_csv, comparison_data, training_data
from effc.inspection_report import comparison_table, table, training_table
from effc.model import Model
from effc.predict import predict
from effc.target import Target
from effc.training import Training, convolutional_flops, training_cost, transformer_flops

WIDTH = 120  # of what goes to a file or a pipe


def inspect(
    model: Annotated[Path | None, typer.Argument(help="An .onnx or .pt2 file")] = None,
    other: Annotated[Path | None, typer.Argument(help="Another, to set beside it")] = None,
    target: TargetName = None,
    foreign_target: Foreign = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples an inference", show_default="the model's, or 1")
    ] = None,
    threads: Threads = 1,
    dim: Dims = None,
    top: Annotated[int | None, typer.Option(min=0, help="Layers to show, 0 for all", show_default="20")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object; all layers unless --top")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the layers as CSV; all unless --top")] = False,
    channels: Annotated[
        bool, typer.Option("--channels", help="Which channels live and die together, and which cannot be removed")
    ] = False,
    training: Annotated[bool, typer.Option("--training", help="What it takes to train the model")] = False,
    samples: Annotated[
        float | None, typer.Option(help="Samples to train a convolutional network on, epochs x data")
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train a transformer on")] = None,
    parameters: Annotated[float | None, typer.Option(help="Parameters of a transformer without a file")] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the peak that training reaches, such as 0.4")
    ] = None,
    peak: Annotated[float | None, typer.Option(help="FLOP/s of a device", show_default="the target's")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Devices that train at once", show_default="1")] = None,
    price: Annotated[float | None, typer.Option(help="Dollars for a device and an hour")] = None,
    debug: Debug = False,
) -> None:
    """Tell where the time, energy and bytes of MODEL go, layer by layer, as predicted for a target."""
    if json and csv:
        raise BadInput("give --json or --csv, not both")
    plan = {"samples": samples, "tokens": tokens, "parameters": parameters, "utilisation": utilisation}
    plan |= {"peak": peak, "devices": devices, "price": price}
    _check(model, other, training, csv, plan)
    if channels:
        if model is None or other is not None or json or csv or training:
            raise BadInput("--channels takes one model and prints a table: leave out --json, --csv and --training")
        _console().print(channels_table(load(model), top))
        return
    dims = sizes(dim)
    aim = targets.find(target, foreign=foreign_target)
    models = [load(path) for path in (model, other) if path is not None]
    found = [_inspected(one, aim, batch, dims, threads) for one in models]
    effort = _effort(models, found, aim, threads, plan) if training else None
    if json:
        data = _data(found, top or 0) | ({} if effort is None else {"training": training_data(effort)})
        typer.echo(jsons.dumps(data, indent=1))
    elif csv:
        one_or_both = as_csv(found[0], top or 0) if len(found) == 1 else _compared_csv(found, top or 0)
        typer.echo(one_or_both, nl=False)
    else:
        _print(found, effort, top)


def _check(model: Path | None, other: Path | None, training: bool, csv: bool, plan: Mapping[str, float | None]) -> None:
    """Which options go together. Raises BadInput."""
    given = [name for name, value in plan.items() if value is not None]
    if not training:
        if model is None:
            raise BadInput("an .onnx or .pt2 file is needed, or --training with --parameters and --tokens")
        if given:
            raise BadInput(f"--{given[0]} belongs to --training; give that too")
        return
    if other is not None or csv:
        raise BadInput("--training takes one model, and prints a table or --json")
    if plan["utilisation"] is None:
        raise BadInput("--training needs --utilisation, the share of the peak that is reached: 0.2 to 0.5 is usual")
    if (plan["samples"] is None) == (plan["tokens"] is None):
        raise BadInput("--training needs --samples (convolutional networks) or --tokens (transformers), one of them")
    if model is None and (plan["parameters"] is None or plan["tokens"] is None):
        raise BadInput("--training without a model needs --parameters and --tokens")
    if model is not None and plan["parameters"] is not None:
        raise BadInput("the model's own parameters are counted: leave out --parameters or the model")


def _inspected(model: Model, target: Target, batch: int | None, dims: Mapping[str, int], threads: int) -> Inspection:
    batch = stated_batch(model, batch, dims)
    # A runtime that is at hand tells which kernels it makes of the model.
    backend = registry.backend(target.runtime) if target.runtime == "onnxruntime" else None
    prediction = predict(model, target, backend=backend, batch=batch, dims=dims, threads=threads)
    return inspect_model(model, target, prediction, batch=batch, dims=dims, threads=threads)


def _effort(
    models: Sequence[Model],
    found: Sequence[Inspection],
    target: Target,
    threads: int,
    plan: Mapping[str, float | None],
) -> Training:
    if plan["samples"] is not None:
        flops = convolutional_flops(found[0].total.macs / found[0].batch, plan["samples"])
    else:
        parameters = cost(models[0]).total.parameters if models else plan["parameters"]
        flops = transformer_flops(parameters, plan["tokens"])
    macs = target.roof(threads).macs
    peak = 2 * macs.get("float16", macs["float32"]) if plan["peak"] is None else plan["peak"]
    return training_cost(
        flops, peak=peak, utilisation=plan["utilisation"], devices=plan["devices"] or 1, price=plan["price"]
    )


def _data(found: Sequence[Inspection], top: int) -> dict:
    if len(found) == 2:
        return comparison_data(compare_inspections(*found), top)
    return as_data(found[0], top) if found else {}


def _compared_csv(found: Sequence[Inspection], top: int) -> str:
    return comparison_csv(compare_inspections(*found), top)


def _console() -> Console:
    # rich takes 80 columns for what is no terminal
    return Console() if Console().is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def _print(found: Sequence[Inspection], effort: Training | None, top: int | None) -> None:
    console = _console()
    if len(found) == 2:
        console.print(comparison_table(compare_inspections(*found), top, console.width))
    elif found:
        console.print(table(found[0], top, console.width))
    if effort is not None:
        console.print(training_table(effort))
