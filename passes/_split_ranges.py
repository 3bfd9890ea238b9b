"""A float tensor that integer layers read, as two of half its range: one bit more for it.

    x = clip(z, 0, h)  ->  x' = [clip(z, 0, h / 2), clip(z - h / 2, 0, h / 2)],   W x = [W, W] x'

Both halves have the scale of half the range, so that codes are a fourth as noisy, and what is computed stays. It takes
the reading layers twice the products, so it is for where integers begin: there z is made in floats anyway, and where
channels move together a layer that takes differences of them is left with much of the codes' noise and little signal.
A cousin of outlier channel splitting (Zhao et al., "Improving neural network quantization without retraining using
outlier channel splitting", ICML 2019), with ranges in place of halved values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from effc import edit
from effc.contract import Context
from effc.layers import constant_weight
from effc.model import Model
from effc.placement import Placement, is_absorbed
from effc.quantize import Affine
from effc.walk import samples

# Of a layer's output variance, by the codes of what it reads: MobileNet's first pointwise layer has 2.8e-4, its others
# 1.3e-4 at most.
NOISY = 2e-4
DEARER = 0.1  # of all weighted layers' products that may come on top
SAMPLES = 32


def split_ranges(model: Model, placement: Placement, ranges: Mapping[ir.Value, Affine], context: Context) -> list[str]:
    """Split tensors where it is worth it, in the float model; their names."""
    found = {}
    for value in placement.coded:
        if value in ranges and value not in placement.made and (readers := _readers(value, placement.integer)):
            found[value] = readers
    if not found:
        return []
    noise = _noise(model, found, ranges, context)
    products = {n: _products(model, n) for n in model.nodes("Conv", "Gemm", "MatMul")}
    split = []
    for value, readers in found.items():
        dearer = sum(products[n] for n in readers)
        if noise[value] >= NOISY and dearer <= DEARER * sum(products.values()):
            _split(model, value, readers, ranges[value].high)
            split.append(value.name or "")
    return split


def _readers(value: ir.Value, integer: Collection[ir.Node]) -> list[ir.Node]:
    """Convolutions in integers over all channels of a tensor cut off from below at zero; none where others read it."""
    maker = value.producer()
    if maker is None or not is_absorbed(maker) or value.is_graph_output():
        return []
    uses = list(value.uses())
    fits = all(
        index == 0 and n in integer and n.op_type == "Conv" and n.attributes.get_int("group", 1) == 1
        for n, index in uses
    )
    return [n for n, _ in uses] if fits else []


def _noise(
    model: Model, found: Mapping[ir.Value, list[ir.Node]], ranges: Mapping[ir.Value, Affine], context: Context
) -> dict[ir.Value, float]:
    """Share of the variance of what a tensor's readers make that rounding the tensor to its codes comes to."""
    layers = [n for readers in found.values() for n in readers]
    names = {n: n.outputs[0].name for n in layers}
    session = context.backend.session(model, threads=context.threads, expose=sorted(set(names.values())))
    variance = dict.fromkeys(layers, 0.0)
    feeds = samples(model, context.calibration, SAMPLES)
    for batch in feeds:
        made = session.run(batch)
        for n in layers:
            rows = np.moveaxis(made[names[n]], 1, -1)
            variance[n] += float(rows.reshape(-1, rows.shape[-1]).var(axis=0, dtype=np.float64).sum()) / len(feeds)
    return {
        value: max(
            float(ranges[value].scale) ** 2 / 12 * float((constant_weight(n).astype(np.float64) ** 2).sum())
            / max(variance[n], 1e-30)
            for n in readers
        ) for value, readers in found.items()
    }  # fmt: skip


def _products(model: Model, node: ir.Node) -> float:
    """Multiply-accumulates of a layer for one sample, as far as shapes are known."""
    weight, shape = constant_weight(node), model.shapes().get(node.outputs[0].name)
    if weight is None or shape is None:
        return 0.0
    spatial = [d for d in shape[2:] if isinstance(d, int)] if node.op_type == "Conv" else []
    return float(weight.size * np.prod(spatial, dtype=float))


def _split(model: Model, value: ir.Value, readers: list[ir.Node], high: float) -> None:
    name, before = value.name, value.producer().inputs[0]
    half = edit.add_initializer(model, f"{name}_half", np.float32(high / 2))
    zero = edit.add_initializer(model, f"{name}_zero", np.float32(0))
    rest = edit.make_node(model, "Sub", [before, half], name=f"{name}_rest", origin=readers)
    both = edit.make_node(model, "Concat", [before, rest.outputs[0]], {"axis": 1}, name=f"{name}_both", origin=readers)
    halves = edit.make_node(
        model, "Clip", [both.outputs[0], zero, half], name=f"{name}_halves", origin=[value.producer()]
    )
    edit.insert_after(model, value.producer(), [rest, both, halves])
    for node in readers:
        weight = model.constant(node.inputs[1])
        twice = edit.add_initializer(model, f"{node.inputs[1].name}_twice", np.concatenate([weight, weight], axis=1))
        edit.set_input(model, node, 1, twice)
        edit.set_input(model, node, 0, halves.outputs[0])
