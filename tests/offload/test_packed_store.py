"""Packed experts in the store: the same bytes everywhere, and the numbers that they stand for."""

import numpy as np
import pytest
import torch

from cpu_kernels.bf16 import bf16_to_f32, f32_to_bf16
from cpu_kernels.lossless import pack_lossless
from cpu_kernels.packed_layout import PackedShape, dequantise, pack_expert, unpack_expert
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import BF12, PACKED_KINDS, ROUNDED_KINDS, WeightKind, parse_kind
from fiddler.models.packing import halves
from gpu_kernels.expert_weights import PackedWeights
from offload.expert_store import ExpertShape, ExpertStore
from offload.expert_stream import ExpertStream
from offload.packed_expert import dequantised
from offload.placement import Placement
from offload.slot_weights import packed_layout, slot_weights

HIDDEN, WIDTH = 96, 40  # neither a whole number of groups nor of blocks
CPU = torch.device("cpu")


def blob(kind: WeightKind, seed: int, hidden: int = HIDDEN, width: int = WIDTH) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    return pack_expert(
        kind,
        *(round_to_nearest(rng.standard_normal(s).astype(np.float32), kind) for s in shapes),
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ROUNDED_KINDS, ids=lambda kind: kind.name)
def test_torch_and_numpy_restore_the_same_numbers(kind: WeightKind, device: str) -> None:
    shape = PackedShape(kind, HIDDEN, WIDTH)
    packed = blob(kind, 0)
    found = dequantised(torch.from_numpy(packed).to(device), shape)
    gate, up, down = (dequantise(kind, *part) for part in unpack_expert(shape, packed))
    for ours, wanted in zip(found, (np.concatenate((gate, up)), down), strict=True):
        difference = np.abs(ours.cpu().numpy() - wanted).max()
        assert np.array_equal(ours.cpu().numpy(), wanted), f"{kind.name}: off by {difference}"
        assert ours.is_contiguous() and ours.device.type == device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lossless_experts_are_restored(device: str) -> None:
    shape = PackedShape(BF12, HIDDEN, WIDTH)
    packed, stored = np.zeros(shape.expert_bytes, np.uint8), []
    rng = np.random.default_rng(0)
    for matrix, blocks in halves(shape, packed):
        weights = rng.standard_normal((matrix.rows, matrix.cols), np.float32)
        weights[3:5, ::17] *= np.float32(2.0**-40)  # exceptions of neighbouring rows
        stored.append(f32_to_bf16(weights))
        pack_lossless(stored[-1], blocks)
    w13_FH, w2_HI = dequantised(torch.from_numpy(packed).to(device), shape)
    for ours, wanted in ((w13_FH, np.concatenate(stored[:2])), (w2_HI, stored[2])):
        assert np.array_equal(ours.cpu().numpy(), bf16_to_f32(wanted))
        assert ours.is_contiguous() and ours.device.type == device


@pytest.mark.parametrize("kind", PACKED_KINDS, ids=lambda kind: kind.name)
def test_both_kernel_packages_agree_on_the_sizes(kind: WeightKind) -> None:
    for hidden, width in ((HIDDEN, WIDTH), (2048, 768), (4096, 14336)):
        shape = PackedShape(kind, hidden, width)
        layout = packed_layout(shape)
        assert layout.expert_bytes == shape.expert_bytes
        assert layout.w2_offset == shape.w2_offset
        assert layout.scale_offset(hidden) == shape.gate.scale_offset
        assert layout.zero_offset(width) == shape.down.zero_offset


def filled(kind: WeightKind) -> ExpertStore:
    shape = ExpertShape(
        num_layers=2, moe_layers=(0, 1), num_experts=5, hidden_size=HIDDEN, expert_size=WIDTH
    )
    store = ExpertStore(
        shape, Placement.of([(1, 4), ()]), device=CPU, dtype=torch.uint8, packed=kind
    )

    def fill(layer: int, expert: int, blob_B: torch.Tensor) -> None:
        blob_B.copy_(torch.from_numpy(blob(kind, 10 * layer + expert)))

    store.fill(fill, num_threads=2)
    return store


def test_every_place_holds_its_experts_bytes() -> None:
    kind = parse_kind("w4g32z")
    store = filled(kind)
    shape = PackedShape(kind, HIDDEN, WIDTH)
    for layer in (0, 1):
        here = store[layer]
        for expert in range(5):
            wanted = blob(kind, 10 * layer + expert)
            (found,) = here.place(expert)
            assert np.array_equal(found.numpy(), wanted)
            both, down = store.weights(layer, expert)
            assert both.shape == (2 * WIDTH, HIDDEN) and down.shape == (HIDDEN, WIDTH)
        experts = here.cpu_experts
        assert experts is not None and experts.kind == kind
        assert experts.w13 == here.cpu_parts[0].data_ptr()
        assert experts.w2 - experts.w13 == shape.w2_offset
    assert [len(store[layer].gpu_w2_SHI) for layer in (0, 1)] == [2, 0]


def test_slots_are_given_to_the_kernels_as_they_lie() -> None:
    store = filled(parse_kind("w8g64"))
    weights = slot_weights(store[0].gpu_parts, store[0].packed)
    assert isinstance(weights, PackedWeights) and weights.sizes == (2, HIDDEN, WIDTH)
    assert weights.blob_SB.data_ptr() == store[0].gpu_parts[0].data_ptr()


def test_layers_of_several_kinds_share_the_ring() -> None:
    """Slots have room for the largest; smaller experts lie side by side in their bank."""
    kinds = {0: parse_kind("w4g64"), 1: parse_kind("w8g32z"), 2: parse_kind("w4g32z")}
    shape = ExpertShape(
        num_layers=3, moe_layers=(0, 1, 2), num_experts=5, hidden_size=HIDDEN, expert_size=WIDTH
    )
    nobody = Placement.of([(), (), (0,)])
    store = ExpertStore(shape, nobody, device=CPU, dtype=torch.uint8, packed=kinds)
    store.fill(
        lambda layer, e, blob_B: blob_B.copy_(torch.from_numpy(blob(kinds[layer], 10 * layer + e))),
        num_threads=1,
    )
    sizes = [PackedShape(kind, HIDDEN, WIDTH).expert_bytes for kind in kinds.values()]
    assert [store.expert_bytes(layer) for layer in (0, 1, 2)] == sizes and sizes[1] == max(sizes)
    assert store.largest_layer == 1
    stream = ExpertStream(store, 16, CPU)
    assert stream.bank_size == 4 and stream.num_slots == 16
    sent = [(layer, stream.send(layer, [1, 2])) for layer in (1, 0, 2, 1)]
    for layer, bank in sent:
        weights = stream.arrive(bank).weights
        assert isinstance(weights, PackedWeights) and weights.sizes == (4, HIDDEN, WIDTH)
        assert weights.layout == packed_layout(PackedShape(kinds[layer], HIDDEN, WIDTH))
        for slot, row in enumerate((1, 2)):
            expert = int(store[layer].expert_C[row])
            assert np.array_equal(
                weights.blob_SB[slot].numpy(), blob(kinds[layer], 10 * layer + expert)
            )


def test_rows_pass_through_the_ring() -> None:
    store = filled(parse_kind("w4g64"))
    stream = ExpertStream(store, 4, CPU)
    bank = stream.send(1, [0, 1][: stream.bank_size])
    weights = stream.arrive(bank).weights
    assert isinstance(weights, PackedWeights)
    for slot in range(min(2, stream.bank_size)):
        assert torch.equal(weights.blob_SB[slot], store[1].cpu_parts[0][slot])
