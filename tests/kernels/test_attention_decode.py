"""Decode attention against the dense definition, over ugly batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE, PagedBatch, dense_oracle, frobenius_error, make_batch, max_error

from gpu_kernels.attention_decode import (
    attention_decode,
    attention_decode_reference,
    merge_parts,
    plan_decode,
)

RAGGED = [1, 0, 15, 16, 17, 300, 32, 0]


def run(
    batch: PagedBatch,
    *,
    max_programs: int = 1,
    window_left: int = -1,
    sm_scale: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    plan = plan_decode(
        batch.kv_lens,
        batch.kv_cache.shape[3],
        page_size=batch.pages.page_size,
        max_programs=max_programs,
    )
    return attention_decode(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        plan.to(DEVICE),
        sm_scale=batch.sm_scale if sm_scale is None else sm_scale,
        window_left=window_left,
        out=out,
    )


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (7, 1), (8, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("max_programs", [1, 64])
def test_ragged_batch_equals_dense(heads: tuple[int, int], max_programs: int) -> None:
    batch = make_batch(RAGGED, heads=heads)
    assert max_error(run(batch, max_programs=max_programs), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 128, 256])
def test_head_dims(head_dim: int) -> None:
    batch = make_batch([150, 3], head_dim=head_dim, heads=(2, 1))
    assert max_error(run(batch, max_programs=8), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window_left", [-1, 0, 20, 200])
def test_pages_and_windows(page_size: int, window_left: int) -> None:
    batch = make_batch([0, 64, 65, 270], page_size=page_size, heads=(2, 1))
    expected = dense_oracle(batch, window_left=window_left)
    for max_programs in (1, 16):
        actual = run(batch, max_programs=max_programs, window_left=window_left)
        assert max_error(actual, expected) <= 1e-5


def test_plan_may_count_the_window_only() -> None:
    batch = make_batch([400, 10, 300], heads=(2, 1))
    visible = [min(n, 201) for n in batch.kv_lens]
    plan = plan_decode(visible, 1, page_size=16, max_programs=16)
    assert plan.is_split
    actual = attention_decode(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        plan.to(DEVICE),
        sm_scale=batch.sm_scale,
        window_left=200,
    )
    assert max_error(actual, dense_oracle(batch, window_left=200)) <= 1e-5


@settings(max_examples=6)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=4), st.integers(0, 99))
def test_split_equals_unsplit(kv_lens: list[int], seed: int) -> None:
    batch = make_batch(kv_lens, heads=(2, 1), page_size=1, seed=seed)
    whole, parts = run(batch, max_programs=1), run(batch, max_programs=64)
    assert max_error(parts, whole) <= 1e-6
    assert max_error(parts, dense_oracle(batch)) <= 1e-5


def test_float16() -> None:
    batch = make_batch(RAGGED, heads=(4, 2), head_dim=32, dtype=torch.float16)
    assert frobenius_error(run(batch, max_programs=64), dense_oracle(batch)) <= 1e-3


@pytest.mark.parametrize("max_programs", [1, 16])
def test_huge_logits_give_no_nan(max_programs: int) -> None:
    batch = make_batch([290, 1], heads=(2, 1))
    batch.q_THD.mul_(100.0)
    scale = 250.0  # logits of about +-1e5: exp overflows unless the maximum is taken off first
    expected = dense_oracle(batch, sm_scale=scale)
    assert max_error(run(batch, max_programs=max_programs, sm_scale=scale), expected) <= 1e-4
    keys = batch.kv_cache[:, 0].nan_to_num_().abs_()
    batch.kv_cache[:, 0].copy_(keys)
    batch.q_THD.abs_().neg_()  # every logit far below 0: the running maximum is never near it
    actual = run(batch, max_programs=max_programs, sm_scale=scale)
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("max_programs", [1, 64])
def test_poisoned_output_is_overwritten(max_programs: int) -> None:
    batch = make_batch(RAGGED)
    out = torch.full_like(batch.q_THD, float("nan"))
    assert run(batch, max_programs=max_programs, out=out) is out
    assert max_error(out, dense_oracle(batch)) <= 1e-5
    assert out[1].eq(0).all() and out[-1].eq(0).all()


def test_query_and_output_may_be_slices() -> None:
    batch = make_batch([40, 9], heads=(4, 2))
    fused = torch.zeros(2, 9, 16, device=DEVICE)
    fused[:, 2:6] = batch.q_THD
    out = torch.zeros(2, 8, 16, device=DEVICE)
    sliced = PagedBatch(
        fused[:, 2:6],
        batch.kv_cache,
        batch.pages,
        batch.qo_indptr_B1,
        batch.kv_lens,
        batch.dense_kv,
    )
    run(sliced, out=out[:, 4:])
    assert max_error(out[:, 4:], dense_oracle(batch)) <= 1e-5 and out[:, :4].eq(0).all()


def test_no_requests() -> None:
    batch = make_batch([])
    assert run(batch).shape == (0, 4, 16)


def test_reference_equals_the_definition() -> None:
    batch = make_batch(RAGGED, heads=(8, 2))
    for window_left in (-1, 5):
        actual = attention_decode_reference(
            batch.q_THD,
            batch.kv_cache,
            batch.pages,
            sm_scale=batch.sm_scale,
            window_left=window_left,
        )
        assert max_error(actual, dense_oracle(batch, window_left=window_left)) <= 1e-5


def test_empty_parts_change_nothing() -> None:
    rng = torch.Generator().manual_seed(1)
    part_WHD = torch.randn(4, 2, 16, generator=rng).to(DEVICE)
    lse_log2_WH = torch.randn(4, 2, generator=rng).to(DEVICE)
    part_WHD[1:] = 0.0
    lse_log2_WH[1:] = float("-inf")
    out = torch.full((2, 2, 16), float("nan"), device=DEVICE)
    o_indptr_B1 = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
    merge_parts(part_WHD, lse_log2_WH, o_indptr_B1, out)
    assert max_error(out[0], part_WHD[0]) <= 1e-6 and out[1].eq(0).all()


def test_merge_weighs_parts_by_their_exponential_sums() -> None:
    rng = torch.Generator().manual_seed(2)
    part_WHD = torch.randn(40, 3, 24, generator=rng).to(DEVICE)
    lse_log2_WH = 20 * torch.randn(40, 3, generator=rng).to(DEVICE)
    out = torch.empty(1, 3, 24, device=DEVICE)
    o_indptr_B1 = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)
    merge_parts(part_WHD, lse_log2_WH, o_indptr_B1, out)
    weights_WH = torch.softmax(lse_log2_WH.double() * torch.log(torch.tensor(2.0).double()), 0)
    assert max_error(out[0], (weights_WH[..., None] * part_WHD.double()).sum(0)) <= 1e-5


GPU_LENGTHS = [1, 16, 0, 4097, 17, 900, 2048, 8191]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (28, 4), (32, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_on_the_gpu(heads: tuple[int, int], head_dim: int) -> None:
    batch = make_batch(GPU_LENGTHS, heads=heads, head_dim=head_dim, dtype=torch.bfloat16)
    expected = dense_oracle(batch)
    for max_programs in (1, 528):
        actual = run(batch, max_programs=max_programs)
        assert frobenius_error(actual, expected) <= 5e-3
        assert torch.equal(actual, run(batch, max_programs=max_programs))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 96, 128, 256])
@pytest.mark.parametrize("window_left", [-1, 1000])
def test_float32_on_the_gpu(head_dim: int, window_left: int) -> None:
    batch = make_batch(GPU_LENGTHS, heads=(14, 2), head_dim=head_dim)
    expected = dense_oracle(batch, window_left=window_left)
    for max_programs in (1, 528):
        actual = run(batch, max_programs=max_programs, window_left=window_left)
        assert max_error(actual, expected) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_half_dtypes_and_head_dims_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(GPU_LENGTHS, heads=(4, 1), head_dim=head_dim, dtype=dtype)
    assert frobenius_error(run(batch, max_programs=528), dense_oracle(batch)) <= 5e-3
