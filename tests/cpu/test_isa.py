"""ISA detection, and the bf16 helpers against their definition."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cpu_kernels.bf16 import bf16_to_f32, f32_to_bf16
from cpu_kernels.isa import (
    LEVELS,
    LLVM_NAMES,
    NEEDS,
    VARIABLE,
    Isa,
    best_level,
    dropped_prefixes,
    host_isa,
    isa_from_features,
    llvm_features,
)

INFINITY = 0x7F80  # in bf16


AVX2 = {"avx2", "fma", "f16c"}
AVXVNNI = AVX2 | {"avxvnni"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}
CASCADE_LAKE = AVX512 | {"avx512vnni"}
SAPPHIRE_RAPIDS = CASCADE_LAKE | {"avxvnni", "avx512bf16", "amx-bf16", "amx-tile", "avx512fp16"}
CPUS = {
    "old": ({"sse2"}, "plain"),
    "without f16c": ({"avx2", "fma"}, "plain"),
    "Haswell": (AVX2, "avx2"),
    "Alder Lake": (AVXVNNI, "avxvnni"),
    "Knights Landing": (AVX2 | {"avx512f"}, "avx2"),
    "Skylake-X": (AVX512, "avx512"),
    "Cascade Lake": (CASCADE_LAKE, "avx512"),
    "Sapphire Rapids": (SAPPHIRE_RAPIDS, "avx512"),
}
ALL_NAMES = sorted({"sse2", "sse9"}.union(*(names for names, _ in CPUS.values())))


def isa_of(names: set[str], forced: str | None = None) -> Isa:
    """LLVM names all features that it knows, and which of them there are."""
    return isa_from_features("AMD64", "znver4", {n: n in names for n in ALL_NAMES}, forced)


@pytest.mark.parametrize("cpu", CPUS)
def test_a_cpu_takes_the_widest_path_that_it_can(cpu: str) -> None:
    names, level = CPUS[cpu]
    isa = isa_of(names)
    assert isa.level == level == best_level(isa.extensions)
    assert isa.lanes == {"plain": 4, "avx2": 8, "avxvnni": 8, "avx512": 16}[level]
    assert isa.machine == "amd64" and isa.is_x86
    assert isa.extensions == {ours for ours, theirs in LLVM_NAMES.items() if theirs in names}
    assert isa_from_features("aarch64", "", {}).level == "plain"


def test_products_of_bytes_and_of_bf16() -> None:
    assert not isa_of(AVX2).has_vnni and isa_of(AVXVNNI).has_vnni
    assert not isa_of(AVX512).has_vnni and isa_of(CASCADE_LAKE).has_vnni
    assert isa_of(SAPPHIRE_RAPIDS).has_bf16 and not isa_of(CASCADE_LAKE).has_bf16
    for level in ("avxvnni", "avx2", "plain"):
        assert not isa_of(SAPPHIRE_RAPIDS, level).has_bf16
        assert isa_of(SAPPHIRE_RAPIDS, level).has_vnni == (level == "avxvnni")


def test_pairs_of_bf16_are_multiplied_on_amd_only() -> None:
    features = dict.fromkeys((LLVM_NAMES[name] for name in LLVM_NAMES), True)
    for cpu, expected in (("znver4", True), ("znver5", True), ("sapphirerapids", False)):
        isa = isa_from_features("x86_64", cpu, features)
        assert isa.has_bf16 and isa.multiplies_pairs == expected


@given(
    names=st.sets(st.sampled_from(ALL_NAMES)), level=st.one_of(st.none(), st.sampled_from(LEVELS))
)
def test_lesser_is_what_is_compiled_for_fewer_features(names: set[str], level: str | None) -> None:
    free = isa_of(names)
    if level is None:
        assert not free.is_lesser
        return
    assume(any(needed <= free.extensions for needed in NEEDS[level]))
    features = {name: name in names for name in ALL_NAMES}
    dropped = dropped_prefixes(free.extensions, level)
    is_same = llvm_features(features, dropped) == llvm_features(features, ())
    assert isa_of(names, level).is_lesser != is_same


@given(names=st.sets(st.sampled_from(ALL_NAMES)), level=st.sampled_from(LEVELS))
def test_a_forced_level_is_taken_or_refused(names: set[str], level: str) -> None:
    free = isa_of(names)
    can = any(needed <= free.extensions for needed in NEEDS[level])
    if not can:
        with pytest.raises(ValueError) as refusal:
            isa_of(names, level)
        assert str(refusal.value) == (
            f"This CPU cannot run FIDDLER_ISA={level}: its best path is {free.level}."
        )
        return
    forced = isa_of(names, level)
    assert forced.level == level
    assert any(needed <= forced.extensions for needed in NEEDS[level])
    # As a CPU that had no more than this would choose, and wider ones are gone.
    assert forced.extensions <= free.extensions
    if level != "avx512":
        assert not forced.extensions & {"amx_bf16", "avx512bf16"}
    if level in ("plain", "avx2"):
        assert best_level(forced.extensions) == level


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError) as refusal:
        isa_of(AVX2, "sse")
    sentence = "FIDDLER_ISA must be one of plain, avx2, avxvnni, avx512, not 'sse'."
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("names", "level", "kept"),
    [
        (SAPPHIRE_RAPIDS, "avx512", SAPPHIRE_RAPIDS),
        (SAPPHIRE_RAPIDS, "avxvnni", AVXVNNI),
        (CASCADE_LAKE, "avxvnni", CASCADE_LAKE),  # its product of bytes is one of AVX-512
        (SAPPHIRE_RAPIDS, "avx2", AVX2),
        (CASCADE_LAKE, "avx2", AVX2),
        (AVX2 | {"sse2"}, "plain", set()),
    ],
)
def test_features_for_llvm(names: set[str], level: str, kept: set[str]) -> None:
    features = {name: name in names for name in ALL_NAMES}
    dropped = dropped_prefixes(isa_of(names).extensions, level)
    words = llvm_features(features, dropped).split(",")
    assert words == sorted(words, key=lambda word: word[1:])
    assert {word[1:] for word in words} == set(ALL_NAMES)  # what is absent is said, too
    assert {word[1:] for word in words if word[0] == "+"} == kept


def test_the_summary_is_one_line_with_all_that_counts() -> None:
    isa = isa_of(SAPPHIRE_RAPIDS)
    assert isa.summary().startswith("znver4: amx_bf16 avx512bf16 ")
    assert all(name in isa.summary() for name in isa.extensions)
    assert isa.summary().endswith("; kernels: avx512, 512-bit vectors")
    assert isa_of(set()).summary() == "znver4: none; kernels: plain, 128-bit vectors"


@pytest.mark.parametrize("level", ["", "plain"])
def test_the_variable_is_read_at_import(level: str) -> None:
    code = "from cpu_kernels.isa import host_isa as h; print(h().level, len(h().extensions))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {VARIABLE: level, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    features = dict(llvm.get_host_cpu_features())
    widest = isa_from_features(platform.machine(), "", features)
    expected = "plain 0" if level else f"{widest.level} {len(widest.extensions)}"
    assert done.stdout.strip() == expected


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
