"""Checks of the data in index tensors, for finding the caller that hands a kernel a wild index.

Off unless the environment has ``FIDDLER_DEBUG_KERNELS=1``, since each check waits for the device.
While a CUDA graph is captured there is no data to look at, and nothing is checked.
"""

from __future__ import annotations

import functools
import itertools
import os

import torch
from torch import Tensor

from gpu_kernels.page_table import PageTable

VARIABLE = "FIDDLER_DEBUG_KERNELS"


@functools.cache
def enabled() -> bool:
    """Whether the environment asks for checks; it is read once."""
    return os.environ.get(VARIABLE) == "1"


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all of the integers ``values`` lie in ``low..high - 1``."""
    if values.numel() and _can_look_at(values):
        smallest, largest = (int(bound) for bound in values.aminmax())
        wild = smallest if smallest < low else largest
        _require(low <= smallest and largest < high, name, f"lie in {low}..{high - 1}", wild)


def check_page_table(pages: PageTable, num_pages: int) -> None:
    """Raise ValueError unless every page that ``pages`` uses is one of a cache's ``num_pages``.

    ``indices`` may be longer than what ``indptr_B1`` uses.
    """
    if not _can_look_at(pages.indptr_B1):
        return
    indptr = pages.indptr_B1.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(indptr)]
    _require(indptr[0] == 0, "pages.indptr_B1", "begin with 0", indptr[0])
    _require(min(counts, default=0) >= 0, "pages.indptr_B1", "never decrease", indptr)
    room = len(pages.indices)
    _require(indptr[-1] <= room, "pages.indptr_B1", f"end within the {room} indices", indptr[-1])
    check_range("pages.indices", pages.indices[: indptr[-1]], 0, num_pages)
    for count, last in zip(counts, pages.last_page_len_B.tolist(), strict=True):
        allowed = range(1, pages.page_size + 1) if count else range(1)
        what = f"be {allowed.start}..{allowed.stop - 1} for a request of {count} pages"
        _require(last in allowed, "pages.last_page_len_B", what, last)


def _can_look_at(tensor: Tensor) -> bool:
    return enabled() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _require(holds: bool, name: str, what: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{name} must {what}, but holds {found}")
