"""Routing against the decoder's own, transformers' DeepSeek routers and a stable sort."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE, max_error
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from fiddler.models.torch_kernels import TorchKernels
from gpu_kernels.router import route, route_reference

CLOSE = 1e-6


def make_logits(
    num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Distinct logits in every row, so that nothing is tied."""
    rng = torch.Generator().manual_seed(seed)
    steps = torch.stack([torch.randperm(num_experts, generator=rng) for _ in range(num_tokens)])
    return (steps / 32 - 2).to(DEVICE, dtype)  # exact in bfloat16 up to 256 experts


def make_bias(num_experts: int) -> Tensor:
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(9)).to(DEVICE)


def check_equal(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert actual[0].dtype == torch.int32 and actual[1].dtype == torch.float32
    assert torch.equal(actual[0].long(), expected[0])
    assert max_error(actual[1], expected[1]) <= CLOSE


@pytest.mark.parametrize("norm_topk", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (64, 8), (128, 8), (512, 10)])
def test_equals_the_decoder(num_experts: int, top_k: int, norm_topk: bool) -> None:
    logits_TE = make_logits(3, num_experts)
    none = torch.empty(0)
    expected = TorchKernels(none, none, 1.0, eps=0.0).route(logits_TE, top_k, norm_topk)
    check_equal(route(logits_TE, top_k, renormalise=norm_topk), expected)


def test_float16() -> None:
    logits_TE = make_logits(3, 60, torch.float16)
    check_equal(route(logits_TE, 4), route_reference(logits_TE, 4))


def transformers_route(router: torch.nn.Module, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """What a transformers router chooses from these logits, likeliest first."""
    num_experts = logits_TE.shape[1]
    router.weight.data = torch.eye(num_experts)
    _, weights_TK, ids_TK = router(logits_TE.cpu())
    return ids_TK.detach().to(DEVICE), weights_TK.detach().to(DEVICE)


def sort_by_id(ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    order_TK = ids_TK.argsort()
    return ids_TK.gather(1, order_TK), weights_TK.gather(1, order_TK)


@pytest.mark.parametrize(("num_experts", "groups", "top_groups"), [(160, 8, 3), (64, 1, 1)])
def test_equals_deepseek_v2(num_experts: int, groups: int, top_groups: int) -> None:
    config = SimpleNamespace(
        num_experts_per_tok=6,
        num_experts=num_experts,
        hidden_size=num_experts,
        routed_scaling_factor=16.0,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        n_group=groups,
        topk_group=top_groups,
    )
    logits_TE = make_logits(5, num_experts)
    limits: Any = {"num_groups": groups, "top_groups": top_groups}
    actual = route(logits_TE, 6, renormalise=False, scale=16.0, **limits)
    expected = transformers_route(DeepseekV2TopkRouter(config), logits_TE)
    ids_TK, weights_TK = sort_by_id(actual[0].long(), actual[1])
    check_equal((ids_TK.int(), weights_TK), sort_by_id(*expected))
    check_equal(actual, route_reference(logits_TE, 6, renormalise=False, scale=16.0, **limits))


@pytest.mark.parametrize("norm_topk", [False, True])
@pytest.mark.parametrize(("num_experts", "groups", "top_groups"), [(256, 8, 4), (24, 3, 2)])
def test_equals_deepseek_v3(
    num_experts: int, groups: int, top_groups: int, norm_topk: bool
) -> None:
    config = SimpleNamespace(
        num_experts_per_tok=8,
        num_local_experts=num_experts,
        hidden_size=num_experts,
        routed_scaling_factor=2.5,
        n_group=groups,
        topk_group=top_groups,
        norm_topk_prob=norm_topk,
    )
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias = make_bias(num_experts).cpu()
    logits_TE = make_logits(5, num_experts)
    arguments: Any = {
        "scoring": "sigmoid",
        "bias_E": make_bias(num_experts),
        "renormalise": norm_topk,
        "scale": 2.5,
        "num_groups": groups,
        "top_groups": top_groups,
    }
    actual = route(logits_TE, 8, **arguments)
    ids_TK, weights_TK = sort_by_id(actual[0].long(), actual[1])
    check_equal((ids_TK.int(), weights_TK), sort_by_id(*transformers_route(router, logits_TE)))
    check_equal(actual, route_reference(logits_TE, 8, **arguments))


@settings(max_examples=15)
@given(st.data())
def test_any_setting_equals_the_reference(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 6))
    group_size = data.draw(st.integers(2, 40))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(16, top_groups * group_size)))
    num_experts = groups * group_size
    has_bias = data.draw(st.booleans())
    arguments: Any = {
        "scoring": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "bias_E": make_bias(num_experts) if has_bias else None,
        "renormalise": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
        "num_groups": groups,
        "top_groups": top_groups,
    }
    logits_TE = make_logits(2, num_experts, seed=data.draw(st.integers(0, 99)))
    check_equal(
        route(logits_TE, top_k, **arguments), route_reference(logits_TE, top_k, **arguments)
    )


def test_equal_scores_go_to_the_lower_id() -> None:
    logits_TE = torch.zeros(2, 24, device=DEVICE)
    logits_TE[1, 10] = 1.0
    assert route(logits_TE, 4)[0].tolist() == [[0, 1, 2, 3], [10, 0, 1, 2]]
    grouped, _ = route(logits_TE, 4, num_groups=4, top_groups=2)
    assert grouped.tolist() == [[0, 1, 2, 3], [10, 0, 1, 2]]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_gives_nan_weights_and_ids_in_range(scoring: Any, groups: int) -> None:
    logits_TE = make_logits(3, 20)
    logits_TE[1, 7] = float("nan")
    logits_TE[2] = float("nan")
    ids_TK, weights_TK = route(
        logits_TE, 5, scoring=scoring, num_groups=groups, top_groups=max(groups // 2, 1)
    )
    assert weights_TK[1:].isnan().all() and weights_TK[0].isfinite().all()
    for row in ids_TK.tolist():
        assert len(set(row)) == 5 and all(0 <= i < 20 for i in row)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_large_logits(scoring: Any) -> None:
    logits_TE = make_logits(2, 12) * 1e5 - 1e5
    check_equal(
        route(logits_TE, 3, scoring=scoring), route_reference(logits_TE, 3, scoring=scoring)
    )
    vanished, weights_TK = route(logits_TE - 1e6, 3, scoring="sigmoid")
    assert weights_TK.eq(0).all() and vanished.tolist() == [[0, 1, 2]] * 2


def test_outputs_and_copies_are_overwritten_and_rows_may_be_strided() -> None:
    logits_TE = make_logits(3, 16)
    fused = torch.full((3, 50), float("nan"), device=DEVICE)
    fused[:, 20:36] = logits_TE
    out, copy = (
        (
            torch.full((3, 5), -9, dtype=torch.int32, device=DEVICE),
            torch.full((3, 5), float("nan"), device=DEVICE),
        )
        for _ in range(2)
    )
    assert route(fused[:, 20:36], 5, out=out, copy_to=copy) is out
    expected = route_reference(logits_TE, 5)
    check_equal(out, expected)
    check_equal(copy, expected)
    again = route(logits_TE, 5)
    assert all(torch.equal(one, other) for one, other in zip(out, again, strict=True))


def test_no_tokens() -> None:
    ids_TK, weights_TK = route(make_logits(1, 8)[:0], 2)
    assert ids_TK.shape == weights_TK.shape == (0, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"top_k": 9},
        {"top_k": 0},
        {"scoring": "tanh"},
        {"num_groups": 3},
        {"num_groups": 4, "top_groups": 5},
        {"num_groups": 4, "top_groups": 1, "top_k": 3},
        {"num_groups": 8, "top_groups": 2, "bias_E": torch.zeros(8, device=DEVICE)},
        {"bias_E": torch.zeros(7, device=DEVICE)},
        {"bias_E": torch.zeros(8, device=DEVICE, dtype=torch.float16)},
        {"out": (torch.zeros(2, 2, device=DEVICE), torch.zeros(2, 2, device=DEVICE))},
    ],
    ids=str,
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        route(**({"logits_TE": make_logits(2, 8), "top_k": 2} | bad))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 4), (64, 8), (128, 8), (256, 8)])
def test_on_the_gpu(num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits_TE = make_logits(777, num_experts, dtype)
    check_equal(route(logits_TE, top_k), route_reference(logits_TE, top_k))


@pytest.mark.gpu
def test_deepseek_v3_and_a_pinned_copy_on_the_gpu() -> None:
    logits_TE = make_logits(777, 256, torch.bfloat16)
    arguments: Any = {
        "scoring": "sigmoid",
        "bias_E": make_bias(256),
        "scale": 2.5,
        "num_groups": 8,
        "top_groups": 4,
    }
    pinned = (
        torch.empty(777, 8, dtype=torch.int32, pin_memory=True),
        torch.empty(777, 8, pin_memory=True),
    )
    actual = route(logits_TE, 8, copy_to=pinned, **arguments)
    check_equal(actual, route_reference(logits_TE, 8, **arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(a.cpu(), p) for a, p in zip(actual, pinned, strict=True))
