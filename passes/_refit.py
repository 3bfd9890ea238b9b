"""Other weights for a layer, in place and under their names: what `_reconstruction.refit` finds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.layers import bias_value
from effc.model import Model

from ._sites import Site, set_added, stored


def renew(model: Model, site: Site, matrix: np.ndarray, bias: np.ndarray) -> None:
    """Give a layer other weights.

    Args:
        matrix: [N, D] of the scaled layer (`Site.layer`).
        bias: [N] for what stands behind the batch norm, where the layer can have one.
    """
    node = site.node
    edit.set_initializer(model, node.inputs[1], stored(site, matrix.reshape(site.layer.weight.shape)))
    if not site.biased:
        return
    own = (bias - site.shift) / site.scale
    dtype = node.inputs[1].const_value.numpy().dtype
    held = bias_value(node)
    norm = next((n for n in node.outputs[0].consumers() if n.op_type == "BatchNormalization"), None)
    if site.adding is not None:
        set_added(model, site, own.astype(dtype))
    elif held is None and norm is not None and (site.shift != 0).any():
        before = model.constant(norm.inputs[2])
        _give(model, norm, 2, (before + own * site.scale).astype(before.dtype), f"{norm.name}_bias")
    else:
        beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        _give(model, node, 2, (own / (beta or 1.0)).astype(dtype), f"{node.name}_bias")
        if beta == 0:
            edit.set_attributes(model, node, beta=1.0)


def _give(model: Model, node: ir.Node, index: int, numbers: np.ndarray, hint: str) -> None:
    """Numbers for one input of a node, under the name of its weight where it alone reads it."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is not None and value.is_initializer() and len(value.uses()) == 1:
        edit.set_initializer(model, value, numbers)
    else:
        edit.set_input(model, node, index, edit.add_initializer(model, hint, numbers))
