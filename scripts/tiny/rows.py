"""From conversations to training rows: the tokenizer, loss weights and packing.

Shape suffixes: R rows, S positions.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fiddler.builtin_text.corpus import Message, sample_conversation, sample_text

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Words with their leading space, single digits, punctuation, line ends, spaces.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same for ASCII text, which is all that the corpus holds: twice as fast with a cache of pieces.
_ASCII_PIECES = re.compile(
    r"[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CACHE_SIZE = 200_000
# The prompt is predicted with little weight: it is mostly chance, but teaches the language.
_PROMPT_WEIGHT = 0.1
_PLAIN_TEXT_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids and the weight of each as a target of the loss."""

    ids: list[int]
    weights: list[float]


def train_tokenizer(vocab_size: int, seed: int, num_samples: int = 20_000) -> Tokenizer:
    """Train a byte-level BPE tokenizer with single digits on conversations of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, num_samples), trainer)
    return tokenizer


def _texts(seed: int, num_samples: int) -> Iterator[str]:
    rng = Random(f"tokenizer/{seed}")
    for _ in range(num_samples):
        for message in sample_conversation(rng):
            yield f"{message['role']}\n{message['content'][:1000]}"
        yield sample_text(rng)


class Encoder:
    """Encodes as the chat template would, with the loss on the assistant's words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.end_ids = self._special_ids(f"{END}\n")
        self.end_of_text = self._special_ids(END_OF_TEXT)
        roles = ("system", "user", "assistant")
        self.header_ids = {role: self._special_ids(f"{START}{role}\n") for role in roles}

    def conversation(self, messages: list[Message]) -> Document:
        """Encode ``messages``; the line end after a reply carries no weight."""
        ids: list[int] = []
        weights: list[float] = []
        for message in messages:
            head = self.header_ids[message["role"]]
            body = self.encode(message["content"].strip())
            ids += head + body + self.end_ids
            is_reply = message["role"] == "assistant"
            weight = 1.0 if is_reply else _PROMPT_WEIGHT * min(1.0, 100 / (len(body) + 1))
            weights += [0.0] * len(head) + [weight] * (len(body) + 1)
            weights += [0.0] * (len(self.end_ids) - 1)
        return Document(ids, weights)

    def text(self, text: str) -> Document:
        """Encode plain text, ended by the end-of-text token."""
        ids = self.encode(text) + self.end_of_text
        return Document(ids, [0.0] + [1.0] * (len(ids) - 1))

    def sample(self, rng: Random) -> Document:
        """Encode a conversation, or now and then a passage of plain text."""
        if rng.random() < _PLAIN_TEXT_SHARE:
            return self.text(sample_text(rng))
        return self.conversation(sample_conversation(rng))

    def encode(self, text: str) -> list[int]:
        """Encode ASCII text without special tokens, piece by piece through a cache."""
        ids: list[int] = []
        for piece in _ASCII_PIECES.findall(text):
            known = self.cache.get(piece)
            ids += self._remember(piece) if known is None else known
        return ids

    def _remember(self, piece: str) -> list[int]:
        if len(self.cache) >= _CACHE_SIZE:  # invented words are without number
            self.cache.clear()
        self.cache[piece] = self._special_ids(piece)
        return self.cache[piece]

    def _special_ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows: inputs, targets with weights, and which document a position belongs to."""

    ids_RS: NDArray[np.int64]
    targets_RS: NDArray[np.int64]
    weights_RS: NDArray[np.float32]
    documents_RS: NDArray[np.int32]


def pack_rows(encoder: Encoder, rng: Random, num_rows: int, length: int) -> Rows:
    """Fill ``num_rows`` of ``length`` with whole documents, best fit; the rest is padding."""
    bins = _fill_bins(encoder, rng, num_rows, length)
    return pack_documents(bins, length, encoder.end_of_text[0])


def pack_documents(bins: list[list[Document]], length: int, padding_id: int) -> Rows:
    """Lay the documents of each bin one behind the other; padding counts as a last document."""
    shape = (len(bins), length + 1)
    ids_RS = np.full(shape, padding_id, dtype=np.int64)
    weights_RS = np.zeros(shape, dtype=np.float32)
    documents_RS = np.zeros(shape, dtype=np.int32)
    for row, documents in enumerate(bins):
        start = 0
        for number, document in enumerate(documents):
            stop = start + len(document.ids)
            ids_RS[row, start:stop] = document.ids
            weights_RS[row, start:stop] = document.weights
            documents_RS[row, start:] = number
            start = stop
        documents_RS[row, start:] = len(documents)
    inputs, targets = slice(None, -1), slice(1, None)
    return Rows(
        np.ascontiguousarray(ids_RS[:, inputs]),
        np.ascontiguousarray(ids_RS[:, targets]),
        np.ascontiguousarray(weights_RS[:, targets]),
        np.ascontiguousarray(documents_RS[:, inputs]),
    )


def _fill_bins(encoder: Encoder, rng: Random, num_rows: int, length: int) -> list[list[Document]]:
    bins: list[list[Document]] = [[] for _ in range(num_rows)]
    room = [length + 1] * num_rows
    misses = 0
    while misses < 8:
        document = encoder.sample(rng)
        size = len(document.ids)
        fitting = [row for row in range(num_rows) if room[row] >= size]
        if not fitting:
            misses += 1
            continue
        row = min(fitting, key=lambda r: room[r])
        bins[row].append(document)
        room[row] -= size
    return bins
