"""``LLM.generate``: greedy tokens against transformers, and how each stop condition ends a text."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler import LLM, SamplingParams
from fiddler.errors import ConfigError, PromptError
from tests.e2e.conftest import OpenModel
from tests.forward import random_texts
from tests.oracle import oracle_greedy
from tests.tiny_models import EOS_ID, MODEL_TYPES, VOCAB_SIZE, shared_tiny

PROMPT = "Once upon a time"


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | fields)


@pytest.fixture(scope="module")
def llm(model: OpenModel) -> LLM:
    return model("mixtral")


@pytest.fixture(scope="module")
def whole(llm: LLM) -> tuple[str, list[int]]:
    """The greedy text and tokens of PROMPT when nothing stops them."""
    output = llm.generate(PROMPT, greedy()).outputs[0]
    return output.text, output.token_ids


def test_printed_it_says_what_it_is(llm: LLM) -> None:
    shown, context = repr(llm), llm.plan.context_tokens
    assert shown.startswith(f"<LLM {llm.model_name}: float32; ") and f"{context:,}" in shown
    assert f"{llm.plan.placement.num_resident:,} experts on the GPU side" in shown
    assert f"{llm.tokenizer.vocab_size:,} tokens" in repr(llm.tokenizer)


# --- tokens and results ---


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_are_those_of_transformers(model: OpenModel, model_type: str) -> None:
    prompts = random_texts([1, 17, 40], VOCAB_SIZE, seed=3)
    results = model(model_type).generate(prompts, greedy())
    folder = shared_tiny(model_type)
    wanted = [oracle_greedy(folder, prompt, 24) for prompt in prompts]
    assert [r.outputs[0].token_ids for r in results] == wanted


def test_results_say_what_was_asked_in_the_order_asked(llm: LLM) -> None:
    prompts = ["b", "a much longer prompt than the others", "c c"]
    lengths = [7, 1, 4]
    results = llm.generate(prompts, [greedy(max_tokens=n) for n in lengths])
    for result, prompt, length in zip(results, prompts, lengths, strict=True):
        [output] = result.outputs
        assert result.prompt == prompt
        assert result.prompt_token_ids == llm.tokenizer.encode(prompt)
        assert result.text == output.text == llm.tokenizer.decode(output.token_ids)
        assert len(output.token_ids) == length
        assert (output.finish_reason, output.stop_reason) == ("length", None)
        assert (output.logprobs, output.cumulative_logprob) == (None, None)
        assert (result.prompt_logprobs, output.routed_experts) == (None, None)
        assert result.stats.prompt_tokens == len(result.prompt_token_ids)
        assert result.stats.output_tokens == length


def test_text_and_its_token_ids_are_the_same_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    from_ids = llm.generate(ids, greedy())
    assert from_ids.prompt is None and from_ids.prompt_token_ids == ids
    assert from_ids.outputs[0].token_ids == llm.generate(PROMPT, greedy()).outputs[0].token_ids
    [listed] = llm.generate([PROMPT], greedy())
    assert listed.text == from_ids.text


def test_vllms_dicts_are_prompts(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPT)
    wanted = llm.generate(PROMPT, greedy())
    prompts = [
        {"prompt": PROMPT},
        {"prompt_token_ids": ids},
        {"prompt": "x"} | {"prompt_token_ids": ids},
    ]
    for one, text in zip(prompts, (PROMPT, None, "x"), strict=True):
        alone, [listed] = llm.generate(one, greedy()), llm.generate([one], greedy())
        for found in (alone, listed):
            assert (found.prompt, found.prompt_token_ids) == (text, ids)
            assert found.text == wanted.text


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({}, "the prompt of a dict is a text, not NoneType"),
        ({"prompt": 5}, "is a text, not int"),
        ({"prompt_token_ids": "abc"}, "a list of token ids, not str"),
        ({"promt": "a"}, "no key 'promt'; did you mean 'prompt'"),
        ({"prompt": "a", "multi_modal_data": {}}, "no key 'multi_modal_data'"),
    ],
    ids=str,
)
def test_a_dict_that_is_no_prompt_is_one_sentence(llm: LLM, prompt: Any, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        llm.generate(prompt)
    assert words in caught.value.message


@pytest.mark.parametrize("bad", ["", "x" * 600, [VOCAB_SIZE], {"promt": "a"}], ids=repr)
def test_an_error_says_which_of_several_prompts_it_is_about(llm: LLM, bad: Any) -> None:
    with pytest.raises(PromptError) as alone:
        llm.generate(bad)
    for index in range(3):
        prompts = ["a", "b"]
        prompts.insert(index, bad)
        with pytest.raises(PromptError) as caught:
            llm.generate(prompts)
        assert caught.value.message == f"prompts[{index}]: {alone.value.message}"
        assert caught.value.hint == alone.value.hint


def test_the_callers_token_ids_are_left_alone(llm: LLM) -> None:
    ids = [5, 6, 7]
    result = llm.generate(ids, greedy())
    assert ids == [5, 6, 7] and result.prompt_token_ids == [5, 6, 7]


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_progress_counts_finished_prompts(llm: LLM) -> None:
    seen: list[tuple[int, int]] = []
    params = [greedy(max_tokens=n) for n in (2, 5, 5, 9)]
    llm.generate(["a", "b", "c", "d"], params, on_progress=lambda *at: seen.append(at))
    assert [total for _, total in seen] == [4] * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[0][0] <= 1 and seen[-1][0] == 4


def test_an_error_in_the_progress_report_cancels_everything(model: OpenModel) -> None:
    llm = model("mixtral", prefix_caching=False)
    before = llm.num_free_pages

    def fail(done: int, total: int) -> None:
        raise RuntimeError("the display is gone")

    with pytest.raises(RuntimeError, match="the display is gone"):
        llm.generate(["a", "b"], greedy(max_tokens=100), on_progress=fail)
    assert llm.num_free_pages == before


def test_a_device_that_fails_as_one_request_ends_keeps_none_of_them(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step that ran ahead does: whoever is the last to need it waits for it."""
    llm = model("mixtral", prefix_caching=False)
    before, engine = llm.num_free_pages, llm._running.engine
    failures = iter([RuntimeError("the GPU is gone")])

    def fail_once() -> None:
        if error := next(failures, None):
            raise error

    def stop(done: int, total: int) -> None:
        monkeypatch.setattr(engine, "_end_idle", fail_once)
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="the GPU is gone"):
        llm.generate(["b", "c"], greedy(max_tokens=100, n=2), on_progress=stop)
    assert llm.num_free_pages == before
    assert len(llm.generate("d", greedy(max_tokens=3)).outputs[0].token_ids) == 3


# --- lengths ---


def test_without_max_tokens_the_text_ends_with_the_context(model: OpenModel) -> None:
    llm = model("mixtral", max_model_len=40)
    for prompt_len in (1, 25, 39):
        [prompt] = random_texts([prompt_len], VOCAB_SIZE)
        output = llm.generate(prompt, greedy(max_tokens=None)).outputs[0]
        assert len(output.token_ids) == 40 - prompt_len
        assert output.finish_reason == "length"
        assert output.token_ids == oracle_greedy(shared_tiny("mixtral"), prompt, 40 - prompt_len)


def test_max_tokens_beyond_the_context_end_with_it(model: OpenModel) -> None:
    output = (
        model("mixtral", max_model_len=40).generate([5] * 30, greedy(max_tokens=500)).outputs[0]
    )
    assert (len(output.token_ids), output.finish_reason) == (10, "length")


# --- the end token; a bias makes the model want it ---

WANTS_END = {"logit_bias": {EOS_ID: 100.0}, "ignore_eos": False}


def test_the_end_token_ends_the_text_and_is_not_shown(llm: LLM) -> None:
    output = llm.generate(PROMPT, greedy(**WANTS_END)).outputs[0]
    assert (output.token_ids, output.text) == ([EOS_ID], "")
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_ignore_eos_goes_on_after_it(llm: LLM) -> None:
    params = greedy(**WANTS_END | {"ignore_eos": True, "max_tokens": 5})
    output = llm.generate(PROMPT, params).outputs[0]
    assert (output.token_ids, output.text) == ([EOS_ID] * 5, "")
    assert output.finish_reason == "length"


def test_special_tokens_are_shown_on_request(llm: LLM) -> None:
    params = greedy(**WANTS_END | {"ignore_eos": True, "max_tokens": 3}, skip_special_tokens=False)
    assert llm.generate(PROMPT, params).text == "<|end|>" * 3


@pytest.mark.parametrize("least", [1, 4, 24])
def test_min_tokens_keeps_the_text_going(llm: LLM, least: int) -> None:
    output = llm.generate(PROMPT, greedy(**WANTS_END, min_tokens=least)).outputs[0]
    wanted = min(least + 1, 24)
    assert len(output.token_ids) == wanted
    assert output.token_ids.count(EOS_ID) == (1 if least < 24 else 0)
    assert output.finish_reason == ("stop" if least < 24 else "length")


# --- stop tokens ---


@pytest.mark.parametrize("at", [0, 5, 20])
def test_a_stop_token_ends_the_text(llm: LLM, whole: tuple[str, list[int]], at: int) -> None:
    _, tokens = whole
    stop = tokens[at]
    first = tokens.index(stop)
    output = llm.generate(PROMPT, greedy(stop_token_ids=[stop, 1])).outputs[0]
    assert output.token_ids == tokens[: first + 1]
    assert output.text == llm.tokenizer.decode(tokens[:first])
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    shown = llm.generate(PROMPT, greedy(stop_token_ids=[stop], include_stop_str_in_output=True))
    assert shown.text == llm.tokenizer.decode(tokens[: first + 1])


def test_min_tokens_holds_stop_tokens_back(llm: LLM, whole: tuple[str, list[int]]) -> None:
    stop = whole[1][2]
    output = llm.generate(PROMPT, greedy(stop_token_ids=[stop], min_tokens=10)).outputs[0]
    assert len(output.token_ids) > 10 and stop not in output.token_ids[:10]


# --- stop strings: the same as cutting afterwards ---


def cut(llm: LLM, tokens: list[int], stops: list[str], include: bool) -> tuple[str, int, Any]:
    """Text, number of tokens and stop reason, by decoding one token more at a time."""
    for num in range(1, len(tokens) + 1):
        text = llm.tokenizer.decode(tokens[:num]) if num == len(tokens) else shown(llm, tokens, num)
        ends = [(text.index(s) + len(s), text.index(s), s) for s in stops if s in text]
        if ends:
            end, start, stop = min(ends)
            return text[: end if include else start], num, stop
    return llm.tokenizer.decode(tokens), len(tokens), None


def shown(llm: LLM, tokens: list[int], num: int) -> str:
    """What of the text is certain after ``num`` tokens: no half character."""
    return llm.tokenizer.decode(tokens[:num]).rstrip("\ufffd")


LETTERS = dict.fromkeys(range(32, 90), 100.0)  # ids whose text is one printable character


@settings(max_examples=10)
@given(data=st.data(), include=st.booleans(), letters=st.booleans())
def test_stop_strings_equal_cutting_afterwards(
    llm: LLM, data: st.DataObject, include: bool, letters: bool
) -> None:
    bias = {"logit_bias": LETTERS} if letters else {}
    base = llm.generate(PROMPT, greedy(**bias)).outputs[0]
    size = len(base.text)
    pieces = st.tuples(st.integers(0, size - 1), st.integers(1, 5)).map(
        lambda at: base.text[at[0] : at[0] + at[1]]
    )
    stops = data.draw(st.lists(pieces | st.just("~#~"), min_size=1, max_size=3))
    stops = [stop for stop in stops if "\ufffd" not in stop] or ["~#~"]
    output = llm.generate(
        PROMPT, greedy(stop=stops, include_stop_str_in_output=include, **bias)
    ).outputs[0]
    text, num, reason = cut(llm, base.token_ids, stops, include)
    assert (output.text, output.token_ids) == (text, base.token_ids[:num])
    assert output.stop_reason == reason
    assert output.finish_reason == ("stop" if reason else "length")


def test_a_stop_string_at_the_last_token_counts_as_stop(llm: LLM) -> None:
    base = llm.generate(PROMPT, greedy(logit_bias=LETTERS, max_tokens=9)).outputs[0]
    last = base.text[-3:]
    assert base.text.index(last) == len(base.text) - 3
    output = llm.generate(PROMPT, greedy(logit_bias=LETTERS, max_tokens=9, stop=last)).outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", last)
    assert output.text == base.text[:-3]


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    base = llm.generate(PROMPT, greedy(logit_bias=LETTERS)).outputs[0]
    early = base.text[2:4]
    params = greedy(logit_bias=LETTERS, stop=early, min_tokens=10)
    output = llm.generate(PROMPT, params).outputs[0]
    assert len(output.token_ids) >= 10 and early in output.text


# --- what is refused, before anything runs ---


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ([VOCAB_SIZE], "between 0 and 263"),
        ([3, -1], "between 0 and 263"),
        ([1] * 512, "the prompt has 512 tokens, but the context holds 512"),
        ("x" * 4000, "the prompt has 4,000 tokens, but the context holds 512"),
        (None, "not NoneType"),
        (5, "not int"),
        ((1, 2), "not tuple"),
        ([1, "a"], "not list"),
        ([[1, 2], None], "not NoneType"),
        ([[]], "the prompt is empty"),
        ([[1], "", [2]], "the prompt is empty"),
        ("half a pair \ud800", "not valid Unicode"),
    ],
    ids=str,
)
def test_a_bad_prompt_is_one_sentence_and_nothing_is_queued(
    llm: LLM, prompt: Any, words: str
) -> None:
    before = llm.num_free_pages
    with pytest.raises(PromptError) as caught:
        llm.generate(prompt, greedy())
    assert words in caught.value.message and "\n" not in caught.value.message
    assert llm.num_free_pages == before


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([], "2 prompts came with 0 sampling parameters"),
        ([SamplingParams()] * 3, "2 prompts came with 3 sampling parameters"),
        ({"temperature": 0}, "sampling_params must be SamplingParams, not dict"),
        ([SamplingParams(), 3], "sampling_params must be SamplingParams, not int"),
        (SamplingParams(logit_bias={264: 1.0}), "logit_bias names token 264"),
        (SamplingParams(stop_token_ids=[3, 999]), "stop_token_ids names token 999"),
    ],
    ids=str,
)
def test_bad_parameters_are_one_sentence(llm: LLM, params: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.generate(["a", "b"], params)
    assert words in caught.value.message


def test_settings_are_given_by_place_or_by_vllms_name(llm: LLM) -> None:
    few, messages = greedy(max_tokens=2), [{"role": "user", "content": "a"}]
    asked = llm.generate("a", few), llm.generate("a", sampling_params=few)
    assert asked[0].text == asked[1].text
    assert llm.generate(["a"], sampling_params=[few])[0].text == asked[0].text
    chats = llm.chat(messages, few), llm.chat(messages, sampling_params=few)
    assert chats[0].text == chats[1].text
    for events in (
        llm.stream("a", sampling_params=few),
        llm.stream_chat(messages, sampling_params=few),
    ):
        assert len(list(events)) == len(list(llm.stream("a", few)))


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "stream_chat"])
@pytest.mark.parametrize(
    ("wrong", "words", "hint"),
    [
        ({"max_tokens": 3}, "takes no 'max_tokens'", "SamplingParams(max_tokens=3)"),
        ({"max_new_tokens": 3}, "takes no 'max_new_tokens'", "SamplingParams(max_tokens=3)"),
        ({"sampling_param": 3}, "did you mean 'sampling_params'", "it takes"),
        ({"colour": 3}, "takes no 'colour'", "it takes"),
    ],
    ids=str,
)
def test_an_argument_that_is_not_taken_says_where_it_belongs(
    llm: LLM, method: str, wrong: dict[str, Any], words: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(llm, method)([{"role": "user", "content": "a"}], **wrong)
    assert caught.value.message.startswith(f"{method}() ") and words in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("arguments", [(), ("a", greedy(), 3), (greedy(), "a"), ("a", 0.5)])
def test_arguments_in_the_wrong_place_are_one_sentence(llm: LLM, arguments: Any) -> None:
    for method in (llm.generate, llm.stream):
        with pytest.raises(ConfigError) as caught:
            method(*arguments)
        assert caught.value.hint


def test_a_list_of_parameters_for_one_prompt_has_one_element(llm: LLM) -> None:
    assert llm.generate("a", [greedy(max_tokens=2)]).stats.output_tokens == 2  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="1 prompts came with 2"):
        llm.generate("a", [greedy(), greedy()])  # type: ignore[call-overload]


def test_the_model_still_answers_after_all_that(llm: LLM, whole: tuple[str, list[int]]) -> None:
    for bad in ("", [VOCAB_SIZE], [1] * 600):
        with pytest.raises(PromptError):
            llm.generate(bad)
    assert llm.generate(PROMPT, greedy()).outputs[0].token_ids == whole[1]
