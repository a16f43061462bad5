"""One way to a plan, for `fiddler plan` and for loading: settings and a model in, plan out."""

import itertools
from pathlib import Path

from fiddler.config import PAGE_SIZE, EngineConfig
from fiddler.errors import ConfigError
from fiddler.models.buckets import largest_bucket
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes, check_kv, resolve_dtypes
from fiddler.models.footprint import DTYPE_BYTES, footprint, workspace_bytes
from fiddler.models.quantized import check_groups
from offload.hardware import Hardware
from offload.layout import Layout, lay_out, vram_limit_bytes
from offload.plan import Budget, Footprint, Plan
from offload.planner import plan as make_plan
from offload.popularity import Popularity, load_profile
from offload.units import gib_to_bytes

STEP_TOKENS = 2048  # of a step, unasked
# On a GPU each step with a prompt brings every cold expert once, however many tokens it has: more
# are cheaper, as long as their activations take at most 1/16 of the VRAM from experts.
GPU_STEP_TOKENS = (4096, 2048, 1024, 512)
WORKSPACE_DIVISOR = 16

SHIPPED_PROFILE = "profile.json"  # a model folder may bring its own


def plan_model(
    settings: EngineConfig,
    model: ModelConfig,
    hardware: Hardware,
    *,
    name: str,
    folder: Path | None,
) -> tuple[Plan, Dtypes]:
    """Return where everything will live, or raise as the planner and the profile do."""
    if settings.placement_policy == "adaptive" and not hardware.has_gpu:
        raise ConfigError(
            "experts change places on a GPU only, and there is none",
            hint="use the static placement",
        )
    dtypes = _dtypes(settings, model, hardware)
    (kind, *_) = dtypes.expert_kinds
    if model.packed is None and kind.is_packed:
        check_groups(model, kind, "--dtype")
    check_kv(dtypes, has_gpu=hardware.has_gpu, capability=hardware.gpu_capability)
    needs = _needs(settings, model, hardware, step_tokens(settings, model, hardware))
    popularity, popularity_name = find_popularity(settings.profile, model, name, folder)
    plan = make_plan(
        needs,
        hardware,
        _budget(settings, model),
        popularity,
        popularity_name=popularity_name,
        placement=settings.placement,
    )
    if plan.cached is not None and settings.placement_policy == "adaptive":
        raise ConfigError(
            "experts change places between GPU and RAM only, and some are on disk",
            hint="use the static placement, or a larger --vram-gb or --ram-gb",
        )
    return plan, dtypes


def step_tokens(settings: EngineConfig, model: ModelConfig, hardware: Hardware) -> int:
    """The most tokens of one step: as asked, or what memory allows.

    Fewer, rather than without the ring that brings cold experts: each step would be the CPU's.
    """
    if settings.max_batched_tokens is not None:
        return settings.max_batched_tokens
    if not hardware.has_gpu:
        return STEP_TOKENS
    width = DTYPE_BYTES[_dtypes(settings, model, hardware).compute]
    budget = _budget(settings, model)
    allowed = vram_limit_bytes(hardware, budget) // WORKSPACE_DIVISOR

    def workspace(tokens: int) -> int:
        seqs = settings.max_num_seqs
        return workspace_bytes(model, width, max_batched_tokens=tokens, max_num_seqs=seqs)

    def layout(tokens: int) -> Layout:
        return lay_out(_needs(settings, model, hardware, tokens), hardware, budget)

    layouts = {n: layout(n) for n in GPU_STEP_TOKENS if workspace(n) <= allowed}
    with_ring = (n for n, layout in layouts.items() if layout.has_ring)
    fitting = (n for n, layout in layouts.items() if not layout.vram_missing)
    from_disk = (n for n in fitting if layouts[n].num_disk_experts)  # which needs no ring
    return next(itertools.chain(with_ring, from_disk), GPU_STEP_TOKENS[-1])


def _dtypes(settings: EngineConfig, model: ModelConfig, hardware: Hardware) -> Dtypes:
    return resolve_dtypes(
        settings.dtype,
        model.dtype,
        has_gpu=hardware.has_gpu,
        packed=model.packed_name,
        kv=settings.kv_cache_dtype,
        cpu_activations=settings.cpu_activations,
    )


def _needs(
    settings: EngineConfig, model: ModelConfig, hardware: Hardware, tokens: int
) -> Footprint:
    """Bytes of the model, with steps of up to ``tokens``."""
    dtypes = _dtypes(settings, model, hardware)
    return footprint(
        model,
        dtype=dtypes.compute,
        expert_dtype=dtypes.expert,
        kv_dtype=dtypes.kv,
        max_batched_tokens=tokens,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        graph_rows=largest_bucket(settings.max_num_seqs) if hardware.has_gpu else 0,
    )


def _budget(settings: EngineConfig, model: ModelConfig) -> Budget:
    given = settings.placement
    return Budget(
        max_context=model.max_position,
        vram_bytes=_bytes(settings.vram_gb),
        ram_bytes=_bytes(settings.ram_gb),
        context_tokens=settings.max_model_len,
        page_size=PAGE_SIZE,
        max_num_seqs=settings.max_num_seqs,
        gpu_experts=None if given is None else given.num_resident,
        spares_per_layer=int(settings.placement_policy == "adaptive"),
    )


def find_popularity(
    path: str | None, model: ModelConfig, name: str, folder: Path | None
) -> tuple[Popularity, str]:
    """The asked profile, or the one shipped with the model, or nothing known."""
    shipped = folder / SHIPPED_PROFILE if folder is not None else None
    if path is None and (shipped is None or not shipped.is_file()):
        return Popularity.uniform(model.num_layers, model.num_experts), "uniform"
    profile = load_profile(
        path or str(shipped),
        model=name,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
    )
    return profile.popularity, profile.name


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else gib_to_bytes(gib)
