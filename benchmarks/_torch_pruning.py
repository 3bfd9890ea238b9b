"""Torch-Pruning on the hand-written ResNets, to stand beside effc's saliencies in `pruning.py`.

A package for benchmarks alone: pip install --no-deps torch-pruning (Fang et al., "DepGraph: towards any structural
pruning", CVPR 2023). The shortcuts of these networks drop pixels and pad channels, which its dependency graph does not
follow, so it is let at the channels inside of blocks alone.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

THERE = importlib.util.find_spec("torch_pruning") is not None
STEPS = 40


def pruned(net: nn.Module, x: torch.Tensor, y: torch.Tensor, share: float) -> Iterator[tuple[str, nn.Module]]:
    """Networks with so large a share of the multiply-accumulates, by what its importances say, layer by layer and over
    all layers together; nothing is trained.

    Args:
        net: with blocks of `conv1` and `conv2`; left as it is.
        x, y: images and their classes, for importances that ask for gradients.
    """
    from torch_pruning import importance

    kinds = {
        "L1": importance.GroupMagnitudeImportance(p=1), "L2": importance.GroupMagnitudeImportance(p=2),
        "Taylor": importance.GroupTaylorImportance(), "BN scale": importance.BNScaleImportance(),
    }  # fmt: skip
    for name, kind in kinds.items():
        for everywhere in (False, True):
            yield f"{name}, {'global' if everywhere else 'uniform'}", _at(net, kind, everywhere, x, y, share)


def _at(net: nn.Module, kind, everywhere: bool, x: torch.Tensor, y: torch.Tensor, share: float) -> nn.Module:
    """Step by step, each a fortieth of the channels, until no more than so large a share is left."""
    import torch_pruning as tp

    clone, whole = copy.deepcopy(net).eval(), macs(net)
    inner = {block.conv1 for block in clone.modules() if hasattr(block, "conv1") and hasattr(block, "conv2")}
    rest = [m for m in clone.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner]
    pruner = tp.pruner.BasePruner(
        clone, x[:2], importance=kind, global_pruning=everywhere, pruning_ratio=0.95, iterative_steps=STEPS,
        ignored_layers=rest,
    )  # fmt: skip
    while macs(clone) > share * whole:
        if isinstance(kind, tp.importance.GroupTaylorImportance):
            clone.zero_grad()
            F.cross_entropy(clone(x), y).backward()
        pruner.step()
    clone.zero_grad()
    return clone


def macs(net: nn.Module) -> int:
    """Of convolutions and dense layers, for one image."""
    counted = []

    def count(layer: nn.Module, _, made: torch.Tensor) -> None:
        counted.append(layer.weight[0].numel() * made[0].numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(counted)
