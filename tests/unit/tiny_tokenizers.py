"""Small tokenizers of the kinds that models use, built in code."""

from collections.abc import Callable

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog, again and again.",
    "naïve café, 日本語 ひらがな, привет мир, emoji 👩‍👩‍👧 and 𠀀𠀁",
    "def f(x):\n    return x + 1\n\n",
]
FIRST_BYTE = 3  # id of <0x00> in the byte-fallback vocabularies


def byte_level() -> Tokenizer:
    """GPT-2's scheme, as Qwen and OLMoE have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama's scheme, as Mixtral has it: what is not in the vocabulary comes byte by byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *"abcdefghijklmnopqrstuvwxyz.,TH", "▁t", "he", "▁the", "é", "日"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """Byte fallback below a metaspace decoder."""
    tokenizer = byte_fallback()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def words() -> Tokenizer:
    """Whole words and no decoder at all: tokens are joined by spaces."""
    tokenizer = Tokenizer(
        models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def word_pieces() -> Tokenizer:
    """BERT's scheme, whose decoder cleans up around punctuation."""
    pieces = ["[UNK]", "do", "##n", "'", "t", ".", "a", "##b", "##'t", ","]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "words": words,
    "word_pieces": word_pieces,
}
