"""The chat itself, with a fake model and no terminal."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_llm import FULL, FakeLLM

from fiddler.cli.chat_session import Chat
from fiddler.cli.params_edit import SETTABLE


@pytest.fixture
def chat() -> Chat:
    return new_chat()


def new_chat(**settings: Any) -> Chat:
    llm = settings.pop("llm", None) or FakeLLM()
    defaults = llm.default_params()
    return Chat(llm=llm, params=defaults, defaults=defaults, **settings)  # type: ignore[arg-type]


def contents(chat: Chat) -> list[str]:
    return [message.content for message in chat.conversation.messages]


def test_turns_build_on_each_other(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.run(["hello", "and again"])
    assert contents(chat) == [
        "hello",
        "You said: hello",
        "and again",
        "You said: and again",
    ]
    printed = capsys.readouterr()
    assert printed.out == "You said: hello\nYou said: and again\n"
    assert printed.err.count("TTFT") == 2
    asked = chat.llm.asked[-1][0]  # type: ignore[attr-defined]
    assert [message["content"] for message in asked] == contents(chat)[:-1]


def test_quiet_prints_no_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    new_chat(is_quiet=True).run(["hello"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bad", ["too long", "crash now", "/load nowhere", "/exi", "/set x"])
def test_an_error_costs_its_turn_only(
    chat: Chat, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    chat.run(["hello"])
    before = chat.conversation
    capsys.readouterr()
    assert not chat.run([bad])
    assert chat.conversation == before
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert printed.out == ""
    assert chat.run(["still there?"])


def test_a_file_too_long_for_the_context_can_be_dropped(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = tmp_path / "book.txt"
    book.write_text("too long")
    assert not chat.run([f"/read {book}", "what is this?"])
    assert "hint: /undo drops the file" in capsys.readouterr().err
    assert chat.run(["/undo", "hello"])
    assert contents(chat) == ["hello", "You said: hello"]


@pytest.mark.parametrize(
    ("turns", "hint"),
    [
        (["too long"], "hint: this message alone is too long"),
        (["hello", "too long"], "hint: this message alone is too long"),
        (["half full", "half full"], "hint: /forget drops the oldest"),
        (["no Unicode"], "hint: check its encoding"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_run_says_what_would_help(
    chat: Chat, capsys: pytest.CaptureFixture[str], turns: list[str], hint: str
) -> None:
    assert not chat.run(turns)
    assert capsys.readouterr().err.count(hint) == 1


@pytest.mark.parametrize("max_position", [4096, 8192])
def test_a_larger_context_is_proposed_where_the_model_has_one(
    chat: Chat, capsys: pytest.CaptureFixture[str], max_position: int
) -> None:
    config = replace(chat.llm.model_config, max_position=max_position)
    chat.llm.model_config = config  # type: ignore[misc]
    chat.run(["too long", "half full", "half full", f"/set max_tokens={FULL}", "/clear", "hello"])
    said = capsys.readouterr().err
    assert "is too long" in said and "/forget drops" in said and "cut at the end" in said
    assert said.count("--context N at the start") == (3 if max_position > 4096 else 0)


def test_regen_answers_the_same_question(chat: Chat) -> None:
    chat.run(["hello", "/regen"])
    assert contents(chat) == ["hello", "You said: hello"]
    first, second = chat.llm.asked  # type: ignore[attr-defined]
    assert first == second


def test_a_failed_regen_keeps_the_old_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.run(["hello"])
    before = chat.conversation

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(chat.llm, "stream_chat", broken)
    chat.run(["/regen"])
    assert chat.conversation == before


@pytest.mark.parametrize("command", ["/regen", "/undo", "/forget"])
def test_there_must_be_something_to_take_back(chat: Chat, command: str) -> None:
    assert not chat.run([command])
    assert chat.run(["hello", command])


def test_undo_and_clear(chat: Chat) -> None:
    chat.run(["one", "two", "/undo"])
    assert contents(chat) == ["one", "You said: one"]
    chat.run(["/system be brief", "/clear"])
    assert contents(chat) == []
    assert chat.conversation.system == "be brief"


@pytest.mark.parametrize(
    ("command", "left"), [("/forget", 2), ("/forget 2", 1), ("/forget 9", 0), ("/forget all", 3)]
)
def test_forgetting_drops_the_oldest(
    chat: Chat, capsys: pytest.CaptureFixture[str], command: str, left: int
) -> None:
    turns = ["/system be brief", "one", "two", "three"]
    assert chat.run([*turns, command]) == (left < 3)
    said = ["one", "You said: one", "two", "You said: two", "three", "You said: three"]
    assert contents(chat) == said[6 - 2 * left :]
    assert chat.conversation.system == "be brief"
    assert ("hint: for example /forget 3" if left == 3 else f"{left} left") in (
        capsys.readouterr().err
    )


def test_an_answer_without_a_word_is_not_kept(chat: Chat) -> None:
    chat.run(["be silent"])
    assert contents(chat) == []


def test_an_answer_cut_at_max_tokens_says_so(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.run(["/set max_tokens=2", "hello there friend"])
    assert contents(chat)[-1] == "You said: "
    assert chat.conversation.messages[-1].finish_reason == "length"
    assert "cut at max_tokens; /set max_tokens=none" in (said := capsys.readouterr().err)
    assert "context" not in said


def test_an_answer_cut_at_the_end_of_the_context_says_so(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.run([f"/set max_tokens={FULL}", "hello there friend"])
    assert "cut at the end of the context; /forget" in (said := capsys.readouterr().err)
    assert "max_tokens;" not in said


def test_set_reaches_the_model_and_show_tells(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.run(["/set temperature=0", "/set stop=END", "/show", "hello"])
    params = chat.llm.asked[0][1]  # type: ignore[attr-defined]
    assert (params.temperature, params.stop) == (0.0, ("END",))
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert shown["temperature"] == "0.0"
    assert shown["stop"] == "('END',)"
    assert shown["model"] == "fake"


def test_set_alone_lists_what_can_be_set(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.run(["/set temperature 0.3", "/set"])
    printed = capsys.readouterr()
    assert "temperature = 0.3" in printed.err
    rows = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert tuple(rows) == SETTABLE
    assert rows["temperature"] == "0.3"


def test_the_seed_in_force_is_shown_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the chat can be had again: by the engine's seed, unless one was set."""
    path = tmp_path / "chat.json"
    for command, shown in (("/set top_k=0", "3, by --seed"), ("/set seed=7", "7")):
        chat = new_chat(llm=FakeLLM(seed=3))
        assert chat.run([command, "/show", "hello", f"/save {path}"])
        out = capsys.readouterr().out.splitlines()
        assert any(line.split(maxsplit=1)[0] == "seed" and shown in line for line in out)
        record = json.loads(path.read_text())
        assert record["seed"] == 3
        assert record["params"]["seed"] == (7 if shown == "7" else None)


# --- files ---


def test_a_bias_beyond_the_vocabulary_is_refused_when_it_is_set(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    before = chat.params
    beyond = chat.llm.model_config.vocab_size
    assert not chat.run([f'/set logit_bias={{"{beyond}": 1}}'])
    assert f"names token {beyond}" in capsys.readouterr().err
    assert chat.params == before
    assert chat.run([f'/set logit_bias={{"{beyond - 1}": 1}}', "hello"])


def test_save_and_load_bring_everything_back(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "my chat.json"
    chat.run(["/system be brief", "/set temperature=0.25", "hello", f"/save {path}"])
    other = new_chat()
    assert other.run([f"/load {path}"])
    assert other.conversation == chat.conversation
    assert other.params == chat.params
    other.run(["more", "/save"])
    assert len(json.loads(path.read_text())["messages"]) == 5


def test_loading_from_another_model_says_so(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.json"
    chat.run(["hello", f"/save {path}"])
    path.write_text(path.read_text().replace('"fake"', '"other/model"'))
    assert chat.run([f"/load {path}"])
    assert "saved with other/model" in capsys.readouterr().err


def test_a_damaged_file_keeps_the_conversation(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat.run(["hello", f"/save {path}"])
    path.write_text(path.read_text()[:-20])
    before = chat.conversation, chat.params
    assert not chat.run([f"/load {path}"])
    assert (chat.conversation, chat.params) == before


def test_read_goes_before_the_next_message(chat: Chat, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("the sky is green\n")
    chat.run([f"/read {notes}", "what colour?", "sure?"])
    assert contents(chat)[0] == "the sky is green\n\n\nwhat colour?"
    assert contents(chat)[2] == "sure?"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"a\0b", "binary"),
        (b"\xff\xfe", "not UTF-8"),
        (b"x" * (4 << 20) + b"x", "larger than 4 MiB"),
    ],
)
def test_files_that_cannot_be_read(
    chat: Chat,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    said: str,
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert not chat.run([f"/read {path}"])
    assert said in capsys.readouterr().err
    assert not chat.conversation.attached


def test_a_folder_and_a_device_are_no_files(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not chat.run([f"/read {tmp_path}", "/read /dev/zero"])
    assert capsys.readouterr().err.count("is no file") == 2


# --- reasoning ---


def test_reasoning_goes_to_standard_error(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.run(["ponder this"])
    printed = capsys.readouterr()
    assert printed.out == "decided\n"
    assert printed.err.startswith("hmm well\n")
    assert contents(chat)[-1] == "<think>hmm well</think>\n\ndecided"


def test_hidden_reasoning_is_kept_but_not_shown(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.run(["/think hide", "ponder this"])
    assert "hmm well" not in capsys.readouterr().err
    assert "hmm well" in contents(chat)[-1]


def test_reasoning_that_the_prompt_began_is_told_apart(
    chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    chat.run(["begun inside"])
    assert capsys.readouterr().out == "decided\n"
    assert contents(chat)[-1] == "<think>\npondering</think>\n\ndecided"


@pytest.mark.parametrize(
    ("mode", "kwargs"),
    [("auto", {}), ("on", {"enable_thinking": True}), ("off", {"enable_thinking": False})],
)
def test_think_is_an_argument_of_the_template(
    chat: Chat, mode: str, kwargs: dict[str, bool]
) -> None:
    chat.run([f"/think {mode}", "hello"])
    assert chat.llm.asked[0][2] == kwargs  # type: ignore[attr-defined]


# --- figures ---


def test_stats_and_experts(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.run(["/stats", "/experts"])
    assert "no answer yet" in (before := capsys.readouterr().out)
    assert "no tokens were routed yet" in before
    chat.run(["hello", "hello", "/stats", "/experts"])
    after = capsys.readouterr().out
    assert "2 turns" in after
    assert "layer 0 |@ " in after


def test_help_lists_every_command(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.run(["/help"])
    assert capsys.readouterr().out.count("\n/") >= 13


def test_exit_ends_the_chat(chat: Chat) -> None:
    assert chat.run(["/exit", "hello"])
    assert contents(chat) == []


def test_debug_lets_the_error_through() -> None:
    with pytest.raises(RuntimeError, match="the engine broke"):
        new_chat(is_debug=True).run(["crash"])


@pytest.mark.parametrize("word", ["exit", "Quit", "bye "])
def test_a_word_to_leave_is_not_asked(
    chat: Chat, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert chat.run([word])
    printed = capsys.readouterr()
    assert printed.out == "" and "/exit or Ctrl-D leaves" in printed.err
    assert contents(chat) == []
    assert chat.run([" exit"])  # as the note says
    assert contents(chat)[0].strip() == "exit"
