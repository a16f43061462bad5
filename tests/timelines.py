"""What every Chrome trace of ours has to be."""

from collections import defaultdict
from typing import Any

Event = dict[str, Any]


def rows_of(found: dict[str, Any]) -> dict[tuple[str, str], list[Event]]:
    """A trace's intervals by (process, thread), in the order of the file; checks its form."""
    events = found["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names: dict[tuple[str, int, int], str] = {}
    for event in events:
        if event["ph"] == "M" and event["name"] in ("process_name", "thread_name"):
            tid = event["tid"] if event["name"] == "thread_name" else 0
            names[event["name"], event["pid"], tid] = event["args"]["name"]
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] > 0 and event["name"], event
            assert isinstance(event["args"], dict)
            process = names["process_name", event["pid"], 0]
            rows[process, names["thread_name", event["pid"], event["tid"]]].append(event)
    return dict(rows)


def assert_nested(row: list[Event]) -> None:
    """Intervals of one row lie apart or one within another."""
    open_ends: list[float] = []
    for event in sorted(row, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = event["ts"], event["ts"] + event["dur"]
        while open_ends and open_ends[-1] <= begin + 1e-3:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1] + 1e-3, event
        open_ends.append(end)
