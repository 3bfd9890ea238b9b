"""Matrices turned into codes one after another, each fitted to what it meets behind those that are codes already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc import edit
from effc.block_codes import BlockCodes, Grid, largest, least_squares
from effc.contract import Context
from effc.layers import bias_array, set_bias
from effc.model import Model
from effc.walk import Values, Walk, samples

from ._coded_sites import Coded, bias_site
from ._compensation import lost
from ._gptq import gptq
from ._observed import EACH, MOST_NUMBERS, SAMPLES, sizes
from ._reconstruction import WIDEST, metric
from ._sites import set_added

CALIBRATION = 512  # samples


@dataclass(frozen=True)
class Way:
    """How codes are found.

    Attributes:
        symmetric: zero points in the middle.
        fitted: grids of least squared error, else those that cover all weights.
        feedback: columns make up for each other's rounding, where data are there.
    """

    symmetric: bool
    fitted: bool
    feedback: bool

    def grid(self, matrix: np.ndarray, bits: int, block: int, importance: np.ndarray | None) -> Grid:
        if self.fitted:
            return least_squares(matrix, bits, block, symmetric=self.symmetric, importance=importance)
        return largest(matrix, bits, block, symmetric=self.symmetric)


def fit(
    model: Model, chosen: Sequence[tuple[Coded, Mapping[str, Any]]], way: Way, context: Context
) -> tuple[list[BlockCodes], dict[str, float]]:
    """Codes of each matrix, which the model then holds decoded; and site -> E|Wx - Qx|^2 / E|Wx|^2 about the means.

    A matrix that one layer reads alone is rounded with feedback and its bias makes up for the shift of the mean;
    those that several nodes read are rounded to the nearest.
    """
    if context.calibration is None:
        found = [way.grid(c.matrix, s["bits"], s["block"], None).nearest(c.matrix) for c, s in chosen]
        for (coded, _), codes in zip(chosen, found, strict=True):
            edit.set_initializer(model, coded.value, coded.stored(codes.decoded()))
        return found, {}
    shapes = sizes(model, context)
    feeds = samples(model, context.calibration, CALIBRATION)
    reads = Counter(coded.products[0].inputs[0].name for coded, _ in chosen if coded.products)
    walk = Walk(model, context.backend, feeds, threads=context.threads, keep=reads)
    errors: dict[str, float] = {}
    found = []
    advance = context.progress("rounding layer by layer", len(chosen))
    for coded, setting in chosen:
        rows = None
        if coded.products:
            rows = _rows(walk, coded.products[0].inputs[0].name or "", context.seed)
        codes, shift, error = _round(coded, setting, way, rows, biased=_biased(model, coded, shapes))
        if error is not None:
            errors[coded.site] = error
        if shift is not None:
            _correct(model, coded, shift, shapes)
        edit.set_initializer(model, coded.value, coded.stored(codes.decoded()))
        for node in coded.readers:
            walk.forget(node.outputs[0].name or "")
        for node in coded.turned:
            walk.forget(node.outputs[0].name or "")
        if coded.products:
            name = coded.products[0].inputs[0].name
            reads[name] -= 1
            if not reads[name]:
                walk.release(name or "")
        found.append(codes)
        advance(1)
    return found, errors


def _biased(model: Model, coded: Coded, shapes: dict[str, tuple | None]) -> bool:
    alone = len(coded.products) == 1 and not coded.lookups and not coded.turned
    return alone and bias_site(model, coded.products[0], shapes) is not None


def _round(
    coded: Coded, setting: Mapping[str, Any], way: Way, rows: np.ndarray | None, *, biased: bool
) -> tuple[BlockCodes, np.ndarray | None, float | None]:
    """Codes, what the mean output lost [N] where a bias can make up for it, and the share of power that is lost."""
    matrix, bits, block = coded.matrix, setting["bits"], setting["block"]
    if rows is None:
        return way.grid(matrix, bits, block, None).nearest(matrix), None, None
    mean = rows.mean(axis=0, dtype=np.float64) * biased
    if matrix.shape[1] > WIDEST:
        power = np.einsum("sk,sk->k", rows, rows, dtype=np.float64) / len(rows) - mean**2
        codes = way.grid(matrix, bits, block, power).nearest(matrix)
        return codes, _lost_mean(matrix, codes, mean, biased), None
    spread = metric(rows, mean)[0]
    grid = way.grid(matrix, bits, block, spread.diagonal())
    codes = grid.nearest(matrix)
    if way.feedback and len(coded.readers) == 1:
        codes = better(matrix, codes, gptq(matrix, spread, grid), spread)
    return codes, _lost_mean(matrix, codes, mean, biased), lost(matrix, codes.decoded(), spread)


def better(matrix: np.ndarray, one: BlockCodes, other: BlockCodes, spread: np.ndarray) -> BlockCodes:
    """Row by row the codes, on one grid, that lose less: at the ends of a grid feedback may lose more than it saves."""

    def off(codes: BlockCodes) -> np.ndarray:
        gap = matrix - codes.decoded()
        return np.einsum("nk,nk->n", gap @ spread, gap)

    first = off(one) <= off(other)
    return BlockCodes(np.where(first[:, None], one.codes, other.codes), one.grid)


def _lost_mean(matrix: np.ndarray, codes: BlockCodes, mean: np.ndarray, biased: bool) -> np.ndarray | None:
    return (matrix - codes.decoded()) @ mean if biased else None


def _correct(model: Model, coded: Coded, shift: np.ndarray, shapes: dict[str, tuple | None]) -> None:
    """Add to the bias of a layer."""
    (node,) = coded.products
    site = bias_site(model, node, shapes)
    assert site is not None
    if site.adding is not None:
        set_added(model, site, (site.bias + shift).astype(np.float32))
    else:
        before = bias_array(model, node, len(shift))
        set_bias(model, node, shift if before is None else before + shift)


def _rows(walk: Walk, name: str, seed: int) -> np.ndarray:
    """Rows [S, K] that a layer meets, padding of sequences left out."""
    found = [_real(batch[name], feeds) for batch, feeds in zip(walk.to(name), walk.feeds(), strict=True)]
    rows = np.concatenate(found).astype(np.float32, copy=False)
    size = rows.shape[1]
    most = min(max(SAMPLES, EACH * size), max(MOST_NUMBERS // size, 1))
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:most])]


def _real(values: np.ndarray, feeds: Mapping[str, np.ndarray] | Values) -> np.ndarray:
    """The rows of a tensor, without those that an input called a mask says are padding."""
    rows = values.reshape(-1, values.shape[-1])
    for name, mask in feeds.items():
        if "mask" in name.lower() and mask.shape == values.shape[:-1] and mask.dtype.kind in "biu" and mask.any():
            return rows[mask.reshape(-1) != 0]
    return rows
