"""Sampling's reference against the documented order restated in float64, and penalties with it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE
from sampling_case import make_settings, seeded
from torch import Tensor

from fiddler.sampling_params import SamplingParams
from gpu_kernels.sampling import LogitBias, Penalties, sample, sample_reference
from gpu_kernels.sampling_reference import adjusted_reference, kept_reference
from gpu_kernels.token_counts import fill_counts
from tests.sampling_reference import adjusted, chi_square_excess, distribution, margin
from tests.sampling_strategies import some_logits, some_params, some_tokens

EOS = [3]


def device_inputs(
    params: SamplingParams, vocab: int, prompt: list[int], outputs: list[int]
) -> dict[str, Any]:
    """A request's settings as the kernels take them, with bans in its logit bias."""
    numbers = {n: getattr(params, n) for n in ("temperature", "top_k", "top_p", "min_p")}
    values = dict(params.logit_bias)
    if len(outputs) < params.min_tokens:
        values |= dict.fromkeys([*EOS, *params.stop_token_ids], float("-inf"))
    counts_SV = torch.zeros(1, vocab, dtype=torch.int16, device=DEVICE)
    fill_counts(counts_SV[0], *(torch.tensor(t, device=DEVICE) for t in (prompt, outputs)))
    penalties = (
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    return {
        "settings": make_settings([numbers]),
        "penalties": Penalties(
            *(torch.tensor([p], device=DEVICE) for p in penalties),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
            counts_SV,
        ),
        "bias": LogitBias(
            torch.tensor([[*values, -1]], dtype=torch.int32, device=DEVICE),
            torch.tensor([[*values.values(), 0.0]], device=DEVICE),
        ),
    }


@settings(max_examples=60)
@given(some_logits, some_params, some_tokens, some_tokens)
def test_the_reference_keeps_what_is_documented(
    logits: list[float], params: SamplingParams, prompt: list[int], outputs: list[int]
) -> None:
    texts: dict[str, Any] = {"prompt": prompt, "outputs": outputs, "eos_ids": EOS}
    assume(margin(logits, params, **texts) > 1e-4)
    given_ = device_inputs(params, len(logits), prompt, outputs)
    x_V = adjusted_reference(
        torch.tensor([logits], device=DEVICE), 0, given_["penalties"], given_["bias"]
    )
    np.testing.assert_allclose(x_V.cpu(), adjusted(logits, params, **texts), atol=1e-5)
    kept_V = kept_reference(x_V, given_["settings"], 0)
    assert kept_V.tolist() == (distribution(logits, params, **texts) > 0).tolist()


def test_only_tokens_that_cannot_be_kept_are_left_unsorted() -> None:
    """Against sorting all of them, for steep and flat logits and filters of any strength."""
    rng = np.random.default_rng(4)
    for spread in (0.0, 0.01, 1.0, 5.0):
        x_V = torch.from_numpy(spread * rng.standard_normal(3000, np.float32)).to(DEVICE)
        for _ in range(40):
            top_k = int(rng.choice([0, 1, 7, 2999, 3000]))
            top_p = float(rng.choice([1e-9, 0.3, 0.9, 0.9999, 1.0]))
            row = {"top_k": top_k, "top_p": top_p, "min_p": float(rng.choice([0.0, 1e-4, 0.3, 1]))}
            kept_V = kept_reference(x_V, make_settings([row]), 0).cpu().numpy()
            z_V = x_V.cpu().numpy().astype(np.float64)
            order_V = np.argsort(-z_V, kind="stable")[: top_k or 3000]
            probs_V = np.exp(z_V[order_V] - z_V.max())
            before_V = np.cumsum(probs_V) - probs_V
            wanted_V = (before_V < top_p * probs_V.sum()) & (probs_V >= row["min_p"])
            wanted_V[0] = True
            assert abs(int(kept_V.sum()) - int(wanted_V.sum())) <= 2, (spread, row)  # rounding
            assert kept_V[order_V][wanted_V][:-2].all()


@settings(max_examples=10)
@given(some_logits, some_params, some_tokens, some_tokens, st.booleans())
def test_penalties_and_bias_equal_the_reference(
    logits: list[float],
    params: SamplingParams,
    prompt: list[int],
    outputs: list[int],
    is_greedy: bool,
) -> None:
    assume(margin(logits, params, prompt=prompt, outputs=outputs, eos_ids=EOS) > 1e-4)
    given_ = device_inputs(params, len(logits), prompt, outputs)
    if is_greedy:
        given_["settings"] = make_settings([{"temperature": 1e-6}])
    logits_BV = torch.tensor([logits], device=DEVICE)
    assert torch.equal(sample(logits_BV, **given_), sample_reference(logits_BV, **given_))


FILTERS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.6},
    "top_p": {"top_p": 0.6},
    "all": {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.4},
}


def check_distribution(name: str, draw: Callable[..., Tensor], num: int) -> None:
    logits = [2.0, 1.6, 1.1, 0.4, 0.2, -0.3, -1.0, -2.5]
    logits_BV = torch.tensor([logits], device=DEVICE).expand(num, -1)
    tokens = draw(logits_BV, make_settings(seeded(FILTERS[name], num)))
    counts = np.bincount(tokens.cpu().numpy(), minlength=len(logits))
    params = SamplingParams(**({"temperature": 1.0} | FILTERS[name]))
    assert chi_square_excess(counts, distribution(logits, params)) < 4.0
    other = distribution(logits, SamplingParams(temperature=1.0))
    assert chi_square_excess(counts, other) > 8.0  # the bound would notice a missing filter


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution(name: str) -> None:
    """Of the reference, which the kernels equal token by token: the interpreter is slow."""
    check_distribution(name, sample_reference, 600)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution_on_the_gpu(name: str) -> None:
    check_distribution(name, sample, 20000)
