"""The same packed bytes on both devices: the workers' experts beside the device's, in float32.

Each is held to float64 by its own tests; here one is held to the other: a hybrid step mixes them.
"""

import numpy as np
import pytest
import torch

from cpu_kernels.arena import Arena
from cpu_kernels.expert_pool import ExpertPool, aligned_floats
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import parse_kind
from gpu_kernels.expert_decode import expert_decode
from gpu_kernels.expert_weights import ExpertLayer, PackedWeights
from gpu_kernels.grouped_gemm import grouped_experts
from offload.sample_experts import sample_bytes, sample_experts
from offload.slot_weights import packed_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("w4g128", "w4g64", "w4g32", "w4g128z", "w8g128", "w8g128-bf16")
NUM_EXPERTS, TOP_K = 4, 2


def difference(kind: str, hidden: int, width: int, num_tokens: int) -> float:
    """Of both devices' sums, the largest one, in units of the largest sum."""
    weights, rng = parse_kind(kind), np.random.default_rng(hidden + num_tokens)
    arena = Arena(NUM_EXPERTS * sample_bytes(weights, hidden, width))
    experts, used = sample_experts(arena, weights, hidden, width, NUM_EXPERTS)
    x_TH = aligned_floats(num_tokens * hidden).reshape(num_tokens, hidden)
    x_TH[:] = rng.standard_normal(x_TH.shape, np.float32)
    ids_TK = np.stack([rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in x_TH]).astype(np.int32)
    weights_TK = rng.dirichlet(np.ones(TOP_K), num_tokens).astype(np.float32)
    ours_TH = np.empty_like(x_TH)
    with ExpertPool(2) as pool:
        layer = pool.add_layer(experts, activations="f32")
        pool.submit(layer, x_TH, ids_TK, weights_TK, ours_TH)
        pool.wait()
    blob_SB = torch.from_numpy(used).to(DEVICE)
    device_layer = ExpertLayer(
        PackedWeights(blob_SB, packed_layout(PackedShape(weights, hidden, width)))
    )
    slot_E = torch.arange(NUM_EXPERTS, dtype=torch.int32, device=DEVICE)
    step = [torch.from_numpy(part).to(DEVICE) for part in (x_TH, ids_TK, weights_TK)]
    many = grouped_experts if num_tokens > 32 else expert_decode
    theirs_TH = many(*step, slot_E, device_layer).cpu().numpy()
    return float(np.abs(ours_TH - theirs_TH).max() / np.abs(theirs_TH).max())


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_both_devices_agree(kind: str, num_tokens: int) -> None:
    assert 0 < difference(kind, 256, 128, num_tokens) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 300])
@pytest.mark.parametrize(("hidden", "width"), [(2048, 768), (4096, 14336)])
@pytest.mark.parametrize("kind", ["w4g128", "w8g128"])
def test_both_devices_agree_on_models_experts(
    kind: str, hidden: int, width: int, num_tokens: int
) -> None:
    assert 0 < difference(kind, hidden, width, num_tokens) <= 1e-5
