"""From settings to a running engine: find the model, plan, load, connect.

Everything that can be refused is refused before the first weight is read.
"""

import functools
import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpu_kernels.compiled import needs_compile
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.thread_count import measured_num_threads
from fiddler.config import PAGE_SIZE, EngineConfig
from fiddler.engine.decode_setup import add_decode_steps, decode_way
from fiddler.engine.engine import Engine
from fiddler.engine.pages import PagePool
from fiddler.engine.prefix_cache import PrefixCache
from fiddler.engine.runner import Runner
from fiddler.engine.scheduler import Scheduler
from fiddler.errors import ConfigError
from fiddler.hub import ModelFolder, fetch_metadata, resolve_model
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.decoder import Decoder
from fiddler.models.dtypes import Dtypes
from fiddler.models.dummy import DummySource
from fiddler.models.footprint import expert_bytes
from fiddler.models.kernels import DeviceKernels
from fiddler.models.registry import load_config, load_generation_config
from fiddler.models.rope import rope_tables
from fiddler.models.shapes import SHAPES, load_shape
from fiddler.models.torch_kernels import TorchKernels
from fiddler.models.weights import (
    CheckpointSource,
    WeightSource,
    load_dense,
    load_expert_into,
    load_packed_into,
)
from fiddler.planning import plan_model
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.tokenizer import Tokenizer
from offload.executor import HybridExperts, needs_warm_up, warm_up
from offload.expert_store import ExpertShape, ExpertStore
from offload.handoff import pinned_words
from offload.handoff_probe import Way
from offload.hardware import Hardware, probe
from offload.layout import MARGIN_FIXED_BYTES
from offload.plan import GpuSide, Plan
from offload.pool_keeper import PoolKeeper
from offload.prefill_costs import prefill_activations

Progress = Callable[[str, int, int], None]  # what is loaded, done, total
# Readers copy from mapped files or draw numbers, without Python's lock: one a core.
LOAD_THREADS = max(4, os.cpu_count() or 1)
FED_BY_HOST = (None, "eager")  # ways to hand work to the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What is known of a model before its weights are read; ``folder`` is None for a shape."""

    name: str
    revision: str | None
    folder: Path | None
    config: ModelConfig
    generation_config: dict[str, Any]
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A running engine and what must be given back when it ends."""

    files: ModelFiles
    hardware: Hardware
    dtypes: Dtypes
    plan: Plan
    engine: Engine
    runner: Runner
    experts: HybridExperts
    pages: PagePool
    num_threads: int
    peak_vram_bytes: Callable[[], int]
    resources: ExitStack


def load_model(
    settings: EngineConfig,
    on_progress: Progress | None = None,
    *,
    check_plan: Callable[[Plan], None] | None = None,
) -> LoadedModel:
    """Load what ``settings`` ask for; on an error everything taken so far is given back.

    ``check_plan`` may refuse a plan, by raising, before the first weight is read.
    """
    files = find_model(settings, on_progress)
    with ExitStack() as reading, ExitStack() as resources:
        source = open_source(settings, files, reading)
        hardware = probe(settings.device)
        plan, dtypes = plan_model(
            settings, files.config, hardware, name=files.name, folder=files.folder
        )
        if check_plan is not None:
            check_plan(plan)
        device = torch.device("cuda" if hardware.has_gpu else "cpu")
        resources.callback(_give_back_memory, device)
        limit_vram(plan, hardware, resources)
        way = decode_way(has_gpu=hardware.has_gpu, enforce_eager=settings.enforce_eager)
        keeper = PoolKeeper(lambda: _start_pool(settings, plan, dtypes, way, on_progress))
        resources.callback(keeper.close)
        runner, experts = _load_weights(
            settings,
            source,
            files.config,
            plan,
            dtypes,
            device,
            keeper,
            way,
            on_progress,
            resources,
        )
        pages = PagePool(plan.num_pages)
        return LoadedModel(
            files=files,
            hardware=hardware,
            dtypes=dtypes,
            plan=plan,
            engine=Engine(
                _scheduler(settings, pages),
                runner,
                experts,
                eos_ids=frozenset(_eos_ids(files)),
                decode_token=_token_text(files.tokenizer),
            ),
            runner=runner,
            experts=experts,
            pages=pages,
            num_threads=keeper.pool.num_threads,
            peak_vram_bytes=_vram_meter(plan, device),
            resources=resources.pop_all(),
        )


def find_model(settings: EngineConfig, on_progress: Progress | None = None) -> ModelFiles:
    """Find the model's files (downloading them if need be) and read all but the weights."""
    if settings.load_format == "dummy" and settings.model in SHAPES:
        return ModelFiles(
            name=settings.model,
            revision=None,
            folder=None,
            config=load_shape(settings.model),
            generation_config={},
            tokenizer=None,
            chat_template=None,
        )
    found = _find_folder(settings, on_progress)
    return ModelFiles(
        name=found.name,
        revision=found.revision,
        folder=found.path,
        config=load_config(found.path),
        generation_config=load_generation_config(found.path),
        tokenizer=_tokenizer(settings, found.path),
        chat_template=ChatTemplate.from_folder(found.path),
    )


def _tokenizer(settings: EngineConfig, folder: Path) -> Tokenizer | None:
    """Seeded weights need a configuration and nothing else."""
    if settings.load_format == "dummy" and not (folder / "tokenizer.json").exists():
        return None
    return Tokenizer.from_folder(folder)


def _find_folder(settings: EngineConfig, on_progress: Progress | None) -> ModelFolder:
    """Seeded weights need no download but the small files."""
    where: dict[str, Any] = {
        "revision": settings.revision,
        "token": settings.token,
        "offline": settings.offline,
        "progress": on_progress,
    }
    if settings.load_format == "dummy":
        return fetch_metadata(settings.model, **where).folder
    return resolve_model(settings.model, **where)


def open_source(settings: EngineConfig, files: ModelFiles, reading: ExitStack) -> WeightSource:
    """Open the weights and check that all are there; a checkpoint stays mapped while loading."""
    if settings.load_format == "dummy":
        if files.config.packed is not None:
            raise ConfigError(
                f"{files.name} has packed experts, and seeded weights are plain numbers",
                hint="take the model that it was made from",
            )
        return DummySource(files.config, settings.seed)
    assert files.folder is not None
    checkpoint = reading.enter_context(Checkpoint.open(files.folder))
    checkpoint.check(files.config)
    return CheckpointSource(checkpoint)


_vram_shares: list[int] = []  # bytes, of the models that are open: torch's limit is the process's


def limit_vram(plan: Plan, hardware: Hardware, resources: ExitStack) -> None:
    """Make torch refuse to allocate beyond the budget.

    The CUDA context is not torch's own, nor is what late kernels add to it (the fixed margin).
    """
    if not hardware.has_gpu:
        return

    def apply() -> None:
        allowed = sum(_vram_shares) / hardware.vram_total_bytes if _vram_shares else 1.0
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed))

    def lift() -> None:
        _vram_shares.remove(share)
        apply()

    share = plan.vram_budget_bytes - plan.memory.context - MARGIN_FIXED_BYTES
    torch.cuda.reset_peak_memory_stats()
    _vram_shares.append(share)
    resources.callback(lift)
    apply()


def _start_pool(
    settings: EngineConfig,
    plan: Plan,
    dtypes: Dtypes,
    way: Way | None,
    on_progress: Progress | None,
) -> ExpertPool:
    """Workers with compiled kernels, before the weights are read: who waits sees what for."""
    cores = os.cpu_count() or 1
    if settings.cpu_threads is not None and settings.cpu_threads > cores:
        raise ConfigError(
            f"{settings.cpu_threads} CPU threads were asked for, but there are {cores} cores",
            hint="waiting threads spin: more than cores only slow each other down",
        )
    kind = dtypes.expert_kind
    has_cold = plan.memory.cpu_experts > 0
    # what hidden states are rounded to: in steps of few tokens, and of many beside a GPU
    kernels: list[tuple[Any, ...]] = [(kind,)] if has_cold else []
    if has_cold and plan.gpu_side is GpuSide.CUDA:
        compute: torch.dtype = getattr(torch, dtypes.compute)
        kernels.append((kind, prefill_activations(compute, _store_dtype(dtypes))))
    compiles = needs_compile() or any(needs_warm_up(*which) for which in kernels)
    report = on_progress if on_progress is not None and compiles else _no_progress
    report("compiling CPU kernels, once", 0, 1)
    fed_by_gpu = {"words": pinned_words(), "caller_works": False} if way not in FED_BY_HOST else {}
    pool = ExpertPool(settings.cpu_threads or measured_num_threads(), **fed_by_gpu)
    for which in kernels:
        warm_up(pool, *which)
    report("compiling CPU kernels, once", 1, 1)
    return pool


def _no_progress(what: str, done: int, total: int) -> None:
    """For who does not watch."""


def _load_weights(
    settings: EngineConfig,
    source: WeightSource,
    config: ModelConfig,
    plan: Plan,
    dtypes: Dtypes,
    device: torch.device,
    keeper: PoolKeeper,
    way: Way | None,
    on_progress: Progress | None,
    resources: ExitStack,
) -> tuple[Runner, HybridExperts]:
    """Dense weights, experts and KV pages, each to its place; ``resources`` learns to drop them."""
    dtype: torch.dtype = getattr(torch, dtypes.compute)
    dense = load_dense(source, config, device=device, dtype=dtype)
    store = _fill_store(source, config, plan, dtypes, device, on_progress, resources)
    sizes = {
        "max_tokens": max(settings.max_batched_tokens, settings.max_num_seqs),
        "top_k": config.top_k,
    }
    prefill = None
    if device.type == "cuda":
        from offload.prefill import make_prefill  # triton wants a GPU

        prefill = make_prefill(
            store, keeper.pool, num_slots=plan.staging_slots, device=device, dtype=dtype, **sizes
        )
    experts = HybridExperts(store, keeper.pool, device=device, prefill=prefill, **sizes)
    resources.callback(experts.clear)
    kernels = _kernels(config, plan, device)
    decoder = Decoder(config, dense, kernels, experts)
    runner = Runner(
        decoder,
        num_pages=plan.num_pages,
        page_size=PAGE_SIZE,
        device=device,
        dtype=dtype,
    )
    resources.callback(runner.clear)
    if way is not None:
        add_decode_steps(
            runner,
            decoder,
            kernels,
            experts,
            keeper,
            way,
            dtype=dtype,
            page_size=PAGE_SIZE,
            max_num_seqs=settings.max_num_seqs,
            context_tokens=plan.context_tokens,
        )
    return runner, experts


def _scheduler(settings: EngineConfig, pages: PagePool) -> Scheduler:
    return Scheduler(
        pages,
        PrefixCache(pages, PAGE_SIZE) if settings.prefix_caching else None,
        page_size=PAGE_SIZE,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
    )


def _fill_store(
    source: WeightSource,
    config: ModelConfig,
    plan: Plan,
    dtypes: Dtypes,
    device: torch.device,
    on_progress: Progress | None,
    resources: ExitStack,
) -> ExpertStore:
    store = ExpertStore(
        ExpertShape(
            num_layers=config.num_layers,
            moe_layers=[i for i in range(config.num_layers) if config.is_moe_layer(i)],
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            expert_size=config.expert_size,
        ),
        plan.placement,
        device=device,
        dtype=_store_dtype(dtypes),
        packed=config.packed,
    )
    resources.callback(store.clear)

    load: Callable[..., None] = load_expert_into if config.packed is None else load_packed_into
    size = expert_bytes(config, dtypes.expert)

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("experts", done * size, total * size)

    fill_expert = functools.partial(load, source, config)
    store.fill(fill_expert, num_threads=LOAD_THREADS, on_progress=report)
    return store


def _store_dtype(dtypes: Dtypes) -> torch.dtype:
    """Of the memory that experts lie in."""
    dtype: torch.dtype = getattr(torch, "uint8" if dtypes.expert_kind.is_packed else dtypes.expert)
    return dtype


def _kernels(config: ModelConfig, plan: Plan, device: torch.device) -> DeviceKernels:
    cos_SR, sin_SR = (table.to(device) for table in rope_tables(config, plan.context_tokens))
    sm_scale = config.head_dim**-0.5
    if device.type == "cpu":
        return TorchKernels(cos_SR, sin_SR, sm_scale, eps=config.rms_norm_eps)
    from fiddler.models.triton_kernels import TritonKernels  # triton wants a GPU

    return TritonKernels(cos_SR, sin_SR, sm_scale, eps=config.rms_norm_eps)


def _eos_ids(files: ModelFiles) -> tuple[int, ...]:
    own = files.tokenizer.eos_token_ids if files.tokenizer is not None else ()
    return (*files.config.eos_token_ids, *own)


def _token_text(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    if tokenizer is None:
        return lambda token_id: ""
    return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)


def _vram_meter(plan: Plan, device: torch.device) -> Callable[[], int]:
    """Peak VRAM so far: torch's pool and the CUDA context as it was when the model was planned."""
    if device.type == "cpu":
        return lambda: 0
    return lambda: torch.cuda.max_memory_reserved() + plan.memory.context


def _give_back_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned pages; torch has no public name for it
