"""effc.augment: what becomes of images, against all that may."""

import numpy as np
import pytest

from effc.augment import augmented

IMAGES = np.random.default_rng(0).normal(size=(40, 3, 16, 24)).astype(np.float32)


def test_nothing_is_done_unless_asked():
    assert augmented({"x": IMAGES}, "none", np.random.default_rng(0))["x"] is IMAGES


def test_flips():
    found = augmented({"x": IMAGES}, "flip", np.random.default_rng(0))["x"]
    flipped = [np.array_equal(a, b[..., ::-1]) for a, b in zip(found, IMAGES, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(found, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(flipped, same, strict=True))
    assert 10 <= sum(flipped) <= 30  # of 40; outside with a probability of 0.002


@pytest.mark.parametrize("kind", ["shift", "flip-shift"])
def test_shifts_by_up_to_an_eighth_with_zeros_around(kind):
    found = augmented({"x": IMAGES}, kind, np.random.default_rng(0))["x"]
    padded = np.pad(IMAGES, ((0, 0), (0, 0), (2, 2), (3, 3)))
    places = set()
    for image, both in zip(found, zip(padded, padded[..., ::-1], strict=True), strict=True):
        fits = [
            (flip, top, left) for flip in (0, 1) for top in range(5) for left in range(7)
            if np.array_equal(image, both[flip][:, top : top + 16, left : left + 24])
        ]  # fmt: skip
        assert len(fits) == 1
        places.add(fits[0])
    assert len({place[1:] for place in places}) > 15
    assert {flip for flip, *_ in places} == ({0} if kind == "shift" else {0, 1})


def test_the_seed_decides():
    one, same, other = (augmented({"x": IMAGES}, "shift", np.random.default_rng(s))["x"] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("other", [np.arange(40), IMAGES[:, 0, 0], (IMAGES * 50).astype(np.uint8)])
def test_what_are_no_images_stays(other):
    assert augmented({"x": other}, "shift", np.random.default_rng(0))["x"] is other
