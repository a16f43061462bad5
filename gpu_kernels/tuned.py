"""Launch configurations found by measuring: plain data, chosen by a pure function.

``TABLE[kernel][family]`` lists (limits, configuration): the first one counts whose limits are all
kept, where ``{"rows": 32}`` means at most 32 rows. A family without a fitting entry takes that of
an older one like it; the oldest one's list ends with limits that everything keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

Limits = Mapping[str, int]
Config = Mapping[str, int]

# Consumer cards follow consumer cards: a block there has 99 KiB of shared memory, on sm90 227.
OLDER: dict[str, str | None] = {
    "sm120": "sm89",
    "sm100": "sm90",
    "sm90": "sm80",
    "sm89": "sm86",
    "sm86": "sm80",
    "sm80": None,
}

# Paged attention reads a page's number before the page: of n stages the first ones wait for that,
# and only (n - 1) / 2 tiles of keys and values are under way (seen in the compiled shared memory).
# ``per_sm``: programs of decode attention for each multiprocessor. What stands under sm80 must do
# with the shared memory of consumer cards.
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
    "sampling_finish": {"sm80": [({}, {"num_warps": 8})]},
    "sampling_tile": {"sm80": [({}, {"num_warps": 4})]},
    "router": {"sm80": [({"experts": 256}, {"num_warps": 1}), ({}, {"num_warps": 2})]},
}


def choose(kernel: str, family: str, **sizes: int) -> Config:
    """Return the keyword arguments with which ``kernel`` is launched on ``family``."""
    candidate: str | None = family
    while candidate is not None:
        for limits, config in TABLE[kernel].get(candidate, ()):
            if all(sizes[name] <= largest for name, largest in limits.items()):
                return config
        candidate = OLDER[candidate]
    raise AssertionError(f"the oldest family of {kernel} lacks an entry without limits")
