"""An inspection, told: tables for the console."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from effc.inspection import SAME, Added, Comparison, Inspection, Layer, Pair, grouped
from effc.predict import MEASURED, ROOFLINE, Estimate
from effc.training import Training

TOP = 20
NAMES_SHOWN = 4
NARROWEST_NAME, NARROW_OP, BAR = 14, 13, 6
ALONE = " by the roofline alone: "  # so predictions tell of kernels: how many, of what kind, and why
LEGEND = {
    "moved": "moved: activations read and written",
    "MACs/B": "MACs/B: multiply-accumulates a byte moved, weights included",
    "roofline": "roofline: at the target's peaks, all bytes from main memory",
    "time": "time: predicted, ± one standard deviation",
}
CROWD, BOUND = "Conv+2: two more nodes run in its kernel", "> by the roofline alone, which most kernels exceed"
# Columns that give way on a narrow console, the first of these first.
SPARE = ("params", "roofline", "MACs/B", "energy", "shape", "±", "moved", "")
PREFIXES = {-12: "p", -9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}


def si(number: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 1.23M, 45.6kB, 789us; nothing for zero and for what is not known."""
    if not number:
        return ""
    rounded = float(f"{number:.3g}")
    power = 3 * math.floor(math.log10(abs(rounded)) / 3)
    power = min(max(power, 0 if unit in ("", "B") else -12), 21)
    return f"{rounded / 10**power:.3g}{PREFIXES[power]}{unit}"


def shorten(name: str, width: int) -> str:
    """A long name without its middle: both ends tell most."""
    if len(name) <= width:
        return name
    tail = width // 2
    return f"{name[: width - tail - 1]}…{name[len(name) - tail :]}"


def table(found: Inspection, top: int | None = None, width: int = 120) -> RenderableType:
    """One row a kernel, by the layer that leads it, those that take most time first; below, what is left to say.

    Args:
        top: rows to show. 0 for all, with the nodes inside of each kernel under it.
        width: columns of the console. Where it is too narrow, columns that tell least are left out.
    """
    kernels: list[Layer | Added] = [row for row in found.layers if row.predicted is not None]
    kernels = sorted((*kernels, *_gathered(found.added)), key=lambda row: -_seconds(row))
    shown = kernels[: (TOP if top is None else top) or None]
    rows = list(_opened(shown, found.layers)) if top == 0 else shown
    cells = [_cells(row) for row in rows] + [_total(found)]
    cells, gap = _fitting(cells, width)
    grid = _grid(cells[0], gap)
    most = max((row.share or 0.0 for row in rows), default=0.0)
    for row, own in zip(rows, cells, strict=False):
        style = "italic" if isinstance(row, Added) else "dim" if not row.share else None
        bar = Bar(most, 0, row.share, width=BAR) if row.share else ""
        grid.add_row(*(bar if key == "" else Text(text) for key, text in own.items()), style=style)
    grid.add_section()
    grid.add_row(*(Text(text) for text in cells[-1].values()), style="bold")
    lines = [] if top == 0 else list(_rest(found, kernels[len(shown) :]))
    lines += [f"[dim]{_legend(cells)}[/]", *_unknown(found.unknown), *_notes(found)]
    return Group(_title(found), grid, "", *(Text.from_markup(line) for line in lines))


def _seconds(row: Layer | Added) -> float:
    return row.predicted.seconds if row.predicted is not None else 0.0


def _gathered(added: Sequence[Added]) -> list[Added]:
    """What the runtime adds, one row for each kind of kernel."""
    kinds: dict[str, list[Added]] = defaultdict(list)
    for row in added:
        name, _, kind = row.name.partition(" (")
        kinds[kind.removesuffix(")") or name].append(row)
    rows = []
    for kind, group in kinds.items():
        seconds = sum(row.predicted.seconds for row in group)
        error = sum(row.predicted.seconds * row.predicted.error for row in group) / seconds if seconds else 0.0
        basis = next((row.predicted.basis for row in group if row.predicted.basis == ROOFLINE), MEASURED)
        name = f"{len(group)} {kind}" if len(group) > 1 else kind
        rows.append(Added(name, Estimate(seconds, error, basis), sum(row.share for row in group)))
    return rows


def _opened(kernels: Sequence[Layer | Added], layers: Sequence[Layer]) -> Iterator[Layer | Added]:
    """Under each kernel the nodes that became part of it; last those of which nothing is left."""
    parts: dict[str | None, list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.predicted is None:
            parts[layer.fused_into].append(layer)
    for kernel in kernels:
        yield kernel
        yield from parts[kernel.name] if isinstance(kernel, Layer) else ()
    yield from parts[None]


def _rest(found: Inspection, hidden: Sequence[Layer | Added]) -> Iterator[str]:
    """One line on what the table leaves out."""
    inside = sum(row.predicted is None and row.name not in found.unknown for row in found.layers)
    share = _percent(sum(row.share or 0.0 for row in hidden))
    parts = [f"{len(hidden)} more, {share} of the time"] if hidden else []
    parts += [f"nodes inside of kernels or free: {inside}"] if inside else []
    if parts:
        yield f"and {'; '.join(parts)}; --top 0 shows all"


def _legend(cells: Sequence[Mapping[str, str]]) -> str:
    """What columns and marks mean, those that are there."""
    texts = [CROWD] if any(re.search(r"\+\d", row["op"]) for row in cells) else []
    texts += [LEGEND[column] for column in cells[0] if column in LEGEND]
    texts += [BOUND] if any(row["time"].startswith(">") for row in cells) else []
    return "; ".join(texts)


def _grid(headings: Iterable[str], gap: int = 2) -> Table:
    grid = Table(box=SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        grid.add_column(heading, justify="left" if heading in ("layer", "op", "") else "right", no_wrap=True)
    return grid


def _title(found: Inspection, other: Inspection | None = None) -> Text:
    models = found.model if other is None else f"{found.model} and {other.model}"
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    where = f"{found.target} ({found.origin}), batch {found.batch}, {threads}"
    return Text(f"{models} on {where}\n", style="bold")


def _cells(row: Layer | Added) -> dict[str, str]:
    """Texts by column."""
    if isinstance(row, Added):
        texts = _empty() | {"layer": f"+ {row.name}", "op": "by runtime"}
    else:
        cost = row.kernel
        texts = {
            "layer": row.name if row.fused_into is None else f"  {row.name}",
            "op": _operators(row),
            "shape": _shape(row.shape),
            "MACs": si(cost.macs),
            "params": si(cost.parameters),
            "weights": si(cost.weight_bytes, "B"),
            "moved": si(cost.activation_bytes, "B"),
            "energy": si(cost.energy, "J"),
            "MACs/B": si(row.intensity),
            "roofline": si(row.roofline, "s"),
            "time": "",
            "±": "",
            "share": "",
            "": "",
        }
    if row.predicted is not None:
        texts |= _time(row.predicted) | {"share": _percent(row.share or 0.0)}
    return texts


def _empty() -> dict[str, str]:
    headings = ("layer", "op", "shape", "MACs", "params", "weights", "moved", "energy", "MACs/B", "roofline", "time")
    return dict.fromkeys((*headings, "±", "share", ""), "")


def _operators(row: Layer) -> str:
    """Conv, Conv+Relu, or Conv+2 where there is no room for what it fuses; constants do not count."""
    fused = [op for op in row.fuses if op != "Constant"]
    text = "+".join((row.op, *fused))
    if len(text) <= NARROW_OP or not fused:
        return shorten(text, NARROW_OP)
    more = f"+{len(fused)}"
    return shorten(row.op, NARROW_OP - len(more)) + more


def _time(estimate: Estimate) -> dict[str, str]:
    bound = "> " if estimate.basis == ROOFLINE else ""
    return {"time": bound + (si(estimate.seconds, "s") or "0s"), "±": f"{100 * estimate.error:.0f}%"}


def _total(found: Inspection) -> dict[str, str]:
    total = found.total
    texts = _empty() | {"layer": "total", "MACs": si(total.macs)}
    texts |= {"params": si(total.parameters), "weights": si(total.weight_bytes, "B")}
    texts |= {"moved": si(total.activation_bytes, "B"), "energy": si(total.energy, "J"), "MACs/B": si(found.intensity)}
    return texts | {"roofline": si(found.roofline, "s")} | _time(found.predicted) | {"share": "100%"}


def _shape(shape: tuple[int | str | None, ...] | None) -> str:
    return "?" if shape is None else "x".join("?" if d is None else str(d) for d in shape)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


def _fitting(cells: Sequence[Mapping[str, str]], width: int) -> tuple[list[dict[str, str]], int]:
    """Columns closer together, then fewer, then shorter names, until a console is wide enough; and their distance."""
    gap = 1
    for gap, spare in [(2, None), *((1, spare) for spare in (None, *SPARE))]:
        cells = [{key: text for key, text in row.items() if key != spare} for row in cells]
        wide = _widths(cells)
        if sum(wide.values()) + gap * (len(wide) - 1) <= width:
            break
        if gap == 1 and _left(wide, width, gap) >= min(NARROWEST_NAME, wide["layer"]):
            break
    return _named_within(cells, width, gap), gap


def _left(wide: Mapping[str, int], width: int, gap: int) -> int:
    """For names, beside the other columns."""
    return width - sum(wide.values()) - gap * (len(wide) - 1) + wide["layer"]


def _named_within(cells: Sequence[Mapping[str, str]], width: int, gap: int) -> list[dict[str, str]]:
    left = max(_left(_widths(cells), width, gap), NARROWEST_NAME)
    return [{**row, "layer": shorten(row["layer"], left)} for row in cells]


def _widths(cells: Sequence[Mapping[str, str]]) -> dict[str, int]:
    widths = {key: max([len(key), *(len(row[key]) for row in cells)]) for key in (cells[0] if cells else {"layer": ""})}
    return widths | {key: max(BAR, widths[key]) for key in widths if not key}


def _notes(found: Inspection) -> Iterator[str]:
    """Notes, those that give one reason for several kinds of kernels as one."""
    others, alone = [], defaultdict(list)
    for note in found.notes:
        kind, mark, reason = note.partition(ALONE)
        if mark:
            alone[reason].append(kind)
        else:
            others.append(note)
    if len(alone) == 1 and found.predicted.basis == ROOFLINE and not _measured(found):
        reason = next(iter(alone))
        others.append(f"all by the roofline alone: {reason}; effc calibrate-target measures those of this machine")
        alone.clear()
    for reason, kinds in alone.items():
        kinds.sort(key=lambda kind: -int(kind.split()[0]))
        others.append(f"by the roofline alone, as {reason}: {_listed(kinds)}")
    yield from (f"[bold]note[/]: {escape(note)}" for note in others)


def _measured(found: Inspection) -> bool:
    """Whether any time rests on measured kernels."""
    return any(row.predicted.basis == MEASURED for row in (*found.layers, *found.added) if row.predicted is not None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if names[NAMES_SHOWN:] else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _unknown(unknown: Mapping[str, str]) -> Iterator[str]:
    for reason, nodes in grouped(unknown).items():
        yield f"[yellow]unknown[/]: {escape(_listed(nodes))}: {escape(reason)}"


def comparison_table(found: Comparison, top: int | None = None, width: int = 120) -> RenderableType:
    """Totals of two models with their ratios, then the layers that differ most."""
    both = found.a, found.b
    totals = _grid(("", *(escape(shorten(one.model, 36)) for one in both), "ratio"))
    for total in found.totals:
        ratio = "" if total.ratio is None else f"{total.ratio:.3f}"
        totals.add_row(total.name, si(total.a, total.unit) or "0", si(total.b, total.unit) or "0", ratio)
        if total.name == "predicted":
            totals.add_row("±", *(_time(one.predicted)["±"] for one in both), "", style="dim")
    pairs = [pair for pair in found.layers if pair.status != SAME]
    shown = pairs[: (TOP if top is None else top) or None]
    lines = []
    if rest := pairs[len(shown) :]:
        seconds = sum(pair.seconds for pair in rest)
        lines.append(f"and {len(rest)} more that differ, by {_signed(seconds) or '0s'} in all; --top 0 shows all")
    added = [si(sum(row.predicted.seconds for row in one.added), "s") or "0s" for one in both]
    same = len(found.layers) - len(pairs)
    lines.append(f"{same} layers are the same; what the runtime adds takes {' -> '.join(added)}")
    told = [[*_unknown(one.unknown), *_notes(one)] for one in both]
    lines += [line for line in told[0] if line in told[1]]
    for one, own, others in zip(both, told, reversed(told), strict=True):
        lines += [f"[bold]{escape(one.model)}[/] {line}" for line in own if line not in others]
    return Group(_title(*both), totals, "", _differences(shown, width), "", *(Text.from_markup(line) for line in lines))


def _differences(pairs: Sequence[Pair], width: int) -> Table:
    cells = []
    for pair in pairs:
        a, b = pair.a, pair.b
        texts = {"layer": pair.name, "": pair.status, "op": _both(a and a.op, b and b.op)}
        texts["MACs"] = _both(*(layer and (si(layer.kernel.macs) or "0") for layer in (a, b)))
        texts["weights"] = _both(*(layer and (si(layer.kernel.weight_bytes, "B") or "0") for layer in (a, b)))
        texts["time"] = _both(*(layer and _own_time(layer) for layer in (a, b)))
        cells.append(texts | {"difference": _signed(pair.seconds)})
    grid = _grid(cells[0] if cells else ())
    for row in _named_within(cells, width, 2):
        grid.add_row(*(Text(text) for text in row.values()))
    return grid


def _both(a: str | None, b: str | None) -> str:
    return f"{a} -> {b}" if a and b and a != b else a or b or ""


def _own_time(layer: Layer) -> str:
    return "fused" if layer.fused_into is not None else si(layer.seconds, "s") or "0s"


def _signed(seconds: float) -> str:
    text = si(seconds, "s")
    return f"+{text}" if seconds > 0 else text


def training_table(found: Training) -> RenderableType:
    """What it takes to train."""
    grid = _grid(("training FLOPs", "device-hours", "days", "money"))
    money = "no price given" if found.money is None else f"${found.money:,.2f}"
    grid.add_row(f"{found.flops:.3g}", _few_digits(found.device_hours), _few_digits(found.days), money)
    devices = f"{found.devices} device{'s' if found.devices > 1 else ''}"
    return Group("", grid, Text(f"at {100 * found.utilisation:.3g}% of {si(found.peak, 'FLOP/s')}, {devices}", "dim"))


def _few_digits(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{number:.2g}"
