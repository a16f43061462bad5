"""Refuses arrays that compiled code would misread: it sees addresses only."""

from typing import Any

import numpy as np
import numpy.typing as npt

FLOAT = (np.dtype(np.float32),)
ID = (np.dtype(np.int32),)


def check_array(
    name: str,
    array: npt.NDArray[Any],
    shape: tuple[int, ...],
    dtypes: tuple[np.dtype[Any], ...],
) -> None:
    """ValueError unless ``array`` is C-contiguous, of that shape and of one of the types."""
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {array.shape}")
    if array.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {array.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
