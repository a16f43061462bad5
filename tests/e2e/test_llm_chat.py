"""``LLM.chat``: messages become the template's prompt, and templates are not trusted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fiddler import LLM, SamplingParams
from fiddler.errors import PromptError, TemplateError
from tests.e2e.conftest import OpenModel, open_folder
from tests.tiny_models import make_tiny

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who goes there?"},
]
PROMPT = "<system>Be brief.<|end|><user>Who goes there?<|end|><assistant>"
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(model: OpenModel) -> LLM:
    return model("mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose template a test may replace."""
    return make_tiny("mixtral", tmp_path_factory.mktemp("chat") / "m")


def chat(folder: Path, template: str, **options: Any) -> Any:
    (folder / "chat_template.jinja").write_text(template)
    with open_folder(folder) as llm:
        return llm.chat(MESSAGES, GREEDY, **options)


def test_chat_completes_the_rendered_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert llm.apply_chat_template(MESSAGES) == ids
    assert ids.count(256) == 2, "the end marker is one special token"
    result = llm.chat(MESSAGES, GREEDY)
    assert result.prompt_token_ids == ids
    assert result.outputs[0].token_ids == llm.generate(ids, GREEDY).outputs[0].token_ids


def test_stream_chat_is_the_same_in_pieces(llm: LLM) -> None:
    events = list(llm.stream_chat(MESSAGES, GREEDY))
    assert "".join(event.text for event in events) == llm.chat(MESSAGES, GREEDY).text


def test_several_conversations_are_answered_in_order(llm: LLM) -> None:
    chats = [MESSAGES, MESSAGES[1:], [{"role": "user", "content": "x"}]]
    each = [replace(GREEDY, max_tokens=n) for n in (3, 7, 5)]
    for params in (GREEDY, each):
        found = llm.chat(chats, params)
        alone = [
            llm.chat(c, params[i] if isinstance(params, list) else params)
            for i, c in enumerate(chats)
        ]
        assert [r.prompt_token_ids for r in found] == [r.prompt_token_ids for r in alone]
        assert [r.outputs[0].token_ids for r in found] == [r.outputs[0].token_ids for r in alone]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([], "messages[1]: the conversation has no messages"),
        ([{"role": "user"}], "messages[1]: message 1 has no content"),
        ([{"role": "user", "content": "x" * 650}], "messages[1]: the prompt has"),
    ],
    ids=["empty", "no content", "long"],
)
def test_an_error_says_which_conversation_it_is_about(llm: LLM, bad: Any, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        llm.chat([MESSAGES, bad])
    assert caught.value.message.startswith(words)


def test_the_template_gets_tools_and_arguments(folder: Path) -> None:
    template = "{{ tools[0].name }}/{{ depth }}/{{ messages | length }}"
    result = chat(folder, template, tools=[{"name": "look"}], chat_template_kwargs={"depth": 3})
    assert result.prompt_token_ids == chat(folder, "look/3/2").prompt_token_ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must"),
        ("{{ messages[0].content.__class__.__mro__ }}", "tried to leave its sandbox"),
        ("{% for m in messages %}", "is wrong in line 1"),
        ("{{ messages[0] + 1 }}", "the chat template failed"),
        ("{{ 'x' * 10**9 }}", "the chat template was stopped"),
    ],
)
def test_a_template_that_fails_or_escapes_is_one_sentence(
    folder: Path, template: str, words: str
) -> None:
    with pytest.raises(TemplateError) as caught:
        chat(folder, template)
    assert words in caught.value.message and "\n" not in caught.value.message


def test_a_template_that_is_no_template_says_where_it_stands(folder: Path) -> None:
    with pytest.raises(TemplateError) as caught:
        chat(folder, "{% if %}")
    assert caught.value.hint and "chat_template.jinja" in caught.value.hint


def test_a_template_that_writes_nothing_is_an_empty_prompt(folder: Path) -> None:
    with pytest.raises(PromptError, match="empty"):
        chat(folder, "{% if false %}x{% endif %}")


def test_a_model_without_a_template_says_what_to_do(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text("{}")
    with open_folder(folder) as llm:
        with pytest.raises(TemplateError, match="has no chat template") as caught:
            llm.chat(MESSAGES, GREEDY)
        assert "generate()" in caught.value.hint
        assert llm.generate("Who?", GREEDY).stats.output_tokens == 10


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ("hello", "a conversation is a list of messages, not 'hello'"),
        ({"role": "user", "content": "hi"}, "a conversation is a list of messages"),
        (["hello"], "must be a dict with role and content"),
        ([{"role": "user", "content": object()}], "not plain JSON data"),
    ],
)
def test_bad_messages_are_one_sentence(llm: LLM, messages: Any, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        llm.chat(messages)
    assert words in caught.value.message


def test_a_conversation_longer_than_the_context(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"has [67]\d\d tokens, but the context holds 512"):
        llm.chat([{"role": "user", "content": "x" * 650}])
