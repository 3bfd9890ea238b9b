"""What the compiler asks of a runtime. A backend (`backends/`) is a class with these methods, found by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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


@dataclass(frozen=True)
class Finding:
    """Where a model breaks a rule of a runtime.

    Attributes:
        number, rule: of the rule, and its name, as the runtime's page in `docs/` lists them.
        error: the runtime does not take it; else it is advice.
        node: name of the node, or of the weight or tensor, that it is about.
        op: operator of the node; "" where it is no node.
        found, allowed, remedy: what was found, what is allowed, what to do.
    """

    number: int
    rule: str
    error: bool
    node: str
    op: str
    found: str
    allowed: str
    remedy: str

    def __str__(self) -> str:
        kind = "error" if self.error else "warning"
        place = f"{self.op} {self.node!r}" if self.op else repr(self.node)
        return f"{kind}: {place}: rule {self.number} ({self.rule}): {self.found}; {self.allowed}: {self.remedy}"


class Checker(Protocol):
    """A backend that can tell whether its runtime takes a model without running it."""

    def check(self, model: Model) -> tuple[Finding, ...]:
        """Every place where a model breaks a rule, in the graph's order; it may be any model."""
        ...


def caveat(backend: Backend) -> str:
    """What is not known of a model here, because another runtime stands in for this one, one sentence.

    A backend that is not at hand states it as its attribute of that name; "" for all others.
    """
    return getattr(backend, "caveat", "")


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


class Slice(NamedTuple):
    """Weights that belong to units, as `effc.channels` has them: an initializer, and units along one of its axes.

    Attributes:
        units: number of the unit of each index along the axis, or, where the axis is None, of each number of the
            initializer; -1 for none. Several slices may name the same units.
    """

    weight: str
    axis: int | None
    units: np.ndarray


@dataclass(frozen=True)
class Gradients:
    """Gradients g_n of a loss by the weights w, over samples n.

    Attributes:
        mean: initializer -> E g_n.
        squares: initializer -> E g_n^2, number by number: the diagonal of the empirical Fisher information.
        products, taylor, fisher: [U] of the units asked for, s_n the sum of g_n w over a unit's weights: E s_n, E |s_n|
            and E s_n^2.
    """

    mean: Mapping[str, np.ndarray]
    squares: Mapping[str, np.ndarray]
    products: np.ndarray
    taylor: np.ndarray
    fisher: np.ndarray


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

    def compose(self, view: Any) -> None:
        """Make a view quicker to train, in place: its results, weights and names stay, its modules need not all run."""
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

    def mask(self, view: Any, name: str, kept: np.ndarray) -> None:
        """Hold numbers of a weight at zero, through training and when written back: those where `kept` is zero."""
        ...

    def curvature(self, view: Any, feeds: Iterable[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Trained initializer -> h >= 0 such that h w^2 / 2 is the damage of setting w to zero, to second order.

        Raises:
            BadInput: the view holds a function whose curvature is not known.
        """
        ...

    def gradients(
        self,
        view: Any,
        feeds: Iterable[Mapping[str, np.ndarray]],
        labels: Sequence[np.ndarray] | None = None,
        *,
        units: Sequence[Slice] = (),
        seed: int = 0,
    ) -> Gradients:
        """Gradients of the trained initializers, sample by sample; the view must take one sample at a time.

        Args:
            labels: classes, batch by batch: the loss is their cross entropy. Without, targets are drawn from the
                network's own outputs, so that the mean square is the Fisher information, on the scale of `curvature`.
            units: weights that are taken together.
            seed: of the draws.

        Raises:
            BadInput: labels without class scores, units of no trained weight or of another size.
        """
        ...
