"""``--dtype bf12``: bfloat16 experts in 12 bits give what they give in 16."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.bf16 import bf16_to_f32
from cpu_kernels.lossless import unpack_lossless
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import BF12
from fiddler import LLM, SamplingParams
from fiddler.errors import ConfigError, NumericsError
from fiddler.models.checkpoint import SINGLE
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import resolve_dtypes
from fiddler.models.manifest import Part, expert_parts, packed_shape
from fiddler.models.packing import halves, lossless
from fiddler.models.registry import load_config
from tests.forward import Forward, random_texts, relative_error
from tests.model.test_parity import split_at_random
from tests.tiny_models import MODEL_TYPES, shared_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def loaded(folder: Path | str, dtype: str, **options: Any) -> LLM:
    settings: dict[str, Any] = {"device": "cpu", "cpu_threads": 1, "max_model_len": 128}
    return LLM(str(folder), dtype=dtype, **(settings | options))


def matrices(llm: LLM) -> dict[tuple[int, int], list[np.ndarray]]:
    """float32 gate, up and down of every expert, wherever and however it lies."""
    store, (hidden, width) = llm._running.experts.store, llm.model_config.expert_sides
    shape, found = PackedShape(BF12, hidden, width), {}
    for layer in store.shape.moe_layers:
        for expert in range(store.shape.num_experts):
            parts = [part.cpu() for part in store[layer].place(expert)]
            if len(parts) == 2:
                w13_FH, w2_HI = (part.float().numpy() for part in parts)
                found[layer, expert] = [*np.split(w13_FH, 2), w2_HI]
            else:
                found[layer, expert] = [
                    bf16_to_f32(unpack_lossless(matrix.rows, matrix.cols, blocks))
                    for matrix, blocks in halves(shape, parts[0].numpy())
                ]
    return found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("vram_gb", [0, 1])
def test_logits_are_those_of_bfloat16_experts(
    model_type: str, load_format: str, vram_gb: int
) -> None:
    folder, texts, found = shared_tiny(model_type, dtype="bfloat16"), random_texts([9, 30], 256), []
    options: dict[str, Any] = {"load_format": load_format}
    if vram_gb:
        options |= {"vram_gb": vram_gb, "placement": split_at_random(folder, seed=1)}
    for dtype in ("float32", "bf12"):
        with loaded(folder, dtype, **options) as llm:
            assert llm.dtypes.compute == "float32"
            assert llm.dtypes.expert == {"float32": "bfloat16", "bf12": "bf12"}[dtype]
            found.append((matrices(llm), Forward(llm).logits(texts, [5, 20])))
    (wanted, wanted_logits), (got, got_logits) = found
    for at, parts in wanted.items():
        assert all(np.array_equal(a, b) for a, b in zip(got[at], parts, strict=True))
    assert relative_error(got_logits, wanted_logits) < 1e-5


def test_the_built_in_model_says_the_same() -> None:
    """Some of its neurons were given up in training, and only fit when they are scaled."""
    prompts = ["What is 12 + 30?", "What is the capital of France?", "Repeat: one two three"]
    said = []
    for dtype in ("float32", "bf12"):
        with loaded("builtin", dtype, max_model_len=256) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
            said.append([output.outputs[0].token_ids for output in outputs])
    assert said[0] == said[1]


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_parts_of_matrices_are_packed_as_wholes_are(
    stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the numbers are stored as: they are those of bfloat16."""
    folder = shared_tiny("qwen3_moe", dtype=stored)
    with loaded(folder, "bfloat16") as llm:
        wanted = matrices(llm)
    monkeypatch.setattr("fiddler.models.packing.CHUNK", 20 * 64)
    with loaded(folder, "bf12") as llm:
        found = matrices(llm)
    for at, parts in wanted.items():
        assert all(np.array_equal(a, b) for a, b in zip(found[at], parts, strict=True))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bf12", "float32"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_what_is_rounded_before_it_is_packed_is_said(
    stored: str, dtype: str, load_format: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shared_tiny("qwen3_moe", dtype=stored)
    with (
        caplog.at_level(logging.WARNING, "fiddler"),
        loaded(folder, dtype, load_format=load_format) as llm,
    ):
        notes = [note for note in llm.plan.notes if "rounded to bfloat16" in note]
    said = [r.getMessage() for r in caplog.records if "rounded" in r.getMessage()]
    assert said == notes
    is_rounded = stored != "bfloat16" and dtype == "bf12" and load_format == "auto"
    assert len(notes) == is_rounded and all(f"stored in {stored}" in note for note in notes)


def test_neurons_are_scaled_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an expert whose matrices are packed in parts."""
    folder = shared_tiny("qwen3_moe", dtype="bfloat16", moe_intermediate_size=64)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / SINGLE)
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight") and ".experts." in name:
            tensor[:, ::3] *= 2.0**-20
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    texts, found = random_texts([9, 30], 256), []
    monkeypatch.setattr("fiddler.models.packing.CHUNK", 20 * 64)
    for dtype in ("float32", "bf12"):
        with loaded(tmp_path, dtype) as llm:
            found.append((matrices(llm), Forward(llm).logits(texts, [5, 20])))
    (wanted, wanted_logits), (got, got_logits) = found
    for at, (gate, up, down) in wanted.items():
        assert np.array_equal(got[at][0], gate)
        by_I = got[at][2][0] / down[0]  # powers of two
        assert (by_I[::3] > 2.0**14).all() and (by_I[1::3] == 1).all()
        assert np.array_equal(got[at][2], down * by_I)
        assert np.array_equal(got[at][1] * by_I[:, None], up)
    assert relative_error(got_logits, wanted_logits) < 1e-5


def test_neurons_of_an_activation_that_is_not_linear_stay() -> None:
    """They are packed as they are, or refused: scaled they would be others."""
    config = load_config(shared_tiny("qwen3_moe", dtype="bfloat16", moe_intermediate_size=64))
    numbers = {
        part.name: torch.randn(part.shape, generator=torch.manual_seed(n)).bfloat16()
        for n, part in enumerate(expert_parts(config, 0, 0))
    }
    clamped, shape = replace(config, activation="clamped_swiglu"), packed_shape(config, BF12)

    def packed(of: ModelConfig) -> list[np.ndarray]:
        blob = torch.empty(shape.expert_bytes, dtype=torch.uint8)
        lossless(of, bits_of)(0, 0, blob)
        found = halves(shape, blob.numpy())
        return [unpack_lossless(matrix.rows, matrix.cols, blocks) for matrix, blocks in found]

    def bits_of(part: Part, rows: slice) -> np.ndarray:
        return numbers[part.name][rows].view(torch.int16).numpy().view(np.uint16)

    *_, down = numbers
    numbers[down][:, :2] *= 2.0**-6  # small enough to be scaled, and to have room as they are
    given = [bits_of(Part(name, ()), slice(None)) for name in numbers]
    scaled, kept = packed(config), packed(clamped)
    assert not np.array_equal(scaled[1], given[1]) and not np.array_equal(scaled[2], given[2])
    assert all(np.array_equal(a, b) for a, b in zip(kept, given, strict=True))
    numbers[down][:, ::3] *= 2.0**-20
    with pytest.raises(ConfigError, match="no room in 12 bits"):
        packed(clamped)


def test_what_has_no_room_is_one_sentence(tmp_path: Path) -> None:
    folder = shared_tiny("qwen3_moe", dtype="bfloat16")
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.2.mlp.experts.3.gate_proj.weight"
    before = tensors[name].clone()
    tensors[name][:20, ::2] *= 2.0**-60
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")) as info:
        loaded(tmp_path, "bf12")
    assert info.value.hint == "load it with --dtype bfloat16"
    tensors[name] = before
    tensors[name][0, 1] = float("inf")
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        loaded(tmp_path, "bf12")


def test_activations_are_not_rounded() -> None:
    assert resolve_dtypes("bf12", "bfloat16", has_gpu=True).few == "f32"
    assert resolve_dtypes("bf12", "bfloat16", has_gpu=True).compute == "bfloat16"
    many = [
        resolve_dtypes(asked, "bfloat16", has_gpu=True).many
        for asked in ("bf12", "bfloat16", "float32", "w4g128")
    ]
    assert many == ["bf16", "bf16", "f32", "f32"]
    with pytest.raises(ConfigError, match="int8 activations are for rounded experts"):
        resolve_dtypes("bf12", "bfloat16", has_gpu=True, cpu_activations="int8")


@pytest.mark.gpu
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_gpu_gives_what_it_gives_for_bfloat16(load_format: str, share: float) -> None:
    folder, texts = shared_tiny("qwen3_moe", dtype="bfloat16"), random_texts([9, 48], 256)
    placement = split_at_random(folder, seed=1, share=share)
    options: dict[str, Any] = {"device": "cuda", "vram_gb": 8, "placement": placement}
    found = []
    for dtype in ("bfloat16", "bf12"):
        with loaded(folder, dtype, load_format=load_format, **options) as llm:
            logits = Forward(llm).logits(texts, [5, 40])
            found.append((matrices(llm), logits))
            assert llm.generate([5, 6, 7], GREEDY).outputs[0].token_ids
    for at, parts in found[0][0].items():
        assert all(np.array_equal(a, b) for a, b in zip(found[1][0][at], parts, strict=True))
    with loaded(folder, "float32", load_format=load_format) as llm:
        exact = Forward(llm).logits(texts, [5, 40])
    errors = [relative_error(logits, exact) for _, logits in found]
    print(
        f"{load_format}, share {share}: relative errors {errors[0]:.1e} (16 bits), {errors[1]:.1e}"
    )
    assert errors[1] < 1.5 * errors[0] + 1e-3
    assert torch.isfinite(torch.cat(found[1][1])).all()
