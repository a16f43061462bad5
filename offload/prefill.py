"""Routed experts for many tokens: residents, experts that pass through, and the CPU.

The device computes the residents and the cold experts that the link brings; the CPU computes some
cold experts meanwhile (:mod:`offload.prefill_division`), and what it sums up is added last.

Layers without cold experts need none of this: ``residents`` puts them on the stream, and the host
goes on.

Ordering: ``launch`` writes the routing to the host and waits for it, once a layer; so everything
that earlier layers have read of host buffers is done by then. Next it writes the CPU's input there,
asks for copies, as many as the ring has room for, starts the pool once its input has come (an event
says so), and gives the device its kernels; after each bank's kernels the bank goes back to the ring
and the next copy is asked for: first the rest of this layer's, then some of the next layer's, those
that are expected to be used most, before its router has run. ``result`` waits for the pool and lets
a kernel add what it has written, straight from pinned memory. The next ``launch`` waits for its
routing, which comes later in the same stream, before it overwrites anything. An abandoned step
leaves banks in no one's hands; ``begin_step`` takes the ring back before anything else is asked
for. Nothing is sent ahead from one step to the next: the copies of a step's tokens and positions
would wait behind it, and the next step may decode.

Shapes: T tokens, K top-k, E experts, C a layer's cold experts (rows on the host), H hidden.
"""

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.kernel_paths import Activations
from gpu_kernels.host_memory import read_host, write_host
from offload.expert_store import ExpertStore
from offload.expert_stream import ExpertStream
from offload.host_buffers import HostBuffers, HostRows
from offload.popularity import Popularity
from offload.prefill_division import Division, PrefillCosts
from offload.prefill_layer import DeviceSide, LayerParts, LayerWork, Sent
from offload.prefill_record import StepRecord
from offload.worker_errors import workers_errors


class PrefillExperts:
    """The prompt's way through the experts of ``store``, one layer at a time.

    ``stream`` None: there is no room for a ring, and the CPU computes every cold expert. ``costs``
    are those of each layer with cold experts: layers may differ in their experts' size and kind.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: ExpertPool,
        stream: ExpertStream | None,
        costs: Mapping[int, PrefillCosts],
        popularity: Popularity,
        *,
        device: torch.device,
        dtype: torch.dtype,
        activations: Activations,
        max_tokens: int,
        top_k: int,
    ) -> None:
        """``dtype`` is that of the hidden states; ``activations`` what the CPU rounds them to."""
        shape = store.shape
        self._store, self._costs, self._activations = store, costs, activations
        self._shares_LE = popularity.shares()
        self._num_experts, self._hidden, self._top_k = shape.num_experts, shape.hidden_size, top_k
        self._max_tokens, self._device = max_tokens, device
        self._written = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._side = DeviceSide(
            stream,
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            expert_size=shape.expert_size,
            num_pairs=max_tokens * top_k,
            dtype=dtype,
            device=device,
        )
        self.use_pool(pool)
        self._next = dict(itertools.pairwise(shape.moe_layers))
        self.begin_step(0)

    def use_pool(self, pool: ExpertPool) -> None:
        """Go on with ``pool``, between steps; one used before keeps what it has."""
        self._pool = pool
        is_gpu = self._device.type == "cuda"  # its own: workers of the last one may be late
        self._host = HostBuffers(self._max_tokens, self._hidden, self._top_k, pin=is_gpu)
        self._layers: dict[int, LayerParts] = {}
        for layer in self._store.shape.moe_layers:
            experts, pool_layer = self._store[layer].cpu_experts, None
            if experts is not None:
                pool_layer = pool.add_layer(
                    experts,
                    activations=self._activations,
                    place_of=self._store[layer].row_E,
                    columns_from=self._costs[layer].columns_from,
                )
            self._layers[layer] = LayerParts.of(
                layer, self._store[layer], pool_layer, self._shares_LE[layer], self._device
            )

    @property
    def pool_layers(self) -> dict[int, Any]:
        """The pool's layers, by number; those that have cold experts."""
        return {
            layer: parts.pool_layer
            for layer, parts in self._layers.items()
            if parts.pool_layer is not None
        }

    def begin_step(self, num_tokens: int) -> None:
        """Prepare for a step of ``num_tokens``; what an abandoned one has left is forgotten."""
        if self._side.stream is not None:
            self._side.stream.reset()
        self._ahead: deque[Sent] = deque()  # banks that hold rows of the layer to come
        self._divisions = self._divide_step(num_tokens)
        self.record = StepRecord(num_tokens)

    def launch(
        self,
        layer: int,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        on_routing: Callable[[np.ndarray, np.ndarray], None],
    ) -> "PendingPrefill":
        """Start one layer on both sides.

        ``on_routing`` is given the expert ids on the host, and how often they have each expert.
        """
        assert x_TH.dtype == self._side.dtype
        assert self._side.stream is None or self._side.stream.is_current, "not the step's stream"
        parts = self._layers[layer]
        ids_TK, weights_TK = ids_TK.int().contiguous(), weights_TK.contiguous()
        rows = self._host.rows(len(x_TH))
        write_host(ids_TK, rows.ids_TK)
        self._mark_written()
        self._wait_until_written()
        counts_E = np.bincount(rows.arrays[1].ravel(), minlength=self._num_experts)
        cpu_rows, work = self._divide(parts, counts_E)
        if cpu_rows:
            write_host(x_TH.contiguous(), rows.x_TH)
            write_host(weights_TK, rows.weights_TK)
            self._mark_written()
        work.send()
        # now that the link works, but before the pool is given other ids in their place
        on_routing(rows.arrays[1], counts_E)
        if cpu_rows:
            self._start_pool(parts, cpu_rows, rows)
        hot_TH = work.compute(x_TH, ids_TK, weights_TK)
        return PendingPrefill(self._pool, self.record, hot_TH, rows.out_TH if cpu_rows else None)

    def has_only_residents(self, layer: int) -> bool:
        """Whether the layer asks nothing of the host: nothing of it is cold, or of the next one."""
        near = [layer, self._next.get(layer, layer)]
        return all(self._layers[one].pool_layer is None for one in near)

    def residents(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Such a layer on the device, float32; ``ids_TK`` int32."""
        return self._side.residents(self._layers[layer], x_TH, ids_TK, weights_TK.contiguous())

    def clear(self) -> None:
        """Let the pool forget the layers, and give back the ring once no copy is under way."""
        if self._written is not None:
            torch.cuda.synchronize()
        for parts in self._layers.values():
            if parts.pool_layer is not None:
                self._pool.remove_layer(parts.pool_layer)
        self._layers.clear()
        self._side.stream = None

    def _divide_step(self, num_tokens: int) -> dict[int, Division]:
        """Of layers with cold experts; none if there is no ring and the CPU takes all of them."""
        stream = self._side.stream
        if stream is None:
            return {}
        return {
            layer: Division(
                costs=costs,
                num_slots=stream.num_slots,
                tokens_each=num_tokens * self._top_k / self._num_experts,
                state_bytes=4 * num_tokens * self._hidden,
            )
            for layer, costs in self._costs.items()
        }

    def _divide(self, parts: LayerParts, counts_E: np.ndarray) -> tuple[list[int], LayerWork]:
        """The CPU's rows, and the device's work; what is under way already is the device's."""
        counts_C = counts_E[parts.cold_C].tolist()
        under_way = {row for item in self._ahead for row in item.rows}
        rest = [r for r, count in enumerate(counts_C) if count > 0 and r not in under_way]
        next_layer = self._next.get(parts.layer)
        next_rows: list[int] = []
        ahead_s = 0.0
        if next_layer is not None and next_layer in self._divisions:
            after, division = self._layers[next_layer], self._divisions[next_layer]
            next_rows = after.popular_rows(division.rows_ahead(len(after.cold_C)))
            ahead_s = len(next_rows) * division.costs.copy_s
        counts = [counts_C[r] for r in rest]
        cpu_rows = self._cpu_rows(parts.layer, rest, counts, len(next_rows), ahead_s)
        on_cpu = set(cpu_rows)
        work = LayerWork(
            self._side,
            parts,
            counts_E,
            self._ahead,
            [r for r in rest if r not in on_cpu],
            next_layer,
            next_rows,
        )
        self._ahead = work.ahead
        return cpu_rows, work

    def _cpu_rows(
        self, layer: int, rest: list[int], counts: list[int], num_next: int, ahead_s: float
    ) -> list[int]:
        """Those of ``rest`` that the CPU takes; ``num_next`` copies follow, for ``ahead_s``."""
        division = self._divisions.get(layer)
        if division is None:  # no ring, or nothing of the layer is cold
            self.record.add_split(0, 0.0, num_next, ahead_s)
            return rest
        costs, chosen = division.costs, division.cpu_share(counts, num_next, ahead_s)
        cpu_s = sum(costs.expert_s(counts[n]) for n in chosen)
        num_sent = len(rest) - len(chosen)
        link_s = num_sent * costs.copy_s + ahead_s
        self.record.add_split(len(chosen), cpu_s, num_sent + num_next, link_s)
        return [rest[n] for n in chosen]

    def _start_pool(self, parts: LayerParts, cpu_rows: Sequence[int], rows: HostRows) -> None:
        """Once its input has come; choices that are not the CPU's are taken out of its ids."""
        self._wait_until_written()
        is_others_E = np.ones(self._num_experts, dtype=bool)
        is_others_E[parts.cold_C[cpu_rows]] = False
        x, ids, weights, out = rows.arrays
        ids[is_others_E[ids]] = -1
        with workers_errors():
            self._pool.submit(parts.pool_layer, x, ids, weights, out)

    def _mark_written(self) -> None:
        if self._written is not None:
            # with a device: without one torch asks the environment first
            self._written.record(torch.cuda.current_stream(self._device))

    def _wait_until_written(self) -> None:
        """Until the stream has done what came before the last mark."""
        if self._written is not None:
            self._written.synchronize()


@dataclass(frozen=True, slots=True)
class PendingPrefill:
    """One layer under way; ``result`` must be called once, before the next launch."""

    _pool: ExpertPool
    _record: StepRecord
    _hot_TH: torch.Tensor
    _host_out_TH: torch.Tensor | None  # where the pool writes; None: it has nothing to do

    late = None

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The result as the one part that there is."""
        return (self.result(),)

    def result(self) -> torch.Tensor:
        """Return the float32 sum ``[T, H]`` of both sides."""
        if self._host_out_TH is None:
            return self._hot_TH
        began = time.perf_counter()
        with workers_errors():
            self._pool.wait()
        self._record.cpu_wait_s += time.perf_counter() - began
        return read_host(self._host_out_TH, self._hot_TH, add=self._hot_TH)
