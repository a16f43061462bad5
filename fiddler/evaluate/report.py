"""An evaluation's figures as JSON, whose keys docs/evaluation.md lists, and as a table."""

import json
import sys
from dataclasses import dataclass
from typing import Any, Protocol, Self

from fiddler.evaluate.figures import Accuracy, Divergence, Perplexity
from fiddler.evaluate.preparation import Preparation
from fiddler.markdown_table import markdown_table
from fiddler.models.dtypes import Dtypes
from fiddler.wrapping import fitted

Record = dict[str, Any]


class NamedModel(Protocol):
    """What is used of :class:`fiddler.llm.LLM`."""

    @property
    def model_name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def dtypes(self) -> Dtypes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A model as it ran, and its perplexity; outlives the model."""

    model: str
    revision: str | None
    dtypes: Dtypes
    perplexity: Perplexity

    @classmethod
    def of(cls, llm: NamedModel, perplexity: Perplexity) -> Self:
        """The facts about ``llm``."""
        return cls(
            model=llm.model_name, revision=llm.revision, dtypes=llm.dtypes, perplexity=perplexity
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What was found; None for what was not asked for. ``reference`` brings ``divergence``."""

    run: Run
    reference: Run | None
    divergence: Divergence | None
    accuracy: Accuracy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All of one call."""

    build: str
    text_name: str
    text_sha256: str
    prepared: Preparation
    results: Results


def render(evaluation: Evaluation, form: str, *, width: int = sys.maxsize) -> str:
    """``evaluation`` as ``md``, for a terminal of ``width`` columns, or ``json``."""
    return markdown(evaluation, width=width) if form == "md" else as_json(evaluation)


def as_json(evaluation: Evaluation) -> str:
    """One object."""
    return json.dumps(record_of(evaluation), indent=2)


def record_of(evaluation: Evaluation) -> Record:
    """JSON types; what was not asked for is None."""
    results, prepared = evaluation.results, evaluation.prepared
    reference, divergence = results.reference, results.divergence
    against = None
    if reference is not None and divergence is not None:
        against = _run_record(reference) | _divergence_record(divergence)
    return {
        "build_commit": evaluation.build,
        "text": evaluation.text_name,
        "text_sha256": evaluation.text_sha256,
        "text_tokens": len(prepared.text.ids),
        "window": prepared.window,
        "stride": prepared.stride,
        **_run_record(results.run),
        "against": against,
        "questions": _accuracy_record(results.accuracy) if results.accuracy else None,
    }


def _run_record(run: Run) -> Record:
    return {
        "model": run.model,
        "revision": run.revision,
        "dtype": run.dtypes.compute,
        "expert_dtype": run.dtypes.expert,
        "kv_dtype": run.dtypes.kv,
        "scored_tokens": run.perplexity.num_tokens,
        "nll": run.perplexity.nll.mean,
        "nll_stderr": run.perplexity.nll.stderr,
        "perplexity": run.perplexity.value,
        "perplexity_stderr": run.perplexity.stderr,
    }


def _divergence_record(divergence: Divergence) -> Record:
    return {
        "kl": divergence.kl.mean,
        "kl_stderr": divergence.kl.stderr,
        "kl_p99": divergence.p99,
        "kl_max": divergence.largest,
        "same_top": divergence.same_top.mean,
        "same_top_stderr": divergence.same_top.stderr,
    }


def _accuracy_record(accuracy: Accuracy) -> Record:
    return {
        "asked": accuracy.num_asked,
        "right": accuracy.num_right,
        "accuracy": accuracy.share.mean,
        "accuracy_stderr": accuracy.share.stderr,
        "by_task": {
            task: {"asked": asked, "right": right}
            for task, (right, asked) in accuracy.by_task.items()
        },
    }


def markdown(evaluation: Evaluation, *, width: int = sys.maxsize) -> str:
    """A table with the reference's row first, and below it what was read."""
    results = evaluation.results
    rows = [_run_cells(results.run)]
    if results.divergence is not None and results.reference is not None:
        rows[0] |= _divergence_cells(results.divergence)
        rows.insert(0, _run_cells(results.reference))
    if results.accuracy is not None:
        rows[-1] |= _accuracy_cells(results.accuracy)
    headings = list(rows[-1])
    cells = [[row.get(heading, "") for heading in headings] for row in rows]
    table = markdown_table(headings, cells, left={"model", "dtype", "experts", "KV"}, width=width)
    below = [part for line in _lines_below(evaluation) for part in fitted(line, width)]
    return "\n".join([*table, "", *below])


def _run_cells(run: Run) -> dict[str, str]:
    perplexity = run.perplexity
    return {
        "model": run.model,
        "dtype": run.dtypes.compute,
        "experts": run.dtypes.expert,
        **({"KV": run.dtypes.kv} if run.dtypes.kv != run.dtypes.compute else {}),
        "perplexity": f"{perplexity.value:.4f} ± {perplexity.stderr:.4f}",
    }


def _divergence_cells(divergence: Divergence) -> dict[str, str]:
    return {
        "KL": f"{divergence.kl.mean:.3g} ± {divergence.kl.stderr:.1g}",
        "KL 99 %": f"{divergence.p99:.3g}",
        "same top token": f"{divergence.same_top.mean:.2%} ± {divergence.same_top.stderr:.2%}",
    }


def _accuracy_cells(accuracy: Accuracy) -> dict[str, str]:
    share = f"{accuracy.share.mean:.1%} ± {accuracy.share.stderr:.1%}"
    return {"questions": f"{accuracy.num_right} of {accuracy.num_asked}, {share}"}


def _lines_below(evaluation: Evaluation) -> list[str]:
    results, prepared = evaluation.results, evaluation.prepared
    lines = [
        f"text: {evaluation.text_name}, {results.run.perplexity.num_tokens:,} tokens scored in "
        f"windows of {prepared.window:,}, {prepared.stride:,} apart"
    ]
    if results.accuracy is not None:
        tasks = results.accuracy.by_task.items()
        told = ", ".join(f"{task} {right}/{asked}" for task, (right, asked) in tasks)
        lines.append(f"questions: {told}")
    return [*lines, f"build: {evaluation.build}"]
