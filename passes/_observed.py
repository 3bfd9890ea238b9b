"""Samples of what a layer meets and should make, drawn from walks over a model and over the original."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from effc.contract import Context
from effc.model import Model
from effc.walk import Walk
from effc.walk import samples as drawn

from ._factors import Layer
from ._reconstruction import WIDEST, Seen, metric
from ._sites import Site, known, layers

SAMPLES, EACH = 12_288, 8  # of one layer; more if that is fewer than so many for each number of a patch
MOST_NUMBERS = 40_000_000  # in all patches of one layer
KEPT = 256 * 2**20  # bytes of moments that are remembered


def observe(site: Site, here: Walk, there: Walk, *, seed: int = 0, most: int | None = None) -> Seen:
    """What a layer meets on the way through one model, and what should come out according to another.

    Args:
        here: what comes in, and what a sum adds.
        there: what should stand before the activation.
        most: output positions to look at, where that is enough for so wide patches; None: `SAMPLES`.
    """
    found = here.to(*filter(None, (site.input, site.added)))
    wanted = there.to(site.end)
    rng, parts = np.random.default_rng(seed), []
    counts = [batch[site.end].size // site.layer.outputs for batch in wanted]
    for now, then, chosen in zip(found, wanted, _drawn(site, counts, rng, most), strict=True):
        beside = None if site.added is None else _rows(site, now[site.added])[chosen]
        parts.append((_patches(site, now[site.input], chosen), _rows(site, then[site.end])[chosen], beside))
    patches, outputs, others = (_joined(each) for each in zip(*parts, strict=True))
    return Seen(patches, outputs, others, site.low, site.high, site.biased)


def in_order(
    model: Model,
    outlines: Sequence[Site],
    shapes: Mapping[str, tuple | None],
    context: Context,
    what: str,
    *,
    aim: Model,
    samples: int,
    most: int | None = None,
    asymmetric: bool = True,
) -> Iterator[tuple[Site, Seen]]:
    """Layers one after another, with what each meets behind those before it and what it made in another model.

    Whoever asks rewrites a layer before it asks for the next.

    Args:
        outlines: the layers, in the model's order.
        what: told while it goes on.
        aim: the model that says what should come out.
        samples: at most.
        most: see `observe`.
        asymmetric: else a layer meets what it meets there, as if nothing before it had changed.
    """
    feeds = drawn(model, context.calibration, samples)
    reads = Counter(site.input for site in outlines)
    here = Walk(model, context.backend, feeds, threads=context.threads, keep=reads)
    there = Walk(aim, context.backend, feeds, threads=context.threads, keep={site.end for site in outlines})
    advance = context.progress(what, len(outlines))
    for outline in outlines:
        site = known(model, outline.node, shapes)
        seen = observe(site, here if asymmetric else there, there, seed=context.seed, most=most)
        here.forget(site.output)
        there.release(site.end)
        reads[site.input] -= 1
        if not reads[site.input]:
            here.release(site.input)
        yield site, seen
        advance(1)


def sizes(model: Model, context: Context) -> dict[str, tuple | None]:
    """Shapes of all tensors; what layers read and inference does not know is seen on a sample, if there are any."""
    found = dict(model.shapes(context.batch, context.dims))
    read = {node.inputs[0].name for node in layers(model)}
    missing = [name for name in read if not _fixed(found.get(name))]
    if missing and context.calibration is not None:
        feeds = drawn(model, context.calibration, context.batch or 1)[:1]
        for name, value in Walk(model, context.backend, feeds, keep=missing).to(*missing)[0].items():
            found[name] = value.shape
    return found


def _fixed(shape: tuple | None) -> bool:
    return shape is not None and all(isinstance(d, int) for d in shape)


def aims(model: Model, context: Context, sites: Sequence[Site]) -> Model:
    """The model that says what layers should make: the original, where it still has the same tensors."""
    here, there = model.shapes(1), context.original.shapes(1)
    names = {name for site in sites for name in (site.input, site.added, site.end) if name is not None}
    same = all(name in there and there[name] == here[name] for name in names)
    return context.original if same else model.clone()


class Moments(NamedTuple):
    """Of the patches that a layer meets, D = C kh kw numbers each.

    Attributes:
        mean: [D] as far as a bias makes up for it.
        covariance: [D, D] about the mean, with a ridge (`metric`); None where D is over `WIDEST`.
        ridge: that is in it.
    """

    mean: np.ndarray
    covariance: np.ndarray | None
    ridge: float = 0.0


def moments(site: Site, walk: Walk, context: Context) -> Moments:
    """What a layer meets; computed once for a state of the model, as long as all take `KEPT` bytes at most."""
    digest = None if context.calibration is None else context.calibration.digest
    held = walk.model.cached(("moments", digest, context.seed), dict, for_clones=True)
    if site.name in held:
        return held[site.name]
    patches = met(site, walk, context.seed)
    mean = patches.mean(axis=0, dtype=np.float64) * site.biased
    found = Moments(mean, *((None,) if len(mean) > WIDEST else metric(patches, mean)))
    if sum(_bytes(each) for each in held.values()) + _bytes(found) <= KEPT:
        held[site.name] = found
    return found


def _bytes(found: Moments) -> int:
    return found.mean.nbytes + (0 if found.covariance is None else found.covariance.nbytes)


def met(site: Site, walk: Walk, seed: int) -> np.ndarray:
    """Patches [S, C kh kw] that a layer meets, as many as `observe` looks at."""
    found = [batch[site.input] for batch in walk.to(site.input)]
    rng = np.random.default_rng(seed)
    counts = [_positions(site, x) for x in found]
    return _joined([_patches(site, x, chosen) for x, chosen in zip(found, _drawn(site, counts, rng), strict=True)])


def _drawn(site: Site, counts: Sequence[int], rng: np.random.Generator, samples: int | None = None) -> list[np.ndarray]:
    """Output positions to look at, batch by batch, counted over all images of the batch."""
    size = site.layer.matrix.shape[1]
    most = min(max(samples or SAMPLES, EACH * size), MOST_NUMBERS // size)
    share = min(1.0, most / max(sum(counts), 1))
    return [np.sort(rng.permutation(count)[: max(1, round(share * count))]) for count in counts]


def _positions(site: Site, x: np.ndarray) -> int:
    """Output positions for an input of the layer."""
    return x.size // x.shape[-1] if site.dense else math.prod(_windows(site.layer, x).shape[i] for i in (0, 2, 3))


def _rows(site: Site, made: np.ndarray) -> np.ndarray:
    """Outputs as [positions, N]."""
    made = made if site.dense else np.moveaxis(made, 1, -1)
    return made.reshape(-1, site.layer.outputs)


def _patches(site: Site, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What the kernel meets at chosen output positions, [s, C kh kw]."""
    if site.dense:
        return x.reshape(-1, x.shape[-1])[chosen]
    windows = _windows(site.layer, x)
    image, row, column = np.unravel_index(chosen, (len(x), *windows.shape[2:4]))
    return windows[image, :, row, column].reshape(len(chosen), -1)


def _windows(layer: Layer, images: np.ndarray) -> np.ndarray:
    """Views [n, C, H', W', kh, kw] of what the kernel meets."""
    images = images[:, :, None, :] if images.ndim == 3 else images
    top, left, bottom, right = layer.pads
    padded = np.pad(images, ((0, 0), (0, 0), (top, bottom), (left, right)))
    reach = [gap * (k - 1) + 1 for gap, k in zip(layer.dilations, layer.kernel, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    return windows[:, :, :: layer.strides[0], :: layer.strides[1], :: layer.dilations[0], :: layer.dilations[1]]


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    there = [part for part in parts if part is not None]
    return np.concatenate(there).astype(np.float32, copy=False) if there else None
