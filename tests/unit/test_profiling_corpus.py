"""Corpus files in, documents and windows out; anything else is one sentence."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.corpus import cut_windows, is_held_out, read_chat_corpus, read_text_corpus
from fiddler.errors import ProfileError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, content: bytes | str) -> Path:
    path = folder / "corpus"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_is_one_document_with_the_files_hash(tmp_path: Path) -> None:
    content = "\ufeffZwölf Boxkämpfer\n"
    corpus = read_text_corpus(write(tmp_path, content))
    assert corpus.documents == ("Zwölf Boxkämpfer\n",)
    assert corpus.sha256 == hashlib.sha256(content.encode()).hexdigest()


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (json.dumps(TURNS), 1),
        (json.dumps([TURNS, TURNS]), 2),
        (json.dumps({"version": 1, "model": "m", "messages": TURNS, "params": {}}), 1),
        (json.dumps([{"messages": TURNS}] * 3), 3),
        ("\n".join([json.dumps(TURNS), "", json.dumps({"messages": TURNS})]), 2),
        (json.dumps([{**TURNS[0], "finish_reason": "stop"}, TURNS[1]], indent=1), 1),
    ],
)
def test_every_form_of_chat_file(tmp_path: Path, content: str, count: int) -> None:
    assert read_chat_corpus(write(tmp_path, content)).documents == (TURNS,) * count


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"abc\xff", "is not UTF-8 text: byte 3"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes, sentence: str) -> None:
    for read, kind in ((read_text_corpus, "text"), (read_chat_corpus, "chat")):
        with pytest.raises(ProfileError, match=f"the {kind} file .* {sentence}"):
            read(write(tmp_path, content))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        read_text_corpus(tmp_path / "none")
    with pytest.raises(ProfileError, match="cannot be read: Is a directory"):
        read_text_corpus(tmp_path)


BAD_CHATS: list[tuple[Any, str]] = [
    ([], "holds no conversation"),
    ({}, "conversation 1 .* has no messages"),
    ("text", "conversation 1 .* has no messages"),
    (3, "conversation 1 .* has no messages"),
    ([[]], "conversation 1 .* has no messages"),
    ([TURNS, None], "conversation 2 .* has no messages"),
    ({"messages": "Hi"}, "conversation 1 .* has no messages"),
    ([{"role": "user"}], "message 1 of conversation 1 .* has no role and content"),
    ([TURNS, [*TURNS, {"role": "user", "content": None}]], "message 3 of conversation 2 "),
    ([*TURNS, "Hi"], "message 3 of conversation 1 "),
]


@pytest.mark.parametrize(("record", "sentence"), BAD_CHATS)
def test_what_is_no_chat(tmp_path: Path, record: Any, sentence: str) -> None:
    with pytest.raises(ProfileError, match=sentence):
        read_chat_corpus(write(tmp_path, json.dumps(record)))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"line 2 of .* is not JSON"):
        read_chat_corpus(write(tmp_path, json.dumps(TURNS) + "\n{"))


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError):
        read_chat_corpus(write(tmp_path, "[" * 100_000))


@given(
    st.lists(st.integers(0, 900), max_size=6),
    st.integers(2, 400),
    st.sampled_from([0.05, 0.1, 0.2, 0.33, 0.5]),
)
def test_windows_are_the_documents_in_order(
    lengths: list[int], context: int, held_out: float
) -> None:
    documents = [list(range(length)) for length in lengths]
    try:
        windows = cut_windows(documents, context=context, held_out=held_out)
    except ProfileError:
        assert sum(lengths) < 16 * (2 / held_out + 1)
        return
    assert [t for window in windows for t in window] == [t for d in documents for t in d]
    assert all(0 < len(window) < context for window in windows)
    kept_apart = sum(is_held_out(index, held_out) for index in range(len(windows)))
    assert 2 <= kept_apart <= len(windows) * held_out + 1
    assert kept_apart < len(windows)
