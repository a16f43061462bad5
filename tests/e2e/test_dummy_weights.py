"""``load_format="dummy"``: a configuration alone runs, the same each time for the same seed."""

import shutil
from pathlib import Path

import pytest

from fiddler import LLM, SamplingParams
from fiddler.errors import CheckpointError, ConfigError
from tests.tiny_models import shared_tiny

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    shutil.copy(shared_tiny("qwen3_moe") / "config.json", tmp_path)
    return tmp_path


def tokens_of(folder: Path, seed: int) -> list[int]:
    with LLM(str(folder), load_format="dummy", seed=seed, cpu_threads=1) as llm:
        return llm.generate([5, 6, 7], PARAMS).outputs[0].token_ids


def test_a_config_alone_runs_and_the_seed_decides(config_only: Path) -> None:
    first = tokens_of(config_only, seed=1)
    assert len(first) == 8
    assert tokens_of(config_only, seed=1) == first
    assert tokens_of(config_only, seed=2) != first


def test_more_threads_than_cores_are_refused(config_only: Path) -> None:
    with pytest.raises(ConfigError, match="10000 CPU threads"):
        LLM(str(config_only), load_format="dummy", cpu_threads=10_000)


def test_real_weights_still_need_a_tokenizer(config_only: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(str(config_only))
