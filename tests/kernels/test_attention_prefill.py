"""Prefill attention against the dense definition: chunks, mixed batches, windows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import PagedBatch, dense_oracle, frobenius_error, make_batch, max_error

from gpu_kernels.attention_prefill import attention_prefill, attention_prefill_reference

# a first chunk, a later chunk, a decode row, an idle request, page boundaries, an empty request
KV_LENS = [21, 100, 70, 16, 17, 0, 1]
QO_LENS = [21, 13, 1, 0, 17, 0, 1]


def run(
    batch: PagedBatch,
    *,
    window_left: int = -1,
    sm_scale: float | None = None,
    max_qo_len: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    longest = int(batch.qo_indptr_B1.diff().max())
    return attention_prefill(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        batch.qo_indptr_B1,
        sm_scale=batch.sm_scale if sm_scale is None else sm_scale,
        max_qo_len=longest if max_qo_len is None else max_qo_len,
        window_left=window_left,
        out=out,
    )


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (7, 1), (8, 1), (6, 2)], ids=str)
def test_mixed_batch_equals_dense(heads: tuple[int, int]) -> None:
    batch = make_batch(KV_LENS, QO_LENS, heads=heads)
    assert max_error(run(batch), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("head_dim", [16, 24, 80, 128, 256])
def test_head_dims(head_dim: int) -> None:
    batch = make_batch([60, 5], [20, 5], heads=(2, 1), head_dim=head_dim)
    assert max_error(run(batch), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window_left", [0, 7, 64])
def test_pages_and_windows(page_size: int, window_left: int) -> None:
    batch = make_batch([130, 64, 1], [90, 10, 1], heads=(2, 1), page_size=page_size)
    expected = dense_oracle(batch, window_left=window_left)
    assert max_error(run(batch, window_left=window_left), expected) <= 1e-5


@settings(max_examples=6)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=3))
def test_random_chunks_at_any_tile(chunks: list[tuple[int, int]]) -> None:
    """``max_qo_len`` picks the tile only: 1 gives the smallest one."""
    kv_lens, qo_lens = [past + new for past, new in chunks], [new for _, new in chunks]
    batch = make_batch(kv_lens, qo_lens, heads=(3, 1))
    expected = dense_oracle(batch)
    for max_qo_len in (1, 64):
        assert expected.numel() == 0 or (
            max_error(run(batch, max_qo_len=max_qo_len), expected) <= 1e-5
        )


def test_chunks_equal_the_whole() -> None:
    whole = make_batch([100], [100], heads=(4, 2))
    chunk = make_batch([100], [30], heads=(4, 2))  # same seed: the same keys and values
    assert torch.equal(whole.dense_kv[0][0], chunk.dense_kv[0][0])
    chunk.q_THD.copy_(whole.q_THD[70:])
    assert max_error(run(chunk), run(whole)[70:]) <= 1e-6


def test_float16() -> None:
    batch = make_batch(KV_LENS, QO_LENS, heads=(4, 2), head_dim=32, dtype=torch.float16)
    assert frobenius_error(run(batch), dense_oracle(batch)) <= 1e-3


def test_huge_logits_give_no_nan() -> None:
    batch = make_batch([70, 20], [30, 20], heads=(2, 1))
    batch.q_THD.mul_(100.0)
    expected = dense_oracle(batch, sm_scale=250.0)
    assert max_error(run(batch, sm_scale=250.0), expected) <= 1e-4


def test_poisoned_output_is_overwritten() -> None:
    batch = make_batch(KV_LENS, QO_LENS)
    out = torch.full_like(batch.q_THD, float("nan"))
    assert run(batch, out=out) is out
    assert max_error(out, dense_oracle(batch)) <= 1e-5


def test_no_queries() -> None:
    batch = make_batch([5], [0])
    assert run(batch).shape == (0, 4, 16)


@pytest.mark.parametrize("window_left", [-1, 5])
def test_reference_equals_the_definition(window_left: int) -> None:
    batch = make_batch(KV_LENS, QO_LENS, heads=(8, 2))
    actual = attention_prefill_reference(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        batch.qo_indptr_B1,
        sm_scale=batch.sm_scale,
        window_left=window_left,
    )
    assert max_error(actual, dense_oracle(batch, window_left=window_left)) <= 1e-5


GPU_KV_LENS = [513, 3000, 70, 16, 2049, 0, 1, 1100]
GPU_QO_LENS = [513, 300, 1, 0, 1000, 0, 1, 1]


def run_reference(batch: PagedBatch, window_left: int = -1) -> torch.Tensor:
    return attention_prefill_reference(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        batch.qo_indptr_B1,
        sm_scale=batch.sm_scale,
        window_left=window_left,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (28, 4), (32, 4)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_on_the_gpu(heads: tuple[int, int], head_dim: int) -> None:
    batch = make_batch(
        GPU_KV_LENS, GPU_QO_LENS, heads=heads, head_dim=head_dim, dtype=torch.bfloat16
    )
    actual = run(batch)
    assert frobenius_error(actual, run_reference(batch)) <= 5e-3
    assert torch.equal(actual, run(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 96, 128, 256])
@pytest.mark.parametrize("window_left", [-1, 200])
def test_float32_on_the_gpu(head_dim: int, window_left: int) -> None:
    batch = make_batch(GPU_KV_LENS, GPU_QO_LENS, heads=(14, 2), head_dim=head_dim)
    actual = run(batch, window_left=window_left)
    assert max_error(actual, run_reference(batch, window_left)) <= 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_half_dtypes_and_head_dims_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(GPU_KV_LENS, GPU_QO_LENS, heads=(4, 1), head_dim=head_dim, dtype=dtype)
    assert frobenius_error(run(batch), run_reference(batch)) <= 5e-3
