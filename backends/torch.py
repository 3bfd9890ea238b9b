"""PyTorch: the trainable view of a model, and the way of trained weights back into it.

Structure enters from PyTorch once, at capture; afterwards only weights flow: `view` makes a `torch.fx.GraphModule` of
standard modules under the ONNX names, any loop trains it, `write_back` stores the numbers. PyTorch itself is imported
when the backend is made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from effc.errors import BadInput
from effc.model import Model
from effc.runtime import Gradients, Slice

if TYPE_CHECKING:
    import torch
    from torch import fx

    from ._torch_view import ViewSession


class Torch:
    """The backend of that name; see `effc.runtime.Trainer`. Raises BadInput where PyTorch is not installed."""

    name = "torch"

    def __init__(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise BadInput("training needs PyTorch, which is not installed: pip install 'effc[torch]'")
        from . import _torch_view
        from ._torch_build import build

        self._build, self._of = build, _torch_view

    def version(self) -> str:
        from importlib.metadata import version

        return version("torch")

    def view(self, model: Model, *, expose: Sequence[str] = ()) -> fx.GraphModule:
        """The model as a GraphModule in eval(): inputs by position, in order; one tensor, or a tuple of the outputs.

        Float weights are parameters, in ONNX's layout behind parametrizations where PyTorch's is another; batch-norm
        statistics are buffers; scalars and what Constant nodes hold are fixed. The inner tensors of `expose` come
        behind the outputs.

        Raises:
            BadInput: an operator has no trainable form; the line names it, its node and the table to extend.
        """
        return self._build(model, expose)

    def compose(self, view: fx.GraphModule) -> None:
        """Make a view quicker to train, its results and weights as they are; see `_torch_chains`."""
        from ._torch_chains import compose

        compose(view)

    def write_back(self, view: fx.GraphModule, model: Model) -> None:
        """Trained weights and statistics into the model that the view was made of; see `_torch_view.write_back`."""
        self._of.write_back(view, model)

    def session(self, view: fx.GraphModule) -> ViewSession:
        """The view as arrays by name in, arrays by name out, without gradients."""
        return self._of.ViewSession(view)

    def weights(self, view: fx.GraphModule) -> dict[str, torch.Tensor]:
        """Initializer -> parameter or buffer; see `_torch_view.weights`."""
        return self._of.weights(view)

    def state(self, view: fx.GraphModule) -> dict[str, torch.Tensor]:
        """A checkpoint keyed by initializer."""
        return self._of.state(view)

    def load_state(self, view: fx.GraphModule, checkpoint: Mapping[str, torch.Tensor]) -> None:
        """Take over a checkpoint. Raises BadInput where it is of another model."""
        self._of.load_state(view, checkpoint)

    def mask(self, view: fx.GraphModule, name: str, kept: np.ndarray) -> None:
        """Hold a weight at zero where `kept` is zero; see `_torch_view.mask`."""
        self._of.mask(view, name, kept)

    def curvature(self, view: fx.GraphModule, feeds: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Initializer -> d^2E/dw^2 of each of its numbers; see `_torch_curvature.curvature`."""
        from ._torch_curvature import curvature

        return curvature(view, feeds)

    def gradients(
        self,
        view: fx.GraphModule,
        feeds: Iterable[Mapping[str, np.ndarray]],
        labels: Sequence[np.ndarray] | None = None,
        *,
        units: Sequence[Slice] = (),
        seed: int = 0,
    ) -> Gradients:
        """Mean and squared gradients, sample by sample; see `effc.runtime.Trainer.gradients`."""
        from ._torch_gradients import gradients

        return gradients(view, feeds, labels, units=units, seed=seed)
