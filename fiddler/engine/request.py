"""One sequence under way: its tokens, its pages, its clock. The engine knows no text."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fiddler.outputs import FinishReason, Logprob, RunStats
from fiddler.sampling_params import SamplingParams

_ids = itertools.count()


@dataclass(frozen=True, slots=True)
class LogitReader:
    """Who reads a prompt's predictions: its rows from ``first`` to the last but one.

    ``read(row, logits_RV)`` gets some rows at a time, in order, as float32 on the device, good
    during the call; row r is about the prompt's token r + 1. A prompt that is computed again, for
    its pages were taken away, is read again.
    """

    first: int
    read: Callable[[int, torch.Tensor], None]


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A prompt and what has been generated for it.

    ``num_computed`` tokens have their KV in ``pages``. A request decodes when all tokens but the
    last are computed. ``leader`` is the first of ``n`` samples: the others wait until its prompt
    is cached and then share its pages.
    """

    prompt_ids: list[int]
    params: SamplingParams
    max_tokens: int  # resolved: never beyond the context
    seed: int
    leader: "Request | None" = None
    index: int = 0  # which of the n samples
    reader: LogitReader | None = None
    id: int = field(default_factory=lambda: next(_ids))
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens taken from the prefix cache at the first admission
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    routed: list[np.ndarray] = field(default_factory=list)  # int16 [tokens, layers, K] per step
    expert_tokens_gpu: int = 0
    expert_tokens_cpu: int = 0
    arrived_s: float = field(default_factory=time.perf_counter)
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """What has been generated."""
        return self.tokens[len(self.prompt_ids) :]

    @property
    def num_outputs(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - len(self.prompt_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens that have no KV yet; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def is_finished(self) -> bool:
        """Whether a finish reason is set."""
        return self.finish_reason is not None

    @property
    def can_use_cache(self) -> bool:
        """Whether cached KV serves it; who asks about every prompt token needs them computed."""
        every_token = self.params.prompt_logprobs is not None or self.params.routed_experts
        return not every_token and self.reader is None

    def routed_experts(self) -> np.ndarray | None:
        """int16 ``[tokens, layers, K]`` of every token but the last, if asked for."""
        return np.concatenate(self.routed) if self.params.routed_experts and self.routed else None

    def restart(self) -> None:
        """Forget what was computed, keep the tokens; used when the pages were taken away."""
        self.num_computed = 0
        self.prompt_logprobs = []
        self.routed = []

    def stats(self, peak_vram_bytes: int = 0) -> RunStats:
        """The counters so far."""
        return RunStats(
            prompt_tokens=len(self.prompt_ids),
            prompt_tokens_cached=self.num_cached,
            output_tokens=self.num_outputs,
            time_to_first_token_s=max(0.0, self.first_token_s - self.arrived_s),
            prefill_s=max(0.0, self.first_token_s - self.admitted_s),
            decode_s=max(0.0, self.last_token_s - self.first_token_s),
            expert_tokens_gpu=self.expert_tokens_gpu,
            expert_tokens_cpu=self.expert_tokens_cpu,
            peak_vram_bytes=peak_vram_bytes,
        )
