"""Experts of a few tokens against the float64 layer, over ugly routings."""

from dataclasses import replace

import pytest
import torch
from expert_case import KINDS, Case, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE, frobenius_error, max_error

from gpu_kernels.expert_config import ExpertConfig
from gpu_kernels.expert_decode import DecodeWorkspace, expert_decode, expert_decode_reference
from gpu_kernels.expert_weights import ACTIVATION_KINDS
from gpu_kernels.grouped_gemm import grouped_experts
from gpu_kernels.tile_spec import TileConfig

TILE = TileConfig(64, 8, 128, num_warps=4, num_stages=2, in_registers=True)
FEW_TILES = ExpertConfig(TILE, TILE)  # the interpreter pays for each program and step
TILE = TileConfig(16, 8, 64, num_warps=1, num_stages=2, in_registers=True)
MANY_TILES = ExpertConfig(TILE, replace(TILE, splits=3))


def run(case: Case, **options: object) -> torch.Tensor:
    return case.run(expert_decode, **{"config": FEW_TILES, **options})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ACTIVATION_KINDS)
def test_dense_equals_float64(activation: str, biased: bool) -> None:
    case = make_case("dense", activation=activation, biased=biased)
    assert max_error(run(case), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_float64(kind: str) -> None:
    case = make_case(kind, hidden=136, num_tokens=2, biased=kind.endswith("z"))
    assert max_error(run(case), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g32", "w8g64z", "bf12"])
@pytest.mark.parametrize(("hidden", "width"), [(1, 1), (17, 33), (64, 16)])
def test_sizes(hidden: int, width: int, kind: str) -> None:
    case = make_case(kind, hidden=hidden, width=width, num_tokens=1, num_slots=1, num_experts=1)
    assert max_error(run(case, config=MANY_TILES), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g64z", "bf12"])
def test_default_tiles(kind: str) -> None:
    case = make_case(kind, num_tokens=9, hidden=24, width=16, num_slots=1, num_experts=2)
    assert max_error(run(case, config=None), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "bf12"])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 1), (1, 5), (8, 3)])
def test_tokens_and_choices(num_tokens: int, top_k: int, kind: str) -> None:
    case = make_case(kind, num_tokens=num_tokens, top_k=top_k, hidden=24, width=16)
    assert max_error(run(case), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "w8g32", "bf12"])
def test_float16(kind: str) -> None:
    case = make_case(kind, num_tokens=1, num_experts=3, dtype=torch.float16)
    assert frobenius_error(run(case), case.expected()) <= 1e-3


@settings(max_examples=5)
@given(st.integers(0, 99))
def test_a_token_does_not_see_the_others(seed: int) -> None:
    case = make_case("dense", num_tokens=4, hidden=24, width=16, seed=seed)
    together = run(case)
    assert torch.equal(run(case.tokens([3, 0])), together[[3, 0]])


def test_nan_stays_in_its_token() -> None:
    case = make_case("dense", hidden=24, width=16, num_experts=3)
    expected = run(case)
    case.x_TH[1] = float("nan")
    case.ids_TK[1] = torch.tensor([0, 1])
    actual = run(case)
    assert actual[1].isnan().any()
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("activation", ACTIVATION_KINDS)
def test_large_values_stay_finite(activation: str) -> None:
    case = make_case("dense", activation=activation, hidden=24, width=16)
    case.x_TH.mul_(1e5)
    actual = run(case)
    assert torch.isfinite(actual).all()
    assert frobenius_error(actual, case.expected()) <= 1e-5


def test_without_resident_experts_all_is_zero() -> None:
    case = make_case("dense", hidden=24, width=16)
    case.slot_E.fill_(-1)
    assert run(case, out=torch.full_like(case.x_TH, float("nan"))).eq(0).all()
    case = replace(make_case("dense", hidden=24, width=16), ids_TK=torch.full_like(case.ids_TK, -1))
    assert run(case).eq(0).all()


def test_poison_is_overwritten_and_counters_return_to_zero() -> None:
    case = make_case("dense", biased=True)
    workspace = DecodeWorkspace.make(case.layer, 10, torch.float32)
    results = []
    for _ in range(2):
        workspace.act_PI.fill_(float("nan"))
        workspace.part_PSH.fill_(float("nan"))
        out = torch.full_like(case.x_TH, float("nan"))
        assert run(case, out=out, workspace=workspace) is out
        assert workspace.done.eq(0).all()
        results.append(out)
    assert torch.equal(*results) and max_error(out, case.expected()) <= 1e-5


def test_rows_may_be_strided() -> None:
    case = make_case("w8g32", hidden=40, width=24)
    wide = torch.full((3, 100), float("nan"), device=DEVICE)
    wide[:, 4:44] = case.x_TH
    out = torch.zeros(3, 90, device=DEVICE)
    run(replace(case, x_TH=wide[:, 4:44]), out=out[:, 50:])
    assert torch.equal(out[:, 50:], run(case)) and out[:, :50].eq(0).all()


def test_no_tokens() -> None:
    case = make_case("dense", num_tokens=0)
    assert run(case).shape == (0, 72)


@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_reference_equals_float64(kind: str) -> None:
    case = make_case(kind, num_tokens=20, biased=True, activation="clamped_swiglu")
    assert max_error(case.run(expert_decode_reference), case.expected()) <= 1e-5


def test_bad_arguments_are_refused() -> None:
    case = make_case("dense")
    x_TH, ids_TK, weights_TK, slot_E = case.step
    for step in (
        (x_TH[:, 1:], ids_TK, weights_TK, slot_E),
        (x_TH.double(), ids_TK, weights_TK, slot_E),
        (x_TH.half(), ids_TK, weights_TK, slot_E),
        (x_TH, ids_TK.long(), weights_TK, slot_E),
        (x_TH, ids_TK[:2], weights_TK, slot_E),
        (x_TH, ids_TK.T.contiguous().T, weights_TK, slot_E),
        (x_TH, ids_TK, weights_TK.half(), slot_E),
        (x_TH, ids_TK, weights_TK, slot_E.long()),
    ):
        with pytest.raises(AssertionError):
            expert_decode(*step, case.layer)
    with pytest.raises(AssertionError):
        run(case, out=x_TH.half())
    with pytest.raises(AssertionError):
        run(case, workspace=DecodeWorkspace.make(case.layer, 5, torch.float32))
    with pytest.raises(AssertionError):
        run(make_case("dense", num_tokens=33, hidden=8, width=8))


def check_on_the_gpu(kind: str, dtype: torch.dtype, hidden: int, width: int, top_k: int) -> None:
    case = make_case(
        kind,
        num_tokens=32,
        top_k=top_k,
        hidden=hidden,
        width=width,
        num_experts=9,
        activation="clamped_swiglu",
        biased=True,
        dtype=dtype,
    )
    expected = case.expected()
    for num_tokens in (32, 16, 7, 1):
        actual = case.tokens(slice(0, num_tokens)).run(expert_decode)
        assert frobenius_error(actual, expected[:num_tokens]) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", *KINDS, "w4g128z", "w8g128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_on_the_gpu(dtype: torch.dtype, kind: str) -> None:
    check_on_the_gpu(kind, dtype, hidden=2048, width=768, top_k=8)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "w4g128", "w4g32z", "w8g64", "bf12"])
@pytest.mark.parametrize(("hidden", "width"), [(2880, 2880), (4096, 3584), (1000, 200)])
def test_sizes_on_the_gpu(hidden: int, width: int, kind: str) -> None:
    check_on_the_gpu(kind, torch.bfloat16, hidden, width, top_k=4)


@pytest.mark.gpu
def test_mixtrals_lossless_experts_on_the_gpu() -> None:
    """Of a size at which w2's depth has several programs: each adds its own exceptions."""
    sizes = {"hidden": 4096, "width": 14336, "num_slots": 1, "num_experts": 2}
    case = make_case("bf12", num_tokens=32, dtype=torch.bfloat16, **sizes)
    expected = case.expected()
    for num_tokens in (32, 9, 1):
        actual = case.tokens(slice(0, num_tokens)).run(expert_decode)
        assert frobenius_error(actual, expected[:num_tokens]) <= 5e-3
    assert frobenius_error(case.run(grouped_experts), expected) <= 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_float32_on_the_gpu(kind: str) -> None:
    case = make_case(kind, num_tokens=20, top_k=3, hidden=300, width=200, biased=True)
    assert max_error(case.run(expert_decode), case.expected()) <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "w4g128", "w4g32z", "w8g64", "bf12"])
def test_batches_do_not_change_a_bit_on_the_gpu(kind: str) -> None:
    sizes = {"hidden": 2048, "width": 768, "num_slots": 6, "num_experts": 16}
    case = make_case(kind, num_tokens=32, top_k=8, dtype=torch.bfloat16, **sizes)
    together = case.run(expert_decode)
    for chosen in ([0], [31, 5], [*range(8)], [*range(9)], [*range(16)], [*range(17)]):
        assert torch.equal(case.tokens(chosen).run(expert_decode), together[chosen])


@pytest.mark.gpu
def test_a_graph_follows_the_slot_table_on_the_gpu() -> None:
    case = make_case("w4g128", num_tokens=8, top_k=4, hidden=1024, width=512, dtype=torch.bfloat16)
    workspace = DecodeWorkspace.make(case.layer, 32)
    out = torch.empty(8, 1024, device=DEVICE)
    case.run(expert_decode, out=out, workspace=workspace)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(expert_decode, out=out, workspace=workspace)
    for shift in range(100):
        case.slot_E.copy_(case.slot_E.roll(shift % 3))
        out.fill_(float("nan"))
        graph.replay()
        expected = case.run(expert_decode)
        assert torch.equal(out, expected)
    assert frobenius_error(out, case.expected()) <= 5e-3
