"""Turns a schedule into one forward pass: copies pages, builds the batch, calls the decoder.

A pass is started and collected. One that decodes on the device may be under way in between, and the
next one be started behind it; others are complete when they have been started.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fiddler.engine.scheduler import Chunk, Schedule
from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig
from fiddler.models.decoder import Decoder
from fiddler.models.kv_cache import new_kv_caches
from gpu_kernels.page_table import PageTable

if TYPE_CHECKING:
    from fiddler.engine.decode_steps import DecodeSteps, UnderWay

# The expert ids ``[L, T, K]`` of a step's tokens, for benchmarks that do not ask the routers.
DrawExperts = Callable[[tuple[Chunk, ...]], np.ndarray]


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A step's final hidden states ``[T, H]``, good until the next step starts.

    A step that decodes on the device brings its float32 logits ``[T, V]`` too, and the tokens that
    it has drawn from them as they are (-1: the row holds NaN or nothing finite).
    """

    hidden_TH: torch.Tensor
    logits_TV: torch.Tensor | None = None
    drawn_ids: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A pass, for :meth:`Runner.collect`: one that is under way, or what has come of it."""

    schedule: Schedule
    found: "UnderWay | Forwarded"


class Runner:
    """Owns the KV cache, one :class:`LayerKV` per layer; ``kv_dtype`` is what it stores.

    Steps in which every request decodes go through ``decode_steps``, if there are any and the step
    fits them. ``draw_experts`` may be set between steps; None leaves the choice to the routers.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int,
        page_size: int,
        device: torch.device,
        kv_dtype: str,
        renew_failed_workers: Callable[[], None],
    ) -> None:
        self.decoder = decoder
        self.draw_experts: DrawExperts | None = None
        self._page_size = page_size
        self._device = device
        self._renew_failed_workers = renew_failed_workers
        shape = kv_cache_shape(decoder.config, num_pages, page_size)
        self.kv_caches = new_kv_caches(decoder.config.num_layers, shape, kv_dtype, device)
        self.decode_steps: DecodeSteps | None = None

    def start(self, schedule: Schedule) -> Started:
        """Run all chunks, in batch order, while nothing is under way."""
        for source, target in schedule.page_copies:
            for kv_cache in self.kv_caches:
                kv_cache.copy_page(source, target)
        drawn_LTK = self.draw_experts(schedule.chunks) if self.draw_experts else None
        if self.decode_steps is not None and not schedule.prefills:
            bucket = self.decode_steps.bucket(schedule.decodes, drawn_LTK is not None)
            if bucket is not None:
                step = self.decode_steps.start(schedule.decodes, bucket, drawn_LTK)
                return Started(schedule, step)
        if self.decode_steps is not None:
            self.decode_steps.settle()
        batch = build_batch(
            schedule.chunks,
            len(schedule.decodes),
            self._page_size,
            self._device,
            drawn_LTK,
        )
        return Started(schedule, Forwarded(self.decoder.forward(batch, self.kv_caches)))

    def may_follow(self, started: Started, schedule: Schedule) -> bool:
        """Whether ``schedule``, the next tokens of all, may be started before ``started`` ends."""
        steps, step = self.decode_steps, started.found
        return (
            steps is not None
            and not isinstance(step, Forwarded)
            and steps.may_follow(step, schedule.decodes)
        )

    def start_next(self, started: Started, schedule: Schedule) -> Started:
        """Run ``schedule`` behind ``started``, which it may follow; its tokens are drawn there."""
        assert self.decode_steps is not None and not isinstance(started.found, Forwarded)
        drawn_LTK = self.draw_experts(schedule.chunks) if self.draw_experts else None
        step = self.decode_steps.start_next(started.found, schedule.decodes, drawn_LTK)
        return Started(schedule, step)

    def collect(self, started: Started) -> Forwarded:
        """Wait for what was started first of all that is under way."""
        if isinstance(started.found, Forwarded):
            return started.found
        assert self.decode_steps is not None
        decoded = self.decode_steps.collect(started.found)
        return Forwarded(decoded.hidden_RH, decoded.logits_RV, decoded.drawn_ids)

    def abandon(self) -> None:
        """Wait until nothing is under way. Workers that have failed are replaced."""
        if self.decode_steps is not None:
            self.decode_steps.abandon()  # which replaces them itself: its buffers are theirs
        self._renew_failed_workers()

    def clear(self) -> None:
        """Drop the cache's memory, and what decodes with it."""
        self.decode_steps = None
        self.kv_caches.clear()


def kv_cache_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    """Shape of one layer's pages, in numbers."""
    return (num_pages, 2, page_size, config.num_kv_heads, config.head_dim)


def build_batch(
    chunks: tuple[Chunk, ...],
    num_decodes: int,
    page_size: int,
    device: torch.device,
    drawn_LTK: np.ndarray | None = None,
) -> StepBatch:
    """Lay the chunks side by side; one host-to-device copy per array."""
    tokens, positions, slots, indices, last_page_len = [], [], [], [], []
    for chunk in chunks:
        position_T = np.arange(chunk.start, chunk.end)
        page_P = np.asarray(chunk.request.pages[: -(-chunk.end // page_size)], dtype=np.int32)
        tokens.append(np.asarray(chunk.request.tokens[chunk.start : chunk.end]))
        positions.append(position_T)
        slots.append(
            page_P[position_T // page_size].astype(np.int64) * page_size + position_T % page_size
        )
        indices.append(page_P)
        last_page_len.append((chunk.end - 1) % page_size + 1)
    qo_lens = [chunk.num_tokens for chunk in chunks]

    def to_device(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    qo_indptr = np.cumsum([0, *qo_lens])
    return StepBatch(
        tokens_T=to_device(np.concatenate(tokens), torch.int64),
        positions_T=to_device(np.concatenate(positions), torch.int64),
        slots_T=to_device(np.concatenate(slots), torch.int64),
        pages=PageTable(
            indptr_B1=to_device(np.cumsum([0, *map(len, indices)]), torch.int32),
            indices=to_device(np.concatenate(indices), torch.int32),
            last_page_len_B=to_device(np.asarray(last_page_len), torch.int32),
            page_size=page_size,
        ),
        qo_indptr_B1=to_device(qo_indptr, torch.int32),
        qo_lens=tuple(qo_lens),
        kv_lens=tuple(chunk.end for chunk in chunks),
        num_decodes=num_decodes,
        # widened there: two bytes a choice on their way, and no new memory here
        drawn_LTK=None if drawn_LTK is None else torch.as_tensor(drawn_LTK).to(device).int(),
    )
