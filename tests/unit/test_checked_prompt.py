"""What is asked of a model becomes ids and settings, or is refused; without a model."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.checked_prompt import checked_prompt
from fiddler.errors import ConfigError, PromptError
from fiddler.loading import ModelFiles
from fiddler.prompts import Prompt, check_prompt, text_and_ids
from fiddler.sampling_params import SamplingParams

VOCAB_SIZE, CONTEXT = 300, 16

MESSAGE = {"role": "user", "content": "hi"}


class CodePoints:
    """A tokenizer."""

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]


def model(tokenizer: CodePoints | None, max_position: int = CONTEXT) -> Any:
    """As much of a loaded model as is asked."""
    config: Any = SimpleNamespace(vocab_size=VOCAB_SIZE, max_position=max_position)
    encoder: Any = tokenizer
    files = ModelFiles(
        name="tiny",
        revision=None,
        folder=None,
        config=config,
        generation_config={"temperature": 0.5, "top_k": 7},
        tokenizer=encoder,
        chat_template=None,
    )
    return SimpleNamespace(files=files, plan=SimpleNamespace(context_tokens=CONTEXT))


WITH, WITHOUT = model(CodePoints()), model(None)


@given(
    st.lists(st.integers(-2, VOCAB_SIZE + 1), max_size=CONTEXT + 2),
    st.sampled_from([WITH, WITHOUT]),
)
def test_token_ids_need_no_tokenizer_and_stay_within_the_model(ids: list[int], loaded: Any) -> None:
    if 0 < len(ids) < CONTEXT and all(0 <= token < VOCAB_SIZE for token in ids):
        checked = checked_prompt(ids, None, loaded)
        assert (checked.text, checked.ids) == (None, ids) and checked.ids is not ids
    else:
        with pytest.raises(PromptError):
            checked_prompt(ids, None, loaded)


@pytest.mark.parametrize(("max_position", "grows"), [(CONTEXT, False), (CONTEXT + 1, True)])
def test_a_larger_context_is_proposed_where_the_model_has_one(
    max_position: int, grows: bool
) -> None:
    with pytest.raises(PromptError) as caught:
        checked_prompt([1] * CONTEXT, None, model(None, max_position))
    assert ("--context" in caught.value.hint) == grows
    assert caught.value.hint.startswith("shorten it")


def test_one_token_is_said_as_one() -> None:
    with pytest.raises(PromptError, match="the prompt has 1 token, but the context holds 1 and"):
        check_prompt([7], context_tokens=1, max_position=8, vocab_size=VOCAB_SIZE)


@given(st.text(st.characters(max_codepoint=127), min_size=1, max_size=CONTEXT - 1))
def test_a_text_is_kept_beside_its_ids(text: str) -> None:
    prompts: list[Prompt] = [text, {"prompt": text}]
    for prompt in prompts:
        checked = checked_prompt(prompt, None, WITH)
        assert (checked.text, checked.ids) == (text, list(map(ord, text)))


def test_settings_that_are_left_out_are_the_models() -> None:
    params = checked_prompt([1], SamplingParams(top_k=3), WITH).params
    assert (params.temperature, params.top_k) == (0.5, 3)
    with pytest.raises(ConfigError, match="the vocabulary ends at 299"):
        checked_prompt([1], SamplingParams(stop_token_ids=[300]), WITH)


def test_text_on_either_end_needs_a_tokenizer() -> None:
    asked: list[tuple[Prompt, SamplingParams | None]] = [
        ("a", None),
        ([1], SamplingParams(stop="x")),
    ]
    for prompt, params in asked:
        checked_prompt(prompt, params, WITH)
        with pytest.raises(PromptError, match="tiny has no tokenizer"):
            checked_prompt(prompt, params, WITHOUT)


@pytest.mark.parametrize("messages", [MESSAGE, [MESSAGE], [{"role": "system"}, MESSAGE]])
def test_messages_are_sent_to_the_chat(messages: object) -> None:
    with pytest.raises(PromptError, match="are a conversation") as caught:
        text_and_ids(messages)
    assert "stream_chat()" in caught.value.hint
