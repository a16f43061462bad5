"""What is settled before the first weight is read: what goes where, and who will compute."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fiddler.config import EngineConfig
from fiddler.loading.model_files import Progress
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
