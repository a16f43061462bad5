"""What an evaluation will read, made and checked before any weight is loaded."""

from dataclasses import dataclass
from typing import Any

from fiddler.builtin_text.corpus import Question, heldout, heldout_conversations
from fiddler.config import EngineConfig
from fiddler.errors import ConfigError, PromptError, TemplateError
from fiddler.evaluate.questions import LONGEST_ANSWER, NUM_QUESTIONS, SEED
from fiddler.evaluate.text_run import TokenText
from fiddler.evaluate.windows import cut_windows
from fiddler.hub.resolve import BUILTIN_FOLDER
from fiddler.loading import ModelFiles, Progress, find_model
from fiddler.models.dtypes import resolve_dtypes
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.tokenizer import Tokenizer
from offload.hardware import probe
from offload.units import counted

MOST_WINDOW = 2048  # unasked: what a step computes at once
BUILTIN_CONVERSATIONS = 130  # ten of each task
DTYPE_NAMES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "float32": "float32"}
# what makes a run other than the model is stored, and what belongs to one model only
SCHEME_FIELDS = ("dtype", "kv_cache_dtype", "cpu_activations")
OWN_FIELDS = ("revision", "profile")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """A text cut into windows, the questions, and the context for both, in tokens."""

    text: TokenText
    window: int
    stride: int
    questions: list[Question]
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """How to load the model to compare with; its logits are numbers of ``dtype``."""

    options: dict[str, Any]
    vocab_size: int
    dtype: str


def reference_options(options: dict[str, Any], against: str) -> dict[str, Any]:
    """The engine options of the reference ``against``: a type's name, or a model.

    It runs on the same machine and within the same budgets, without what changes the weights.
    """
    kept = {name: value for name, value in options.items() if name not in SCHEME_FIELDS}
    if against in DTYPE_NAMES:
        return kept | {"dtype": DTYPE_NAMES[against]}
    return {k: v for k, v in kept.items() if k not in OWN_FIELDS} | {"model": against}


def builtin_text() -> str:
    """Held-out conversations of the built-in model, as its chat template writes them."""
    template = ChatTemplate.from_folder(BUILTIN_FOLDER)
    assert template is not None
    conversations = heldout_conversations(BUILTIN_CONVERSATIONS, SEED)
    return "".join(template.render(c, add_generation_prompt=False) for c in conversations)


def prepare(
    options: dict[str, Any],
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    asks: bool = False,
    on_progress: Progress | None = None,
) -> Preparation:
    """Tokenise and cut ``text`` for the model that ``options`` name, which is found first.

    Raises :class:`PromptError` for a text without tokens enough, and :class:`ConfigError` for sizes
    that cannot work.
    """
    files = find_model(EngineConfig(**options), on_progress)
    tokenizer = _tokenizer(files)
    most = options.get("max_model_len") or files.config.max_position
    window = window or max(2, min(MOST_WINDOW, most - 1))
    stride = stride or max(1, window // 2)
    _check_room(window, most, "a window")
    start_ids = _start_ids(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)[:max_tokens]
    windows = cut_windows(len(ids), window=window, stride=stride, num_start=len(start_ids))
    questions = heldout(NUM_QUESTIONS, SEED) if asks else []
    longest = _longest_question(files, tokenizer, questions)
    _check_room(longest, most, "a question")
    return Preparation(
        text=TokenText(ids=ids, start_ids=start_ids, windows=windows),
        window=window,
        stride=stride,
        questions=questions,
        context_tokens=min(most, max(window + 1, longest + LONGEST_ANSWER)),
    )


def prepare_reference(
    options: dict[str, Any], against: str, text: str, on_progress: Progress | None = None
) -> Reference:
    """Find the model that ``against`` names; ConfigError if it cannot be compared with."""
    chosen = reference_options(options, against)
    settings = EngineConfig(**chosen)
    files = find_model(EngineConfig(**options), on_progress)
    if against in DTYPE_NAMES:
        _check_unrounded(files)
    other = find_model(settings, on_progress)
    ids, other_ids = (_tokenizer(f).encode(text) for f in (files, other))
    if ids != other_ids or files.config.vocab_size != other.config.vocab_size:
        raise ConfigError(
            f"{files.name} and {other.name} make different tokens of the text, so their "
            "predictions cannot be compared",
            hint="--against takes a model with the same tokenizer, or bf16",
        )
    has_gpu = probe(settings.device).has_gpu
    stored, packed = other.config.dtype, other.config.packed_name
    dtypes = resolve_dtypes(settings.dtype, stored, has_gpu=has_gpu, packed=packed)
    return Reference(options=chosen, vocab_size=other.config.vocab_size, dtype=dtypes.compute)


def _check_unrounded(files: ModelFiles) -> None:
    """A type's name means other weights only where none were rounded when they were stored."""
    packed, mixed = files.config.packed, files.config.mixed
    if packed is not None and not all(kind.is_lossless for kind in mixed or (packed,)):
        raise ConfigError(
            f"the experts of {files.name} are stored as {files.config.packed_name}, so the model "
            "would be compared with itself",
            hint="name the model that it was made from: --against MODEL",
        )


def _tokenizer(files: ModelFiles) -> Tokenizer:
    if files.tokenizer is None:
        raise PromptError(
            f"{files.name} has no tokenizer, so it reads no text",
            hint="take a model that has a tokenizer.json",
        )
    return files.tokenizer


def _start_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that the model wants before a text, if it wants one."""
    start = tokenizer.bos_token_id
    return (start,) if start is not None and tokenizer.encode("")[:1] == [start] else ()


def _check_room(num_tokens: int, context: int, what: str) -> None:
    if num_tokens >= context:
        raise ConfigError(
            f"{what} has {counted(num_tokens, 'token')}, but the context holds {context:,} and one "
            "more is always written",
            hint="give a smaller --window, or a larger --context if the model has one",
        )


def _longest_question(files: ModelFiles, tokenizer: Tokenizer, questions: list[Question]) -> int:
    """Tokens of the longest question; 0 if there are none."""
    if not questions:
        return 0
    template = files.chat_template
    if template is None:
        raise TemplateError(
            f"{files.name} has no chat template, so it answers no questions",
            hint="leave out --questions",
        )
    texts = [template.render(messages) for messages, _, _ in questions]
    return max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
