"""Layers behind a change, fitted one after another to what they made in the original from what they see now."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from effc.contract import Context
from effc.model import Model

from ._observed import in_order, sizes
from ._reconstruction import refit
from ._refit import renew
from ._sites import Site, find, layers

SAMPLES = 512


def refit_behind(model: Model, changed: Collection[ir.Node], context: Context) -> int:
    """Fit all layers that read what these nodes make, or are among them; returns how many.

    Layers that are none of `_sites` (grouped, shared, of other types) stay as they are, and so do those whose tensors
    the original does not have.
    """
    reached = _behind(changed)
    shapes = sizes(model, context)
    there_shapes = context.original.shapes(context.batch, context.dims)
    found: list[Site] = []
    for node in layers(model):
        site = find(model, node, shapes) if node in reached else ""
        if isinstance(site, Site) and site.end in there_shapes and shapes.get(site.end) == there_shapes[site.end]:
            found.append(site.outline())
    if not found:
        return 0
    what, aim = "fitting layers behind", context.original
    for site, seen in in_order(model, found, shapes, context, what, aim=aim, samples=SAMPLES):
        renew(model, site, *refit(site.layer, seen))
    return len(found)


def _behind(changed: Collection[ir.Node]) -> set[ir.Node]:
    """These nodes and all that is computed from what they make."""
    reached: set[ir.Node] = set()
    waiting = list(changed)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [use.node for value in node.outputs for use in value.uses()]
    return reached
