"""Layers pruned one after another, what stays fitted to what the layer meets behind those that are pruned already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.contract import Context
from effc.layers import bias_array, output_axis, set_bias
from effc.model import Model
from effc.walk import Walk, samples

from ._compensation import BLOCK, compensate, in_turn, lost
from ._observed import met, sizes
from ._prunable import Prunable, best_of, fewest
from ._reconstruction import WIDEST, metric
from ._sites import Site, find, known, stored

SAMPLES = 512
Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]  # scores of a block of columns, what may stay -> what stays


def prune(
    model: Model,
    layers: Sequence[Prunable],
    masks: Mapping[str, np.ndarray],
    rules: Mapping[str, Rule],
    context: Context,
) -> tuple[dict[str, float], dict[str, str]]:
    """Prune these layers in the model's order.

    Args:
        masks: site -> booleans of the weight's shape, what is kept.
        rules: site -> how its mask is chosen on the way, in place of the one that is given.

    Returns:
        site -> E|Wx - W'x|^2 / E|Wx|^2 about the means; site -> why its weights were not fitted.
    """
    shapes = sizes(model, context)
    sites = {p.site: _site(model, p, shapes) for p in layers}
    feeds = samples(model, context.calibration, SAMPLES)
    reads = Counter(site.input for site in sites.values() if isinstance(site, Site))
    walk = Walk(model, context.backend, feeds, threads=context.threads, keep=reads)
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    advance = context.progress("pruning layer by layer", len(layers))
    for p in layers:
        outline = sites[p.site]
        if isinstance(outline, str):
            skipped[p.site] = outline
            edit.set_initializer(model, p.value, np.where(masks[p.site], p.weight, 0).astype(p.weight.dtype))
        else:
            site = known(model, p.nodes[0], shapes)
            errors[p.site] = _fit(model, p, site, masks[p.site], rules.get(p.site), walk, context)
            reads[site.input] -= 1
            if not reads[site.input]:
                walk.release(site.input)
        for node in p.nodes:
            walk.forget(node.outputs[0].name or "")
        advance(1)
    return errors, skipped


def _site(model: Model, p: Prunable, shapes: Mapping[str, tuple | None]) -> Site | str:
    if len(p.nodes) > 1:
        return "several layers share its weight"
    found = find(model, p.nodes[0], shapes)
    if isinstance(found, Site):
        wide = found.layer.inputs * found.layer.taps
        return found.outline() if wide <= WIDEST else f"it reads {wide} numbers at once, more than {WIDEST}"
    return found


def _fit(
    model: Model, p: Prunable, site: Site, kept: np.ndarray, rule: Rule | None, walk: Walk, context: Context
) -> float:
    """Prune one layer; what it loses of its power."""
    node = site.node
    patches = met(site, walk, context.seed)
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    biased = node.op_type != "MatMul" and beta != 0  # a bias makes up for means
    mean = patches.mean(axis=0, dtype=np.float64) * biased
    spread = metric(patches, mean)[0]
    whole = site.layer.matrix / site.scale[:, None]
    allowed = _matrix(node, p.weight != 0)
    if rule is None:
        mask = _matrix(node, kept) & allowed
        made = compensate(whole, mask, spread)
    else:
        made, mask = _chosen(whole, allowed, spread, rule, p.weight.shape[1] if node.op_type == "Conv" else None)
    shape = site.layer.weight.shape
    weight = stored(site, (made * site.scale[:, None]).reshape(shape))
    zeros = stored(site, mask.reshape(shape) * site.scale[:, None, None, None]) == 0
    edit.set_initializer(model, p.value, np.where(zeros, 0, weight).astype(p.weight.dtype))
    if biased:
        before = bias_array(model, node, len(made))
        set_bias(model, node, (0 if before is None else before) + (whole - made) @ mean)
    return lost(whole, made, spread)


def _matrix(node: ir.Node, array: np.ndarray) -> np.ndarray:
    """An array of the weight's shape as [N, D], in the order of patches."""
    if node.op_type == "Conv":
        return array.reshape(len(array), -1)
    return array if output_axis(node, 2) == 0 else array.T


def _chosen(
    whole: np.ndarray, allowed: np.ndarray, spread: np.ndarray, rule: Rule, channels: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """A mask chosen while columns go, channels of one kernel position side by side; then fitted as well as can be."""
    wide = whole.shape[1]
    order = np.arange(wide) if channels is None else np.arange(wide).reshape(channels, -1).T.reshape(-1)
    able = allowed[:, order]
    _, found = in_turn(
        whole[:, order], spread[np.ix_(order, order)], lambda scores, columns: rule(scores, able[:, columns])
    )
    mask = np.empty_like(found)
    mask[:, order] = found
    return compensate(whole, mask & allowed, spread), mask & allowed


def lowest(share: float) -> Rule:
    """So large a share of each block of columns goes, and what is zero already."""

    def rule(scores: np.ndarray, able: np.ndarray) -> np.ndarray:
        count = max(round(share * scores.size), int(scores.size - np.count_nonzero(able)))
        return fewest([np.where(able, scores, -1.0)], count)[0]

    return rule


def n_of_m(n: int, m: int) -> Rule:
    """All but n of every m columns go; m divides `BLOCK`."""
    assert BLOCK % m == 0
    return lambda scores, able: best_of(np.where(able, scores, -1.0), 1, n, m) & able
