"""Saved chats: one JSON file, version 1, replaced as a whole or not at all."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fiddler.cli.conversation import ROLES, Conversation, Message, alternates
from fiddler.cli.params_edit import params_from_json
from fiddler.errors import FiddlerError

VERSION = 1
MAX_BYTES = 64 << 20  # far above any context; a larger file is not a chat


class ChatFileError(FiddlerError):
    """A saved chat that cannot be read or written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedChat:
    """What a file holds; ``params`` are fields of ``SamplingParams``, checked.

    ``seed`` is the engine's, which decides where ``params`` have none; None in older files.
    """

    model: str
    revision: str | None
    conversation: Conversation
    params: dict[str, Any]
    seed: int | None = None


# --- text ---


def to_json(chat: SavedChat) -> str:
    """The file's text, readable and in a fixed order."""
    conversation = chat.conversation
    system = [Message("system", conversation.system)] if conversation.system else []
    record = {
        "version": VERSION,
        "model": chat.model,
        "revision": chat.revision,
        "seed": chat.seed,
        "params": chat.params,
        "messages": [_record(message) for message in [*system, *conversation.messages]],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _record(message: Message) -> dict[str, str]:
    return {name: value for name, value in asdict(message).items() if value or name == "content"}


def from_json(text: str) -> SavedChat:
    """Read a file's text; :class:`ChatFileError` says what is wrong with it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChatFileError("not a saved chat: it is damaged or no JSON") from error
    if not isinstance(record, dict) or "version" not in record:
        raise ChatFileError("not a saved chat: it has no version")
    if record["version"] != VERSION:
        raise ChatFileError(
            f"version {record['version']!r} of a saved chat, and only version {VERSION} is known"
        )
    model, revision = record.get("model"), record.get("revision")
    if not isinstance(model, str) or not isinstance(revision, str | None):
        raise ChatFileError("a damaged chat: its model is missing")
    seed = record.get("seed")
    if not isinstance(seed, int | None):
        raise ChatFileError("a damaged chat: its seed is no number")
    return SavedChat(
        model=model,
        revision=revision,
        conversation=_conversation(record.get("messages")),
        params=_params(record.get("params")),
        seed=seed,
    )


def _conversation(records: Any) -> Conversation:
    if not isinstance(records, list):
        raise ChatFileError("a damaged chat: its messages are missing")
    messages = [_message(record, index) for index, record in enumerate(records)]
    system = messages.pop(0).content if messages and messages[0].role == "system" else ""
    if not alternates(messages):
        raise ChatFileError("a damaged chat: its messages are not questions and answers in turn")
    return Conversation(system=system, messages=tuple(messages))


def _message(record: Any, index: int) -> Message:
    roles = ROLES if index else ("system", *ROLES)
    fields = {"role", "content", "finish_reason"}
    is_text = isinstance(record, dict) and all(isinstance(v, str) for v in record.values())
    if not is_text or not {"role", "content"} <= set(record) <= fields:
        raise ChatFileError(f"a damaged chat: message {index + 1} has no role and content")
    if record["role"] not in roles:
        raise ChatFileError(f"a damaged chat: message {index + 1} has role {record['role']!r}")
    return Message(**record)


def _params(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ChatFileError("a damaged chat: its parameters are missing")
    try:
        return params_from_json(record)
    except FiddlerError as error:
        raise ChatFileError(f"a damaged chat: {error.message}") from error


# --- files ---


def load_chat(path: Path) -> SavedChat:
    """Read ``path``; one sentence that names it if it cannot be read."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ChatFileError("not a saved chat: it is too large")
        return from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ChatFileError(f"{path}: not a saved chat: it is no text") from error
    except OSError as error:
        raise ChatFileError(f"{path}: {_reason(error)}") from error
    except ChatFileError as error:
        raise ChatFileError(f"{path}: {error.message}", hint=error.hint) from error


def save_chat(path: Path, chat: SavedChat) -> None:
    """Write ``path`` so that at every moment it holds the old chat or the new one, whole.

    A file that is there but is no saved chat is left alone.
    """
    target = path.resolve()  # a link stays a link
    if target.exists():
        _refuse_foreign(path)
    try:
        replace_file(target, to_json(chat).encode())
    except OSError as error:
        raise ChatFileError(f"{path}: not saved: {_reason(error)}") from error


def _refuse_foreign(path: Path) -> None:
    try:
        load_chat(path)
    except ChatFileError as error:
        hint = "choose another name; what is there was not touched"
        raise ChatFileError(f"not saved over {error.message}", hint=hint) from error


def replace_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` atomically, also across a crash; mode 0600 if it is new.

    The new content is on the disk before the name points to it. A process that is killed leaves
    the old file and perhaps a ``.NAME.*.tmp`` beside it.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
