"""Loading: every tensor at its place, in its dtype, once."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fiddler.errors import NumericsError
from fiddler.models.checkpoint import SINGLE, Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.dummy import DummySource
from fiddler.models.manifest import all_parts, dense_bytes, expert_parts
from fiddler.models.registry import load_config, parse_config
from fiddler.models.weights import (
    CheckpointSource,
    DenseWeights,
    LayerWeights,
    load_dense,
    load_embedding_into,
    load_expert_into,
)
from tests.tiny_models import MODEL_TYPES, make_tiny, shared_tiny

VARIANTS = [
    *((model_type, {}) for model_type in MODEL_TYPES),
    ("olmoe", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_moe", {"mlp_only_layers": [0, 2], "attention_bias": False}),
]


def load(folder: Path, dtype: torch.dtype) -> tuple[ModelConfig, DenseWeights]:
    config = load_config(folder)
    with Checkpoint.open(folder) as checkpoint:
        source = CheckpointSource(checkpoint)
        return config, load_dense(source, config, device="cpu", dtype=dtype)


def storages(weights: DenseWeights) -> dict[int, int]:
    """Return address -> bytes of all memory that the weights keep."""
    tensors = [weights.embed_VH, weights.final_norm_H, weights.lm_head_VH]
    for layer in weights.layers:
        tensors += [t for f in fields(layer) if (t := getattr(layer, f.name)) is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_bytes_are_exact(
    model_type: str, overrides: dict[str, Any], dtype: torch.dtype
) -> None:
    config, weights = load(shared_tiny(model_type, **overrides), dtype)
    assert sum(storages(weights).values()) == dense_bytes(config, dtype.itemsize)


def test_an_input_embedding_can_lie_elsewhere() -> None:
    """As in host memory beside a GPU; what comes with it is on the device and the same."""
    folder = shared_tiny("mixtral")
    config, usual = load(folder, torch.float32)
    room_VH = torch.full_like(usual.embed_VH, float("nan"))
    with Checkpoint.open(folder) as checkpoint:
        source = CheckpointSource(checkpoint)
        load_embedding_into(source, config, room_VH)
        found = load_dense(source, config, device="cpu", dtype=torch.float32, embed_VH=room_VH)
    assert found.embed_VH is room_VH and torch.equal(room_VH, usual.embed_VH)
    assert torch.equal(found.lm_head_VH, usual.lm_head_VH)
    assert torch.equal(found.layers[0].qkv_FH, usual.layers[0].qkv_FH)


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_every_stored_tensor_arrives_once(model_type: str, overrides: dict[str, Any]) -> None:
    """Rows of all places together are the rows of all stored tensors: none lost, none doubled."""
    folder = shared_tiny(model_type, **overrides)
    config, weights = load(folder, torch.float32)
    placed = [weights.embed_VH, weights.final_norm_H]
    placed += [] if config.tie_embeddings else [weights.lm_head_VH]
    for index, layer in enumerate(weights.layers):
        placed += [t for f in fields(layer) if (t := getattr(layer, f.name)) is not None]
        if config.is_moe_layer(index):
            placed += experts(folder, config, index)
    stored = load_file(folder / SINGLE).values()
    assert checksum(placed) == pytest.approx(checksum(list(stored)), rel=1e-9)
    assert sum(t.numel() for t in placed) == sum(t.numel() for t in stored)


def checksum(tensors: list[torch.Tensor]) -> tuple[float, float]:
    total = sum(float(t.double().sum()) for t in tensors)
    return total, sum(float(t.double().square().sum()) for t in tensors)


def experts(folder: Path, config: ModelConfig, layer: int) -> list[torch.Tensor]:
    hidden, width = config.hidden_size, config.expert_size
    w13_EFH = torch.empty(config.num_experts, 2 * width, hidden)
    w2_EHI = torch.empty(config.num_experts, hidden, width)
    with Checkpoint.open(folder) as checkpoint:
        source = CheckpointSource(checkpoint)
        for e in range(config.num_experts):
            load_expert_into(source, config, layer, e, w13_EFH[e], w2_EHI[e])
    return [w13_EFH, w2_EHI]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_rows_are_in_order(dtype: torch.dtype) -> None:
    folder = shared_tiny("qwen2_moe")
    stored = {name: t.to(dtype) for name, t in load_file(folder / SINGLE).items()}
    config, weights = load(folder, dtype)
    layer = "model.layers.0."
    moe, dense = weights.layers[0], weights.layers[1]
    assert equal_rows(moe.qkv_FH, stored, layer, "self_attn.", ("q_proj", "k_proj", "v_proj"))
    biases = [stored[f"{layer}self_attn.{p}_proj.bias"] for p in "qkv"]
    assert moe.qkv_bias_F is not None and torch.equal(moe.qkv_bias_F, torch.cat(biases))
    shared, gate_up = "mlp.shared_expert.", ("gate_proj", "up_proj")
    assert equal_rows(moe.shared_gate_up_FH, stored, layer, shared, gate_up)
    assert equal_rows(dense.dense_gate_up_FH, stored, "model.layers.1.", "mlp.", gate_up)
    assert dense.router_EH is None and moe.dense_gate_up_FH is None
    w13_EFH, w2_EHI = experts(folder, config, 0)
    gate, up, down = (stored[p.name].float() for p in expert_parts(config, 0, 5))
    assert torch.equal(w13_EFH[5].to(dtype).float(), torch.cat((gate, up)))
    assert torch.equal(w2_EHI[5].to(dtype).float(), down)


def equal_rows(
    fused: torch.Tensor | None,
    stored: dict[str, torch.Tensor],
    layer: str,
    block: str,
    names: tuple[str, ...],
) -> bool:
    assert fused is not None
    return torch.equal(fused, torch.cat([stored[f"{layer}{block}{n}.weight"] for n in names]))


def test_a_tied_head_is_the_embedding_itself() -> None:
    _, weights = load(shared_tiny("mixtral", tie_word_embeddings=True), torch.float32)
    assert weights.lm_head_VH is weights.embed_VH


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_named(
    bad: float, stored: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny("olmoe", tmp_path)
    config = load_config(folder)
    dense, expert = "model.layers.2.self_attn.k_norm.weight", expert_parts(config, 1, 3)[2].name
    for name in (dense, expert):
        tensors = {n: t.to(stored) for n, t in load_file(folder / SINGLE).items()}
        tensors[name].view(-1)[17] = bad
        save_file(tensors, folder / SINGLE)
        with pytest.raises(NumericsError, match=name):
            load(folder, torch.bfloat16)
            experts(folder, config, 1)
        tensors[name].view(-1)[17] = 0.0
        save_file(tensors, folder / SINGLE)


def test_a_dummy_fills_the_same_places() -> None:
    config = load_config(shared_tiny("qwen2_moe"))
    weights = load_dense(DummySource(config, 1), config, device="cpu", dtype=torch.bfloat16)
    assert sum(storages(weights).values()) == dense_bytes(config, 2)
    assert isinstance(weights.layers[0], LayerWeights)


PEAK = """
import re, sys, torch
from pathlib import Path
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.registry import load_config
from fiddler.models.weights import CheckpointSource, load_dense
def peak_kib():  # not ru_maxrss: a child inherits its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
config = load_config(sys.argv[1])
torch.empty(4096).copy_(torch.ones(4096, dtype=torch.float64)).aminmax()  # threads and kernels
before = peak_kib()
with Checkpoint.open(sys.argv[1]) as checkpoint:
    weights = load_dense(CheckpointSource(checkpoint), config, device="cpu", dtype=torch.float32)
print((peak_kib() - before) * 1024)
"""


def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    """96 MiB of weights, the largest tensor 8 MiB: mapped pages must not add up beside them."""
    raw = {"model_type": "olmoe", "hidden_size": 1024, "num_hidden_layers": 6, "vocab_size": 64}
    raw |= {"num_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 8, "dtype": "float32"}
    config = parse_config(raw)
    source = DummySource(config, 0)
    save_file(
        {p.name: source.tensor(p.name, p.shape) for p in all_parts(config)}, tmp_path / SINGLE
    )
    (tmp_path / "config.json").write_text(repr(raw).replace("'", '"'))
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    grown, model = int(ran.stdout), dense_bytes(config, 4)
    assert model > 90 << 20
    assert model * 0.9 < grown < model + (16 << 20)
