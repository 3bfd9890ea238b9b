"""Layers behind a change, fitted one after another to what they made in the original from what they see now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

from effc.contract import Context
from effc.model import Model
from effc.walk import Walk, samples

from ._observed import observe, sizes
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
    feeds = samples(model, context.calibration, SAMPLES)
    reads = Counter(site.input for site in found)
    here = Walk(model, context.backend, feeds, threads=context.threads, keep=reads)
    there = Walk(context.original, context.backend, feeds, threads=context.threads, keep={s.end for s in found})
    advance = context.progress("fitting layers behind", len(found))
    for outline in found:
        site = find(model, outline.node, shapes)
        assert isinstance(site, Site), site
        matrix, bias = refit(site.layer, observe(site, here, there, seed=context.seed))
        here.forget(site.output)
        there.release(site.end)
        reads[site.input] -= 1
        if not reads[site.input]:
            here.release(site.input)
        renew(model, site, matrix, bias)
        advance(1)
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
