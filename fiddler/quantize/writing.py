"""Writes one safetensors file front to back: the header from the plan, then each tensor's bytes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fiddler.quantize.plan import PlannedTensor

ALIGNMENT = 64  # bytes; of the first tensor, and so of all packed experts


def write_shard(
    path: Path, tensors: Iterable[PlannedTensor], contents: Iterable[npt.NDArray[Any]]
) -> None:
    """Write ``contents``, C-contiguous arrays of any type with the planned sizes, in order.

    When it returns the file is whole and on the disk. OSError as the system gives it.
    """
    tensors = tuple(tensors)
    with path.open("wb") as file:
        file.write(header(tensors))
        for tensor, content in zip(tensors, contents, strict=True):
            assert content.nbytes == tensor.nbytes, (tensor, content.nbytes)
            file.write(np.ascontiguousarray(content).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def header(tensors: Iterable[PlannedTensor]) -> bytes:
    """The file's bytes before its data, padded with spaces as the format allows."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
