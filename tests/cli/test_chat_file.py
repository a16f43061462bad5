"""Saved chats survive what happens to files: damage, strangers, and a kill while writing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.chat_file import (
    ChatFileError,
    SavedChat,
    from_json,
    load_chat,
    replace_file,
    save_chat,
    to_json,
)
from fiddler.cli.conversation import Conversation
from fiddler.cli.params_edit import params_from_json, params_to_json
from fiddler.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
characters = st.characters(exclude_categories=["Cs"])
words = st.text(characters, max_size=20)


@st.composite
def chats(draw: st.DrawFn) -> SavedChat:
    conversation = Conversation(system=draw(words))
    for question, answer in draw(st.lists(st.tuples(words, words), max_size=4)):
        reason = draw(st.sampled_from(["stop", "length", "cancelled"]))
        conversation = conversation.ask(question).answered(answer, reason)
    params = SamplingParams(
        temperature=draw(st.floats(0, 100)),
        stop=tuple(draw(st.lists(words.filter(bool), max_size=2))),
        logit_bias=draw(st.dictionaries(st.integers(0, 9), st.floats(-9, 9), max_size=2)),
    )
    return SavedChat(
        model=draw(words),
        revision=draw(st.none() | words),
        conversation=conversation,
        params=params_to_json(params),
        seed=draw(st.none() | st.integers()),
    )


def small_chat(answer: str = "hello") -> SavedChat:
    conversation = Conversation(system="be brief").ask("hi").answered(answer, "stop")
    return SavedChat(model="m", revision=None, conversation=conversation, params={}, seed=3)


@given(chat=chats())
def test_a_chat_comes_back_as_it_was(chat: SavedChat) -> None:
    assert from_json(to_json(chat)) == chat


def test_the_file_is_what_is_documented() -> None:
    record = json.loads(to_json(small_chat()))
    assert record == {
        "version": 1,
        "model": "m",
        "revision": None,
        "seed": 3,
        "params": {},
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello", "finish_reason": "stop"},
        ],
    }


@given(data=st.data())
def test_a_damaged_file_is_one_sentence(data: st.DataObject) -> None:
    text = to_json(small_chat())
    cut = data.draw(st.integers(0, len(text) - 3))
    with pytest.raises(ChatFileError) as caught:
        from_json(text[:cut])
    assert "\n" not in caught.value.message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    field=st.sampled_from(["version", "model", "revision", "seed", "params", "messages"]),
    v=json_values,
)
def test_any_foreign_value_is_refused_or_read(field: str, v: object) -> None:
    record = json.loads(to_json(small_chat()))
    record[field] = v
    try:
        chat = from_json(json.dumps(record))
    except ChatFileError:
        return
    assert from_json(to_json(chat)) == chat


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"params": {"temprature": 1}}, "did you mean 'temperature'?"),
        ({"params": {"temperature": "hot"}}, "temperature must be a number"),
        ({"params": {"max_tokens": 1.5}}, "max_tokens must be a whole number"),
        ({"params": {"top_p": 7}}, "top_p must be"),
        ({"seed": "x"}, "its seed is no number"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "in turn"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1"),
        ({"messages": [{"role": "user", "content": "hi", "x": ""}]}, "message 1"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], said: str) -> None:
    record = json.loads(to_json(small_chat())) | change
    with pytest.raises(ChatFileError, match=said.replace("?", r"\?")):
        from_json(json.dumps(record))


def test_a_file_without_a_seed_is_read() -> None:
    record = json.loads(to_json(small_chat()))
    del record["seed"]
    assert from_json(json.dumps(record)).seed is None


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(ChatFileError, match="damaged"):
        from_json("[" * 100_000)


def test_saving_over_a_foreign_file_leaves_it_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    with pytest.raises(ChatFileError, match="not saved over"):
        save_chat(notes, small_chat())
    assert notes.read_text() == "my notes"


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, small_chat("one"))
    path.chmod(0o640)
    save_chat(path, small_chat("two"))
    assert load_chat(path) == small_chat("two")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_a_new_file_is_private(tmp_path: Path) -> None:
    save_chat(tmp_path / "chat.json", small_chat())
    assert (tmp_path / "chat.json").stat().st_mode & 0o777 == 0o600


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "chat.json")
    save_chat(link, small_chat())
    assert link.is_symlink()
    assert load_chat(tmp_path / "real" / "chat.json") == small_chat()


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ChatFileError, match="no such file or directory"):
        save_chat(tmp_path / "none" / "chat.json", small_chat())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, small_chat("old"))

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ChatFileError, match="no space left"):
        save_chat(path, small_chat("new"))
    assert load_chat(path) == small_chat("old")
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]


def test_loading_binary_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ChatFileError, match=r"chat\.json: not a saved chat"):
        load_chat(path)


@given(params=chats().map(lambda chat: chat.params))
def test_params_survive_json(params: dict[str, object]) -> None:
    assert params_from_json(json.loads(json.dumps(params))) == params


# --- kill -9 ---

SAVE_CHATS = """
import sys
from pathlib import Path
from fiddler.cli.chat_file import SavedChat, save_chat
from fiddler.cli.conversation import Conversation

text = sys.argv[2] * 4_000_000  # large enough that a kill finds the write under way
chat = Conversation().ask("go").answered(text, "stop")
print("saving", flush=True)
while True:
    save_chat(Path(sys.argv[1]), SavedChat(model="m", revision=None, conversation=chat, params={}))
"""
REPLACE_FILES = """
import sys
from pathlib import Path
from fiddler.cli.chat_file import replace_file

content = sys.argv[2].encode() * 16_000_000
print("saving", flush=True)
while True:
    replace_file(Path(sys.argv[1]), content)
"""


def kill_while_saving(script: str, path: Path, letter: str, after_s: float) -> None:
    """Kill a process that saves without pause, ``after_s`` from when it began its first write."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(path), letter]
    known = set(path.parent.iterdir())
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while set(path.parent.iterdir()) == known:
            pass
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)


def test_kill_9_while_saving_leaves_a_whole_chat(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    save_chat(path, small_chat("first"))
    moments = random.Random(0)
    for letter in "abcdef":
        kill_while_saving(SAVE_CHATS, path, letter, moments.uniform(0, 0.05))
        answer = load_chat(path).conversation.messages[-1].content
        assert answer == "first" or (len(answer) == 4_000_000 and len(set(answer)) == 1)


def test_kill_9_leaves_one_whole_content(tmp_path: Path) -> None:
    """Larger, so that nearly all the time goes into writing: in-place writes fail this test."""
    path = tmp_path / "file"
    path.write_bytes(b"first")
    moments = random.Random(1)
    for letter in "abcdefgh":
        kill_while_saving(REPLACE_FILES, path, letter, moments.uniform(0, 0.06))
        content = path.read_bytes()
        assert content == b"first" or content == content[:1] * 16_000_000
    assert any(tmp_path.glob(".*.tmp")), "no kill hit a write"


def test_replace_file_cleans_up_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "chat.json", b"{}")
    assert not any(tmp_path.iterdir())
