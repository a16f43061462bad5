"""One evaluation: the reference first, then the model, each alone in the machine."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from fiddler.evaluate.figures import Accuracy
from fiddler.evaluate.logit_file import LogitFile
from fiddler.evaluate.preparation import Preparation, Reference
from fiddler.evaluate.questions import AnsweringModel, answer_questions
from fiddler.evaluate.report import NamedModel, Results, Run
from fiddler.evaluate.text_run import ScoringModel, score_text

Bars = Callable[[str, int, int], None]  # what, done, total
Options = dict[str, Any]  # of fiddler.config.EngineConfig


class EvaluatedModel(ScoringModel, AnsweringModel, NamedModel, Protocol):
    """What is used of :class:`fiddler.llm.LLM`."""


OpenModel = Callable[[Options], AbstractContextManager[tuple[EvaluatedModel, Bars | None]]]


def evaluate(
    options: Options,
    prepared: Preparation,
    reference: Reference | None,
    *,
    open_model: OpenModel,
    cache_folder: Path,
) -> Results:
    """Run what was ``prepared``; ``open_model`` gives a model, and bars or None, for a while.

    A reference's logits lie in ``cache_folder`` meanwhile. Raises what loading a model may raise,
    :class:`ConfigError` for a full disk and :class:`NumericsError` for broken weights.
    """
    text = prepared.text
    with ExitStack() as resources:
        file = other = None
        if reference is not None:
            dtype: torch.dtype = getattr(torch, reference.dtype)
            file = resources.enter_context(
                LogitFile(len(text.targets), reference.vocab_size, dtype, cache_folder)
            )
            with open_model(reference.options) as (llm, bars):
                progress = partial(bars, "scoring the reference") if bars else None
                kept = score_text(llm, text, keep_in=file, on_progress=progress)
                other = Run.of(llm, kept.perplexity)
        with open_model(options) as (llm, bars):
            progress = partial(bars, "scoring tokens") if bars else None
            scores = score_text(llm, text, compare_with=file, on_progress=progress)
            return Results(
                run=Run.of(llm, scores.perplexity),
                reference=other,
                divergence=scores.divergence,
                accuracy=_accuracy(llm, prepared, bars),
            )


def _accuracy(llm: EvaluatedModel, prepared: Preparation, bars: Bars | None) -> Accuracy | None:
    if not prepared.questions:
        return None
    progress = partial(bars, "questions") if bars else None
    return answer_questions(llm, prepared.questions, progress)
