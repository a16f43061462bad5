"""RoPE, per-head norm and the cache write against transformers' own functions."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import DEVICE, frobenius_error, max_error
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from gpu_kernels.kv_append import rope_and_append, rope_and_append_reference
from gpu_kernels.kv_quant import INT4, dequantise_kv, new_kv_scales, quantise_kv, stored_size

EPS = 1e-6
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Case:
    """A fused projection with shuffled slots and scattered positions."""

    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    cos_SR: Tensor
    sin_SR: Tensor
    positions_T: Tensor
    slots_T: Tensor
    kv_cache: Tensor
    norms: tuple[Tensor, Tensor] | tuple[()]

    def run(self, out: Tensor | None = None) -> Tensor:
        return rope_and_append(
            self.q_THD,
            self.k_TKD,
            self.v_TKD,
            self.cos_SR,
            self.sin_SR,
            self.positions_T,
            self.slots_T,
            self.kv_cache,
            *self.norms,
            eps=EPS,
            out=out,
        )


def make_case(
    num_tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    *,
    normed: bool,
    dtype: torch.dtype = torch.float32,
) -> Case:
    rng = torch.Generator().manual_seed(num_tokens + head_dim)
    num_heads, num_kv_heads = heads
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=rng)
    q_THD, k_TKD, v_TKD = (
        (2 * fused).to(DEVICE, dtype).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    )
    frequencies_R = 10_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angles_SR = (torch.arange(500)[:, None] * frequencies_R).to(DEVICE)
    num_pages = -(-num_tokens // PAGE_SIZE) + 2
    slots_T = torch.randperm(num_pages * PAGE_SIZE, generator=rng)[:num_tokens]
    norms_2D = 1 + 0.3 * torch.randn(2, head_dim, generator=rng)
    poison = float("nan")
    return Case(
        q_THD,
        k_TKD,
        v_TKD,
        angles_SR.cos(),
        angles_SR.sin(),
        torch.randint(0, 500, (num_tokens,), generator=rng).to(DEVICE),
        slots_T.to(DEVICE),
        torch.full(
            (num_pages, 2, PAGE_SIZE, num_kv_heads, head_dim), poison, dtype=dtype, device=DEVICE
        ),
        tuple(norms_2D.to(DEVICE, dtype)) if normed else (),
    )


def transformers_qk(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rotated q and k as a transformers model with these weights computes them in ``dtype``."""
    heads = [case.q_THD.to(dtype), case.k_TKD.to(dtype)]
    for i, weight_D in enumerate(case.norms):
        norm = Qwen3RMSNorm(weight_D.shape[0], eps=EPS).to(DEVICE, dtype)
        norm.weight.data.copy_(weight_D)
        heads[i] = norm(heads[i]).detach()
    cos_TD, sin_TD = (
        torch.cat([table, table], -1)[case.positions_T].to(dtype)
        for table in (case.cos_SR, case.sin_SR)
    )
    q_HTD, k_KTD = apply_rotary_pos_emb(
        *(x.transpose(0, 1) for x in heads), cos_TD, sin_TD, unsqueeze_dim=0
    )
    return q_HTD.transpose(0, 1), k_KTD.transpose(0, 1)


def read_slots(case: Case) -> tuple[Tensor, Tensor]:
    rows = case.kv_cache.transpose(1, 2).flatten(0, 1)[case.slots_T]  # [T, 2, K, D]
    return rows[:, 0], rows[:, 1]


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 19])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((4, 4), 16), ((7, 1), 32), ((6, 3), 24), ((4, 2), 128)], ids=str
)
def test_equals_transformers(
    heads: tuple[int, int], head_dim: int, num_tokens: int, normed: bool
) -> None:
    case = make_case(num_tokens, heads, head_dim, normed=normed)
    q_THD, k_TKD = transformers_qk(case, torch.float32)
    untouched = torch.ones(case.kv_cache.shape[0] * PAGE_SIZE, dtype=torch.bool)
    untouched[case.slots_T.cpu()] = False
    result = case.run()
    assert result is case.q_THD
    if num_tokens:
        cached_k_TKD, cached_v_TKD = read_slots(case)
        assert max_error(result, q_THD) <= 1e-5 and max_error(cached_k_TKD, k_TKD) <= 1e-5
        assert torch.equal(cached_v_TKD, case.v_TKD)
    others = case.kv_cache.transpose(1, 2).flatten(0, 1)[untouched.to(DEVICE)]
    assert others.isnan().all(), "only the given slots are written"


def test_out_leaves_q_alone() -> None:
    case = make_case(5, (4, 2), 16, normed=True)
    before = case.q_THD.clone()
    expected, _ = transformers_qk(case, torch.float32)
    out = torch.full((5, 4, 16), float("nan"), device=DEVICE)
    assert case.run(out) is out
    assert torch.equal(case.q_THD, before) and max_error(out, expected) <= 1e-5


@pytest.mark.parametrize("normed", [False, True])
def test_reference_equals_transformers(normed: bool) -> None:
    case = make_case(19, (4, 2), 16, normed=normed)
    q_THD, k_TKD = transformers_qk(case, torch.float32)
    actual = rope_and_append_reference(
        case.q_THD,
        case.k_TKD,
        case.v_TKD,
        case.cos_SR,
        case.sin_SR,
        case.positions_T,
        case.slots_T,
        case.kv_cache,
        *case.norms,
        eps=EPS,
    )
    cached_k_TKD, cached_v_TKD = read_slots(case)
    assert max_error(actual, q_THD) <= 1e-5 and max_error(cached_k_TKD, k_TKD) <= 1e-5
    assert torch.equal(cached_v_TKD, case.v_TKD)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_token_without_a_slot_is_rotated_and_not_written(dtype: torch.dtype) -> None:
    case = make_case(5, (4, 2), 32, normed=True)
    expected_cache = case.kv_cache.clone()
    slots_T = case.slots_T.to(dtype)
    slots_T[[0, 3]] = -1
    some = replace(case, slots_T=slots_T, positions_T=case.positions_T.to(dtype))
    tables = (case.cos_SR, case.sin_SR, some.positions_T, slots_T)
    expected = rope_and_append_reference(
        case.q_THD, case.k_TKD, case.v_TKD, *tables, expected_cache, *case.norms, EPS
    )
    assert max_error(some.run(torch.empty_like(case.q_THD)), expected) <= 1e-5
    assert torch.equal(case.kv_cache.isnan(), expected_cache.isnan())
    assert torch.allclose(case.kv_cache, expected_cache, atol=1e-5, equal_nan=True)


def check_half_error(case: Case) -> None:
    """One rounding: no further from float32 than transformers in the same dtype."""
    exact = transformers_qk(case, torch.float32)
    theirs = transformers_qk(case, case.q_THD.dtype)
    ours = (case.run(torch.empty_like(case.q_THD)), read_slots(case)[0])
    for x, theirs_x, exact_x in zip(ours, theirs, exact, strict=True):
        assert frobenius_error(x, exact_x) <= frobenius_error(theirs_x, exact_x)


def quantised(case: Case, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """The case with a cache of codes, and its scales: NaN where nothing is written."""
    *most, head_dim = case.kv_cache.shape
    kv_cache = torch.zeros(*most, stored_size(head_dim, dtype), dtype=dtype, device=DEVICE)
    return replace(case, kv_cache=kv_cache), new_kv_scales(kv_cache).fill_(torch.nan)


def check_quantised(case: Case, dtype: torch.dtype) -> None:
    """Codes and scales are those of the reference but for what rounds to another side.

    Four bits are compared as numbers: a scale on the other side of a bfloat16 brings other codes.
    """
    ours, scales = quantised(case, dtype)
    theirs, expected_scales = quantised(case, dtype)
    arguments = (case.positions_T, case.slots_T)
    tables = (case.cos_SR, case.sin_SR)
    qkv = (case.q_THD.clone(), case.k_TKD, case.v_TKD)
    rope_and_append(*qkv, *tables, *arguments, ours.kv_cache, *case.norms, EPS, kv_scales=scales)
    rope_and_append_reference(
        *qkv, *tables, *arguments, theirs.kv_cache, *case.norms, EPS, kv_scales=expected_scales
    )
    written = ~expected_scales.isnan()
    assert torch.equal(written, ~scales.isnan()) and written.any()
    if dtype == INT4:
        check_int4(ours, scales, dequantise_kv(theirs.kv_cache, expected_scales.transpose(2, 3)))
        return
    assert torch.allclose(scales[written], expected_scales[written], rtol=1e-5)
    codes, expected_codes = ours.kv_cache.float(), theirs.kv_cache.float()
    differs = codes != expected_codes
    assert differs.float().mean() < 2e-3
    step = 1 if dtype == torch.int8 else 0.125 * expected_codes.abs().clamp(min=2.0**-6)
    assert ((codes - expected_codes).abs() <= step).all()


def check_int4(case: Case, scales: Tensor, expected: Tensor) -> None:
    """Nearly all numbers are as expected, the others a step off; values within half a step."""
    pairs = scales.transpose(2, 3)  # [pages, 2, page_size, K, 2]
    found = dequantise_kv(case.kv_cache, pairs)
    step = pairs[..., 1:].float()
    is_written = ~step.isnan().expand(found.shape)
    error = ((found - expected).abs() / step)[is_written]
    differs = error > 1e-2
    print(f"{differs.float().mean():.1e} differ, by {error.max():.3f} steps at most")
    assert differs.float().mean() < 5e-3 and (error < 1.1).all()
    page_T, offset_T = case.slots_T // PAGE_SIZE, case.slots_T % PAGE_SIZE
    off = (found[page_T, 1, offset_T] - case.v_TKD.float()).abs()
    assert (off <= 0.50001 * step[page_T, 1, offset_T] + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.int8, INT4], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((7, 1), 32), ((6, 3), 24), ((8, 1), 96)], ids=str)
def test_caches_of_codes(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Not fp8: the interpreter rounds 7.9 to 4 there, its carry never reaches the exponent."""
    check_quantised(make_case(19, heads, head_dim, normed=True), dtype)


@given(
    offset=st.floats(-100, 100),
    spread=st.floats(1e-6, 1e6),
    head_dim=st.sampled_from([4, 24, 64, 96, 128]),
    seed=st.integers(0, 99),
)
def test_four_bits_are_within_half_a_step(
    offset: float, spread: float, head_dim: int, seed: int
) -> None:
    """And the step is that of the range, but for how zero and scale are rounded."""
    rng = torch.Generator().manual_seed(seed)
    x_TKD = offset + spread * torch.randn(5, 3, head_dim, generator=rng)
    codes, pairs = quantise_kv(x_TKD, INT4)
    assert codes.shape == (5, 3, head_dim // 2) and pairs.dtype == torch.bfloat16
    zero_TK, step_TK = pairs.float().unbind(-1)
    error_TK = (dequantise_kv(codes, pairs) - x_TKD).abs().amax(-1)
    least_TK, most_TK = x_TKD.aminmax(dim=-1)
    rounding_TK = 1e-6 * x_TKD.abs().amax(-1)
    assert (error_TK <= step_TK / 2 * 1.00001 + rounding_TK).all()
    wanted_TK = (most_TK - least_TK) / 15 + zero_TK.abs() * 2**-8 / 7
    assert (step_TK <= wanted_TK * (1 + 2**-7) + rounding_TK).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf * 0, interpreted
@pytest.mark.parametrize("dtype", [torch.int8, INT4], ids=str)
def test_codes_of_zeros_and_of_nan(dtype: torch.dtype) -> None:
    case = make_case(3, (2, 1), 16, normed=False)
    case.v_TKD[0] = 0.0
    case.v_TKD[1, 0, 3] = torch.nan
    case.v_TKD[2, 0, 12] = torch.inf
    ours, scales = quantised(case, dtype)
    tables = (case.cos_SR, case.sin_SR, case.positions_T, case.slots_T)
    rope_and_append(case.q_THD, case.k_TKD, case.v_TKD, *tables, ours.kv_cache, kv_scales=scales)
    page_T, offset_T = case.slots_T // PAGE_SIZE, case.slots_T % PAGE_SIZE
    found = scales[page_T, 1, 0, offset_T]
    zero, nan, infinite = found[:, 1] if dtype == INT4 else found
    assert zero == 0 and nan.isnan() and not infinite.isfinite()
    assert ours.kv_cache[page_T[0], 1, offset_T[0]].eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, INT4], ids=str)
def test_caches_of_codes_on_the_gpu(dtype: torch.dtype) -> None:
    check_quantised(make_case(777, (32, 4), 128, normed=True, dtype=torch.bfloat16), dtype)


@pytest.mark.parametrize("normed", [False, True])
def test_float16_rounds_once(normed: bool) -> None:
    check_half_error(make_case(19, (4, 2), 32, normed=normed, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("heads", [(32, 4), (28, 4), (64, 8)], ids=str)
def test_half_dtypes_on_the_gpu(dtype: torch.dtype, normed: bool, heads: tuple[int, int]) -> None:
    check_half_error(make_case(777, heads, 128, normed=normed, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim", [16, 96, 128, 256])
def test_float32_on_the_gpu(head_dim: int, normed: bool) -> None:
    case = make_case(777, (14, 2), head_dim, normed=normed)
    q_THD, k_TKD = transformers_qk(case, torch.float32)
    assert max_error(case.run(), q_THD) <= 2e-5
    assert max_error(read_slots(case)[0], k_TKD) <= 2e-5
