"""What it does to a model's outputs when a layer is off by a given share: measured for one chain, scaled to others.

Damage is the divergence of the outputs. To first order it is proportional to the squared error of the layer, with a
factor that differs from layer to layer by orders of magnitude: that factor is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from effc.evaluate import damage
from effc.walk import Values, Walk

from ._factors import Factors, compose
from ._sites import Site, stored

USUAL = 0.1  # relative squared error that is large enough to be seen and small enough to be to first order
LEAST = 1e-6


def worth(price: float, error: float) -> float:
    """Damage by which chains are ordered.

    What is lost of a layer's power counts by its logarithm (the product over layers is what accuracy follows, Zhang et
    al., section 3.3), and layers by the root of their price: later layers are fitted to make up for earlier ones, and
    the price of a layer alone overstates how much layers differ (found by trial on residual networks).
    """
    return float(np.sqrt(price) * -np.log(max(1 - error, LEAST)))


def usual(errors: Sequence[float]) -> int:
    """Which of some chains to measure with: the one whose error is nearest to a usual one."""
    return int(np.argmin([abs(np.log((off + LEAST) / USUAL)) for off in errors]))


def sensitivity(
    site: Site, walk: Walk, reference: Sequence[Values], chain: Factors, error: float, mean: np.ndarray
) -> float:
    """Nats a sample for each unit of the layer's relative squared error.

    Args:
        walk: on its way through the model, up to the layer's input.
        reference: the model's outputs, for its first batches.
        chain, error: one that stands in for the layer, and its relative squared error.
        mean: [C kh kw] of the patches that the layer meets, as far as a bias makes up for it.
    """
    weight = compose(chain)
    shift = (site.layer.matrix - weight.reshape(site.layer.outputs, -1)) @ mean / site.scale
    shift = shift.astype(np.float32).reshape(-1, *[1] * (0 if site.dense else site.spatial))
    moved = walk.changed(site.node, stored(site, weight), shift, len(reference)).outputs()
    return damage(moved, reference) / max(error, LEAST)
