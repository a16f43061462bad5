"""Every sampling setting and every extra output, end to end, against transformers' own logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiddler import LLM, SamplingParams
from tests.e2e.conftest import OpenModel, open_folder
from tests.forward import random_texts
from tests.oracle import oracle_experts, oracle_greedy, oracle_logits, oracle_logprobs
from tests.sampling_reference import adjusted, chi_square_excess, distribution
from tests.tiny_models import EOS_ID, MODEL_TYPES, VOCAB_SIZE, make_tiny, shared_tiny

[PROMPT] = random_texts([21], VOCAB_SIZE, seed=8)


def mixtral() -> Path:
    """Built at first use, not while tests are collected."""
    return shared_tiny("mixtral")


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True} | fields)


def tokens_of(llm: LLM, params: SamplingParams) -> list[int]:
    return llm.generate(PROMPT, params).outputs[0].token_ids


@pytest.fixture(scope="module")
def llm(model: OpenModel) -> LLM:
    return model("mixtral")


# --- draws ---


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.4},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_first_tokens_follow_the_distribution_of_transformers(
    model: OpenModel, fields: dict[str, Any]
) -> None:
    llm = model("mixtral", max_num_seqs=256)
    params = SamplingParams(n=1000, max_tokens=1, seed=11, **fields)
    drawn = [output.token_ids[0] for output in llm.generate(PROMPT, params).outputs]
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)
    logits = oracle_logits(mixtral(), PROMPT)[-1].tolist()
    wanted = distribution(logits, params, prompt=PROMPT)
    assert chi_square_excess(counts, wanted) < 5
    # the bound would notice: the settings change the distribution by far more
    plain = distribution(logits, SamplingParams(temperature=1.0))
    assert chi_square_excess(counts, plain) > 10


def test_greedy_ignores_the_filters_and_the_seed(llm: LLM) -> None:
    assert tokens_of(llm, greedy(top_k=3, top_p=0.2, min_p=0.9, seed=4)) == tokens_of(llm, greedy())


# --- penalties and bias, greedily, so that every step can be checked ---


@pytest.mark.parametrize("penalty", [0.6, 1.3, 2.5])
def test_repetition_penalty_is_that_of_transformers(llm: LLM, penalty: float) -> None:
    wanted = oracle_greedy(mixtral(), PROMPT, 16, repetition_penalty=penalty)
    assert tokens_of(llm, greedy(repetition_penalty=penalty)) == wanted
    assert wanted != tokens_of(llm, greedy())


FEW = dict.fromkeys(range(20, 25), 100.0)  # five tokens to choose from, so that they come again


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2.0},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -1.0},
        {"logit_bias": {20: 97.0, 21: 98.5, 22: 100.0, 23: 90.0}},
        {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.2},
        {"min_tokens": 9, "stop_token_ids": (20, 23), "ignore_eos": False},
    ],
    ids=str,
)
def test_every_greedy_step_is_the_best_by_the_restated_order(
    llm: LLM, fields: dict[str, Any]
) -> None:
    params = greedy(**{"logit_bias": FEW} | fields)
    output = llm.generate(PROMPT, params).outputs[0].token_ids
    logits = oracle_logits(mixtral(), [*PROMPT, *output])
    for i, token in enumerate(output):
        row = logits[len(PROMPT) + i - 1].tolist()
        scores = adjusted(row, params, prompt=PROMPT, outputs=output[:i], eos_ids=[EOS_ID])
        assert scores[token] > scores.max() - 1e-3
    assert output != tokens_of(llm, greedy(logit_bias=FEW)), "the setting had no effect"


# --- seeds ---


def sampled(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "ignore_eos": True} | fields)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(llm: LLM) -> None:
    first = tokens_of(llm, sampled(seed=1))
    assert tokens_of(llm, sampled(seed=1)) == first
    others = [tokens_of(llm, sampled(seed=s)) for s in range(2, 8)]
    assert len({tuple(t) for t in [first, *others]}) == 7


def test_without_a_seed_every_request_differs_and_a_new_model_repeats_them() -> None:
    def three(seed: int) -> list[list[int]]:
        with open_folder(mixtral(), seed=seed) as llm:
            return [tokens_of(llm, sampled()) for _ in range(3)]

    runs = three(0)
    assert len({tuple(t) for t in runs}) == 3
    assert three(0) == runs
    assert three(1) != runs


def test_samples_of_one_prompt_differ_and_are_those_of_the_seed(llm: LLM) -> None:
    result = llm.generate(PROMPT, sampled(n=5, seed=3))
    assert [output.index for output in result.outputs] == [0, 1, 2, 3, 4]
    texts = [output.token_ids for output in result.outputs]
    assert len({tuple(t) for t in texts}) == 5
    assert texts[0] == tokens_of(llm, sampled(seed=3)), "n changes the first sample"
    again = llm.generate(PROMPT, sampled(n=5, seed=3))
    assert [output.token_ids for output in again.outputs] == texts
    assert result.stats.output_tokens == 5 * 12


def test_greedy_samples_are_all_the_same(llm: LLM) -> None:
    outputs = llm.generate(PROMPT, greedy(n=4)).outputs
    assert [output.token_ids for output in outputs] == [tokens_of(llm, greedy())] * 4


def test_more_samples_than_run_at_once(model: OpenModel) -> None:
    llm = model("mixtral", max_num_seqs=2)
    outputs = llm.generate(PROMPT, sampled(n=7, seed=3)).outputs
    wanted = model("mixtral").generate(PROMPT, sampled(n=7, seed=3)).outputs
    assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]


# --- log-probabilities ---


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logprobs_are_the_models_own(model: OpenModel, model_type: str) -> None:
    """Of the text and of the prompt, under settings that change what is drawn but not these."""
    llm = model(model_type)
    params = sampled(seed=5, temperature=1.8, repetition_penalty=1.5, logprobs=4, prompt_logprobs=2)
    result = llm.generate(PROMPT, params)
    [output] = result.outputs
    wanted = oracle_logprobs(shared_tiny(model_type), [*PROMPT, *output.token_ids]).numpy()
    assert result.prompt_logprobs is not None and output.logprobs is not None
    assert len(result.prompt_logprobs) == len(PROMPT) and result.prompt_logprobs[0] is None
    assert len(output.logprobs) == len(output.token_ids)
    rows = [*result.prompt_logprobs[1:], *output.logprobs]
    targets = [*PROMPT[1:], *output.token_ids]
    for position, (row, target) in enumerate(zip(rows, targets, strict=True)):
        assert row is not None and target in row
        num_top = 2 if position < len(PROMPT) - 1 else 4
        assert len(row) == num_top + (row[target].rank > num_top)
        for token, entry in row.items():
            assert entry.logprob == pytest.approx(wanted[position, token], abs=1e-4)
            assert abs((wanted[position] > wanted[position, token]).sum() + 1 - entry.rank) <= 1
            assert entry.decoded_token == llm.tokenizer.decode([token], skip_special_tokens=False)
    total = sum(wanted[len(PROMPT) - 1 + i, token] for i, token in enumerate(output.token_ids))
    assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_logprobs_of_zero_give_the_chosen_tokens_alone(llm: LLM) -> None:
    result = llm.generate(PROMPT, greedy(logprobs=0, prompt_logprobs=0))
    [output] = result.outputs
    assert output.logprobs is not None and result.prompt_logprobs is not None
    assert [list(row) for row in output.logprobs] == [[t] for t in output.token_ids]
    assert [list(row) for row in result.prompt_logprobs[1:] if row] == [[t] for t in PROMPT[1:]]


def test_prompt_logprobs_do_not_come_from_the_prefix_cache(llm: LLM) -> None:
    first = llm.generate(PROMPT, greedy(prompt_logprobs=1))
    again = llm.generate(PROMPT, greedy(prompt_logprobs=1))
    assert again.stats.prompt_tokens_cached == 0
    assert again.prompt_logprobs == first.prompt_logprobs


# --- routed experts ---


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_routed_experts_are_the_routers_choices(model: OpenModel, model_type: str) -> None:
    llm = model(model_type)
    [output] = llm.generate(PROMPT, greedy(routed_experts=True)).outputs
    config = llm.model_config
    routed = output.routed_experts
    assert isinstance(routed, np.ndarray) and routed.dtype == np.int16
    num_computed = len(PROMPT) + len(output.token_ids) - 1
    assert routed.shape == (num_computed, config.num_layers, config.top_k)
    text = [*PROMPT, *output.token_ids][:num_computed]
    wanted = iter(oracle_experts(shared_tiny(model_type), text, config.top_k))
    for layer in range(config.num_layers):
        if not config.is_moe_layer(layer):
            assert (routed[:, layer] == -1).all()
            continue
        assert [set(row) for row in routed[:, layer].tolist()] == next(wanted)
    assert next(wanted, None) is None
    assert (model_type == "qwen2_moe") == bool((routed == -1).any())


def test_routed_experts_add_up_to_the_counts() -> None:
    with open_folder(mixtral()) as llm:
        [output] = llm.generate(PROMPT, greedy(routed_experts=True)).outputs
        routed = np.asarray(output.routed_experts)
        counts = [np.bincount(routed[:, layer].ravel(), minlength=8) for layer in range(3)]
        assert llm.expert_counts() == np.array(counts).tolist()


def test_each_sample_brings_its_own_routing(llm: LLM) -> None:
    outputs = llm.generate(PROMPT, sampled(n=3, seed=1, routed_experts=True)).outputs
    routed = [np.asarray(output.routed_experts) for output in outputs]
    assert all((r[: len(PROMPT)] == routed[0][: len(PROMPT)]).all() for r in routed)
    assert not all((r == routed[0]).all() for r in routed)


# --- the model's own settings ---


def test_generation_config_fills_in_what_is_not_set(tmp_path: Any) -> None:
    folder = make_tiny("mixtral", tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": [256, 9]}')
    with open_folder(folder) as llm:
        assert llm.default_params().temperature == 0.0
        plain = SamplingParams(max_tokens=8, ignore_eos=True)
        assert tokens_of(llm, plain) == oracle_greedy(mixtral(), PROMPT, 8)
        # the second end token of the file ends a text as well
        ended = llm.generate(PROMPT, SamplingParams(logit_bias={9: 100.0})).outputs[0]
        assert (ended.token_ids, ended.finish_reason) == ([9], "stop")
