"""The noise: the kernel's equals the plain one, and that has Gumbel's distribution."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from paged_batch import DEVICE

from gpu_kernels.sampling_noise import gumbel_noise
from gpu_kernels.sampling_noise_reference import gumbel_noise_reference, gumbel_noise_rows, philox
from tests.sampling_reference import chi_square_excess


@triton.jit
def noise_kernel(seed_ptr, position_ptr, out_ptr, N: tl.constexpr):
    counter = tl.program_id(0) * (N // 4) + tl.arange(0, N // 4)
    noise = gumbel_noise(tl.load(seed_ptr), tl.load(position_ptr), counter)
    tl.store(out_ptr + tl.program_id(0) * N + tl.arange(0, N), noise)


@pytest.mark.parametrize(
    ("seed", "position"),
    [(0, 0), (1, 7), (-1, 2**31), (2**63 - 1, 2**40 + 3), (123_456_789_012_345, 1)],
)
def test_kernel_equals_reference(seed: int, position: int) -> None:
    out = torch.full((256,), float("nan"), device=DEVICE)
    numbers = torch.tensor([seed, position], device=DEVICE)
    noise_kernel[(4,)](numbers, numbers[1:], out, N=64)
    expected = gumbel_noise_reference(seed, position, 256)
    assert (out.cpu() - expected).abs().max() <= 1e-5


def test_every_seed_position_and_id_has_noise_of_its_own() -> None:
    rows = [gumbel_noise_reference(s, p, 1000) for s in (0, 1, 2**32) for p in (0, 1, 2**32)]
    assert len(torch.cat(rows).unique()) > 0.998 * 9000  # 24 bits of a uniform: few chance matches
    assert torch.equal(gumbel_noise_reference(3, 5, 1000)[:10], gumbel_noise_reference(3, 5, 10))


@pytest.mark.parametrize("num_ids", [1, 264, 140_000])
def test_rows_are_what_they_are_alone(num_ids: int) -> None:
    """140,000 ids take two pieces."""
    seeds, positions = torch.tensor([0, -7, 2**63 - 1]), torch.tensor([3, 2**40, 0])
    alone = [
        gumbel_noise_reference(seed, position, num_ids)
        for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]
    assert torch.equal(gumbel_noise_rows(seeds, positions, num_ids), torch.stack(alone))
    assert torch.equal(alone[0][:100], gumbel_noise_reference(0, 3, 100)[:num_ids])


def test_philox_is_that_of_its_authors() -> None:
    """Known answers of Random123: ten rounds, by counter and key."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    all_ones = [0xFFFFFFFF] * 6
    for counter_and_key, expected in [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (all_ones, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]:
        words = [torch.tensor([[word]]) for word in counter_and_key]
        assert [int(word) for word in philox(words[:4], words[4:])] == expected


def test_the_distribution_is_gumbels() -> None:
    noise = gumbel_noise_reference(11, 4, 1 << 20).double().numpy()
    expected = np.exp(-np.exp(-np.sort(noise)))
    gap = np.abs(expected - np.linspace(0, 1, len(noise))).max()
    assert gap * np.sqrt(len(noise)) < 1.63  # Kolmogorov's bound at 1 %
    assert noise.max() > 12.0 and np.isfinite(noise).all()
    between_neighbours = np.corrcoef(noise.reshape(-1, 4).T)
    assert np.abs(between_neighbours - np.eye(4)).max() < 0.01


@pytest.mark.parametrize("over", ["ids", "positions", "seeds"])
def test_the_best_of_logit_plus_noise_is_a_draw(over: str) -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.06, 0.03, 0.01])
    logits, num = torch.tensor(probabilities).log(), 600
    if over == "ids":
        noise = gumbel_noise_reference(5, 6, num * 6).reshape(num, 6)
    elif over == "positions":
        noise = torch.stack([gumbel_noise_reference(5, p, 6) for p in range(num)])
    else:
        noise = torch.stack([gumbel_noise_reference(s, 6, 6) for s in range(num)])
    counts = np.bincount((logits + noise).argmax(1).numpy(), minlength=6)
    assert chi_square_excess(counts, probabilities) < 4.0
    assert chi_square_excess(counts, np.full(6, 1 / 6)) > 8.0  # the bound notices a wrong one
