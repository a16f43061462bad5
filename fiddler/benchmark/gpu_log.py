"""What a GPU did and when, from torch's profiler (CUPTI), on the clock of the host.

The profiler has a clock of its own. Marks that both clocks date bring one to the other.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fiddler.benchmark.timeline import Span

MARK = "fiddler clock"
KINDS = {"kernel", "gpu_memcpy", "gpu_memset"}
SHOWN = ("grid", "block", "bytes", "memory bandwidth (GB/s)")
NUM_MARKS = 5  # the first ones are slow


class GpuLog:
    """Records the current CUDA device within its context; :meth:`spans` afterwards.

    ``events`` are all that the profiler saw, as Chrome trace events on its own clock.
    """

    def __init__(self) -> None:
        # with its teardown, CUPTI may crash where CUDA graphs are in use
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        # marks are the host's, so its operations are recorded too: eager steps get slower by it
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # there is one cycle; without acc_events the profiler warns that it would forget others
        self._profile = profile(activities=activities, acc_events=True)
        self._marks_ns: dict[str, float] = {}
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._profile.start()
        self._mark()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mark()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self.events = self._read()

    def spans(self) -> list[Span]:
        """Kernels and copies, a row for each stream."""
        return gpu_spans(self.events, clock_offset_us(self.events, self._marks_ns))

    def _read(self) -> list[dict[str, Any]]:
        """The events; the profiler gives them away once."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        return events

    def _mark(self) -> None:
        for _ in range(NUM_MARKS):
            name = f"{MARK} {len(self._marks_ns)}"
            began_ns = time.perf_counter_ns()
            with record_function(name):
                pass
            self._marks_ns[name] = (began_ns + time.perf_counter_ns()) / 2


def clock_offset_us(events: Iterable[dict[str, Any]], marks_ns: Mapping[str, float]) -> float:
    """What to add to events' times to get time.perf_counter's: the median over the marks."""
    offsets = [
        marks_ns[event["name"]] / 1e3 - (event["ts"] + event["dur"] / 2)
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in marks_ns
    ]
    assert offsets, "the profiler has not recorded the clock's marks"
    return float(statistics.median(offsets))


def gpu_spans(events: Iterable[dict[str, Any]], offset_us: float) -> list[Span]:
    """The GPU's part; what seems to overlap in a stream is cut off where the next one begins."""
    found = [
        Span(
            process="GPU",
            thread=f"stream {event['args'].get('stream', 0)}",
            name=event["name"],
            begin_ns=round((event["ts"] + offset_us) * 1e3),
            end_ns=round((event["ts"] + event["dur"] + offset_us) * 1e3),
            args={key: event["args"][key] for key in SHOWN if key in event["args"]},
        )
        for event in events
        if event.get("cat") in KINDS and event.get("ph") == "X"
    ]
    found.sort(key=lambda span: (span.thread, span.begin_ns))
    return [span for _, row in groupby(found, lambda span: span.thread) for span in _apart([*row])]


def _apart(row: Sequence[Span]) -> list[Span]:
    nexts = [span.begin_ns for span in row[1:]]
    return [
        replace(span, end_ns=min(span.end_ns, begin_ns))
        for span, begin_ns in zip(row, [*nexts, row[-1].end_ns], strict=True)
    ]
