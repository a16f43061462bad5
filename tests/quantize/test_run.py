"""Whole runs on a tiny model: what lies in the folder, interruptions, and everything refused."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.packed_layout import PackedShape, dequantise, unpack_expert
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import parse_kind
from fiddler.errors import CheckpointError, FiddlerError, NumericsError, QuantizeError
from fiddler.models.checkpoint import INDEX, SINGLE, Checkpoint
from fiddler.models.manifest import expert_parts
from fiddler.models.registry import load_config
from fiddler.quantize.target import JOURNAL
from tests.quantize.conftest import Quantize

EXPERT = "model.layers.1.mlp.experts.5"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def changed(tiny: Path, folder: Path, change: Any) -> Path:
    """A copy of the model after ``change(tensors)``."""
    shutil.copytree(tiny, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE)
    return folder


def test_experts_are_packed_and_the_rest_is_bfloat16(run: Quantize, tiny: Path) -> None:
    made = run("w4g32z")
    found, given = stored(made.folder), load_file(tiny / SINGLE)
    index = json.loads((made.folder / INDEX).read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == made.nbytes
    assert made.nbytes == sum(t.numel() * t.element_size() for t in found.values())
    for name, tensor in found.items():
        if not name.endswith(".packed"):
            assert torch.equal(tensor, given[name].bfloat16())
    shape = PackedShape(parse_kind("w4g32z"), 64, 64)
    parts = expert_parts(load_config(tiny), 1, 5)
    unpacked = unpack_expert(shape, found[f"{EXPERT}.packed"].numpy())
    for part, ours in zip(parts, unpacked, strict=True):
        w_NK = given[part.name].numpy()
        error = np.linalg.norm(dequantise(shape.kind, *ours) - w_NK)
        nearest = dequantise(shape.kind, *round_to_nearest(w_NK, shape.kind))
        assert 0 < error <= np.linalg.norm(nearest - w_NK)


def test_packed_tensors_begin_cache_lines(run: Quantize) -> None:
    folder = run("w8g64").folder
    with Checkpoint.open(folder) as checkpoint:
        begins = {n: e.begin for n, (_, e) in checkpoint._entries.items() if ".packed" in n}
    assert len(begins) == 24 and not any(begin % 64 for begin in begins.values())


def test_config_and_small_files_come_along(run: Quantize, tiny: Path, text: Path) -> None:
    folder = run("w8g64", method="gptq", calibration=text).folder
    raw, theirs = (json.loads((f / "config.json").read_text()) for f in (folder, tiny))
    scheme = raw.pop("quantization_config")
    assert raw == theirs | {"dtype": "bfloat16"}
    assert (scheme["quant_method"], scheme["version"]) == ("fiddler", 1)
    assert scheme["experts"] == {"kind": "w8g64"} and scheme["made"]["method"] == "gptq"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    assert not (folder / JOURNAL).exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_a_calibrated_run_reports_experts_that_saw_too_little(run: Quantize, text: Path) -> None:
    made = run(method="gptq", calibration=text)
    assert made.calibration_tokens >= 512 and made.least_tokens == 16
    assert not made.unfitted
    text.with_name("short.txt").write_text(text.read_text()[:33])
    made = run(method="gptq", calibration=text.with_name("short.txt"))
    assert made.calibration_tokens == 32
    assert made.unfitted and len(made.unfitted) < made.num_experts
    assert {layer for layer, _ in made.unfitted} <= {0, 1, 2}


def test_progress_counts_experts(run: Quantize) -> None:
    seen: list[tuple[str, int, int]] = []
    run(on_progress=lambda *told: seen.append(told))
    assert seen == [("quantizing experts", done, 24) for done in range(1, 25)]


class Stop(Exception):
    """What interrupts a run."""


def stop_at(number: int) -> Any:
    def on_progress(what: str, done: int, total: int) -> None:
        if done == number:
            raise Stop

    return on_progress


@pytest.mark.parametrize("number", [1, 8, 9, 20, 24])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_resumed_run_makes_the_same_bytes(
    run: Quantize, text: Path, tmp_path: Path, number: int, method: str
) -> None:
    options = {"method": method, "calibration": text if method == "gptq" else None}
    wanted = contents(run(**options, output=tmp_path / "whole").folder)
    with pytest.raises(Stop):
        run(**options, on_progress=stop_at(number))
    assert not (tmp_path / "out").exists()
    with pytest.raises(QuantizeError, match="interrupted run left"):
        run(**options)
    kept = contents(tmp_path / "out.partial")
    seen: list[int] = []
    made = run(**options, resume=True, on_progress=lambda what, done, total: seen.append(done))
    assert contents(made.folder) == wanted and seen[-1] == 24
    finished = json.loads(kept[JOURNAL])["finished"]
    assert len(finished) == 1 + (number - 1) // 8  # the head's file, and whole layers
    assert not (tmp_path / "out.partial").exists()


def test_another_job_does_not_go_on_with_it(run: Quantize, text: Path) -> None:
    with pytest.raises(Stop):
        run(on_progress=stop_at(10))
    with pytest.raises(QuantizeError, match="begun with another scheme"):
        run("w8g32", resume=True)
    with pytest.raises(QuantizeError, match="another calibration and method"):
        run(method="gptq", calibration=text, resume=True)
    run(resume=True)


def test_another_model_of_the_same_sizes_does_not_go_on_with_it(
    run: Quantize, tiny: Path, tmp_path: Path
) -> None:
    """Whichever of its tensors was trained further."""
    folder = changed(tiny, tmp_path / "model", lambda tensors: None)
    first = (folder / SINGLE).read_bytes()
    with pytest.raises(Stop):
        run(source=folder, on_progress=stop_at(10))
    tensors = load_file(folder / SINGLE)
    for name, tensor in tensors.items():
        save_file(tensors | {name: tensor * 1.01}, folder / SINGLE)
        assert (folder / SINGLE).stat().st_size == len(first)
        with pytest.raises(QuantizeError, match="begun with another model"):
            run(source=folder, resume=True)
    (folder / SINGLE).write_bytes(first)
    run(source=folder, resume=True)


def test_a_finished_file_that_was_cut_is_made_again(run: Quantize, tmp_path: Path) -> None:
    wanted = contents(run(output=tmp_path / "whole").folder)
    with pytest.raises(Stop):
        run(on_progress=stop_at(20))
    victim = sorted((tmp_path / "out.partial").glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert contents(run(resume=True).folder) == wanted


def test_resuming_nothing_begins(run: Quantize) -> None:
    assert run(resume=True).num_experts == 24


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{EXPERT}.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(
    run: Quantize, tiny: Path, tmp_path: Path, name: str, bad: float
) -> None:
    folder = changed(tiny, tmp_path / "bad", lambda tensors: tensors[name].view(-1)[3].fill_(bad))
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        run(source=folder)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_the_scales_are_named(run: Quantize, tiny: Path, tmp_path: Path) -> None:
    name = f"{EXPERT}.down_proj.weight"
    folder = changed(tiny, tmp_path / "large", lambda tensors: tensors[name].mul_(1e9))
    with pytest.raises(QuantizeError, match=r"expert 5 of layer 1: .* choose bf16 scales"):
        run(source=folder)


def test_a_disk_that_is_full_is_one_sentence(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fiddler.quantize.layers as layers

    write = layers.write_shard

    def full(path: Path, *rest: Any) -> None:
        if "00003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(layers, "write_shard", full)
    with pytest.raises(QuantizeError, match=r"is full, \d+\.\d+ MB more are needed") as caught:
        run()
    assert "--resume" in caught.value.hint
    monkeypatch.setattr(layers, "write_shard", write)
    assert run(resume=True).num_experts == 24


def test_a_disk_that_is_too_small_is_refused_before(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing that another scheme would find in its way."""
    with monkeypatch.context() as patch:
        patch.setattr("fiddler.quantize.target.free_bytes", lambda folder: 1000)
        said = r"needs .* MB more on the disk, which has 0\.00 MB"
        with pytest.raises(QuantizeError, match=said) as caught:
            run(on_progress=stop_at(1))
    assert "--resume" not in caught.value.hint and not list(tmp_path.iterdir())
    run("w8g32")


def test_a_result_that_was_cut_is_refused(run: Quantize) -> None:
    folder = run().folder
    victim = sorted(folder.glob("*.safetensors"))[2]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{victim.name} is damaged or truncated"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "w4g128"}, "groups of 128 do not divide the hidden size of 64"),
        ({"method": "gptq"}, "gptq fits the weights to a text"),
        ({"calibration": Path("nowhere.txt")}, "text file nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused(
    run: Quantize, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(FiddlerError, match=said):
        run(**options)
    assert not list(tmp_path.iterdir())


def test_a_quantised_model_is_not_quantised_again(run: Quantize, tmp_path: Path) -> None:
    folder = run().folder
    with pytest.raises(QuantizeError, match="is quantised already"):
        run(source=folder, output=tmp_path / "again")


def test_a_text_shorter_than_a_window_is_refused(run: Quantize, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(QuantizeError, match="has 9 tokens, less than one window of 32"):
        run(calibration=tmp_path / "short.txt")
