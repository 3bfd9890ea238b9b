"""Conv(k x k, C -> N)  ->  a chain of smaller convolutions; Gemm(K -> N)  ->  Gemm(K -> r) . Gemm(r -> N).

Which chain is a method's business, one file each: `_filters` (Zhang et al. 2016), `_separable` (Jaderberg et al.
2014), `_tucker` (Kim et al. 2016), `_cp` (Lebedev et al. 2015), `_decoupled` (Guo et al. 2018). Here each layer gets
the method and the rank that pay best: what a chain takes is predicted on the target, what it hurts is measured on
calibration data, and the budget is spent over all layers at once. Chains are then fitted one after another, each to
what the original makes from what it gets itself (`_reconstruction`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effc.choose import GOALS, IN_WORDS
from effc.contract import Budgeted, Context, Proposal, Skipped
from effc.cost import Cost
from effc.errors import BadInput
from effc.model import Model
from effc.walk import Walk, samples

from ._chain_costs import ChainCosts, Place
from ._cp import CP
from ._decoupled import Decoupled
from ._factors import Method
from ._filters import Filters, Filters3d
from ._observed import aims, in_order, moments, sizes
from ._reconstruction import reconstruct
from ._separable import Separable, SeparableBasis
from ._sites import Site, find, known, layers, put
from ._split_damage import USUAL, sensitivity, worth
from ._tucker import Tucker

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Filters, Filters3d, Separable, SeparableBasis, Tucker, CP, Decoupled)
}
AUTO = ("filters", "filters-3d", "separable", "tucker", "depthwise")  # the others seldom win and take long to fit
SAMPLES, BATCHES = 512, 2  # to fit to; batches of them to measure damage on
KEPT = 0.5  # of the weights, where no budget says


@dataclass(frozen=True)
class LowRank(Budgeted):
    """Convolutions and dense layers as chains of smaller ones."""

    name: ClassVar[str] = "low-rank"

    method: Annotated[
        Literal["auto", "filters", "filters-3d", "separable", "separable-basis", "tucker", "cp", "depthwise"],
        Field(description="which chains to choose from; auto: for each layer what pays best"),
    ] = "auto"
    relaxation: Annotated[
        float | None,
        Field(ge=0, lt=1, description="method=tucker: ranks by variational Bayes, so far back towards full; no budget"),
    ] = None
    terms: Annotated[
        int | None, Field(ge=1, description="method=depthwise: filters a channel, 1 as in MobileNet; no budget")
    ] = None
    nonlinear: Annotated[bool, Field(description="fit what comes out behind the activation")] = True
    asymmetric: Annotated[
        bool, Field(description="fit to the original what stands behind layers that are approximations already")
    ] = True
    multiple: Annotated[int | None, Field(ge=1, description="ranks are multiples of it; None: as kernels like")] = None
    min_gain: Annotated[
        float, Field(ge=1, description="how many times cheaper a layer must get, as predicted, to be rewritten")
    ] = 1.1

    def bounded(self, given: Mapping[str, float]) -> bool:
        return super().bounded(given) or self.relaxation is not None or self.terms is not None

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        for name, method in (("relaxation", "tucker"), ("terms", "depthwise")):
            if getattr(self, name) is not None and self.method != method:
                raise BadInput(f"{name}= is for method={method}, whose ranks it states; the method is {self.method}")
        shapes = sizes(model, context)
        costs = ChainCosts(context, timed=self.speedup is not None or self.goal(context) == "latency")
        planned: list[tuple[ir.Node, Cost, list[_Option]]] = []
        for node in layers(model):
            site = find(model, node, shapes)
            found = site if isinstance(site, str) else self._options(site, model, shapes, costs, context)
            if isinstance(found, str):
                yield Skipped(node.name, found)
            else:
                own = context.cost_of(model, [node.name])
                planned.append((node, own if own.macs else found[0].whole, found))
        walk, reference = None, []
        if context.calibration is not None and planned:
            feeds = samples(model, context.calibration, SAMPLES)
            walk = Walk(model, context.backend, feeds, threads=context.threads)
            reference = walk.fork(BATCHES).outputs()
        advance = context.progress("weighing low-rank chains", len(planned))
        for node, before, options in planned:
            site = known(model, node, shapes)
            price, mean, covariance = 1.0, None, None
            if walk is not None:
                mean, covariance, _ = moments(site, walk, context)
            errors = _errors(site, options, covariance, context.seed)
            if walk is not None and mean is not None:
                usual = float(np.clip(USUAL, min(errors), max(errors)))
                price = sensitivity(site, walk, reference, covariance, mean, usual)
            nodes = (site.name,) if site.adding is None or walk is None else (site.name, site.adding.name or "")
            for option, off in zip(options, errors, strict=True):
                yield Proposal(site.name, nodes, option.setting, before, option.after(before), worth(price, off))
            advance(1)

    def _options(
        self, site: Site, model: Model, shapes: Mapping[str, tuple | None], costs: ChainCosts, context: Context
    ) -> list[_Option] | str:
        """The chains that are cheaper by `min_gain`, or why there is none."""
        place = _place(site, model, shapes, context)
        if isinstance(place, str):
            return place
        then = replace(place, around=_moved(model, context, self._kept()))
        whole = costs.of(site, place, [site.layer.whole(site.layer.weight)])
        quantity = self._quantity(context, whole)
        found, refused, offered, best = [], [], 0, 0.0
        for name in AUTO if self.method == "auto" else (self.method,):
            kind = METHODS[name]
            if why := kind.refusal(site.layer):
                refused.append(f"{name}: {why}")
                continue
            method = kind(site.layer)
            step = self._step(site, quantity)
            for setting in self._settings(method, step):
                after = costs.of(site, then, method.skeleton(setting))
                gain = getattr(whole, quantity) / max(getattr(after, quantity), 1e-30)
                offered, best = offered + 1, max(best, gain)
                if gain >= self.min_gain:
                    found.append(_Option(kind, {"method": name, **setting}, whole, after))
        if found:
            return found
        if offered:
            return f"no chain is {self.min_gain:g} times cheaper in {IN_WORDS[quantity]} (the best: {best:.2f} times)"
        return "; ".join(refused) if self.method != "auto" and refused else "every chain takes more work than the layer"

    def _settings(self, method: Method, step: int) -> Iterator[Mapping[str, int]]:
        """Ranks to choose from, or those that an option states."""
        if isinstance(method, Tucker) and self.relaxation is not None:
            full = {"inputs": method.layer.inputs, "outputs": method.layer.outputs}
            ranks = method.vbmf(self.relaxation)
            yield {name: min(-(-rank // step) * step, full[name]) for name, rank in ranks.items()}
        elif isinstance(method, Decoupled) and self.terms is not None:
            yield {"terms": min(self.terms, method.most)}
        else:
            yield from method.settings(step)

    def _quantity(self, context: Context, whole: Cost) -> str:
        """The quantity of `Cost` that a chain has to lower."""
        quantity = GOALS[self.goal(context)]
        return quantity if getattr(whole, quantity) else "macs"

    def _kept(self) -> float:
        """The share of the weights that other layers will about have left, when their chains run beside this one's."""
        shares = (self.macs, self.size, None if self.speedup is None else 1 / self.speedup)
        return min((share for share in shares if share is not None), default=KEPT)

    def _step(self, site: Site, quantity: str) -> int:
        if self.multiple is not None:
            return self.multiple
        narrow = min(site.layer.outputs, site.layer.inputs * site.layer.taps)
        return 8 if quantity == "seconds" and narrow >= 32 else max(1, narrow // 32)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        shapes = sizes(model, context)
        settings = {p.site: p.setting for p in chosen}
        nodes = [node for node in layers(model) if node.name in settings]
        if context.calibration is None:
            for node in nodes:
                site = known(model, node, shapes)
                method, setting = _method(settings[site.name])
                put(model, site, method(site.layer, None, context.seed).fit(setting), None)
            return
        outlines = [known(model, node, shapes).outline() for node in nodes]
        fitting = in_order(
            model, outlines, shapes, context, "fitting low-rank chains",
            aim=aims(model, context, outlines), samples=SAMPLES, asymmetric=self.asymmetric,
        )  # fmt: skip
        for site, seen in fitting:
            method, setting = _method(settings[site.name])
            factors, bias = reconstruct(site.layer, method, setting, seen, nonlinear=self.nonlinear, seed=context.seed)
            put(model, site, factors, bias if site.biased else None)


@dataclass(frozen=True)
class _Option:
    """One chain for one layer, and what both cost where the layer stands."""

    kind: type[Method]
    setting: Mapping[str, int | str]
    whole: Cost
    chain: Cost

    @property
    def ranks(self) -> dict[str, int]:
        return _method(self.setting)[1]

    def after(self, before: Cost) -> Cost:
        """Cost in the model, given that of the layer there: predicted quantities as shares."""

        def share(quantity: str) -> float:
            whole, own = getattr(self.whole, quantity), getattr(self.chain, quantity)
            return getattr(before, quantity) * own / whole if whole and own else 0.0

        return Cost(
            self.chain.macs,
            before.parameters - self.whole.parameters + self.chain.parameters,
            before.weight_bytes - self.whole.weight_bytes + self.chain.weight_bytes,
            round(share("activation_bytes")),
            share("energy"),
            share("seconds"),
        )


def _errors(site: Site, options: Sequence[_Option], covariance: np.ndarray | None, seed: int) -> list[float]:
    """Relative squared errors of chains, estimated method by method."""
    found: dict[int, float] = {}
    for kind in dict.fromkeys(option.kind for option in options):
        own = [index for index, option in enumerate(options) if option.kind is kind]
        method = kind(site.layer, covariance, seed, rough=True)
        errors = method.errors([options[index].ranks for index in own])
        found |= zip(own, errors, strict=True)
    return [found[index] for index in range(len(options))]


def _method(setting: Mapping[str, int | str]) -> tuple[type[Method], dict[str, int]]:
    ranks = {key: int(value) for key, value in setting.items() if key != "method"}
    return METHODS[str(setting["method"])], ranks


def _place(site: Site, model: Model, shapes: Mapping[str, tuple | None], context: Context) -> Place | str:
    size = shapes.get(site.input)
    if size is None or not all(isinstance(d, int) for d in size):
        return "the shape of its input is not known: state its dimensions (--dim NAME=SIZE), or give data (--calibrate)"
    if site.dense:
        size = (int(np.prod(size[:-1])), size[-1])
    elif len(size) == 3:
        size = (size[0], size[1], 1, size[2])
    first = site.node.inputs[0].is_graph_input()
    return Place(tuple(size), first, _moved(model, context), site.node.inputs[1].const_value.numpy().itemsize)


def _moved(model: Model, context: Context, kept: float = 1.0) -> float:
    """Bytes that go through the caches in an inference, with so much of the weights."""
    return sum(cost.activation_bytes + kept * cost.weight_bytes for cost in context.costs(model).nodes.values())
