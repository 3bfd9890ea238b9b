"""Energy of an inference: the multiply-accumulates, the weights out of main memory, the activations.

E = MACs (e_multiply + e_add) + DRAM bytes / 4 e_DRAM + SRAM bytes / 4 e_SRAM, with the figures of a 45 nm process at
0.9 V from Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, as Han et al., "Learning
both weights and connections", NIPS 2015, figure 1, use them. It orders alternatives; no device is of this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from effc.cost import Cost, ModelCost, cost, operand_type
from effc.model import Model
from effc.predict import Prediction
from effc.target import Target
from effc.traffic import Moved, element_types, traffic

PICO = 1e-12
# Picojoules an operation, by the type of its operands.
ADD = {"int8": 0.03, "int32": 0.1, "float16": 0.4, "float32": 0.9}
MULTIPLY = {"int8": 0.2, "int32": 3.1, "float16": 1.1, "float32": 3.7}
# Picojoules a read of 32 bits: from an 8 KB cache, from main memory.
SRAM, DRAM = 5.0, 640.0
# Type of the factors -> types of multiplication and accumulation. The table knows four types: narrower ones count as
# the next wider, which is an upper bound, and float64 as float32, a lower one.
UNITS = {
    "int4": ("int8", "int32"),
    "int8": ("int8", "int32"),
    "int16": ("int32", "int32"),
    "int32": ("int32", "int32"),
    "int64": ("int32", "int32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("float16", "float16"),
    "float32": ("float32", "float32"),
}


def mac_joules(dtype: str) -> float:
    """Energy of one multiply-accumulate of factors of that type; 8-bit integers are accumulated in 32 bits."""
    narrow_float = dtype.startswith(("float4e", "float6e", "float8e"))
    multiply, add = UNITS.get("float16" if narrow_float else dtype, UNITS["float32"])
    return (MULTIPLY[multiply] + ADD[add]) * PICO


def joules(macs: int, dtype: str, moved: Moved, cache: int) -> float:
    """Energy of some work.

    Args:
        macs: multiply-accumulates.
        dtype: type of their factors.
        moved: what it reads and writes. Weights come from main memory once an inference; an activation that fits the
            cache stays there.
        cache: bytes.
    """
    in_cache = sum(part for part, whole in moved.tensors if whole <= cache)
    from_memory = moved.weights + moved.activations - in_cache
    return macs * mac_joules(dtype) + (from_memory * DRAM + in_cache * SRAM) / 4 * PICO


def on_target(
    model: Model,
    target: Target,
    *,
    batch: int = 1,
    dims: Mapping[str, int] | None = None,
    prediction: Prediction | None = None,
) -> ModelCost:
    """The model's cost with its energy on a target.

    Args:
        batch, dims: as for `effc.cost.cost`.
        prediction: with it, seconds are filled in, and activations that stay inside of a fused kernel move no bytes.
    """
    found = cost(model, batch, dims)
    moved = traffic(model, batch, dims, None if prediction is None else prediction.fused)
    types = element_types(model)
    nodes = {}
    for node in model.graph:
        own = found.nodes[node.name]
        dtype = operand_type(node, types) if own.macs else "float32"
        estimate = None if prediction is None else prediction.nodes.get(node.name)
        nodes[node.name] = replace(
            own,
            activation_bytes=moved[node.name].activations,
            energy=joules(own.macs, dtype, moved[node.name], target.cache),
            seconds=0.0 if estimate is None else estimate.seconds,
        )
    total = sum(nodes.values(), Cost())
    if prediction is not None:
        total = replace(total, seconds=prediction.total.seconds)
    return ModelCost(total, nodes, found.unknown)
