"""effc.passes._integer_fit: moments against NumPy's, codes that keep outputs, and biases that keep means."""

import numpy as np
import onnx_ir as ir
import pytest

from effc.passes._integer_fit import HELD, grouped, moments, ungrouped
from effc.passes._rounding import lost

RNG = np.random.default_rng(0)


def conv(group: int = 1, **attributes) -> ir.Node:
    values = {"group": group, "pads": [1, 1, 1, 1], "strides": [1, 1]} | attributes
    return ir.Node("", "Conv", [ir.Value(name=n) for n in "xw"], [ir.AttrInt64s(k, v) if isinstance(v, list) else
        ir.AttrInt64(k, v) for k, v in values.items()], name="layer")  # fmt: skip


def convolved(x: np.ndarray, weight: np.ndarray, group: int, stride: int = 1) -> np.ndarray:
    """By the definition, 3 x 3 and padded by one."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    split = patches.reshape(len(x), group, -1, *patches.shape[2:])
    kernels = weight.reshape(group, -1, *weight.shape[1:])
    made = np.einsum("bgchwij,gncij->bgnhw", split, kernels)
    return made.reshape(len(x), -1, *made.shape[3:])


@pytest.mark.parametrize(("group", "stride"), [(1, 1), (4, 1), (2, 2)])
def test_moments_are_those_of_the_patches(group, stride):
    weight = RNG.standard_normal((8, 4 // group, 3, 3)).astype(np.float32)
    given = [RNG.standard_normal((5, 4, 6, 6)).astype(np.float32) + 0.5 for _ in range(3)]
    node = conv(group, strides=[stride, stride])
    wanted = [convolved(x, weight, group, stride) + 2 for x in given]
    found = moments(node, weight, given, wanted, centred=True)
    x = np.concatenate(given).astype(np.float64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    rows = windows.transpose(1, 4, 5, 0, 2, 3).reshape(group, 36 // group, -1)
    for g in range(group):
        assert found.mean[g] == pytest.approx(rows[g].mean(axis=1), abs=1e-5)
        covariance = np.cov(rows[g], bias=True)
        off = ~np.eye(36 // group, dtype=bool)  # the ridge is on the diagonal
        assert np.abs((found.metric[g] - covariance)[off]).max() < 1e-4 * covariance.max()
    # What it should make is what its weights make: nothing is to be made up for.
    assert found.best == pytest.approx(grouped(node, weight), abs=1e-4)
    assert found.wanted.reshape(-1) == pytest.approx(np.concatenate(wanted).mean(axis=(0, 2, 3)), abs=1e-4)
    assert np.array_equal(ungrouped(node, grouped(node, weight), weight.shape), weight)


def test_the_fit_is_ridge_regression():
    weight = RNG.standard_normal((3, 6)).astype(np.float32)
    node = ir.Node("", "Gemm", [ir.Value(name=n) for n in "xw"], [ir.AttrInt64("transB", 1)], name="layer")
    x = RNG.standard_normal((400, 6)).astype(np.float32)
    y = x @ weight.T + 0.3 * x[:, :3]
    found = moments(node, weight, [x], [y], centred=True)
    off, target = x - x.mean(axis=0), y - y.mean(axis=0)
    held = HELD * (found.metric[0] - off.T @ off / len(x))  # the ridge itself
    expected = np.linalg.solve(off.T @ off / len(x) + held, (target.T @ off / len(x) + weight @ held).T).T
    assert found.best[0] == pytest.approx(expected, abs=1e-4)
    own = moments(node, weight, [x], [y], centred=True, asymmetric=False)
    assert np.array_equal(own.best[0], weight)
    before, after = (np.square(off @ w.T - target).sum() for w in (weight, found.best[0]))
    assert after < before


def test_dead_inputs_keep_their_weights():
    weight = RNG.standard_normal((4, 1, 3, 3)).astype(np.float32)
    x = RNG.standard_normal((3, 4, 5, 5)).astype(np.float32)
    x[:, 1] = 0
    found = moments(conv(4), weight, [x], [convolved(x, weight, 4)], centred=True)
    assert found.best[1] == pytest.approx(grouped(conv(4), weight)[1], abs=1e-6)
    assert np.isfinite(found.best).all() and np.isfinite(lost(found.best, np.rint(found.best), found.metric)).all()
