"""Sums over a token's choices against the plain ones."""

import pytest
import torch
from expert_case import make_case
from paged_batch import DEVICE, max_error

from gpu_kernels.sum_choices import sum_choices_of_tokens, sum_choices_reference


@pytest.mark.parametrize(("num_tokens", "top_k", "hidden"), [(0, 2, 8), (1, 1, 1), (9, 3, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(dtype: torch.dtype, num_tokens: int, top_k: int, hidden: int) -> None:
    case = make_case("dense", num_tokens=num_tokens, top_k=top_k, hidden=hidden, width=8)
    _, ids_TK, weights_TK, slot_E = case.step
    part_PH = torch.randn(num_tokens * top_k + 1, hidden).to(DEVICE, dtype)
    slot_TK = slot_E[ids_TK.clamp(min=0).long()].masked_fill(ids_TK < 0, -1)
    part_PH[:-1][slot_TK.flatten() < 0] = float("nan")  # never written: must not be read
    weights_TK[slot_TK < 0] = float("nan")
    wide = torch.full((num_tokens, hidden + 5), float("nan"), device=DEVICE)
    sum_choices_of_tokens(part_PH, ids_TK, weights_TK, slot_E, wide[:, 5:])
    expected = sum_choices_reference(part_PH.nan_to_num(), ids_TK, weights_TK.nan_to_num(), slot_E)
    if num_tokens:
        assert max_error(wide[:, 5:], expected) <= 1e-5
    assert wide[:, :5].isnan().all()
