"""What one run of a test has to read and to compute, from which its limit follows."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.subject import Subject, num_moe_layers
from fiddler.benchmark.tally import Tally
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import dense_bytes, model_parts
from offload.limits import Peaks, Work, decode_limit_s, prefill_limit_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWork:
    """The steps in which a request still reads its prompt, and those that only write."""

    prompt: Work
    decode: Work

    def limit_s(self, peaks: Peaks) -> float:
        """The least time in which a machine of ``peaks`` does one after the other."""
        return prefill_limit_s(self.prompt, peaks) + decode_limit_s(self.decode, peaks)


def done_work(subject: Subject, measured: Measurement) -> RunWork:
    """The mean of the runs, with the experts where they lay."""
    return _run_work(subject, measured, lambda tally: tally.num_hot_reads)


def least_work(subject: Subject, measured: Measurement) -> RunWork:
    """The mean of the runs, if as many resident experts were those that are read most often."""
    num_resident = subject.plan.placement.num_resident
    return _run_work(subject, measured, lambda tally: tally.best_hot_reads(num_resident))


def _run_work(
    subject: Subject, measured: Measurement, hot_reads: Callable[[Tally], int]
) -> RunWork:
    """A prompt's reading of its own KV is left out: it is small beside the arithmetic."""
    config, case, num_runs = subject.config, measured.case, len(measured.samples_ns)

    def work(tally: Tally, *, seen: int = 0, flops: int = 0) -> Work:
        num_hot = hot_reads(tally)
        return Work(
            cold_bytes=(tally.num_reads - num_hot) * subject.expert_bytes / num_runs,
            hot_bytes=num_hot * subject.expert_bytes / num_runs,
            dense_bytes=tally.num_steps * subject.plan.per_token.dense / num_runs,
            kv_bytes=case.n_parallel * seen * subject.kv_bytes,
            flops=case.n_parallel * flops,
        )

    flops = prompt_flops(config, case.n_depth, case.prompt_end) if case.n_prompt else 0
    seen = seen_tokens(config, range(case.prompt_end, case.length))
    return RunWork(
        prompt=work(measured.prompt, flops=flops), decode=work(measured.decode, seen=seen)
    )


def prompt_flops(config: ModelConfig, start: int, stop: int) -> int:
    """Operations for the tokens at ``start`` to ``stop`` of a prompt and the logits of the last."""
    outside = sum(prod(part.shape) for parts in model_parts(config).values() for part in parts)
    per_token = dense_bytes(config, 1) - outside
    per_token += num_moe_layers(config) * config.top_k * config.expert_numel
    attention = 2 * config.num_heads * config.head_dim * seen_tokens(config, range(start, stop))
    head = config.vocab_size * config.hidden_size
    return 2 * ((stop - start) * per_token + attention + head)


def seen_tokens(config: ModelConfig, positions: range) -> int:
    """Keys that the tokens at ``positions`` look at, themselves included, over all layers."""
    every = sum(position + 1 for position in positions)
    windowed = sum(min(position + 1, config.sliding_window or 0) for position in positions)
    num_windowed = len(config.window_layers)
    return (config.num_layers - num_windowed) * every + num_windowed * windowed
