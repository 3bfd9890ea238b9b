"""An inspection as plain data, for JSON and CSV: SI units (seconds, bytes, joules), shares of 1."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effc.cost import Cost
from effc.inspection import Added, Comparison, Inspection, Layer, Pair
from effc.predict import Estimate
from effc.training import Training


def as_data(found: Inspection, top: int = 0) -> dict[str, Any]:
    """One object; `top` limits the layers, 0 gives all. A layer's own cost, and that of the kernel it leads."""
    return {
        "model": found.model,
        "target": found.target,
        "origin": found.origin,
        "batch": found.batch,
        "threads": found.threads,
        "totals": _totals(found),
        "layers": [_layer(layer) for layer in found.layers[: top or None]],
        "added": [_added(row) for row in found.added],
        "unknown": dict(found.unknown),
        "notes": list(found.notes),
    }


def comparison_data(found: Comparison, top: int = 0) -> dict[str, Any]:
    """One object; layers hold both models' records, None where one has no such layer."""
    return {
        "models": [found.a.model, found.b.model],
        "target": found.a.target,
        "origin": found.a.origin,
        "batch": found.a.batch,
        "threads": found.a.threads,
        "totals": [_totals(found.a), _totals(found.b)],
        "ratios": {total.name: total.ratio for total in found.totals},
        "layers": [_pair(pair) for pair in found.layers[: top or None]],
        "added": [[_added(row) for row in one.added] for one in (found.a, found.b)],
        "unknown": [dict(found.a.unknown), dict(found.b.unknown)],
        "notes": list(dict.fromkeys((*found.a.notes, *found.b.notes))),
    }


def training_data(found: Training) -> dict[str, Any]:
    """Operations, hours of all devices, days from start to end, dollars (None without a price)."""
    return {
        "flops": found.flops,
        "peak_flops_per_second": found.peak,
        "utilisation": found.utilisation,
        "devices": found.devices,
        "device_hours": found.device_hours,
        "days": found.days,
        "dollars": found.money,
    }


def as_csv(found: Inspection, top: int = 0) -> str:
    """A line a layer, then a line for each thing that the runtime adds; what is not known is empty."""
    layers = [_layer(layer) for layer in found.layers[: top or None]]
    rows = [{**row, "shape": _joined(row["shape"], "x"), "fuses": _joined(row["fuses"], "+")} for row in layers]
    return _written([*rows, *({**_added(row), "op": "by runtime"} for row in found.added)], COLUMNS)


def comparison_csv(found: Comparison, top: int = 0) -> str:
    """A line a layer: the numbers of both models, with the model's place (a, b) before each."""
    keys = [key for key in COLUMNS if key not in ("name", "shape", "fuses")]
    rows = []
    for pair in found.layers[: top or None]:
        row = {"name": pair.name, "status": pair.status, "difference_seconds": pair.seconds}
        for side, layer in (("a", pair.a), ("b", pair.b)):
            row |= {f"{side}_{key}": value for key, value in _layer(layer).items() if key in keys} if layer else {}
        rows.append(row)
    both = [f"{side}_{key}" for key in keys for side in ("a", "b")]
    return _written(rows, ["name", "status", "difference_seconds", *both])


def _written(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _joined(parts: Sequence[Any] | None, mark: str) -> str:
    return "" if parts is None else mark.join("?" if part is None else str(part) for part in parts)


def _totals(found: Inspection) -> dict[str, Any]:
    return {
        "nodes": len(found.layers),
        **_cost(found.total),
        "macs_per_byte": found.intensity,
        "roofline_seconds": found.roofline,
        **_estimate(found.predicted),
    }


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "macs": cost.macs,
        "parameters": cost.parameters,
        "weight_bytes": cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "energy_joules": cost.energy,
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "op": layer.op,
        "shape": None if layer.shape is None else list(layer.shape),
        "operands": layer.operands,
        **_cost(layer.cost),
        **{f"kernel_{key}": value for key, value in _cost(layer.kernel).items()},
        "macs_per_byte": layer.intensity,
        "roofline_seconds": layer.roofline,
        **_estimate(layer.predicted),
        "time_share": layer.share,
        "fused_into": layer.fused_into,
        "fuses": list(layer.fuses),
    }


def _added(row: Added) -> dict[str, Any]:
    return {"name": row.name, **_estimate(row.predicted), "time_share": row.share}


def _pair(pair: Pair) -> dict[str, Any]:
    a, b = (None if layer is None else _layer(layer) for layer in (pair.a, pair.b))
    return {"name": pair.name, "status": pair.status, "difference_seconds": pair.seconds, "a": a, "b": b}


def _estimate(estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {"predicted_seconds": None, "relative_error": None, "basis": None}
    return {"predicted_seconds": estimate.seconds, "relative_error": estimate.error, "basis": estimate.basis}


COLUMNS = tuple(_layer(Layer("", "", None, Cost())))
