"""The groups of channels of a model as a table, for `effc inspect --channels`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from effc.channels import Place, channels
from effc.model import Model

SHOWN = 20  # groups, unless asked for more
PLACES = 3  # of each kind, in a row


def channels_table(model: Model, top: int | None = None) -> RenderableType:
    """Groups that can be removed, largest first, then those that cannot; `top` rows, 0 for all, by default 20."""
    made = [group for group in channels(model).groups if any(not place.reads for place in group.places)]
    ordered = sorted(made, key=lambda group: (group.pinned is not None, -len(group.units)))
    shown = ordered[: top or None] if top is not None else ordered[:SHOWN]
    table = Table(box=None, header_style="bold")
    table.add_column("channels", justify="right")
    for column in ("made by", "read by", "cannot be removed, as"):
        table.add_column(column, overflow="fold")
    for group in shown:
        made_by, read_by = ([p for p in group.places if p.reads is reads] for reads in (False, True))
        table.add_row(str(len(group.units)), _listed(made_by), _listed(read_by), Text(group.pinned or ""))
    free = sum(len(group.units) for group in made if group.pinned is None)
    total = sum(len(group.units) for group in made)
    left = f"; {len(ordered) - len(shown)} more groups (--top 0 shows all)" if len(shown) < len(ordered) else ""
    said = f"{free} of {total} channels can be removed, each with all that depends on it, in {len(made)} groups{left}"
    return Lines(table, Text(said))


def _listed(places: Sequence[Place]) -> Text:
    names = [f"{place.weight}[{place.axis}]" for place in places[:PLACES]]
    more = [f"{len(places) - PLACES} more"] if len(places) > PLACES else []
    return Text(", ".join([*names, *more]))
