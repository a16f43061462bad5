"""Powers of two by which an expert's neurons may be scaled before they are packed, without loss.

``down[:, i] * act[i]`` with ``act[i] = f(gate[i] x) * (up[i] x)`` stays what it is, to the bit,
when row i of up is multiplied by a power of two and column i of down divided by it. That is so of
activations that are linear in up (``activation_reference.LINEAR_IN_UP``) alone. Neurons that
training gave up have columns some 2**-18 smaller than others (a fifth of the weights of one expert
of the built-in model), which no row's 15 exponents hold beside these; scaled they fit like all.

N rows, K columns: the neurons of down, as rows those of up.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import U16

Ints = npt.NDArray[np.int64]

LEAST_SHIFT = 4  # powers of two below the largest neuron: a row's codes have room for less
LOWEST, HIGHEST = 1, 128  # exponents that scaled weights may have; a row's scale has to be a number


class ColumnExponents:
    """Exponents of a matrix' columns, gathered some rows at a time."""

    def __init__(self, cols: int) -> None:
        self._count_K, self._sum_K = np.zeros((2, cols), np.int64)
        self._least_K, self._most_K = np.full(cols, 255), np.zeros(cols, np.int64)

    def add(self, weights_NK: U16) -> None:
        """Count some rows, bits of bfloat16. Releases the GIL."""
        _gather(weights_NK, self._count_K, self._sum_K, self._least_K, self._most_K)

    def shifts(self) -> Ints:
        """By which power of two each column is to be divided, 0 for most.

        The largest neurons stay, so that rows of up become smaller: they have more room there.
        """
        mean_K = self._sum_K / np.maximum(self._count_K, 1)
        shift_K = np.rint(mean_K - mean_K.max()).astype(np.int64)
        is_far_K = (shift_K <= -LEAST_SHIFT) & (self._count_K > 0)
        fits_K = _fits(self._least_K - shift_K, self._most_K - shift_K) & (self._least_K > 0)
        return np.where(is_far_K & fits_K, shift_K, 0)


def drop_unfit_rows(weights_NK: U16, shift_N: Ints) -> None:
    """Set to 0 the shifts with which a row's weights, bits of bfloat16, would not be numbers."""
    for row in np.flatnonzero(shift_N):
        exponent_K = _exponents(weights_NK[row])[weights_NK[row] & 0x7FFF != 0]
        if exponent_K.size == 0:
            continue
        least, most = int(exponent_K.min()), int(exponent_K.max())
        if least == 0 or not _fits(least + shift_N[row], most + shift_N[row]):
            shift_N[row] = 0


def scaled(weights_NK: U16, shifts: Ints) -> U16:
    """Bits times 2**shifts, which are broadcast, in a new array; zeros stay zeros."""
    if not shifts.any():
        return weights_NK
    moved_NK = weights_NK.astype(np.int64) + (shifts << 7)
    return np.where(weights_NK & 0x7FFF == 0, weights_NK, moved_NK).astype(np.uint16)


def _fits(least: Any, most: Any) -> Any:
    return (least >= LOWEST) & (most <= HIGHEST)


def _exponents(weights: U16) -> Ints:
    return (weights >> 7 & 0xFF).astype(np.int64)


@numba.njit(nogil=True)
def _gather(weights: Any, counts: Any, sums: Any, least: Any, most: Any) -> None:
    for n in range(len(weights)):
        for k in range(len(counts)):
            bits = np.int64(weights[n, k])
            if bits & 0x7FFF:
                exponent = (bits >> 7) & 0xFF
                counts[k] += 1
                sums[k] += exponent
                least[k] = min(least[k], exponent)
                most[k] = max(most[k], exponent)
