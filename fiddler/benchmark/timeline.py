"""Intervals of time as a Chrome trace, which Perfetto and chrome://tracing draw."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that went on from ``begin_ns`` to ``end_ns`` of time.perf_counter_ns.

    It is drawn in the row ``thread`` of ``process``, where spans lie apart or one within another.
    """

    process: str
    thread: str
    name: str
    begin_ns: int
    end_ns: int
    args: dict[str, Any] = field(default_factory=dict)


def within(spans: Iterable[Span], outer: Span) -> list[Span]:
    """Those that reach into ``outer``, cut off at its ends."""
    cut = (
        replace(
            span,
            begin_ns=max(span.begin_ns, outer.begin_ns),
            end_ns=min(span.end_ns, outer.end_ns),
        )
        for span in spans
    )
    return [span for span in cut if span.begin_ns < span.end_ns]


def chrome_trace(spans: Sequence[Span], facts: dict[str, Any]) -> dict[str, Any]:
    """The trace as JSON types, microseconds from the first span on.

    Rows keep the order in which they first come. ``facts`` are shown with the trace.
    """
    origin_ns = min((span.begin_ns for span in spans), default=0)
    pids = _numbers(span.process for span in spans)
    tids = _numbers((span.process, span.thread) for span in spans)
    names = [
        *(_name("process", pid, 0, process) for process, pid in pids.items()),
        *(_name("thread", pids[process], tid, thread) for (process, thread), tid in tids.items()),
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "cat": span.process,
            "pid": pids[span.process],
            "tid": tids[span.process, span.thread],
            "ts": (span.begin_ns - origin_ns) / 1e3,
            "dur": (span.end_ns - span.begin_ns) / 1e3,
            "args": span.args,
        }
        for span in spans
    ]
    flat = [event for pair in names for event in pair]
    return {"displayTimeUnit": "ms", "otherData": facts, "traceEvents": flat + events}


def _numbers(keys: Iterable[Any]) -> dict[Any, int]:
    return {key: number for number, key in enumerate(dict.fromkeys(keys), start=1)}


def _name(kind: str, pid: int, tid: int, name: str) -> list[dict[str, Any]]:
    order = tid if kind == "thread" else pid
    shared = {"ph": "M", "pid": pid, "tid": tid}
    return [
        {**shared, "name": f"{kind}_name", "args": {"name": name}},
        {**shared, "name": f"{kind}_sort_index", "args": {"sort_index": order}},
    ]
