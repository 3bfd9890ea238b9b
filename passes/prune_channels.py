"""Conv(C -> N), Conv(N -> M)  ->  Conv(C -> n), Conv(n -> M): units of coupled channels removed, the rest made denser.

Which channels live and die together is `effc.channels`' word. Which of them go is found by backward elimination: a
unit costs what the least-squares residuals of the layers that read it rise by when it goes and all that stays makes up
for it (`_elimination`). What that hurts is measured on calibration data, what it saves is counted or predicted on the
target, and the budget is spent over all groups at once. Then layer by layer, in order: units are chosen by what the
layer gets behind layers that are pruned already, and its weights and bias are fitted anew to what the original makes.
Other saliencies rank units without looking at what stays (`_saliency`). Units that every layer reads with zeros, as
`group-lasso` leaves them, can go alone and exactly (`zeros`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from effc.choose import GOALS, QUANTITIES
from effc.contract import Budgeted, Context, Proposal, Skipped
from effc.cost import Cost
from effc.errors import BadInput
from effc.model import Model
from effc.removal import remove_units

from ._correction import Correction
from ._observed import sizes
from ._prune_path import Choice, Step, path, ranked, steps_of
from ._unit_order import Order, by_reconstruction
from ._unit_saliency import by_saliency
from ._widths import Coupled, Widths, less, prunable, unread


@dataclass(frozen=True)
class PruneChannels(Budgeted):
    """Channels that are coupled, removed together."""

    name: ClassVar[str] = "prune-channels"

    saliency: Annotated[
        Literal["reconstruction", "l1", "l2", "batch-norm", "geometric-median", "taylor", "fisher", "obd", "random"],
        Field(description="by what units are chosen; without calibration data l2 in place of reconstruction"),
    ] = "reconstruction"
    labels: Annotated[
        bool, Field(description="taylor, fisher: the calibration data's labels, not the network's own predictions")
    ] = False
    scope: Annotated[
        Literal["global", "layer"], Field(description="units of all layers are compared, or all give the same share")
    ] = "global"
    correct: Annotated[
        bool, Field(description="fit the layers that read what was pruned anew, from calibration data")
    ] = True
    nonlinear: Annotated[bool, Field(description="fit what comes out behind the activation")] = True
    zeros: Annotated[
        bool, Field(description="units that nothing reads with anything but zeros go and no others, exactly; no budget")
    ] = False
    multiple: Annotated[
        int | None, Field(ge=1, description="units left are multiples of it; None: as kernels like")
    ] = None
    most: Annotated[float, Field(gt=0, lt=1, description="share of the units of a group to remove at most")] = 0.9

    def bounded(self, given: Mapping[str, float]) -> bool:
        return super().bounded(given) or self.zeros

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        if self.zeros:
            yield from self._without_zeros(model, context)
            return
        if context.calibration is None and not QUANTITIES.keys() & self.budget().keys():
            raise BadInput(
                "prune-channels needs calibration data (--calibrate SPEC; Python: calibrate=...) to tell what it "
                "hurts, or a budget: macs=, size= or speedup="
            )
        quantity = self._quantity(model, context)
        groups, choices = [], {}
        for item in prunable(model):
            if isinstance(item, tuple):
                yield Skipped(*item)
            else:
                groups.append(item)
        if not groups:
            return
        shapes = sizes(model, context)
        orders = self._orders(model, groups, shapes, context)
        for group in groups:
            left = steps_of(group.count, self._multiple(group, quantity), self.most)
            if len(left) == 1:
                yield Skipped(group.name, f"of its {group.count} units none can go in steps that kernels like")
            choices[group.name] = Choice(left, [orders[group.name].damage[group.count - n] for n in left])
        widths = Widths(model, groups, shapes, context, timed=quantity == "seconds")
        budget = {n: b for n, b in self.budget().items() if n in QUANTITIES}
        total = context.costs(model).total

        def enough(saved: Cost) -> bool:
            return bool(budget) and _holds(budget, total, saved)

        scaled = all(order.scaled for order in orders.values())
        if self.scope == "global" and scaled:
            steps = path(widths, choices, quantity, enough)
        else:
            steps = ranked(widths, choices, enough, alike=self.scope == "layer")
        yield from _proposals(steps, groups, context.costs(model).nodes, only_last=bool(budget), scaled=scaled)
        reached = {step.site for step in steps}
        for group in groups:
            if group.name not in reached and len(choices[group.name].sizes) > 1:
                yield Skipped(group.name, "the budget does without it" if budget else "nothing is saved by fewer units")

    def _without_zeros(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        if given := self.budget().keys() - {"max_drop"}:
            raise BadInput(f"zeros=true takes what is zero, and no budget: leave out {', '.join(sorted(given))}")
        groups = [item for item in prunable(model) if isinstance(item, Coupled)]
        yield from (Skipped(*item) for item in prunable(model) if isinstance(item, tuple))
        widths = Widths(model, groups, sizes(model, context), context, timed=context.goal == "latency")
        steps = []
        for group in groups:
            left = group.count - len(unread(model, group))
            if left == group.count:
                yield Skipped(group.name, "none of its units is read with zeros alone")
                continue
            steps.append(Step(group.name, left, widths.saving(group.name, left), 0.0))
            widths.left[group.name] = left
        yield from _proposals(steps, groups, context.costs(model).nodes, only_last=True, scaled=True)

    def _orders(self, model: Model, groups: Sequence[Coupled], shapes: Mapping, context: Context) -> dict[str, Order]:
        """In which order units of each group go, and what it does."""
        digest = None if context.calibration is None else context.calibration.digest
        key = "channel orders", self.saliency, self.labels, digest, context.seed

        def compute() -> dict[str, Order]:
            if self.saliency == "reconstruction" and context.calibration is not None:
                return by_reconstruction(model, groups, shapes, context)
            kind = "l2" if self.saliency == "reconstruction" else self.saliency
            return by_saliency(kind, model, groups, context, labels=self.labels)

        return model.cached(key, compute, for_clones=True)

    def _quantity(self, model: Model, context: Context) -> str:
        """The attribute of `Cost` that is saved."""
        quantity = GOALS[self.goal(context)]
        return quantity if getattr(context.costs(model).total, quantity) else "macs"

    def _multiple(self, group: Coupled, quantity: str) -> int:
        if self.multiple is not None:
            return self.multiple
        return 8 if quantity == "seconds" and group.count >= 16 else max(1, group.count // 32)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        left = {p.site: int(p.setting["units"]) for p in chosen}
        groups = [item for item in prunable(model) if isinstance(item, Coupled)]
        if self.zeros:
            remove_units(model, {unit for g in groups if g.name in left for unit in unread(model, g)})
            return
        shapes = sizes(model, context)
        orders = self._orders(model, groups, shapes, context)
        groups = [group for group in groups if group.name in left]
        gone = {g.name: orders[g.name].units[: g.count - left[g.name]] for g in groups}
        again = self.saliency == "reconstruction"
        correction = Correction(model, groups, gone, shapes, context, self.nonlinear, again)
        if self.correct and context.calibration is not None:
            correction.fit()
        else:
            correction.mute()
        remove_units(model, {int(unit) for units in gone.values() for unit in units})


def _holds(budget: Mapping[str, float], total: Cost, saved: Cost) -> bool:
    """Whether so much saved is enough for all shares of a budget."""
    shares = {QUANTITIES[n]: 1 / b if n == "speedup" else b for n, b in budget.items()}
    return all(getattr(total, q) - getattr(saved, q) <= share * getattr(total, q) for q, share in shares.items())


def _proposals(
    steps: Sequence[Step], groups: Sequence[Coupled], costs: Mapping[str, Cost], *, only_last: bool, scaled: bool
) -> Iterator[Proposal]:
    """Of each group what it goes down to, with what all its steps saved beside those of others."""
    for group in groups:
        own = [step for step in steps if step.site == group.name]
        before = sum((costs[name] for name in group.nodes), Cost())
        saved, damage = Cost(), 0.0
        for number, step in enumerate(own):
            saved, damage = saved + step.saved, damage + step.damage
            if number == len(own) - 1 or not only_last:
                told = float(damage) if scaled else None
                yield Proposal(group.name, group.nodes, {"units": step.left}, before, less(before, saved), told)
