"""w = s (q - z) with one scale and one zero point for each block of consecutive columns, and how runtimes pack it.

Blocks keep an outlier's wide scale to its neighbours (Dettmers et al., "8-bit optimizers via block-wise quantization",
2022, section 2.1). The packing is that of onnxruntime's MatMulNBits and GatherBlockQuantized: codes along a row, the
first in the lowest bits of a byte; each row of zero points likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

TOGETHER = 1 << 18  # numbers searched together: they stay in a core's cache
SHRINKS = np.linspace(1.0, 0.5, 7)  # of the range that is covered
SETTLED = 1e-12


@dataclass(frozen=True)
class Grid:
    """Where the codes of a matrix [N, K] lie: `scales` [N, B] float32, positive, and `zeros` [N, B] uint8.

    B is the number of blocks of a row, K / block rounded up. A symmetric grid has its zero at 2^(bits - 1).
    """

    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    block: int
    symmetric: bool

    def of_columns(self, columns: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of each weight, [N, K]."""
        wide = (np.repeat(a, self.block, axis=1)[:, :columns] for a in (self.scales, self.zeros))
        scales, zeros = wide
        return scales, zeros

    def nearest(self, weight: np.ndarray) -> BlockCodes:
        """Every weight [N, K] rounded to the code nearest to it."""
        codes = np.empty(weight.shape, np.uint8)
        for rows in parts(weight.shape):
            part = Grid(self.scales[rows], self.zeros[rows], self.bits, self.block, self.symmetric)
            scales, zeros = part.of_columns(weight.shape[1])
            codes[rows] = np.clip(np.rint(weight[rows] / scales) + zeros, 0, 2**self.bits - 1)
        return BlockCodes(codes, self)


@dataclass(frozen=True)
class BlockCodes:
    """Codes [N, K] uint8, each below 2^bits, on a grid."""

    codes: np.ndarray
    grid: Grid

    def decoded(self) -> np.ndarray:
        """[N, K] float32, as runtimes compute it: the difference is exact, the product rounded once."""
        scales, zeros = self.grid.of_columns(self.codes.shape[1])
        return (self.codes.astype(np.float32) - zeros) * scales

    def packed(self) -> np.ndarray:
        """[N, B, block * bits / 8] bytes; what is missing of the last block holds zero points."""
        bits, block = self.grid.bits, self.grid.block
        rows, columns = self.codes.shape
        blocks = self.grid.zeros.shape[1]
        whole = np.repeat(self.grid.zeros, block, axis=1)
        whole[:, :columns] = self.codes
        return pack(whole, bits).reshape(rows, blocks, block * bits // 8)

    def packed_rows(self) -> np.ndarray:
        """[N, K * bits / 8] bytes, for rows that are looked up; K fills whole bytes."""
        return pack(self.codes, self.grid.bits)

    def packed_zeros(self) -> np.ndarray:
        """[N, B * bits / 8] bytes, rounded up."""
        return pack(self.grid.zeros, self.grid.bits)

    @classmethod
    def unpacked(
        cls, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, block: int, columns: int
    ) -> BlockCodes:
        """What rows of bytes hold: the inverse of `packed` (its last two axes as one) and of `packed_rows`.

        Args:
            zeros: as `packed_zeros` gives them; None: all are 2^(bits - 1).
            columns: K.
        """
        middle = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
        points = middle if zeros is None else unpack(zeros, bits, scales.shape[1])
        grid = Grid(scales, points, bits, block, zeros is None)
        return cls(unpack(packed, bits, columns), grid)


def nbytes(rows: int, columns: int, bits: int, block: int, symmetric: bool) -> int:
    """Bytes that a matrix [rows, columns] takes as codes, with its scales, and its zero points where it has some."""
    blocks = -(-columns // block)
    return rows * (blocks * (block * bits // 8 + 4) + (0 if symmetric else -(-blocks * bits // 8)))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """[N, M] codes as [N, M * bits / 8] bytes, rounded up; the first code lies in the lowest bits."""
    each = 8 // bits
    filled = np.pad(codes.astype(np.uint8), ((0, 0), (0, -codes.shape[1] % each)))
    found = np.zeros((len(codes), filled.shape[1] // each), np.uint8)
    for place in range(each):
        found |= filled[:, place::each] << np.uint8(bits * place)
    return found


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: the first `count` codes of each row of bytes."""
    each = 8 // bits
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    codes = (packed[:, :, None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :count]


def largest(weight: np.ndarray, bits: int, block: int, *, symmetric: bool) -> Grid:
    """The grid that covers each block of a matrix [N, K] and holds zero: round-to-nearest's usual one."""
    return _grids(weight, bits, block, symmetric, np.array([1.0]), None)


def least_squares(
    weight: np.ndarray, bits: int, block: int, *, symmetric: bool, importance: np.ndarray | None = None
) -> Grid:
    """The grid of about the least sum of h (w - s (q - z))^2 in each block of a matrix [N, K].

    Ranges are shrunk in steps; each gives codes, and these the scale of least squares; the best is taken.

    Args:
        importance: h of each column [K], such as the mean square of what it is multiplied with; None: all alike.
    """
    return _grids(weight, bits, block, symmetric, SHRINKS, importance)


def _grids(
    weight: np.ndarray, bits: int, block: int, symmetric: bool, shrinks: np.ndarray, importance: np.ndarray | None
) -> Grid:
    rows, columns = weight.shape
    blocks = -(-columns // block)
    scales, zeros = np.empty((rows, blocks), np.float32), np.empty((rows, blocks), np.uint8)
    h = np.zeros(blocks * block, np.float32)
    h[:columns] = 1.0 if importance is None else importance / max(float(importance.max()), 1e-30)
    h = h.reshape(1, blocks, block) + np.float32(SETTLED)  # what nothing is multiplied with has a grid too
    for part in parts(weight.shape):
        w = np.zeros((len(weight[part]), blocks * block), np.float32)
        w[:, :columns] = weight[part]
        scales[part], zeros[part] = _searched(w.reshape(-1, blocks, block), bits, symmetric, shrinks, h)
    return Grid(scales, zeros, bits, block, symmetric)


def _searched(
    w: np.ndarray, bits: int, symmetric: bool, shrinks: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points [n, B] of blocks [n, B, block]."""
    low, high = np.minimum(w.min(axis=2), 0), np.maximum(w.max(axis=2), 0)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    found = np.ones(low.shape, np.float32), np.full(low.shape, middle, np.float32)
    least = np.full(low.shape, np.inf, np.float32)
    for share in shrinks:
        if symmetric:
            scales, zeros = _positive(np.maximum(-low, high) * share / (middle - 1)), np.full_like(low, middle)
        else:
            scales = _positive((high - low) * share / top)
            zeros = np.clip(np.rint(-low * share / scales), 0, top)
        for _ in range(1 if len(shrinks) == 1 else 2):  # the second time with the scale that the codes ask for
            q = np.clip(np.rint(w / scales[:, :, None]) + zeros[:, :, None], 0, top) - zeros[:, :, None]
            better = (error := _weighted(h, (w - q * scales[:, :, None]) ** 2)) < least
            least = np.where(better, error, least)
            found = np.where(better, scales, found[0]), np.where(better, zeros, found[1])
            power = _weighted(h, q * q)
            fitted = _weighted(h, q * w) / np.where(power > 0, power, 1)
            scales = np.where(fitted > 0, fitted, scales).astype(np.float32)
    return found[0], found[1].astype(np.uint8)


def _weighted(h: np.ndarray, values: np.ndarray) -> np.ndarray:
    values *= h
    return values.sum(axis=2)


def _positive(scales: np.ndarray) -> np.ndarray:
    """A block that is all zero still needs a scale; one below float32's normal range is flushed to zero."""
    return np.where(scales > np.finfo(np.float32).tiny, scales, 1).astype(np.float32)


def parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows that are worked on together."""
    step = max(1, TOGETHER // max(shape[1], 1))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)
