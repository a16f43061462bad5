"""What computes residents for a few tokens, against a product for each pair in float64.

Without a GPU the kernels run in Triton's interpreter. E experts, T tokens, K top-k, H hidden.
"""

import numpy as np
import pytest
import torch

from cpu_kernels.bf16 import f32_to_bf16
from cpu_kernels.lossless import pack_lossless
from cpu_kernels.packed_layout import PackedShape, pack_expert
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler.models.packing import halves
from offload.adaptive import Swap
from offload.expert_store import ExpertShape, ExpertStore
from offload.kernel_residents import KernelResidents
from offload.placement import Placement
from offload.residents import Residents, TorchResidents, residents_of
from offload.swaps import Swaps

E, K, H, WIDTH = 6, 3, 64, 32
LAYERS = (0, 2)
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = ExpertShape(
    num_layers=3, moe_layers=LAYERS, num_experts=E, hidden_size=H, expert_size=WIDTH
)
MATRICES = (WIDTH, H), (WIDTH, H), (H, WIDTH)


def store_of(way: str, kind: str) -> ExpertStore:
    """Experts 1, 3 and 4 of the layers 0 and 2 have a slot, and one is free."""
    weights = parse_kind(kind)
    store = ExpertStore(
        *(SHAPE, Placement.of([(1, 3, 4), (), (1, 3, 4)])),
        device=DEVICE if way == "kernels" else CPU,
        dtype=torch.uint8 if weights.is_packed else torch.bfloat16,
        packed=weights if weights.is_packed else None,
        has_spares=True,
    )

    def fill(layer: int, expert: int, *parts: torch.Tensor) -> None:
        rng = np.random.default_rng(100 * layer + expert)
        gate, up, down = (rng.standard_normal(s, np.float32) / 8 for s in MATRICES)
        if weights.is_packed:
            parts[0].copy_(torch.from_numpy(packed(weights, gate, up, down)))
        else:
            parts[0].copy_(torch.from_numpy(np.concatenate((gate, up))))
            parts[1].copy_(torch.from_numpy(down))

    store.fill(fill, num_threads=1)
    return store


def packed(kind: WeightKind, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    if kind.is_rounded:
        return pack_expert(kind, *(round_to_nearest(matrix, kind) for matrix in (gate, up, down)))
    shape = PackedShape(kind, H, WIDTH)
    blob_B = np.zeros(shape.expert_bytes, np.uint8)
    for (_, blocks), matrix in zip(halves(shape, blob_B), (gate, up, down), strict=True):
        pack_lossless(f32_to_bf16(matrix), blocks)
    return blob_B


def residents(way: str, store: ExpertStore) -> Residents:
    return TorchResidents(store) if way == "torch" else KernelResidents(store, DEVICE)


def check(
    way: str,
    computed: Residents,
    store: ExpertStore,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    device = DEVICE if way == "kernels" else CPU
    for layer in LAYERS:
        x_TH = torch.randn(num_tokens, H, generator=generator).to(dtype)
        ids_TK = torch.rand(num_tokens, E, generator=generator).argsort(dim=1)[:, :K]
        weights_TK = torch.rand(num_tokens, K, generator=generator)
        found_TH = computed.products(
            layer, *(part.to(device) for part in (x_TH, ids_TK, weights_TK))
        )
        wanted_TH = expected(store, layer, x_TH, ids_TK, weights_TK)
        assert found_TH.dtype == torch.float32 and wanted_TH.abs().max() > 0.1
        bound = (
            {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.02}
        )
        torch.testing.assert_close(found_TH.double().cpu(), wanted_TH, **bound)


def expected(
    store: ExpertStore,
    layer: int,
    x_TH: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            if store[layer].slot_E[expert] < 0:
                continue
            w13_FH, w2_HI = (weights.cpu().double() for weights in store.weights(layer, expert))
            gate_I, up_I = (w13_FH @ x_TH[t].double()).chunk(2)
            y_H = w2_HI @ (torch.nn.functional.silu(gate_I) * up_I)
            out_TH[t] += weights_TK[t, k].double() * y_H
    return out_TH


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("kind", ["bf16", "bf12", "w4g32z", "w8g128"])
@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_only_residents_are_added_up(way: str, kind: str, num_tokens: int) -> None:
    store = store_of(way, kind)
    check(way, residents(way, store), store, num_tokens)


@pytest.mark.parametrize("way", ["torch", "kernels"])
def test_experts_that_have_changed_places_are_found(way: str) -> None:
    store = store_of(way, "bf16")
    computed = residents(way, store)
    check(way, computed, store, 9)
    swaps = Swaps(store, store[0].gpu_parts[0].device)
    swaps.start([Swap(layer=2, comes=5, leaves=3)])
    swaps.settle()
    assert store[2].slot_E[5] >= 0 > store[2].slot_E[3]
    check(way, computed, store, 9)


def test_torch_plays_the_gpu_where_there_is_none() -> None:
    assert isinstance(residents_of(store_of("torch", "bf16"), CPU), TorchResidents)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 32])
@pytest.mark.parametrize("kind", ["bf16", "bf12", "w4g32z", "w8g128"])
def test_a_gpu_has_kernels_that_take_half_precision(kind: str, num_tokens: int) -> None:
    store = store_of("kernels", kind)
    computed = residents_of(store, DEVICE)
    assert isinstance(computed, KernelResidents)
    check("kernels", computed, store, num_tokens, torch.bfloat16)
