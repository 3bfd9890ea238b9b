"""How much it hurts to quantise a layer: a local estimate that costs nothing, and a measured one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from effc.contract import Context, Proposal
from effc.evaluate import evaluate
from effc.layers import constant_weight, output_axis
from effc.model import Model
from effc.placement import Placement
from effc.quantize import Affine, quantize_weight
from effc.statistics import Bins

if TYPE_CHECKING:
    from .int8 import Int8

SAMPLES, TOGETHER = 64, 8


def local_damage(inputs: Mapping[ir.Node, tuple[Affine, Bins]], bits: int) -> dict[ir.Node, float]:
    """Half the relative squared error of each layer's output from rounding its input and weights, taken as noise.

    In nats only to first order and for layers that matter alike: it serves to put layers in order.

    Args:
        inputs: of each layer the codes of what it reads, and what was seen of that.
    """
    damages = {}
    for node, (q, bins) in inputs.items():
        weight = constant_weight(node).astype(np.float64)
        rounded = quantize_weight(weight, output_axis(node, weight.ndim), bits=bits).decoded()
        power = float((weight**2).sum())
        noise = float(((weight - rounded) ** 2).sum()) / power if power else 0.0
        x = bins.centres
        kept = np.clip(x, q.low, q.high)
        error = (x - kept) ** 2 + float(q.scale) ** 2 / 12
        energy = float(x**2 @ bins.counts)
        noise += float(error @ bins.counts) / energy if energy else 0.0
        damages[node] = 0.5 * noise
    return damages


def output_damage(
    step: Int8, model: Model, forms: Mapping[ir.Node, str], placement: Placement, context: Context
) -> dict[ir.Node, float]:
    """Rise of the output divergence with one layer quantised at a time, in nats a sample, on calibration data.

    Args:
        forms: the layers, and whether each is quantised "static" or "dynamic".
        placement: of all of them together.
    """
    nodes = list(forms)
    data = context.calibration.first(SAMPLES).for_model(model)
    reference = context.backend.session(context.original, threads=context.threads)
    advance = context.progress("estimating damage layer by layer", len(nodes))
    damages = {}
    for start in range(0, len(nodes), TOGETHER):
        group = nodes[start : start + TOGETHER]
        sessions = {"original": reference}
        for node in group:
            alone = model.clone()
            begins = node.inputs[0] not in placement.made  # integers, with all layers in them as well
            proposal = Proposal(node.name, (node.name,), {"form": forms[node]})
            replace(step, split=step.split and begins).rewrite(alone, [proposal], context)
            sessions[node.name] = context.backend.session(alone, threads=context.threads)
        scores = evaluate(sessions, data, batch=model.batch, reference="original", metric=None)
        damages.update({node: scores[node.name].damage for node in group})
        advance(len(group))
    return damages
