"""W [N, (c, i, j)]  ->  W [N, S]: groups (c, i, j) of a convolution's patch go for all of its filters at once.

What is left is dense: a smaller kernel, fewer channels, or a thinned patch matrix before a 1 x 1 convolution
(`_forms`; Lebedev and Lempitsky, "Fast ConvNets using group-wise brain damage", CVPR 2016). Each layer gets the form
and the number of groups that pay best: what a form takes is predicted on the target, what it hurts is measured on
calibration data. Then the layers are fitted one after another: which groups stay is decided by what the others can
make up for, and their weights by least squares, inputs from the pruned prefix, targets from the original. Groups that
are zero already, as `group-lasso` leaves them, can go alone and exactly (`zeros`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effc.choose import GOALS, IN_WORDS, QUANTITIES, choose, decisive, spend_damage
from effc.contract import Budgeted, Context, Proposal, Skipped
from effc.cost import Cost
from effc.errors import BadInput
from effc.layers import constant_weight
from effc.model import Model
from effc.walk import Walk, samples

from ._form_costs import FormCosts, place_of, scaled
from ._forms import OPSET, by_tap, columns, emit, nonzero, of_channels, settle, without_zeros
from ._group_saliency import Groups, Saliency, kept_of, windows
from ._observed import Moments, aims, in_order, moments, sizes
from ._producers import Producers, priced
from ._reconstruction import WIDEST, Seen, refit, regression
from ._sites import Site, find, known
from ._split_damage import USUAL, sensitivity, worth
from ._weight_saliency import curvature

SAMPLES, BATCHES = 512, 2  # to fit to; batches of them to measure damage on
SHARES = {  # kept
    "channels": (0.75, 0.625, 0.5, 0.375, 0.25),
    "taps": (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.025),
}
STEP = 8  # channels are kept in multiples of it


@dataclass(frozen=True)
class PruneGroups(Budgeted):
    """Groups of a convolution's weights, removed for all filters alike."""

    name: ClassVar[str] = "prune-groups"

    saliency: Annotated[
        Saliency,
        Field(description="reconstruction: by what the others cannot make up for; l1; obd: damage to second order"),
    ] = "reconstruction"
    forms: Annotated[
        tuple[Literal["crop", "channels", "taps"], ...], Field(description="what may be left of a layer")
    ] = ("crop", "channels", "taps")
    nonlinear: Annotated[bool, Field(description="fit what comes out behind the activation")] = True
    zeros: Annotated[
        bool, Field(description="groups that are zero go and no others, exactly; takes no budget but max_drop")
    ] = False
    min_gain: Annotated[
        float, Field(ge=1, description="how many times cheaper a layer must get, as predicted, to be rewritten")
    ] = 1.1

    def bounded(self, given: Mapping[str, float]) -> bool:
        return super().bounded(given) or self.zeros

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        if self.zeros and (given := self.budget().keys() - {"max_drop"}):
            raise BadInput(f"zeros=true takes what is zero, and no budget: leave out {', '.join(sorted(given))}")
        shapes = sizes(model, context)
        timed = self.speedup is not None or self.goal(context) == "latency"
        costs = FormCosts(context, timed=timed)
        planned: list[tuple[ir.Node, Cost, list[_Option]]] = []
        for node in model.nodes("Conv"):
            site = find(model, node, shapes)
            found = site if isinstance(site, str) else self._options(site, model, shapes, costs, context)
            if isinstance(found, str):
                yield Skipped(node.name, found)
            elif self.zeros:
                before, best = context.cost_of(model, [node.name]), found[0]
                after = scaled(best.own, best.whole, before)
                yield Proposal(node.name, (node.name,), dict(best.settings[0]), before, after, 0.0)
            else:
                planned.append((node, context.cost_of(model, [node.name]), found))
        if not planned:
            return
        walk, reference = None, []
        if context.calibration is not None:
            feeds = samples(model, context.calibration, SAMPLES)
            walk = Walk(model, context.backend, feeds, threads=context.threads)
            reference = walk.fork(BATCHES).outputs()
        producers = Producers(model, shapes, context, timed=timed)
        proposals, fewer = [], []
        advance = context.progress("weighing groups of weights", len(planned))
        for node, before, options in planned:
            site = known(model, node, shapes)
            met = None if walk is None else moments(site, walk, context)
            found = self._weighed(site, options, met, model, context)
            price = 1.0
            if met is not None:
                errors = [error for *_, error in found]
                usual = float(np.clip(USUAL, min(errors), max(errors)))
                price = sensitivity(site, walk, reference, met.covariance, met.mean, usual)
            for option, setting, kept, error in found:
                after = scaled(option.own, option.whole, before)
                proposals.append(Proposal(site.name, (site.name,), setting, before, after, worth(price, error)))
                fewer.append(producers.fewer(site, kept))
            advance(1)
        yield from priced(proposals, fewer, lambda found: self._taken(found, context.costs(model).total, context))

    def _taken(self, proposals: list[Proposal], total: Cost, context: Context) -> list[Proposal]:
        """What the budget would take."""
        budget = self.budget()
        if QUANTITIES.keys() & budget.keys():
            return choose(proposals, budget, total)
        return spend_damage(proposals, budget["damage"], decisive(self.goal(context), proposals))

    def _options(
        self, site: Site, model: Model, shapes: Mapping[str, tuple | None], costs: FormCosts, context: Context
    ) -> list[_Option] | str:
        """The forms that are cheaper by `min_gain`, or why there is none."""
        place = place_of(site, model, shapes, context)
        if isinstance(place, str):
            return place
        whole = costs.of(site, place, "", None)
        quantity = GOALS[self.goal(context)]
        quantity = quantity if getattr(whole, quantity) else "macs"
        found, best = [], (0.0, "")
        if self.zeros and nonzero(site.layer).all():
            return "none of its groups is zero"
        candidates = self._zero if self.zeros else self._candidates
        for form, settings, kept in candidates(site, model):
            own = costs.of(site, place, form, kept)
            gain = getattr(whole, quantity) / max(getattr(own, quantity), 1e-30)
            best = max(best, (gain, form))
            if gain >= self.min_gain:
                found.append((gain, _Option(settings, whole, own)))
        if found:
            found.sort(key=lambda pair: -pair[0])  # what pays best first
            return [option for _, option in found]
        if not best[1]:
            kernel = " x ".join(map(str, site.layer.kernel))
            return f"none of the forms {', '.join(self.forms)} is there for a {kernel} kernel at opset {model.opset}"
        said = f"the best, {best[1]}: {best[0]:.2f} times"
        return f"no form is {self.min_gain:g} times cheaper in {IN_WORDS[quantity]} ({said})"

    def _candidates(self, site: Site, model: Model) -> Iterator[tuple[str, list[dict], np.ndarray]]:
        """Forms, alike in cost: their settings, and one set of groups to know the cost by."""
        layer, size = site.layer, site.layer.matrix.shape[1]
        if "crop" in self.forms:
            for places in windows(layer):
                yield "crop", [{"form": "crop", **p} for p in places], columns(layer, places[0])
        if model.opset < OPSET:
            return
        if "channels" in self.forms:
            for count in sorted({int(s * layer.inputs) // STEP * STEP for s in SHARES["channels"]} - {0}, reverse=True):
                spread = np.linspace(0, layer.inputs - 1, count).round().astype(int)
                yield "channels", [{"form": "channels", "kept": count}], of_channels(layer, spread)
        if "taps" in self.forms and layer.taps > 1:
            for count in sorted({round(s * size) for s in SHARES["taps"]} - {0}, reverse=True):
                spread = by_tap(layer, np.linspace(0, size - 1, count).round().astype(int))
                yield "taps", [{"form": "taps", "kept": count}], spread

    def _zero(self, site: Site, model: Model) -> Iterator[tuple[str, list[dict], np.ndarray]]:
        """Forms without groups that are zero, and the groups that they read."""
        layer, there = site.layer, nonzero(site.layer)
        for form in self.forms:
            if model.opset < OPSET and form != "crop":
                continue
            setting, kept = without_zeros(layer, form, there)
            if len(kept) < len(there):
                yield form, [dict(setting)], kept

    def _weighed(
        self, site: Site, options: Sequence[_Option], met: Moments | None, model: Model, context: Context
    ) -> list[tuple[_Option, dict, np.ndarray, float]]:
        """Of each option the best setting, what it keeps of the patch, and what share of its power the layer loses."""
        covariance, ridge = (None, 0.0) if met is None else met[1:]
        groups, orders, found = Groups(site.layer, site.layer.matrix, covariance, ridge), {}, []
        for option in options:
            form = option.settings[0]["form"]
            if form != "crop" and form not in orders:
                least = min(int(o.settings[0]["kept"]) for o in options if o.settings[0]["form"] == form)
                orders[form] = self._order(site, form, groups, least, model, context)
            tried = []
            for number, setting in enumerate(option.settings):
                if form == "crop":
                    kept = columns(site.layer, setting)
                else:
                    gone_first, parts = orders[form]
                    kept = kept_of(gone_first, parts, int(setting["kept"]))
                tried.append((groups.lost(kept), number, kept))
            error, number, kept = min(tried, key=lambda each: each[:2])
            found.append((option, dict(option.settings[number]), kept, error))
        return found

    def _order(
        self, site: Site, form: str, groups: Groups, least: int, model: Model, context: Context
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        layer, size, worth_of = site.layer, site.layer.matrix.shape[1], None
        parts = list(np.arange(size).reshape(layer.inputs if form == "channels" else size, -1))
        if self.saliency == "obd":
            h = curvature(model, context)[site.node.inputs[1].name].astype(np.float64)
            squares = np.square(np.asarray(constant_weight(site.node), np.float64))
            worth_of = 0.5 * (h * squares).reshape(layer.outputs, -1).sum(axis=0)
        seed = context.seed, zlib.crc32(site.name.encode())
        return groups.order(self.saliency, parts, least, worth_of, seed), parts

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        there = {node.name for node in model.nodes("Gather")}
        self._rewrite(model, {p.site: p.setting for p in chosen}, context)
        if gone := settle(model, [node for node in model.nodes("Gather") if node.name not in there]):
            context.say(f"{gone} channels that nothing reads any more went where they were made")

    def _rewrite(self, model: Model, settings: Mapping[str, Mapping[str, Any]], context: Context) -> None:
        shapes = sizes(model, context)
        nodes = [node for node in model.nodes("Conv") if node.name in settings]
        if context.calibration is None or self.zeros:
            for node in nodes:
                self._replace(model, known(model, node, shapes), settings[node.name], None, context)
            return
        outlines = [known(model, node, shapes).outline() for node in nodes]
        if self.saliency == "obd":
            curvature(model, context)  # of the model before the first edit
        aim = aims(model, context, outlines)
        what = "fitting what is left of layers"
        for site, seen in in_order(model, outlines, shapes, context, what, aim=aim, samples=SAMPLES):
            self._replace(model, site, settings[site.name], seen, context)

    def _replace(
        self, model: Model, site: Site, setting: Mapping[str, Any], seen: Seen | None, context: Context
    ) -> None:
        """Put a form in a layer's place: which groups it keeps is decided by what the layer meets now."""
        layer, matrix, covariance, ridge = site.layer, site.layer.matrix, None, 0.0
        if self.zeros:
            kept = without_zeros(layer, str(setting["form"]), nonzero(layer))[1]
            emit(model, site, setting["form"], kept, matrix[:, kept], None)
            return
        if seen is not None and seen.patches.shape[1] <= WIDEST:
            covariance, ridge = seen.moments
            matrix = regression(layer, seen)
        if setting["form"] == "crop":
            kept = columns(layer, setting)
        else:
            count = int(setting["kept"])
            groups = Groups(layer, matrix, covariance, ridge)
            gone_first, parts = self._order(site, setting["form"], groups, count, model, context)
            kept = kept_of(gone_first, parts, count)
        kept = by_tap(layer, kept) if setting["form"] == "taps" else kept
        weights, bias = layer.matrix[:, kept], None
        if seen is not None:
            weights, bias = refit(layer, seen, kept, nonlinear=self.nonlinear)
        emit(model, site, setting["form"], kept, weights, bias if site.biased else None)


@dataclass(frozen=True)
class _Option:
    """Settings of one form that cost the same, and what they and the layer cost in the small network."""

    settings: list[dict]
    whole: Cost
    own: Cost
