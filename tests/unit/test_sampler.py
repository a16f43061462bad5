"""The sampler against the documented order restated in numpy, and that against transformers."""

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from fiddler.engine.request import Request
from fiddler.engine.sampler import sample
from fiddler.errors import NumericsError
from fiddler.sampling_params import SamplingParams
from tests.sampling_reference import (
    FILTERS,
    adjusted,
    chi_square_excess,
    distribution,
    margin,
)
from tests.sampling_strategies import some_logits, some_params, some_tokens

EOS = frozenset({3})
NUM_DRAWS = 1200
ACCEPTED = 5.0  # standard deviations; each case also shows that wrong distributions exceed it


def request(
    params: SamplingParams,
    *,
    prompt: list[int] | None = None,
    outputs: list[int] | None = None,
    seed: int = 0,
    index: int = 0,
) -> Request:
    made = Request(prompt_ids=prompt or [0], params=params, max_tokens=100, seed=seed, index=index)
    made.tokens += outputs or []
    return made


def draw_many(logits: list[float], params: SamplingParams, num: int, **texts: Any) -> np.ndarray:
    """Counts of each token over ``num`` requests that differ in their seeds only."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(num, -1)
    tokens = sample(rows, [request(params, seed=s, **texts) for s in range(num)], EOS)
    return np.bincount(tokens, minlength=len(logits))


# --- what can be drawn ---


@settings(max_examples=60)
@given(some_logits, some_params, some_tokens, some_tokens)
def test_only_what_the_filters_keep_is_drawn_and_all_of_it_can_be(
    logits: list[float], params: SamplingParams, prompt: list[int], outputs: list[int]
) -> None:
    texts: dict[str, Any] = {"prompt": prompt, "outputs": outputs}
    assume(margin(logits, params, eos_ids=sorted(EOS), **texts) > 1e-4)
    wanted = distribution(logits, params, eos_ids=sorted(EOS), **texts)
    counts = draw_many(logits, params, 40, **texts)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(wanted))
    # 40 draws miss a token of probability 0.5 once in 1e12
    assert set(np.flatnonzero(wanted > 0.5)) <= set(np.flatnonzero(counts))


@given(some_logits, some_params, some_tokens, some_tokens)
def test_greedy_takes_the_likeliest_after_bias_penalties_and_min_tokens(
    logits: list[float], params: SamplingParams, prompt: list[int], outputs: list[int]
) -> None:
    scores = adjusted(logits, params, prompt=prompt, outputs=outputs, eos_ids=sorted(EOS))
    first, second = np.sort(scores)[::-1][:2]
    assume(first - second > 1e-4)
    greedy = SamplingParams(
        **{f: getattr(params, f) for f in SamplingParams.__dataclass_fields__}
        | {"temperature": 0.0, "top_k": 1}
    )
    counts = draw_many(logits, greedy, 3, prompt=prompt, outputs=outputs)
    assert counts[int(scores.argmax())] == 3


# --- how often it is drawn ---

SPREAD = [2.0, 1.6, 1.1, 0.4, 0.2, -0.3, -1.0, -2.5]
CASES = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.5},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.0, "top_p": 0.6},
    "min_p": {"temperature": 1.0, "min_p": 0.3},
    "all filters": {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.4},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.8},
    "presence": {"temperature": 1.0, "presence_penalty": 1.0},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.7},
    "bias": {"temperature": 1.0, "logit_bias": {0: -2.0, 7: 4.0}},
    "min_tokens": {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": [0]},
}
TEXTS: dict[str, Any] = {"prompt": [0, 5], "outputs": [1, 1, 2]}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_filtered_distribution(name: str) -> None:
    params = SamplingParams(**CASES[name])
    counts = draw_many(SPREAD, params, NUM_DRAWS, **TEXTS)
    wanted = distribution(SPREAD, params, eos_ids=sorted(EOS), **TEXTS)
    assert chi_square_excess(counts, wanted) < ACCEPTED
    if name != "plain":  # the bound would notice a setting without effect
        plain = distribution(SPREAD, SamplingParams(temperature=1.0), **TEXTS)
        assert chi_square_excess(counts, plain) > 2 * ACCEPTED


def test_that_bound_would_notice_another_order_of_the_filters() -> None:
    """In these settings most orders differ; the rest give the documented distribution."""
    params = SamplingParams(temperature=2.0, top_k=5, top_p=0.7, min_p=0.55)
    counts = draw_many(SPREAD, params, 3 * NUM_DRAWS)
    wanted = distribution(SPREAD, params)
    assert chi_square_excess(counts, wanted) < ACCEPTED
    others = [distribution(SPREAD, params, order=o) for o in itertools.permutations(FILTERS)]
    different = [p for p in others if np.abs(p - wanted).max() > 0.02]
    assert len(different) >= 10
    assert all(chi_square_excess(counts, p) > ACCEPTED for p in different)


# --- the restated order is the one of transformers ---


@settings(max_examples=60)
@given(some_logits, some_params, some_tokens, some_tokens)
def test_the_reference_agrees_with_transformers(
    logits: list[float], params: SamplingParams, prompt: list[int], outputs: list[int]
) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    fields = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    params = SamplingParams(**{f: getattr(params, f) for f in fields})
    texts: dict[str, Any] = {"prompt": prompt, "outputs": outputs}
    assume(margin(logits, params, **texts) > 1e-4)
    steps = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
            TemperatureLogitsWarper(params.temperature),
            *([TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []),
            TopPLogitsWarper(params.top_p),
            MinPLogitsWarper(params.min_p),
        ]
    )
    scores = torch.tensor([logits], dtype=torch.float32)
    theirs = steps(torch.tensor([[*prompt, *outputs]]), scores).softmax(dim=-1)[0].numpy()
    np.testing.assert_allclose(distribution(logits, params, **texts), theirs, atol=1e-5)


# --- seeds ---


def random_rows(num: int, vocab: int = 200) -> torch.Tensor:
    return torch.randn(num, vocab, generator=torch.Generator().manual_seed(5))


def test_a_draw_depends_on_seed_sample_and_position_and_not_on_the_batch() -> None:
    params = SamplingParams(temperature=1.0)
    rows = random_rows(40)
    requests = [request(params, seed=s) for s in range(40)]
    together = sample(rows, requests, EOS)
    alone = [sample(rows[i : i + 1], [r], EOS)[0] for i, r in enumerate(requests)]
    assert together == alone
    backwards = sample(rows.flip(0), requests[::-1], EOS)
    assert together == backwards[::-1]


@pytest.mark.parametrize("what", ["seed", "index", "outputs"])
def test_each_of_seed_sample_and_position_changes_the_draw(what: str) -> None:
    params = SamplingParams(temperature=1.0)
    values: list[Any] = list(range(50)) if what != "outputs" else [[0] * n for n in range(50)]
    rows = torch.zeros(50, 1000)
    tokens = sample(rows, [request(params, **{what: value}) for value in values], EOS)
    assert len(set(tokens)) > 40  # 50 of 1000 at random: 48.8 expected


def test_the_first_sample_draws_by_the_seed_and_seeds_of_any_size_do() -> None:
    params = SamplingParams(temperature=1.0)
    assert [request(params, seed=s).draw_seed for s in (0, 5, -5, 2**63, 2**64 + 5)] == [
        *(0, 5, -5, -(2**63), 5)
    ]
    seeds = {request(params, seed=s, index=i).draw_seed for s in range(64) for i in range(64)}
    assert len(seeds) == 64 * 64


def test_what_the_device_drew_holds_unless_logits_are_adjusted() -> None:
    rows = random_rows(3)
    plain, banned = SamplingParams(temperature=0.0), SamplingParams(logit_bias={7: 100.0})
    requests = [request(plain), request(banned), request(plain)]
    assert sample(rows, requests, EOS, [11, 12, 13]) == [11, 7, 13]
    with pytest.raises(NumericsError):
        sample(rows, requests, EOS, [11, 12, -1])


def test_drawing_needs_no_triton() -> None:
    """Which exists on Linux only."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from fiddler.engine.request import Request
from fiddler.engine.sampler import sample
from fiddler.sampling_params import SamplingParams
params = SamplingParams(temperature=1.0, top_p=0.9)
request = Request(prompt_ids=[0], params=params, max_tokens=9, seed=3)
print(sample(torch.zeros(1, 50), [request], frozenset()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = sample(
        torch.zeros(1, 50), [request(SamplingParams(temperature=1.0, top_p=0.9), seed=3)], EOS
    )
    assert done.stdout.strip() == str(expected)


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws() -> None:
    """Settings of all kinds in one batch, of a large vocabulary."""
    rows = torch.randn(24, 151_936, generator=torch.Generator().manual_seed(1)) * 3
    kinds: list[dict[str, Any]] = [
        *({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.6, "top_k": 20}),
        *({"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.3, "min_p": 0.05}),
        {"temperature": 0.8, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.0, "frequency_penalty": 1.0, "logit_bias": {5: 9.0}},
        {"temperature": 0.7, "min_tokens": 9, "stop_token_ids": [1]},
    ]
    requests = [
        request(SamplingParams(**kinds[n % 8]), seed=n, index=n // 8, outputs=[n, 4, 4])
        for n in range(24)
    ]
    found, expected = sample(rows.cuda(), requests, EOS), sample(rows, requests, EOS)
    differing = [(n, kinds[n % 8]) for n in range(24) if found[n] != expected[n]]
    print(f"differ: {differing}")
    assert not differing


# --- numbers at the edge ---


def test_the_given_logits_are_not_changed() -> None:
    rows = random_rows(2)
    before = rows.clone()
    params = SamplingParams(
        temperature=0.7,
        top_k=5,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        min_tokens=5,
        logit_bias={0: 9.0},
    )
    sample(rows, [request(params, outputs=[1]), request(params)], EOS)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_an_error(bad: float) -> None:
    rows = random_rows(3)
    rows[1, 7] = bad
    with pytest.raises(NumericsError, match="NaN or infinite"):
        sample(rows, [request(SamplingParams(temperature=0.0)) for _ in range(3)], EOS)


def test_a_row_with_nothing_finite_is_an_error_and_one_masked_token_is_not() -> None:
    rows = random_rows(1)
    rows[0, 4] = float("-inf")
    params = SamplingParams(temperature=1.0)
    assert sample(rows, [request(params)], EOS) != [4]
    rows[:] = float("-inf")
    with pytest.raises(NumericsError):
        sample(rows, [request(params)], EOS)


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-6])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    rows = random_rows(20) * 30
    requests = [request(SamplingParams(temperature=temperature), seed=s) for s in range(20)]
    assert sample(rows, requests, EOS) == rows.argmax(dim=-1).tolist()


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-5},
        {"temperature": 100.0},
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"repetition_penalty": 1e9},
        {"repetition_penalty": 1e-9},
        {"logit_bias": {0: 100.0, 1: -100.0}},
    ],
    ids=str,
)
def test_the_largest_and_smallest_settings_draw_what_the_reference_allows(
    extreme: dict[str, Any],
) -> None:
    params = SamplingParams(**{"temperature": 1.0} | extreme)
    counts = draw_many(SPREAD, params, 30, prompt=[0, 3, 6])
    wanted = distribution(SPREAD, params, prompt=[0, 3, 6])
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(wanted))


def test_an_end_token_beyond_the_vocabulary_is_no_error() -> None:
    rows = random_rows(1, vocab=8)
    params = SamplingParams(temperature=0.0, min_tokens=3)
    assert sample(rows, [request(params)], frozenset({8, 5000})) == [int(rows.argmax())]
