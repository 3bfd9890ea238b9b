"""A history, told: for the console (and, recorded, as a self-contained HTML page)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from effc.history import KEPT, NO_GAIN, UNCHANGED, Accuracy, History, PassRecord, Predicted, Snapshot, StageRecord
from effc.measure import Latency

STYLES = {KEPT: "green", UNCHANGED: "dim"}
NAMES_SHOWN = 6


def report(history: History) -> RenderableType:
    """Everything a person wants to know at a glance, then what was left alone and why."""
    parts: list[RenderableType] = [_passes(history), _totals(history)]
    parts += [Text.from_markup(line) for line in _remarks(history)]
    return Group(*parts)


def write_html(history: History, path: Path) -> None:
    """The same as one HTML file that needs nothing else."""
    console = Console(record=True, width=150, file=_Nowhere())
    console.print(report(history))
    path.write_text(console.export_html(inline_styles=True), encoding="utf-8")


class _Nowhere:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def _passes(history: History) -> Table:
    table = Table(title=f"{escape(history.model)} for {history.target}", title_justify="left", title_style="bold")
    for heading in ("pass", "verdict", "nodes changed", "MACs", "weights"):
        table.add_column(heading, justify="left" if heading in ("pass", "verdict") else "right")
    for heading in ("predicted", "latency", "accuracy"):
        table.add_column(heading, justify="right")
    for stage in history.stages:
        for record in stage.passes:
            last = record is stage.passes[-1]
            total = sum(record.counts.values())
            table.add_row(
                escape(record.recipe),
                f"[{STYLES.get(record.status, 'yellow')}]{record.status}[/]",
                f"{record.counts['changed']} of {total}",
                _change(record.cost_before.macs, record.cost_after.macs),
                _change(record.cost_before.weight_bytes, record.cost_after.weight_bytes),
                _predicted(stage.predicted, "x") if last else "",
                _latency(stage) if last else "",
                _accuracy(stage.accuracy) if last else (_drift(record)),
            )
    return table


def _predicted(predicted: Predicted | None, times: str = "") -> str:
    """A ratio and its standard deviation, or what it rests on instead."""
    if predicted is None:
        return "-"
    doubt = f"±{predicted.error:.2f}" if predicted.measured else f"({predicted.basis})"
    return f"{predicted.ratio:.2f}{times} {doubt}"


def _latency(stage: StageRecord) -> str:
    if stage.latency is None:
        return "-"
    return f"{stage.latency.ratio:.2f}x [{stage.latency.low:.2f}, {stage.latency.high:.2f}]"


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return f"{accuracy.metric} {_number(accuracy.points)} {_fall(accuracy)}".rstrip()


def _drift(record: PassRecord) -> str:
    return "" if record.drift is None else f"drift {record.drift:.0e}"


def _change(before: float, after: float) -> str:
    if before == after:
        return "same"
    return f"{after / before:.2f}x" if before else f"{after:,.0f}"


def _totals(history: History) -> Table:
    table = Table(
        title=f"batch {history.batch}, {history.threads} thread{'s' if history.threads > 1 else ''}",
        title_justify="left",
    )
    for heading in ("", "original", "result", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = totals(history.original, history.final, history.latency, history.predicted)
    for row in rows:
        table.add_row(*row)
    return table


def totals(
    before: Snapshot, after: Snapshot, latency: Latency | None, predicted: Predicted | None = None
) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, ratio) that set two models beside each other."""
    rows = []
    if latency is not None:
        rows.append(
            (
                "latency, ms",
                f"{latency.before_ms:.3f}",
                f"{latency.after_ms:.3f}",
                f"{latency.ratio:.2f} [{latency.low:.2f}, {latency.high:.2f}]",
            )
        )
    if predicted is not None:
        times = f"{predicted.before_ms:.3f}", f"{predicted.after_ms:.3f}"
        rows.append(("predicted latency, ms", *times, _predicted(predicted)))
    if before.cost.energy and after.cost.energy:
        a, b = 1e3 * before.cost.energy, 1e3 * after.cost.energy
        rows.append(("predicted energy, mJ", f"{a:.4g}", f"{b:.4g}", _ratio(a, b)))
    rows += [
        ("file, bytes", f"{before.size:,}", f"{after.size:,}", _ratio(before.size, after.size)),
        ("parameters", f"{before.cost.parameters:,}", f"{after.cost.parameters:,}", ""),
        ("MACs", f"{before.cost.macs:,}", f"{after.cost.macs:,}", _ratio(before.cost.macs, after.cost.macs)),
        ("nodes", f"{before.nodes:,}", f"{after.nodes:,}", ""),
    ]
    if before.accuracy is not None and after.accuracy is not None:
        a, b = before.accuracy, after.accuracy
        rows.append((f"{b.metric} on {b.samples}", _number(a.points), _number(b.points), _fall(b).strip("()")))
        if b.agreement is not None:
            rows.append(("agreement, %", "100.00", f"{100 * b.agreement:.2f}", ""))
        if b.damage is not None:
            rows.append(("divergence, nats", "0", f"{b.damage:.2g}", ""))
    return rows


def _number(points: float | None) -> str:
    return "-" if points is None else f"{points:.2f}"


def _fall(accuracy: Accuracy) -> str:
    return "" if accuracy.drop is None else f"({0.0 - accuracy.drop:+.2f})"


def _ratio(before: float, after: float) -> str:
    return f"{after / before:.2f}" if before else ""


def _remarks(history: History) -> list[str]:
    lines = []
    for stage in history.stages:
        for record in stage.passes:
            lines += _about(record)
    if history.fused:
        fused = ", ".join(f"{count} {kind}" for kind, count in sorted(history.fused.items()))
        lines.append(f"[bold]runtime[/]: fused {escape(fused)}")
    lines += [
        f"[yellow]runtime[/]: {escape(node)} fell back: {escape(reason)}" for node, reason in history.fell_back.items()
    ]
    lines += [f"[yellow]unproven[/]: {escape(text)}" for text in history.unproven]
    lines += [f"[bold]note[/]: {escape(text)}" for text in history.notes]
    if not history.changed:
        lines.append("[bold]nothing was kept: the result is the original[/]")
    lines += [f"[red]not met[/]: {escape(text)}" for text in history.unmet]
    lines.append(f"[dim]{history.seconds:.1f} s in all[/]")
    return lines


def _about(record: PassRecord) -> list[str]:
    name = f"[bold]{escape(record.name)}[/]"
    lines = [f"{name}: {record.status}, {escape(record.reason)}"] if record.reason else []
    lines += [f"{name}: {escape(note)}" for note in record.notes]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for entry in record.ledger:
        if entry.status == "skipped" and not entry.reason.startswith("nothing for "):
            reason, _, figures = entry.reason.partition(f"{NO_GAIN}: ")
            if figures:  # each node has its own
                by_reason[NO_GAIN].append(f"{entry.node} ({figures})")
            else:
                by_reason[reason].append(entry.node)
    for reason, nodes in by_reason.items():
        shown = ", ".join(nodes[:NAMES_SHOWN]) + (
            f" and {len(nodes) - NAMES_SHOWN} more" if nodes[NAMES_SHOWN:] else ""
        )
        lines.append(f"{name} left alone {escape(shown)}: {escape(reason)}")
    return lines
