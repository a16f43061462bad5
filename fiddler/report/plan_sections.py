"""What a plan's page says of speed: where the time goes, and which settings would save some."""

from collections.abc import Sequence

from fiddler.faster import Faster
from fiddler.report.page import Section, Table
from fiddler.speed import Speeds
from offload.prediction import Prediction

FASTER = (
    "Other settings, planned and predicted in the same way; the cheapest first. What rounding "
    "loses, fiddler eval measures."
)
TIMES = (
    "Of parts that go on at the same time only the slowest counts; what each takes by itself "
    "stands beside it."
)


def advice_sections(speeds: Speeds, faster: Sequence[Faster]) -> list[Section]:
    """Predicted times as their parts, and ways to go faster, if any help."""
    requests = f"{speeds.rows:,} requests" if speeds.rows > 1 else "a request"
    sections = [
        Section(
            f"Where the time goes, {requests} of {speeds.num_tokens:,} tokens",
            TIMES,
            table=Table(
                ("part", "decoded token", "by itself", "prompt", "by itself"), tuple(_rows(speeds))
            ),
        )
    ]
    if faster:
        rows = tuple(
            (way.option, _change(way.decode), _change(way.prefill), way.cost) for way in faster
        )
        table = Table(("setting", "decode tok/s", "prompt tok/s", "cost"), rows)
        sections.append(Section("To go faster", FASTER, table=table))
    return sections


def _rows(speeds: Speeds) -> list[tuple[str, ...]]:
    """A row for each part of either time, the longest of decode first."""
    steps, prompts = speeds.decode, speeds.prefill
    by_time = sorted((*steps.terms, *prompts.terms), key=lambda t: -steps.term(t.name).seconds)
    names = dict.fromkeys(term.name for term in by_time if term.busy_s)
    rows = [(name, *_times(steps, name), *_times(prompts, name)) for name in names]
    return [*rows, ("in all", _time(steps.seconds), "", _time(prompts.seconds), "")]


def _times(prediction: Prediction, name: str) -> tuple[str, str]:
    term = prediction.term(name)
    return _time(term.seconds), _time(term.busy_s)


def _time(seconds: float) -> str:
    if not seconds:
        return ""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _change(rates: tuple[float, float]) -> str:
    return " to ".join(f"{rate:,.1f}" for rate in rates)
