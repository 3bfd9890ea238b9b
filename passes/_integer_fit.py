"""What a layer of a half-lowered model meets, and should make: moments that its integer codes are fitted to.

    A = argmin E |A (x' - m') - (y - m)|^2,   b = m - Q m'

x' is what the layer gets behind layers that are in integers already, y what the float model makes there, Q its decoded
weights. A takes the place of the weights that are rounded (Frantar et al. 2022, section 5, with inputs and targets of
different models as in Zhang et al., TPAMI 2016, section 3.2), and the bias keeps each channel's mean (Nagel et al.,
"Data-free quantization through weight equalization and bias correction", ICCV 2019, section 4.2, the empirical form,
layer after layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.contract import Context
from effc.layers import WEIGHTED, dilations, output_axis, pads, strides
from effc.model import Model
from effc.quantize import Weight, weight_scales
from effc.walk import Walk, samples
from effc.zeros import is_sparse

from ._rounding import round_to_outputs

SAMPLES = 1024  # at most; fewer where they take too much memory

POSITIONS = 16_384  # of a layer
NUMBERS = 4_000_000  # in the patches of one batch
WIDEST = 2560  # numbers of a patch; of wider ones moments take long, and rounding is averaged out anyway
RIDGE = 1e-4  # of the mean variance of inputs, added at least
HELD = 30.0  # times the ridge, so firmly weights are held to what they were; a fit alone would learn the samples


@dataclass(frozen=True)
class Moments:
    """Of what a layer meets (D numbers a group) and should make (n outputs a group), over output positions.

    Attributes:
        mean: [G, D] of the inputs that it gets.
        metric: [G, D, D] their covariance about it, a ridge added.
        best: [G, n, D] the weights that come closest to what it should make, held to its own by the ridge.
        wanted: [G, n] mean of what it should make.
    """

    mean: np.ndarray
    metric: np.ndarray
    best: np.ndarray
    wanted: np.ndarray


class Fit:
    """Codes of one layer after another, fitted to what each meets behind those before.

    Args:
        model: the float model, before anything of it is lowered; it says what layers should make.
        asymmetric: towards what the float model makes; else towards what the weights make of the inputs given.
        corrected: the bias keeps the mean output of the float model.
    """

    def __init__(self, model: Model, context: Context, *, asymmetric: bool = True, corrected: bool = True) -> None:
        self.context, self.asymmetric, self.corrected = context, asymmetric, corrected
        self._float = model.clone()
        self._outputs = {n.name: n.outputs[0].name for n in self._float.nodes(*WEIGHTED)}

    def start(self, model: Model) -> None:
        """From here on the model is lowered, layer by layer from first to last."""
        feeds = samples(model, self.context.calibration, SAMPLES)
        settings = {"threads": self.context.threads}
        self._here = Walk(model, self.context.backend, feeds, **settings)
        self._there = Walk(self._float, self.context.backend, feeds, **settings)

    def takes(self, node: ir.Node, weight: np.ndarray) -> bool:
        """Whether moments of a layer can be held, its patches be taken, and its zeros need not stay."""
        if node.name not in self._outputs or weight.ndim not in (2, 3, 4) or is_sparse(weight):
            return False
        return grouped(node, weight).shape[-1] <= WIDEST

    def codes(
        self, node: ir.Node, weight: np.ndarray, axis: int, bias: np.ndarray | None, settings: Mapping[str, Any]
    ) -> tuple[Weight, np.ndarray | None]:
        """Codes of a layer, and its bias."""
        given, made = node.inputs[0].name, self._outputs[node.name]
        found = moments(
            node, weight, [b[given] for b in self._here.to(given)], [b[made] for b in self._there.to(made)],
            centred=self.corrected and node.op_type != "MatMul", seed=self.context.seed, asymmetric=self.asymmetric,
        )  # fmt: skip
        aim = ungrouped(node, found.best, weight.shape)
        scales = weight_scales(aim, axis, **settings)
        exact = found.best / scales.astype(np.float64).reshape(*found.best.shape[:2], 1)
        rows = round_to_outputs(exact, found.metric, 2 ** (settings["bits"] - 1) - 1)
        q = Weight(ungrouped(node, rows, weight.shape).astype(np.int8), scales, axis)
        if self.corrected and node.op_type != "MatMul":
            decoded = grouped(node, q.decoded().astype(np.float64))
            bias = (found.wanted - np.einsum("gnd,gd->gn", decoded, found.mean)).reshape(-1)
        return q, bias


def grouped(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """A layer's weight as [G, n, D]: what patches of D numbers a group are multiplied with."""
    if node.op_type != "Conv":
        return (weight if output_axis(node, 2) == 0 else weight.T)[None]
    groups = node.attributes.get_int("group", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def ungrouped(node: ir.Node, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Back from [G, n, D] to the layer's own shape."""
    if node.op_type != "Conv":
        return rows[0] if output_axis(node, 2) == 0 else rows[0].T
    return rows.reshape(shape)


def moments(
    node: ir.Node, weight: np.ndarray, given: Sequence[np.ndarray], wanted: Sequence[np.ndarray], *, centred: bool,
    seed: int = 0, asymmetric: bool = True,
) -> Moments:  # fmt: skip
    """Moments of a layer.

    Args:
        node: Conv, Gemm or MatMul of the model before its weights were encoded.
        weight: its weight, Gemm's alpha counted in.
        given: batches of its input in the half-lowered model.
        wanted: the same batches of its output in the float model, bias included.
        centred: a bias makes up for means.
        asymmetric: towards what the float model makes; else towards what the weights make of the inputs given.
    """
    rows = grouped(node, weight.astype(np.float64))
    groups, outputs, size = rows.shape
    counts = [y.size // (groups * outputs) for y in wanted]
    share = min(1.0, POSITIONS / max(sum(counts), 1))
    rng = np.random.default_rng(seed)
    total = 0
    first, second = np.zeros((groups, size)), np.zeros((groups, size, size))
    made, cross, fourth = np.zeros((groups, outputs)), np.zeros((groups, outputs, size)), np.zeros(groups)
    about = None
    for x, y, count in zip(given, wanted, counts, strict=True):
        most = max(1, min(round(share * count), NUMBERS // (groups * size)))
        chosen = np.sort(rng.permutation(count)[:most])
        patches = _patches(node, weight.shape, x, chosen).reshape(most, groups, size).swapaxes(0, 1)
        targets = _rows(node, y)[chosen].reshape(most, groups, outputs).swapaxes(0, 1)
        if about is None:
            about = patches.mean(axis=1), targets.mean(axis=1)  # near the means: sums stay exact in float32
        patches, targets = patches - about[0][:, None], targets - about[1][:, None]
        total += most
        first += patches.sum(axis=1, dtype=np.float64)
        made += targets.sum(axis=1, dtype=np.float64)
        second += patches.swapaxes(1, 2) @ patches
        cross += targets.swapaxes(1, 2) @ patches
        fourth += (np.einsum("gsd,gsd->gs", patches, patches, dtype=np.float64) ** 2).sum(axis=1)
    first, made, second, cross, fourth = (each / total for each in (first, made, second, cross, fourth))
    mean, aim = about[0] + first, about[1] + made
    if centred:
        second -= first[:, :, None] * first[:, None]
        cross -= made[:, :, None] * first[:, None]
    else:
        second += _product(mean, mean) - _product(first, first)
        cross += _product(aim, mean) - _product(made, first)
    best = rows
    ridge = _ridge(second, fourth, sum(len(y) for y in wanted)) * np.eye(size)  # samples: positions of one are alike
    ridge *= np.trace(second, axis1=1, axis2=2)[:, None, None] / size + 1e-12
    best = rows
    if asymmetric:
        held = HELD * ridge
        aimed = cross + rows * np.diagonal(held, axis1=1, axis2=2)[:, None]
        best = np.linalg.solve(second + held, aimed.swapaxes(1, 2)).swapaxes(1, 2)
    return Moments(mean, second + ridge, best, aim)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, :, None] * b[:, None]


def _ridge(found: np.ndarray, fourth: np.ndarray, total: int) -> np.ndarray:
    """What brings covariances [G, D, D] closest to those of ever more samples, of their mean variance: [G, 1, 1].

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, lemma 3.2
    to 3.4; where nothing but noise is seen a hundredth is left to the data.
    """
    size = found.shape[-1]
    level = np.trace(found, axis1=1, axis2=2) / size
    power = (found**2).sum(axis=(1, 2))
    noise = np.maximum(fourth - power, 0.0) / total
    share = np.minimum(noise / np.maximum(power - size * level**2, 1e-300), 0.99)
    return np.maximum(RIDGE, share / (1 - share))[:, None, None]


def _rows(node: ir.Node, made: np.ndarray) -> np.ndarray:
    """Outputs as [positions, N]."""
    made = np.moveaxis(made, 1, -1) if node.op_type == "Conv" else made
    return made.reshape(-1, made.shape[-1])


def _patches(node: ir.Node, shape: tuple[int, ...], x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What the kernel meets at chosen output positions, [s, C k...]."""
    if node.op_type != "Conv":
        return x.reshape(-1, x.shape[-1])[chosen]
    kernel = shape[2:]
    spatial = len(kernel)
    around = pads(node, x.shape[2:], kernel)
    padded = np.pad(x, ((0, 0), (0, 0), *zip(around[:spatial], around[spatial:], strict=True)))
    gaps, steps = dilations(node, spatial), strides(node, spatial)
    reach = [gap * (k - 1) + 1 for gap, k in zip(gaps, kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + spatial)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in (*steps, *gaps)))]
    places = np.unravel_index(chosen, (len(x), *windows.shape[2 : 2 + spatial]))
    return windows[(places[0], slice(None), *places[1:])].reshape(len(chosen), -1)
