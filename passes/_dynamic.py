"""Which matrix products take the range of their input as they run, though calibration data could tell one before.

onnxruntime's CPU kernel for that (DynamicQuantizeMatMul) adds the bias as well, and measures the input it really has:
between float operators it is as fast as ranges known before, and more accurate. Where codes run from one integer layer
to another, ranges known before spare the way to floats and back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from effc.placement import Placement
from effc.target import Target


def dynamic_layers(nodes: Sequence[ir.Node], placement: Placement, target: Target, activations: str) -> set[ir.Node]:
    """Of the layers of a placement, those with ranges of their own at each inference.

    Args:
        nodes: the weighted layers that the placement is for.
        activations: "static": none; "dynamic": all matrix products; "auto": those that no codes lead to or from.
    """
    if activations == "static" or not target.integer.dynamic:
        return set()
    products = {n for n in nodes if n.op_type in ("MatMul", "Gemm")}
    if activations == "dynamic":
        return products
    layers = set(nodes)
    reached = {node: _reached(node, layers, placement) for node in nodes}
    behind = set().union(*reached.values())
    return {n for n in products if n not in behind and not reached[n]}


def _reached(layer: ir.Node, layers: Collection[ir.Node], placement: Placement) -> set[ir.Node]:
    """Layers that a layer's codes come to, through no other layer."""
    found, seen, waiting = set(), {layer}, [layer]
    while waiting:
        node = waiting.pop()
        out = placement.settled.get(node, node.outputs[0])
        for reader in out.consumers() if out in placement.coded else ():
            if reader in seen or reader not in placement.integer:
                continue
            seen.add(reader)
            if reader in layers:
                found.add(reader)
            else:
                waiting.append(reader)
    return found
