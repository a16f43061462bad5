"""The largest step: as asked, or as many tokens as leave the VRAM to the experts."""

from dataclasses import replace

import pytest

from fiddler.config import EngineConfig
from fiddler.errors import ConfigError, OutOfMemoryError
from fiddler.models.config import ModelConfig
from fiddler.models.footprint import workspace_bytes
from fiddler.models.shapes import SHAPES, load_shape
from fiddler.planning import plan_model, step_tokens
from tests.offload.planner_cases import GIB, machine, without_gpu


def test_what_was_asked_for_is_used() -> None:
    settings = EngineConfig(max_batched_tokens=77)
    assert step_tokens(settings, load_shape("olmoe-1b-7b"), machine()) == 77


def test_without_a_gpu_nothing_is_streamed() -> None:
    shape = load_shape("olmoe-1b-7b")
    assert step_tokens(EngineConfig(vram_gb=4), shape, without_gpu()) == 2048


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("vram_gb", [None, 1, 4, 12, 24])
def test_activations_leave_the_vram_to_experts(name: str, vram_gb: float | None) -> None:
    shape, settings = load_shape(name), EngineConfig(vram_gb=vram_gb)
    tokens = step_tokens(settings, shape, machine())
    limit = int((23 if vram_gb is None else vram_gb) * GIB)

    def taken(tokens: int) -> int:
        return workspace_bytes(shape, 2, max_batched_tokens=tokens, max_num_seqs=16)

    assert 512 <= tokens <= 4096
    assert tokens == 512 or taken(tokens) <= limit / 16
    has_more = tokens < 4096 and taken(2 * tokens) <= limit / 16
    assert not has_more or slots(shape, vram_gb, 2 * tokens) < 4


def slots(shape: ModelConfig, vram_gb: float | None, tokens: int) -> int:
    """Of the ring, with steps of so many tokens; 0 if that does not fit at all."""
    settings = EngineConfig(vram_gb=vram_gb, max_batched_tokens=tokens)
    try:
        plan, _ = plan_model(settings, shape, machine(), name="some", folder=None)
    except OutOfMemoryError:
        return 0
    return plan.staging_slots


@pytest.mark.parametrize("policy", ["static", "adaptive"])
@pytest.mark.parametrize("context_mib", range(500, 3500, 50))
def test_steps_get_smaller_before_prompts_lose_their_ring(context_mib: int, policy: str) -> None:
    """A context may grow to GiB: kernels that spill take local memory, and never give it back."""
    shape, hardware = load_shape("olmoe-1b-7b"), machine(cuda_context_bytes=context_mib << 20)
    settings = EngineConfig(vram_gb=5, max_model_len=2100, placement_policy=policy)
    try:
        plan, _ = plan_model(settings, shape, hardware, name="o", folder=None)
    except OutOfMemoryError:
        assert context_mib > 3000
        return
    tokens = step_tokens(settings, shape, hardware)
    assert plan.staging_slots >= 4 or tokens == 512
    if context_mib in (500, 3200):
        assert tokens == {500: 2048, 3200: 1024}[context_mib]


def test_a_large_gpu_reads_prompts_in_large_pieces() -> None:
    for name in ("qwen3-30b-a3b", "mixtral-8x7b"):
        assert step_tokens(EngineConfig(vram_gb=24), load_shape(name), machine()) == 4096


def test_the_plan_counts_the_activations_of_the_step() -> None:
    shape = load_shape("qwen3-30b-a3b")
    hardware = machine()

    def workspace(max_batched_tokens: int | None) -> int:
        settings = EngineConfig(vram_gb=16, max_batched_tokens=max_batched_tokens)
        plan, _ = plan_model(settings, shape, hardware, name="q", folder=None)
        return plan.memory.workspace

    chosen = step_tokens(EngineConfig(vram_gb=16), shape, hardware)
    assert workspace(None) == workspace(chosen) > workspace(chosen // 2)


@pytest.mark.parametrize("value", [0, -1, float("inf"), "9", True])
def test_a_target_is_a_time(value: float) -> None:
    with pytest.raises(ConfigError, match="tbt_target_ms must be more than 0"):
        EngineConfig(tbt_target_ms=value)


def test_experts_on_disk_cannot_change_places() -> None:
    settings = EngineConfig(vram_gb=16, ram_gb=20, placement_policy="adaptive")
    with pytest.raises(ConfigError, match="some are on disk") as caught:
        plan_model(settings, load_shape("qwen3-30b-a3b"), machine(), name="q", folder=None)
    assert "--ram-gb" in caught.value.hint
    settings = replace(settings, placement_policy="static")
    plan, _ = plan_model(settings, load_shape("qwen3-30b-a3b"), machine(), name="q", folder=None)
    assert plan.cached is not None and plan.staging_slots == plan.spare_slots == 0
