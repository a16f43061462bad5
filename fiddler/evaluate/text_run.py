"""Runs a text through a model and scores each of its tokens as the logits come.

Never more logits are held than the engine makes at a time; a reference's are kept in a file.

Shapes: T scored tokens, R rows at hand, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fiddler.config import EngineConfig
from fiddler.engine.request import LogitReader
from fiddler.errors import NumericsError
from fiddler.evaluate.figures import Divergence, Perplexity
from fiddler.evaluate.logit_file import LogitFile
from fiddler.evaluate.scores import divergence, surprise
from fiddler.evaluate.windows import Window

Progress = Callable[[int, int], None]  # scored tokens: done, total


class ScoringModel(Protocol):
    """What is used of :class:`fiddler.llm.LLM`."""

    @property
    def config(self) -> EngineConfig: ...

    def read_logits(self, prompts: list[list[int]], readers: Sequence[LogitReader]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """A text's token ids, and what it is cut into; ``start_ids`` stand before every window."""

    ids: list[int]
    start_ids: tuple[int, ...]
    windows: list[Window]

    @property
    def targets(self) -> list[int]:
        """The tokens that are scored."""
        return self.ids[self.windows[0].first :]

    def prompt(self, window: Window) -> list[int]:
        """What the model reads."""
        return [*self.start_ids, *self.ids[window.begin : window.end]]


@dataclass(frozen=True, slots=True)
class TextScores:
    """A run's figures; ``divergence`` if it was compared with a reference."""

    perplexity: Perplexity
    divergence: Divergence | None


def score_text(
    llm: ScoringModel,
    text: TokenText,
    *,
    keep_in: LogitFile | None = None,
    compare_with: LogitFile | None = None,
    on_progress: Progress | None = None,
) -> TextScores:
    """Score ``text``, keep the logits for another run, or compare them with those of one.

    Raises :class:`NumericsError` for logits that are no numbers.
    """
    scorer = _Scorer(text, keep_in, compare_with)
    size = llm.config.max_batched_tokens // len(text.prompt(text.windows[0]))
    for batch in _batches(text.windows, max(1, size)):
        readers = [_reader(text, window, scorer.read) for window in batch]
        llm.read_logits([text.prompt(window) for window in batch], readers)
        if on_progress is not None:
            on_progress(batch[-1].end - text.windows[0].first, len(text.targets))
    return scorer.scores()


class _Scorer:
    """Takes logits of any scored tokens, in any order, and writes what they are worth."""

    def __init__(
        self, text: TokenText, keep_in: LogitFile | None, compare_with: LogitFile | None
    ) -> None:
        self._targets_T = torch.tensor(text.targets)
        self._keep_in, self._compare_with = keep_in, compare_with
        self._surprise_T = np.full(len(text.targets), np.nan)
        self._kl_T = np.full(len(text.targets), np.nan)
        self._same_T = np.zeros(len(text.targets), dtype=np.bool_)

    def read(self, index: int, logits_RV: torch.Tensor) -> None:
        """Logits of the scored tokens from number ``index`` on."""
        rows = slice(index, index + len(logits_RV))
        surprise_R = surprise(logits_RV, self._targets_T[rows].to(logits_RV.device))
        if not bool(torch.isfinite(surprise_R).all()):
            raise NumericsError(
                "the model's predictions are not finite",
                hint="the checkpoint is damaged, or its weights do not suit this dtype",
            )
        self._surprise_T[rows] = surprise_R.cpu().numpy()
        if self._keep_in is not None:
            self._keep_in.write(index, logits_RV)
        if self._compare_with is not None:
            reference_RV = self._compare_with.read(index, len(logits_RV)).to(logits_RV.device)
            kl_R, same_R = divergence(logits_RV, reference_RV)
            self._kl_T[rows], self._same_T[rows] = kl_R.cpu().numpy(), same_R.cpu().numpy()

    def scores(self) -> TextScores:
        """The figures of all tokens."""
        is_compared = self._compare_with is not None
        return TextScores(
            Perplexity.of(self._surprise_T),
            Divergence.of(self._kl_T, self._same_T) if is_compared else None,
        )


def _batches(windows: list[Window], size: int) -> list[list[Window]]:
    return [windows[i : i + size] for i in range(0, len(windows), size)]


def _reader(
    text: TokenText, window: Window, read: Callable[[int, torch.Tensor], None]
) -> LogitReader:
    """Row r of what the model reads is about the token behind it, from a start token on."""
    before = len(text.start_ids) - 1 - window.begin  # from a token's number to its row's
    first_scored = text.windows[0].first

    def shifted(row: int, logits_RV: torch.Tensor) -> None:
        read(row - before - first_scored, logits_RV)

    return LogitReader(window.first + before, shifted)
