"""What the compiler asks of a runtime. A backend (`backends/`) is a class with these methods, found by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from effc.kernels import Kernel
from effc.model import Model
from effc.target import Roof

if TYPE_CHECKING:
    from effc.contract import Progress


class Session(Protocol):
    """A model ready to run."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for inputs by name."""
        ...


@dataclass(frozen=True)
class Deployment:
    """What the runtime made of a model when it loaded it.

    Attributes:
        fused: kind of fused or integer kernel -> how many nodes run as such.
        fell_back: quantised node -> why it runs in float all the same.
        difference: largest |optimised - plain| / max |plain| over all outputs on the given feeds, None if not run.
        notes: what else is worth telling, one sentence each.
    """

    fused: Mapping[str, int]
    fell_back: Mapping[str, str]
    difference: float | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Timings:
    """What a number of threads was measured at.

    Attributes:
        samples: kernels and what each took, microseconds.
        roof: best rates seen, and what any inference costs beside its nodes.
        undisturbed, networks: how many networks ran undisturbed at times, and how many ran in all.
    """

    samples: Sequence[tuple[Kernel, float]]
    roof: Roof
    undisturbed: int = 0
    networks: int = 0


class Backend(Protocol):
    """One runtime."""

    name: str

    def version(self) -> str: ...

    def session(
        self, model: Model | Path, *, threads: int = 1, optimize: bool = True, expose: Sequence[str] = ()
    ) -> Session:
        """Load a model to run it.

        Args:
            model: in memory, or a file as it was written.
            threads: intra-op threads.
            optimize: False loads without graph optimisation and without prepacking: quick, small, the plain meaning.
            expose: names of inner tensors to return as well.

        Raises:
            EffcError: the runtime does not take it, in the runtime's words.
        """
        ...

    def emit(self, model: Model) -> None:
        """Lower the model in place to the form that this runtime runs best (opset, IR version)."""
        ...

    def deployment(self, model: Model, feeds: Mapping[str, np.ndarray] | None = None, threads: int = 1) -> Deployment:
        """Read the runtime's optimised graph back; with feeds, compare its outputs with the plain graph's."""
        ...

    def kernels(
        self, model: Model, batch: int = 1, dims: Mapping[str, int] | None = None, threads: int = 1
    ) -> tuple[tuple[Kernel, ...], Mapping[str, str]]:
        """What the runtime runs for a model: its kernels in order, and node -> name of the kernel that does its work.

        A node whose work is done when the model is loaded maps to "".
        """
        ...

    def calibrate(self, threads: int, seconds: float, progress: Progress) -> Timings:
        """Measure kernels of this machine with so many threads, for so many seconds."""
        ...


class Trainer(Protocol):
    """A framework that trains a model. A view is its own kind of object, which `effc` hands on and never looks into."""

    name: str

    def version(self) -> str: ...

    def view(self, model: Model, *, expose: Sequence[str] = ()) -> Any:
        """The model in the framework's form, its weights to be trained.

        Args:
            expose: names of inner tensors to give behind the outputs.

        Raises:
            BadInput: an operator of the model cannot be trained, or the framework is not installed.
        """
        ...

    def weights(self, view: Any) -> Mapping[str, Any]:
        """Initializer -> the framework's tensor that is trained for it, or holds its statistics."""
        ...

    def write_back(self, view: Any, model: Model) -> None:
        """Put a view's weights into the model that it was made of. What was not trained stays as it is.

        Raises:
            BadInput: it is another model.
            PassFailed: a weight is not finite; nothing was changed.
        """
        ...

    def session(self, view: Any) -> Session:
        """A view ready to run on arrays."""
        ...
