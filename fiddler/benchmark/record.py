"""The figures of one test under llama-bench's names, with ours behind them."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.predicted import predict_case
from fiddler.benchmark.subject import Subject
from fiddler.benchmark.work import done_work, least_work
from offload.limits import GIGA, Peaks
from offload.machine_rates import MachineRates
from offload.routing_law import parse_law

Record = dict[str, Any]
NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all tests of one call share; ``rates`` None: the machine is not calibrated."""

    subject: Subject
    peaks: Peaks
    routing: str
    build: str
    rates: MachineRates | None = None


def tokens_per_s(measured: Measurement) -> tuple[float, float]:
    """The median of the runs' rates and their standard deviation."""
    rates = _rates(measured)
    return statistics.median(rates), _stdev(rates)


def record_of(measured: Measurement, setting: Setting, wrong: str = "") -> Record:
    """One row as JSON types; ``wrong`` says what is wrong with its prediction, if much is."""
    subject, case = setting.subject, measured.case
    tally = measured.prompt + measured.decode
    median_ts, stddev_ts = tokens_per_s(measured)
    step_tokens = max(subject.plan.step_tokens, case.n_parallel)  # what writes comes in one step
    limit_ts = case.num_tokens / least_work(subject, measured).limit_s(setting.peaks)
    return {
        "build_commit": setting.build,
        "cpu_info": subject.hardware.cpu_name,
        "gpu_info": subject.hardware.gpu_name,
        "backends": "CUDA" if subject.hardware.has_gpu else "CPU",
        "model_filename": subject.path,
        "model_type": f"{subject.name} {subject.dtypes.weights}",
        "model_size": subject.weight_bytes,
        "model_n_params": subject.num_params,
        "n_batch": step_tokens,
        "n_ubatch": step_tokens,
        "n_threads": subject.num_threads,
        "type_k": subject.dtypes.kv,
        "type_v": subject.dtypes.kv,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.n_depth,
        "test_time": measured.started,
        "avg_ns": round(statistics.mean(measured.samples_ns)),
        "stddev_ns": round(_stdev(measured.samples_ns)),
        "avg_ts": statistics.mean(_rates(measured)),
        "stddev_ts": stddev_ts,
        "samples_ns": measured.samples_ns,
        "samples_ts": _rates(measured),
        "median_ts": median_ts,
        "n_parallel": case.n_parallel,
        "routing": setting.routing,
        "placement": subject.plan.popularity_name,
        "n_gpu_experts": subject.plan.placement.num_resident,
        "n_disk_experts": subject.num_on_disk,
        "hit_rate": tally.hit_rate,
        "routing_entropy": tally.entropy_bits,
        **_reached(measured, subject),
        "peak_vram_bytes": measured.peak_vram_bytes,
        "limit_ts": limit_ts,
        "ratio": median_ts / limit_ts,
        **_predicted(measured, setting),
        "prediction_off": wrong,
        **{f"peak_{name}": value for name, value in asdict(setting.peaks).items()},
    }


def _predicted(measured: Measurement, setting: Setting) -> dict[str, Any]:
    """The speed that the machine's rates promise, and its terms."""
    if setting.rates is None:
        return {"predicted_ts": None, "predicted_terms": None}
    law = parse_law(setting.routing)
    predicted = predict_case(setting.subject, measured, setting.rates, law)
    return {
        "predicted_ts": measured.case.num_tokens / predicted.seconds,
        "predicted_terms": predicted.to_dict(),
    }


def _rates(measured: Measurement) -> list[float]:
    return [measured.case.num_tokens * NS / sample for sample in measured.samples_ns]


def _stdev(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _reached(measured: Measurement, subject: Subject) -> dict[str, float | None]:
    """Bytes read on all sides a second; None for what prompts share, and without a GPU."""
    per_s = NS / statistics.median(measured.samples_ns) / GIGA
    has_gpu, link_bytes = subject.hardware.has_gpu, measured.link_bytes / len(measured.samples_ns)
    link_gbps = link_bytes * per_s if has_gpu else None
    if measured.case.n_prompt:
        return {"cpu_gbps": None, "pcie_gbps": link_gbps, "gpu_gbps": None}
    work = done_work(subject, measured).decode
    return {
        "cpu_gbps": (work.cold_bytes - link_bytes) * per_s,
        "pcie_gbps": link_gbps,
        "gpu_gbps": work.gpu_bytes * per_s if has_gpu else None,
    }
