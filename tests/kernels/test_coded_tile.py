"""Decode attention over caches of codes with half-precision queries: products of the codes."""

from dataclasses import replace

import pytest
import torch
from paged_batch import (
    DECODE_VARIANTS,
    DEVICE,
    PagedBatch,
    dense_oracle,
    dense_oracle_with_lse,
    frobenius_error,
    make_batch,
    max_error,
)

from gpu_kernels.attention_decode import DecodePlan, attention_decode, plan_decode
from gpu_kernels.attention_variant import PLAIN, Variant
from gpu_kernels.kv_quant import INT4
from gpu_kernels.split_kv import QueryBlocks

KINDS = I8, F8, I4 = [torch.int8, torch.float8_e4m3fn, INT4]
RAGGED = [1, 0, 16, 33, 150, 0]
# Against the dequantised cache in float64: weights are rounded to float16, q to 15 bits.
BOUND = 5e-4


def coded_batch(kind: torch.dtype, kv_lens: list[int], **options: object) -> PagedBatch:
    options = {"dtype": torch.bfloat16, "head_dim": 32, **options}
    return make_batch(kv_lens, **options).quantised(kind)  # type: ignore[arg-type]


def make_plan(batch: PagedBatch, **options: int) -> DecodePlan:
    return plan_decode(
        len(batch.kv_lens),
        batch.q_THD.shape[1],
        batch.kv_cache.shape[3],
        batch.q_THD.shape[2],
        device=DEVICE,
        dtype=batch.kv_cache.dtype,
        max_kv_len=max(batch.kv_lens),
        **options,
    )


def run(
    batch: PagedBatch, variant: Variant, plan: DecodePlan, lse_log2: torch.Tensor | None = None
) -> torch.Tensor:
    return attention_decode(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        plan,
        sm_scale=batch.sm_scale,
        variant=variant,
        kv_scales=batch.kv_scales,
        lse_log2=lse_log2,
    )


def check(batch: PagedBatch, variant: Variant = PLAIN, **options: int) -> None:
    """Outputs as good as their type, and log-sum-exps."""
    lse_TH = torch.full(batch.q_THD.shape[:2], torch.nan, device=DEVICE)
    actual = run(batch, variant, make_plan(batch, **options), lse_TH)
    expected, expected_lse_TH = dense_oracle_with_lse(batch, variant)
    assert frobenius_error(actual, expected) <= 5e-3
    assert max_error(lse_TH, expected_lse_TH) <= 1e-3


def lone_error(batch: PagedBatch) -> float:
    """Of a lone program's results, in float32."""
    plan = make_plan(batch, num_programs=1)
    run(batch, PLAIN, plan)
    has_keys_T = torch.tensor(batch.kv_lens, device=DEVICE) > 0
    part_TKRD = plan.part_PKRD[: len(batch.kv_lens)][has_keys_T]
    return frobenius_error(part_TKRD, dense_oracle(batch)[has_keys_T].view(part_TKRD.shape))


@pytest.mark.parametrize(
    ("heads", "kind"),
    [
        ((2, 2), I8),
        ((7, 1), F8),
        ((8, 2), I8),
        ((16, 1), I8),
        ((16, 2), I4),
        ((4, 1), I4),
    ],
    ids=str,
)
def test_ragged_batch(heads: tuple[int, int], kind: torch.dtype) -> None:
    batch = coded_batch(kind, RAGGED, heads=heads, head_dim=32)
    check(batch, num_programs=3)
    assert lone_error(batch) <= BOUND


@pytest.mark.parametrize(
    ("head_dim", "kind"),
    [(16, I8), (24, F8), (80, I8), (80, F8), (128, I8), (256, I8)]
    + [(dim, I4) for dim in (16, 24, 64, 96, 128, 256)],
    ids=str,
)
def test_head_dims(head_dim: int, kind: torch.dtype) -> None:
    check(coded_batch(kind, [70, 3], head_dim=head_dim, heads=(2, 1)), num_programs=2)


@pytest.mark.parametrize(
    ("page_size", "window_left", "kind"),
    [
        *((1, 20, I8), (8, -1, I8), (8, 100, I8), (32, 0, I8), (64, 20, I8), (64, 100, I8)),
        *((1, 20, I4), (8, 100, I4), (64, 20, I4)),
    ],
    ids=str,
)
def test_pages_and_windows(page_size: int, window_left: int, kind: torch.dtype) -> None:
    batch = coded_batch(kind, [0, 64, 65, 150], page_size=page_size, heads=(2, 1))
    for options in ({"num_programs": 3}, {"split_tokens": 64, "num_programs": 2}):
        check(batch, Variant(window_left=window_left), **options)


@pytest.mark.parametrize("kind", [I8, I4], ids=str)
@pytest.mark.parametrize("name", DECODE_VARIANTS)
def test_variants(name: str, kind: torch.dtype) -> None:
    check(coded_batch(kind, RAGGED), DECODE_VARIANTS[name], split_tokens=64, num_programs=2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks_of_queries_and_positions(kind: torch.dtype) -> None:
    sizes = [5, 1, 0, 3]
    batch = make_batch([150, 40, 17, 0], sizes, head_dim=32, dtype=torch.bfloat16).quantised(kind)
    blocks = QueryBlocks.of_groups(sizes, 2, DEVICE)
    plan = plan_decode(6, 4, 2, 32, device=DEVICE, dtype=kind, queries_per_unit=2, num_programs=2)
    positions = [3, 149, 0, 16, 100, 20, 0, 0, 0]
    for some_positions in (None, positions):
        actual = attention_decode(
            batch.q_THD,
            batch.kv_cache,
            batch.pages,
            plan,
            sm_scale=batch.sm_scale,
            kv_scales=batch.kv_scales,
            blocks=blocks,
            positions_T=None
            if some_positions is None
            else torch.tensor(some_positions, dtype=torch.int32, device=DEVICE),
        )
        expected, _ = dense_oracle_with_lse(batch, is_causal=False, positions=some_positions)
        assert frobenius_error(actual, expected) <= 5e-3


def test_rounding_q_costs_nothing_beside_rounding_keys() -> None:
    """With few large dims in q, as models have them, errors stay far below the codes' own."""
    exact = make_batch([200, 77], head_dim=128, heads=(8, 1), dtype=torch.bfloat16)
    exact.q_THD[:, :, ::32] *= 20
    exact.q_THD.mul_(0.3)
    batch = exact.quantised(torch.int8)
    ours = lone_error(batch)
    codes = frobenius_error(dense_oracle(batch), dense_oracle(exact))
    assert ours <= 0.1 * codes and ours <= 1e-3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logits_that_rise_and_huge_ones(kind: torch.dtype) -> None:
    """Each tile's largest logit is above all before: what there is must be rescaled."""
    exact = make_batch([290, 1], heads=(2, 1), head_dim=32, dtype=torch.float16)
    for keys, _ in exact.dense_kv:
        keys.mul_(torch.linspace(0, 20, len(keys), device=DEVICE)[:, None, None])
    cache = exact.kv_cache.clone()
    bounds = exact.pages.indptr_B1.tolist()
    for request, (keys, _) in enumerate(exact.dense_kv):
        for token, key in enumerate(keys):
            page = exact.pages.indices[bounds[request] + token // 16]
            cache[page, 0, token % 16] = key
    for factor in (1.0, 300.0):
        batch = replace(exact, kv_cache=cache, q_THD=exact.q_THD * factor).quantised(kind)
        actual = run(batch, PLAIN, make_plan(batch, num_programs=2))
        # logits of up to 1e4 are only as good as q's 15 bits make them
        assert frobenius_error(actual, dense_oracle(batch)) <= (2e-3 if factor == 1.0 else 0.05)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_small_and_large_values(scale: float, kind: torch.dtype) -> None:
    exact = make_batch([90, 20], heads=(2, 1), head_dim=32)
    for _, values in exact.dense_kv:
        values.mul_(scale)
    exact.kv_cache[:, 1] *= scale
    batch = exact.quantised(kind).with_queries(exact.q_THD.bfloat16())
    check(batch, num_programs=2)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN)")  # NumPy, in the interpreter
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_zero_queries_and_broken_ones(kind: torch.dtype) -> None:
    batch = coded_batch(kind, [40, 70, 20])
    batch.q_THD[0].zero_()
    batch.q_THD[1, 1, 3] = torch.nan
    batch.q_THD[1, 2, 3] = torch.inf
    actual = run(batch, PLAIN, make_plan(batch))
    assert actual[1, 1:3].isnan().all() and actual[1, ::3].isfinite().all()
    assert actual[0].isfinite().all() and actual[2].isfinite().all()
    batch.q_THD[1] = 1.0
    assert frobenius_error(actual[0], dense_oracle(batch)[0]) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("heads", [(32, 8), (32, 4), (16, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_on_the_gpu(heads: tuple[int, int], head_dim: int, kind: torch.dtype) -> None:
    lengths = [1, 16, 0, 4097, 17, 900, 2048, 8191]
    check(coded_batch(kind, lengths, heads=heads, head_dim=head_dim), num_programs=132)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", [I8, I4], ids=str)
def test_windows_on_the_gpu(page_size: int, kind: torch.dtype) -> None:
    batch = coded_batch(kind, [1, 900, 2048], page_size=page_size, heads=(8, 1))
    for window_left in (0, 100, 1000):
        check(batch, Variant(window_left=window_left))
        check(batch, Variant(window_left=window_left), split_tokens=256)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [I8, I4], ids=str)
def test_sums_do_not_drift_on_the_gpu(kind: torch.dtype) -> None:
    """One program sums 60,000 tokens whose weights are equal: what codes are offset by is large."""
    batch = coded_batch(kind, [60_000], heads=(8, 1), head_dim=128)
    batch.q_THD.zero_()
    error = lone_error(batch)
    print(f"relative error {error:.1e}")
    assert error <= 5e-3
