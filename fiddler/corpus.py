"""What a profile is made from: a text or chat file, and the windows of tokens it is cut into."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiddler.errors import ProfileError
from offload.units import counted

Message = dict[str, str]
Document = str | list[Message]

MOST_WINDOW = 2048  # tokens; longer windows cost quadratic attention and route no differently
HELD_OUT_WINDOWS = 10  # from as many places of the corpus: two of 2,048 tokens judged by luck
LEAST_WINDOW = 16  # tokens below which routing mostly shows the beginning of a text


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents with the hash of the file they come from."""

    documents: tuple[Document, ...]
    sha256: str


def read_text_corpus(path: Path | str) -> Corpus:
    """Read a UTF-8 text file as one document. Raises :class:`ProfileError` if it is none."""
    text, sha256 = _read(Path(path), "text file")
    return Corpus((text,), sha256)


def read_chat_corpus(path: Path | str) -> Corpus:
    """Read conversations: one document each. Raises :class:`ProfileError` for anything else.

    The file is JSON (a list of messages, a list of conversations, or an object with ``messages``,
    as a saved chat is) or JSONL with one such conversation a line.
    """
    text, sha256 = _read(Path(path), "chat file")
    conversations = [
        _messages(record, f"conversation {number} of {path}")
        for number, record in enumerate(_records(text, Path(path)), start=1)
    ]
    return Corpus(tuple(conversations), sha256)


def cut_windows(
    documents: Sequence[list[int]], *, context: int, held_out: float
) -> list[list[int]]:
    """Cut token ids into windows shorter than ``context``, some ten of them to be held out.

    Raises :class:`ProfileError` for a corpus that is too short to hold out two.
    """
    num_tokens = sum(map(len, documents))
    least = math.ceil(2 / held_out) * LEAST_WINDOW
    if num_tokens < least:
        raise ProfileError(
            f"the corpus has {counted(num_tokens, 'token')}, too few to profile with",
            hint=f"give at least {least:,}; some ten thousand make a good profile",
        )
    even = num_tokens // math.ceil(HELD_OUT_WINDOWS / held_out)
    size = min(context - 1, max(LEAST_WINDOW, min(MOST_WINDOW, even)))
    return [ids[i : i + size] for ids in documents for i in range(0, len(ids), size)]


def is_held_out(index: int, held_out: float) -> bool:
    """Whether window ``index`` is held out: every 1 / ``held_out``-th, evenly over the corpus."""
    return int((index + 1) * held_out) > int(index * held_out)


def _read(path: Path, kind: str) -> tuple[str, str]:
    """Text and SHA-256 of a file that is not empty; ``kind`` is what a refusal calls it."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ProfileError(f"the {kind} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"the {kind} {path} is not UTF-8 text: byte {error.start} begins no character"
        ) from error
    if not text.strip():
        raise ProfileError(f"the {kind} {path} is empty")
    return text, hashlib.sha256(content).hexdigest()


def _records(text: str, path: Path) -> list[Any]:
    """The conversations of a file, not yet checked; at least one."""
    try:
        record = json.loads(text)
    except ValueError:
        return _json_lines(text, path)
    except RecursionError as error:
        raise ProfileError(f"{path} is no chat file: it is nested too deeply") from error
    if record == []:
        raise ProfileError(f"{path} holds no conversation")
    is_many = isinstance(record, list) and _may_be_conversation(record[0])
    return record if is_many else [record]


def _may_be_conversation(entry: Any) -> bool:
    return isinstance(entry, list) or (isinstance(entry, dict) and "messages" in entry)


def _json_lines(text: str, path: Path) -> list[Any]:
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ProfileError(f"line {number} of {path} is not JSON") from error
    return records


def _messages(record: Any, where: str) -> list[Message]:
    """A conversation's role and content, or :class:`ProfileError`."""
    messages = record.get("messages") if isinstance(record, dict) else record
    if not isinstance(messages, list) or not messages:
        raise ProfileError(f"{where} has no messages")
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise ProfileError(f"message {number} of {where} has no role and content as text")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
