"""Text to token ids and back, from a model folder's ``tokenizer.json``."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from fiddler.errors import CheckpointError, PromptError
from fiddler.text.detokenizer import DecodeStream
from fiddler.text.model_files import read_json_object, special_tokens

_OTHER_TOKENIZERS = ("tokenizer.model", "*.tiktoken", "vocab.json", "tokenization_*.py")


class Tokenizer:
    """One model's tokenizer; safe to share between threads.

    ``eos_token_ids`` are all ids that end a reply. ``vocab_size`` counts the tokens that have a
    text; a model's own vocabulary may be padded beyond it, and such ids decode to nothing.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
    ) -> None:
        backend.no_truncation()  # a tokenizer.json may carry the settings of its training run
        backend.no_padding()
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)

    def __repr__(self) -> str:
        return f"<Tokenizer of {self.vocab_size:,} tokens>"

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Read ``tokenizer.json`` and the end tokens of the model in ``path``.

        Raises :class:`CheckpointError` if there is no ``tokenizer.json`` or it is damaged.
        """
        folder = Path(path)
        backend = _load_backend(folder)
        names = special_tokens(folder)
        return cls(
            backend,
            eos_token_ids=_eos_ids(folder, backend, names.get("eos_token")),
            bos_token_id=_bos_id(folder, backend, names.get("bos_token")),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``; special tokens are those the model wants around it (BOS)."""
        try:
            text.encode("utf-8")  # the library says no more than TypeError
        except UnicodeEncodeError as error:  # lone surrogates, from a wrongly decoded file
            raise PromptError(
                f"the text is not valid Unicode at character {error.start}",
                hint="check the encoding of the file or terminal it came from; UTF-8 is expected",
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; ids without a token decode to nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Return a fresh stream; its ``step`` and ``flush`` texts join to ``decode`` of all ids."""
        return DecodeStream(
            self._backend, skip_special_tokens=skip_special_tokens, special_ids=self._special_ids
        )


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json{_what_is_there(folder)}",
            hint="take a revision of the model that has one, or write it with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})",
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise CheckpointError(
            f"{path} cannot be read as a tokenizer: {error}",
            hint="the file is damaged or newer than the installed tokenizers "
            f"{tokenizers.__version__}; download it again or upgrade",
        ) from error


def _what_is_there(folder: Path) -> str:
    found = sorted(p.name for pattern in _OTHER_TOKENIZERS for p in folder.glob(pattern))
    return f", only {', '.join(found)}, which fiddler does not read" if found else ""


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, token: str | None) -> tuple[int, ...]:
    """Ids of generation_config.json, or else config.json, and then the tokenizer's own."""
    own = backend.token_to_id(token) if token is not None else None
    ids = [*_declared_ids(folder, "eos_token_id"), *([] if own is None else [own])]
    return tuple(dict.fromkeys(ids))


def _bos_id(folder: Path, backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    own: int | None = backend.token_to_id(token) if token is not None else None
    return own if own is not None else next(iter(_declared_ids(folder, "bos_token_id")), None)


def _declared_ids(folder: Path, key: str) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        ids = _as_ids(read_json_object(folder / name).get(key))
        if ids:
            return ids
    return []


def _as_ids(value: Any) -> list[int]:
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
