"""What is settled before the first weight is read: what goes where, and who will compute."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fiddler.config import EngineConfig
from fiddler.engine.decode_setup import decode_way
from fiddler.loading.model_files import Progress
from fiddler.loading.vram import give_back_memory, limit_vram
from fiddler.loading.workers import start_pool
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from offload.handoff_probe import Way
from offload.hardware import Hardware
from offload.machine_rates import MachineRates
from offload.plan import Plan
from offload.pool_keeper import PoolKeeper


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a running model is built on; ``resources`` learns how to take down what is built."""

    settings: EngineConfig
    config: ModelConfig
    hardware: Hardware
    plan: Plan
    dtypes: Dtypes
    device: torch.device
    way: Way | None  # how the GPU hands work to the CPU; None without a GPU
    keeper: PoolKeeper
    resources: ExitStack
    on_progress: Progress | None
    step_tokens: int  # of the largest step
    rates: MachineRates | None  # that steps are divided by; None without a GPU

    @property
    def dtype(self) -> torch.dtype:
        """Of dense weights, activations and KV."""
        return getattr(torch, self.dtypes.compute)  # type: ignore[no-any-return]

    @property
    def expert_dtype(self) -> torch.dtype:
        """Of the memory that routed experts lie in."""
        return getattr(torch, self.dtypes.expert_memory)  # type: ignore[no-any-return]


def settle(
    *,
    settings: EngineConfig,
    config: ModelConfig,
    hardware: Hardware,
    plan: Plan,
    dtypes: Dtypes,
    rates: MachineRates | None,
    resources: ExitStack,
    on_progress: Progress | None,
) -> Ground:
    """Limit the GPU's memory to the plan's and start the workers."""
    device = torch.device("cuda" if hardware.has_gpu else "cpu")
    resources.callback(give_back_memory, device)
    limit_vram(plan, hardware, resources)
    way = decode_way(has_gpu=hardware.has_gpu, enforce_eager=settings.enforce_eager)
    keeper = PoolKeeper(lambda: start_pool(settings, plan, dtypes, way, on_progress))
    resources.callback(keeper.close)
    return Ground(
        settings=settings,
        config=config,
        hardware=hardware,
        plan=plan,
        dtypes=dtypes,
        device=device,
        way=way,
        keeper=keeper,
        resources=resources,
        on_progress=on_progress,
        step_tokens=max(plan.step_tokens, settings.num_seqs),
        rates=rates,
    )
