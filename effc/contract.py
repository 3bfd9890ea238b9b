"""What a pass is: it proposes, the compiler chooses, the pass rewrites.

A pass is a frozen dataclass whose fields are its options, in Python, in a recipe and on the command line alike.
`propose` looks and never touches; `rewrite` is called once with all that was chosen, on a copy that may be thrown away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from effc.errors import EffcError
from effc.model import Model

if TYPE_CHECKING:
    from effc.cost import Cost, ModelCost
    from effc.data import Data
    from effc.kernels import Kernel
    from effc.predict import Prediction
    from effc.runtime import Backend
    from effc.statistics import Request
    from effc.target import Target

# A larger model takes seconds and memory to predict: there it is done only where latency is the goal.
LARGE_NODES, LARGE_BYTES = 5000, 1 << 30
DAMAGE = 0.05  # of a pass whose budget says nothing, on the scale of its proposals


@dataclass(frozen=True)
class Proposal:
    """One way to rewrite one site: names and numbers, never weights.

    Attributes:
        site: what is rewritten, by the name of its node or group. Alternatives for one site share the name.
        nodes: names of the nodes that go or change.
        setting: how, as plain data; with the site all that `rewrite` needs, so that a report can be replayed.
        before, after: predicted cost of these nodes, with seconds and energy on the target where the pass knows them
            (`Context.cost_of`, `Context.seconds`); None when the pass does not say.
        damage: predicted rise of the output divergence in nats a sample (outputs that are no class scores: relative
            squared error); 0 for exact rewrites, None when it was not estimated.
    """

    site: str
    nodes: tuple[str, ...] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)
    before: Cost | None = None
    after: Cost | None = None
    damage: float | None = None


@dataclass(frozen=True)
class Skipped:
    """A site that a pass leaves alone, and why: what was found and, where it helps, what would be needed."""

    site: str
    reason: str


class Progress(Protocol):
    """Tells the user how far long work is."""

    def __call__(self, what: str, total: int | None = None) -> Callable[[int], None]:
        """Start a bar; the returned function is told how many more steps are done."""
        ...


def no_progress(what: str, total: int | None = None) -> Callable[[int], None]:
    return lambda steps: None


@dataclass
class Context:
    """What a pass may ask for beside the model.

    Attributes:
        original: the recipe's first model: the source of targets for passes that correct as they go. Where a recipe
            begins with training, what that made of it, as weights have moved on from the first. Never changed.
        target: runtime and device that the result is for.
        backend: the runtime itself.
        calibration: data to look at activations with, or None.
        training: data for passes that train, or None.
        teachers: models that these learn from; none: the original.
        later: the passes that follow.
        goal: what has to fall: "latency", "size", "energy" or "macs".
        batch, dims, threads, seed: as the user stated them.
        precise: damage should be estimated with forward passes through the whole model, as far as the pass can; set
            when proposals have to be ordered to hold a limit on accuracy.
    """

    original: Model
    target: Target
    backend: Backend
    calibration: Data | None = None
    training: Data | None = None
    teachers: tuple[Model, ...] = ()
    later: tuple[Pass, ...] = ()
    goal: str = "latency"
    batch: int = 1
    dims: Mapping[str, int] = field(default_factory=dict)
    threads: int = 1
    seed: int = 0
    precise: bool = False
    progress: Progress = no_progress
    _statistics: dict[tuple, Any] = field(default_factory=dict, repr=False)
    _said: list[str] = field(default_factory=list, repr=False)

    def say(self, note: str) -> None:
        """Something about a pass's work that the report should tell, one sentence; for `rewrite`."""
        self._said.append(note)

    def heard(self) -> list[str]:
        """What was said since it was last asked for."""
        said, self._said = self._said, []
        return said

    def statistics(self, model: Model, requests: Iterable[Request]) -> dict[Request, Any]:
        """What the calibration data do inside a model, collected in one streamed run for all that is not known yet.

        Known results are kept per (model, revision, request, data, seed), so an edit makes them void.

        Raises:
            BadInput: there are no calibration data.
        """
        from effc.statistics import collect

        requests = list(dict.fromkeys(requests))
        place = (model.revision, self.calibration.digest if self.calibration else None, self.seed)
        missing = [r for r in requests if (*place, r) not in self._statistics]
        if missing:
            # Results for states gone by would only take memory; the original's are asked for again.
            keep = (model.revision, self.original.revision)
            self._statistics = {k: v for k, v in self._statistics.items() if k[0] in keep}
            for request, result in collect(model, missing, self).items():
                self._statistics[*place, request] = result
        return {r: self._statistics[*place, r] for r in requests}

    def still_hold(self, revision: int, model: Model) -> None:
        """Say that statistics of an earlier state are true of this one: an edit kept tensors, names and values."""
        for (known, *rest, request), result in list(self._statistics.items()):
            if known == revision:
                self._statistics[model.revision, *rest, request] = result

    def predict(self, model: Model) -> Prediction:
        """Predicted latency of one inference on the target; remembered until the next edit.

        Raises:
            EffcError: the runtime does not take the model.
        """
        from effc.predict import predict
        from effc.runtime import caveat

        at_hand = self.backend.name == self.target.runtime and not caveat(self.backend)
        runtime = self.backend if at_hand else None
        settings = {"batch": self.batch, "dims": self.dims, "threads": self.threads}

        def compute() -> tuple[Target, Prediction]:  # the target is held, so that its id stays its own
            return self.target, predict(model, self.target, backend=runtime, **settings)

        return model.cached(self._key("prediction"), compute, for_clones=True)[1]

    def foresee(self, model: Model) -> Prediction | None:
        """The prediction, or None where it would cost more than it tells, or the runtime does not take the model."""
        if self.large and self.goal != "latency":
            return None
        try:
            return self.predict(model)
        except EffcError:
            return None

    @property
    def large(self) -> bool:
        """Whether models of this size take long to predict."""
        return len(self.original.graph) > LARGE_NODES or self.original.nbytes() > LARGE_BYTES

    def costs(self, model: Model) -> ModelCost:
        """What a model costs on the target, energy included, and seconds where these are foreseen.

        A node's seconds are those of its kernel; they stand at the node that leads it, and the others of the kernel
        have none.
        """
        from effc.energy import on_target

        def compute() -> tuple[Target, ModelCost]:
            settings = {"batch": self.batch, "dims": self.dims, "prediction": self.foresee(model)}
            return self.target, on_target(model, self.target, **settings)

        return model.cached((*self._key("costs"), self.goal), compute, for_clones=True)[1]

    def cost_of(self, model: Model, nodes: Iterable[str]) -> Cost:
        """Predicted cost of some nodes of a model, by name."""
        from effc.cost import Cost

        known = self.costs(model).nodes
        return sum((known[name] for name in nodes), Cost())

    def seconds(self, kernels: Sequence[Kernel]) -> float:
        """Predicted time of kernels that are not there yet, one after another."""
        from effc.predict import estimate

        return float(sum(e.seconds for e in estimate(kernels, self.target, self.threads)))

    def _key(self, what: str) -> tuple:
        return what, id(self.target), self.batch, tuple(sorted(self.dims.items())), self.threads


class Pass(ABC):
    """Base of all passes. Subclasses are frozen dataclasses with these class variables:

    Attributes:
        name: on the command line and in recipes.
        exact: True when the rewritten model computes the same function, up to rounding; then `tolerance` states the
            largest max|a - b| / max|a| over any output that is still rounding, and the manager holds the pass to it
            (in models of 16-bit weights, to four units in their last place).
        recovers: True for a pass that regains accuracy and so ends the stage of a lossy pass before it.
        judged_by: what a stage of such passes has to lower in place of the goal, unless a budget says else: for a pass
            that can gain one thing alone.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.0
    recovers: ClassVar[bool] = False
    judged_by: ClassVar[str | None] = None

    @abstractmethod
    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        """Every site the pass could rewrite, with its alternatives, and every site it must leave alone, with why."""

    @abstractmethod
    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        """Make the chosen rewrites in place, through `effc.edit`, in topological order. Must be deterministic."""

    def variants(self, model: Model, chosen: Sequence[Proposal], context: Context) -> Iterator[Sequence[Proposal]]:
        """Smaller choices that may run faster than all that was chosen; the fastest, as measured, is taken."""
        return iter(())

    def sketch(self) -> Pass:
        """A pass that makes the same kernels sooner, whatever their numbers: for choices that are only timed."""
        return self

    def budget(self) -> Mapping[str, float]:
        """The pass's own budget, by the names that all passes share.

        `macs`, `size` and `energy` are shares kept, `speedup` is the predicted latency before over that after,
        `damage` is on the scale of the pass's own proposals, and `max_drop` in points of the metric. A pass with one of
        the first four is judged by it; where `damage` is stated as well, no more than that is done, and what is missed
        of the others is told.
        """
        names = ("macs", "size", "speedup", "energy", "damage", "max_drop")
        return {n: value for n in names if (value := getattr(self, n, None)) is not None}


@dataclass(frozen=True, kw_only=True)
class Budgeted(Pass):
    """A pass that goes as far as a budget lets it: a share kept, a speed-up, an amount of damage, a drop of the metric.

    Its options stand behind the subclass's own and are given by name.
    """

    macs: Annotated[float | None, Field(gt=0, le=1, description="share of multiply-accumulates to keep at most")] = None
    size: Annotated[float | None, Field(gt=0, le=1, description="share of weight bytes to keep at most")] = None
    speedup: Annotated[float | None, Field(ge=1, description="predicted latency before over after, at least")] = None
    damage: Annotated[
        float | None,
        Field(gt=0, description=f"damage to do in all, on the report's scale; {DAMAGE:g} without a budget"),
    ] = None
    max_drop: Annotated[
        float | None, Field(ge=0, description="points of the metric to lose at most; needs evaluation data")
    ] = None

    def budget(self) -> Mapping[str, float]:
        """What is stated; where nothing says how far to go, `DAMAGE`."""
        given = super().budget()
        return given if self.bounded(given) else {**given, "damage": DAMAGE}

    def bounded(self, given: Mapping[str, float]) -> bool:
        """Whether these budgets, or options of a subclass, say how far to go; a limit on accuracy alone does not."""
        return bool({"macs", "size", "speedup", "damage"} & given.keys())

    def goal(self, context: Context) -> str:
        """What has to fall: what the first budget is about, else what the user wants."""
        from effc.choose import JUDGED_BY

        return next((goal for name, goal in JUDGED_BY.items() if getattr(self, name, None) is not None), context.goal)


@dataclass(frozen=True)
class Repeat(Pass):
    """Some passes several times over, one stage for the guard. The manager unrolls it; it rewrites nothing itself."""

    name: ClassVar[str] = "repeat"
    steps: Annotated[int, Field(ge=1, description="how many rounds")] = 2
    passes: Annotated[tuple[Pass, ...], Field(description="what one round runs")] = ()

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        return iter(())

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        return None
