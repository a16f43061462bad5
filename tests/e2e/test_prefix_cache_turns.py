"""What the prefix cache saves: a conversation's turn computes its new tokens only."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler import LLM, SamplingParams
from tests.e2e.conftest import OpenModel
from tests.forward import random_texts
from tests.oracle import oracle_greedy
from tests.tiny_models import VOCAB_SIZE, shared_tiny

LETTERS = dict.fromkeys(range(32, 90), 100.0)  # ids whose text is one printable character


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


fresh_seeds = itertools.count(1000)  # what an earlier example said must not be in the cache
turns = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 20)),  # new tokens of the user, of the reply
    min_size=2,
    max_size=5,
)


@settings(max_examples=10)
@given(turns)
def test_a_turn_computes_only_its_new_tokens(
    model: OpenModel, turns: list[tuple[int, int]]
) -> None:
    """Whatever the page boundaries. The last token of a reply was sampled, but never computed."""
    llm = model("mixtral")
    asked = random_texts([size for size, _ in turns], VOCAB_SIZE, seed=next(fresh_seeds))
    so_far: list[int] = []
    for turn, (new, (_, num_reply)) in enumerate(zip(asked, turns, strict=True)):
        prompt = [*so_far, *new]
        result = llm.generate(prompt, greedy(num_reply))
        known = max(len(so_far) - 1, 0)
        assert result.stats.prompt_tokens_cached >= known
        if turn:  # a longer match is only a lucky first token
            assert result.stats.prompt_tokens_cached <= known + 2
        so_far = [*prompt, *result.outputs[0].token_ids]
    reply = result.outputs[0].token_ids
    assert reply == oracle_greedy(shared_tiny("mixtral"), prompt, len(reply))


def test_a_chat_computes_only_its_new_tokens(model: OpenModel) -> None:
    llm = model("qwen2_moe")
    messages = [{"role": "user", "content": "Tell me a tale of seven dwarfs."}]
    known = 0
    params = SamplingParams(temperature=0.0, max_tokens=13, ignore_eos=True, logit_bias=LETTERS)
    for question in ("And then?", "How did it end, after all that?", "Why?"):
        result = llm.chat(messages, params)
        assert known - 1 <= result.stats.prompt_tokens_cached <= known
        known = len(result.prompt_token_ids) + result.stats.output_tokens
        messages += [
            {"role": "assistant", "content": result.text},
            {"role": "user", "content": question},
        ]


def test_a_stream_that_was_closed_leaves_its_text_in_the_cache(model: OpenModel) -> None:
    llm = model("olmoe")
    [prompt] = random_texts([37], VOCAB_SIZE, seed=77)
    with llm.stream(prompt, greedy(50)) as stream:
        tokens = [next(stream).token_id for _ in range(9)]
    longer = [*prompt, *(t for t in tokens if t is not None), 5]
    assert llm.generate(longer, greedy(1)).stats.prompt_tokens_cached == len(longer) - 2


def test_prompts_that_begin_alike_share_it_while_they_run(model: OpenModel) -> None:
    llm = model("olmoe")
    [common, *ends] = random_texts([50, 3, 4, 5], VOCAB_SIZE, seed=78)
    with llm.stream([*common, *ends[0]], greedy(30)) as running:
        next(running)
        result = llm.generate([*common, *ends[1]], greedy(2))
        assert result.stats.prompt_tokens_cached >= 50
        wanted = oracle_greedy(shared_tiny("olmoe"), [*common, *ends[0]], 30)
        assert [event.token_id for event in running] == wanted[1:]


def test_a_repeated_prompt_computes_its_last_token(model: OpenModel) -> None:
    llm: LLM = model("olmoe")
    [prompt] = random_texts([32], VOCAB_SIZE, seed=79)  # two whole pages
    first, again = (llm.generate(prompt, greedy(4)) for _ in range(2))
    assert (first.stats.prompt_tokens_cached, again.stats.prompt_tokens_cached) == (0, 31)
    assert first.outputs[0].token_ids == again.outputs[0].token_ids


def test_without_prefix_caching_nothing_is_kept(model: OpenModel) -> None:
    llm = model("mixtral", prefix_caching=False)
    before = llm.num_free_pages
    assert before == llm.plan.num_pages
    for _ in range(2):
        result = llm.generate([7] * 40, SamplingParams(n=2, max_tokens=5, seed=1))
        assert result.stats.prompt_tokens_cached == 0
        assert llm.num_free_pages == before
