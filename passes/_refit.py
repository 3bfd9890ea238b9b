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
    held = bias_value(node)
    norm = next((n for n in node.outputs[0].consumers() if n.op_type == "BatchNormalization"), None)
    if site.adding is not None:
        set_added(model, site, own.astype(node.inputs[1].const_value.numpy().dtype))
    elif held is None and norm is not None and (site.shift != 0).any():
        before = model.constant(norm.inputs[2])
        set_bias(model, norm, before + own * site.scale)
    else:
        set_bias(model, node, own)


def set_bias(model: Model, node: ir.Node, bias: np.ndarray) -> None:
    """Let a convolution, a Gemm or a batch norm add this to its outputs.

    It keeps the name of the bias where this node alone reads one. Gemm's beta counts; where it is 0 it becomes 1.

    Args:
        bias: [N].
    """
    beta = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    numbers = (bias / (beta or 1.0)).astype(node.inputs[1].const_value.numpy().dtype)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is not None and value.is_initializer() and len(value.uses()) == 1:
        shape = value.const_value.shape if value.const_value.size == numbers.size else numbers.shape
        edit.set_initializer(model, value, numbers.reshape(shape))
    else:
        edit.set_input(model, node, 2, edit.add_initializer(model, f"{node.name}_bias", numbers))
    if beta == 0:
        edit.set_attributes(model, node, beta=1.0)
