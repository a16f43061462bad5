"""A few tokens times a dense matrix, against float64."""

import pytest
import torch
from paged_batch import DEVICE
from torch import Tensor

from gpu_kernels.few_rows import MAX_TOKENS, few_rows_linear, few_rows_reference, fits_few_rows

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # interpreted bf16 is cut, not rounded
SHAPES = [(64, 96), (100, 40), (33, 300), (16, 1000), (3, 8192)]  # rows, depth
# qkv and o of Qwen3-30B-A3B, Mixtral, OLMoE, gpt-oss-20b
LARGE = [(5120, 2048), (2048, 4096), (6144, 4096), (4096, 4096), (6144, 2048), (5120, 2880)]


def make(
    tokens: int, rows: int, depth: int, dtype: torch.dtype, *, has_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    rng = torch.Generator().manual_seed(rows + depth)
    x_TK = torch.randn(tokens, depth, generator=rng)
    w_NK = torch.randn(rows, depth, generator=rng) / depth**0.5
    bias_N = torch.randn(rows, generator=rng) if has_bias else None
    return tuple(None if t is None else t.to(DEVICE, dtype) for t in (x_TK, w_NK, bias_N))  # type: ignore[return-value]


def check(found: Tensor, parts: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Float32 sums, rounded once."""
    wanted = few_rows_reference(*parts)
    eps = torch.finfo(found.dtype).eps
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert torch.allclose(found.double(), wanted.double(), eps, 2e-6)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "depth"), SHAPES)
def test_equals_float64(rows: int, depth: int, has_bias: bool) -> None:
    for dtype in (torch.float32, HALF):
        for tokens in range(1, MAX_TOKENS + 1):
            parts = make(tokens, rows, depth, dtype, has_bias=has_bias)
            check(few_rows_linear(*parts), parts)


@pytest.mark.parametrize("tokens", range(MAX_TOKENS + 1))
def test_a_token_s_sums_are_its_own(tokens: int) -> None:
    x_TK, w_NK, bias_N = make(MAX_TOKENS, 70, 200, torch.float32)
    all_TN = few_rows_linear(x_TK, w_NK, bias_N)
    strided_TK = torch.cat([x_TK, x_TK], dim=1)[:tokens, :200]
    assert torch.equal(few_rows_linear(strided_TK, w_NK, bias_N), all_TN[:tokens])


def test_what_it_is_for() -> None:
    x_TK = torch.zeros(MAX_TOKENS, 8192, dtype=torch.bfloat16)
    assert fits_few_rows(x_TK)
    for other_TK in (torch.cat([x_TK, x_TK]), torch.cat([x_TK, x_TK], dim=1), x_TK.float()):
        assert not fits_few_rows(other_TK)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", range(1, MAX_TOKENS + 1))
@pytest.mark.parametrize(("rows", "depth"), LARGE)
def test_models_matrices_on_the_gpu(rows: int, depth: int, tokens: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        parts = make(tokens, rows, depth, dtype)
        found_TN = few_rows_linear(*parts)
        check(found_TN, parts)
        assert torch.equal(few_rows_linear(parts[0][-1:], *parts[1:]), found_TN[-1:])


@pytest.mark.gpu
def test_a_chain_in_a_graph_gives_the_same_bits() -> None:
    """Each reads what the one before has written, and starts before that one is done."""
    x_TK, w_NK, _ = make(2, 2048, 2048, HALF, has_bias=False)

    def chain() -> Tensor:
        y_TK = x_TK
        for _ in range(50):
            y_TK = few_rows_linear(y_TK, w_NK)
        return y_TK

    wanted_TK = x_TK
    for _ in range(50):
        wanted_TK = few_rows_linear(wanted_TK, w_NK)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found_TK = chain()
    for _ in range(20):
        found_TK.zero_()
        graph.replay()
        assert torch.equal(found_TK, wanted_TK)
        assert torch.equal(chain(), wanted_TK)
