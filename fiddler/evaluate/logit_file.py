"""A reference run's logits on disk, without loss, for the run that is compared with them.

Two models that fill the machine cannot be loaded side by side, so they run one after the other.
Every logit is kept: 0.3 MB a token for a vocabulary of 152,000 in bfloat16, a type that holds them
exactly where the model's head computes in it.

Shapes: T rows in all, R rows at hand, V vocabulary.
"""

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fiddler.errors import ConfigError
from offload.units import size_text

SPARE_BYTES = 1 << 30  # of the disk, left to others


class LogitFile:
    """A file of ``[num_rows, vocab_size]`` logits that has no name and ends with its last user."""

    def __init__(self, num_rows: int, vocab_size: int, dtype: torch.dtype, folder: Path) -> None:
        """Raises :class:`ConfigError` where ``folder`` has no room for it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._vocab_size, self._dtype = vocab_size, dtype
        self._row_bytes = vocab_size * dtype.itemsize
        _check_room(num_rows, self._row_bytes, folder)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, row: int, logits_RV: torch.Tensor) -> None:
        """Keep float32 logits as rows from ``row`` on."""
        kept_RV = logits_RV.to(self._dtype)
        assert torch.equal(kept_RV.float(), logits_RV), f"{self._dtype} does not hold these logits"
        self._file.seek(row * self._row_bytes)
        self._file.write(kept_RV.cpu().contiguous().view(torch.uint8).numpy().data)

    def read(self, row: int, count: int) -> torch.Tensor:
        """Return ``count`` rows from ``row`` on, on the CPU, in the type they are kept in."""
        self._file.seek(row * self._row_bytes)
        content = bytearray(self._file.read(count * self._row_bytes))
        assert len(content) == count * self._row_bytes, f"rows from {row} on were not written"
        return torch.frombuffer(content, dtype=self._dtype).view(count, self._vocab_size)


def _check_room(num_rows: int, row_bytes: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if num_rows * row_bytes > free:
        raise ConfigError(
            f"the reference's predictions take {size_text(num_rows * row_bytes)}, but {folder} "
            f"has {size_text(max(0, free))} to spare",
            hint=f"--max-tokens {max(2, free // row_bytes)} scores a part of the text, and "
            "XDG_CACHE_HOME names another folder",
        )
