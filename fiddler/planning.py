"""One way to a plan, for `fiddler plan` and for loading: settings and a model in, plan out."""

from pathlib import Path

from fiddler.config import PAGE_SIZE, EngineConfig
from fiddler.models.buckets import largest_bucket
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes, resolve_dtypes
from fiddler.models.footprint import footprint
from offload.hardware import Hardware
from offload.plan import Budget, Plan
from offload.planner import plan as make_plan
from offload.popularity import Popularity, load_profile
from offload.units import gib_to_bytes

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
    dtypes = resolve_dtypes(
        settings.dtype, model.dtype, has_gpu=hardware.has_gpu, packed=model.packed
    )
    needs = footprint(
        model,
        dtype=dtypes.compute,
        expert_dtype=dtypes.expert,
        max_batched_tokens=settings.max_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        graph_rows=largest_bucket(settings.max_num_seqs) if hardware.has_gpu else 0,
    )
    popularity, popularity_name = find_popularity(settings.profile, model, name, folder)
    budget = Budget(
        max_context=model.max_position,
        vram_bytes=_bytes(settings.vram_gb),
        ram_bytes=_bytes(settings.ram_gb),
        context_tokens=settings.max_model_len,
        page_size=PAGE_SIZE,
        max_num_seqs=settings.max_num_seqs,
    )
    plan = make_plan(
        needs,
        hardware,
        budget,
        popularity,
        popularity_name=popularity_name,
        placement=settings.placement,
    )
    return plan, dtypes


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
