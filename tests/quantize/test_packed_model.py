"""A quantised folder runs as the model whose weights its codes stand for, wherever experts lie."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.packed_layout import PackedShape, dequantise, unpack_expert
from cpu_kernels.weight_kind import parse_kind
from fiddler import LLM, SamplingParams
from fiddler.errors import CheckpointError, ConfigError, NumericsError
from fiddler.models.checkpoint import SINGLE
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import expert_parts
from fiddler.models.registry import load_config
from fiddler.quantize.run import QuantizeJob, quantize
from tests.forward import Forward, random_texts, relative_error
from tests.model.test_parity import split_at_random
from tests.tiny_models import MODEL_TYPES, load_oracle, shared_tiny

WIDTH = {"mixtral": "intermediate_size", "olmoe": "intermediate_size"}
PROMPTS = [1, 7, 33]
Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``folders(model_type, kind)``: a quantised model, and one with those weights as numbers."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(model_type: str = "qwen3_moe", kind: str = "w4g32z") -> tuple[Path, Path]:
        if (model_type, kind) not in made:
            width = WIDTH.get(model_type, "moe_intermediate_size")
            source = shared_tiny(model_type, **{width: 64})
            root = tmp_path_factory.mktemp(f"{model_type}-{kind}")
            job = QuantizeJob(
                source=source, output=root / "packed", kind=parse_kind(kind), method="rtn"
            )
            packed = quantize(job).folder
            made[model_type, kind] = packed, as_numbers(packed, source, root / "numbers")
        return made[model_type, kind]

    return of


def _as_they_are(config: ModelConfig, layer: int, parts: list[np.ndarray]) -> list[np.ndarray]:
    return parts


def as_numbers(packed: Path, source: Path, folder: Path, fold: Any = _as_they_are) -> Path:
    """The plain float32 checkpoint that a quantised one stands for."""
    shutil.copytree(source, folder)
    config, packed_config = load_config(source), load_config(packed)
    assert packed_config.packed is not None
    stored = {k: v for path in packed.glob("*.safetensors") for k, v in load_file(path).items()}
    numbers = {k: v.float() for k, v in stored.items() if not k.endswith(".packed")}
    for layer in range(config.num_layers):
        kind = packed_config.packed_kind(packed_config.packed, layer)
        shape = PackedShape(kind, *packed_config.expert_sides)
        for expert in range(config.num_experts) if config.is_moe_layer(layer) else ():
            parts = expert_parts(config, layer, expert)
            blob = stored[parts[0].name.rsplit(".", 2)[0] + ".packed"].numpy()
            found = [dequantise(shape.kind, *part) for part in unpack_expert(shape, blob)]
            for part, w_NK in zip(parts, fold(packed_config, layer, found), strict=True):
                numbers[part.name] = torch.from_numpy(w_NK.copy())
    save_file(numbers, folder / SINGLE, metadata={"format": "pt"})
    return folder


def loaded(folder: Path, share: float = 0.5, **options: Any) -> LLM:
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "cpu_threads": 1}
    placement = split_at_random(folder, seed=1, share=share)
    return LLM(str(folder), placement=placement, **(settings | options))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_equal_the_oracles_on_the_same_weights(folders: Folders, model_type: str) -> None:
    packed, numbers = folders(model_type)
    with loaded(packed) as llm:
        texts = random_texts([n + 8 for n in PROMPTS], llm.model_config.vocab_size)
        found = Forward(llm).logits(texts, PROMPTS)
    oracle = load_oracle(numbers)
    with torch.inference_mode():
        wanted = [oracle(torch.tensor([text])).logits[0] for text in texts]
    assert relative_error(found, wanted) < 1e-4


@pytest.mark.parametrize("kind", ["w4g32z", "w4g64-bf16", "w8g32"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tokens_equal_those_of_plain_weights(folders: Folders, kind: str, share: float) -> None:
    packed, numbers = folders(kind=kind)
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    prompts = random_texts([3, 30], 256, seed=5)
    outputs = []
    for folder, part in ((packed, share), (numbers, 0.0)):
        with loaded(folder, part) as llm:
            outputs.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert outputs[0] == outputs[1]


def test_the_plan_counts_packed_bytes(folders: Folders) -> None:
    packed, _ = folders(kind="w8g32")
    shape = PackedShape(parse_kind("w8g32"), 64, 64)
    with loaded(packed) as llm:
        memory, dtypes = llm.plan.memory, llm._running.dtypes
        assert memory.gpu_experts + memory.cpu_experts == 24 * shape.expert_bytes
        assert (dtypes.compute, dtypes.expert) == ("float32", "w8g32")


def damaged(packed: Path, folder: Path, change: Any) -> Path:
    """A copy in which one expert's bytes are changed."""
    shutil.copytree(packed, folder)
    path = sorted(folder.glob("*.safetensors"))[2]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


EXPERT = "model.layers.1.mlp.experts.5.packed"


@pytest.mark.parametrize("kind", ["w4g32z", "w4g64-bf16"])
@pytest.mark.parametrize("which", ["gate", "down"])
def test_a_scale_that_is_no_number_is_named(
    folders: Folders, tmp_path: Path, kind: str, which: str
) -> None:
    packed, _ = folders(kind=kind)
    shape = PackedShape(parse_kind(kind), 64, 64)
    begin = (0 if which == "gate" else shape.w2_offset) + getattr(shape, which).scale_offset

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EXPERT][begin + 1] = 0x7F
        tensors[EXPERT][begin] = 0x80

    with pytest.raises(NumericsError, match=re.escape(EXPERT)):
        loaded(damaged(packed, tmp_path / "nan", change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(EXPERT), "lacks the tensor|has no tensor"),
        (lambda tensors: tensors.update({EXPERT: tensors[EXPERT][:-1]}), "shape"),
        (lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.int8)}), "dtype I8"),
    ],
)
def test_bytes_that_are_not_the_experts_are_refused(
    folders: Folders, tmp_path: Path, change: Any, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        loaded(damaged(folders()[0], tmp_path / "bad", change))


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"quant_method": "hqq"}, r"quantised \(hqq\), which fiddler cannot read"),
        ("gguf", r"quantised \(gguf\)"),
        ({"quant_method": "fiddler", "version": 2}, "in version 2 of fiddler's layout"),
        ({"quant_method": "fiddler", "version": 1}, "names no known kind .*: None"),
        ({"quant_method": "fiddler", "version": 1, "experts": {"kind": "bf16"}}, "'bf16'"),
        ([1], r"quantization_config = \[1\], which is not an object"),
    ],
)
def test_what_this_release_cannot_read_is_named(
    folders: Folders, tmp_path: Path, scheme: Any, said: str
) -> None:
    raw = json.loads((folders()[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": scheme}))
    with pytest.raises(CheckpointError, match=said):
        load_config(tmp_path)


def test_seeded_weights_are_of_the_stored_kind(folders: Folders) -> None:
    with loaded(folders()[0], load_format="dummy") as llm:
        assert llm.dtypes.expert == "w4g32z"


def test_another_kind_cannot_be_made_of_packed_experts(folders: Folders) -> None:
    with loaded(folders()[0], dtype="w4g32z") as llm:
        assert llm.dtypes.expert == "w4g32z"
    with pytest.raises(ConfigError, match="stored as w4g32z, from which no w8g32 can be made"):
        loaded(folders()[0], dtype="w8g32")


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_gpu_gives_the_same_logits(folders: Folders, share: float, enforce_eager: bool) -> None:
    """Prompts through the ring, decode steps with the workers: all of one set of bytes."""
    packed, _ = folders(kind="w4g64-bf16")
    texts = random_texts([n + 8 for n in PROMPTS], 256)
    found = []
    for device, part in (("cpu", 0.0), ("cuda", share)):
        eager = {"enforce_eager": enforce_eager, "vram_gb": 8} if device == "cuda" else {}
        with loaded(packed, part, device=device, **eager) as llm:
            found.append(Forward(llm).logits(texts, PROMPTS))
    error = relative_error(found[1], found[0])
    print(f"share {share}, eager {enforce_eager}: relative error {error:.1e}")
    assert error < 1e-4


@pytest.mark.gpu
def test_a_gpu_in_bfloat16_answers_like_plain_weights(folders: Folders) -> None:
    packed, numbers = folders(kind="w4g64-bf16")
    texts = random_texts([40, 60], 256)
    found = []
    for folder in (packed, numbers):
        with loaded(folder, 0.5, device="cuda", dtype="bfloat16", vram_gb=8) as llm:
            found.append(Forward(llm).logits(texts, [33, 52]))
    error = relative_error(*found)
    print(f"packed against plain weights, both bfloat16: {error:.1e}")
    assert error < 0.05
