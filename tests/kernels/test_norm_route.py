"""Add, norm, router and choice in one launch, against the launches that do one of them each."""

import pytest
import torch
from paged_batch import DEVICE, max_error
from torch import Tensor

from fiddler.models.torch_kernels import TorchKernels
from fiddler.models.triton_kernels import TritonKernels
from gpu_kernels.norm_route import (
    MAX_TOKENS,
    RouteWorkspace,
    norm_route,
    norm_route_reference,
)
from gpu_kernels.rmsnorm import add_rms_norm
from gpu_kernels.router import route

EPS = 1e-6
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # interpreted bf16 is cut, not rounded
# Qwen3-30B-A3B, Mixtral, Qwen2-MoE, OLMoE; then what divides nothing
SHAPES = [(1, 2048, 128, 8), (2, 4096, 8, 2), (1, 3584, 64, 8), (8, 2048, 64, 8), (3, 100, 60, 4)]
SHAPES += [(2, 64, 512, 10), (1, 8192, 5, 5), (4, 40, 1, 1)]


def make(
    num_tokens: int, hidden: int, num_experts: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, the residual, the norm's weights and the router."""
    rng = torch.Generator().manual_seed(hidden + num_experts)
    x_TH, residual_TH = torch.randn(2, num_tokens, hidden, generator=rng) * 2
    norm_H = 1 + 0.3 * torch.randn(hidden, generator=rng)
    router_EH = torch.randn(num_experts, hidden, generator=rng) * 2 / hidden**0.5
    return tuple(t.to(DEVICE, dtype) for t in (x_TH, residual_TH, norm_H, router_EH))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("num_tokens", "hidden", "num_experts", "top_k"), SHAPES)
def test_equals_the_reference(
    num_tokens: int, hidden: int, num_experts: int, top_k: int, renormalise: bool
) -> None:
    parts = make(num_tokens, hidden, num_experts)
    found = norm_route(*parts, top_k, EPS, renormalise=renormalise)
    wanted = norm_route_reference(*parts, top_k, EPS, renormalise=renormalise)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2].long(), wanted[2])
    assert max_error(found[0], wanted[0]) <= 1e-5 and max_error(found[3], wanted[3]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("num_tokens", "hidden", "num_experts", "top_k"), SHAPES)
def test_equals_one_after_the_other(
    num_tokens: int, hidden: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    """To the bit, but for the order in which a logit is summed up."""
    x_TH, residual_TH, norm_H, router_EH = make(num_tokens, hidden, num_experts, dtype)
    workspace = RouteWorkspace.make(MAX_TOKENS, num_experts, dtype, DEVICE)
    workspace.logits_TE.fill_(torch.nan)
    normed, summed, ids, weights = norm_route(
        x_TH, residual_TH, norm_H, router_EH, top_k, EPS, workspace=workspace
    )
    logits_TE = workspace.logits_TE[:num_tokens]
    wanted_normed, wanted_sum = add_rms_norm(x_TH, residual_TH, norm_H, EPS)
    assert torch.equal(summed, wanted_sum)
    assert torch.allclose(normed, wanted_normed, torch.finfo(dtype).eps, 0)
    wanted_TE = normed.double() @ router_EH.double().T
    assert torch.allclose(logits_TE.double(), wanted_TE, 2 * torch.finfo(dtype).eps, 1e-5)
    wanted_ids, wanted_weights = route(logits_TE, top_k)
    # two compilations of one function: a GPU's may round a last bit elsewhere
    assert torch.equal(ids, wanted_ids) and torch.allclose(weights, wanted_weights, 1e-6, 0)
    assert workspace.done_T.eq(0).all() and workspace.logits_TE[num_tokens:].isnan().all()


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("num_tokens", [1, MAX_TOKENS, MAX_TOKENS + 1])
def test_the_decoders_kernels_agree(num_tokens: int, renormalise: bool) -> None:
    """Few tokens take one launch, for which the workspace is; more take one after the other."""
    parts = make(num_tokens, 100, 60)
    none = torch.empty(0, device=DEVICE)
    first = TritonKernels(none, none, 1.0, eps=EPS, num_experts=60, dtype=torch.float32)
    kernels = first.copy()
    for workspace in (first._route_workspace, kernels._route_workspace):
        workspace.logits_TE.fill_(torch.nan)
    found = kernels.norm_route(*parts, 4, renormalise=renormalise)
    wanted = TorchKernels(none, none, 1.0, eps=EPS).norm_route(*parts, 4, renormalise=renormalise)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2].long(), wanted[2])
    assert max_error(found[0], wanted[0]) <= 1e-5 and max_error(found[3], wanted[3]) <= 1e-5
    assert kernels._route_workspace.logits_TE.isnan().all() == (num_tokens > MAX_TOKENS)
    assert first._route_workspace.logits_TE.isnan().all()


def test_rows_may_be_strided_and_there_may_be_none() -> None:
    x_TH, residual_TH, norm_H, router_EH = make(4, 48, 16)
    fused = torch.full((2, 4, 100), torch.nan, device=DEVICE)
    fused[:, :, 10:58] = torch.stack([x_TH, residual_TH])
    strided = norm_route(*fused[:, :, 10:58], norm_H, router_EH, 4, EPS)
    for actual, wanted in zip(
        strided, norm_route(x_TH, residual_TH, norm_H, router_EH, 4, EPS), strict=True
    ):
        assert torch.equal(actual, wanted)
    none = norm_route(x_TH[:0], residual_TH[:0], norm_H, router_EH, 4, EPS)
    assert [tuple(part.shape) for part in none] == [(0, 48), (0, 48), (0, 4), (0, 4)]


def test_nan_gives_ids_in_range() -> None:
    x_TH, residual_TH, norm_H, router_EH = make(2, 64, 20)
    x_TH[0, 5] = torch.nan
    _, _, ids, weights = norm_route(x_TH, residual_TH, norm_H, router_EH, 5, EPS)
    assert weights[0].isnan().all() and weights[1].isfinite().all()
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 20 for row in ids.tolist())


def test_bad_arguments() -> None:
    x_TH, residual_TH, norm_H, router_EH = make(2, 64, 20)
    good = {"x": x_TH, "residual": residual_TH, "norm": norm_H, "router": router_EH}
    many = x_TH.new_zeros(MAX_TOKENS + 1, 64)
    for bad in (
        {"x": x_TH.half()},
        {"residual": residual_TH[:1]},
        {"x": many, "residual": many},
        {"norm": norm_H[:-1]},
        {"router": router_EH[:, :32]},
        {"router": router_EH[:3]},
        {"router": router_EH.half()},
    ):
        with pytest.raises(AssertionError):
            norm_route(*(good | bad).values(), 4, EPS)
    small = RouteWorkspace.make(1, 20, torch.float32, DEVICE)
    with pytest.raises(AssertionError):
        norm_route(*good.values(), 4, EPS, workspace=small)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, MAX_TOKENS])
@pytest.mark.parametrize(("hidden", "num_experts", "top_k"), [shape[1:] for shape in SHAPES])
def test_half_precision_on_the_gpu(
    hidden: int, num_experts: int, top_k: int, num_tokens: int
) -> None:
    """Other experts than the best are chosen only where rounded logits cannot tell."""
    parts = make(num_tokens, hidden, num_experts, HALF)
    normed, summed, ids, weights = norm_route(*parts, top_k, EPS)
    wanted_normed, wanted_sum, _, _ = norm_route_reference(*parts, top_k, EPS)
    eps = torch.finfo(HALF).eps
    assert torch.equal(summed, wanted_sum)
    assert torch.allclose(normed.float(), wanted_normed.float(), eps, 0)
    logits_TE = normed.double() @ parts[3].double().T
    apart_T1 = eps * logits_TE.abs().amax(1, keepdim=True) + 1e-5  # two of them, half of eps each
    chosen_TK = logits_TE.gather(1, ids.long())
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert ((chosen_TK - logits_TE.topk(top_k).values).abs() <= apart_T1).all()
    wanted_weights = chosen_TK.softmax(1)
    assert ((weights - wanted_weights).abs() <= apart_T1.expm1() * wanted_weights + 1e-6).all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_graph_chooses_anew_at_every_replay(num_tokens: int) -> None:
    x_TH, residual_TH, norm_H, router_EH = make(num_tokens, 2048, 128, HALF)
    workspace = RouteWorkspace.make(num_tokens, 128, HALF, DEVICE)
    options = (x_TH, residual_TH, norm_H, router_EH, 8, EPS)
    norm_route(*options, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            _, summed, ids, weights = norm_route(*options, workspace=workspace)
    for seed in range(50):
        x_TH.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
        graph.replay()
        wanted_ids, wanted_weights = route(workspace.logits_TE, 8)
        assert torch.equal(summed, x_TH + residual_TH)
        assert torch.equal(ids, wanted_ids)
        # another compilation of the same sums
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=0)
        assert workspace.done_T.eq(0).all()
