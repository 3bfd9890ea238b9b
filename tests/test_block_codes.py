"""effc.block_codes and passes._gptq: grids, packing against NumPy and onnxruntime, rounding with feedback."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from scipy.linalg import cholesky

from effc.block_codes import BlockCodes, Grid, largest, least_squares, nbytes, pack, unpack
from effc.passes._coded_fit import better
from effc.passes._compensation import lost
from effc.passes._gptq import gptq

RNG = np.random.default_rng(0)
WIDTHS = (2, 4, 8)


def ort(node: onnx.NodeProto, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray], output) -> np.ndarray:
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, output)
    graph = helper.make_graph([node], "g", infos, [out], [numpy_helper.from_array(a, n) for n, a in weights.items()])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def codes(rows: int, columns: int, bits: int, block: int, symmetric: bool) -> tuple[np.ndarray, BlockCodes]:
    weight = (RNG.standard_normal((rows, columns)) * RNG.uniform(0.5, 2, (rows, 1)) + 0.2).astype(np.float32)
    return weight, largest(weight, bits, block, symmetric=symmetric).nearest(weight)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_goes_from_the_lowest_bits_up(bits):
    """Bit by bit, by Python's own integers; and back."""
    numbers = RNG.integers(0, 2**bits, (3, 13)).astype(np.uint8)
    packed = pack(numbers, bits)
    for row, found in zip(numbers, packed, strict=True):
        whole = sum(int(code) << (bits * place) for place, code in enumerate(row))
        assert int.from_bytes(found.tobytes(), "little") == whole
    assert np.array_equal(unpack(packed, bits, 13), numbers)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [64, 100])  # the second is no multiple of a block
def test_what_onnxruntime_multiplies_is_what_is_decoded(bits, block, symmetric, columns):
    """In float to 1e-5 of the largest output; with 8-bit activations to 3e-2."""
    _, found = codes(7, columns, bits, block, symmetric)
    weights = {"b": found.packed(), "s": found.grid.scales}
    names = ["x", "b", "s"]
    if not symmetric:
        weights["z"] = found.packed_zeros()
        names.append("z")
    assert sum(a.nbytes for a in weights.values()) == nbytes(7, columns, bits, block, symmetric)
    x = RNG.standard_normal((3, columns)).astype(np.float32)
    wanted = x.astype(np.float64) @ found.decoded().T.astype(np.float64)
    for level, allowed in ((1, 1e-5), (4, 3e-2)):
        node = helper.make_node(
            "MatMulNBits", names, ["y"], domain="com.microsoft", K=columns, N=7, bits=bits, block_size=block,
            accuracy_level=level,
        )  # fmt: skip
        made = ort(node, weights, {"x": x}, [3, 7])
        assert np.abs(made - wanted).max() <= allowed * np.abs(wanted).max()
    back = BlockCodes.unpacked(weights["b"].reshape(7, -1), weights["s"], weights.get("z"), bits, block, columns)
    assert np.array_equal(back.decoded(), found.decoded())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [64, 100])
def test_rows_that_onnxruntime_looks_up_are_those_decoded(bits, symmetric, columns):
    """Bit by bit."""
    _, found = codes(50, columns, bits, 32, symmetric)
    weights = {"d": found.packed_rows(), "s": found.grid.scales} | ({} if symmetric else {"z": found.packed_zeros()})
    node = helper.make_node(
        "GatherBlockQuantized", ["d", "i", *list(weights)[1:]], ["y"], domain="com.microsoft", bits=bits, block_size=32,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    indices = RNG.integers(0, 50, (2, 9))
    assert np.array_equal(ort(node, weights, {"i": indices}, [2, 9, columns]), found.decoded()[indices])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_covering_grid_is_off_by_half_a_step_at_most(bits, symmetric):
    weight, found = codes(9, 80, bits, 16, symmetric)
    scales, _ = found.grid.of_columns(80)
    # An asymmetric zero point is rounded too, which moves an end of the range by up to half a step more.
    assert np.all(np.abs(weight - found.decoded()) <= scales * (0.5 if symmetric else 1.0) * (1 + 1e-5))
    assert found.grid.scales.min() > 0
    if symmetric:
        assert np.all(found.grid.zeros == 2 ** (bits - 1))


def test_the_covering_grid_is_that_of_a_plain_loop():
    """Against the formulas written out block by block, to 1e-6."""
    weight, found = codes(5, 40, 4, 16, False)
    for row in range(5):
        for number, start in enumerate(range(0, 40, 16)):
            part = weight[row, start : start + 16].astype(float)
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / 15
            assert found.grid.scales[row, number] == pytest.approx(scale, rel=1e-6)
            assert found.grid.zeros[row, number] == round(-low / scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_least_squares_loses_no_more_in_any_block(bits, symmetric):
    weight, found = codes(40, 96, bits, 32, symmetric)
    h = RNG.uniform(0.01, 3, 96)
    better_grid = least_squares(weight, bits, 32, symmetric=symmetric, importance=h).nearest(weight)

    def off(made: BlockCodes) -> np.ndarray:
        return (h * (weight - made.decoded()) ** 2).reshape(40, 3, 32).sum(axis=2)

    assert np.all(off(better_grid) <= off(found) * (1 + 1e-4))
    if bits < 8:
        assert off(better_grid).sum() < 0.97 * off(found).sum()


def test_blocks_of_zeros_and_single_numbers():
    weight = np.zeros((2, 32), np.float32)
    weight[1, 3] = -0.7
    for symmetric in (True, False):
        for make in (largest, least_squares):
            found = make(weight, 4, 16, symmetric=symmetric).nearest(weight)
            assert np.abs(found.decoded() - weight).max() <= 1e-6


CAUSES = RNG.normal(size=(600, 12)) @ RNG.normal(size=(12, 48)) + 0.2 * RNG.normal(size=(600, 48))
METRIC = CAUSES.T @ CAUSES / 600
WEIGHT = RNG.normal(size=(6, 48))


def by_hand(weight: np.ndarray, metric: np.ndarray, grid: Grid) -> np.ndarray:
    """GPTQ as the paper first derives it: after each column H^-1 of those left is computed anew (equations 2 and 3)."""
    order = np.argsort(-metric.diagonal(), kind="stable")
    scales, zeros = (a.astype(float) for a in grid.of_columns(weight.shape[1]))
    w, left = weight.copy(), list(order)
    while left:
        q, inverse = left[0], np.linalg.inv(metric[np.ix_(left, left)])
        code = np.clip(np.rint(w[:, q] / scales[:, q]) + zeros[:, q], 0, 2**grid.bits - 1)
        rounded = (code - zeros[:, q]) * scales[:, q]
        off = (w[:, q] - rounded) / inverse[0, 0]
        w[:, left] -= np.outer(off, inverse[0])
        w[:, q] = rounded
        left = left[1:]
    return w


@pytest.mark.parametrize("bits", WIDTHS)
def test_feedback_is_what_the_paper_derives(bits):
    """Against inverses computed anew for each column; to 1e-5, codes being the same."""
    grid = largest(WEIGHT, bits, 16, symmetric=False)
    found = gptq(WEIGHT, METRIC, grid)
    assert np.abs(found.decoded() - by_hand(WEIGHT, METRIC, grid)).max() <= 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_feedback_loses_less_than_rounding_to_the_nearest(bits, symmetric):
    grid = least_squares(WEIGHT, bits, 16, symmetric=symmetric, importance=METRIC.diagonal())
    nearest, found = grid.nearest(WEIGHT), gptq(WEIGHT, METRIC, grid)
    best = better(WEIGHT, nearest, found, METRIC)
    errors = [lost(WEIGHT, each.decoded(), METRIC) for each in (best, found, nearest)]
    assert errors[0] <= errors[1] < 0.7 * errors[2]
    for row in range(6):
        own = [lost(WEIGHT[row : row + 1], each.decoded()[row : row + 1], METRIC) for each in (best, nearest)]
        assert own[0] <= own[1] * (1 + 1e-9)


def test_without_correlation_feedback_is_rounding_to_the_nearest():
    grid = largest(WEIGHT, 4, 16, symmetric=False)
    assert np.array_equal(gptq(WEIGHT, np.diag(RNG.uniform(1, 2, 48)), grid).codes, grid.nearest(WEIGHT).codes)


def test_feedback_beside_the_best_there_is():
    """Of all codes of four columns (brute force) the best loses no more; feedback is within twice of it."""
    small, metric = RNG.normal(size=(1, 4)), METRIC[:4, :4]
    grid = largest(small, 2, 16, symmetric=False)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 4), axis=-1).reshape(-1, 4).astype(np.uint8)
    losses = [lost(small, BlockCodes(c[None], grid).decoded(), metric) for c in every]
    found = lost(small, gptq(small, metric, grid).decoded(), metric)
    nearest = lost(small, grid.nearest(small).decoded(), metric)
    assert min(losses) <= found * (1 + 1e-9) and found <= max(2 * min(losses), 1e-12)
    assert min(losses) <= nearest * (1 + 1e-9)


def test_the_factor_is_the_inverse():
    from effc.passes._compensation import inverse_factor

    upper = inverse_factor(METRIC)
    assert np.allclose(upper.T @ upper @ METRIC, np.eye(48), atol=1e-8)
    assert np.allclose(upper, cholesky(np.linalg.inv(METRIC), lower=False), atol=1e-8)
