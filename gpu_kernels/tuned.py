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


def _tile(
    rows: int,
    columns: int,
    depth: int,
    num_warps: int,
    num_stages: int,
    *,
    in_registers: bool = False,
) -> Config:
    """A configuration of the grouped expert kernel."""
    sizes = {"rows": rows, "columns": columns, "depth": depth}
    return {**sizes, "num_warps": num_warps, "num_stages": num_stages, "in_registers": in_registers}


# Paged attention reads a page's number before the page: of n stages the first ones wait for that,
# and only (n - 1) / 2 tiles of keys and values are under way (seen in the compiled shared memory).
# ``per_sm``: programs of decode attention for each multiprocessor. What stands under sm80 must do
# with the shared memory of consumer cards.
TABLE: dict[str, dict[str, list[tuple[Limits, Config]]]] = {
    "attention_decode": {
        "sm80": [
            (
                {"rows": 16, "bits": 8},
                {"BLOCK_N": 32, "num_warps": 1, "num_stages": 3, "per_sm": 4},
            ),
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
                {"rows": 16, "bits": 4, "row_bytes": 64},
                {"BLOCK_N": 64, "num_warps": 1, "num_stages": 4, "per_sm": 4},
            ),
            (
                {"rows": 16, "bits": 4},
                {"BLOCK_N": 32, "num_warps": 1, "num_stages": 4, "per_sm": 4},
            ),
            (
                {"rows": 16, "bits": 8, "row_bytes": 128},
                {"BLOCK_N": 64, "num_warps": 1, "num_stages": 3, "per_sm": 4},
            ),
            (
                {"rows": 64, "row_bytes": 256},
                {"BLOCK_N": 64, "num_warps": 4, "num_stages": 5, "per_sm": 2},
            ),
            (
                {"rows": 128, "row_bytes": 256},
                {"BLOCK_N": 64, "num_warps": 8, "num_stages": 3, "per_sm": 1},
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
            # four bits: tiles of 64 rows spill 2.9 KB a thread on sm89
            (
                {"row_bytes": 512, "bits": 4},
                {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
            ),
            ({"row_bytes": 512}, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3}),
            ({}, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}),
        ],
        "sm90": [
            (
                {"rows": 16, "row_bytes": 256},
                {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 5},
            ),
            (
                {"rows": 64, "row_bytes": 256},
                {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
            ),
            # 128 tokens of four bits spill 1.7 KB a thread
            (
                {"row_bytes": 256, "bits": 4},
                {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
            ),
            ({"row_bytes": 256}, {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 5}),
        ],
    },
    # Products of float32 are sums in registers. Tiles that suit 16 bits spill up to 51 KB a thread,
    # for which the driver takes gigabytes (H200: 0.26 MiB a byte) and keeps them; these spill none.
    "attention_prefill_float32": {
        "sm80": [
            ({"row_bytes": 256}, {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}),
            ({}, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}),
        ],
    },
    # expert_gate_up, expert_down: weights of a few tokens' experts; ``splits``: parts of the depth
    "expert_gate_up": {
        "sm80": [
            ({"bits": 16}, {"rows": 16, "depth": 128, "num_warps": 1, "num_stages": 4}),
            ({}, {"rows": 16, "depth": 32, "num_warps": 4, "num_stages": 2}),
        ],
        "sm90": [
            ({"bits": 4}, {"rows": 32, "depth": 128, "num_warps": 1, "num_stages": 4}),
        ],
    },
    "expert_down": {
        "sm80": [
            ({"bits": 16}, {"rows": 16, "depth": 128, "num_warps": 1, "num_stages": 4}),
            ({}, {"rows": 16, "depth": 32, "num_warps": 4, "num_stages": 2}),
        ],
        "sm90": [
            (
                {"bits": 4, "depth": 4096},
                {"rows": 16, "depth": 256, "num_warps": 1, "num_stages": 3},
            ),
            (
                {"bits": 4},
                {"rows": 32, "depth": 256, "num_warps": 2, "num_stages": 3, "splits": 4},
            ),
            ({"bits": 8}, {"rows": 16, "depth": 128, "num_warps": 1, "num_stages": 4}),
            # a long depth: few warps, of which each takes longer to decode than to read
            (
                {"bits": 12, "depth": 4096},
                {"rows": 16, "depth": 128, "num_warps": 1, "num_stages": 4},
            ),
            (
                {"bits": 12},
                {"rows": 16, "depth": 128, "num_warps": 1, "num_stages": 4, "splits": 4},
            ),
        ],
    },
    # up to 16 pairs for each slot the weights' bytes bind, then arithmetic; sm90 has wgmma
    "grouped_experts": {
        "sm80": [
            ({"bits": 16, "per_slot": 16}, _tile(32, 16, 128, 2, 4, in_registers=True)),
            ({"bits": 12}, _tile(64, 64, 64, 4, 3, in_registers=True)),
            ({"bits": 16}, _tile(64, 64, 64, 4, 3)),
            ({}, _tile(32, 32, 32, 4, 2)),
        ],
        "sm90": [
            ({"bits": 16, "per_slot": 16}, _tile(32, 16, 128, 2, 4, in_registers=True)),
            ({"bits": 12, "per_slot": 64}, _tile(64, 64, 64, 4, 3)),
            ({"bits": 16, "per_slot": 64}, _tile(64, 64, 64, 4, 4)),
            ({"bits": 12}, _tile(64, 128, 64, 4, 3)),
            # a short depth leaves much of a program to its ends: two of them share a multiprocessor
            ({"bits": 16, "depth": 1024}, _tile(64, 128, 64, 4, 3)),
            ({"bits": 16}, _tile(128, 128, 64, 8, 4)),
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
