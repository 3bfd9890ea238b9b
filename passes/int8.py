"""Conv(x, W) -> Conv(DQ(Q(x)), DQ(W8)) with Q/DQ behind it: 8-bit integers wherever the target has a kernel for them.

Activations get one scale a tensor, weights one an output channel (Jacob et al. 2018; Krishnamoorthi 2018, section 3).
Q and DQ stand where the target's runtime fuses them into integer kernels. Without calibration data matrix products
are quantised dynamically, and convolutions are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from effc.contract import Context, Pass, Proposal, Skipped
from effc.errors import PassFailed
from effc.layers import WEIGHTED, bias_array, constant_weight, output_axis
from effc.model import Model
from effc.opset import lift_opset
from effc.placement import Placement, plan
from effc.quantize import Affine, affine, choose_range
from effc.statistics import Bins, Histogram, Mean
from effc.target import IntegerKernels

from ._centred_ranges import centre_ranges
from ._dynamic import dynamic_layers
from ._integer_costs import layer_costs, sides
from ._integer_fit import Fit
from ._integer_graph import Lowering
from ._output_ranges import output_ranges
from ._overhang import pad_before
from ._sensitivity import local_damage, output_damage
from ._split_ranges import split_ranges

LEADING = 3  # layers at the start that may stay in float for speed
OPSET = 13  # the first with scales along an axis


@dataclass(frozen=True)
class Int8(Pass):
    """8-bit integers for convolutions and dense layers, and for what lies between them."""

    name: ClassVar[str] = "int8"

    calibrator: Annotated[
        Literal["minmax", "percentile", "entropy", "mse", "output"],
        Field(description="how activation ranges are chosen; output: by the error of what layers make of the codes"),
    ] = "mse"
    percentile: Annotated[
        float, Field(gt=50, le=100, description="share of values, in percent, that percentile keeps")
    ] = 99.99
    activations: Annotated[
        Literal["auto", "static", "dynamic"],
        Field(description="ranges from calibration data, or as it runs; auto: as it runs for products between floats"),
    ] = "auto"
    rounding: Annotated[
        Literal["nearest", "balanced", "gptq"],
        Field(
            description="balanced: weights near a tie keep the layer's mean output; gptq: layer after layer, weights "
            "make up for each other's rounding by what the layer meets"
        ),
    ] = "gptq"
    asymmetric: Annotated[
        bool, Field(description="gptq: layers make up for what integers before them changed, as far as that is sure")
    ] = True
    bias_correction: Annotated[
        bool, Field(description="take the shift of the mean output that rounding causes off the bias")
    ] = True
    split: Annotated[
        bool,
        Field(
            description="one bit more: where integers begin at a tensor whose codes would drown what a layer makes of "
            "it, by two halves of its range, for twice that layer's products; with signed codes, for nothing, where a "
            "tensor from zero to a bound can be moved to lie around zero"
        ),
    ] = True
    keep_float: Annotated[tuple[str, ...], Field(description="names or patterns (*) of layers to leave in float")] = ()
    size: Annotated[float | None, Field(gt=0, le=1, description="share of weight bytes to keep at most")] = None
    max_drop: Annotated[
        float | None, Field(ge=0, description="points of the metric to lose at most; needs evaluation data")
    ] = None

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        if model.opset < OPSET and (obstacle := _lifting_fails(model)):
            yield from (Skipped(n.name, obstacle) for n in model.nodes(*context.target.integer.weighted))
            return
        nodes = list(model.nodes(*sorted(context.target.integer.weighted)))
        refusals = {n: self._refusal(model, n, context) for n in nodes}
        refusals |= _strays({n for n in nodes if not refusals[n]}, model, context.target.integer)
        yield from (Skipped(n.name, reason) for n, reason in refusals.items() if reason)
        proposals = [n for n in nodes if not refusals[n]]
        placement = plan(model, [n.name for n in proposals], context.target.integer)
        dynamic = set(proposals)
        if context.calibration is not None:
            dynamic = dynamic_layers(proposals, placement, context.target, self.activations)
        forms = {n: "dynamic" if n in dynamic else "static" for n in proposals}
        damages = self._damages(model, forms, placement, context)
        costs = layer_costs(model, [n for n in proposals if n not in dynamic], context, static=True)
        costs |= layer_costs(model, [n for n in proposals if n in dynamic], context, static=False)
        for node in proposals:
            yield Proposal(node.name, (node.name,), {"form": forms[node]}, *costs[node], damages[node])

    def _damages(
        self, model: Model, forms: Mapping[ir.Node, str], placement: Placement, context: Context
    ) -> Mapping[ir.Node, float | None]:
        if context.calibration is None or not forms:
            return dict.fromkeys(forms)
        if context.precise:
            quick = self.sketch()  # a fit for each layer would take long
            return output_damage(quick, model, forms, placement, context)
        bins, _ = self._observed(model, placement, context)
        seen = {n: bins[placement.coded[n.inputs[0]]] for n in forms}
        dynamic = {n for n, form in forms.items() if form == "dynamic"}
        codes = {n: affine(b.minimum, b.maximum) if n in dynamic else self._affine(b, context) for n, b in seen.items()}
        return local_damage({n: (codes[n], seen[n]) for n in forms}, _bits(context))

    def _refusal(self, model: Model, node: ir.Node, context: Context) -> str | None:
        """Why a node stays in float whatever stands around it, or None."""
        weight = model.constant(node.inputs[1])
        if weight is None:
            return "its right operand is no constant" if node.op_type == "MatMul" else "its weight is no constant"
        if weight.dtype != np.float32:
            return f"its weight is {weight.dtype}; float32 is lowered"
        if any(fnmatch(node.name, pattern) for pattern in self.keep_float):
            return "keep_float names it"
        if model.constant(node.inputs[0]) is not None:
            return "its input is a constant; simplify folds it"
        if node.op_type == "MatMul" and weight.ndim != 2:
            return f"its right operand has {weight.ndim} axes; 2 are lowered"
        if node.op_type == "Gemm" and node.attributes.get_int("transA", 0):
            return "its left operand is transposed"
        if node.op_type == "ConvTranspose" and (groups := node.attributes.get_int("group", 1)) > 1:
            return f"a transposed convolution of {groups} groups stays in float"
        try:
            bias_array(model, node, weight.shape[output_axis(node, weight.ndim)])
        except ValueError as error:
            return str(error)
        if (reason := _narrow(node, weight.shape, context.target.integer.narrowest)) is not None:
            return reason
        if context.calibration is None and not context.target.integer.dynamic:
            return f"{context.target.runtime} takes no scales that are found as it runs: give --calibrate SPEC"
        if node.op_type not in ("Conv", "ConvTranspose"):
            return None
        if context.calibration is None:
            return "a convolution needs calibration data: give --calibrate SPEC"
        if any(reader.op_type == "BatchNormalization" for reader in node.outputs[0].consumers()):
            return "a batch norm follows it: run fold-batchnorm first"
        return None

    def variants(self, model: Model, chosen: Sequence[Proposal], context: Context) -> Iterator[Sequence[Proposal]]:
        """The first layers see few channels and large maps: from where on integers pay, measuring tells."""
        place = {node.name: index for index, node in enumerate(model.graph)}
        ordered = sorted(chosen, key=lambda p: place[p.site])
        if ordered and ordered[0].setting["form"] == "static":
            yield from (ordered[k:] for k in range(1, min(LEADING, len(ordered) - 1) + 1))

    def sketch(self) -> Int8:
        return replace(self, rounding="balanced", calibrator=self._from_histograms)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        if model.opset < OPSET:
            before = model.revision
            lift_opset(model, OPSET)
            context.still_hold(before, model)
        static = [p.site for p in chosen if p.setting["form"] == "static"]
        if static:
            pad_before(model)
        if static and self.split:
            self._refine(model, static, context)
        lowering = Lowering(
            model,
            _bits(context),
            balanced=self.rounding != "nearest",  # that which cannot be fitted as well
            corrected=self.bias_correction,
            inputs_in=context.target.integer.inputs_in,
            float_bias=context.target.integer.float_bias,
            fit=self._fit(model, context) if static else None,
        )
        if static:
            placement = plan(model, static, context.target.integer)
            bins, means = self._observed(model, placement, context)
            ranges = {v: self._affine(b, context) for v, b in bins.items()}
            if self.calibrator == "output":
                ranges = output_ranges(model, placement, ranges, bins, context, corrected=self.bias_correction)
            lowering.static(placement, ranges, means)
        dynamic = [model.node(p.site) for p in chosen if p.setting["form"] == "dynamic"]
        for node in dynamic:
            lowering.dynamic(node)

    def _refine(self, model: Model, static: Sequence[str], context: Context) -> None:
        """Give tensors one bit more where that can be had, in the float model."""
        placement = plan(model, static, context.target.integer)
        bins, _ = self._observed(model, placement, context)
        ranges = {v: self._affine(b, context) for v, b in bins.items()}
        if context.target.integer.signed:
            names, how = centre_ranges(model, placement, ranges), "moved to lie around zero"
        else:
            names, how = split_ranges(model, placement, ranges, context), "in two halves of the range"
        if names:
            context.say(f"{', '.join(names)} {how}, for one bit more")

    def _fit(self, model: Model, context: Context) -> Fit | None:
        if self.rounding != "gptq":
            return None
        return Fit(model, context, asymmetric=self.asymmetric, corrected=self.bias_correction)

    def _observed(
        self, model: Model, placement: Placement, context: Context
    ) -> tuple[dict[ir.Value, Bins], dict[ir.Node, np.ndarray]]:
        """Histograms of the tensors with codes of their own, and mean inputs of the layers."""
        histograms = {v: Histogram(v.name) for v, source in placement.coded.items() if v is source}
        means = {}
        if self.bias_correction or self.rounding != "nearest":
            layers = (n for n in model.nodes(*WEIGHTED) if n in placement.integer)
            means = {n: Mean(n.inputs[0].name, features=n.op_type != "Conv") for n in layers}
        found = context.statistics(model, [*histograms.values(), *means.values()])
        return {v: found[r] for v, r in histograms.items()}, {n: found[r] for n, r in means.items()}

    @property
    def _from_histograms(self) -> str:
        """The calibrator that asks no layer."""
        return "mse" if self.calibrator == "output" else self.calibrator

    def _affine(self, bins: Bins, context: Context) -> Affine:
        signed = context.target.integer.signed
        return affine(*choose_range(bins, self._from_histograms, self.percentile, signed=signed), signed=signed)


def _bits(context: Context) -> int:
    return 7 if context.target.integer.reduce_range else 8


def _narrow(node: ir.Node, shape: tuple[int, ...], least: int) -> str | None:
    """Why a layer of few inputs or outputs stays in float, or None."""
    groups = node.attributes.get_int("group", 1)
    inputs, outputs = shape[1 - output_axis(node, len(shape))], shape[output_axis(node, len(shape))]
    if node.op_type in ("Conv", "ConvTranspose"):  # a group's own inputs, or its own outputs
        inputs, outputs = (shape[1] * groups, shape[0]) if node.op_type == "Conv" else (shape[0], shape[1] * groups)
    if min(inputs, outputs) >= least:
        return None
    return f"it has {inputs} inputs and {outputs} outputs; from {least} of each on integers are worth it there"


def _strays(nodes: Set[ir.Node], model: Model, kernels: IntegerKernels) -> dict[ir.Node, str]:
    """Convolutions with slow integer kernels that can stay in float without standing between integer layers.

    Between integer layers a slow integer kernel costs less than going to float and back.
    """
    order = list(model.graph)
    layers = {n for n in order if n.op_type in WEIGHTED}
    behind_a_layer, _ = sides(order, layers)
    slow = {}
    for node in nodes:
        if node.op_type == "Conv":
            outputs, inputs = constant_weight(node).shape[:2]
            groups = node.attributes.get_int("group", 1)
            slow[node] = kernels.slow_convolution(outputs, inputs, groups, first=node not in behind_a_layer)
    fast = {n for n in nodes if not slow.get(n)}
    behind, ahead = sides(order, fast)
    return {
        n: f"{reason}; it stands {'behind' if n in behind else 'before'} all layers that gain, and stays in float"
        for n, reason in slow.items()
        if reason and not (n in behind and n in ahead)
    }


def _lifting_fails(model: Model) -> str | None:
    try:
        lift_opset(model.clone(), OPSET)
    except PassFailed as error:
        return f"int8 needs opset {OPSET}: {error}"
    return None
