"""Chat templates: what transformers renders, and what a template must not do."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CONVERSATIONS, TEMPLATES, WEATHER
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import words
from transformers import PreTrainedTokenizerFast

from fiddler.errors import CheckpointError, PromptError, TemplateError
from fiddler.text import chat_template
from fiddler.text.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "hello"}]
numbers = st.booleans() | st.integers() | st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | numbers | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=8,
)


def render(template: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    return ChatTemplate({"default": template}, SPECIAL).render(messages or HELLO, **options)


def oracle(template: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What transformers renders; None if its sandbox, or the template itself, refuses."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words(), **SPECIAL)
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
    except Exception:
        return None
    assert isinstance(text, str)
    return text


# --- parity ---


@pytest.mark.parametrize("talk", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(name: str, talk: str) -> None:
    template, messages = TEMPLATES[name], CONVERSATIONS[talk]
    for options in _options():
        expected = oracle(template, messages, **options)
        if expected is None:
            with pytest.raises(TemplateError):
                render(template, messages, **options)
        else:
            assert render(template, messages, **options) == expected


def _options() -> list[dict[str, Any]]:
    return [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": [WEATHER, WEATHER]},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 May 2026"},
        {"add_generation_prompt": True, "tools": [], "bos_token": "<other>"},
    ]


def test_most_cases_render_and_some_are_refused() -> None:
    """Else the parity above would compare nothing."""
    results = [
        oracle(template, messages, add_generation_prompt=True) is None
        for template in TEMPLATES.values()
        for messages in CONVERSATIONS.values()
    ]
    assert 5 < results.count(True) < len(results) / 3


@pytest.mark.parametrize("name", TEMPLATES)
@given(texts=st.lists(st.text(max_size=5), max_size=3))
def test_parts_of_text_are_its_lines(name: str, texts: list[str]) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    messages = [{"role": "user", "content": content} for content in (parts, "\n".join(texts))]
    in_parts, whole = (render(TEMPLATES[name], [message]) for message in messages)
    assert in_parts == whole


@given(content=st.text(max_size=30), value=json_values)
def test_content_and_json_come_through_unchanged(content: str, value: Any) -> None:
    template = "{{ messages[0].content }}|{{ value | tojson }}"
    prompt = render(template, [{"role": "user", "content": content}], value=value)
    assert prompt == f"{content}|{json.dumps(value, ensure_ascii=False)}"


def test_a_long_chat_is_quick() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 50} for i in range(999)]
    render(TEMPLATES["qwen"], messages)
    start = time.thread_time()
    render(TEMPLATES["qwen"], messages)
    assert time.thread_time() - start < chat_template.TIME_LIMIT_S / 10


# --- where templates come from ---


@pytest.mark.parametrize(
    ("config", "files", "tools", "expected"),
    [
        ("plain", {}, None, "plain"),
        ("plain", {"chat_template.jinja": "file"}, None, "file"),
        (None, {"chat_template.jinja": "file\n"}, None, "file"),
        ([("default", "one"), ("tool_use", "two")], {}, None, "one"),
        ([("default", "one"), ("tool_use", "two")], {}, [WEATHER], "two"),
        ([("default", "one"), ("rag", "two")], {}, [WEATHER], "one"),
        (
            None,
            {"chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b"},
            [WEATHER],
            "b",
        ),
    ],
)
def test_the_template_is_the_one_that_transformers_takes(
    tmp_path: Path, config: Any, files: dict[str, str], tools: Any, expected: str
) -> None:
    if isinstance(config, list):
        config = [{"name": name, "template": text} for name, text in config]
    folder = _folder(tmp_path, config, files)
    found = ChatTemplate.from_folder(folder)
    assert found is not None
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert found.render(HELLO, tools=tools) == expected
    assert theirs.apply_chat_template(HELLO, tools=tools, tokenize=False) == expected


def _folder(path: Path, config: Any, files: dict[str, str]) -> Path:
    words().save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": config}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


def test_special_tokens_of_the_folder_reach_the_template(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}", {})
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "."}'
    )
    found = ChatTemplate.from_folder(folder)
    assert found is not None
    assert found.render(HELLO) == "<s>.False"


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(_folder(tmp_path, None, {})) is None
    assert ChatTemplate.from_folder(tmp_path / "nowhere") is None


@pytest.mark.parametrize("config", [7, [], ["x"], [{"name": "default"}], {"default": "x"}])
def test_a_template_of_another_kind(tmp_path: Path, config: Any) -> None:
    with pytest.raises(CheckpointError, match="neither a text nor a list of named texts"):
        ChatTemplate.from_folder(_folder(tmp_path, config, {}))


def test_several_templates_without_a_default() -> None:
    with pytest.raises(TemplateError, match=r"several chat templates \(a, b\)"):
        ChatTemplate({"a": "x", "b": "y"}).render(HELLO)


# --- templates that fail ---


def test_a_template_that_refuses_gives_its_own_reason() -> None:
    with pytest.raises(TemplateError, match="refuses this conversation: No system, please!"):
        render("{{ raise_exception('No system, please!') }}")


def test_a_template_with_a_syntax_error_names_the_line() -> None:
    with pytest.raises(TemplateError, match="wrong in line 2: "):
        render("a\n{% if %}")


@pytest.mark.parametrize(
    "template",
    ["{{ nothing.here }}", "{{ 1 / 0 }}", "{{ messages[0] + 1 }}", "{{ undefined() }}",
     "{% include 'other' %}", "{{ 'x' | nosuchfilter }}", "{{ raise_exception() }}"],
)  # fmt: skip
def test_a_template_that_fails_is_one_sentence(template: str) -> None:
    with pytest.raises(TemplateError, match=r"^the chat template (failed|is wrong in line 1): .+"):
        render(template)


@pytest.mark.parametrize(
    ("message", "words", "hint"),
    [
        ("hello", "must be a dict with role and content, not 'hello'", "for example"),
        ({"role": "user", "content": {1}}, "not plain JSON data", ""),
        ({"role": "user"}, "message 2 has no content", "for example"),
        ({"role": "user", "content": None}, "message 2 has no content", "for example"),
        ({"role": "assistant"}, "message 2 has no content", "for example"),
        ({"role": "assistant", "tool_calls": []}, "message 2 has no content", "for example"),
        ({"role": "user", "tool_calls": [1]}, "message 2 has no content", "for example"),
        ({"role": "user", "contnet": "x"}, "has no content", "'contnet' in it should be 'content'"),
        ({"rol": "user", "content": "x"}, "has no role", "'rol' in it should be 'role'"),
        ({"role": 5, "content": "x"}, "the role of message 2 must be a text, not 5", ""),
        ({"role": "user", "content": 5}, "must be a text or a list of text parts, not 5", ""),
        ({"role": "user", "content": {"type": "text"}}, "must be a text or a list", ""),
        ({"role": "user", "content": [{"type": "image_url"}]}, "of type 'image_url'", "leave it"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part that is no text", "a part is"),
        ({"role": "user", "content": ["hi"]}, "a part that is no text: 'hi'", "a part is"),
    ],
    ids=str,
)
def test_a_message_that_would_be_lost_is_refused(message: Any, words: str, hint: str) -> None:
    with pytest.raises(PromptError) as refusal:
        ChatTemplate({"default": ""}).render([*HELLO, message])
    assert words in refusal.value.message and refusal.value.hint.startswith(hint)


def test_a_conversation_without_messages() -> None:
    with pytest.raises(PromptError, match="no messages"):
        ChatTemplate({"default": ""}).render([])


# --- the sandbox ---


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ namespace.__init__ }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = dict %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ messages[0].pop('role') }}",
        "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m.__call__ }}",
        "{% set f = '{0.__class__}'.format %}{{ f('x') | length }}{{ f.__self__ }}",
        "{{ range.__doc__ }}",
    ],
)
def test_an_attempt_to_leave_the_sandbox_is_called_one(template: str) -> None:
    with pytest.raises(TemplateError, match=r"tried to leave its sandbox: it .+") as failure:
        render(template)
    assert "before you use this model" in failure.value.hint


@pytest.mark.parametrize(
    "template",
    ["{{ '{0.__class__.__mro__}'.format('x') }}", "{{ '{x.__class__}'.format_map({'x': 1}) }}"],
)
def test_formats_cannot_look_behind_their_arguments(template: str) -> None:
    with pytest.raises(TemplateError):
        render(template)


def test_values_come_in_as_plain_data() -> None:
    class Sly(str):
        def upper(self) -> str:
            return "called"

    assert (
        render("{{ messages[0].content.upper() }}", [{"role": "user", "content": Sly("text")}])
        == "TEXT"
    )
    messages = [{"role": "user", "content": "x"}]
    render("{% set m = messages[0] %}{{ m.content }}", messages)
    assert messages == [{"role": "user", "content": "x"}]


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        NESTED.replace("range(99999)", "many"),
        "{% macro m(n) %}{% for i in range(9) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}"
        "{{ m(30) }}",
    ],
)
def test_a_template_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(chat_template, "TIME_LIMIT_S", 0.2)
    with pytest.raises(TemplateError, match="was stopped: it ran for too long"):
        render(template, many="x" * 99_999)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a\nb' | indent(width=10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ [1] | batch(10**9, 'x') | list }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ [1] | tojson(indent=10**9) }}",
        "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t * 2 %}{% endfor %}",
        "{% set n = namespace(i=9) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    ],
)
def test_a_template_that_makes_too_much_is_stopped(template: str) -> None:
    with pytest.raises(TemplateError, match=r"stopped: it (asks|repeats|stores|computes|wrote)"):
        render(template)


@pytest.mark.parametrize("template", ["{{ range(10**9) }}", "{{ lipsum(9) }}"])
def test_what_the_sandbox_does_not_have(template: str) -> None:
    with pytest.raises(TemplateError):
        render(template)
