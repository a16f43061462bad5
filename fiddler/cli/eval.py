"""``fiddler eval``: how good a model is as it runs here."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiddler.cli import session
from fiddler.cli.console import output_width
from fiddler.cli.option_types import Whole
from fiddler.cli.options import COUNT, engine_options, model_argument
from fiddler.progress import Progress, progress_bars

if TYPE_CHECKING:
    from fiddler.evaluate.driver import EvaluatedModel

BUILTIN_TEXT = "held-out conversations"


@click.command()
@model_argument()
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A UTF-8 text.  [default: the built-in model's held-out conversations]",
)
@click.option(
    "--window",
    type=Whole(min=2),
    metavar="N",
    help="Tokens that the model reads at once.  [default: 2048, or the context if that is less]",
)
@click.option(
    "--stride",
    type=COUNT,
    metavar="N",
    help="Tokens from one window to the next.  [default: half a window]",
)
@click.option("--max-tokens", type=COUNT, metavar="N", help="Read the text's first N tokens only.")
@click.option("--questions", is_flag=True, help="Also ask the built-in model's held-out questions.")
@click.option(
    "--against",
    metavar="MODEL|bf16",
    help="Compare with another model, or with this one in bf16 or float32.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json"]),
    default="md",
    show_default=True,
    help="Form of the result.",
)
@engine_options
def command(
    model: str,
    text: Path | None,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    questions: bool,
    against: str | None,
    output: str,
    engine: dict[str, Any],
) -> None:
    """Measure how well MODEL predicts a text, as the options make it run.

    The perplexity comes from windows that overlap: each token is scored once, with at least
    window - stride tokens before it. --against adds the Kullback-Leibler divergence from a
    reference, which is run first and whose predictions are kept in a temporary file; its weights
    are as they are stored unless a type is named. --questions are judged by the very words of the
    built-in model.
    """
    from fiddler.benchmark.build import build_commit
    from fiddler.evaluate.driver import evaluate
    from fiddler.evaluate.preparation import prepare, prepare_reference
    from fiddler.evaluate.report import Evaluation, render

    content, sha256 = _read(text)
    options = {"model": model, **engine}
    with progress_bars() as bars:
        prepared = prepare(
            options,
            content,
            window=window,
            stride=stride,
            max_tokens=max_tokens,
            asks=questions,
            on_progress=bars,
        )
        options = {"max_model_len": prepared.context_tokens, **options}
        reference = prepare_reference(options, against, content, bars) if against else None
    results = evaluate(
        options, prepared, reference, open_model=_open_model, cache_folder=cache_folder()
    )
    evaluation = Evaluation(
        build=build_commit(),
        text_name=str(text) if text is not None else BUILTIN_TEXT,
        text_sha256=sha256,
        prepared=prepared,
        results=results,
    )
    click.echo(render(evaluation, output, width=output_width()))


def _read(path: Path | None) -> tuple[str, str]:
    """A text and the SHA-256 of its bytes."""
    from fiddler.corpus import read_text_corpus
    from fiddler.evaluate.preparation import builtin_text

    if path is None:
        text = builtin_text()
        return text, hashlib.sha256(text.encode()).hexdigest()
    corpus = read_text_corpus(path)
    (document,) = corpus.documents
    assert isinstance(document, str)
    return document, corpus.sha256


def cache_folder() -> Path:
    """Where the reference's predictions lie meanwhile."""
    from platformdirs import user_cache_path

    return user_cache_path("fiddler")


@contextlib.contextmanager
def _open_model(
    options: dict[str, Any],
) -> "Iterator[tuple[EvaluatedModel, Progress | None]]":
    with contextlib.closing(session.open_llm(**options)) as llm, progress_bars() as bars:
        yield cast("EvaluatedModel", llm), bars
