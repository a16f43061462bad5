"""The header of a safetensors file: names, dtypes, shapes and byte ranges, checked for damage.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data.
"""

import json
from math import prod
from pathlib import Path
from typing import NamedTuple

from fiddler.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
DTYPE_BYTES |= {"BOOL": 1}


class Entry(NamedTuple):
    """One tensor: dtype as the format spells it, and its bytes [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a file; every range lies in the file and fits its shape and dtype."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(path, f"it has {size} bytes, its header claims {length}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        raw = json.loads(text)
    except ValueError:
        raise _damaged(path, "its header is no JSON") from None
    if not isinstance(raw, dict):
        raise _damaged(path, "its header is no JSON object")
    raw.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in raw.items()}


def _entry(path: Path, name: str, fields: object, data_start: int, size: int) -> Entry:
    try:
        assert isinstance(fields, dict)
        dtype, shape = str(fields["dtype"]), tuple(int(n) for n in fields["shape"])
        begin, end = (data_start + int(n) for n in fields["data_offsets"])
    except (AssertionError, KeyError, TypeError, ValueError):
        raise _damaged(path, f"its header describes tensor {name} wrongly") from None
    if not data_start <= begin <= end or any(n < 0 for n in shape):
        raise _damaged(path, f"its header describes tensor {name} wrongly")
    if end > size:
        raise _damaged(path, f"tensor {name} ends at byte {end}, the file at {size}")
    item = DTYPE_BYTES.get(dtype)
    if item is not None and end - begin != item * prod(shape):
        raise _damaged(path, f"tensor {name} has {end - begin} bytes for {list(shape)} of {dtype}")
    return Entry(dtype, shape, begin, end)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or truncated: {what}", hint="download the file again"
    )
