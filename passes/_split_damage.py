"""What it does to a model's outputs when a layer is off by a given share: measured for one chain, scaled to others.

Damage is the divergence of the outputs. To first order it is proportional to the squared error of the layer, with a
factor that differs from layer to layer by orders of magnitude: that factor is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from effc.evaluate import damage
from effc.walk import Values, Walk

from ._factors import compose
from ._filters import Filters
from ._sites import Site, stored

USUAL = 0.1  # relative squared error that is large enough to be seen and small enough to be to first order
LEAST = 1e-6
POWER = 0.75


def worth(price: float, error: float) -> float:
    """Damage by which chains are ordered.

    What is lost of a layer's power counts by its logarithm (the product over layers is what accuracy follows, Zhang et
    al., section 3.3), and layers by a power of their price: later layers are fitted to make up for earlier ones, so
    that the price of a layer alone overstates how much layers differ. By trial: residual networks of convolutions keep
    most with powers of 1/2 to 3/4, a transformer, whose layers make up for less, with 3/4 to 1.
    """
    return float(price**POWER * -np.log(max(1 - error, LEAST)))


def sensitivity(
    site: Site,
    walk: Walk,
    reference: Sequence[Values],
    covariance: np.ndarray | None,
    mean: np.ndarray,
    usual: float,
) -> float:
    """Nats a sample for each unit of the layer's relative squared error.

    What stands in for the layer is its projection onto so many directions of its outputs that the error is one that
    chains make: the leading directions cost more than their share of the power, the last ones less.

    Args:
        walk: on its way through the model, up to the layer's input.
        reference: the model's outputs, for its first batches.
        covariance, mean: of the patches that the layer meets (`_observed.moments`).
        usual: an error that chains of the layer make.
    """
    layer = site.layer
    method = Filters(layer, covariance)
    errors = method.errors([{"rank": rank} for rank in range(layer.outputs)])
    rank = int(np.argmin([abs(np.log((off + LEAST) / (usual + LEAST))) for off in errors]))
    weight = compose(method.fit({"rank": rank}))
    shift = (layer.matrix - weight.reshape(layer.outputs, -1)) @ mean / site.scale
    shift = shift.astype(np.float32).reshape(-1, *[1] * (0 if site.dense else site.spatial))
    moved = walk.changed(site.node, stored(site, weight), shift, len(reference)).outputs()
    return damage(moved, reference) / max(errors[rank], LEAST)
