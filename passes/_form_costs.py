"""What a form of a convolution costs in its place: counted, and predicted as the runtime would run it.

For the prediction the form itself is put into a small network between two layers, as `_chain_costs` does with chains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from effc.contract import Context
from effc.cost import Cost
from effc.energy import on_target
from effc.errors import EffcError
from effc.kernels import FREE
from effc.model import Model
from effc.predict import MEASURED, estimate

from ._chain_costs import Place, moved_apart, network, own_kernels
from ._factors import blank
from ._forms import emit
from ._sites import Site, find

LAYER = "factor0"  # its name in the small network
AROUND = ("enter", "relu", "leave")


class FormCosts:
    """Costs of forms on a context's target; what was asked once is remembered by its shapes.

    Args:
        timed: predict seconds; else they are 0, for not known.
    """

    def __init__(self, context: Context, *, timed: bool) -> None:
        self._context, self._timed = context, timed
        self._known: dict[tuple, Cost] = {}

    def of(self, site: Site, place: Place, form: str, kept: np.ndarray | None) -> Cost:
        """Cost of a form that reads so many groups; None: of the layer as it is. Seconds are 0 where not known."""
        layer = site.layer
        shape = layer.weight.shape, layer.strides, layer.dilations, layer.pads
        key = place, shape, form, None if kept is None else kept.tobytes()
        if key not in self._known:
            small = network(place, [layer.whole(blank(*layer.weight.shape))], False)
            if kept is not None:
                inner = find(small, small.node(LAYER), small.shapes(place.size[0]))
                assert isinstance(inner, Site), inner
                emit(small, inner, form, kept, np.zeros((layer.outputs, len(kept))), None)
            self._known[key] = self._cost(small, place, layer.outputs if site.bias is not None else 0)
        return self._known[key]

    def _cost(self, small: Model, place: Place, biases: int) -> Cost:
        work = on_target(small, self._context.target, batch=place.size[0], dims={}, prediction=None)
        own = [value for name, value in work.nodes.items() if name not in AROUND]
        total = sum(own, Cost())
        scale = place.weight_bytes * biases
        return Cost(
            total.macs, total.parameters + biases, total.weight_bytes + scale, total.activation_bytes, total.energy,
            self._seconds(small, place) or 0.0,
        )  # fmt: skip

    def _seconds(self, small: Model, place: Place) -> float | None:
        """Predicted time, or None where only the roofline would tell it."""
        context = self._context
        if not self._timed or not context.target.kernels or context.backend.name != context.target.runtime:
            return None
        try:
            found, stands_for = context.backend.kernels(small, place.size[0], {}, context.threads)
        except EffcError:
            return None
        own = [moved_apart(kernel, place.around) for kernel in own_kernels(found, stands_for)]
        estimates = estimate([kernel for kernel in own if kernel.kind != FREE], context.target, context.threads)
        return None if any(e.basis != MEASURED for e in estimates) else sum(e.seconds for e in estimates)


def place_of(site: Site, model: Model, shapes: Mapping[str, tuple | None], context: Context) -> Place | str:
    """Where a convolution stands, or why that is not known."""
    size = shapes.get(site.input)
    if size is None or not all(isinstance(d, int) for d in size):
        return "the shape of its input is not known: state its dimensions (--dim NAME=SIZE), or give data (--calibrate)"
    size = (size[0], size[1], 1, size[2]) if len(size) == 3 else tuple(size)
    costs = context.costs(model).nodes.values()
    around = math.fsum(each.activation_bytes + each.weight_bytes for each in costs)
    return Place(size, site.node.inputs[0].is_graph_input(), around, 4)


def scaled(own: Cost, whole: Cost, before: Cost) -> Cost:
    """Cost of a form in the model, given that of its layer there: predicted quantities as shares.

    Args:
        own, whole: of the form, and of the layer, both in the small network.
        before: of the layer in the model.
    """

    def share(quantity: str) -> float:
        a, b = getattr(whole, quantity), getattr(own, quantity)
        return getattr(before, quantity) * b / a if a and b else 0.0

    return Cost(
        own.macs,
        before.parameters - whole.parameters + own.parameters,
        before.weight_bytes - whole.weight_bytes + own.weight_bytes,
        round(share("activation_bytes")),
        share("energy"),
        share("seconds"),
    )
