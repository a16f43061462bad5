"""``fiddler chat`` in a pseudo-terminal, key by key."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    CTRL_E,
    CTRL_X,
    FAKE_FIDDLER,
    PROMPT,
    TAB,
    Terminal,
    terminal,
)

COLOUR = re.compile(r"\x1b\[([0-9;]*;)?[349][0-7](;[0-9;]*)?m")

# Python 3.12 warns of a fork while other threads run, which pexpect needs.
pytestmark = pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Terminal]:
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path, NO_COLOR="1") as running:
        running.expect(PROMPT)
        yield running


def leave(chat: Terminal) -> None:
    chat.type(CTRL_D)
    assert chat.exit_code() == 0


def test_a_turn_is_answered_with_statistics(chat: Terminal) -> None:
    chat.enter("hello there")
    chat.expect("You said: hello there")
    chat.expect("TTFT 0.2 s")
    chat.expect(PROMPT)
    leave(chat)


def test_the_chat_begins_with_the_placement(tmp_path: Path) -> None:
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path, NO_COLOR="1") as chat:
        shown = chat.expect(PROMPT)
        assert "3 of 8 experts on the GPU side, placed by profile of 4,417 tokens" in shown
        assert "--dtype bf12" in shown
        leave(chat)


def test_markdown_is_rendered_once(chat: Terminal) -> None:
    chat.enter("tell me markdown")
    shown = chat.expect("TTFT")
    assert "Some words and code." in shown
    assert "*words*" not in shown
    assert "```" not in shown
    leave(chat)


def test_ctrl_c_keeps_what_was_written_and_the_chat_goes_on(chat: Terminal, tmp_path: Path) -> None:
    chat.enter("slow please")
    chat.expect("word5")
    chat.type(CTRL_C)
    chat.expect("stopped; what was written is kept")
    chat.expect(PROMPT)
    chat.enter(f"/save {tmp_path / 'chat.json'}")
    chat.expect("saved 1 turn")
    answer = json.loads((tmp_path / "chat.json").read_text())["messages"][-1]
    assert answer["finish_reason"] == "cancelled"
    assert answer["content"].startswith("word0 word1 word2 word3 word4 word5")
    assert "word399" not in answer["content"]
    chat.enter("hello")
    chat.expect("You said: hello")
    leave(chat)


def test_what_is_typed_during_an_answer_waits_for_the_prompt(chat: Terminal) -> None:
    chat.enter("/set max_tokens=30")
    chat.enter("slow please")
    chat.expect("word5")
    chat.enter("ahead")
    assert "ahead" not in chat.expect("cut at max_tokens")
    chat.expect("You said: ahead")
    leave(chat)


def test_a_third_ctrl_c_in_one_step_ends_the_program(chat: Terminal) -> None:
    chat.enter("stall")
    chat.expect("...")
    for _ in range(20):
        chat.type(CTRL_C)  # the system merges two of which the first has not been seen yet
        if chat.shows("Ctrl-C again ends fiddler", within_s=0.3):
            break
    chat.type(CTRL_C)
    assert chat.exit_code() == 130


def test_ctrl_c_at_the_prompt_clears_the_line(chat: Terminal) -> None:
    chat.type("never sent" + CTRL_C)
    assert "leaves" not in chat.expect(PROMPT)
    chat.type(CTRL_C)
    chat.expect("Ctrl-D or /exit leaves the chat")
    chat.expect(PROMPT)
    chat.enter("sent")
    chat.expect("You said: sent")
    leave(chat)


def test_alt_enter_begins_another_line(chat: Terminal) -> None:
    chat.type(f"one{ALT_ENTER}two")
    chat.enter("")
    chat.expect("You said: one two")  # Markdown joins the lines
    leave(chat)


def test_triple_quotes_hold_several_lines(chat: Terminal) -> None:
    chat.enter('"""one')
    chat.enter('two"""')
    chat.expect("You said: one two")
    leave(chat)


def test_a_paste_of_several_lines_is_one_message(chat: Terminal) -> None:
    chat.paste("pasted one\npasted two")
    chat.enter("")
    chat.expect("You said: pasted one pasted two")
    chat.expect(PROMPT)
    leave(chat)


def test_tab_completes_commands_and_files(chat: Terminal) -> None:
    # a short path, which fits into the terminal's line however many folders pytest has made
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "unmistakable.txt").write_text("from the file")
        chat.type("/rea" + TAB)
        chat.expect("/read")
        chat.type(f" {folder}/unmis{TAB}")
        chat.expect("unmistakable.txt")
        chat.enter("")
        chat.expect("unmistakable.txt,")
        chat.expect("13")
    chat.enter("and me")
    chat.expect("You said: from the file")
    chat.expect("and me")
    leave(chat)


def test_the_editor_writes_the_message(tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "written elsewhere" > "$1"\n')
    editor.chmod(0o755)
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path, EDITOR=str(editor), VISUAL="") as chat:
        chat.expect(PROMPT)
        chat.type(CTRL_X + CTRL_E)
        chat.expect("You said: written elsewhere")
        leave(chat)


def test_save_exit_load(chat: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat.enter("remember")
    chat.expect("You said: remember")
    chat.enter(f"/save {path}")
    chat.expect("saved 1 turn")
    chat.enter("/exit")
    assert chat.exit_code() == 0
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path) as again:
        again.expect(PROMPT)
        again.enter(f"/load {path}")
        again.expect("loaded 1 turn")
        again.enter("/regen")
        again.expect("You said: remember")
        leave(again)


def test_history_is_private_and_comes_back(chat: Terminal, tmp_path: Path) -> None:
    chat.enter("a line to remember")
    chat.expect("You said: a line to remember")
    leave(chat)
    history = tmp_path / "fiddler" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "a line to remember" in history.read_text()
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path) as again:
        again.expect(PROMPT)
        again.type("\x1b[A")  # arrow up
        again.enter("")
        again.expect("You said: a line to remember")
        leave(again)


def test_no_history_writes_none(tmp_path: Path) -> None:
    with terminal([*FAKE_FIDDLER, "chat", "--no-history"], tmp_path) as chat:
        chat.expect(PROMPT)
        chat.enter("secret")
        chat.expect("You said: secret")
        leave(chat)
    assert not any(tmp_path.rglob("chat_history"))


def test_a_dumb_terminal_gets_plain_text(tmp_path: Path) -> None:
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path, TERM="dumb") as chat:
        chat.expect(PROMPT)
        chat.enter("tell me markdown")
        chat.expect("*words*")
        chat.expect(PROMPT)
        leave(chat)


def test_no_colour_means_none(chat: Terminal) -> None:
    chat.enter("tell me markdown")
    chat.expect("TTFT")
    leave(chat)
    assert not COLOUR.search(chat.transcript)


def test_colour_is_there_otherwise(tmp_path: Path) -> None:
    with terminal([*FAKE_FIDDLER, "chat"], tmp_path, NO_COLOR="") as chat:
        chat.expect(PROMPT)
        chat.enter("tell me markdown")
        chat.expect("TTFT")
        leave(chat)
        assert COLOUR.search(chat.transcript)


def test_ctrl_c_stops_generate_with_its_partial_text(tmp_path: Path) -> None:
    with terminal([*FAKE_FIDDLER, "generate", "slow please"], tmp_path) as generate:
        generate.expect("word5")
        generate.type(CTRL_C)
        generate.expect("tok/s")
        assert generate.exit_code() == 130


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    command = " ".join(FAKE_FIDDLER) + " generate 'slow please' < /dev/null | head -c 20"
    with terminal(["bash", "-c", f"set -o pipefail; {command}"], tmp_path) as shell:
        assert shell.exit_code() == 1
        assert shell.transcript.startswith("word0 word1 word2")
        assert "Error" not in shell.transcript
