"""Pairs grouped by slot against a stable sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE

from gpu_kernels.expert_grouping import (
    MAX_CHUNKS,
    MAX_SLOTS,
    STEP,
    Grouping,
    group_pairs,
    group_pairs_reference,
)


def sorted_pairs(ids_TK: torch.Tensor, slot_E: torch.Tensor) -> list[tuple[int, int]]:
    """(slot, pair) of every pair whose expert is resident, sorted: brute force."""
    slots, ids = slot_E.tolist(), ids_TK.flatten().tolist()
    resident = [(slots[e], p) for p, e in enumerate(ids) if e >= 0 and slots[e] >= 0]
    return sorted(resident)


def check(ids_TK: torch.Tensor, slot_E: torch.Tensor, num_slots: int) -> None:
    expected = sorted_pairs(ids_TK, slot_E)
    poisoned = Grouping(
        torch.full((ids_TK.numel(),), -7, dtype=torch.int32, device=DEVICE),
        torch.full((num_slots + 1,), -7, dtype=torch.int32, device=DEVICE),
    )
    for actual in (
        group_pairs(ids_TK, slot_E, num_slots, out=poisoned),
        group_pairs_reference(ids_TK, slot_E, num_slots),
    ):
        assert actual.pair_P[: len(expected)].tolist() == [pair for _, pair in expected]
        counts = np.bincount([slot for slot, _ in expected], minlength=num_slots)
        assert actual.first_S1.tolist() == [0, *counts.cumsum().tolist()]


def make_routing(
    num_tokens: int, top_k: int, num_experts: int, num_slots: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    slot_E = np.full(num_experts, -1)
    slot_E[rng.permutation(num_experts)[:num_slots]] = rng.permutation(num_slots)
    ids_TK = rng.integers(-1, num_experts, (num_tokens, top_k))
    return tuple(torch.from_numpy(a).to(DEVICE, torch.int32) for a in (ids_TK, slot_E))


@settings(max_examples=10)
@given(st.integers(0, 300), st.integers(1, 4), st.integers(1, 40), st.integers(0, 99))
def test_equals_a_stable_sort(num_tokens: int, top_k: int, num_experts: int, seed: int) -> None:
    num_slots = max(1, num_experts // 2)
    check(*make_routing(num_tokens, top_k, num_experts, num_slots, seed), num_slots)


def test_many_chunks() -> None:
    check(*make_routing(9 * STEP + 3, 4, 20, 15, seed=0), 15)


def test_more_pairs_take_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_kernels.expert_grouping.MAX_CHUNKS", 3)
    check(
        *make_routing(2 * STEP + 3, 4, 20, 15, seed=0), 15
    )  # chunks of 3 steps, the last not full


def test_one_slot_takes_all() -> None:
    ids_TK = torch.zeros(700, 2, dtype=torch.int32, device=DEVICE)
    check(ids_TK, torch.tensor([2], dtype=torch.int32, device=DEVICE), 4)


def test_many_slots() -> None:
    check(*make_routing(50, 8, 600, 512, seed=1), 512)


def test_bad_arguments_are_refused() -> None:
    ids_TK, slot_E = make_routing(3, 2, 5, 3, seed=0)
    for arguments in (
        (ids_TK.long(), slot_E, 3),
        (ids_TK, slot_E.long(), 3),
        (ids_TK.T, slot_E, 3),
        (ids_TK, slot_E, 0),
        (ids_TK, slot_E, MAX_SLOTS + 1),
    ):
        with pytest.raises(AssertionError):
            group_pairs(*arguments)
    with pytest.raises(AssertionError):
        group_pairs(ids_TK, slot_E, 3, out=Grouping.empty(5, 3, ids_TK.device))


@pytest.mark.gpu
@pytest.mark.parametrize("num_slots", [1, 8, 128, 1023])
@pytest.mark.parametrize("num_pairs", [STEP * MAX_CHUNKS, STEP * MAX_CHUNKS + 8, 131072])
def test_large_batches_on_the_gpu(num_pairs: int, num_slots: int) -> None:
    check(*make_routing(num_pairs // 8, 8, 1200, num_slots, seed=2), num_slots)
