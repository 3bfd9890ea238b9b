"""x / c -> x (1 / c) for constants c: a multiplication is cheaper than a division."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from effc import Context, Model, Pass, Proposal, Skipped, edit


@dataclass(frozen=True)
class Reciprocal(Pass):
    """Div(x, c) -> Mul(x, 1/c)"""

    name: ClassVar[str] = "reciprocal"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-6

    smallest: Annotated[float, Field(gt=0, description="smallest |c| to take the reciprocal of")] = 1e-3

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        for node in model.nodes("Div"):
            c = model.constant(node.inputs[1])
            if c is None:
                yield Skipped(node.name, "its divisor is no constant")
            elif c.dtype.kind != "f":
                yield Skipped(node.name, f"it divides {c.dtype}, which has no reciprocals")
            elif np.abs(c).min(initial=np.inf) < self.smallest:
                yield Skipped(node.name, f"its divisor is below smallest={self.smallest:g}")
            else:
                yield Proposal(node.name, (node.name,), damage=0.0)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        for node in [model.node(p.site) for p in chosen]:
            x, c = node.inputs
            factor = edit.add_initializer(model, f"{c.name}_reciprocal", 1 / model.constant(c))
            mul = edit.make_node(model, "Mul", [x, factor], name=node.name)
            edit.replace(model, [node], [mul], {node.outputs[0]: mul.outputs[0]})
            edit.discard(model, [c])
