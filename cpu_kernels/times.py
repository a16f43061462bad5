"""How long one expert takes for M tokens: measured points, and the curve through them.

A cost model asks the table; :func:`measure_times` fills it on this machine.
"""

import itertools
import json
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from cpu_kernels.column_panels import may_use_columns
from cpu_kernels.expert_layer import ExpertLayer
from cpu_kernels.expert_pool import ExpertPool, aligned_floats
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import PATHS, Activations, path_number

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUNDS = 5  # at most, for each number of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeTable:
    """Seconds per expert at some numbers of tokens, which ascend as the seconds do.

    ``rows_s``: row by row; ``columns_s``: by columns, None where these experts cannot be.
    ``kernel``: weights/activations, as ``bf16/bf16``. ValueError if no curve.
    """

    kernel: str
    hidden: int
    width: int
    tokens: tuple[int, ...]
    rows_s: tuple[float, ...]
    columns_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tokens or self.tokens[0] < 1 or not _ascends(self.tokens, strictly=True):
            raise ValueError(f"numbers of tokens must ascend from 1 or more, not {self.tokens}")
        for seconds in (self.rows_s, self.columns_s or self.rows_s):
            fits = len(seconds) == len(self.tokens) and seconds[0] > 0
            if not fits or not _ascends(seconds, strictly=False):
                raise ValueError(f"seconds must be positive and never fall, not {seconds}")

    def time(self, num_tokens: int, *, by_columns: bool = False) -> float:
        """Seconds of one expert with that many tokens; nothing for none.

        Straight between two points, beyond the last one as before it. Below the first one as there:
        what few tokens cost is reading the weights.
        """
        if num_tokens < 1:
            return 0.0
        seconds = self.columns_s if by_columns else self.rows_s
        if seconds is None:
            raise ValueError(f"{self.kernel} experts are never computed by columns")
        return _on_line(self.tokens, seconds, num_tokens)

    def best(self, num_tokens: int) -> float:
        """Seconds by the faster way."""
        rows_s = self.time(num_tokens)
        if self.columns_s is None:
            return rows_s
        return min(rows_s, self.time(num_tokens, by_columns=True))

    def switch_over(self) -> int | None:
        """The fewest tokens from which columns stay faster up to the last point, or None."""
        first = None
        if self.columns_s is not None:
            for tokens in range(self.tokens[-1], 0, -1):
                if self.time(tokens, by_columns=True) >= self.time(tokens):
                    break
                first = tokens
        return first

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse; ValueError for what is no table."""
        try:
            fields = json.loads(text)
            lists = {name: tuple(fields[name]) for name in ("tokens", "rows_s")}
            columns_s = fields["columns_s"] and tuple(fields["columns_s"])
            return cls(**{**fields, **lists, "columns_s": columns_s})
        except (TypeError, KeyError) as error:
            raise ValueError("this is no table of expert times") from error


def measure_times(
    pool: ExpertPool,
    experts: Experts,
    activations: Activations,
    *,
    tokens: Sequence[int] = TOKENS,
    routed: int = 8,
    budget_s: float = 10.0,
) -> TimeTable:
    """The table of ``experts``, from layer calls in which all tokens choose the same ``routed``.

    Each call takes the next ones, so that the weights come from memory if all of them are several
    times the last-level cache. Medians of up to five calls, by rows and by columns in turn; fewer
    once the budget is spent, at least one. The pool must be idle.
    """
    routed = min(routed, experts.num_experts)
    path = PATHS[path_number(experts.kind, activations)]
    sets = itertools.cycle(range(0, experts.num_experts - routed + 1, routed))
    started = time.perf_counter()
    samples: list[tuple[float, ...]] = []
    with _layers(pool, experts, activations) as layers, pool.workers.awake():
        for done, count in enumerate(tokens):
            calls = [_layer_call(pool, layer, count, routed, sets) for layer in layers]
            left_s = started + budget_s - time.perf_counter()
            samples.append(_medians(calls, left_s / (len(tokens) - done)))
    curves = [_never_falls([s / routed for s in column]) for column in zip(*samples, strict=True)]
    return TimeTable(
        kernel=path.name,
        hidden=experts.hidden,
        width=experts.width,
        tokens=tuple(tokens),
        rows_s=curves[0],
        columns_s=curves[1] if len(curves) > 1 else None,
    )


@contextmanager
def _layers(
    pool: ExpertPool, experts: Experts, activations: Activations
) -> Iterator[list[ExpertLayer]]:
    """The experts as a layer of the pool, and once more by columns where that is possible."""
    layers = [pool.add_layer(experts, activations=activations)]
    try:
        if may_use_columns(layers[0].path, experts.hidden, experts.width):
            layers.append(pool.add_layer(experts, activations=activations, columns_from=1))
        yield layers
    finally:
        for layer in layers:
            pool.remove_layer(layer)


def _layer_call(
    pool: ExpertPool, layer: ExpertLayer, num_tokens: int, routed: int, sets: Iterator[int]
) -> Callable[[], None]:
    x_TH = aligned_floats(num_tokens * layer.experts.hidden).reshape(num_tokens, -1)
    x_TH[:] = np.random.default_rng(num_tokens).standard_normal(x_TH.shape, np.float32)
    weights_TS = np.full((num_tokens, routed), 1 / routed, np.float32)
    out_TH = np.empty_like(x_TH)

    def call() -> None:
        first = next(sets)
        ids = np.arange(first, first + routed, dtype=np.int32)
        pool.submit(layer, x_TH, np.tile(ids, (num_tokens, 1)), weights_TS, out_TH)
        pool.wait()

    return call


def _medians(calls: list[Callable[[], None]], budget_s: float) -> tuple[float, ...]:
    """The median seconds of each call, taken in turn."""
    end = time.perf_counter() + budget_s
    for call in calls:
        call()  # scratch grows
    times: list[list[float]] = [[] for _ in calls]
    for n in range(ROUNDS):
        if n and time.perf_counter() > end:
            break
        for call, seconds in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return tuple(map(statistics.median, times))


def _on_line(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    if x <= xs[0] or len(xs) == 1:
        return ys[0] * max(1.0, x / xs[0])
    n = min(bisect_right(xs, x), len(xs) - 1)
    slope = (ys[n] - ys[n - 1]) / (xs[n] - xs[n - 1])
    if x >= xs[n]:
        return ys[n] + slope * (x - xs[n])
    return min(ys[n - 1] + slope * (x - xs[n - 1]), ys[n])  # rounding must not pass the next point


def _ascends(values: Sequence[Any], *, strictly: bool) -> bool:
    return all(a < b or (a == b and not strictly) for a, b in itertools.pairwise(values))


def _never_falls(seconds: Sequence[float]) -> tuple[float, ...]:
    """The least that as many tokens or more took.

    Noise only adds time and more tokens cannot cost less, so where they seem to, it is the fewer
    that were disturbed: 12, 7, 8, 13 us are 7, 7, 8, 13.
    """
    return tuple(itertools.accumulate(reversed(seconds), min))[::-1]
