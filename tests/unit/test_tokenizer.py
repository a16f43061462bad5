"""The tokenizer against transformers, the stream against a whole decode, and damaged folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import FIRST_BYTE, KINDS, byte_fallback, byte_level
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from fiddler.errors import CheckpointError, PromptError
from fiddler.text.model_files import special_tokens
from fiddler.text.tokenizer import Tokenizer

BACKENDS = {name: make() for name, make in KINDS.items()}
TRICKY_BYTES = [FIRST_BYTE + byte for byte in (0x0A, 0x41, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF)]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def folder_with(path: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    backend.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


# --- streams ---


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_is_the_decode_of_all_ids(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer = Tokenizer(BACKENDS[kind])
    any_id = st.integers(0, tokenizer.vocab_size + 3) | st.sampled_from(TRICKY_BYTES)
    ids = data.draw(st.lists(any_id, max_size=16))
    stream = tokenizer.decode_stream(skip)
    shown = [stream.step(token_id) for token_id in ids]
    assert "".join([*shown, stream.flush()]) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace"])
@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_a_stream_never_shows_half_a_character(kind: str, text: str) -> None:
    tokenizer = Tokenizer(BACKENDS[kind])
    ids = tokenizer.encode(text)
    stream = tokenizer.decode_stream()
    shown = "".join(map(stream.step, ids)) + stream.flush()
    assert "\ufffd" not in shown
    assert shown == tokenizer.decode(ids)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    ids = tokenizer.encode("The quick 👩 dog")
    stream = tokenizer.decode_stream()
    shown = [stream.step(token_id) for token_id in ids]
    assert stream.flush() == ""
    assert [bool(text) for text in shown].count(False) == _num_unfinished(tokenizer, ids)


def _num_unfinished(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Ids after which the text so far ends within a character."""
    return sum(tokenizer.decode(ids[:n]).endswith("\ufffd") for n in range(1, len(ids) + 1))


def test_the_plain_library_stream_fails_where_ours_does_not() -> None:
    """Two characters byte by byte, then a byte that spoils the whole run."""
    ids = [FIRST_BYTE + byte for byte in (*"€".encode(), *"€".encode(), 0xE2)] + [260]
    library = decoders.DecodeStream(skip_special_tokens=True)
    with pytest.raises(Exception, match="Invalid prefix"):
        for token_id in ids:
            library.step(BACKENDS["byte_fallback"], token_id)
    tokenizer = Tokenizer(BACKENDS["byte_fallback"])
    stream = tokenizer.decode_stream()
    assert "".join(map(stream.step, ids)) + stream.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 3), max_size=12))
def test_a_decoder_that_edits_across_tokens_loses_nothing(ids: list[int]) -> None:
    backend = tokenizers.Tokenizer(
        models.WordLevel({"a": 0, "b": 1, " ": 2, ".": 3}, unk_token="b")
    )
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", ".")])
    tokenizer = Tokenizer(backend)
    stream = tokenizer.decode_stream()
    shown = "".join(map(stream.step, ids)) + stream.flush()
    assert shown.replace(" .", ".") == tokenizer.decode(ids)


# --- parity ---


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=50)
@given(text=texts | st.sampled_from(["<s>a</s>", "<|im_start|>user\nHi<|im_end|>", "a<think>b"]))
def test_ids_and_text_are_those_of_transformers(kind: str, text: str) -> None:
    tokenizer = Tokenizer(BACKENDS[kind])
    oracle = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[kind])
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == oracle.encode(text, add_special_tokens=special)
        assert tokenizer.decode(ids, special) == oracle.decode(ids, skip_special_tokens=special)


# --- folders ---


@pytest.mark.parametrize(
    ("files", "eos", "bos"),
    [
        ({}, (), None),
        ({"config": {"eos_token_id": 2, "bos_token_id": 1}}, (2,), 1),
        ({"config": {"eos_token_id": [2, 5]}}, (2, 5), None),
        (
            {"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [5, 6]}},
            (5, 6),
            None,
        ),
        ({"tokenizer_config": {"eos_token": "</s>", "bos_token": "<s>"}}, (2,), 1),
        (
            {
                "generation_config": {"eos_token_id": 9},
                "tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}},
            },
            (9, 2),
            None,
        ),
        ({"special_tokens_map": {"eos_token": "</s>"}}, (2,), None),
        ({"tokenizer_config": {"eos_token": None, "bos_token": "<none>"}}, (), None),
    ],
)
def test_where_end_and_beginning_tokens_come_from(
    tmp_path: Path, files: dict[str, Any], eos: tuple[int, ...], bos: int | None
) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, byte_fallback(), **files))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == (eos, bos)


def test_special_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken", "special": True},
        "eos_token": "</s>",
        "pad_token": None,
    }
    folder = folder_with(tmp_path, byte_fallback(), tokenizer_config=config)
    oracle = PreTrainedTokenizerFast.from_pretrained(folder)
    assert special_tokens(folder) == oracle.special_tokens_map


def test_training_settings_in_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"
    assert len(tokenizer.encode("a")) == 1


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as nothing:
        Tokenizer.from_folder(tmp_path)
    assert nothing.value.message.endswith("has no tokenizer.json")
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"only tokenizer\.model, which .*") as failure:
        Tokenizer.from_folder(tmp_path)
    assert "save_pretrained" in failure.value.hint


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": 1}'])
def test_a_damaged_tokenizer_json(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"), [("{", "is not valid JSON"), ("[]", "list where"), ("\udcff", "cannot be")]
)
def test_a_damaged_config_names_the_file(tmp_path: Path, damage: str, said: str) -> None:
    folder = folder_with(tmp_path, byte_level())
    (folder / "generation_config.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json .*{said}"):
        Tokenizer.from_folder(folder)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(PromptError, match="not valid Unicode at character 2"):
        Tokenizer(BACKENDS["byte_level"]).encode("ab\udcff")
