"""MatMul(x, W)  ->  MatMulNBits(x, codes, scales);  Gather(T, i)  ->  rows of codes, decoded as they are looked up.

Weights of dense layers and tables of embeddings become integers of 8, 4 or 2 bits, with one scale and zero point for
each block of consecutive inputs; activations stay floats. Codes are those nearest to the weights, or, with calibration
data, such that columns make up for each other's rounding (Frantar et al., "GPTQ", 2023), layer after layer, each on
what it meets behind those that are codes already, with biases that make up for the shift of the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from effc import edit
from effc.block_codes import largest, nbytes
from effc.contract import Context, Pass, Proposal, Skipped
from effc.cost import Cost
from effc.errors import BadInput, PassFailed
from effc.evaluate import damage
from effc.lowered import blocks
from effc.model import Model
from effc.opset import lift_opset
from effc.walk import Walk, samples

from ._coded_fit import Way, fit
from ._coded_forms import FLOAT_ACTIVATIONS, INT8_ACTIVATIONS, OPSETS, put_own, put_plain
from ._coded_sites import Coded, matrices
from ._integer_costs import CLOSE
from ._observed import sizes

WIDTHS = (8, 4, 2)
SAMPLES, BATCHES = 512, 2  # batches of them to measure damage on
LEAST = 1e-12


@dataclass(frozen=True)
class WeightOnly(Pass):
    """Weights of dense layers and embeddings as integers in blocks, activations in float."""

    name: ClassVar[str] = "weight-only"

    bits: Annotated[Literal[8, 4, 2], Field(description="of a code; with size=, the fewest that a layer may get")] = 4
    block: Annotated[
        Literal[16, 32, 64, 128, 256] | None,
        Field(description="weights along a layer's inputs that share a scale; None: 32, or the least the target takes"),
    ] = None
    symmetric: Annotated[
        bool | None,
        Field(description="no zero points: smaller, and coarser where weights lean; None: where the target takes none"),
    ] = None
    scales: Annotated[
        Literal["max", "mse"], Field(description="max: cover all weights; mse: least squared error of each block")
    ] = "mse"
    rounding: Annotated[
        Literal["auto", "nearest", "gptq"], Field(description="auto: gptq where there are calibration data")
    ] = "auto"
    form: Annotated[
        Literal["auto", "matmulnbits", "dequantize"],
        Field(description="onnxruntime's operators, or plain ONNX; auto: as the target takes it"),
    ] = "auto"
    activations: Annotated[
        Literal["int8", "float"],
        Field(description="int8: onnxruntime rounds them as products run, which is faster; float: products are exact"),
    ] = "int8"
    embeddings: Annotated[bool, Field(description="tables that rows are looked up in as well")] = True
    keep_float: Annotated[tuple[str, ...], Field(description="names or patterns (*) of nodes to leave in float")] = ()
    size: Annotated[
        float | None, Field(gt=0, le=1, description="share of weight bytes to keep at most; widths are mixed")
    ] = None
    max_drop: Annotated[
        float | None, Field(ge=0, description="points of the metric to lose at most; needs evaluation data")
    ] = None

    def propose(self, model: Model, context: Context) -> Iterator[Proposal | Skipped]:
        self._check(context)
        shapes = sizes(model, context)
        obstacle = self._obstacle(model, context)
        found: list[tuple[Coded, list[dict[str, int]]]] = []
        for coded in matrices(model, self.keep_float, self.embeddings, shapes):
            if isinstance(coded, Skipped):
                yield coded
                continue
            settings = obstacle or self._settings(coded, context)
            if isinstance(settings, str):
                yield from (Skipped(node.name or "", settings) for node in coded.readers)
            else:
                found.append((coded, settings))
        errors = self._errors(found, context)
        prices = self._prices(model, found, errors, context)
        for (coded, settings), off, price in zip(found, errors, prices, strict=True):
            names = tuple(node.name or "" for node in coded.readers)
            before = context.cost_of(model, names)
            for setting, error in zip(settings, off, strict=True):
                pair = self._costs(model, coded, setting, before, context)
                yield Proposal(coded.site, names, setting, *pair, price * error)

    def rewrite(self, model: Model, chosen: Sequence[Proposal], context: Context) -> None:
        settings: dict[str, Mapping[str, Any]] = {p.site: p.setting for p in chosen}
        plain = self._plain(context)
        if plain and model.opset < (least := max(OPSETS[s["bits"]] for s in settings.values())):
            before = model.revision
            lift_opset(model, least)
            context.still_hold(before, model)
        shapes = sizes(model, context)
        found = matrices(model, self.keep_float, self.embeddings, shapes)
        sites = [(c, settings[c.site]) for c in found if isinstance(c, Coded) and c.site in settings]
        feedback = self.rounding != "nearest" and context.calibration is not None
        order = {node: place for place, node in enumerate(model.graph)}
        sites.sort(key=lambda site: min(order[node] for node in site[0].readers))
        codes, errors = fit(model, sites, Way(self._symmetric(context), self.scales == "mse", feedback), context)
        for (coded, _), made in zip(sites, codes, strict=True):
            if plain:
                put_plain(model, coded, made)
            else:
                put_own(model, coded, made, self._level, shapes)
            edit.discard(model, [coded.value])
        self._tell(sites, errors, plain, context)

    def _tell(
        self,
        sites: Sequence[tuple[Coded, Mapping[str, Any]]],
        errors: Mapping[str, float],
        plain: bool,
        context: Context,
    ) -> None:
        if context.calibration is None:
            context.say("no calibration data: weights were rounded by themselves, and nothing about accuracy is known")
        elif errors:
            context.say(
                f"{len(errors)} layers lose {100 * np.mean(list(errors.values())):.2g} % of their power on average"
            )
        if shared := [c.site for c, _ in sites if len(c.readers) > 1]:
            context.say(f"rounded to the nearest, as several nodes read them: {', '.join(shared)}")
        if any(c.products for c, _ in sites) and self.activations == "int8":
            how = (
                "as onnxruntime makes of DequantizeLinear" if plain else "accuracy level 4; activations=float does not"
            )
            context.say(f"onnxruntime rounds the activations before these products to 8 bits ({how})")

    def _check(self, context: Context) -> None:
        """Raises BadInput for options that contradict each other, the target, or need data."""
        if self.rounding == "gptq" and context.calibration is None:
            raise BadInput("rounding=gptq needs calibration data: give --calibrate SPEC (Python: calibrate=...)")
        if context.target.runtime != "onnxruntime":
            if self.form == "matmulnbits":
                raise BadInput(f"form=matmulnbits is for onnxruntime; {context.target.name} takes form=dequantize")
            if context.target.integer.signed and self.symmetric is False:
                raise BadInput(f"{context.target.name} takes zero points of 0 alone: leave symmetric=false out")
            if self.block not in (None, *(taken := context.target.integer.blocks)):
                raise BadInput(
                    f"{context.target.name} takes blocks of {' or '.join(map(str, taken))}, not {self.block}"
                )
        if self._plain(context) and self.activations == "float" and context.target.runtime == "onnxruntime":
            raise BadInput(
                "activations=float with form=dequantize lies with the session: onnxruntime rounds them to 8 bits unless"
                " it is given session.qdq_matmulnbits_accuracy_level=1; form=matmulnbits says it in the file"
            )

    def _symmetric(self, context: Context) -> bool:
        return context.target.integer.signed if self.symmetric is None else self.symmetric

    @property
    def _level(self) -> int:
        return FLOAT_ACTIVATIONS if self.activations == "float" else INT8_ACTIVATIONS

    def _plain(self, context: Context) -> bool:
        return self.form == "dequantize" or (self.form == "auto" and context.target.runtime != "onnxruntime")

    def _obstacle(self, model: Model, context: Context) -> str | None:
        """Why the plain form cannot be written in this model, or None."""
        least = OPSETS[self.bits]
        if not self._plain(context) or model.opset >= least:
            return None
        try:
            lift_opset(model.clone(), least)
        except PassFailed as error:
            return f"blocks of {self.bits} bits need opset {least}: {error}"
        return None

    def _settings(self, coded: Coded, context: Context) -> list[dict[str, int]] | str:
        """The widths and blocks to choose from, narrowest first; or why there are none."""
        if self._plain(context) and coded.products and coded.lookups:
            return "a layer and a table share it: form=dequantize would store it twice"
        if context.target.runtime != "onnxruntime" and coded.lookups:
            return f"{context.target.name} looks up floats"
        if self._plain(context) and coded.turned:
            return "it is read through Transpose: simplify stores it turned"
        rows, columns = coded.shape
        now, least, settings = 4 * rows * columns, 0, []
        for bits in sorted((w for w in WIDTHS if w >= self.bits) if self.size is not None else (self.bits,)):
            block = self._block(columns, bits, context)
            if block not in (taken := context.target.integer.blocks):
                return f"its rows of {columns} numbers are shorter than a block of {min(taken)}"
            after = nbytes(rows, columns, bits, block, self._symmetric(context))
            least = least or after
            fits = columns % (8 // bits) == 0 and (not coded.products or columns % block == 0)
            if coded.lookups and not fits:
                return f"rows of {columns} numbers do not fill whole bytes and blocks at {bits} bits"
            if after < now:
                settings.append({"bits": bits, "block": block})
        told = f"it takes {now:,} bytes, and in blocks of {self.bits} bits with their scales {least:,}"
        return settings or told

    def _block(self, columns: int, bits: int, context: Context) -> int:
        """No block is longer than a row; at 2 bits onnxruntime has fast kernels for 32 to 128 alone."""
        block = min(self.block or context.target.integer.blocks[0], max(16, 1 << (columns - 1).bit_length()))
        return (
            min(max(block, 32), 128) if bits == 2 and not self._plain(context) and self.activations == "int8" else block
        )

    def _errors(self, found: Sequence[tuple[Coded, list[dict[str, int]]]], context: Context) -> list[list[float]]:
        """Half the relative squared error of each matrix at each setting, rounded to the nearest code.

        In nats only to first order and for matrices that matter alike: it serves to put settings in order.
        """
        errors = []
        for coded, settings in found:
            matrix = coded.matrix
            power = max(float(np.square(matrix, dtype=np.float64).sum()), LEAST)
            own = []
            for setting in settings:
                codes = largest(matrix, **setting, symmetric=self._symmetric(context)).nearest(matrix)
                own.append(0.5 * float(np.square(matrix - codes.decoded(), dtype=np.float64).sum()) / power)
            errors.append(own)
        return errors

    def _prices(
        self,
        model: Model,
        found: Sequence[tuple[Coded, list[dict[str, int]]]],
        errors: Sequence[Sequence[float]],
        context: Context,
    ) -> list[float]:
        """Rise of the output divergence for each unit of a matrix's error: measured where they are traded, else 1."""
        if context.calibration is None or not (self.size is not None or context.precise):
            return [1.0] * len(found)
        feeds = samples(model, context.calibration, SAMPLES)
        walk = Walk(model, context.backend, feeds, threads=context.threads)
        reference = walk.fork(BATCHES).outputs()
        advance = context.progress("weighing matrices", len(found))
        order = {node: place for place, node in enumerate(model.graph)}
        by_place = sorted(range(len(found)), key=lambda i: order[found[i][0].readers[0]])
        measured: dict[int, float] = {}
        for index in by_place:
            (coded, settings), off = found[index], errors[index]
            matrix = coded.matrix
            rounded = largest(matrix, **settings[0], symmetric=self._symmetric(context)).nearest(matrix).decoded()
            weight = coded.stored(rounded)
            if len(coded.readers) == 1 and coded.products and not coded.turned:
                moved = walk.changed(coded.products[0], weight, np.zeros(1, np.float32), len(reference)).outputs()
            else:
                alone = model.clone()
                edit.set_initializer(alone, alone.value(coded.name), weight)
                session = context.backend.session(alone, threads=context.threads)
                moved = [session.run(batch) for batch in walk.feeds(len(reference))]
            measured[index] = damage(moved, reference) / max(off[0], LEAST)
            advance(1)
        return [measured[index] for index in range(len(found))]

    def _costs(
        self, model: Model, coded: Coded, setting: Mapping[str, int], before: Cost, context: Context
    ) -> tuple[Cost, Cost]:
        """Cost of the readers before and after; seconds where the target knows both kernels by measurement."""
        rows, columns = coded.shape
        saved = 4 * rows * columns - nbytes(rows, columns, **setting, symmetric=self._symmetric(context))
        after = replace(before, weight_bytes=before.weight_bytes - saved, energy=0.0, seconds=0.0)
        names = [node.name or "" for node in coded.products]
        unmeasured = setting["bits"] == 2  # kernels of the others were
        if unmeasured or self._plain(context) or coded.lookups or context.foresee(model) is None:
            return replace(before, energy=0.0, seconds=0.0), after
        measured = context.target.kernels.get(1, {})
        found, stands_for = context.backend.kernels(model, context.batch, context.dims, context.threads)
        by_name = {kernel.name: kernel for kernel in found}
        floats = [by_name.get(stands_for.get(name, "")) for name in names]
        coded_kernels = [None if k is None else blocks(k, **setting, level=self._level) for k in floats]
        told = all(k is not None and k.key in measured for k in (*floats, *coded_kernels))
        now, then = (context.seconds(floats), context.seconds(coded_kernels)) if told else (0.0, 0.0)
        if now <= then < CLOSE * now:
            now = then = 0.0  # too close to tell: the stage is measured
        return replace(before, energy=0.0, seconds=now), replace(after, seconds=then)
