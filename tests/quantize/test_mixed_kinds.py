"""Models whose layers differ in the kind of their experts, on every path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler import SamplingParams
from fiddler.errors import CheckpointError
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import packed_shape
from fiddler.models.registry import load_config
from fiddler.quantize.run import QuantizeJob, quantize
from offload.expert_stream import ExpertStream
from offload.prefill import PrefillExperts
from offload.prefill_costs import PrefillCosts
from tests.forward import Forward, random_texts, relative_error
from tests.model.test_parity import split_at_random
from tests.quantize.conftest import WINDOW
from tests.quantize.packed_runs import loaded, logits, oracle_logits
from tests.quantize.test_packed_model import as_numbers
from tests.tiny_models import shared_tiny

KINDS = ("w8g32z", "w4g64z", "w4g32z")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model with a kind for each layer, and one with its weights as numbers."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(model_type: str) -> tuple[Path, Path]:
        if model_type not in made:
            source = shared_tiny(model_type, moe_intermediate_size=64)
            root = tmp_path_factory.mktemp(model_type)
            (root / "text.txt").write_text("".join(f"{i} is {i * i}; " for i in range(80)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fiddler.quantize.calibration.WINDOW", WINDOW)
                patch.setattr("fiddler.quantize.run.choose_kinds", given_kinds)
                job = QuantizeJob(
                    source=source,
                    output=root / "packed",
                    kind=parse_kind("w4g64z"),
                    method="rtn",
                    calibration=root / "text.txt",
                    sensitivity=0.5,
                )
                packed = quantize(job).folder
            made[model_type] = packed, as_numbers(packed, source, root / "numbers")
        return made[model_type]

    return of


def given_kinds(config: ModelConfig, *_: Any) -> list[WeightKind]:
    return [parse_kind(KINDS[layer % 3]) for layer in range(config.num_layers)]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_a_model_computes_with_several_kinds(
    mixed: Callable[[str], tuple[Path, Path]], model_type: str
) -> None:
    packed, numbers = mixed(model_type)
    config = load_config(packed)
    assert config.packed_name is not None and "w8g32z" in config.packed_name
    assert relative_error(logits(packed), oracle_logits(numbers)) < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tokens_equal_those_of_plain_weights(
    mixed: Callable[[str], tuple[Path, Path]], share: float
) -> None:
    packed, numbers = mixed("qwen3_moe")
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    prompts = random_texts([3, 30], 256, seed=5)
    found = []
    for folder, part in ((packed, share), (numbers, 0.0)):
        with loaded(folder, placement=split_at_random(folder, 1, part)) as llm:
            found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert found[0] == found[1]


def test_prompts_pass_through_the_ring_kind_by_kind(
    mixed: Callable[[str], tuple[Path, Path]],
) -> None:
    """In Triton's interpreter; the workers compute some, and what they cost differs by kind."""
    packed, _ = mixed("qwen3_moe")
    texts, cpu = random_texts([34, 8], 256), torch.device("cpu")
    with loaded(packed, placement=split_at_random(packed, 1, 0.4), max_batched_tokens=64) as llm:
        wanted = Forward(llm).logits(texts, [33, 5])
        hybrid, config = llm._running.experts, llm.model_config
        costs = {
            layer: PrefillCosts(
                copy_s=config.mixed[layer].bits / 4, expert_s=lambda count: 1.5, columns_from=None
            )
            for layer in hybrid.store.shape.moe_layers
        }
        with ExpertPool(1) as pool:
            hybrid._prefill = PrefillExperts(
                *(hybrid.store, pool, ExpertStream(hybrid.store, 2, cpu)),
                costs,
                llm._running.plan.popularity,
                device=cpu,
                dtype=torch.float32,
                activations="f32",
                max_tokens=64,
                top_k=config.top_k,
            )
            found = Forward(llm).logits(texts, [33, 5])
            record = hybrid._prefill.record
            hybrid._prefill.clear()
            hybrid._prefill = None
    assert record.cpu_experts and record.sent_experts
    assert relative_error(found, wanted) < 1e-5


def test_a_plan_counts_every_layers_bytes(mixed: Callable[[str], tuple[Path, Path]]) -> None:
    packed, _ = mixed("qwen3_moe")
    config = load_config(packed)
    with loaded(packed) as llm:
        memory = llm.plan.memory
        sizes = [packed_shape(config, kind).expert_bytes for kind in config.mixed]
        assert memory.gpu_experts + memory.cpu_experts == 8 * sum(sizes)
        resident = llm.plan.placement.resident
        assert memory.gpu_experts == sum(
            len(some) * size for some, size in zip(resident, sizes, strict=True)
        )
        assert llm.dtypes.expert == "w4g32z+w4g64z+w8g32z"


def test_experts_on_disk_are_of_several_kinds_too(
    mixed: Callable[[str], tuple[Path, Path]],
) -> None:
    packed, _ = mixed("qwen3_moe")
    with loaded(packed, placement=None) as llm:
        wanted, plan = Forward(llm).logits(random_texts([9, 20], 256), [5, 12]), llm.plan
    memory, kv = plan.memory, plan.memory.kv // plan.num_pages * (128 // plan.page_size)
    needed = memory.dense + memory.workspace + kv + memory.cpu_experts // 2
    options = {"placement": None, "ram_gb": needed / 2**30}
    with loaded(packed, **options) as llm:
        assert llm.plan.memory.disk_experts > 0
        found = Forward(llm).logits(random_texts([9, 20], 256), [5, 12])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_seeded_weights_are_of_the_stored_kinds(
    mixed: Callable[[str], tuple[Path, Path]],
) -> None:
    packed, _ = mixed("qwen2_moe")
    with loaded(packed, load_format="dummy") as llm:
        assert llm.dtypes.expert == load_config(packed).packed_name


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["w4g64z"], "does not name the kind of each layer's experts"),
        ("w4g64z", "does not name the kind of each layer's experts"),
        (["w4g64z", "w5g64z", "w4g64z"], "names no known kind of packed experts: 'w5g64z'"),
        (["w4g64z", "w8g64z", "w4g64z"], "shape"),
    ],
)
def test_wrong_kinds_in_a_config_are_named(
    mixed: Callable[[str], tuple[Path, Path]], tmp_path: Path, kinds: Any, said: str
) -> None:
    shutil.copytree(mixed("qwen3_moe")[0], tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"]["experts"]["kinds"] = kinds
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path / "bad", placement=None)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_gpu_computes_with_several_kinds(
    mixed: Callable[[str], tuple[Path, Path]], share: float, enforce_eager: bool
) -> None:
    """Prompts through the ring, whose banks hold one kind after another; decode steps in graphs."""
    packed, _ = mixed("qwen3_moe")
    texts = random_texts([9, 41, 70], 256)
    found = []
    for device, part in (("cpu", 0.0), ("cuda", share)):
        options: dict[str, Any] = {"placement": split_at_random(packed, 1, part)}
        if device == "cuda":
            options |= {"enforce_eager": enforce_eager, "vram_gb": 8}
        with loaded(packed, device=device, **options) as llm:
            found.append(Forward(llm).logits(texts, [5, 33, 64]))
    error = relative_error(found[1], found[0])
    print(f"share {share}, eager {enforce_eager}: relative error {error:.1e}")
    assert error < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["static", "adaptive"])
def test_a_gpu_generates_with_several_kinds(
    mixed: Callable[[str], tuple[Path, Path]], policy: str
) -> None:
    """In bfloat16, with pulled rows, and experts that change places: close to plain weights."""
    packed, numbers = mixed("qwen3_moe")
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, logprobs=1)
    prompts = random_texts([3, 60], 256, seed=5)
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "vram_gb": 8}
    found = []
    for folder in (packed, numbers):
        with loaded(folder, placement_policy=policy, **options) as llm:
            found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    same = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(*found, strict=True)]
    print(f"{policy}: {same} of 32 tokens are those of plain weights")
    assert min(same) >= 1
