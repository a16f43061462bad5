"""Prefill attention against the dense definition: chunks, mixed batches, windows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import (
    DEVICE,
    PagedBatch,
    dense_oracle,
    dense_oracle_with_lse,
    frobenius_error,
    make_batch,
    max_error,
    some_sinks,
    some_slopes,
)

from gpu_kernels.attention_prefill import attention_prefill, attention_prefill_reference
from gpu_kernels.attention_variant import PLAIN, Variant
from gpu_kernels.kv_quant import INT4

# a first chunk, a later chunk, a decode row, an idle request, page boundaries, an empty request
KV_LENS = [21, 100, 70, 16, 17, 0, 1]
QO_LENS = [21, 13, 1, 0, 17, 0, 1]
# codes, and how far from the numbers themselves attention over normal ones may be
CODES = {torch.int8: 0.012, torch.float8_e4m3fn: 0.05, INT4: 0.14}


def run(
    batch: PagedBatch,
    variant: Variant = PLAIN,
    *,
    sm_scale: float | None = None,
    max_qo_len: int | None = None,
    **options: Any,
) -> torch.Tensor:
    longest = int(batch.qo_indptr_B1.diff().max())
    return attention_prefill(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        batch.qo_indptr_B1,
        sm_scale=batch.sm_scale if sm_scale is None else sm_scale,
        max_qo_len=longest if max_qo_len is None else max_qo_len,
        variant=variant,
        kv_scales=batch.kv_scales,
        **options,
    )


def run_reference(batch: PagedBatch, variant: Variant = PLAIN, **options: Any) -> torch.Tensor:
    return attention_prefill_reference(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        batch.qo_indptr_B1,
        sm_scale=batch.sm_scale,
        variant=variant,
        kv_scales=batch.kv_scales,
        **options,
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
    variant = Variant(window_left=window_left)
    assert max_error(run(batch, variant), dense_oracle(batch, variant)) <= 1e-5


VARIANTS = {
    "cap": Variant(logits_soft_cap=1.5),
    "sinks": Variant(sinks_H=some_sinks(4)),
    "alibi": Variant(alibi_slopes_H=some_slopes(4)),
    "window and sinks": Variant(window_left=7, sinks_H=some_sinks(4)),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_and_log_sum_exp(name: str, is_causal: bool) -> None:
    batch = make_batch(KV_LENS, QO_LENS)
    lse_TH = torch.full((sum(QO_LENS), 4), torch.nan, device=DEVICE)
    actual = run(batch, VARIANTS[name], is_causal=is_causal, lse_log2=lse_TH)
    expected, expected_lse_TH = dense_oracle_with_lse(batch, VARIANTS[name], is_causal=is_causal)
    assert max_error(actual, expected) <= 1e-5
    assert max_error(lse_TH, expected_lse_TH) <= 1e-5


def mask_of(batch: PagedBatch, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict[int, Any]]:
    """A random ragged mask, where each request's begins, and the keys each query may see."""
    rng = torch.Generator().manual_seed(seed)
    rows, keep, sizes = [], {}, [0]
    bounds = batch.qo_indptr_B1.tolist()
    for request, kv_len in enumerate(batch.kv_lens):
        for token in range(*bounds[request : request + 2]):
            keep[token] = (torch.rand(kv_len, generator=rng) < 0.6).to(DEVICE)
            rows.append(keep[token])
        sizes.append(sum(len(row) for row in rows))
    return torch.cat(rows), torch.tensor(sizes, device=DEVICE), keep


@pytest.mark.parametrize("is_causal", [True, False])
def test_custom_masks(is_causal: bool) -> None:
    batch = make_batch(KV_LENS, QO_LENS, heads=(6, 2))
    mask, mask_indptr_B1, keep = mask_of(batch, 3)
    options = {"custom_mask": mask, "mask_indptr_B1": mask_indptr_B1, "is_causal": is_causal}
    actual = run(batch, **options)
    expected, _ = dense_oracle_with_lse(batch, keep=keep, is_causal=is_causal)
    assert max_error(actual, expected) <= 1e-5
    assert max_error(run_reference(batch, **options), expected) <= 1e-5


@pytest.mark.parametrize("variant", [PLAIN, Variant(window_left=9)], ids=["plain", "window"])
def test_explicit_positions(variant: Variant) -> None:
    batch = make_batch([100, 40, 0], [20, 3, 1])
    positions = [*range(70, 90), 39, 0, 5, 0]
    positions_T = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    expected, _ = dense_oracle_with_lse(batch, variant, positions=positions)
    assert max_error(run(batch, variant, positions_T=positions_T), expected) <= 1e-5
    assert max_error(run_reference(batch, variant, positions_T=positions_T), expected) <= 1e-5


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_quantised_cache(dtype: torch.dtype) -> None:
    exact = make_batch(KV_LENS, QO_LENS, head_dim=80)
    batch = exact.quantised(dtype)
    actual = run(batch)
    assert max_error(actual, dense_oracle(batch)) <= 1e-5
    assert max_error(run_reference(batch), dense_oracle(batch)) <= 1e-5
    bound = CODES[dtype]
    assert frobenius_error(actual, dense_oracle(exact)) <= bound


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


@pytest.mark.parametrize("name", ["plain", *VARIANTS])
def test_reference_equals_the_definition(name: str) -> None:
    batch = make_batch(KV_LENS, QO_LENS)
    variant = VARIANTS.get(name, PLAIN)
    lse_TH = torch.full((sum(QO_LENS), 4), torch.nan, device=DEVICE)
    actual = run_reference(batch, variant, lse_log2=lse_TH)
    expected, expected_lse_TH = dense_oracle_with_lse(batch, variant)
    assert max_error(actual, expected) <= 1e-5
    assert max_error(lse_TH, expected_lse_TH) <= 1e-5


def test_bad_arguments_are_refused_before_a_launch() -> None:
    batch = make_batch([20, 30], [2, 3])
    mask, mask_indptr_B1, _ = mask_of(batch, 0)
    bad: list[dict[str, Any]] = [
        {"custom_mask": mask},
        {"custom_mask": mask.int(), "mask_indptr_B1": mask_indptr_B1},
        {"custom_mask": mask, "mask_indptr_B1": mask_indptr_B1.int()},
        {"positions_T": torch.zeros(5, device=DEVICE)},
        {"positions_T": torch.zeros(4, dtype=torch.int32, device=DEVICE)},
        {"lse_log2": torch.empty(5, 3, device=DEVICE)},
        {"out": torch.empty(5, 4, 15, device=DEVICE)},
        {"variant": Variant(sinks_H=some_sinks(3))},
    ]
    for options in bad:
        with pytest.raises(AssertionError):
            run(batch, **options)
    with pytest.raises(AssertionError):
        run(batch.with_queries(batch.q_THD.double()))


GPU_KV_LENS = [513, 3000, 70, 16, 2049, 0, 1, 1100]
GPU_QO_LENS = [513, 300, 1, 0, 1000, 0, 1, 1]


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
@pytest.mark.parametrize("head_dim", [16, 32, 96, 128, 192, 256])
@pytest.mark.parametrize("window_left", [-1, 200])
def test_float32_on_the_gpu(head_dim: int, window_left: int) -> None:
    batch = make_batch(GPU_KV_LENS, GPU_QO_LENS, heads=(14, 2), head_dim=head_dim)
    variant = Variant(window_left=window_left)
    assert max_error(run(batch, variant), run_reference(batch, variant)) <= 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 192, 256])
def test_half_dtypes_and_head_dims_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(GPU_KV_LENS, GPU_QO_LENS, heads=(4, 1), head_dim=head_dim, dtype=dtype)
    assert frobenius_error(run(batch), run_reference(batch)) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_quantised_cache_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(
        GPU_KV_LENS, GPU_QO_LENS, heads=(32, 4), head_dim=head_dim, dtype=torch.bfloat16
    ).quantised(dtype)
    assert frobenius_error(run(batch), run_reference(batch)) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_the_gpu(name: str) -> None:
    batch = make_batch(GPU_KV_LENS, GPU_QO_LENS, head_dim=128, dtype=torch.bfloat16)
    for is_causal in (True, False):
        actual = run(batch, VARIANTS[name], is_causal=is_causal)
        expected = run_reference(batch, VARIANTS[name], is_causal=is_causal)
        assert frobenius_error(actual, expected) <= 5e-3


@pytest.mark.gpu
def test_masks_and_positions_on_the_gpu() -> None:
    batch = make_batch([300, 600], [300, 40], head_dim=64, dtype=torch.bfloat16)
    mask, mask_indptr_B1, _ = mask_of(batch, 1)
    options = {"custom_mask": mask, "mask_indptr_B1": mask_indptr_B1}
    assert frobenius_error(run(batch, **options), run_reference(batch, **options)) <= 5e-3
    positions_T = torch.arange(340, dtype=torch.int32, device=DEVICE)
    actual = run(batch, positions_T=positions_T)
    assert frobenius_error(actual, run_reference(batch, positions_T=positions_T)) <= 5e-3
