"""Benchmark records as text: a Markdown table for people, JSON and CSV for programs."""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fiddler.benchmark.cases import Case
from fiddler.benchmark.record import Record
from fiddler.markdown_table import markdown_table
from fiddler.models.dtypes import KV_CODES
from fiddler.wrapping import fitted
from offload.units import counted, size_text

BILLION, MILLION = 10**9, 10**6


@dataclass(frozen=True, slots=True)
class _Column:
    """``is_shown`` says whether it tells anything about a record; if of none, it is left out."""

    heading: str
    text: Callable[[Record], str]
    is_shown: Callable[[Record], bool] = lambda record: True


_COLUMNS = (
    _Column("model", lambda r: r["model_type"]),
    _Column("size", lambda r: size_text(r["model_size"])),
    _Column("params", lambda r: _count(r["model_n_params"])),
    _Column("routing", lambda r: r["routing"]),
    _Column("KV", lambda r: r["type_k"], lambda r: r["type_k"] in KV_CODES),
    _Column("batch", lambda r: str(r["n_parallel"]), lambda r: r["n_parallel"] > 1),
    _Column("test", lambda r: _case(r).name),
    _Column("t/s", lambda r: f"{r['median_ts']:.2f} ± {r['stddev_ts']:.2f}"),
    _Column("predicted", lambda r: _speed(r["predicted_ts"]), lambda r: bool(r["predicted_ts"])),
    _Column("limit", lambda r: f"{r['limit_ts']:.2f}"),
    _Column("ratio", lambda r: f"{r['ratio']:.3f}"),
    _Column("GPU experts", lambda r: f"{r['n_gpu_experts']:,}", lambda r: r["n_gpu_experts"] > 0),
    _Column("on disk", lambda r: f"{r['n_disk_experts']:,}", lambda r: r["n_disk_experts"] > 0),
    _Column("hits", lambda r: f"{r['hit_rate']:.1%}", lambda r: r["n_gpu_experts"] > 0),
    _Column("entropy", lambda r: f"{r['routing_entropy']:.2f} bits"),
    _Column("CPU GB/s", lambda r: _rate(r["cpu_gbps"]), lambda r: bool(r["cpu_gbps"])),
    _Column("PCIe GB/s", lambda r: _rate(r["pcie_gbps"]), lambda r: bool(r["pcie_gbps"])),
    _Column("GPU GB/s", lambda r: _rate(r["gpu_gbps"]), lambda r: bool(r["gpu_gbps"])),
    _Column("VRAM", lambda r: size_text(r["peak_vram_bytes"]), lambda r: r["peak_vram_bytes"] > 0),
)
_LEFT = {"model", "routing", "test"}


def render(records: Sequence[Record], form: str, *, width: int = sys.maxsize) -> str:
    """``records``, at least one, as ``md``, ``json`` or ``csv``; ``width`` is for people."""
    if form == "md":
        return markdown(records, width=width)
    return {"json": as_json, "csv": as_csv}[form](records)


def as_json(records: Sequence[Record]) -> str:
    """One list of objects."""
    return json.dumps(list(records), indent=2)


def as_csv(records: Sequence[Record]) -> str:
    """A row each; lists and terms are JSON, and what does not apply is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow(
            {key: json.dumps(v) if isinstance(v, list | dict) else v for key, v in record.items()}
        )
    return out.getvalue().rstrip("\n")


def markdown(records: Sequence[Record], *, width: int = sys.maxsize) -> str:
    """A table, and below it what the limits were computed from."""
    table = markdown_table(*cells(records), left=_LEFT, width=width)
    below = [part for line in notes(records) for part in fitted(line, width)]
    return "\n".join([*table, "", *below])


def notes(records: Sequence[Record]) -> list[str]:
    """What predictions were far off and why, what limits were computed from, and where."""
    off = [record["prediction_off"] for record in records if record["prediction_off"]]
    return [*off, _peaks_line(records[0]), _build_line(records[0])]


def cells(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of text for each record."""
    columns = [column for column in _COLUMNS if any(map(column.is_shown, records))]
    rows = [[column.text(record) for column in columns] for record in records]
    return [column.heading for column in columns], rows


def _peaks_line(record: Record) -> str:
    parts = [f"CPU reads {record['peak_cpu_read_gbps']:.1f} GB/s"]
    if record["peak_gpu_read_gbps"]:
        parts += [
            f"with PCIe {record['peak_joint_gbps']:.1f}",
            f"PCIe alone {record['peak_pcie_gbps']:.1f}",
            f"GPU reads {record['peak_gpu_read_gbps']:,.0f}",
        ]
    parts.append(f"products {record['peak_gemm_tflops']:.3g} TFLOP/s")
    return f"limits from: {', '.join(parts)}"


def _build_line(record: Record) -> str:
    machine = [record["cpu_info"], counted(record["n_threads"], "thread"), record["gpu_info"]]
    return f"build: {record['build_commit']}; {', '.join(part for part in machine if part)}"


def _case(record: Record) -> Case:
    return Case(**{key: record[key] for key in ("n_prompt", "n_gen", "n_depth", "n_parallel")})


def _speed(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f"{tokens_per_s:.2f}"


def _rate(gbps: float | None) -> str:
    return "" if gbps is None else f"{gbps:,.2f}"


def _count(number: int) -> str:
    if number >= BILLION:
        return f"{number / BILLION:.2f} B"
    return f"{number / MILLION:.2f} M"
