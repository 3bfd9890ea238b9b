"""scikit-learn's bundled digits as 32 x 32 images: what the two data specs beside this file read. No torch here."""

from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_digits

SIDE = 32
TRAINING_SAMPLES = 1200
BATCH = 64


def train() -> Iterator[dict[str, np.ndarray]]:
    """Yield the 1,200 training images: `x` uint8 [n, 32, 32], `y` int64 [n]."""
    return _batches(slice(TRAINING_SAMPLES))


def test() -> Iterator[dict[str, np.ndarray]]:
    """Yield the 597 images that training never sees, in the same form."""
    return _batches(slice(TRAINING_SAMPLES, None))


def _batches(part: slice) -> Iterator[dict[str, np.ndarray]]:
    pixels, labels = load_digits(return_X_y=True)
    # The file goes writer by writer: without one fixed shuffle the parts would differ in more than chance.
    order = np.random.default_rng(0).permutation(len(labels))[part]
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        yield {"x": _enlarge(pixels[rows].reshape(-1, 8, 8)), "y": labels[rows]}


def _enlarge(images: np.ndarray) -> np.ndarray:
    """Bilinear, pixel centres aligned: float [n, 8, 8] in 0..16  ->  uint8 [n, 32, 32] in 0..255."""
    side = images.shape[-1]
    centres = (np.arange(SIDE) + 0.5) * side / SIDE - 0.5
    weights = np.stack([np.interp(centres, np.arange(side), unit) for unit in np.eye(side)], axis=1)
    return np.rint(weights @ images @ weights.T * (255 / 16)).astype(np.uint8)
