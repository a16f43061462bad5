"""Perplexity and divergence of whole models against ``transformers``.

Shapes: T scored tokens, V vocabulary.
"""

import math
from pathlib import Path

import pytest
import torch

from fiddler import LLM
from fiddler.builtin_text.corpus import heldout
from fiddler.errors import NumericsError
from fiddler.evaluate import text_run
from fiddler.evaluate.logit_file import LogitFile
from fiddler.evaluate.questions import answer_questions
from fiddler.evaluate.text_run import TokenText, score_text
from fiddler.evaluate.windows import cut_windows
from tests.e2e.conftest import OpenModel, open_folder
from tests.oracle import oracle_logprobs
from tests.tiny_models import BOS_ID, shared_tiny

WINDOW, STRIDE, LENGTH = 50, 20, 173


def make_text(start_ids: tuple[int, ...] = ()) -> TokenText:
    ids = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()
    windows = cut_windows(LENGTH, window=WINDOW, stride=STRIDE, num_start=len(start_ids))
    return TokenText(ids=ids, start_ids=start_ids, windows=windows)


def oracle_text_logprobs(model_type: str, text: TokenText) -> torch.Tensor:
    """Float64 ``[T, V]``, each window alone through the oracle."""
    rows = []
    for window in text.windows:
        logprobs_TV = oracle_logprobs(shared_tiny(model_type), text.prompt(window))
        rows.append(logprobs_TV[-1 - (window.end - window.first) : -1])
    return torch.cat(rows)


def oracle_surprise(model_type: str, text: TokenText) -> float:
    targets_T1 = torch.tensor(text.targets)[:, None]
    return -float(oracle_text_logprobs(model_type, text).gather(1, targets_T1).mean())


@pytest.mark.parametrize("start_ids", [(), (BOS_ID,)])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_perplexity_is_the_oracles(
    model: OpenModel, model_type: str, start_ids: tuple[int, ...]
) -> None:
    text = make_text(start_ids)
    found = score_text(model(model_type), text).perplexity
    assert found.num_tokens == LENGTH - 1 + len(start_ids)
    assert found.value == pytest.approx(math.exp(oracle_surprise(model_type, text)), rel=1e-4)


@pytest.mark.parametrize(("tokens", "num_batches"), [(16, 8), (120, 4)])
def test_windows_in_several_steps_and_several_in_one(
    model: OpenModel, tokens: int, num_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_run, "TOKENS_AT_ONCE", tokens)
    llm, told = model(max_batched_tokens=tokens), []
    text = make_text()
    found = score_text(llm, text, on_progress=lambda *counts: told.append(counts)).perplexity
    assert found.nll.mean == pytest.approx(oracle_surprise("mixtral", text), rel=1e-4)
    assert told[-1] == (LENGTH - 1, LENGTH - 1)
    assert len(told) == num_batches


def test_a_model_does_not_diverge_from_itself(model: OpenModel, tmp_path: Path) -> None:
    text = make_text()
    for dtype in ("float32", "bfloat16"):
        llm = model("qwen3_moe", dtype=dtype)
        vocab_size = llm.model_config.vocab_size
        with LogitFile(LENGTH - 1, vocab_size, getattr(torch, dtype), tmp_path) as file:
            first = score_text(llm, text, keep_in=file)
            again = score_text(llm, text, compare_with=file)
        assert again.perplexity == first.perplexity
        assert again.divergence is not None
        assert (again.divergence.kl.mean, again.divergence.largest) == (0, 0)
        assert again.divergence.same_top.mean == 1


def test_divergence_of_two_models_is_the_oracles(model: OpenModel, tmp_path: Path) -> None:
    text = make_text()
    reference, other = model("mixtral"), model("olmoe")
    vocab_size = reference.model_config.vocab_size
    with LogitFile(LENGTH - 1, vocab_size, torch.float32, tmp_path) as file:
        score_text(reference, text, keep_in=file)
        found = score_text(other, text, compare_with=file).divergence
    wanted_TV = oracle_text_logprobs("mixtral", text)
    logprobs_TV = oracle_text_logprobs("olmoe", text)
    kl_T = (wanted_TV.exp() * (wanted_TV - logprobs_TV)).sum(-1)
    assert found is not None
    assert found.kl.mean == pytest.approx(float(kl_T.mean()), rel=1e-4)
    assert found.p99 == pytest.approx(float(kl_T.quantile(0.99)), rel=1e-4)
    same_T = wanted_TV.argmax(-1) == logprobs_TV.argmax(-1)
    assert found.same_top.mean == pytest.approx(float(same_T.double().mean()))


def test_what_a_reader_raises_ends_the_batch_and_no_more(model: OpenModel) -> None:
    llm, text = model(), make_text()

    class BrokenFile:
        def write(self, row: int, logits_RV: torch.Tensor) -> None:
            raise NumericsError("stop")

    with pytest.raises(NumericsError, match="stop"):
        score_text(llm, text, keep_in=BrokenFile())  # type: ignore[arg-type]
    assert score_text(llm, text).perplexity.num_tokens == LENGTH - 1


def test_the_built_in_model_answers_its_questions() -> None:
    with LLM("builtin", max_model_len=512, cpu_threads=1) as llm:
        found = answer_questions(llm, heldout(4, seed=1))
    assert found.by_task == dict.fromkeys(("add", "subtract", "multiply", "compare"), (1, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    text, options = make_text(), {"device": "cuda", "vram_gb": 8, "max_model_len": 256}
    with open_folder(shared_tiny("qwen3_moe"), dtype=dtype, **options) as llm:
        vocab_size = llm.model_config.vocab_size
        with LogitFile(LENGTH - 1, vocab_size, getattr(torch, dtype), tmp_path) as file:
            first = score_text(llm, text, keep_in=file)
            again = score_text(llm, text, compare_with=file)
    expected = oracle_surprise("qwen3_moe", text)
    print(dtype, "nats", first.perplexity.nll.mean, "oracle", expected, "again", again)
    assert first.perplexity.nll.mean == pytest.approx(
        expected, rel=1e-4 if dtype == "float32" else 2e-2
    )
    assert again.divergence is not None
    assert (again.divergence.kl.mean, again.divergence.same_top.mean) == (0, 1)
