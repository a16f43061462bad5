"""A request's result is its own: not the batch's, the chunks', the page pool's or the cache's."""

from typing import Any

import pytest

from fiddler import LLM, RequestOutput, SamplingParams
from tests.e2e.conftest import OpenModel
from tests.forward import random_texts
from tests.oracle import oracle_greedy
from tests.tiny_models import EOS_ID, MODEL_TYPES, VOCAB_SIZE, shared_tiny

LENGTHS = [1, 16, 5, 60, 33, 17, 2, 48]
PROMPTS = random_texts(LENGTHS, VOCAB_SIZE, seed=21)
MIXED = [
    SamplingParams(**{"max_tokens": 20, "ignore_eos": True} | fields)
    for fields in (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1, "logprobs": 2},
        {"temperature": 0.7, "seed": 2, "top_k": 9, "max_tokens": 5},
        {"temperature": 1.2, "seed": 3, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.0, "prompt_logprobs": 1, "max_tokens": 1},
        {"temperature": 1.0, "seed": 4, "logit_bias": {EOS_ID: 7.0}, "ignore_eos": False},
        {"temperature": 0.9, "seed": 5, "n": 3, "frequency_penalty": 1.0},
        {"temperature": 0.0, "routed_experts": True, "stop": ["e", "a"]},
    )
]


def solo(llm: LLM) -> list[RequestOutput]:
    return [llm.generate(p, s) for p, s in zip(PROMPTS, MIXED, strict=True)]


def assert_same(found: list[RequestOutput], wanted: list[RequestOutput]) -> None:
    """All but the times and the prefix cache's share."""
    for one, other in zip(found, wanted, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        assert_close(one.prompt_logprobs, other.prompt_logprobs)
        for a, b in zip(one.outputs, other.outputs, strict=True):
            assert (a.index, a.text, a.token_ids) == (b.index, b.text, b.token_ids)
            assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
            assert_close(a.logprobs, b.logprobs)
            assert (a.routed_experts is None) == (b.routed_experts is None)
            assert a.routed_experts is None or (a.routed_experts == b.routed_experts).all()  # type: ignore[attr-defined]


def assert_close(found: Any, wanted: Any) -> None:
    assert (found is None) == (wanted is None)
    for one, other in zip(found or [], wanted or [], strict=True):
        assert (one is None) == (other is None)
        assert set(one or {}) == set(other or {})
        for token, entry in (one or {}).items():
            assert entry.logprob == pytest.approx(other[token].logprob, abs=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_ragged_batch_with_mixed_settings_equals_its_solo_runs(
    model: OpenModel, model_type: str
) -> None:
    llm = model(model_type)
    wanted = solo(llm)
    assert_same(llm.generate(PROMPTS, MIXED), wanted)
    backwards = llm.generate(PROMPTS[::-1], MIXED[::-1])
    assert_same(backwards[::-1], wanted)
    # not vacuous: the settings gave different ends and texts
    assert {o.finish_reason for r in wanted for o in r.outputs} == {"length", "stop"}


@pytest.mark.parametrize(
    "options",
    [
        {"max_batched_tokens": 1, "max_num_seqs": 1},
        {"max_batched_tokens": 7, "max_num_seqs": 3},
        {"max_batched_tokens": 33},
        {"max_num_seqs": 2},
        {"prefix_caching": False},
        {"prefix_caching": False, "max_batched_tokens": 5, "max_num_seqs": 4},
    ],
    ids=str,
)
def test_chunks_slots_and_the_cache_change_no_result(
    model: OpenModel, options: dict[str, Any]
) -> None:
    found = model("mixtral", **options).generate(PROMPTS, MIXED)
    assert_same(found, model("mixtral").generate(PROMPTS, MIXED))


def pool_of_one_context(model: OpenModel, context: int, **options: Any) -> LLM:
    """A model whose pages hold one request of ``context`` tokens, whatever else is running."""
    roomy = model("mixtral", max_model_len=context, vram_gb=1, **options)
    memory, pages = roomy.plan.memory, -(-context // roomy.plan.page_size)
    kv_bytes = memory.kv // roomy.plan.num_pages * pages
    vram_gb = (memory.dense + memory.workspace + kv_bytes) / 2**30
    tight = model("mixtral", max_model_len=context, vram_gb=vram_gb, **options)
    assert tight.plan.num_pages == pages < roomy.plan.num_pages
    return tight


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_no_result(model: OpenModel, prefix_caching: bool) -> None:
    """Five requests that together need four times the pages; seeds survive, logprobs as well."""
    llm = pool_of_one_context(model, 64, prefix_caching=prefix_caching)
    prompts = random_texts([20, 33, 1, 30, 15], VOCAB_SIZE, seed=4)
    params = [
        SamplingParams(
            temperature=1.0 if i % 2 else 0.0,
            seed=i,
            max_tokens=30,
            ignore_eos=True,
            logprobs=1,
            prompt_logprobs=0 if i == 1 else None,
            routed_experts=i == 3,
        )
        for i in range(5)
    ]
    found = llm.generate(prompts, params)
    assert_same(found, model("mixtral").generate(prompts, params))
    assert found[0].outputs[0].token_ids == oracle_greedy(shared_tiny("mixtral"), prompts[0], 30)
    # it happened: preempted tokens were computed again
    config = llm.model_config
    once = sum(len(p) + 30 - 1 for p in prompts) * config.top_k * config.num_layers
    computed = sum(r.stats.expert_tokens_cpu + r.stats.expert_tokens_gpu for r in found)
    assert computed > once


def test_preempted_samples_of_one_prompt_are_the_same(model: OpenModel) -> None:
    llm = pool_of_one_context(model, 64)
    params = SamplingParams(n=4, temperature=1.0, seed=9, max_tokens=40, ignore_eos=True)
    found = llm.generate(PROMPTS[5], params)
    assert_same([found], [model("mixtral").generate(PROMPTS[5], params)])


def test_a_full_pool_of_cached_text_gives_way(model: OpenModel) -> None:
    """Each prompt needs every page, so each must evict the text before it."""
    llm = pool_of_one_context(model, 64)
    for prompt in random_texts([63, 52, 63, 40], VOCAB_SIZE, seed=6):
        num = 64 - len(prompt)
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        output = llm.generate(prompt, params).outputs[0]
        assert output.token_ids == oracle_greedy(shared_tiny("mixtral"), prompt, num)


def test_cancelled_requests_leave_room_for_a_whole_context(model: OpenModel) -> None:
    """A page that nobody gave back would be missing: the last request needs them all."""
    llm = pool_of_one_context(model, 64)
    for i, prompt in enumerate(random_texts([30, 1, 40, 17, 60], VOCAB_SIZE, seed=7)):
        settings = SamplingParams(n=3, seed=i, max_tokens=20, ignore_eos=True)
        with llm.stream(prompt, settings) as stream, llm.stream(prompt[:-1] or [3]) as other:
            for _ in range(3 * i):
                next(stream)
            next(other)
    [prompt] = random_texts([52], VOCAB_SIZE, seed=8)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    output = llm.generate(prompt, params).outputs[0]
    assert output.token_ids == oracle_greedy(shared_tiny("mixtral"), prompt, 12)
