"""Merging attention states: like attention over all keys, and the empty state changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE, max_error
from torch import Tensor

from gpu_kernels.merge_states import (
    merge_state,
    merge_state_in_place,
    merge_states,
    merge_states_reference,
)


def states(num_rows: int, num_states: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(num_rows + head_dim)
    v_NSHD = torch.randn(num_rows, num_states, heads, head_dim, generator=rng)
    lse_NSH = 20 * torch.randn(num_rows, num_states, heads, generator=rng)
    return v_NSHD.to(DEVICE), lse_NSH.to(DEVICE)


def attention_state(logits_S: Tensor, values_SD: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64, as ``[1, 1, D]`` and ``[1, 1]`` in float32."""
    lse = logits_S.double().logsumexp(0) / math.log(2)
    weights_S = logits_S.double().softmax(0) if len(logits_S) else logits_S.double()
    value_D = (weights_S[:, None] * values_SD.double()).sum(0)
    return value_D[None, None].float().to(DEVICE), lse[None, None].float().to(DEVICE)


@settings(max_examples=20)
@given(st.integers(0, 12), st.integers(0, 9999))
def test_two_parts_equal_the_whole(cut: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits_S = 5 * torch.randn(12, generator=rng)
    values_SD = torch.randn(12, 16, generator=rng)
    parts = [attention_state(logits_S[s], values_SD[s]) for s in (slice(cut), slice(cut, None))]
    v, lse = merge_state(*parts[0], *parts[1])
    expected_v, expected_lse = attention_state(logits_S, values_SD)
    assert max_error(v, expected_v) <= 1e-5 and max_error(lse, expected_lse) <= 1e-5
    assert max_error(lse * math.log(2), logits_S.logsumexp(0).to(DEVICE)) <= 1e-5


def test_the_empty_state_is_the_identity() -> None:
    (v_NSHD, lse_NSH) = states(3, 1, 5, 24)
    v, lse = v_NSHD[:, 0], lse_NSH[:, 0]
    empty = torch.zeros_like(v), torch.full_like(lse, -math.inf)
    for merged in (merge_state(v, lse, *empty), merge_state(*empty, v, lse)):
        assert torch.equal(merged[0], v) and torch.equal(merged[1], lse)
    both = merge_state(*empty, *empty)
    assert torch.equal(both[0], empty[0]) and torch.equal(both[1], empty[1])


@pytest.mark.parametrize("shape", [(2, 1, 1, 16), (3, 5, 3, 24), (1, 40, 2, 128), (0, 2, 2, 16)])
def test_many_states(shape: tuple[int, int, int, int]) -> None:
    v_NSHD, lse_NSH = states(*shape)
    if shape[0] > 1:
        lse_NSH[0, :] = -math.inf
        v_NSHD[0, :] = 0.0
    v, lse = merge_states(v_NSHD, lse_NSH)
    expected_v, expected_lse = merge_states_reference(v_NSHD, lse_NSH)
    if shape[0]:
        assert max_error(v, expected_v) <= 1e-5 and max_error(lse, expected_lse) <= 1e-5


def test_pairs_are_the_states_of_two_and_associative() -> None:
    v_NSHD, lse_NSH = states(4, 3, 6, 32)
    a, b, c = ((v_NSHD[:, s], lse_NSH[:, s].contiguous()) for s in range(3))
    left = merge_state(*merge_state(*a, *b), *c)
    right = merge_state(*a, *merge_state(*b, *c))
    expected = merge_states(v_NSHD, lse_NSH)
    for found in (left, right):
        assert max_error(found[0], expected[0]) <= 1e-6
        assert max_error(found[1], expected[1]) <= 1e-5


def test_in_place_and_strided() -> None:
    v_NSHD, lse_NSH = states(4, 2, 3, 16)
    v_out, lse_out = v_NSHD[:, 0], lse_NSH[:, 0].contiguous()
    expected = merge_state(v_out, lse_out, v_NSHD[:, 1], lse_NSH[:, 1].contiguous())
    merge_state_in_place(v_out, lse_out, v_NSHD[:, 1], lse_NSH[:, 1].contiguous())
    assert torch.equal(v_out, expected[0]) and torch.equal(lse_out, expected[1])


def test_bad_arguments_are_refused() -> None:
    v_NSHD, lse_NSH = states(4, 2, 3, 16)
    with pytest.raises(AssertionError):
        merge_state(v_NSHD[:, 0], lse_NSH[:, 0], v_NSHD[:, 1], lse_NSH[:, 1])  # strided lse
    with pytest.raises(AssertionError):
        merge_states(v_NSHD, lse_NSH.double())
