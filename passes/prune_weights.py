"""W -> M * W: single weights set to zero, those that matter least, or all but n of every m input channels (N:M).

How much weights matter: by size (Han et al., "Learning both weights and connections for efficient neural networks",
2015), by the damage of their absence to second order (LeCun, Denker and Solla, "Optimal brain damage", 1990), or by the
error of their layer that those that stay cannot make up for (Frantar and Alistarh, "SparseGPT", 2023). Zeros by
themselves save neither time nor memory on a runtime of dense kernels: they save bytes in storage once a compressor has
been over them, and so this pass is judged by those. N:M is for runtimes that have kernels for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from effc import edit
from effc.choose import COMPRESSED
from effc.compressed import compressed_size
from effc.contract import Context, Pass, Proposal, Skipped
from effc.dead import Dead, remove_dead
from effc.errors import BadInput
from effc.evaluate import damage
from effc.model import Model
from effc.walk import Walk, samples

from ._compensated import Rule, lowest, n_of_m, prune
from ._compensation import BLOCK
from ._prunable import Prunable, best_of, counts, fewest, prunable
from ._weight_saliency import Saliency, scores

SPARSITY = 0.9
SAMPLES, BATCHES = 512, 2  # to measure damage on: so many batches of them


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Single weights of convolutions and dense layers set to zero."""

    name: ClassVar[str] = "prune-weights"
    judged_by: ClassVar[str | None] = COMPRESSED

    saliency: Annotated[
        Saliency,
        Field(description="magnitude; obd: damage to second order; obs: by what cannot be made up for; random"),
    ] = "magnitude"
    scope: Annotated[
        Literal["global", "layer"], Field(description="the least of all layers together, or of each the same share")
    ] = "global"
    sparsity: Annotated[
        float | None, Field(gt=0, lt=1, description="share of the weights to be zero; 0.9 where nothing else says")
    ] = None
    deviations: Annotated[
        float | None, Field(gt=0, description="or: weights below so many standard deviations of their layer go")
    ] = None
    pattern: Annotated[
        str | None, Field(pattern=r"^[1-9]\d*:[1-9]\d*$", description="or: 2:4, two of every four input channels stay")
    ] = None
    compensate: Annotated[
        bool, Field(description="fit what stays to what each layer meets in the calibration data")
    ] = False
    remove_dead: Annotated[
        bool | None,
        Field(description="remove channels that nothing is left to make or to read; null: unless pattern= is given"),
    ] = None
    rounds: Annotated[
        int, Field(ge=1, description="times it will be run, each going further: s (1 - (1 - t / rounds)^3)")
    ] = 1
    max_drop: Annotated[
        float | None, Field(ge=0, description="points of the metric to lose at most; needs evaluation data")
    ] = None

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        self._check(context)
        layers = []
        for found in prunable(model):
            why = None if isinstance(found, Skipped) else self._why_not(found)
            if isinstance(found, Skipped):
                yield found
            elif why is not None:
                yield from (Skipped(node.name or "", why) for node in found.nodes)
            else:
                layers.append(found)
        if not layers:
            return
        values = self._scores(model, layers, context)
        settings = self._settings(layers, values)
        walk, reference = None, []
        if context.calibration is not None:
            feeds = samples(model, context.calibration, SAMPLES)
            walk = Walk(model, context.backend, feeds, threads=context.threads)
            reference = walk.fork(BATCHES).outputs()
        advance = context.progress("weighing layers to prune", len(layers))
        for p in layers:
            names = tuple(node.name or "" for node in p.nodes)
            kept = _kept(p, settings[p.site], values[p.site])
            if not np.any(p.weight[~kept]):
                told = f"{p.zeros / p.weight.size:.1%} of its weights are zero already, which is as many as wanted"
                yield from (Skipped(name, told) for name in names)
                continue
            hurt = None
            if walk is not None and len(p.nodes) == 1:
                alone = np.where(kept, p.weight, 0).astype(p.weight.dtype)
                moved = walk.changed(p.nodes[0], alone, np.zeros(1, p.weight.dtype), len(reference))
                hurt = damage(moved.outputs(), reference)
            yield Proposal(p.site, names, settings[p.site], damage=hurt)
            advance(1)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        settings = {p.site: p.setting for p in chosen}
        layers = [p for p in prunable(model) if isinstance(p, Prunable) and p.site in settings]
        values = self._scores(model, layers, context)
        masks = {p.site: _kept(p, settings[p.site], values[p.site]) for p in layers}
        bytes_before, (zeros_before, total) = compressed_size(model), _zeros(model)
        if self.compensate:
            rules = {p.site: _rule(p, settings[p.site]) for p in layers} if self.saliency == "obs" else {}
            errors, skipped = prune(model, layers, masks, rules, context)
            context.say(_told_fit(errors, skipped))
        else:
            for p in layers:
                edit.set_initializer(model, p.value, np.where(masks[p.site], p.weight, 0).astype(p.weight.dtype))
        zeros = _zeros(model)[0]
        if self._removes(layers, zeros, total):
            context.say(_told_dead(remove_dead(model)))
        context.say(
            f"{zeros / total:.1%} of {total:,} weights of layers are zero, {zeros_before / total:.1%} before; "
            f"compressed (zlib) all weights take {compressed_size(model):,} bytes, {bytes_before:,} before"
        )
        if self.pattern is None:
            context.say("zeros save neither time nor memory in a runtime with dense kernels, only compressed bytes")
        else:
            context.say(
                f"weights in the pattern {self.pattern} save time only in a runtime with kernels for them (TensorRT "
                "takes 2:4 on Ampere and later, worth it from 16 input channels and 8 outputs on); elsewhere none"
            )

    def _check(self, context: Context) -> None:
        """Raises BadInput for options that contradict each other, or need data."""
        ways = [n for n in ("sparsity", "deviations", "pattern") if getattr(self, n) is not None]
        if len(ways) > 1:
            raise BadInput(f"{' and '.join(f'{way}=' for way in ways)} each say how many weights go: leave one")
        if self.deviations is not None and self.saliency != "magnitude":
            raise BadInput(f"deviations= is a bound on magnitudes; the saliency is {self.saliency}")
        if self.rounds > 1 and ways not in ([], ["sparsity"]):
            raise BadInput(f"rounds= go towards a sparsity; {ways[0]}= is reached at once")
        if self.pattern is not None:
            n, m = _numbers(self.pattern)
            if n >= m:
                raise BadInput(f"pattern={self.pattern} keeps everything: of n:m, n is less than m")
            if self.saliency == "obs" and BLOCK % m:
                raise BadInput(f"saliency=obs takes patterns n:m whose m divides {BLOCK}; this is {self.pattern}")
        if self.saliency == "obs" and not self.compensate:
            raise BadInput("saliency=obs is what those that stay cannot make up for: it needs compensate=true")
        if self.saliency == "obs" and self.pattern is None and self.scope == "global":
            raise BadInput("saliency=obs compares weights of one layer: it needs scope=layer, or a pattern")
        if self.compensate and context.calibration is None:
            raise BadInput("compensate=true needs calibration data: give --calibrate SPEC (Python: calibrate=...)")

    def _removes(self, layers: Sequence[Prunable], zeros: int, total: int) -> bool:
        """Whether dead units go: in the last round alone, as how far rounds are is read off the share of zeros."""
        wanted = self.pattern is None if self.remove_dead is None else self.remove_dead
        return wanted and (self.rounds == 1 or zeros >= (self.sparsity or SPARSITY) * total - len(layers))

    def _why_not(self, p: Prunable) -> str | None:
        channels, m = p.weight.shape[p.axis], 1 if self.pattern is None else _numbers(self.pattern)[1]
        return f"its {channels} input channels are no multiple of {m}" if channels % m else None

    def _scores(self, model: Model, layers: Sequence[Prunable], context: Context) -> dict[str, np.ndarray]:
        return scores(self.saliency, model, layers, context)

    def _settings(self, layers: Sequence[Prunable], values: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Site -> how it is pruned: a pattern, or how many of its weights are to be zero."""
        if self.pattern is not None:
            return {p.site: {"pattern": self.pattern} for p in layers}
        if self.deviations is not None:
            below = {p.site: np.abs(p.weight) <= self.deviations * p.weight[p.weight != 0].std() for p in layers}
            return {site: {"zeros": int(np.count_nonzero(which))} for site, which in below.items()}
        together, share = self.scope == "global", self.sparsity or SPARSITY
        found = counts(layers, values, share=share, rounds=self.rounds, together=together)
        return {site: {"zeros": count} for site, count in found.items()}


def _kept(p: Prunable, setting: Mapping[str, Any], values: np.ndarray) -> np.ndarray:
    if "pattern" in setting:
        return best_of(values, p.axis, *_numbers(setting["pattern"]))
    return fewest([values], setting["zeros"])[0]


def _rule(p: Prunable, setting: Mapping[str, Any]) -> Rule:
    return n_of_m(*_numbers(setting["pattern"])) if "pattern" in setting else lowest(setting["zeros"] / p.weight.size)


def _numbers(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def _zeros(model: Model) -> tuple[int, int]:
    """How many weights of layers are zero, of how many."""
    found = [(p.zeros, p.weight.size) for p in prunable(model) if isinstance(p, Prunable)]
    return sum(z for z, _ in found), max(sum(n for _, n in found), 1)


def _told_dead(found: Dead) -> str:
    told = f"{found.removed:,} channels or units that nothing makes or reads any more were removed"
    return told + (f"; {found.left:,} are constant and stay, as zero padding meets them" if found.left else "")


def _told_fit(errors: Mapping[str, float], skipped: Mapping[str, str]) -> str:
    told = f"what stays was fitted in {len(errors)} of {len(errors) + len(skipped)} layers"
    if errors:
        told += f", which lose {np.mean(list(errors.values())):.2%} of their outputs' power on average"
    reasons = "; ".join(f"{site}: {why}" for site, why in list(skipped.items())[:3])
    return told + (f"; not in {reasons}" if reasons else "")
