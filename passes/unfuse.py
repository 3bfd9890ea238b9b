"""LayerNorm(Add(a, b)) -> LayerNorm(Sum(a, b)): the same operator under a name that the runtime does not fuse.

onnxruntime makes one SkipLayerNormalization of a sum and the layer norm behind it. On the CPU that kernel takes seven
times as long as the two did (128 x 384 numbers: 233 against 32 us; onnxruntime 1.32). Sites are what the runtime says
it fused; whether it pays is measured like all else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from effc import edit
from effc.contract import Context, Pass, Proposal, Skipped
from effc.errors import EffcError
from effc.model import Model

SLOW = ("SkipLayerNormalization",)


@dataclass(frozen=True)
class Unfuse(Pass):
    """Sums that the runtime would put into a slower kernel."""

    name: ClassVar[str] = "unfuse"
    exact: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        fused, reason = _fused(model, context)
        for node in model.nodes("Add"):
            if any(model.constant(v) is not None for v in node.inputs):
                continue  # a bias: it may be fused elsewhere
            if reason or node.name not in fused:
                yield Skipped(node.name, reason or "no slower kernel is made of it")
            else:
                yield Proposal(node.name, (node.name,), {"to": "Sum"}, damage=0.0)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        for node in [model.node(p.site) for p in chosen]:
            made = edit.make_node(model, "Sum", list(node.inputs), name=node.name or "sum", origin=[node])
            edit.replace(model, [node], [made], {node.outputs[0]: made.outputs[0]})


def _fused(model: Model, context: Context) -> tuple[set[str], str]:
    """Names of the nodes that became part of a slow kernel; or why that is not known."""
    if context.target.runtime != "onnxruntime" or context.target.device != "cpu":
        return set(), f"target {context.target.name!r} is not onnxruntime on a CPU"
    try:
        kernels, stands_for = context.backend.kernels(model, context.batch, context.dims, context.threads)
    except EffcError as error:
        return set(), str(error)
    slow = {kernel.name for kernel in kernels if kernel.kind in SLOW}
    return {node for node, kernel in stands_for.items() if kernel in slow}, ""
