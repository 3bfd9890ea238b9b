"""What one does with a view: run it on arrays, read and set its weights by name, mask them, write them back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from effc import edit
from effc.errors import BadInput, PassFailed
from effc.model import Model

from ._torch_build import META, Names
from ._torch_weights import Integers, Mask, attach, resolve, steps_of, to_numpy, to_torch


class ViewSession:
    """A view as a session; see `effc.runtime.Session`. It runs in the mode, train() or eval(), that the view is in.

    Attributes:
        inputs, outputs: their names, in the model's order.
    """

    def __init__(self, view: fx.GraphModule) -> None:
        self._view = view
        self.inputs, self.outputs = names_of(view).inputs, names_of(view).outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name. Raises BadInput for an input that is missing."""
        if missing := [name for name in self.inputs if name not in feeds]:
            raise BadInput(f"input {missing[0]!r} is missing; there are {', '.join(sorted(feeds)) or 'none'}")
        device = next((p.device for p in self._view.parameters()), torch.device("cpu"))
        with torch.no_grad():
            made = self._view(*(to_torch(np.asarray(feeds[name])).to(device) for name in self.inputs))
        made = made if len(self.outputs) > 1 else (made,)
        return {name: value.cpu().numpy() for name, value in zip(self.outputs, made, strict=True)}


def names_of(view: fx.GraphModule) -> Names:
    """Raises BadInput for a GraphModule that is no view."""
    if META not in view.meta:
        raise BadInput("this GraphModule was not made by effc: it does not know the model's names")
    return view.meta[META]


def weights(view: fx.GraphModule) -> dict[str, Tensor]:
    """Initializer -> its parameter, or its buffer for statistics of batch norm; in the initializer's layout.

    What integers decode to stands under the integers' name, a codebook under its own.
    """
    return {name: resolve(view, paths[0]) for name, paths in names_of(view).places.items()}


def state(view: fx.GraphModule) -> dict[str, Tensor]:
    """A checkpoint: copies of `weights`, masks applied."""
    return {name: _masked(view, name, tensor).detach().clone() for name, tensor in weights(view).items()}


def load_state(view: fx.GraphModule, checkpoint: Mapping[str, Tensor]) -> None:
    """Take over a checkpoint. Raises BadInput for names or shapes that are not the view's; nothing was changed."""
    own = weights(view)
    if own.keys() != checkpoint.keys():
        other = sorted(own.keys() ^ checkpoint.keys())[0]
        raise BadInput(f"the checkpoint is of another model: {other!r} is in one of them only")
    for name, tensor in own.items():
        if tensor.shape != checkpoint[name].shape:
            raise BadInput(f"{name!r} is {tuple(tensor.shape)}, in the checkpoint {tuple(checkpoint[name].shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(checkpoint[name])


def mask(view: fx.GraphModule, name: str, kept: np.ndarray) -> None:
    """Hold a weight at zero where `kept`, an array of its shape, is zero; a former mask of it goes.

    Raises:
        BadInput: no parameter has that name, or another shape.
    """
    found = weights(view).get(name)
    if not isinstance(found, torch.nn.Parameter):
        known = ", ".join(n for n, t in weights(view).items() if isinstance(t, torch.nn.Parameter))
        raise BadInput(f"no weight {name!r} to mask; there are {known}")
    if np.shape(kept) != tuple(found.shape):
        raise BadInput(f"the mask of {name!r} is {np.shape(kept)}, the weight {tuple(found.shape)}")
    step = Mask(torch.from_numpy(np.asarray(kept) != 0).to(found.device))
    for path in names_of(view).places[name]:
        attach(view, path, step)


def write_back(view: fx.GraphModule, model: Model) -> None:
    """Put the view's weights and statistics into the model, under their names; nothing else changes.

    A weight that was not trained stays as it is, bit by bit. Masked weights become zeros, integers are coded.

    Raises:
        BadInput: the model is not the one that the view was made of.
        PassFailed: a weight is NaN or infinite; nothing was changed.
    """
    trained = {name: _array(view, model, name, tensor) for name, tensor in weights(view).items()}
    for name, array in trained.items():
        value = model.graph.initializers[name]
        if not _same(array, value.const_value.numpy()):
            edit.set_initializer(model, value, array)


def _array(view: fx.GraphModule, model: Model, name: str, tensor: Tensor) -> np.ndarray:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None or tuple(value.const_value.shape) != tuple(tensor.shape):
        raise BadInput(
            f"{model.name} is not the model of this view: it has no weight {name!r} of {tuple(tensor.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise PassFailed(f"weight {name!r} is not finite after training: lower the learning rate")
    found = _masked(view, name, tensor).detach()
    stored = value.const_value.numpy()
    coding = next((s for s in steps_of(view, names_of(view).places[name][0]) if isinstance(s, Integers)), None)
    return to_numpy(found, stored.dtype) if coding is None else coding.store(found, stored)


def _masked(view: fx.GraphModule, name: str, tensor: Tensor) -> Tensor:
    steps = steps_of(view, names_of(view).places[name][0])
    return steps[0](tensor) if steps and isinstance(steps[0], Mask) else tensor


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit by bit, so that -0.0 is not 0.0."""
    as_bits = f"u{a.dtype.itemsize}"
    return a.shape == b.shape and np.array_equal(
        np.ascontiguousarray(a).view(as_bits), np.ascontiguousarray(b).view(as_bits)
    )
