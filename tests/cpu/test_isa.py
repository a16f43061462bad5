"""ISA detection, and the bf16 helpers against their definition."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.expert_reference import bf16_to_f32, f32_to_bf16
from cpu_kernels.isa import LLVM_NAMES, host_isa, isa_from_features

INFINITY = 0x7F80  # in bf16


@pytest.mark.parametrize(
    ("features", "lanes"),
    [
        ({}, 4),
        ({"avx2": True, "fma": True}, 8),
        ({"avx2": True, "avx512f": False}, 8),
        ({"avx2": True, "avx512f": True, "sse9": True}, 16),
    ],
)
def test_lanes_follow_the_widest_vectors(features: dict[str, bool], lanes: int) -> None:
    isa = isa_from_features("AMD64", "znver4", features)
    assert isa.lanes == lanes
    assert isa.is_x86
    assert isa.extensions == {name for name, on in features.items() if on and name != "sse9"}
    assert all(name in isa.summary() for name in isa.extensions)


def test_host_agrees_with_the_kernel() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    for name in ("avx2", "fma", "avx512f", "f16c"):
        assert (name in host_isa().extensions) == (name in flags)
    assert host_isa().extensions <= set(LLVM_NAMES)
    assert "\n" not in host_isa().summary()


def test_every_bf16_survives_the_round_trip() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = bf16_to_f32(bits)
    back = f32_to_bf16(values)
    is_nan = np.isnan(values)
    assert np.array_equal(back[~is_nan], bits[~is_nan])
    assert np.isnan(bf16_to_f32(back[is_nan])).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_picks_the_nearest_and_ties_to_even(value: float) -> None:
    [bits] = f32_to_bf16(np.array([value], np.float32))
    magnitude = int(bits) & 0x7FFF
    near = np.array([max(magnitude - 1, 0), magnitude, min(magnitude + 1, INFINITY)], np.uint16)
    steps = bf16_to_f32(near).astype(np.float64)
    steps[near == INFINITY] = 2.0**128  # Inf stands for the number one step beyond the largest
    errors = np.abs(steps - abs(value))
    assert errors[1] == errors.min()
    is_tie = np.sum(errors == errors.min()) > 1 and magnitude > 0
    assert not is_tie or magnitude % 2 == 0


def test_nan_of_any_payload_stays_nan() -> None:
    payloads = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    assert np.isnan(bf16_to_f32(f32_to_bf16(payloads.view(np.float32)))).all()
