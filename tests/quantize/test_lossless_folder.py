"""``fiddler quantize --scheme bf12``: a smaller folder whose model is the one it was made from."""

import logging
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from cpu_kernels.weight_kind import BF12
from fiddler.cli import cli
from fiddler.errors import NumericsError, QuantizeError
from fiddler.quantize.run import QuantizeJob, quantize
from tests.model.test_parity import split_at_random
from tests.quantize.packed_runs import loaded, logits, oracle_logits
from tests.tiny_models import MODEL_TYPES, shared_tiny


def made(source: Path, output: Path) -> Path:
    return quantize(QuantizeJob(source=source, output=output, kind=BF12, method="rtn")).folder


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_folders_model_is_that_of_the_oracle(model_type: str, tmp_path: Path) -> None:
    source = shared_tiny(model_type, dtype="bfloat16")
    folder = made(source, tmp_path / "bf12")
    placement = split_at_random(source, seed=1)
    found = logits(folder, placement=placement)
    for ours, wanted in zip(found, oracle_logits(source), strict=True):
        assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()
    with (
        loaded(folder, placement=placement) as stored,
        loaded(source, dtype="bf12", placement=placement) as packed,
    ):
        assert stored.dtypes.expert == "bf12"
        ours, theirs = (llm._running.experts.store for llm in (stored, packed))
        for layer in ours.shape.moe_layers:
            for expert in range(ours.shape.num_experts):
                places = [store[layer].place(expert)[0] for store in (ours, theirs)]
                assert torch.equal(*places)


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_numbers_of_other_types_are_said_to_be_rounded(
    stored: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fiddler"):
        folder = made(shared_tiny("qwen3_moe", dtype=stored), tmp_path / "bf12")
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (stored != "bfloat16")
    assert all(f"stored in {stored} and rounded to bfloat16" in text for text in said)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fiddler"), loaded(folder) as llm:
        assert not any("rounded" in note for note in llm.plan.notes)
    assert not any("rounded" in r.getMessage() for r in caplog.records)


def test_the_command_says_how_much_smaller_it_is(tmp_path: Path) -> None:
    source = shared_tiny("qwen3_moe", dtype="bfloat16", moe_intermediate_size=512, hidden_size=512)
    output = tmp_path / "smaller"
    done = CliRunner().invoke(cli, ["quantize", str(source), "--scheme", "bf12", "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "76." in done.output and "% of bfloat16" in done.output
    assert "without it" not in done.output


def test_there_is_nothing_to_fit(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text")
    source = shared_tiny("mixtral", dtype="bfloat16")
    for options in ({"method": "gptq"}, {"method": "rtn"}):
        job = QuantizeJob(
            source=source, output=tmp_path / "out", kind=BF12, calibration=text, **options
        )
        with pytest.raises(QuantizeError, match="bf12 loses nothing"):
            quantize(job)
    assert not (tmp_path / "out").exists()


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    source = shared_tiny("mixtral", dtype="bfloat16")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        made(broken, tmp_path / "out")
