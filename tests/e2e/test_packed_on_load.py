"""``--dtype w4g32`` and its like: plain weights rounded while loading, or random packed ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.packed_layout import PackedShape, Quantised, dequantise, pack_expert, unpack_expert
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler import LLM, SamplingParams
from fiddler.errors import ConfigError, NumericsError, QuantizeError
from fiddler.models.checkpoint import SINGLE, Checkpoint
from fiddler.models.dtypes import resolve_dtypes
from fiddler.models.manifest import expert_parts
from fiddler.rounding.grid import QUICK_SHRINKS
from fiddler.rounding.matrix import round_matrix
from tests.forward import Forward, random_texts, relative_error
from tests.model.test_parity import split_at_random
from tests.tiny_models import shared_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
# of normal weights, by kinds for which other tests compile kernels too: each takes seconds
ERRORS = {"w4g32": 0.09, "w4g64z-bf16": 0.095, "w8g32-bf16": 0.006}


def tiny() -> Path:
    return shared_tiny("qwen3_moe", moe_intermediate_size=64)


def loaded(folder: Path | str, dtype: str, **options: Any) -> LLM:
    settings: dict[str, Any] = {"device": "cpu", "cpu_threads": 1, "max_model_len": 128}
    return LLM(str(folder), dtype=dtype, **(settings | options))


def bytes_of(llm: LLM) -> dict[tuple[int, int], np.ndarray]:
    store = llm._running.experts.store
    return {
        (layer, expert): store[layer].place(expert)[0].cpu().numpy()
        for layer in store.shape.moe_layers
        for expert in range(store.shape.num_experts)
    }


def numbers(blob: np.ndarray, kind: WeightKind) -> list[np.ndarray]:
    return [dequantise(kind, *part) for part in unpack_expert(PackedShape(kind, 64, 64), blob)]


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("chunk", [1 << 21, 20 * 64])
def test_experts_are_those_of_the_checkpoint_rounded(
    dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are rounded at a time."""
    monkeypatch.setattr("fiddler.models.packing.CHUNK", chunk)
    kind = parse_kind(dtype)
    placement = split_at_random(tiny(), seed=1)
    with loaded(tiny(), dtype, placement=placement) as llm, Checkpoint.open(tiny()) as checkpoint:
        assert (llm.dtypes.compute, llm.dtypes.expert) == ("float32", dtype)
        for (layer, expert), blob in bytes_of(llm).items():
            stored = [
                checkpoint.tensor(part.name, part.shape).numpy()
                for part in expert_parts(llm.model_config, layer, expert)
            ]
            shrinks = QUICK_SHRINKS[kind.bits]
            parts = [round_matrix(w_NK, kind, shrinks=shrinks) for w_NK in stored]
            assert (blob == pack_expert(kind, *parts)).all()
            for found, wanted in zip(numbers(blob, kind), stored, strict=True):
                error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
                assert error < ERRORS[dtype]


def test_logits_are_near_those_of_plain_weights() -> None:
    texts = random_texts([9, 30], 256)
    found = []
    for dtype in ("float32", "w8g32"):
        with loaded(tiny(), dtype) as llm:
            found.append(Forward(llm).logits(texts, [5, 20]))
    assert 1e-5 < relative_error(found[1], found[0]) < 0.03


def test_the_rest_is_as_it_would_be() -> None:
    with loaded(tiny(), "w4g32z", vram_gb=1) as llm:
        expert = PackedShape(parse_kind("w4g32z"), 64, 64).expert_bytes
        assert llm.plan.memory.gpu_experts + llm.plan.memory.cpu_experts == 24 * expert
        assert llm._running.engine._runner.decoder._weights.embed_VH.dtype == torch.float32


def test_what_cannot_be_rounded_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="groups of 128 do not divide the hidden size") as info:
        loaded(tiny(), "w4g128")
    assert "--dtype w4g64" in info.value.hint
    with pytest.raises(ConfigError, match="'int3' is no type of weights"):
        loaded(tiny(), "int3")
    for path in tiny().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    tensors[name][63, 1] = float("nan")
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=name.replace(".", r"\.")):
        loaded(tmp_path, "w4g32")


@pytest.mark.parametrize("dtype", ["w4g32", "w4g64z-bf16", "w8g32z"])
def test_random_experts_are_as_large_as_those_of_plain_numbers(dtype: str) -> None:
    """Standard deviation 1 / sqrt(columns), that of down smaller by sqrt(2 x layers); no mean."""
    kind = parse_kind(dtype)
    with loaded(tiny(), dtype, load_format="dummy") as llm:
        blobs = bytes_of(llm)
        tokens = llm.generate([5, 6, 7], GREEDY).outputs[0].token_ids
    gate, up, down = zip(*(numbers(blob, kind) for blob in blobs.values()), strict=True)
    for parts, wanted in ((gate, 1 / 8), (up, 1 / 8), (down, 1 / 8 / 6**0.5)):
        assert np.std(parts) == pytest.approx(wanted, rel=0.1)
        assert abs(np.mean(parts)) < 0.05 * wanted
    assert len({blob.tobytes() for blob in blobs.values()}) == len(blobs) == 24
    with loaded(tiny(), dtype, load_format="dummy", vram_gb=1) as llm:
        assert llm.generate([5, 6, 7], GREEDY).outputs[0].token_ids == tokens
    with loaded(tiny(), dtype, load_format="dummy", seed=1) as llm:
        assert all((blob != blobs[key]).any() for key, blob in bytes_of(llm).items())


def test_random_experts_are_finite_where_rows_and_columns_are_padded() -> None:
    folder = shared_tiny("mixtral")  # experts of 64 x 48
    kind = WeightKind("int4", 32, has_zeros=True)
    from fiddler.models.dummy import DummySource
    from fiddler.models.dummy_packed import dummy_packing
    from fiddler.models.registry import load_config

    config = load_config(folder)
    shape = PackedShape(kind, 64, 48)
    out_B = torch.empty(shape.expert_bytes, dtype=torch.uint8)
    dummy_packing(DummySource(config, 0), config, kind)(1, 2, out_B)
    parts: tuple[Quantised, ...] = unpack_expert(shape, out_B.numpy())
    assert all(np.isfinite(dequantise(kind, *part)).all() for part in parts)


@pytest.mark.gpu
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_gpu_holds_the_same_bytes_and_gives_the_same_logits(
    load_format: str, share: float
) -> None:
    texts = random_texts([9, 48], 256)
    placement = split_at_random(tiny(), seed=1, share=share)
    results = []
    for options in ({"device": "cpu"}, {"device": "cuda", "vram_gb": 8, "placement": placement}):
        with loaded(tiny(), "w4g32z", load_format=load_format, **options) as llm:
            compute = llm.dtypes.compute
            results.append((bytes_of(llm), Forward(llm).logits(texts, [5, 40])))
    assert all((results[1][0][key] == blob).all() for key, blob in results[0][0].items())
    error = relative_error(results[1][1], results[0][1])
    print(f"{load_format}, share {share}: {compute} against float32: relative error {error:.1e}")
    assert error < 0.1


def test_the_cpu_may_round_activations() -> None:
    """To int8, which shows, but less than the weights' rounding; and not before plain weights."""
    texts, found = random_texts([9, 30], 256), {}
    for activations in ("auto", "f32", "int8"):
        with loaded(tiny(), "w4g32z", cpu_activations=activations) as llm:
            found[activations] = Forward(llm).logits(texts, [5, 20])
    pairs = zip(found["auto"], found["f32"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # beside float32 nothing is rounded unasked
    assert 1e-4 < relative_error(found["int8"], found["f32"]) < 0.03
    with pytest.raises(ConfigError, match="int8 activations are for rounded experts"):
        loaded(tiny(), "float32", cpu_activations="int8")
    assert resolve_dtypes("w4g128", "bfloat16", has_gpu=True).few == "int8"
    assert resolve_dtypes("bfloat16", "bfloat16", has_gpu=True).few == "f32"
    asked = resolve_dtypes("auto", "", has_gpu=True, packed="w4g32", cpu_activations="f32")
    assert asked.few == "f32"
