"""Experts of many tokens against the float64 layer."""

import weakref
from dataclasses import replace

import pytest
import torch
from expert_case import KINDS, Case, make_case
from paged_batch import DEVICE, frobenius_error, max_error

from gpu_kernels.expert_config import ExpertConfig
from gpu_kernels.expert_grouping import group_pairs
from gpu_kernels.expert_weights import (
    ACTIVATION_KINDS,
    Activation,
    DenseWeights,
    ExpertLayer,
)
from gpu_kernels.grouped_gemm import (
    GroupedWorkspace,
    grouped_experts,
    grouped_experts_reference,
    grouped_products,
    most_groups,
)
from gpu_kernels.sum_choices import sum_choices_of_tokens
from gpu_kernels.tile_spec import TileConfig

TILE = TileConfig(64, 32, 64, num_warps=4, num_stages=2)
FEW_TILES = ExpertConfig(TILE, TILE)  # the interpreter pays for each program and step
TILE = TileConfig(16, 8, 32, num_warps=1, num_stages=2, near=2)
MANY_TILES = ExpertConfig(TILE, TILE)
TILE = TileConfig(32, 16, 128, num_warps=2, num_stages=2, in_registers=True)
IN_REGISTERS = ExpertConfig(TILE, TILE)


def run(case: Case, **options: object) -> torch.Tensor:
    return case.run(grouped_experts, **{"config": FEW_TILES, **options})


@pytest.mark.parametrize("activation", ACTIVATION_KINDS)
def test_dense_equals_float64(activation: str) -> None:
    case = make_case("dense", num_tokens=40, activation=activation, biased=True)
    assert max_error(run(case), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["w4g32z", "w4g128", "w8g64", "bf12"])
def test_packed_equals_float64(kind: str) -> None:
    case = make_case(kind, num_tokens=10, hidden=136, num_slots=2, num_experts=3)
    assert max_error(run(case), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "w8g64", "bf12"])
def test_many_tiles_and_odd_sizes(kind: str) -> None:
    sizes = {"num_tokens": 9, "hidden": 33, "width": 17, "num_slots": 2, "num_experts": 3}
    case = make_case(kind, **sizes)
    assert max_error(run(case, config=MANY_TILES), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["w4g64z", "w8g32", "bf12"])
def test_codes_in_registers(kind: str) -> None:
    case = make_case(kind, num_tokens=10, num_slots=1, num_experts=3)
    assert max_error(run(case, config=IN_REGISTERS), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "w8g64", "bf12"])
@pytest.mark.parametrize("counts", [(8, 9, 33), (40, 41, 0), (72, 1, 73)])
def test_a_slots_last_tile_takes_a_few_more(kind: str, counts: tuple[int, ...]) -> None:
    case = make_case(kind, num_tokens=sum(counts), top_k=1, num_experts=3)
    expert_S = case.slot_E.argsort().int()
    ids_T1 = torch.repeat_interleave(expert_S, torch.tensor(counts, device=DEVICE))[:, None]
    order = torch.randperm(len(ids_T1), generator=torch.Generator().manual_seed(0))
    case = replace(case, ids_TK=ids_T1[order].contiguous())
    assert max_error(run(case), case.expected()) <= 1e-5


@pytest.mark.parametrize("num_pairs", range(0, 40, 3))
def test_no_division_of_the_pairs_has_more_groups(num_pairs: int) -> None:
    columns, few, slots = 8, 2, 3
    found = 0
    for first in range(num_pairs + 1):
        for second in range(num_pairs - first + 1):
            counts = (first, second, num_pairs - first - second)
            tiles = [max(1, (n - few + columns - 1) // columns) if n else 0 for n in counts]
            found = max(found, sum(tiles))
    assert most_groups(num_pairs, slots, columns, few) == found


def test_default_tiles() -> None:
    case = make_case("dense", num_tokens=50, hidden=24, width=16)
    assert max_error(run(case, config=None), case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "bf12"])
def test_float16(kind: str) -> None:
    case = make_case(kind, num_tokens=20, num_experts=3, dtype=torch.float16)
    assert frobenius_error(run(case), case.expected()) <= 2e-3


def test_without_resident_experts_all_is_zero() -> None:
    case = make_case("dense", num_tokens=40, hidden=24, width=16)
    case.slot_E.fill_(-1)
    assert run(case, out=torch.full_like(case.x_TH, float("nan"))).eq(0).all()


def test_poison_is_overwritten_twice_alike() -> None:
    case = make_case("dense", num_tokens=40, biased=True)
    workspace = GroupedWorkspace.make(case.layer, 99, torch.float32)
    results = []
    for _ in range(2):
        workspace.act_PI.fill_(float("nan"))
        workspace.part_PH.fill_(float("nan"))
        out = torch.full_like(case.x_TH, float("nan"))
        assert run(case, out=out, workspace=workspace) is out
        results.append(out)
    assert torch.equal(*results) and max_error(out, case.expected()) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w8g128"])
def test_rows_may_be_strided(kind: str) -> None:
    case = make_case(kind, num_tokens=10, hidden=64, width=32, num_slots=2, num_experts=3)
    wide = torch.full((10, 200), float("nan"), device=DEVICE)  # NaN right behind each row
    wide[:, 4:68] = case.x_TH
    out = torch.zeros(10, 90, device=DEVICE)
    run(replace(case, x_TH=wide[:, 4:68]), out=out[:, 26:])
    assert torch.equal(out[:, 26:], run(case)) and out[:, :26].eq(0).all()
    assert max_error(out[:, 26:], case.expected()) <= 1e-5


def test_nan_stays_in_its_token() -> None:
    case = make_case("dense", num_tokens=20, hidden=24, width=16, num_experts=3)
    expected = run(case)
    case.x_TH[7] = float("nan")
    actual = run(case)
    assert actual[7].isnan().any()
    assert torch.equal(actual[:7], expected[:7]) and torch.equal(actual[8:], expected[8:])


def test_what_is_prepared_for_a_layer_is_its_own_and_goes_with_it() -> None:
    case = make_case("w4g32z", num_tokens=10, num_slots=2, num_experts=3)
    first = run(case)
    other = replace(case.layer, activation=Activation("gelu"))
    assert not torch.equal(run(replace(case, layer=other)), first)
    assert torch.equal(run(case), first)
    run(case, config=MANY_TILES)
    assert len(case.layer.prepared) == 2 and len(other.prepared) == 1
    blob = weakref.ref(case.layer.weights.blob_SB)
    del case, other
    assert blob() is None


def test_no_tokens() -> None:
    assert run(make_case("dense", num_tokens=0)).shape == (0, 72)


def test_bad_arguments_are_refused() -> None:
    case = make_case("dense", num_tokens=40)
    with pytest.raises(AssertionError):
        run(replace(case, ids_TK=case.ids_TK.long()))
    with pytest.raises(AssertionError):
        run(case, out=case.x_TH.half())
    with pytest.raises(AssertionError):
        run(case, workspace=GroupedWorkspace.make(case.layer, 79, torch.float32))
    with pytest.raises(AssertionError):
        run(case, workspace=GroupedWorkspace.make(case.layer, 80))


@pytest.mark.parametrize("ranges", [[(0, 3)], [(0, 1), (1, 2)], [(2, 1), (0, 2)]])
def test_slots_of_one_grouping_may_lie_in_several_places(ranges: list[tuple[int, int]]) -> None:
    case = make_case("dense", num_tokens=20, hidden=24, width=16)
    groups = group_pairs(case.ids_TK, case.slot_E, 6)  # three slots without an expert
    workspace = GroupedWorkspace.make(case.layer, case.ids_TK.numel(), torch.float32)
    weights = case.layer.weights
    assert isinstance(weights, DenseWeights)
    slot_TK = case.slot_E[case.ids_TK.clamp(min=0).long()].masked_fill(case.ids_TK < 0, -1)
    for first, count in ranges:
        # a place may have more slots than are used of it
        here = DenseWeights(weights.w13_SFH[first:], weights.w2_SHI[first:])
        max_pairs = int(((slot_TK >= first) & (slot_TK < first + count)).sum())
        grouped_products(
            *(case.x_TH, case.ids_TK, groups, ExpertLayer(here), workspace),
            **{"config": FEW_TILES, "first_slot": first, "num_slots": count},
            max_pairs=max_pairs,
        )
    out = torch.empty_like(case.x_TH)
    sum_choices_of_tokens(workspace.part_PH, case.ids_TK, case.weights_TK, case.slot_E, out)
    assert torch.equal(out, run(case))
    assert max_error(out, case.expected()) <= 1e-5


def test_half_weights_of_a_float32_x_are_widened() -> None:
    case = make_case("dense", num_tokens=20, hidden=24, width=16, dtype=torch.float16)
    wide = replace(case, x_TH=case.x_TH.float())
    assert max_error(run(wide), wide.expected()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [40, 300])
def test_bfloat16_weights_of_a_float32_x_on_the_gpu(num_tokens: int) -> None:
    sizes = {"num_tokens": num_tokens, "top_k": 3, "hidden": 512, "width": 256}
    case = make_case("dense", dtype=torch.bfloat16, **sizes)
    wide = replace(case, x_TH=case.x_TH.float())
    assert frobenius_error(wide.run(grouped_experts), wide.expected()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [40, 300, 420, 1100])  # 420: some 140 a slot, 128 and more
@pytest.mark.parametrize("kind", ["dense", *KINDS, "w4g128z", "w8g128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_on_the_gpu(dtype: torch.dtype, kind: str, num_tokens: int) -> None:
    case = make_case(
        kind,
        num_tokens=num_tokens,
        top_k=3,
        hidden=1536,
        width=800,
        num_slots=5,
        num_experts=8,
        activation="clamped_swiglu",
        biased=True,
        dtype=dtype,
    )
    expected = case.expected()
    assert frobenius_error(case.run(grouped_experts), expected) <= 5e-3
    assert frobenius_error(case.run(grouped_experts_reference), expected) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["w4g128", "bf12"])
@pytest.mark.parametrize("launch", [(64, 4, 3), (128, 8, 4)])  # the table's, one that was wrong
def test_decoded_weights_never_race_on_the_gpu(launch: tuple[int, int, int], weights: str) -> None:
    """Products under way while the next weights are decoded: wrong by timing, if at all."""
    from scripts.bench.kernels import expert_case as bench  # a whole layer of 128 experts

    shape = bench.SHAPES["qwen3-30b-a3b"]
    case = bench.Case(shape, bench.make_layer(shape, weights), 2048)
    expected = case.run(grouped_experts_reference)
    rows, num_warps, num_stages = launch
    tile = TileConfig(rows, 128, 64, num_warps, num_stages)
    first = case.run(grouped_experts, config=ExpertConfig(tile, tile))
    assert frobenius_error(first, expected) <= 5e-3
    for repeat in range(20):
        again = case.run(grouped_experts, config=ExpertConfig(tile, tile))
        differ = (again != first).any(1).sum().item()
        assert torch.equal(again, first), f"repeat {repeat}: {differ} tokens differ"


@pytest.mark.gpu
def test_a_graph_follows_the_slot_table_on_the_gpu() -> None:
    sizes = {"num_tokens": 300, "top_k": 3, "hidden": 512, "width": 256}
    case = make_case("dense", dtype=torch.bfloat16, **sizes)
    out = torch.empty(300, 512, device=DEVICE)
    workspace = GroupedWorkspace.make(case.layer, 900)
    case.run(grouped_experts, out=out, workspace=workspace)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(grouped_experts, out=out, workspace=workspace)
    for _ in range(5):
        case.slot_E.copy_(case.slot_E.roll(1))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, case.run(grouped_experts))
        assert frobenius_error(out, case.expected()) <= 5e-3
