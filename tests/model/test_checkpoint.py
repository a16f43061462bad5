"""Safetensors folders: read without a copy, and every damage is one sentence."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fiddler.errors import CheckpointError
from fiddler.models.checkpoint import INDEX, SINGLE, Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.registry import load_config, parse_config
from tests.tiny_models import MODEL_TYPES, make_tiny, shared_tiny

VICTIM = "model.layers.1.self_attn.k_proj.weight"


def open_and_check(folder: Path, config: ModelConfig) -> None:
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check(config)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A single-file checkpoint that a test may damage."""
    return Path(shutil.copytree(shared_tiny("qwen3_moe"), tmp_path / "tiny"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint in many shards that a test may damage."""
    return make_tiny("qwen3_moe", tmp_path / "sharded", sharded=True)


def rewrite(folder: Path, change: Any) -> None:
    """Save the tensors of a single-file checkpoint again after ``change(tensors)``."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_equal_safetensors_own_reading(model_type: str, dtype: str) -> None:
    folder = shared_tiny(model_type, dtype=dtype)
    open_and_check(folder, load_config(folder))
    with Checkpoint.open(folder) as checkpoint:
        for name, want in load_file(folder / SINGLE).items():
            got = checkpoint.tensor(name, tuple(want.shape))
            assert got.dtype is getattr(torch, dtype)
            assert torch.equal(got, want)


def test_shards_hold_the_same_tensors(sharded: Path) -> None:
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    open_and_check(sharded, load_config(sharded))
    with Checkpoint.open(sharded) as parts:
        for name, want in load_file(shared_tiny("qwen3_moe") / SINGLE).items():
            assert torch.equal(parts.tensor(name, tuple(want.shape)), want)


def test_a_tensor_is_a_view_of_the_file_and_outlives_the_checkpoint(tiny: Path) -> None:
    with Checkpoint.open(tiny) as checkpoint:
        first, second = (checkpoint.tensor(VICTIM, (48, 64)) for _ in range(2))
        assert first.data_ptr() == second.data_ptr()
        before = first.clone()
    assert torch.equal(first, before)
    assert mapped(tiny)
    del first, second
    assert not mapped(tiny)


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


def test_threads_may_read_at_once(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint, ThreadPoolExecutor(8) as pool:
        want = load_file(shared_tiny("qwen3_moe") / SINGLE)

        def equal(name: str) -> bool:
            read = torch.empty_like(want[name])
            assert checkpoint.read(name, read)
            viewed = checkpoint.tensor(name, tuple(want[name].shape))
            return torch.equal(viewed, want[name]) and torch.equal(read, want[name])

        assert all(pool.map(equal, [*want] * 4))


def test_tensors_beyond_the_model_are_tolerated(tiny: Path) -> None:
    rewrite(tiny, lambda tensors: tensors.update(extra=torch.ones(3, dtype=torch.int64)))
    open_and_check(tiny, load_config(tiny))


def test_a_tied_model_needs_no_head() -> None:
    folder = shared_tiny("qwen3_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / SINGLE)
    open_and_check(folder, load_config(folder))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_missing_tensor_of_any_kind_is_named(model_type: str, tmp_path: Path) -> None:
    folder = shared_tiny(model_type)
    config = load_config(folder)
    tensors = load_file(folder / SINGLE)
    of_each_kind = {re.sub(r"\d+", "N", name): name for name in tensors}.values()
    for name in of_each_kind:
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / SINGLE)
        with pytest.raises(CheckpointError, match=name):
            open_and_check(tmp_path, config)


def test_a_wrong_shape_is_named_with_both(tiny: Path) -> None:
    rewrite(tiny, lambda tensors: tensors.update({VICTIM: torch.ones(47, 64)}))
    with pytest.raises(CheckpointError, match=rf"{VICTIM}.*\[47, 64\].*\[48, 64\]"):
        open_and_check(tiny, load_config(tiny))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8])
def test_a_wrong_dtype_is_named(dtype: torch.dtype, tiny: Path) -> None:
    rewrite(tiny, lambda tensors: tensors.update({VICTIM: torch.ones(48, 64).to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{VICTIM}.*dtype"):
        open_and_check(tiny, load_config(tiny))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint.open(sharded)


def test_a_tensor_missing_in_its_shard_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    other = next(s for s in index["weight_map"].values() if s != index["weight_map"][VICTIM])
    index["weight_map"][VICTIM] = other
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{other}.*{VICTIM}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ""}}',
    ],
)
def test_a_damaged_index_is_one_sentence(index: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("other", [None, "pytorch_model.bin", "model-q4.gguf"])
def test_a_folder_without_safetensors_says_what_it_has(other: str | None, tmp_path: Path) -> None:
    if other:
        (tmp_path / other).touch()
    with pytest.raises(CheckpointError, match=other or SINGLE):
        Checkpoint.open(tmp_path)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    folder = shared_tiny("mixtral")
    whole = (folder / SINGLE).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    size = data.draw(
        st.one_of(st.integers(0, 9), st.integers(0, header), st.integers(0, len(whole) - 1))
    )
    (tmp_path / SINGLE).write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=SINGLE):
        Checkpoint.open(tmp_path)


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_scrambled_header_never_leads_outside_the_file(
    data: st.DataObject, tmp_path: Path
) -> None:
    folder = shared_tiny("mixtral")
    content = bytearray((folder / SINGLE).read_bytes())
    header = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 8 + header - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / SINGLE).write_bytes(content)
    try:
        open_and_check(tmp_path, load_config(folder))
    except CheckpointError:
        return
    with Checkpoint.open(tmp_path) as checkpoint:  # then what the model needs is readable
        for name, want in load_file(folder / SINGLE).items():
            assert checkpoint.tensor(name, tuple(want.shape)).shape == want.shape


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_an_impossible_entry_is_named(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"strange.weight": entry}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"strange\.weight"):
        Checkpoint.open(tmp_path)


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(CheckpointError, match=SINGLE):
        Checkpoint.open(tmp_path)


def test_checking_reads_headers_only() -> None:
    """A 30-billion-parameter checkpoint is checked in the time of its names."""
    config = parse_config({"model_type": "qwen3_moe"})
    checkpoint = Checkpoint(Path("nowhere"), {})
    with pytest.raises(CheckpointError, match="embed_tokens"):
        checkpoint.check(config)
