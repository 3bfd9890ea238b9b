"""Other weights for a layer, in place and under their names: what `_reconstruction.refit` finds."""

from __future__ import annotations

import numpy as np

from effc import edit
from effc.layers import bias_value, set_bias
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
    held = bias_value(node)
    norm = next((n for n in node.outputs[0].consumers() if n.op_type == "BatchNormalization"), None)
    if site.adding is not None:
        set_added(model, site, own.astype(node.inputs[1].const_value.numpy().dtype))
    elif held is None and norm is not None and (site.shift != 0).any():
        before = model.constant(norm.inputs[2])
        set_bias(model, norm, before + own * site.scale)
    else:
        set_bias(model, node, own)
