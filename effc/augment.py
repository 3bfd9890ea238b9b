"""Images varied at random while training: what a network should not mind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

Augment = Literal["none", "flip", "shift", "flip-shift"]


def augmented(feeds: Mapping[str, np.ndarray], kind: Augment, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Images [N, C, H, W] mirrored at random, or shifted by up to an eighth with zeros around; other inputs stay."""
    found = dict(feeds)
    for name, images in feeds.items() if kind != "none" else ():
        if images.ndim != 4 or images.dtype.kind != "f":
            continue
        made = images
        if "flip" in kind:
            flips = rng.random(len(images)) < 0.5
            made = np.where(flips[:, None, None, None], images[..., ::-1], images)
        if "shift" in kind:
            made = _shifted(made, rng)
        found[name] = np.ascontiguousarray(made)
    return found


def _shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count, _, height, width = images.shape
    reach = height // 8, width // 8
    padded = np.pad(images, ((0, 0), (0, 0), (reach[0], reach[0]), (reach[1], reach[1])))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    tops, lefts = (rng.integers(0, 2 * r + 1, count) for r in reach)
    return windows[np.arange(count), :, tops, lefts]
