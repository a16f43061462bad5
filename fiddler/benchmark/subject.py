"""What was measured, as far as the figures depend on it."""

from dataclasses import dataclass
from typing import Self

from fiddler.loading import LoadedModel
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.models.footprint import kv_bytes
from fiddler.models.manifest import dense_bytes
from offload.hardware import Hardware
from offload.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model as it was loaded; outlives its weights. A shape has no ``path``: ""."""

    name: str
    path: str
    config: ModelConfig
    dtypes: Dtypes
    hardware: Hardware
    plan: Plan
    num_threads: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> Self:
        """The facts about ``loaded``."""
        return cls(
            name=loaded.files.name,
            path=str(loaded.files.folder or ""),
            config=loaded.files.config,
            dtypes=loaded.dtypes,
            hardware=loaded.hardware,
            plan=loaded.plan,
            num_threads=loaded.num_threads,
        )

    @property
    def expert_bytes(self) -> float:
        """Of one routed expert, in memory; the mean where layers differ."""
        memory = self.plan.memory
        experts = memory.gpu_experts + memory.cpu_experts + memory.disk_experts
        return experts / (num_moe_layers(self.config) * self.config.num_experts)

    @property
    def num_on_disk(self) -> int:
        """Experts that no memory has room for: steps that need them read them first."""
        plan = self.plan
        if plan.cached is None:
            return 0
        num_experts = num_moe_layers(self.config) * self.config.num_experts
        return num_experts - plan.placement.num_resident - plan.cached.num_resident

    @property
    def kv_bytes(self) -> int:
        """Of one token's key and value in one layer."""
        return kv_bytes(self.config, self.dtypes.kv)

    @property
    def weight_bytes(self) -> int:
        """Of all weights, in memory."""
        memory = self.plan.memory
        dense = memory.dense + memory.cpu_dense
        return dense + memory.gpu_experts + memory.cpu_experts + memory.disk_experts

    @property
    def num_params(self) -> int:
        """Weights of the model."""
        config = self.config
        num_experts = num_moe_layers(config) * config.num_experts
        return dense_bytes(config, 1) + num_experts * config.expert_numel


def num_moe_layers(config: ModelConfig) -> int:
    """Layers that have experts."""
    return sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
