"""The same pass, written against onnx-graphsurgeon."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from effc import Skipped, graphsurgeon_pass


@graphsurgeon_pass(name="reciprocal-gs", exact=True, tolerance=1e-6)
def reciprocal(
    graph: gs.Graph,
    *,
    smallest: Annotated[float, Field(gt=0, description="smallest |c| to take the reciprocal of")] = 1e-3,
) -> list[Skipped]:
    """Div(x, c) -> Mul(x, 1/c)"""
    skipped = []
    for node in graph.nodes:
        if node.op != "Div":
            continue
        c = node.inputs[1]
        if not isinstance(c, gs.Constant):
            skipped.append(Skipped(node.name, "its divisor is no constant"))
        elif c.values.dtype.kind != "f":
            skipped.append(Skipped(node.name, f"it divides {c.values.dtype}, which has no reciprocals"))
        elif np.abs(c.values).min(initial=np.inf) < smallest:
            skipped.append(Skipped(node.name, f"its divisor is below smallest={smallest:g}"))
        else:
            node.op = "Mul"
            node.inputs[1] = gs.Constant(f"{c.name}_reciprocal", np.asarray(1 / c.values))
    return skipped
