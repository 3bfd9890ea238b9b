"""`effc check-tensorrt`: where a model breaks TensorRT's rules of explicit quantisation."""

from __future__ import annotations

import json as jsons
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from effc import registry
from effc.capture import as_written
from effc.cli_options import Debug
from effc.errors import RequirementNotMet


def check_tensorrt(
    model: Annotated[Path, typer.Argument(help="An .onnx file, whoever wrote it")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
    debug: Debug = False,
) -> None:
    """List where MODEL breaks TensorRT's rules, without running it: exit status 3 where it does, advice aside."""
    findings = registry.checker("tensorrt").check(as_written(model))
    errors = [finding for finding in findings if finding.error]
    if json:
        typer.echo(
            jsons.dumps({"model": str(model), "ok": not errors, "findings": [asdict(f) for f in findings]}, indent=1)
        )
    else:
        for finding in findings:
            typer.echo(str(finding))
        if not errors:
            typer.echo(f"{model}: keeps TensorRT's rules")
    if errors:
        raise typer.Exit(RequirementNotMet.status)
