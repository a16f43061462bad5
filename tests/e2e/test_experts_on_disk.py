"""Models whose experts do not fit into RAM: the same tokens and logits as where all of them do."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.weight_kind import parse_kind
from fiddler import LLM, SamplingParams
from fiddler.errors import NumericsError
from fiddler.models.checkpoint import SINGLE
from fiddler.quantize.run import QuantizeJob, quantize
from offload.plan import GpuSide
from offload.row_cache import RowCache
from tests.forward import Forward, random_texts
from tests.model.test_parity import folder_of, split_at_random
from tests.tiny_models import MODEL_TYPES, shared_tiny

CONTEXT = 256
LENGTHS = [70, 3, 16]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
]


@pytest.fixture(autouse=True)
def spoiled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of tiny experts share pages, which stay: what is let go of is made unusable instead."""

    def spoil(row: torch.Tensor) -> None:
        row.fill_(255 if row.dtype == torch.uint8 else float("nan"))

    monkeypatch.setattr("offload.expert_store.give_back_pages", spoil)


@contextmanager
def loaded(folder: Path, **options: Any) -> Iterator[LLM]:
    settings: dict[str, Any] = {"device": "cpu", "cpu_threads": 1, "max_model_len": CONTEXT}
    with LLM(str(folder), **settings | options) as llm:
        yield llm


def cache_of(llm: LLM) -> RowCache:
    cache = llm._running.experts.store.cache
    assert cache is not None
    return cache


def ram_gb(llm: LLM, num_held: int) -> float:
    """What leaves room for so many cold experts of a model that is loaded whole."""
    plan = llm.plan
    needed = num_held * llm._running.experts.store.expert_bytes(0)
    if plan.gpu_side is GpuSide.CUDA:
        needed += plan.memory.cpu_workspace + plan.memory.cpu_dense
    else:
        kv = plan.memory.kv
        if plan.gpu_side is GpuSide.NONE:  # the pool of KV pages shrinks to one request's
            kv = kv // plan.num_pages * (CONTEXT // plan.page_size)
        needed += plan.memory.dense + plan.memory.workspace + kv + plan.memory.gpu_experts
    return (needed + 100) / 2**30


def results(llm: LLM) -> tuple[list[list[int]], list[torch.Tensor], Any]:
    """Tokens of several requests, logits of one ragged step and decodes, and what was counted."""
    vocab = llm.model_config.vocab_size
    texts = random_texts([n + 4 for n in LENGTHS], vocab)
    logits = Forward(llm).logits(texts, LENGTHS)  # first: the prefix cache keeps pages
    outputs = [llm.generate(random_texts(LENGTHS, vocab, seed=3)[n], PARAMS[n]) for n in range(3)]
    tokens = [sample.token_ids for output in outputs for sample in output.outputs]
    counted = [(o.stats.expert_tokens_gpu, o.stats.expert_tokens_cpu) for o in outputs]
    return tokens, logits, counted


def assert_same(found: Any, wanted: Any) -> None:
    assert found[0] == wanted[0] and found[2] == wanted[2]
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODEL_TYPES)
def test_every_budget_gives_the_same_bits(model: str, stored: str) -> None:
    folder = folder_of(model, stored)
    with loaded(folder) as llm:
        assert llm.plan.cached is None and llm._running.experts.store.cache is None
        wanted, top_k = results(llm), llm.model_config.top_k
        budgets = {held: ram_gb(llm, held) for held in (top_k, 9)}
    for held, budget in budgets.items():
        with loaded(folder, ram_gb=budget) as llm:
            cache, plan = cache_of(llm), llm.plan
            assert cache.most == held == plan.cached.num_resident  # type: ignore[union-attr]
            found = results(llm)
            print(f"{model} {stored}, {held} held: {cache.num_read} reads")
            assert cache.num_read > 10 and len(cache._held) == held
            assert_same(found, wanted)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_beside_an_emulated_gpu_side(share: float) -> None:
    folder = folder_of("qwen2_moe")
    options = {"placement": split_at_random(folder, seed=2, share=share), "vram_gb": 1}
    with loaded(folder, **options) as llm:
        wanted, budget = results(llm), ram_gb(llm, 3)
    with loaded(folder, **options, ram_gb=budget) as llm:
        assert_same(results(llm), wanted)
        assert cache_of(llm).most == 3 and cache_of(llm).num_read > 0


@pytest.mark.parametrize("kind", ["w4g32z", "w8g32", "bf12"])
def test_packed_experts(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = shared_tiny("qwen3_moe", moe_intermediate_size=64)
    job = QuantizeJob(source=source, output=tmp_path / "q", kind=parse_kind(kind), method="rtn")
    folder = quantize(job).folder
    with loaded(folder) as llm:
        wanted, budget = results(llm), ram_gb(llm, 5)
    with loaded(folder, ram_gb=budget) as llm:
        assert_same(results(llm), wanted)
        assert cache_of(llm).most == 5 and cache_of(llm).num_read > 10
        assert llm.plan.per_token.disk_reads == llm.plan.per_token.disk_experts
    assert not any("packed each time" in r.getMessage() for r in caplog.records)
    with loaded(source, dtype=kind, ram_gb=budget) as llm:
        assert llm.plan.per_token.disk_reads > 2 * llm.plan.per_token.disk_experts
    assert any(f"quantize --scheme {kind} keeps" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("options", [{}, {"load_format": "dummy"}])
def test_lossless_experts(options: dict[str, Any]) -> None:
    folder = shared_tiny("qwen3_moe", dtype="bfloat16")
    with loaded(folder, dtype="bf12", **options) as llm:
        wanted, budget = results(llm), ram_gb(llm, 5)
    with loaded(folder, dtype="bf12", ram_gb=budget, **options) as llm:
        assert_same(results(llm), wanted)
        assert cache_of(llm).most == 5 and cache_of(llm).num_read > 10


def test_requests_side_by_side_and_one_that_is_cancelled() -> None:
    folder = folder_of("mixtral")
    prompts = random_texts(LENGTHS, 264, seed=8)
    with loaded(folder) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS[0])]
        budget = ram_gb(llm, 6)
    with loaded(folder, ram_gb=budget) as llm:
        stream = llm.stream(prompts[1], PARAMS[0])
        next(stream)
        stream.close()
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, PARAMS[0])] == wanted


def test_it_is_said_at_load_and_seeded_weights_are_drawn_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, options = folder_of("olmoe"), {"load_format": "dummy", "seed": 4}
    with loaded(folder, **options) as llm:
        wanted, budget = results(llm), ram_gb(llm, 9)
    with (
        caplog.at_level(logging.WARNING, "fiddler"),
        loaded(folder, ram_gb=budget, **options) as llm,
    ):
        assert_same(results(llm), wanted)
    with caplog.at_level(logging.WARNING, "fiddler"), loaded(folder, ram_gb=budget):
        pass
    drawn, read = [r.getMessage() for r in caplog.records if "have no room" in r.getMessage()]
    assert drawn.startswith("15 of 24 experts have no room in memory and are drawn anew")
    assert read == (
        "15 of 24 experts have no room in memory and are read from disk when a step needs them"
    )


def test_damage_that_is_found_late_ends_the_request_alone(tmp_path: Path) -> None:
    """An expert that was not read at load holds NaN: whoever needs it is told, nobody else."""
    folder = tmp_path / "bad"
    shutil.copytree(folder_of("mixtral"), folder)
    with loaded(folder) as llm:
        budget = ram_gb(llm, 8)
    with loaded(folder, ram_gb=budget) as llm:
        cached = llm.plan.cached
        assert cached is not None
    layer, expert = next(
        (n, e) for n, some in enumerate(cached.resident) for e in range(8) if e not in some
    )
    weights = load_file(folder / SINGLE)
    name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / SINGLE)
    with loaded(folder, ram_gb=budget) as llm:
        prompt = random_texts([60], 264)[0]
        for _ in range(2):
            with pytest.raises(NumericsError, match=r"w2\.weight"):
                llm.generate(prompt, PARAMS[0])
        assert llm.num_free_pages == llm.plan.num_pages


def test_pages_and_files_are_given_back() -> None:
    folder = folder_of("mixtral")
    with loaded(folder) as llm:
        budget = ram_gb(llm, 4)
    with loaded(folder, ram_gb=budget) as llm:
        llm.generate([1, 2, 3], PARAMS[0])
        readers = cache_of(llm)._readers
        assert readers is not None
        threads = list(readers._threads)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("model", MODEL_TYPES)
def test_on_a_gpu_tokens_are_those_of_the_cpu(
    model: str, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(model)
    placement = split_at_random(folder, seed=2, share=share)
    with loaded(folder, dtype="float32") as llm:
        wanted = results(llm)[0]
    options = {"device": "cuda", "dtype": "float32", "vram_gb": 4, "placement": placement}
    options["max_batched_tokens"] = 512  # with less RAM a plan would take smaller steps
    with loaded(folder, **options) as llm:
        budget = ram_gb(llm, 5)
    with (
        caplog.at_level(logging.WARNING, "fiddler"),
        loaded(folder, **options, ram_gb=budget) as llm,
    ):
        assert llm.plan.staging_slots == 0 and llm._running.engine._runner.decode_steps is None
        assert cache_of(llm).most == 5
        assert results(llm)[0] == wanted
        print(f"{model} share {share}: {cache_of(llm).num_read} reads")
    assert any("experts on disk" in r.getMessage() for r in caplog.records)
