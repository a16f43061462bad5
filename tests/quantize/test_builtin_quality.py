"""What quantising costs the built-in model: perplexity, divergence and right answers. Minutes."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from cpu_kernels.weight_kind import parse_kind
from fiddler.builtin_text.corpus import sample_conversation
from fiddler.cli import cli
from fiddler.hub.resolve import BUILTIN_FOLDER
from fiddler.quantize.run import QuantizedModel, QuantizeJob, quantize
from fiddler.text.chat_template import ChatTemplate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
CALIBRATION_BYTES = 150_000


@pytest.fixture(autouse=True)
def small_windows() -> None:
    """As users have them: the other tests of this folder make them small."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training conversations; the evaluation reads held-out ones."""
    template, rng = ChatTemplate.from_folder(BUILTIN_FOLDER), Random(7)
    assert template is not None
    written = ""
    while len(written) < CALIBRATION_BYTES:
        written += template.render(sample_conversation(rng), add_generation_prompt=False)
    path = tmp_path_factory.mktemp("text") / "training.txt"
    path.write_text(written)
    return path


@pytest.fixture(scope="module")
def make(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., QuantizedModel]:
    def made(kind: str, method: Any, **options: Any) -> QuantizedModel:
        job = QuantizeJob(
            source=BUILTIN_FOLDER,
            output=tmp_path_factory.mktemp("out") / "model",
            kind=parse_kind(kind),
            method=method,
            calibration=text if method == "gptq" else None,
            **options,
        )
        return quantize(job)

    return made


def evaluated(model: Path, *options: str) -> dict[str, Any]:
    """The record of an evaluation against the model as it is; with ``rise`` of the perplexity."""
    done = CliRunner().invoke(cli, ["eval", str(model), "--against", "builtin", *options, "-ojson"])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout)
    record["rise"] = record["perplexity"] / record["against"]["perplexity"] - 1
    print(f"{record['expert_dtype']}: {record['rise']:+.2%}, KL {record['against']['kl']:.5f}")
    return record


def test_int8_costs_nearly_nothing(make: Callable[..., QuantizedModel]) -> None:
    assert evaluated(make("w8g128", "rtn").folder)["rise"] <= 0.002


def test_int4_costs_little_if_fitted(make: Callable[..., QuantizedModel]) -> None:
    rounded = make("w4g128", "rtn")
    assert rounded.expert_bytes <= 0.27 * rounded.bf16_expert_bytes
    rtn = evaluated(rounded.folder)
    best = evaluated(make("w4g128", "gptq", outliers=16).folder, "--questions")
    assert best["rise"] <= 0.02 and best["rise"] < rtn["rise"]
    assert 2 * best["against"]["kl"] < rtn["against"]["kl"]
    assert best["questions"]["accuracy"] >= 0.99


def test_bits_by_layers_cost_less_than_as_many_by_outliers(
    make: Callable[..., QuantizedModel],
) -> None:
    uniform = make("w4g32", "gptq", outliers=32)
    share = uniform.expert_bytes / uniform.bf16_expert_bytes
    chosen = make("w4g128", "gptq", sensitivity=share)
    assert chosen.expert_bytes <= uniform.expert_bytes and len(chosen.layers_of) > 1
    ours, theirs = (evaluated(made.folder) for made in (chosen, uniform))
    assert ours["rise"] <= theirs["rise"]
    assert ours["against"]["kl"] < theirs["against"]["kl"]
