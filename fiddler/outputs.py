"""What a run gives back, in vLLM's names."""

from dataclasses import dataclass, field

FinishReason = str  # "stop" | "length" | "cancelled"


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural) of one token under the model's own, unmodified distribution."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class RunStats:
    """Counters of one request so far; times are seconds of wall clock.

    ``prompt_tokens_cached`` of the prompt's tokens came from the prefix cache and were not
    computed again. ``expert_tokens_*`` count (token, expert) pairs by the side that computed them.
    """

    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    output_tokens: int = 0
    time_to_first_token_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    expert_tokens_gpu: int = 0
    expert_tokens_cpu: int = 0
    peak_vram_bytes: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed (not cached) prompt tokens over the prefill's time; 0.0 if none."""
        computed = self.prompt_tokens - self.prompt_tokens_cached
        return computed / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first over the time between first and last; 0.0 if there is one."""
        return (self.output_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def gpu_hit_rate(self) -> float:
        """Share of (token, expert) pairs whose expert lay on the GPU side; 0.0 without any."""
        total = self.expert_tokens_gpu + self.expert_tokens_cpu
        return self.expert_tokens_gpu / total if total else 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one stream.

    ``text`` is what became printable with this token (possibly empty: an unfinished UTF-8
    sequence or a held-back partial stop string). ``token_id`` is None where a part of the prompt
    was computed, or where the stream only closes. The last event has ``finish_reason`` set.
    """

    text: str
    token_id: int | None
    index: int = 0  # which of the n samples
    logprobs: dict[int, Logprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stats: RunStats = field(default_factory=RunStats)


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One finished sample; ``routed_experts`` is int16 ``[tokens, layers, top_k]`` if asked for."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    routed_experts: object | None = None  # numpy.ndarray; numpy is not imported here


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One finished prompt with its ``n`` samples."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    stats: RunStats = field(default_factory=RunStats)

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.outputs[0].text
