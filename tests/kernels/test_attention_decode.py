"""Decode attention against the dense definition, over ugly batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import (
    DECODE_VARIANTS,
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

from gpu_kernels import decode_merge
from gpu_kernels.attention_decode import (
    DecodePlan,
    attention_decode,
    attention_decode_reference,
    plan_decode,
)
from gpu_kernels.attention_variant import PLAIN, Variant
from gpu_kernels.kv_quant import INT4
from gpu_kernels.page_table import PageTable
from gpu_kernels.split_kv import QueryBlocks

RAGGED = [1, 0, 16, 17, 150, 0]
# codes, and how far from the numbers themselves attention over normal ones may be
CODES = {torch.int8: 0.012, torch.float8_e4m3fn: 0.05, INT4: 0.14}


def make_plan(
    batch: PagedBatch, *, num_programs: int = 7, split_tokens: int | None = None, queries: int = 1
) -> DecodePlan:
    return plan_decode(
        len(batch.kv_lens),
        batch.q_THD.shape[1],
        batch.kv_cache.shape[3],
        batch.q_THD.shape[2],
        device=DEVICE,
        dtype=batch.kv_cache.dtype,
        queries_per_unit=queries,
        split_tokens=split_tokens,
        max_kv_len=max(batch.kv_lens, default=0),
        num_programs=num_programs,
    )


def run(
    batch: PagedBatch,
    variant: Variant = PLAIN,
    *,
    plan: DecodePlan | None = None,
    sm_scale: float | None = None,
    out: torch.Tensor | None = None,
    lse_log2: torch.Tensor | None = None,
) -> torch.Tensor:
    return attention_decode(
        batch.q_THD,
        batch.kv_cache,
        batch.pages,
        make_plan(batch) if plan is None else plan,
        sm_scale=batch.sm_scale if sm_scale is None else sm_scale,
        variant=variant,
        kv_scales=batch.kv_scales,
        out=out,
        lse_log2=lse_log2,
    )


@pytest.fixture(params=[0, decode_merge.FEW_ROWS], ids=["rows together", "rows alone"])
def merged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are merged in both ways."""
    monkeypatch.setattr(decode_merge, "FEW_ROWS", request.param)


@pytest.mark.usefixtures("merged")
@pytest.mark.parametrize(
    ("heads", "num_programs"), [((2, 2), 3), ((7, 1), 1), ((8, 1), 5), ((4, 2), 64)], ids=str
)
def test_ragged_batch_equals_dense(heads: tuple[int, int], num_programs: int) -> None:
    batch = make_batch(RAGGED, heads=heads)
    plan = make_plan(batch, num_programs=num_programs)
    assert max_error(run(batch, plan=plan), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 192, 256])
def test_head_dims(head_dim: int) -> None:
    batch = make_batch([100, 3], head_dim=head_dim, heads=(2, 1))
    assert max_error(run(batch), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("window_left", [-1, 0, 20, 200])
def test_pages_and_windows(page_size: int, window_left: int) -> None:
    batch = make_batch([0, 64, 65, 270], page_size=page_size, heads=(2, 1))
    variant = Variant(window_left=window_left)
    expected = dense_oracle(batch, variant)
    for plan in (make_plan(batch), make_plan(batch, split_tokens=64)):
        assert max_error(run(batch, variant, plan=plan), expected) <= 1e-5


@pytest.mark.parametrize("name", DECODE_VARIANTS)
@pytest.mark.parametrize("split_tokens", [None, 64])
def test_variants_and_log_sum_exp(name: str, split_tokens: int | None) -> None:
    batch = make_batch(RAGGED)
    lse_TH = torch.full((len(RAGGED), 4), torch.nan, device=DEVICE)
    plan = make_plan(batch, split_tokens=split_tokens)
    actual = run(batch, DECODE_VARIANTS[name], plan=plan, lse_log2=lse_TH)
    expected, expected_lse_TH = dense_oracle_with_lse(batch, DECODE_VARIANTS[name])
    assert max_error(actual, expected) <= 1e-5
    assert max_error(lse_TH, expected_lse_TH) <= 1e-5


@settings(max_examples=6)
@given(st.lists(st.integers(0, 250), min_size=1, max_size=3), st.integers(0, 99))
def test_split_equals_unsplit(kv_lens: list[int], seed: int) -> None:
    batch = make_batch(kv_lens, heads=(2, 1), page_size=1, seed=seed)
    whole = run(batch, plan=make_plan(batch, num_programs=1))
    for plan in (make_plan(batch, num_programs=5), make_plan(batch, split_tokens=64)):
        assert max_error(run(batch, plan=plan), whole) <= 1e-6
    assert max_error(whole, dense_oracle(batch)) <= 1e-5


def test_a_fixed_split_is_batch_invariant() -> None:
    kv_lens = [300, 17, 200]
    together = make_batch(kv_lens)
    plan = make_plan(together, split_tokens=64)
    rows = run(together, plan=plan)
    for request, kv_len in enumerate(kv_lens):
        pages = together.pages
        begin, end = pages.indptr_B1[request : request + 2].tolist()
        alone = PagedBatch(
            together.q_THD[request : request + 1],
            together.kv_cache,
            PageTable(
                torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
                pages.indices[begin:end],
                pages.last_page_len_B[request : request + 1],
            ),
            together.qo_indptr_B1[:2],
            [kv_len],
            [],
        )
        row = run(alone, plan=make_plan(alone, split_tokens=64, num_programs=2))
        assert torch.equal(row[0], rows[request])


def test_a_plan_serves_any_lengths() -> None:
    plan = make_plan(make_batch([1, 1, 1]))
    for kv_lens in ([1, 300, 0], [0, 0, 0], [70, 70, 70]):
        batch = make_batch(kv_lens)
        assert max_error(run(batch, plan=plan), dense_oracle(batch)) <= 1e-5


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_quantised_cache(dtype: torch.dtype, head_dim: int) -> None:
    exact = make_batch([1, 17, 0, 90], head_dim=head_dim)
    batch = exact.quantised(dtype)
    variant = Variant(window_left=70)
    actual = run(batch, variant)
    assert max_error(actual, dense_oracle(batch, variant)) <= 1e-5
    bound = CODES[dtype]
    assert frobenius_error(actual, dense_oracle(exact, variant)) <= bound


def test_float16() -> None:
    batch = make_batch(RAGGED, heads=(4, 2), head_dim=32, dtype=torch.float16)
    assert frobenius_error(run(batch), dense_oracle(batch)) <= 1e-3


@pytest.mark.parametrize("num_programs", [1, 16])
def test_huge_logits_give_no_nan(num_programs: int) -> None:
    batch = make_batch([290, 1], heads=(2, 1))
    plan = make_plan(batch, num_programs=num_programs)
    batch.q_THD.mul_(100.0)
    scale = 250.0  # logits of about +-1e5: exp overflows unless the maximum is taken off first
    expected = dense_oracle(batch, sm_scale=scale)
    assert max_error(run(batch, plan=plan, sm_scale=scale), expected) <= 1e-4
    keys = batch.kv_cache[:, 0].nan_to_num_().abs_()
    batch.kv_cache[:, 0].copy_(keys)
    batch.q_THD.abs_().neg_()  # every logit far below 0: the running maximum is never near it
    assert torch.isfinite(run(batch, plan=plan, sm_scale=scale)).all()


@pytest.mark.parametrize("num_programs", [1, 20])
def test_poisoned_output_and_workspace_are_overwritten(num_programs: int) -> None:
    batch = make_batch(RAGGED)
    plan = make_plan(batch, num_programs=num_programs)
    plan.part_PKRD.fill_(torch.nan)
    plan.lse_log2_PKR.fill_(torch.nan)
    out = torch.full_like(batch.q_THD, torch.nan)
    assert run(batch, plan=plan, out=out) is out
    assert max_error(out, dense_oracle(batch)) <= 1e-5
    assert out[1].eq(0).all() and out[-1].eq(0).all()


def test_query_and_output_may_be_slices() -> None:
    batch = make_batch([40, 9], heads=(4, 2))
    fused = torch.zeros(2, 9, 16, device=DEVICE)
    fused[:, 2:6] = batch.q_THD
    out = torch.zeros(2, 8, 16, device=DEVICE)
    run(batch.with_queries(fused[:, 2:6]), out=out[:, 4:])
    assert max_error(out[:, 4:], dense_oracle(batch)) <= 1e-5 and out[:, :4].eq(0).all()


def test_no_requests() -> None:
    batch = make_batch([])
    assert run(batch).shape == (0, 4, 16)


def test_reference_equals_the_definition() -> None:
    batch = make_batch(RAGGED)
    for variant in (PLAIN, *DECODE_VARIANTS.values()):
        lse_TH = torch.empty(len(RAGGED), 4, device=DEVICE)
        actual = attention_decode_reference(
            batch.q_THD,
            batch.kv_cache,
            batch.pages,
            sm_scale=batch.sm_scale,
            variant=variant,
            lse_log2=lse_TH,
        )
        expected, expected_lse_TH = dense_oracle_with_lse(batch, variant)
        assert max_error(actual, expected) <= 1e-5
        assert max_error(lse_TH, expected_lse_TH) <= 1e-5


# --- blocks of queries ---


@pytest.mark.usefixtures("merged")
def test_blocks_of_queries_share_a_request() -> None:
    sizes = [5, 1, 0, 3]
    batch = make_batch([150, 40, 17, 0], sizes)
    blocks = QueryBlocks.of_groups(sizes, 2, DEVICE)
    assert blocks.num_units == 6
    plan = plan_decode(6, 4, 2, 16, device=DEVICE, dtype=torch.float32, queries_per_unit=2)
    lse_TH = torch.full((9, 4), torch.nan, device=DEVICE)
    arguments = (batch.q_THD, batch.kv_cache, batch.pages, plan)
    actual = attention_decode(*arguments, sm_scale=batch.sm_scale, blocks=blocks, lse_log2=lse_TH)
    expected, expected_lse_TH = dense_oracle_with_lse(batch, is_causal=False)
    assert max_error(actual, expected) <= 1e-5 and max_error(lse_TH, expected_lse_TH) <= 1e-5
    positions = [3, 149, 0, 16, 100, 20, 0, 0, 0]
    positions_T = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
    actual = attention_decode(
        *arguments, sm_scale=batch.sm_scale, blocks=blocks, positions_T=positions_T
    )
    expected, _ = dense_oracle_with_lse(batch, positions=positions)
    assert max_error(actual, expected) <= 1e-5


# --- arguments ---


def test_bad_arguments_are_refused_before_a_launch() -> None:
    batch = make_batch([20, 30])
    plan = make_plan(batch)
    with pytest.raises(AssertionError):
        run(batch.with_queries(batch.q_THD.double()))
    with pytest.raises(AssertionError):
        run(batch.with_queries(batch.q_THD.transpose(1, 2).contiguous().transpose(1, 2)))
    with pytest.raises(AssertionError):
        run(batch.with_queries(batch.q_THD[:1]), plan=plan)
    with pytest.raises(AssertionError):
        run(batch, plan=make_plan(make_batch([1])))
    with pytest.raises(AssertionError):
        run(batch, Variant(sinks_H=some_sinks(3)))
    with pytest.raises(AssertionError):
        run(batch, lse_log2=torch.empty(2, 4, dtype=torch.float64, device=DEVICE))
    with pytest.raises(AssertionError):
        Variant(logits_soft_cap=30.0, alibi_slopes_H=some_slopes(4))
    with pytest.raises(AssertionError):
        make_plan(batch, split_tokens=50)


# --- on the GPU ---

GPU_LENGTHS = [1, 16, 0, 4097, 17, 900, 2048, 8191]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (28, 4), (32, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_on_the_gpu(heads: tuple[int, int], head_dim: int) -> None:
    batch = make_batch(GPU_LENGTHS, heads=heads, head_dim=head_dim, dtype=torch.bfloat16)
    expected = dense_oracle(batch)
    for num_programs in (1, 132):
        plan = make_plan(batch, num_programs=num_programs)
        actual = run(batch, plan=plan)
        assert frobenius_error(actual, expected) <= 5e-3
        assert torch.equal(actual, run(batch, plan=plan))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 96, 128, 192, 256])
@pytest.mark.parametrize("window_left", [-1, 1000])
def test_float32_on_the_gpu(head_dim: int, window_left: int) -> None:
    batch = make_batch(GPU_LENGTHS, heads=(14, 2), head_dim=head_dim)
    variant = Variant(window_left=window_left)
    expected = dense_oracle(batch, variant)
    for num_programs in (1, 132):
        plan = make_plan(batch, num_programs=num_programs)
        assert max_error(run(batch, variant, plan=plan), expected) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 192, 256])
def test_half_dtypes_and_head_dims_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(GPU_LENGTHS, heads=(4, 1), head_dim=head_dim, dtype=dtype)
    assert frobenius_error(run(batch), dense_oracle(batch)) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_quantised_cache_on_the_gpu(head_dim: int, dtype: torch.dtype) -> None:
    batch = make_batch(GPU_LENGTHS, heads=(32, 4), head_dim=head_dim, dtype=torch.bfloat16)
    batch = batch.quantised(dtype)
    assert frobenius_error(run(batch), dense_oracle(batch)) <= 5e-3


@pytest.mark.usefixtures("merged")
@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODE_VARIANTS)
def test_variants_on_the_gpu(name: str) -> None:
    batch = make_batch(GPU_LENGTHS, head_dim=128, dtype=torch.bfloat16)
    variant = DECODE_VARIANTS[name]
    for split_tokens in (None, 1024):
        plan = make_plan(batch, split_tokens=split_tokens)
        actual = run(batch, variant, plan=plan)
        assert frobenius_error(actual, dense_oracle(batch, variant)) <= 5e-3


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths() -> None:
    batch = make_batch([4000, 17, 1200], dtype=torch.bfloat16, head_dim=64)
    plan = make_plan(batch, num_programs=66)
    out = torch.empty_like(batch.q_THD)
    run(batch, plan=plan, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(batch, plan=plan, out=out)
    shorter = batch.pages.indptr_B1.clone()
    shorter[1:] -= 100  # the first request loses its last 100 pages, the others keep theirs
    entries = batch.pages.indices.clone()
    first_end = int(batch.pages.indptr_B1[1])
    batch.pages.indices[first_end - 100 : -100] = entries[first_end:]
    batch.pages.indptr_B1.copy_(shorter)
    graph.replay()
    expected = attention_decode_reference(
        batch.q_THD, batch.kv_cache, batch.pages, sm_scale=batch.sm_scale
    )
    assert frobenius_error(out, expected) <= 5e-3
