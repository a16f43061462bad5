"""Routes for the policy simulator: recorded ones, or drawn for a named shape.

Shapes: T tokens, L layers, M layers with experts, E experts, K top-k, R requests.
"""

from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from fiddler.config import check_gib
from fiddler.errors import ConfigError, OutOfMemoryError
from fiddler.models.dtypes import resolve_dtypes
from fiddler.models.footprint import footprint
from fiddler.models.shapes import load_shape
from fiddler.planning import STEP_TOKENS
from fiddler.speed import PROMPT, bare_demand
from offload.demand import Demand
from offload.drawn_routes import DrawnRoutes
from offload.hardware import Hardware
from offload.layout import MOST_CONTEXT, lay_out, usable_vram_bytes
from offload.limits import Peaks
from offload.machine_rates import MachineRates
from offload.plan import Budget, Footprint
from offload.policies import Ids, Played
from offload.popularity import Profile
from offload.refusal import refuse_vram_budget
from offload.routing_law import Law
from offload.simulated_speed import predict_played
from offload.simulation import StepSeconds, Study, counts, steps_of
from offload.units import GIB, MIB, counted, gib_at_most, gib_to_bytes, size_text

CONTEXT_BYTES = 512 * MIB  # of a CUDA context, about
AMPLE_RAM = 1 << 50
LEAST_STEPS = 16  # of which a figure says anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """What is played: ``experts_TMK`` of a model called ``name``.

    ``num_tokens``: as many as were recorded or asked for, of which drawn ones fill whole steps.
    ``demand``: what its tokens ask for besides, if that is known.
    """

    name: str
    footprint: Footprint
    experts_TMK: Ids
    num_tokens: int
    demand: Demand | None


def drawn_routes(
    shape: str, law: Law, *, dtype: str, num_tokens: int, batch: int, seed: int
) -> Routes:
    """Those of ``batch`` requests, one behind the other, ``num_tokens`` in all.

    Raises :class:`ConfigError` for an unknown shape.
    """
    config = load_shape(shape)
    dtypes = resolve_dtypes(dtype, config.dtype, has_gpu=True, packed=None)
    sizes = footprint(
        config,
        dtypes,
        max_batched_tokens=STEP_TOKENS,
        max_num_seqs=max(16, batch),
        graph_rows=16,
    )
    drawn = DrawnRoutes(
        law,
        seed=seed,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
    )
    runs = [drawn.ids(request, 0, num_tokens // batch) for request in range(batch)]
    experts_TLK = np.concatenate(runs)
    return Routes(
        name=shape,
        footprint=sizes,
        experts_TMK=experts_TLK[:, list(sizes.moe_layers)],
        num_tokens=num_tokens,
        demand=bare_demand(config, dtypes),
    )


def make_study(
    routes: Routes,
    *,
    profile: Profile | None,
    train: float,
    batch: int,
    peaks: Peaks,
    rates: MachineRates | None,
) -> Study:
    """Placements are made from ``profile``, or from the first ``train`` of the steps.

    The steps behind those are played; nothing is predicted without ``rates``. Raises
    :class:`ConfigError` where too few are left.
    """
    steps_SMC = steps_of(routes.experts_TMK, batch)
    num_trained = 0 if profile is not None else round(train * len(steps_SMC))
    if len(steps_SMC) - num_trained < LEAST_STEPS:
        raise _too_few(routes.num_tokens, batch, 0 if profile is not None else train)
    sizes = routes.footprint
    trained_ME = _trained(profile, sizes, steps_SMC[:num_trained])
    return Study(
        steps_SMC=steps_SMC[num_trained:],
        trained_ME=trained_ME,
        batch=batch,
        footprint=sizes,
        peaks=peaks,
        step_s=_step_s(routes.demand, rates, batch),
    )


def _too_few(num_tokens: int, batch: int, train: float) -> ConfigError:
    """With the number of tokens from which on there are enough."""
    assert train < 1
    needed = next(n for n in count(LEAST_STEPS) if n - round(train * n) >= LEAST_STEPS)
    learnt = needed - LEAST_STEPS
    before = f"{counted(learnt, 'step')} to learn from and " if learnt else ""
    steps = counted(num_tokens // batch, "step") if num_tokens >= batch else "no step"
    return ConfigError(
        f"{counted(num_tokens, 'token')} {'makes' if num_tokens == 1 else 'make'} {steps} of "
        f"{counted(batch, 'request')}; at least {needed * batch:,} tokens are needed, for {before}"
        f"{LEAST_STEPS} to play",
        hint="give a longer trace, more --tokens, or a smaller --batch or --train",
    )


def _step_s(demand: Demand | None, rates: MachineRates | None, batch: int) -> StepSeconds | None:
    if demand is None or rates is None:
        return None

    def step_s(played: Played, is_all_resident: bool) -> float:
        return predict_played(
            *(played, demand, rates), rows=batch, depth=PROMPT, is_all_resident=is_all_resident
        ).seconds

    return step_s


def slots_within(sizes: Footprint, vram_gb: float, hardware: Hardware | None = None) -> int:
    """Experts that so many GiB of ``hardware``'s GPU, or of any, would hold.

    As the planner has it, on a machine whose host memory holds all the others. Raises
    :class:`OutOfMemoryError` for more than that GPU can give, and :class:`ConfigError` if the rest
    does not fit.
    """
    check_gib("vram_gb", vram_gb)
    vram = gib_to_bytes(vram_gb)
    gpu = _gpu_of(vram) if hardware is None else hardware
    roomy = replace(gpu, ram_total_bytes=AMPLE_RAM, ram_available_bytes=AMPLE_RAM)
    layout = lay_out(sizes, roomy, Budget(max_context=MOST_CONTEXT, vram_bytes=vram))
    if layout.is_vram_overdrawn:
        most = gib_at_most(usable_vram_bytes(gpu))
        hint = f"use --vram-gb {most} or less, or name a larger --hardware"
        raise OutOfMemoryError(refuse_vram_budget(gpu, layout).message, hint=hint)
    if layout.vram_missing:
        needed = layout.vram_needed
        raise ConfigError(
            f"the model needs {size_text(needed)} of VRAM before any expert, not {vram_gb:g} GiB",
            hint=f"use --vram-gb {needed / GIB + 0.05:.1f} or more",
        )
    return layout.num_gpu_experts


def _gpu_of(vram: int) -> Hardware:
    return Hardware(
        has_gpu=True,
        gpu_name="",
        vram_total_bytes=vram,
        vram_free_bytes=vram - CONTEXT_BYTES,
        cuda_context_bytes=CONTEXT_BYTES,
        ram_total_bytes=AMPLE_RAM,
        ram_available_bytes=AMPLE_RAM,
        physical_cores=1,
        cpu_name="",
    )


def _trained(profile: Profile | None, sizes: Footprint, steps_SMC: Ids) -> npt.NDArray[np.int64]:
    """Counts ``[M, E]`` to place by."""
    if profile is None:
        return counts(steps_SMC, sizes.num_experts)
    trained: npt.NDArray[Any] = profile.popularity.counts_LE[list(sizes.moe_layers)]
    return trained
