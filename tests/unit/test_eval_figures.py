"""Scores against their definitions, figures against numpy, and the file that keeps logits.

Shapes: R rows, V vocabulary.
"""

import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from fiddler.errors import ConfigError
from fiddler.evaluate.figures import Accuracy, Divergence, Estimate, Perplexity
from fiddler.evaluate.logit_file import LogitFile
from fiddler.evaluate.scores import divergence, surprise

ROWS, VOCAB = 21, 50  # more than two blocks, the last one ragged


def logits(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def probabilities(logits_RV: torch.Tensor) -> np.ndarray:
    exp_RV = np.exp(logits_RV.double().numpy())
    return exp_RV / exp_RV.sum(axis=1, keepdims=True)


def test_surprise_is_minus_the_log_probability() -> None:
    targets_R = torch.arange(ROWS) * 2
    expected = -np.log(probabilities(logits(0))[np.arange(ROWS), targets_R.numpy()])
    np.testing.assert_allclose(surprise(logits(0), targets_R).numpy(), expected, rtol=1e-12)


def test_divergence_is_its_definition() -> None:
    p_RV, q_RV = probabilities(logits(1)), probabilities(logits(2))
    kl_R, same_R = divergence(logits(2), logits(1))
    expected = (p_RV * np.log(p_RV / q_RV)).sum(axis=1)
    np.testing.assert_allclose(kl_R.numpy(), expected, rtol=1e-12)
    assert same_R.tolist() == (p_RV.argmax(1) == q_RV.argmax(1)).tolist()


def test_a_model_does_not_diverge_from_itself() -> None:
    kl_R, same_R = divergence(logits(3), logits(3).clone())
    assert (kl_R == 0).all()
    assert same_R.all()


def test_any_of_the_largest_logits_is_the_likeliest() -> None:
    reference_RV = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]])
    _, same_R = divergence(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), reference_RV)
    assert same_R.tolist() == [True, False]


def test_broken_logits_surprise_by_no_number() -> None:
    broken_RV = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
    assert not surprise(broken_RV, torch.tensor([1, 1, 1])).isfinite().any()


def test_figures_of_a_text() -> None:
    surprise_T = np.array([1.0, 2.0, 4.0, 5.0])
    found = Perplexity.of(surprise_T)
    assert found.value == pytest.approx(math.exp(3.0))
    deviation = math.sqrt((4 + 1 + 1 + 4) / 3)
    assert found.stderr == pytest.approx(math.exp(3.0) * deviation / 2)
    assert Estimate.of(np.array([2.0])) == Estimate(2.0, 0.0)


def test_figures_of_a_divergence() -> None:
    found = Divergence.of(np.arange(101.0), np.arange(101) % 4 != 0)
    assert (found.kl.mean, found.p99, found.largest) == (50.0, 99.0, 100.0)
    assert found.same_top.mean == pytest.approx(75 / 101)


def test_accuracy_by_task() -> None:
    found = Accuracy.of([("add", True), ("spell", False), ("add", True), ("spell", True)])
    assert found.by_task == {"add": (2, 2), "spell": (1, 2)}
    assert (found.num_right, found.num_asked) == (3, 4)
    assert found.share == Estimate(0.75, math.sqrt(0.75 * 0.25 / 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_back_from_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    kept_RV = logits(4).to(dtype).float()
    with LogitFile(ROWS, VOCAB, dtype, tmp_path / "new") as file:
        file.write(5, kept_RV[5:])
        file.write(0, kept_RV[:5])
        assert torch.equal(file.read(3, 10).float(), kept_RV[3:13])
        assert not list((tmp_path / "new").iterdir())  # it has no name


def test_a_file_that_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage((1 << 30) + 2048))
    with pytest.raises(ConfigError, match=r"take 4\.1 KiB, but .* has 2\.0 KiB to spare") as error:
        LogitFile(ROWS, VOCAB, torch.float32, tmp_path)
    assert "--max-tokens 10" in error.value.hint
