"""Experts of which only the last rows are computed, and read from (mapped) host memory."""

from dataclasses import replace

import pytest
import torch
from expert_case import Case, make_case
from paged_batch import DEVICE, frobenius_error, max_error
from torch import Tensor

from gpu_kernels.expert_config import ExpertConfig
from gpu_kernels.expert_decode import (
    DecodeWorkspace,
    expert_decode,
    expert_decode_reference,
)
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer, PackedWeights
from gpu_kernels.last_rows import LastRows
from gpu_kernels.tile_spec import TileConfig

TILE = TileConfig(64, 8, 128, num_warps=4, num_stages=2, in_registers=True)
FEW_TILES = ExpertConfig(TILE, TILE)  # the interpreter pays for each program and step
TILE = TileConfig(16, 8, 64, num_warps=1, num_stages=2, in_registers=True)
MANY_TILES = ExpertConfig(TILE, replace(TILE, splits=3))
UNITS = {"dense": 16, "w4g32z": 32, "w4g128": 128, "w8g64": 64, "w8g128z-bf16": 128, "bf12": 64}


def last_rows(case: Case, first: int, most: int, unit: int) -> LastRows:
    """The same rows of every expert."""
    return LastRows(torch.full_like(case.ids_TK, first), most, unit)


def firsts(width: int, unit: int) -> list[int]:
    """Where the last rows may begin: all are, none are, one unit is, and between."""
    units = width // unit
    return sorted({0, unit, units // 2 * unit, units * unit, width})


def expected(case: Case, first: int) -> Tensor:
    """float64, of the rows that are left."""
    width = case.layer.width
    rows_F = [*range(first, width), *range(width + first, 2 * width)]
    w13_SFH, w2_SHI = case.w13_SFH[:, rows_F], case.w2_SHI[:, :, first:]
    return replace(case, w13_SFH=w13_SFH, w2_SHI=w2_SHI).expected()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *((kind, FEW_TILES) for kind in UNITS),
        *((kind, MANY_TILES) for kind in ("dense", "w4g32z", "bf12")),
    ],
)
def test_the_last_rows_equal_float64(kind: str, config: ExpertConfig) -> None:
    unit = UNITS[kind]
    width = 2 * unit + 44  # the last unit is not full
    case = make_case(kind, hidden=40, width=width, num_tokens=2, num_experts=3)
    for first in firsts(width, unit):
        workspace = DecodeWorkspace.make(case.layer, 4, torch.float32, config)
        workspace.act_PI.fill_(float("nan"))  # the other rows are neither written nor read
        workspace.part_PSH.fill_(float("nan"))
        options = {"config": config, "workspace": workspace}
        rows = last_rows(case, first, max(width - first, 1), unit)
        found = case.run(expert_decode, last_rows=rows, **options)
        assert max_error(found, expected(case, first)) <= 1e-5, first
        assert workspace.done.eq(0).all()
        reference = case.run(expert_decode_reference, last_rows=rows)
        assert max_error(reference, expected(case, first)) <= 1e-5
        if first == 0:
            assert torch.equal(found, case.run(expert_decode, **options))


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "w8g64", "bf12"])
def test_each_expert_has_its_own_rows(kind: str) -> None:
    """As in a step: some experts whole, one in part, others not at all."""
    unit = UNITS[kind]
    width = 2 * unit + 44
    case = make_case(kind, hidden=40, width=width, num_tokens=4, num_slots=5)
    first_E = torch.tensor([0, width, unit, 0, width], dtype=torch.int32, device=DEVICE)
    rows = LastRows(first_E[case.ids_TK.clamp(min=0)], width, unit)
    w2_SHI = case.w2_SHI.copy()
    for expert, slot in enumerate(case.slot_E.tolist()):
        if slot >= 0:
            w2_SHI[slot, :, : int(first_E[expert])] = 0
    wanted = replace(case, w2_SHI=w2_SHI).expected()
    workspace = DecodeWorkspace.make(case.layer, case.ids_TK.numel(), torch.float32, FEW_TILES)
    workspace.act_PI.fill_(float("nan"))
    found = case.run(expert_decode, last_rows=rows, config=FEW_TILES, workspace=workspace)
    assert max_error(found, wanted) <= 1e-5
    assert max_error(case.run(expert_decode_reference, last_rows=rows), wanted) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "w4g32z"])
def test_spare_programs_change_no_bit(kind: str) -> None:
    """The grid is that of the most rows, whatever the first is."""
    case, unit = make_case(kind, hidden=24, width=80, num_tokens=3), UNITS[kind]
    for first in (unit, 80):
        wanted, found, alone = (
            step.run(expert_decode, config=FEW_TILES, last_rows=last_rows(step, first, most, unit))
            for step, most in ((case, max(80 - first, 1)), (case, 80), (case.tokens([2]), 80))
        )
        assert torch.equal(found, wanted) and torch.equal(alone, found[[2]])


def test_bad_arguments_are_refused() -> None:
    case = make_case("w4g32z", hidden=40, width=64)
    for wrong in (
        last_rows(case, 0, 64, 16),
        last_rows(case, 0, 64, 48),
        last_rows(case, 0, 0, 32),
        last_rows(case, 0, 65, 32),
        LastRows(case.ids_TK[:1], 64, 32),
        LastRows(case.ids_TK.long(), 64, 32),
    ):
        with pytest.raises(AssertionError):
            case.run(expert_decode, last_rows=wrong)
    biased = make_case("dense", hidden=40, width=64, biased=True)
    with pytest.raises(AssertionError):
        biased.run(expert_decode, last_rows=last_rows(biased, 0, 64, 16))


def host_layer(layer: ExpertLayer) -> ExpertLayer:
    """The same weights in (mapped) host memory, read by the device."""
    weights = layer.weights
    if isinstance(weights, DenseWeights):
        rows = DenseWeights(on_host(weights.w13_SFH), on_host(weights.w2_SHI))
        return ExpertLayer(rows, layer.activation, reader=layer.device)
    packed = PackedWeights(on_host(weights.blob_SB), weights.layout)
    return ExpertLayer(packed, layer.activation, reader=layer.device)


def on_host(weights: Tensor) -> Tensor:
    copied = weights.cpu().clone()
    return copied.pin_memory() if DEVICE == "cuda" else copied


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "w8g64", "bf12"])
def test_a_layer_in_host_memory_gives_the_same_bits(kind: str) -> None:
    case = make_case(kind, num_tokens=4, hidden=40, width=24)
    layer = host_layer(case.layer)
    assert layer.device == case.x_TH.device
    workspace = DecodeWorkspace.make(layer, 8, torch.float32)
    found = expert_decode(*case.step, layer, workspace=workspace)
    assert torch.equal(found, case.run(expert_decode))
    assert max_error(found, case.expected()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "w4g128", "w8g128z-bf16", "bf12"])
def test_host_memory_is_read_at_the_speed_of_the_link(kind: str, dtype: torch.dtype) -> None:
    sizes = {"hidden": 2048, "width": 768, "num_slots": 8, "num_experts": 8}
    case = make_case(kind, num_tokens=1, top_k=8, dtype=dtype, **sizes)
    case.ids_TK.copy_(torch.arange(8))
    layer = host_layer(case.layer)
    workspace = DecodeWorkspace.make(layer, 8, dtype)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(4):
        begin.record()
        for _ in range(10):
            found = expert_decode(*case.step, layer, workspace=workspace)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e4)
    assert torch.equal(found, case.run(expert_decode))
    each = 3 * 2048 * 768 * dtype.itemsize
    if isinstance(layer.weights, PackedWeights):
        each = layer.weights.layout.expert_bytes
    num_bytes = 8 * each
    print(f"{kind} {dtype}: {num_bytes / min(seconds) / 1e9:.1f} GB/s from host memory")
    assert num_bytes / min(seconds) > 5e9  # far below any link: a sign of something wrong


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "w4g128", "w4g32z", "w8g64", "w8g128z-bf16", "bf12"])
def test_any_first_row_on_the_gpu(kind: str, dtype: torch.dtype) -> None:
    """From host memory; one and many tokens, and a width that is no multiple of a step."""
    for hidden, width in ((2048, 768), (1000, 1096)):
        # a slot for each, or a token alone may have nothing to compare
        sizes = {"hidden": hidden, "width": width, "num_experts": 9, "num_slots": 9}
        case = make_case(kind, num_tokens=32, top_k=4, dtype=dtype, **sizes)
        case = replace(case, layer=host_layer(case.layer))
        unit = max(64, UNITS[kind])
        for first in firsts(width, unit):
            wanted = expected(case, first)
            for num_tokens in (32, 16, 7, 1):
                few = case.tokens(slice(0, num_tokens))
                found = few.run(expert_decode, last_rows=last_rows(few, first, width, unit))
                if first == width:
                    assert found.eq(0).all()
                else:
                    error = frobenius_error(found, wanted[:num_tokens])
                    assert error <= 5e-3, (hidden, first, num_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "w4g128", "bf12"])
def test_a_graph_follows_the_first_row(kind: str) -> None:
    case = make_case(kind, num_tokens=4, top_k=4, hidden=1024, width=768, dtype=torch.bfloat16)
    layer = host_layer(case.layer)
    rows = last_rows(case, 0, 768, 128)
    workspace, out = DecodeWorkspace.make(layer, 16), torch.empty(4, 1024, device=DEVICE)
    options = {"workspace": workspace, "last_rows": rows}
    expert_decode(*case.step, layer, out=out, **options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        expert_decode(*case.step, layer, out=out, **options)
    for first in (128, 768, 0, 512, 640):
        rows.first_TK.fill_(first)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expert_decode(*case.step, layer, **options))
        assert frobenius_error(out, expected(case, first)) <= 5e-3 or first == 768


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("kind", ["dense", "w4g128", "bf12"])
def test_the_last_rows_are_read_at_the_speed_of_the_link(kind: str) -> None:
    """Half and a quarter of every expert, per byte as fast as all of it, or nearly."""
    sizes = {"hidden": 2048, "width": 768, "num_slots": 8, "num_experts": 8}
    case = make_case(kind, num_tokens=1, top_k=8, dtype=torch.bfloat16, **sizes)
    case.ids_TK.copy_(torch.arange(8))
    layer = host_layer(case.layer)
    each = 3 * 2048 * 768 * 2
    if isinstance(layer.weights, PackedWeights):
        each = layer.weights.layout.expert_bytes
    workspace = DecodeWorkspace.make(layer, 8)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for first in (0, 384, 512, 640):
        rows, seconds = last_rows(case, first, 768 - first, 128), []
        for _ in range(4):
            begin.record()
            for _ in range(10):
                expert_decode(*case.step, layer, workspace=workspace, last_rows=rows)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e4)
        rate = 8 * each * (768 - first) / 768 / min(seconds) / 1e9
        print(f"{kind}, rows from {first} on: {min(seconds) * 1e6:.0f} us, {rate:.1f} GB/s")
        assert rate > 3  # far below any link: a sign of something wrong
