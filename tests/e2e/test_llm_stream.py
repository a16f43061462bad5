"""Streams: the same text in pieces; closing, dropping and interleaving them; failing steps."""

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler import LLM, SamplingParams, TokenEvent
from fiddler.engine.runner import Started
from fiddler.errors import ConfigError, NumericsError, PromptError
from fiddler.stream import Sample
from tests.e2e.conftest import OpenModel, open_folder
from tests.forward import random_texts
from tests.tiny_models import EOS_ID, VOCAB_SIZE, shared_tiny

PROMPTS = random_texts([9, 40, 3], VOCAB_SIZE, seed=31)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True} | fields)


def ids(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


@pytest.fixture(scope="module")
def llm(model: OpenModel) -> LLM:
    """Without a prefix cache every page must come back when a stream ends."""
    return model("mixtral", prefix_caching=False)


@pytest.fixture(autouse=True)
def no_page_is_lost(llm: LLM) -> Iterator[None]:
    yield
    assert llm.num_free_pages == llm.plan.num_pages


# --- events ---


@settings(max_examples=10)
@given(
    prompt=st.sampled_from(PROMPTS),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0.5, 1.5),
            "max_tokens": st.integers(1, 25),
            "stop": st.lists(st.sampled_from(["a", "e", "\n", "th", "."]), max_size=3),
            "ignore_eos": st.booleans(),
            "logit_bias": st.just({EOS_ID: 5.0}),
            "logprobs": st.integers(0, 2),
            "skip_special_tokens": st.booleans(),
            "include_stop_str_in_output": st.booleans(),
        },
    ),
    seed=st.integers(0, 99),
)
def test_the_events_join_to_the_result_of_generate(
    llm: LLM, prompt: list[int], fields: dict[str, Any], seed: int
) -> None:
    settings_ = params(seed=seed, **fields)
    wanted = llm.generate(prompt, settings_).outputs[0]
    events = list(llm.stream(prompt, settings_))
    assert "".join(event.text for event in events) == wanted.text
    assert ids(events) == wanted.token_ids
    assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
    assert (events[-1].finish_reason, events[-1].stop_reason) == (
        wanted.finish_reason,
        wanted.stop_reason,
    )
    assert [e.logprobs for e in events if e.logprobs] == (wanted.logprobs or [])
    assert [e.stats.output_tokens for e in events] == list(range(1, len(events) + 1))


def test_times_and_counts_grow(llm: LLM) -> None:
    events = list(llm.stream(PROMPTS[1], params()))
    stats = [event.stats for event in events]
    assert {s.prompt_tokens for s in stats} == {40}
    assert {s.time_to_first_token_s for s in stats} == {stats[0].time_to_first_token_s}
    assert stats[0].time_to_first_token_s >= stats[0].prefill_s > 0
    decode = [s.decode_s for s in stats]
    assert decode[0] == 0 and decode == sorted(decode) and decode[-1] > 0
    experts = [s.expert_tokens_cpu + s.expert_tokens_gpu for s in stats]
    config = llm.model_config
    assert experts == [(40 + i) * config.top_k * config.num_layers for i in range(20)]
    assert stats[-1].decode_tokens_per_s == pytest.approx(19 / decode[-1])


def test_samples_of_one_stream_are_told_apart_by_their_index(llm: LLM) -> None:
    settings_ = params(n=3, temperature=1.0, seed=5)
    wanted = llm.generate(PROMPTS[0], settings_).outputs
    events = list(llm.stream(PROMPTS[0], settings_))
    for output in wanted:
        own = [event for event in events if event.index == output.index]
        assert ids(own) == output.token_ids
        assert "".join(event.text for event in own) == output.text
        assert own[-1].finish_reason == output.finish_reason


def test_half_a_character_is_shown_only_when_the_stream_has_ended(llm: LLM) -> None:
    """The tiny tokenizer has one token a byte; this is the first byte of two."""
    half = llm.tokenizer.encode("\u00e9")[0]
    events = list(llm.stream([5], params(max_tokens=3, logit_bias={half: 100.0})))
    assert ids(events) == [half] * 3
    assert "".join(e.text for e in events) == llm.tokenizer.decode([half] * 3)
    assert not events[0].text.endswith("\ufffd")


def test_a_bad_prompt_is_refused_at_the_call(llm: LLM) -> None:
    with pytest.raises(PromptError, match="empty"):
        llm.stream("")
    with pytest.raises(ConfigError, match="not dict"):
        llm.stream("a", {"top_k": 1})  # type: ignore[arg-type]


# --- ends ---


def test_closing_gives_the_pages_back_and_says_cancelled(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[1], params())
    before = [next(stream) for _ in range(4)]
    assert llm.num_free_pages < llm.plan.num_pages
    stream.close()
    assert llm.num_free_pages == llm.plan.num_pages
    rest = list(stream)
    assert [(event.token_id, event.finish_reason) for event in rest] == [(None, "cancelled")]
    assert rest[0].stats.output_tokens == len(before) == 4
    stream.close()
    assert list(stream) == []


def test_closing_before_the_first_event(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[1], params())
    stream.close()
    assert [event.finish_reason for event in stream] == ["cancelled"]


def test_the_partial_text_is_kept(llm: LLM) -> None:
    """What a half character or a possible stop string held back comes with the last event."""
    whole = llm.generate(PROMPTS[0], params()).outputs[0]
    for num in range(1, 20):
        with llm.stream(PROMPTS[0], params(stop=whole.text[:7] + "never")) as stream:
            events = list(itertools.islice(stream, num))
        events += stream
        kept = "".join(event.text for event in events)
        assert kept == llm.tokenizer.decode(whole.token_ids[:num])


def test_leaving_the_block_closes(llm: LLM) -> None:
    with pytest.raises(KeyError), llm.stream(PROMPTS[0], params()) as stream:
        next(stream)
        raise KeyError
    assert llm.num_free_pages == llm.plan.num_pages


def test_closing_samples_in_part(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[1], params(n=4, temperature=1.0, seed=1))
    for _ in range(6):
        next(stream)
    stream.close()
    ends = [event.index for event in stream if event.finish_reason == "cancelled"]
    assert sorted(ends) == [0, 1, 2, 3]


def test_a_dropped_stream_gives_its_pages_back(llm: LLM) -> None:
    for _ in range(3):
        for event in llm.stream(PROMPTS[1], params()):
            if event.stats.output_tokens == 2:
                break
        gc.collect()
        assert llm.num_free_pages == llm.plan.num_pages


def test_a_stream_never_started_and_dropped(llm: LLM) -> None:
    llm.stream(PROMPTS[1], params(n=3))
    gc.collect()
    assert llm.generate(PROMPTS[0], params()).stats.output_tokens == 20


def test_a_stream_collected_in_the_middle_of_a_step_harms_no_other(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = llm.generate(PROMPTS[0], params()).outputs[0].token_ids
    dropped = [llm.stream(PROMPTS[1], params(max_tokens=100))]
    next(dropped[0])
    runner = llm._running.engine._runner
    start = runner.start

    def collect_then_start(schedule: Any) -> Started:
        dropped.clear()
        return start(schedule)

    monkeypatch.setattr(runner, "start", collect_then_start)
    assert ids(list(llm.stream(PROMPTS[0], params()))) == wanted


# --- several at once ---


@settings(max_examples=6)
@given(turns=st.lists(st.integers(0, 2), max_size=40), closed=st.sampled_from([None, 0, 1, 2]))
def test_interleaved_streams_equal_their_solo_runs(
    llm: LLM, turns: list[int], closed: int | None
) -> None:
    settings_ = [params(), params(temperature=1.0, seed=3), params(max_tokens=7)]
    wanted = [
        llm.generate(p, s).outputs[0].token_ids for p, s in zip(PROMPTS, settings_, strict=True)
    ]
    streams = [llm.stream(p, s) for p, s in zip(PROMPTS, settings_, strict=True)]
    found: list[list[TokenEvent]] = [[], [], []]
    for turn in turns:
        found[turn] += itertools.islice(streams[turn], 1)
    if closed is not None:
        streams[closed].close()
    for events, stream in zip(found, streams, strict=True):
        events += stream
    for i, events in enumerate(found):
        tokens = ids(events)
        assert tokens == (wanted[i][: len(tokens)] if i == closed else wanted[i])


def test_a_stream_goes_on_while_generate_runs(llm: LLM) -> None:
    wanted = ids(list(llm.stream(PROMPTS[0], params())))
    stream = llm.stream(PROMPTS[0], params())
    head = [next(stream) for _ in range(3)]
    llm.generate(PROMPTS[1], params(max_tokens=9))
    assert ids(head + list(stream)) == wanted


# --- failing steps ---


@pytest.fixture
def broken_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The model computes NaN until the patch is undone."""
    decoder = llm._running.engine._runner.decoder
    logits = decoder.logits
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "logits", lambda hidden_RH: logits(hidden_RH) * float("nan"))
        yield patch


def test_nan_is_one_sentence_and_the_next_request_works(
    llm: LLM, broken_logits: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NumericsError, match="NaN or infinite logits"):
        llm.generate(PROMPTS, params())
    assert llm.num_free_pages == llm.plan.num_pages
    broken_logits.undo()
    assert llm.generate(PROMPTS[0], params()).stats.output_tokens == 20


def test_every_request_of_a_failed_step_gets_the_error(
    llm: LLM, broken_logits: pytest.MonkeyPatch
) -> None:
    """Not only the one that asked for the step: "cancelled" would look like somebody's wish."""
    broken_logits.undo()
    streams = [llm.stream(p, params()) for p in PROMPTS]
    heads = [[next(stream) for _ in range(2)] for stream in streams]
    decoder = llm._running.engine._runner.decoder
    broken_logits.setattr(decoder, "logits", lambda hidden_RH: 1 / 0)
    tails: list[list[TokenEvent]] = []
    for stream in streams:
        tails.append([])
        with pytest.raises(ZeroDivisionError):
            tails[-1].extend(stream)
    broken_logits.undo()
    assert llm.num_free_pages == llm.plan.num_pages
    for prompt, head, tail in zip(PROMPTS, heads, tails, strict=True):
        assert all(event.finish_reason is None for event in head + tail)
        assert llm.generate(prompt, params()).outputs[0].token_ids[:2] == ids(head)


def test_an_error_while_a_token_becomes_text_ends_all_too(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of that step that were not handed out would be missing in the other texts."""
    streams = [llm.stream(p, params()) for p in PROMPTS]
    for stream in streams:
        next(stream)
    push = Sample.push

    def fail_for_the_second(sample: Sample, output: Any) -> None:
        if output.request.prompt_ids == PROMPTS[1]:
            raise ValueError("no text for this token")
        push(sample, output)

    with monkeypatch.context() as patch:
        patch.setattr(Sample, "push", fail_for_the_second)
        for stream in streams:
            with pytest.raises(ValueError, match="no text for this token"):
                list(stream)
    assert llm.num_free_pages == llm.plan.num_pages


def test_an_interrupted_step_cancels(llm: LLM, broken_logits: pytest.MonkeyPatch) -> None:
    def interrupt(hidden_RH: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    broken_logits.undo()
    stream = llm.stream(PROMPTS[0], params())
    next(stream)
    broken_logits.setattr(llm._running.engine._runner.decoder, "logits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    broken_logits.undo()
    assert [event.finish_reason for event in stream] == ["cancelled"]
    assert llm.generate(PROMPTS[0], params()).stats.output_tokens == 20


def test_closing_the_model_ends_its_streams() -> None:
    llm = open_folder(shared_tiny("mixtral"))
    stream = llm.stream(PROMPTS[0], params())
    next(stream)
    llm.close()
    assert [event.finish_reason for event in stream] == ["cancelled"]
    stream.close()
