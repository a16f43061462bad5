"""Traces from intervals, and intervals from workers' words and from the profiler's events."""

import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.profiler import record_function

from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import ARRIVED, DOORBELL, GENERATION, LINE, NUM_WORDS
from fiddler.benchmark.bell_log import BellLog, Look, job_spans
from fiddler.benchmark.gpu_log import MARK, GpuLog, clock_offset_us, gpu_spans
from fiddler.benchmark.timeline import Span, chrome_trace, within
from tests.timelines import assert_nested, rows_of
from tests.workers import add_python_job


def span(thread: str, begin_ns: int, end_ns: int, name: str = "some") -> Span:
    return Span(process="p", thread=thread, name=name, begin_ns=begin_ns, end_ns=end_ns)


def times(spans: list[Span]) -> list[tuple[str, str, int, int]]:
    return [(s.thread, s.name, s.begin_ns, s.end_ns) for s in spans]


# --- traces ---


def test_a_trace_counts_from_its_first_interval_and_names_its_rows() -> None:
    spans = [span("b", 5_000, 9_000), span("a", 4_000, 4_500), span("b", 6_000, 7_500)]
    found = chrome_trace(spans, {"model": "m"})
    rows = rows_of(json.loads(json.dumps(found)))
    assert list(rows) == [("p", "b"), ("p", "a")]
    assert [(e["ts"], e["dur"]) for e in rows["p", "b"]] == [(1.0, 4.0), (2.0, 1.5)]
    assert_nested(rows["p", "b"])
    assert found["otherData"] == {"model": "m"}
    with pytest.raises(AssertionError):
        assert_nested([{"ts": 0, "dur": 2}, {"ts": 1, "dur": 2}])


def test_what_reaches_out_of_a_step_is_cut_off() -> None:
    spans = [span("a", 0, 10), span("a", 5, 30), span("a", 28, 40), span("a", 40, 50)]
    outer = span("steps", 10, 30)
    assert times(within(spans, outer)) == [("a", "some", 10, 30), ("a", "some", 28, 30)]


# --- workers ---


def look(at: int, job: int, generation: int, *arrived: int) -> Look:
    """One that saw a change within the last 10 ns."""
    return Look(at - 10, at, job, generation, arrived)


def test_jobs_phases_and_shares_from_what_was_seen() -> None:
    looks = [
        look(100, 0, 4, 4, 4),
        look(205, 7, 4, 4, 4),  # rung
        look(305, 7, 4, 5, 4),  # worker 1 has done its share
        look(405, 7, 5, 5, 5),  # all met: the next phase
        look(505, 7, 5, 5, 6),
        look(605, 0, 6, 6, 6),  # done
        look(705, 9, 6, 6, 6),
        look(805, 8, 8, 8, 8),  # done and another rung between two looks
        look(905, 0, 9, 9, 9),
        look(955, 7, 9, 9, 9),  # goes on when nobody looks any more
    ]
    spans = job_spans(looks, {7: "layer 3", 8: "layer 4"})
    rows: dict[str, list[tuple[str, int, int]]] = {}
    for thread, name, begin, end in times(spans):
        rows.setdefault(thread, []).append((name, begin, end))
    assert list(rows) == ["jobs", "worker 0", "worker 1", "worker 2"]
    assert rows["jobs"] == [
        ("layer 3", 200, 600),
        ("phase 1", 200, 400),
        ("phase 2", 400, 600),
        ("job 9", 700, 800),
        ("phase 1", 700, 800),
        ("layer 4", 800, 900),
        ("phase 1", 800, 900),
    ]
    assert rows["worker 0"][:2] == [("phase 1", 200, 400), ("phase 2", 400, 600)]
    assert rows["worker 1"][:2] == [("phase 1", 200, 300), ("phase 2", 400, 600)]
    assert rows["worker 2"][:2] == [("phase 1", 200, 400), ("phase 2", 400, 500)]
    for row in rows_of(chrome_trace(spans, {})).values():
        assert_nested(row)


def test_changes_of_words_are_seen_when_they_are_made() -> None:
    words = np.zeros(NUM_WORDS, np.int64)
    changes = [(DOORBELL, 3), (ARRIVED + 2 * LINE, 1), (GENERATION, 1)]
    changes += [(DOORBELL, job) for job in range(4, 20)]
    made_ns = []
    with BellLog(words, num_workers=3) as log:
        _wait_until_seen(log, words)
        for place, value in changes:
            began_ns = time.perf_counter_ns()
            words[place] = value
            made_ns.append((began_ns, time.perf_counter_ns()))
            _wait_until_seen(log, words)
    assert [(x.job, x.generation, x.arrived) for x in log.looks] == [
        *((0, 0, (0, 0)), (3, 0, (0, 0)), (3, 0, (0, 1))),
        *((job, 1, (0, 1)) for job in range(3, 20)),
    ]
    errors_ns = []
    for found, (began_ns, ended_ns) in zip(log.looks[1:], made_ns, strict=True):
        assert found.before_ns <= ended_ns and began_ns <= found.at_ns
        errors_ns.append(abs(found.changed_ns - began_ns))
    assert min(errors_ns) < 10_000_000  # 0.02 ms on a free machine
    assert log.gap_us > 0


def _wait_until_seen(log: BellLog, words: npt.NDArray[np.int64]) -> None:
    """Until the log has looked at the words as they are: on a busy machine it naps for long."""
    deadline = time.monotonic() + 60
    while not log.looks or not _is_seen(log.looks[-1], words):
        assert time.monotonic() < deadline
        time.sleep(1e-4)


def _is_seen(last: Look, words: npt.NDArray[np.int64]) -> bool:
    arrived = tuple(words[ARRIVED + LINE * n] for n, _ in enumerate(last.arrived, start=1))
    found = (last.job, last.generation, last.arrived)
    return found == (words[DOORBELL], words[GENERATION], arrived)


def test_a_pools_jobs_are_seen() -> None:
    def stage(phase: int, worker: int, num_workers: int) -> None:
        if worker == 1:
            _wait_until_seen(log, pool.words)
        time.sleep(0.03 if worker == 1 else 0.01)

    with WorkerPool(2, caller_works=False) as pool:
        number = add_python_job(pool, stage, num_phases=2)
        with BellLog(pool.words, pool.num_threads) as log:
            _wait_until_seen(log, pool.words)
            entered_ns = log.looks[-1].before_ns
            for _ in range(2):
                pool.ring(number)
                pool.wait()
                _wait_until_seen(log, pool.words)
            left_ns = time.perf_counter_ns()
    spans = job_spans(log.looks, {number: "the job"})
    jobs = [s for s in spans if s.name == "the job"]
    assert len(jobs) == 2
    assert all(job.end_ns - job.begin_ns > 0.04e9 for job in jobs)
    assert entered_ns <= jobs[0].begin_ns < jobs[0].end_ns <= jobs[1].begin_ns
    assert jobs[1].end_ns <= left_ns
    shares = [s for s in spans if s.thread == "worker 1"]
    assert [s.name for s in shares] == ["phase 1", "phase 2"] * 2
    assert all(s.end_ns - s.begin_ns > 0.014e9 for s in shares)  # dated by half, at the worst


# --- the GPU ---


def kernel(stream: int, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "kernel",
        "name": f"k{stream}",
        "ts": ts,
        "dur": dur,
        "args": {"stream": stream, "grid": [1, 1, 1], "queued": 0},
    } | more


def test_kernels_and_copies_become_rows_of_streams() -> None:
    events = [
        kernel(7, 20.0, 5.0),
        kernel(7, 10.0, 10.5),  # seems to overlap the one before
        kernel(13, 12.0, 30.0, cat="gpu_memcpy", name="Memcpy HtoD"),
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 9.0, "dur": 1.0, "args": {}},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 9.0},
    ]
    spans = gpu_spans(events, offset_us=100.0)
    assert times(spans) == [
        ("stream 13", "Memcpy HtoD", 112_000, 142_000),
        ("stream 7", "k7", 110_000, 120_000),
        ("stream 7", "k7", 120_000, 125_000),
    ]
    assert spans[1].args == {"grid": [1, 1, 1]}
    assert gpu_spans([], 0.0) == []


def test_the_marks_bring_clocks_together() -> None:
    def mark(n: int, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": "user_annotation", "name": f"{MARK} {n}", "ts": ts, "dur": dur}

    events = [mark(2, 30.0, 2.0), mark(0, 10.0, 40.0), mark(1, 20.0, 2.0), kernel(7, 1.0, 1.0)]
    marks_ns = {f"{MARK} {n}": 1e6 + 10_000 * (n + 1) + 1000 for n in range(4)}
    assert clock_offset_us(events, marks_ns) == pytest.approx(1000.0)


def test_the_profilers_clock_is_found() -> None:
    """Of what the profiler records here too: the host's part."""
    taken_us = []
    with GpuLog() as log:
        for _ in range(5):
            began_ns = time.perf_counter_ns()
            with record_function("a nap"):
                time.sleep(0.004)
            taken_us.append((began_ns / 1e3, time.perf_counter_ns() / 1e3))
    events = log.events
    offset_us = clock_offset_us(events, log._marks_ns)
    naps = [e for e in events if e.get("name") == "a nap" and e["cat"] == "user_annotation"]
    naps.sort(key=lambda nap: nap["ts"])
    errors_us = [
        max(abs(nap["ts"] + offset_us - began), abs(nap["ts"] + nap["dur"] + offset_us - ended))
        for nap, (began, ended) in zip(naps, taken_us, strict=True)
    ]
    print(f"off by {', '.join(f'{error:.1f}' for error in errors_us)} us")
    assert min(errors_us) < 5000  # the others were kept waiting by a busy machine
    assert log.spans() == [] or torch.cuda.is_available()


@pytest.mark.gpu
def test_a_kernel_lies_between_its_launch_and_its_end() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x @ x
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        x @ x
    with GpuLog() as log:
        torch.cuda.synchronize()
        time.sleep(0.01)
        began_ns = time.perf_counter_ns()
        graph.replay()
        torch.cuda.synchronize()
        ended_ns = time.perf_counter_ns()
        time.sleep(0.01)
    spans = log.spans()
    print([(s.name, s.begin_ns - began_ns, s.end_ns - ended_ns) for s in spans])
    [product] = [s for s in spans if s.end_ns - s.begin_ns > 300_000]
    assert began_ns - 100_000 < product.begin_ns < product.end_ns < ended_ns + 100_000
