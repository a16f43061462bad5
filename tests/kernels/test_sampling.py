"""Sampling against its reference, token by token, by every way through the kernels."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE
from sampling_case import make_logits, make_settings, seeded
from torch import Tensor

from gpu_kernels import checks
from gpu_kernels.sampling import (
    LogitBias,
    Penalties,
    SamplingScratch,
    sample,
    sample_reference,
)
from gpu_kernels.token_counts import fill_counts

VOCAB = 2100  # a whole tile, and some groups of another

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_k": 3, "top_p": 0.1},
    {"temperature": 0.7},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"top_p": 0.9},
    {"temperature": 1.5, "top_k": 5},
    {"min_p": 0.1},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 400, "top_p": 0.99},
    {"temperature": 3.0, "top_k": 1, "min_p": 1.0},
    {"temperature": 8.0, "top_p": 0.02},
]


def mixed(position: int = 0) -> list[dict[str, Any]]:
    return [row | {"seed": 100 + i, "position": position} for i, row in enumerate(MIXED)]


@pytest.mark.parametrize(("vocab", "spread"), [(VOCAB, 3.0), (50, 1.0), (300, 0.3)])
def test_equals_sorting(vocab: int, spread: float) -> None:
    logits_BV, rows = make_logits(len(MIXED), vocab, spread=spread), make_settings(mixed())
    assert torch.equal(sample(logits_BV, rows), sample_reference(logits_BV, rows))


some_rows = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.25, 20, width=32),
        "top_k": st.sampled_from([-1, 0, 1, 2, 3, 7, 40, 2099, 2100, 2**31 - 1]),
        "top_p": st.sampled_from([1e-9, 0.01, 0.3, 0.7, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.4, 1.0]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "position": st.integers(0, 2**31),
    }
)


@settings(max_examples=6)
@given(st.lists(some_rows, min_size=2, max_size=2), st.integers(0, 99), st.sampled_from([0.5, 4.0]))
def test_any_settings_equal_sorting(rows: list[dict[str, Any]], seed: int, spread: float) -> None:
    logits_BV = make_logits(2, VOCAB, spread=spread, seed=seed)
    # few large logits, many of them equal, so that draws are near the edges of what is kept
    logits_BV = logits_BV.round()
    wanted = make_settings(rows)
    for row in range(2):
        assume(has_margin(logits_BV[row], rows[row]))
    assert torch.equal(sample(logits_BV, wanted), sample_reference(logits_BV, wanted))


def has_margin(logits_V: Tensor, row: dict[str, Any]) -> bool:
    """Whether no partial sum of the mass is top_p up to rounding."""
    if row["top_p"] == 1.0:
        return True
    kept = row["top_k"] if 0 < row["top_k"] < len(logits_V) else len(logits_V)
    z_V = logits_V.double().sort(descending=True).values[:kept] / row["temperature"]
    return bool((z_V.softmax(0).cumsum(0) - row["top_p"]).abs().min() > 1e-6)


def test_bias_and_counts_reach_every_tile_and_only_their_request() -> None:
    logits_BV = make_logits(5, VOCAB, spread=0.1)
    logits_BV[4, [2098, 5]] = torch.tensor([3.0, 2.0], device=DEVICE)
    ids_BN = torch.tensor([[2090, 3, 2090], *[[-1, 5, 5]] * 2, [5000, 2099, -1], [-1, 5, 5]])
    values_BN = torch.tensor([[4.0, 6.0, 5.0], *[[9.0] * 3] * 2, [99.0, 8.0, 50.0], [9.0] * 3])
    counts_SV = torch.zeros(3, VOCAB, dtype=torch.int16, device=DEVICE)
    prompt_ids_N = torch.tensor([2098], device=DEVICE)
    for counts_V, outputs in zip(counts_SV, ([2095, 2096, 2096], [2097], []), strict=True):
        fill_counts(counts_V, prompt_ids_N, torch.tensor(outputs, device=DEVICE).long())
    ones_B = torch.ones(5, device=DEVICE)
    given_: dict[str, Any] = {
        "settings": make_settings([{"temperature": 0.0}] * 5),
        "bias": LogitBias(ids_BN.to(DEVICE, torch.int32), values_BN.to(DEVICE)),
        "penalties": Penalties(
            ones_B * 2,
            ones_B * -3,
            ones_B * -2,
            torch.tensor([-1, 1, 0, -1, 2], dtype=torch.int32, device=DEVICE),
            counts_SV,
        ),
    }
    tokens = sample(logits_BV, **given_).tolist()
    assert tokens == [2090, 2097, 2096, 2099, 5] == sample_reference(logits_BV, **given_).tolist()


@pytest.mark.parametrize("kept", [{"top_k": 6}, {"top_p": 0.04}, {"min_p": 0.45}], ids=str)
def test_a_dropped_first_choice_is_followed_by_the_best_that_is_kept(kept: dict[str, Any]) -> None:
    logits_BV = torch.full((4, 300), -0.9, device=DEVICE)
    logits_BV[:, :128] = -2.0  # a group that nobody has to read
    logits_BV[:, 130:292:18] = torch.arange(9, device=DEVICE) * -0.13
    rows = make_settings(seeded(kept, 4))
    tokens = sample(logits_BV, rows)
    assert torch.equal(tokens, sample_reference(logits_BV, rows))
    assert (tokens != sample(logits_BV, make_settings(seeded({}, 4)))).sum() >= 3


# --- the draw depends on nothing else ---


def test_neither_the_batch_nor_the_scratch_changes_a_draw() -> None:
    logits_BV, rows = make_logits(5, 300), mixed(position=9)[2:7]
    together = sample(logits_BV, make_settings(rows))
    scratch = SamplingScratch.for_batch(16, 300, DEVICE)
    for name in SamplingScratch.__dataclass_fields__:
        getattr(scratch, name).fill_(-7)
    scratch.scaled_BP.fill_(float("nan"))
    order = [4, 0, 1]
    out = torch.full((3,), -9, dtype=torch.int32, device=DEVICE)
    chosen = make_settings([rows[i] for i in order])
    assert sample(logits_BV[order], chosen, scratch=scratch, out=out) is out
    assert out.tolist() == together[order].tolist()


@pytest.mark.parametrize("what", ["seed", "position"])
def test_seed_and_position_change_the_draw(what: str) -> None:
    logits_BV = torch.zeros(12, 1000, device=DEVICE)
    tokens = sample(logits_BV, make_settings([{what: value} for value in range(12)]))
    assert len(tokens.unique()) >= 10


# --- numbers at the edge ---


@pytest.mark.parametrize("row", [{}, {"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.5}])
def test_a_bad_row_gives_minus_one_and_leaves_the_others_alone(row: dict[str, Any]) -> None:
    logits_BV = make_logits(6, 300)
    logits_BV[5] = logits_BV[4]
    wanted = make_settings([row] * 6)
    good = sample(logits_BV[4:5], make_settings([row]))
    logits_BV[0, 299] = float("nan")
    logits_BV[1, 7] = float("inf")
    logits_BV[2] = float("-inf")
    logits_BV[3] = float("nan")
    logits_BV[5, 5:] = float("-inf")
    tokens = sample(logits_BV, wanted)
    assert tokens[:4].tolist() == [-1] * 4 and tokens[4] == good[0]
    assert 0 <= tokens[5] < 5
    assert torch.equal(tokens, sample_reference(logits_BV, wanted))


def test_equal_logits_rank_by_id() -> None:
    logits_BV = torch.zeros(3, 150, device=DEVICE)
    filters: list[dict[str, Any]] = [
        {"top_k": 3},
        {"top_p": 2.5 / 150},
        {"top_k": 4, "top_p": 0.74},
    ]
    rows = [f | {"seed": 3 * i} for i, f in enumerate(filters)]
    tokens = sample(logits_BV, make_settings(rows))
    assert set(tokens.tolist()) <= {0, 1, 2}
    assert torch.equal(tokens, sample_reference(logits_BV, make_settings(rows)))
    zeros_BV = torch.tensor([[-1.0, -0.0, 0.0, -0.0]], device=DEVICE)
    assert sample(zeros_BV, make_settings([{"temperature": 0.0}])).tolist() == [1]


@pytest.mark.parametrize("offset", [-1e5, 1e5])
def test_large_logits(offset: float) -> None:
    logits_BV = make_logits(5, 200, spread=1000.0) + offset
    rows = make_settings(mixed()[:5])
    assert torch.equal(sample(logits_BV, rows), sample_reference(logits_BV, rows))


def test_half_and_strided_logits_which_stay_as_they_are() -> None:
    fused = make_logits(4, 300).half()
    logits_BV = fused[::2, 10:211]
    before = fused.clone()
    rows = make_settings(mixed()[2:4])
    assert torch.equal(sample(logits_BV, rows), sample(logits_BV.float().contiguous(), rows))
    assert torch.equal(fused, before)


def test_no_requests() -> None:
    assert sample(make_logits(1, 8)[:0], make_settings([])).shape == (0,)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV, rows = make_logits(2, 8), make_settings(mixed()[:2])
    bias = LogitBias(
        torch.zeros(1, 3, dtype=torch.int32, device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    )
    ones_B = torch.ones(2, device=DEVICE)
    slot_B = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    counts_SV = torch.zeros(3, 8, dtype=torch.int16, device=DEVICE)
    penalties = Penalties(ones_B, ones_B, ones_B, slot_B, counts_SV)
    for bad in [
        {"logits_BV": logits_BV.double()},
        {"logits_BV": logits_BV.T},
        {"logits_BV": logits_BV[:1]},
        {"bias": bias},
        {"penalties": replace(penalties, counts_SV=counts_SV[:, :7])},
        {"out": torch.zeros(2, device=DEVICE)},
        {"scratch": SamplingScratch.for_batch(1, 8, DEVICE)},
        {"scratch": SamplingScratch.for_batch(2, 4096, DEVICE)},
    ]:
        with pytest.raises(AssertionError):
            sample(**({"logits_BV": logits_BV, "settings": rows} | bad))
    for wrong in ({"top_k_B": rows.top_k_B.long()}, {"min_p_B": rows.min_p_B[:1]}):
        with pytest.raises(AssertionError):
            replace(rows, **wrong)
    monkeypatch.setattr(checks, "enabled", lambda: True)
    with pytest.raises(ValueError, match=r"slot_B must lie in -1\.\.2, but holds 3"):
        sample(logits_BV, rows, penalties=penalties)


# --- on the GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("vocab", [32000, 151936, 262144])
def test_large_vocabularies_on_the_gpu(vocab: int, spread: float, dtype: torch.dtype) -> None:
    for seed in range(4):
        logits_BV = make_logits(len(MIXED), vocab, spread=spread, seed=seed).to(dtype)
        rows = make_settings(mixed(position=seed))
        tokens = sample(logits_BV, rows)
        assert torch.equal(tokens, sample(logits_BV, rows))
        assert torch.equal(tokens, sample_reference(logits_BV, rows))


@pytest.mark.gpu
def test_a_captured_graph_sees_new_logits_and_settings() -> None:
    logits_BV, rows = make_logits(len(MIXED), 50000), make_settings(mixed())
    scratch = SamplingScratch.for_batch(len(MIXED), 50000, DEVICE)
    out = torch.empty(len(MIXED), dtype=torch.int64, device=DEVICE)
    sample(logits_BV, rows, scratch=scratch, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(logits_BV, rows, scratch=scratch, out=out)
    for step in range(1, 4):
        logits_BV.copy_(make_logits(len(MIXED), 50000, seed=step))
        rows.position_B.fill_(step)
        rows.top_k_B.copy_(rows.top_k_B.roll(1))
        graph.replay()
        assert torch.equal(out, sample_reference(logits_BV, rows))
