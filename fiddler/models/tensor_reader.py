"""Reads stored numbers into place in pieces, each of which is checked while it is in the caches.

Read by position, not through a mapping: page faults of 16 threads in one mapping wait for each
other, and to let go of its pages interrupts every core.

Ordering: any number of threads may read a file at once; each has a room of its own for pieces that
do not go to host memory as they are.
"""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fiddler.errors import CheckpointError

if TYPE_CHECKING:
    import torch

PIECE = 512 << 10  # bytes; the second level of cache holds it: 1 MiB on small servers
PIECE_ELSEWHERE = 16 << 20  # to a GPU: each piece is waited for

# Bits of infinity. What is no finite number is not below them, with its sign bit or without it.
INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000}

_local = threading.local()


class StoredFile:
    """A file that is read by position. OSError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Safe to call again; nothing may be read any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, target: np.ndarray, begin: int) -> None:
        """Fill ``target`` (uint8) with the bytes from ``begin`` on."""
        at = 0
        try:
            while at < len(target):
                num_read = os.preadv(self._fd, [target.data[at:]], begin + at)
                if num_read == 0:
                    raise CheckpointError(f"{self.path} has become shorter while it was read")
                at += num_read
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}") from error


def read_numbers(file: StoredFile, begin: int, out: "torch.Tensor", stored: "torch.dtype") -> bool:
    """Fill ``out`` with the numbers of type ``stored`` from ``begin`` on; whether all are finite.

    ``out`` is contiguous, of any type and on any device. A number that is too large for its type
    is not finite either.
    """
    flat, size = out.view(-1), stored.itemsize
    in_place = out.device.type == "cpu" and out.dtype == stored
    step = (PIECE if out.device.type == "cpu" else PIECE_ELSEWHERE) // size
    is_finite = True
    for first in range(0, len(flat), step):
        piece = flat[first : first + step]
        bytes_B = _bytes(piece) if in_place else _room(len(piece) * size)
        file.read(bytes_B, begin + first * size)
        is_finite = is_finite and _all_finite(bytes_B, stored)
        if not in_place:
            piece.copy_(_numbers(bytes_B, stored))
            is_finite = is_finite and (out.dtype.itemsize >= size or _is_finite(piece))
    return is_finite


def read_bytes(file: StoredFile, begin: int, out_B: "torch.Tensor") -> np.ndarray:
    """Fill ``out_B`` (uint8, on any device); returns the bytes, in ``out_B`` or until the next."""
    bytes_B = _bytes(out_B) if out_B.device.type == "cpu" else _room(len(out_B))
    file.read(bytes_B, begin)
    if out_B.device.type != "cpu":
        import torch

        out_B.copy_(torch.from_numpy(bytes_B))
    return bytes_B


def _bytes(numbers: "torch.Tensor") -> np.ndarray:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    found: np.ndarray = numbers.view(torch.uint8).numpy()
    return found


def _numbers(bytes_B: np.ndarray, dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    return torch.from_numpy(bytes_B).view(dtype)


def _room(size: int) -> np.ndarray:
    """This thread's own bytes, the same ones at every call."""
    room: np.ndarray | None = getattr(_local, "room", None)
    if room is None or len(room) < size:
        room = _local.room = np.empty(size, np.uint8)
    return room[:size]


def _all_finite(bytes_B: np.ndarray, dtype: "torch.dtype") -> bool:
    """Two maxima, of which each reads 30 GB/s from the caches; torch's aminmax reads 6."""
    infinity = INFINITY[str(dtype).removeprefix("torch.")]
    signed, unsigned = (np.int16, np.uint16) if dtype.itemsize == 2 else (np.int32, np.uint32)
    sign = 1 << (8 * dtype.itemsize - 1)
    is_below = bytes_B.view(signed).max() < infinity  # of the positive ones, if there are any
    return bool(is_below and bytes_B.view(unsigned).max() < sign + infinity)


def _is_finite(numbers: "torch.Tensor") -> bool:
    low, high = numbers.aminmax()  # NaN shows in both
    return bool(low.isfinite() and high.isfinite())
