"""Launch configurations found by measuring: plain data, chosen by a pure function.

``TABLE[kernel][family]`` lists (limits, configuration): the first one counts whose limits are all
kept, where ``{"rows": 32}`` means at most 32 rows. A family without a fitting entry takes that of
the next older one; the oldest one's list ends with limits that everything keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpu_kernels.device import FAMILIES

Limits = Mapping[str, int]
Config = Mapping[str, int]

# Paged attention reads a page's number before the page: of n stages the first ones wait for that,
# and only (n - 1) / 2 tiles of keys and values are under way (seen in the compiled shared memory).
# ``per_sm``: programs of decode attention for each multiprocessor. Below sm90 all must do with the
# 99 KiB of shared memory of consumer cards.
TABLE: dict[str, dict[str, list[tuple[Limits, Config]]]] = {
    "attention_decode": {
        "sm80": [
            (
                {"rows": 64, "row_bytes": 256},
                {"BLOCK_N": 64, "num_warps": 4, "num_stages": 5, "per_sm": 2},
            ),
            ({"rows": 64}, {"BLOCK_N": 16, "num_warps": 4, "num_stages": 5, "per_sm": 2}),
            ({"row_bytes": 512}, {"BLOCK_N": 32, "num_warps": 8, "num_stages": 3, "per_sm": 1}),
            ({}, {"BLOCK_N": 16, "num_warps": 8, "num_stages": 3, "per_sm": 1}),
        ],
        "sm90": [
            (
                {"rows": 64, "row_bytes": 256},
                {"BLOCK_N": 64, "num_warps": 4, "num_stages": 7, "per_sm": 2},
            ),
        ],
    },
    "attention_prefill": {
        "sm80": [
            (
                {"rows": 16, "row_bytes": 256},
                {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 5},
            ),
            (
                {"rows": 64, "row_bytes": 256},
                {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
            ),
            ({"row_bytes": 256}, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}),
            ({"row_bytes": 512}, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}),
            ({}, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}),
        ],
    },
    "embedding": {"sm80": [({}, {"BLOCK_H": 1024, "num_warps": 4})]},
}


def choose(kernel: str, family: str, **sizes: int) -> Config:
    """Return the keyword arguments with which ``kernel`` is launched on ``family``."""
    names = list(FAMILIES.values())
    by_family = TABLE[kernel]
    for candidate in reversed(names[: names.index(family) + 1]):
        for limits, config in by_family.get(candidate, ()):
            if all(sizes[name] <= largest for name, largest in limits.items()):
                return config
    raise AssertionError(f"the oldest family of {kernel} lacks an entry without limits")
