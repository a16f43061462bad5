"""Damaged models and plans that cannot work: one readable sentence, and nothing is left behind."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddler import Placement, SamplingParams
from fiddler.errors import (
    CheckpointError,
    ConfigError,
    FiddlerError,
    NumericsError,
    OutOfMemoryError,
    ProfileError,
    PromptError,
    TemplateError,
)
from fiddler.models.registry import ARCHITECTURES, load_config
from tests.e2e.conftest import open_folder
from tests.forward import random_texts
from tests.oracle import oracle_greedy
from tests.tiny_models import VOCAB_SIZE, make_tiny, shared_tiny

EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
WEIGHTS = "model.safetensors"


def mixtral() -> Path:
    """Built at first use, not while tests are collected."""
    return shared_tiny("mixtral")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("bad") / "whole", sharded=True)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A folder of links to a model's files; a test replaces those that it damages."""

    def make_copy(source: Path) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    return make_copy


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    threads, files = threading.active_count(), num_open_files()
    yield
    assert threading.active_count() == threads
    assert num_open_files() <= files


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refused(folder: Path | str, kind: type[FiddlerError], *words: str, **options: Any) -> str:
    """Load, expect ``kind`` with one sentence that has all ``words``; return its hint."""
    with pytest.raises(kind) as caught:
        open_folder(Path(folder), **options)
    error = caught.value
    assert type(error) is kind
    assert "\n" not in error.message and len(error.message) < 400
    for word in words:
        assert word in error.message
    return error.hint


def replace(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def change_config(folder: Path, **fields: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    replace(folder / "config.json", json.dumps(raw | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


CopyOf = Callable[[Path], Path]

# --- the folder ---


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", ConfigError, "there is no folder", "nothing")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, CheckpointError, "config.json")


@pytest.mark.parametrize("content", ["", "{", "[1]", b"\xff\xfe\x00"])
def test_a_config_that_is_no_json(copy: CopyOf, content: Any) -> None:
    folder = copy(mixtral())
    replace(folder / "config.json", content)
    refused(folder, CheckpointError, "config.json")


def test_an_unknown_architecture_lists_the_known_ones(copy: CopyOf) -> None:
    folder = copy(mixtral())
    change_config(folder, model_type="gpt2")
    hint = refused(folder, CheckpointError, "unknown architecture 'gpt2'")
    assert all(name in hint for name in ARCHITECTURES)


def test_quantised_weights(copy: CopyOf) -> None:
    folder = copy(mixtral())
    change_config(folder, quantization_config={"quant_method": "gptq"})
    refused(folder, CheckpointError, "gptq")


def test_a_config_of_another_size(copy: CopyOf) -> None:
    folder = copy(mixtral())
    change_config(folder, vocab_size=300)
    refused(folder, CheckpointError, "embed_tokens", "[264, 64]", "[300, 64]")


# --- weights ---


def test_a_missing_shard(copy: CopyOf, whole: Path) -> None:
    folder = copy(whole)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refused(folder, CheckpointError, "lacks the shard", shards[1].name)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -5000])
def test_a_truncated_file(copy: CopyOf, keep: int) -> None:
    folder = copy(mixtral())
    content = (mixtral() / WEIGHTS).read_bytes()
    replace(folder / WEIGHTS, content[:keep])
    refused(folder, CheckpointError, WEIGHTS, "damaged or truncated")


def test_a_truncated_shard(copy: CopyOf, whole: Path) -> None:
    folder = copy(whole)
    shard = sorted(folder.glob("*.safetensors"))[2]
    replace(shard, shard.read_bytes()[:-100])
    refused(folder, CheckpointError, shard.name, "damaged or truncated")


def test_a_header_that_is_noise(copy: CopyOf) -> None:
    folder = copy(mixtral())
    content = bytearray((mixtral() / WEIGHTS).read_bytes())
    content[8:40] = b"\x00" * 32
    replace(folder / WEIGHTS, bytes(content))
    refused(folder, CheckpointError, WEIGHTS, "no JSON")


def test_no_weights(copy: CopyOf) -> None:
    folder = copy(mixtral())
    (folder / WEIGHTS).unlink()
    refused(folder, CheckpointError, "neither model.safetensors nor")


def test_an_index_without_a_map(copy: CopyOf, whole: Path) -> None:
    folder = copy(whole)
    replace(folder / "model.safetensors.index.json", "{}")
    refused(folder, CheckpointError, "no weight_map")


def test_a_missing_tensor(copy: CopyOf) -> None:
    folder = copy(mixtral())
    change_weights(folder, lambda tensors: tensors.pop(EXPERT))
    refused(folder, CheckpointError, EXPERT)


def test_a_tensor_of_the_wrong_shape(copy: CopyOf) -> None:
    folder = copy(mixtral())
    change_weights(folder, lambda tensors: tensors.update({EXPERT: torch.ones(64, 48)}))
    refused(folder, CheckpointError, EXPERT, "[64, 48]", "[48, 64]")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_a_tensor_of_the_wrong_dtype(copy: CopyOf, dtype: torch.dtype, name: str) -> None:
    folder = copy(mixtral())
    change_weights(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(dtype)}))
    refused(folder, CheckpointError, EXPERT, f"dtype {name}", "F32, BF16, F16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers(copy: CopyOf, name: str, bad: float) -> None:
    folder = copy(mixtral())

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = bad

    change_weights(folder, spoil)
    refused(folder, NumericsError, name, "NaN or Inf")


# --- tokenizer ---


def test_a_missing_tokenizer_says_what_is_there(copy: CopyOf) -> None:
    folder = copy(mixtral())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    hint = refused(folder, CheckpointError, "no tokenizer.json", "only tokenizer.model")
    assert hint


def test_a_damaged_tokenizer(copy: CopyOf) -> None:
    folder = copy(mixtral())
    replace(folder / "tokenizer.json", (mixtral() / "tokenizer.json").read_text()[:-20])
    refused(folder, CheckpointError, "tokenizer.json")


# --- memory, before anything is allocated ---


def test_no_room_in_vram_gives_the_numbers() -> None:
    """An emulated GPU side on a machine without one."""
    hint = refused(
        mixtral(), OutOfMemoryError, "the GPU side needs", "dense weights", "context", vram_gb=1e-4
    )
    assert "--vram-gb" in hint
    with open_folder(
        mixtral(), vram_gb=float(hint.split("--vram-gb ")[1].split()[0].rstrip(","))
    ) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2)).stats.output_tokens == 2


def test_no_room_in_ram_gives_the_numbers() -> None:
    hint = refused(mixtral(), OutOfMemoryError, "of RAM, but", "may be used", ram_gb=1e-4)
    assert "--ram-gb" in hint
    with open_folder(mixtral(), ram_gb=float(hint.split("--ram-gb ")[1].split()[0])) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=2)).stats.output_tokens == 2


def test_a_context_beyond_the_models() -> None:
    hint = refused(mixtral(), ConfigError, "513 tokens", "ends at 512", max_model_len=513)
    assert "512" in hint


def test_cuda_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(mixtral(), ConfigError, "CUDA was asked for", device="cuda")


# --- profile and placement ---


def write_profile(path: Path, **changes: Any) -> Path:
    record = {
        "version": 1,
        "model": mixtral().name,
        "revision": None,
        "corpus_sha256": "0" * 64,
        "num_tokens": 10,
        "created": "2026-01-01T00:00:00+00:00",
        "counts": [[e + 1 for e in range(8)] for _ in range(3)],
    }
    path.write_text(json.dumps(record | changes))
    return path


def test_a_profile_of_another_model(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.json", model="org/other")
    refused(mixtral(), ProfileError, "org/other", mixtral().name, profile=str(path))


def test_a_profile_of_another_shape(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.json", counts=[[1] * 8])
    refused(mixtral(), ProfileError, "1 layers, 8 experts", "3 layers", profile=str(path))


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1}', "[]"])
def test_a_damaged_profile(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    refused(mixtral(), ProfileError, "p.json", profile=str(path))


def test_a_missing_profile(tmp_path: Path) -> None:
    refused(mixtral(), ProfileError, "cannot be read", profile=str(tmp_path / "p.json"))


def test_a_profile_decides_which_experts_are_resident(tmp_path: Path) -> None:
    """The counterpart: a right profile is taken, and its most used experts are placed."""
    path = write_profile(tmp_path / "p.json")
    with open_folder(mixtral(), vram_gb=1, max_num_seqs=1) as llm:
        memory, one = llm.plan.memory, llm.plan.memory.gpu_experts // 24
    vram_gb = (memory.dense + memory.workspace + memory.kv + 6 * one) / 2**30
    with open_folder(mixtral(), vram_gb=vram_gb, profile=str(path), max_num_seqs=1) as llm:
        resident = llm.plan.placement.resident
    assert sum(map(len, resident)) == 6
    assert all(set(layer) == set(range(8 - len(layer), 8)) for layer in resident)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (Placement.of([[0], [1]]), "2 layers, the model 3"),
        (Placement.of([[0], [8], []]), "expert 8 of layer 1"),
        (Placement.of([[0], [-1], []]), "expert -1 of layer 1"),
    ],
    ids=["layers", "beyond", "negative"],
)
def test_a_placement_of_another_model(placement: Placement, words: str) -> None:
    refused(mixtral(), ConfigError, words, placement=placement)


# --- options ---


@pytest.mark.parametrize(("wrong", "meant"), [("vram", "vram_gb"), ("max_len", "max_model_len")])
def test_an_unknown_option_names_the_nearest(wrong: str, meant: str) -> None:
    refused(mixtral(), ConfigError, repr(wrong), f"did you mean {meant!r}", **{wrong: 8})


# --- what is not bad: every stored dtype ---


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_every_stored_dtype_runs_in_float32(model_type: str, stored: str) -> None:
    folder = shared_tiny(model_type, dtype=stored)
    prompts = random_texts([5, 30], VOCAB_SIZE, seed=2)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with open_folder(folder) as llm:
        found = [r.outputs[0].token_ids for r in llm.generate(prompts, params)]
    assert found == [oracle_greedy(folder, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_float16_checkpoint_runs_in_every_dtype(dtype: str) -> None:
    with open_folder(shared_tiny("mixtral", dtype="float16"), dtype=dtype) as llm:
        assert llm.generate("a", SamplingParams(max_tokens=4)).stats.output_tokens == 4


# --- without a tokenizer, as a named shape is ---


def test_a_model_without_a_tokenizer_takes_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.loading.model_files.SHAPES", {"tiny": None})
    monkeypatch.setattr(
        "fiddler.loading.model_files.load_shape", lambda name: load_config(mixtral())
    )
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
    runs = []
    for _ in range(2):
        with open_folder(Path("tiny"), load_format="dummy", seed=3) as llm:
            output = llm.generate([1, 2], params).outputs[0]
            assert output.text == "" and len(output.token_ids) == 5
            for prompt, settings in (("a", params), ([1], SamplingParams(stop="x"))):
                with pytest.raises(PromptError, match="tiny has no tokenizer"):
                    llm.generate(prompt, settings)
            with pytest.raises(TemplateError, match="tiny has no chat template"):
                llm.chat([{"role": "user", "content": "a"}])
            runs.append(output.token_ids)
    assert runs[0] == runs[1]


def test_an_empty_or_long_prompt_leaves_nothing_behind() -> None:
    with open_folder(mixtral(), prefix_caching=False) as llm:
        for bad in ("", "x" * 512):
            with pytest.raises(PromptError):
                llm.generate(bad)
        assert llm.num_free_pages == llm.plan.num_pages
