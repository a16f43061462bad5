"""The figures of one test under llama-bench's names, with ours behind them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.subject import Subject, work_of
from offload.limits import GIGA, Peaks, decode_limit_s, prefill_limit_s

Record = dict[str, Any]
NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all tests of one call share."""

    subject: Subject
    peaks: Peaks
    routing: str
    num_threads: int
    build: str


def tokens_per_s(measured: Measurement) -> tuple[float, float]:
    """All tokens over all time, and the standard deviation of the runs' own rates."""
    total_ts = measured.case.num_tokens * NS / statistics.mean(measured.samples_ns)
    return total_ts, _stdev(_rates(measured))


def record_of(measured: Measurement, setting: Setting) -> Record:
    """One row as JSON types; ``cpu_gbps`` is of decodes, None for prompts."""
    subject, case, tally = setting.subject, measured.case, measured.tally
    avg_ts, stddev_ts = tokens_per_s(measured)
    limit_ts = case.num_tokens / _limit_s(measured, setting)
    return {
        "build_commit": setting.build,
        "cpu_info": subject.hardware.cpu_name,
        "gpu_info": subject.hardware.gpu_name,
        "model_type": f"{subject.name} {subject.dtypes.expert}",
        "model_size": subject.weight_bytes,
        "model_n_params": subject.num_params,
        "n_threads": setting.num_threads,
        "n_batch": case.n_batch,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "test_time": measured.started,
        "avg_ns": round(statistics.mean(measured.samples_ns)),
        "stddev_ns": round(_stdev(measured.samples_ns)),
        "avg_ts": avg_ts,
        "stddev_ts": stddev_ts,
        "samples_ns": measured.samples_ns,
        "samples_ts": _rates(measured),
        "routing": setting.routing,
        "placement": subject.plan.popularity_name,
        "n_gpu_experts": subject.plan.placement.num_resident,
        "hit_rate": tally.hit_rate,
        "routing_entropy": tally.entropy_bits,
        "cpu_gbps": _cpu_gbps(measured, subject) if case.n_gen else None,
        "peak_vram_bytes": measured.peak_vram_bytes,
        "limit_ts": limit_ts,
        "ratio": avg_ts / limit_ts,
        **asdict(setting.peaks),
    }


def _rates(measured: Measurement) -> list[float]:
    return [measured.case.num_tokens * NS / sample for sample in measured.samples_ns]


def _stdev(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _limit_s(measured: Measurement, setting: Setting) -> float:
    """The least time of one run."""
    case, num_runs = measured.case, len(measured.samples_ns)
    work = work_of(setting.subject, case, measured.tally, num_runs)
    limit_s = decode_limit_s if case.n_gen else prefill_limit_s
    return limit_s(work, setting.peaks)


def _cpu_gbps(measured: Measurement, subject: Subject) -> float:
    cold_bytes = measured.tally.cold_reads * subject.expert_bytes
    return cold_bytes / (sum(measured.samples_ns) / NS) / GIGA
