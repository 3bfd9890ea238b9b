"""y = x + f(x)  ->  y = x: residual branches that do least go as a whole, and the layers behind are fitted anew.

Networks of residual branches are much like ensembles of shallower ones (Veit, Wilber and Belongie, "Residual Networks
Behave Like Ensembles of Relatively Shallow Networks", 2016, section 4.1): most of them go on without any one branch.
Which ones is measured, one after another (`_block_order`). Then each layer behind is fitted by least squares to what
it made in the original, from what it sees now, the last of a block to its sum (`_reconstruction.refit`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from effc import edit
from effc.choose import GOALS, QUANTITIES, unreached
from effc.contract import Budgeted, Context, Proposal, Skipped
from effc.cost import Cost
from effc.model import Model

from ._behind import refit_behind
from ._block_order import levelled, order
from ._blocks import Block, blocks, drop

MOST = 2.0  # nats: what is left of a model that lost so much is no start for anything
FITTED = 0.35  # of a branch's damage, what fitting leaves: by trial, 0.3 to 0.4 of it on residual networks


@dataclass(frozen=True)
class PruneBlocks(Budgeted):
    """Residual branches, dropped as a whole."""

    name: ClassVar[str] = "prune-blocks"

    count: Annotated[int | None, Field(ge=1, description="branches to drop, at most")] = None
    correct: Annotated[bool, Field(description="fit the layers behind to what they made in the original")] = True

    def bounded(self, given: Mapping[str, float]) -> bool:
        return super().bounded(given) or (self.count is not None and not given)

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        found: list[Block] = []
        for block in blocks(model):
            if isinstance(block, Skipped):
                yield block
            elif context.calibration is None:
                yield Skipped(block.name, "what its branch is worth is measured on calibration data: give --calibrate")
            else:
                found.append(block)
        if not found:
            return
        total = context.costs(model).total
        before = {block.name: context.cost_of(model, _names(block)) for block in found}
        quantity = GOALS[self.goal(context)]
        if not all(getattr(cost, quantity) for cost in before.values()):
            quantity = "macs"

        def saved(block: Block) -> float:
            return 1.0 if self.count is not None else getattr(before[block.name], quantity) / getattr(total, quantity)

        share = FITTED if self.correct else 1.0
        taken: list[Proposal] = []
        gone: set[str] = set()
        for step in order(model, found, context, saved):
            nodes = tuple(name for name in _names(step.block) if name not in gone)
            gone |= set(nodes)
            whole = before[step.block.name]
            own = whole if len(nodes) == len(_names(step.block)) else context.cost_of(model, nodes)
            setting = {"keep": step.block.keep}
            taken.append(Proposal(step.block.name, nodes, setting, own, Cost(), share * step.rise))
            if self._enough(taken, total):
                break
        savings = [getattr(p.before, quantity) for p in taken]
        damages = levelled([p.damage for p in taken], savings) if all(savings) else [p.damage for p in taken]
        yield from (replace(p, damage=damage) for p, damage in zip(taken, damages, strict=True))
        said = f"{len(taken)} other branches hurt less" if len(taken) > 1 else "another branch hurts less"
        yield from (Skipped(block.name, f"{said}, and are enough") for block in found if block.name not in gone)

    def _enough(self, taken: Sequence[Proposal], total: Cost) -> bool:
        """Whether what was taken fills the budget, or no budget can want more."""
        spent, budget = sum(p.damage or 0.0 for p in taken), self.budget()
        if self.count is not None:
            if len(taken) >= self.count:
                return True
        elif spent > MOST:
            return True
        if quantities := {name: value for name, value in budget.items() if name in QUANTITIES}:
            return not unreached(taken, quantities, total)
        return "max_drop" not in budget and spent > budget.get("damage", MOST)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        keeps = {p.site: int(p.setting["keep"]) for p in chosen}
        dropped = [node for node in model.nodes("Add") if node.name in keeps]
        left = [drop(model, node, keeps[node.name]) for node in dropped]
        if self.correct and context.calibration is not None:
            edit.remove_unused(model)
            refit_behind(model, {reader for value in left for reader in value.consumers()}, context)


def _names(block: Block) -> tuple[str, ...]:
    return (*(node.name or "" for node in block.nodes), block.name)
