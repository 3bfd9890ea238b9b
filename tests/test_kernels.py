"""effc.kernels: what a kernel's time is made of and depends on, in three families; what caches still hold."""

import math

import numpy as np
import pytest

from effc.kernels import (
    COMMON,
    CONVOLUTION,
    ELEMENTS,
    FAR,
    LIKE,
    MATRIX,
    NEAR,
    Kernel,
    columns,
    describe,
    family,
    left,
)
from tests.fake_kernels import KINDS, drawn

CONV = {"n": 2, "c": 3, "m": 5, "g": 7, "h": 4, "w": 6, "kh": 3, "kw": 1, "s": 2, "d": 1, "act": 1, "sum": 1}
PRODUCT = {"b": 2, "m": 3, "k": 5, "n": 7}
OTHER = {"elements": 1000, "share": 0.25, "run": 10, "window": 9, "broadcast": 1}
PLACED = {"moved": 400, "around": 4000, "since": 900, "near": 100, "far": 20, "made_near": 50, "made_far": 10}
ALWAYS = [1, *left(900), *left(4000), 100, 20]  # the terms of any kernel


def test_what_makes_nothing_takes_as_long_as_one_number():
    """A slice of no rows, as exporters write for a list of sizes that is empty."""
    empty, one = (describe(PLACED | OTHER | {"share": share}, 4) for share in (0, 1 / OTHER["elements"]))
    for found, expected in zip(empty, one, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_families_and_their_columns():
    assert [family(d) for d in (CONV, PRODUCT, OTHER, {})] == [CONVOLUTION, MATRIX, ELEMENTS, ELEMENTS]
    assert columns(CONV) == (*CONV, "moved", "around", "since", "near", "far", "made_near", "made_far")
    assert columns(PRODUCT | {"level": 4, "bits": 4, "block": 32}) == (*PRODUCT, "bits", "block", "level", *COMMON)
    assert columns(OTHER | {"columns": 5, "rows": 3}) == (*OTHER, "rows", "columns", *COMMON)
    assert columns(PLACED | OTHER) == (*OTHER, *COMMON)  # in order, however the kernel states them


def test_a_tensor_leaves_caches_with_what_is_moved_in_between():
    assert left(0) == (0, 0)
    assert left(NEAR)[0] == 0.5 and left(FAR)[1] == 0.5  # half of it at the size of the cache
    near, far = zip(*map(left, np.geomspace(1, 1e12, 50)), strict=True)
    assert (np.diff(near) > 0).all() and (np.diff(far) > 0).all() and max(*near, *far) < 1
    assert all(n > f for n, f in zip(near, far, strict=True))  # the near one is smaller


@pytest.mark.parametrize("dims", [CONV, PRODUCT, PRODUCT | {"bits": 4, "block": 32, "level": 4}, OTHER])
@pytest.mark.parametrize("size", [1, 4])
def test_each_kernel_of_a_family_has_as_many_terms_and_features(dims, size):
    """Finite and, terms, not negative: of the least kernel there is, of a huge one, and with nothing in memory."""
    zero = {"act", "sum", "broadcast", "level"}
    least = dict.fromkeys(dims, 1) | dict.fromkeys(zero & dims.keys(), 0)
    huge = {key: 1 if key in zero | {"share"} else 10_000 for key in dims}
    shapes = set()
    for some in (dims | PLACED, least | dict.fromkeys(COMMON, 0), huge | dict.fromkeys(COMMON, 1e12)):
        terms, features = describe(some, size)
        assert np.isfinite(terms).all() and np.isfinite(features).all() and (terms >= 0).all() and terms[0] == 1
        shapes.add((terms.shape, features.shape))
    assert len(shapes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_any_kernel_is_described_by_finite_numbers(kind):
    rng = np.random.default_rng(0)
    for _ in range(200):
        terms, features = describe(drawn(kind, rng).dims, 4)
        assert np.isfinite(terms).all() and np.isfinite(features).all() and (terms >= 0).all()


def test_the_terms_of_a_convolution_by_hand():
    """2 images of 4 x 6, 7 groups of 3 inputs and 5 outputs, 3 x 1 taps at stride 2: 48 pixels of 35 outputs."""
    terms = describe(CONV | PLACED, 4)[0].tolist()
    macs = 48 * 3 * 3 * 35
    assert terms[:7] == ALWAYS
    assert terms[7:11] == [
        macs,
        48 * 9 * 7 * 16,  # each group's outputs in vectors of 16
        48 * 9 * 64,
        2 * 4 * 6 * 9 * 7 * 16,
    ]
    assert terms[11:14] == [48 * 35] * 3  # written, activated, added
    assert terms[14] == 48 * 21 * 4  # read: 8 x 12 pixels of 21 inputs
    assert terms[-1] == 4 * 35 * 9 and describe(CONV | PLACED, 1)[0][-1] == 35 * 9  # bytes of weights
    plain = describe(CONV | PLACED | {"act": 0, "sum": 0}, 4)[0]
    assert plain[12:14].tolist() == [0, 0]


def test_the_terms_of_a_product_by_hand():
    terms = describe(PRODUCT | PLACED, 4)[0].tolist()
    assert terms[:8] == [*ALWAYS, 2]
    assert terms[8:11] == [2 * 3 * 5 * 7, 2 * 3 * 5 * 16, 2 * 12 * 5 * 16]  # all; outputs in 16s; and rows in 12s
    assert terms[11:] == [2 * 3 * 7, 2 * 3 * 5, 2 * 5 * 7 * 4, 5 * 7]  # written, read, weights' bytes, weights packed
    blocks = describe(PRODUCT | PLACED | {"bits": 4, "block": 32, "level": 4}, 4)[0]
    assert blocks[13] == 2 * 5 * 7 / 2  # half a byte each
    assert describe(PRODUCT | PLACED | {"m": 1}, 4)[0][-1] == 0  # a vector packs nothing


def test_the_terms_of_other_operators_by_hand():
    terms = describe(OTHER | PLACED, 4)[0].tolist()
    assert terms[:7] == ALWAYS
    assert terms[7:11] == [1000, 250, 250 * 9, 100]  # read, made, looked at in windows, runs
    assert terms[11:] == [400 * share for share in left(400)]
    assert describe(OTHER | PLACED | {"window": 1}, 4)[0][9] == 0


def test_sizes_are_seen_as_logarithms():
    """A kernel of half the channels, or a tenth of the elements, is as far from another as one of twice, ten times."""
    for dims, key, factor in ((CONV, "c", 2), (PRODUCT, "k", 2), (OTHER, "elements", 10)):
        less, same, more = (describe(dims | PLACED | {key: dims[key] * 12 * f}, 4)[1] for f in (1 / factor, 1, factor))
        changed = np.flatnonzero(~np.isclose(same, more))
        place = int(changed[np.argmax(np.abs(more - same)[changed])])
        assert more[place] - same[place] == pytest.approx(math.log(factor), rel=1e-9)
        assert same[place] - less[place] == pytest.approx(math.log(factor), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "dims", "dtype", "key"),
    [
        ("conv", CONV, "float32", "conv"),
        ("qconv", CONV, "int8", "qconv"),
        ("qgemm", PRODUCT, "int8", "qgemm"),
        ("Relu", OTHER, "float32", "Relu"),
        ("Transpose", OTHER, "int8", "Transpose:int8"),
        ("Cast", OTHER, "float16", "Cast:float16"),
    ],
)
def test_operators_on_elements_are_told_apart_by_their_width(kind, dims, dtype, key):
    assert Kernel("k", kind, (), dims, 0, 0, dtype).key == key


def test_a_kind_s_likeness_leads_somewhere():
    """No circles, and at most three steps."""
    for kind in LIKE:
        seen = [kind]
        while seen[-1] in LIKE:
            seen.append(LIKE[seen[-1]])
            assert len(seen) == len(set(seen)) <= 4, seen
    starts = ("conv", "qconv"), ("gemm", "qgemm", "nbits")
    for kind, other in LIKE.items():
        for start in starts:  # a kind is like one of its family
            assert kind.startswith(start) == other.startswith(start), (kind, other)
