"""What was measured, as far as the figures depend on it, and what one run of a test costs it."""

from dataclasses import dataclass
from math import prod
from typing import Self

from fiddler.benchmark.cases import Case
from fiddler.benchmark.tally import Tally
from fiddler.loading import LoadedModel
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.models.footprint import DTYPE_BYTES
from fiddler.models.manifest import dense_bytes, model_parts
from offload.hardware import Hardware
from offload.limits import Work
from offload.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model as it was loaded; outlives its weights."""

    name: str
    config: ModelConfig
    dtypes: Dtypes
    hardware: Hardware
    plan: Plan

    @classmethod
    def of(cls, loaded: LoadedModel) -> Self:
        """The facts about ``loaded``."""
        return cls(
            name=loaded.files.name,
            config=loaded.files.config,
            dtypes=loaded.dtypes,
            hardware=loaded.hardware,
            plan=loaded.plan,
        )

    @property
    def expert_bytes(self) -> int:
        """Of one routed expert, in memory."""
        return self.config.expert_numel * DTYPE_BYTES[self.dtypes.expert]

    @property
    def weight_bytes(self) -> int:
        """Of all weights, in memory."""
        memory = self.plan.memory
        return memory.dense + memory.gpu_experts + memory.cpu_experts

    @property
    def num_params(self) -> int:
        """Weights of the model."""
        config = self.config
        num_experts = _num_moe_layers(config) * config.num_experts
        return dense_bytes(config, 1) + num_experts * config.expert_numel


def work_of(subject: Subject, case: Case, tally: Tally, num_runs: int) -> Work:
    """What one of ``num_runs`` runs of ``case`` reads and computes, when ``tally`` counts them all.

    A prompt's reading of its own KV is left out: it is small beside the arithmetic.
    """
    config = subject.config
    decoded = range(case.n_depth, case.length) if case.n_gen else range(0)
    kv_width = 2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES[subject.dtypes.compute]
    return Work(
        cold_bytes=tally.cold_reads * subject.expert_bytes / num_runs,
        hot_bytes=tally.hot_reads * subject.expert_bytes / num_runs,
        dense_bytes=tally.num_steps * subject.plan.per_token.dense / num_runs,
        kv_bytes=case.n_batch * seen_tokens(config, decoded) * kv_width,
        flops=case.n_batch * prompt_flops(config, case.n_depth, case.length),
    )


def prompt_flops(config: ModelConfig, start: int, stop: int) -> int:
    """Operations for the tokens at ``start`` to ``stop`` of a prompt and the logits of the last."""
    outside = sum(prod(part.shape) for parts in model_parts(config).values() for part in parts)
    per_token = dense_bytes(config, 1) - outside
    per_token += _num_moe_layers(config) * config.top_k * config.expert_numel
    attention = 2 * config.num_heads * config.head_dim * seen_tokens(config, range(start, stop))
    head = config.vocab_size * config.hidden_size
    return 2 * ((stop - start) * per_token + attention + head)


def seen_tokens(config: ModelConfig, positions: range) -> int:
    """Keys that the tokens at ``positions`` look at, themselves included, over all layers."""
    every = sum(position + 1 for position in positions)
    windowed = sum(min(position + 1, config.sliding_window or 0) for position in positions)
    num_windowed = len(config.window_layers)
    return (config.num_layers - num_windowed) * every + num_windowed * windowed


def _num_moe_layers(config: ModelConfig) -> int:
    return sum(config.is_moe_layer(layer) for layer in range(config.num_layers))
