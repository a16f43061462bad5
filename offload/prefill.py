"""Routed experts for many tokens: residents, experts that pass through, and the CPU.

The device computes the residents and the cold experts that the link brings; the CPU computes some
cold experts meanwhile (:mod:`offload.prefill_split`), and what it sums up is added last.

Ordering: ``launch`` writes the routing to the host and waits for it, once a layer; so everything
that earlier layers have read of host buffers is done by then. Next it asks for copies, as many as
the ring has room for, starts the pool, and gives the device its kernels; after each bank's kernels
the bank goes back to the ring and the next copy is asked for: first the rest of this layer's, then
some of the next layer's, before its router has run. ``result`` waits for the pool and lets a kernel
add what it has written, straight from pinned memory. The next ``launch`` waits for its routing,
which comes later in the same stream, before it overwrites anything. An abandoned step leaves
banks in no one's hands; ``begin_step`` takes the ring back before anything else is asked for.
Nothing is sent ahead from one step to the next: the copies of a step's tokens and positions would
wait behind it, and the next step may decode.

Shapes: T tokens, K top-k, E experts, C a layer's cold experts (rows on the host), H hidden.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
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
from offload.prefill_costs import PrefillCosts, measure_costs, prefill_activations
from offload.prefill_layer import DeviceSide, LayerParts, LayerWork, Sent
from offload.prefill_split import LinkClock, cpu_share, rows_ahead

LINK_BYTES_PER_S = 50e9  # of hidden states, to the host and back
CPU_START_S = 5e-4  # Python around a layer of the pool, when experts are handed over


class PrefillExperts:
    """The prompt's way through the experts of ``store``, one layer at a time.

    ``stream`` None: there is no room for a ring, and the CPU computes every cold expert. ``costs``
    may be None where nothing is cold.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: ExpertPool,
        stream: ExpertStream | None,
        costs: PrefillCosts | None,
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
        self._num_experts, self._hidden, self._top_k = shape.num_experts, shape.hidden_size, top_k
        self._host = HostBuffers(max_tokens, shape.hidden_size, top_k, pin=device.type == "cuda")
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
        self._layers: dict[int, LayerParts] = {}
        for layer in self._store.shape.moe_layers:
            experts, pool_layer = self._store[layer].cpu_experts, None
            if experts is not None:
                assert self._costs is not None
                pool_layer = pool.add_layer(
                    experts,
                    activations=self._activations,
                    place_of=self._store[layer].row_E,
                    hand_over=self._costs.hand_over,
                )
            self._layers[layer] = LayerParts.of(layer, self._store[layer], pool_layer)

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
        self._clock = LinkClock()
        transfers_s = 2 * 4 * num_tokens * self._hidden / LINK_BYTES_PER_S
        self._cpu_start_s = CPU_START_S + transfers_s
        self._tokens_each = num_tokens * self._top_k / self._num_experts

    def launch(
        self,
        layer: int,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        on_routing: Callable[[np.ndarray], None],
    ) -> "PendingPrefill":
        """Start one layer on both sides; ``on_routing`` is given the expert ids on the host."""
        assert x_TH.dtype == self._side.dtype
        parts = self._layers[layer]
        ids_TK, weights_TK = ids_TK.int().contiguous(), weights_TK.contiguous()
        rows = self._host.rows(len(x_TH))
        write_host(ids_TK, rows.ids_TK)
        self._wait_for_stream()
        on_routing(rows.arrays[1])
        counts_E = np.bincount(rows.arrays[1].ravel(), minlength=self._num_experts)
        cpu_rows, work = self._divide(parts, counts_E)
        if cpu_rows:
            write_host(x_TH.contiguous(), rows.x_TH)
            write_host(weights_TK, rows.weights_TK)
        work.send()
        if cpu_rows:
            self._start_pool(parts, cpu_rows, rows)
        hot_TH = work.compute(x_TH, ids_TK, weights_TK)
        return PendingPrefill(self._pool, hot_TH, rows.out_TH if cpu_rows else None)

    def clear(self) -> None:
        """Let the pool forget the layers, and give back the ring once no copy is under way."""
        if self._written is not None:
            torch.cuda.synchronize()
        for parts in self._layers.values():
            if parts.pool_layer is not None:
                self._pool.remove_layer(parts.pool_layer)
        self._layers.clear()
        self._side.stream = None

    def _divide(self, parts: LayerParts, counts_E: np.ndarray) -> tuple[list[int], LayerWork]:
        """The CPU's rows, and the device's work; what is under way already is the device's."""
        counts_C = counts_E[parts.cold_C]
        under_way = {row for item in self._ahead for row in item.rows}
        rest = [r for r in range(len(counts_C)) if counts_C[r] > 0 and r not in under_way]
        next_layer = self._next.get(parts.layer)
        num_next = 0 if next_layer is None else self._rows_ahead(next_layer)
        cpu_rows = self._cpu_rows(rest, [int(counts_C[r]) for r in rest], num_next)
        on_cpu = set(cpu_rows)
        work = LayerWork(
            self._side,
            parts,
            counts_E,
            self._ahead,
            [r for r in rest if r not in on_cpu],
            next_layer,
            range(num_next),
        )
        self._ahead = work.ahead
        return cpu_rows, work

    def _cpu_rows(self, rest: list[int], counts: list[int], num_next: int) -> list[int]:
        """Those of ``rest`` that the CPU takes, while ``num_next`` copies follow them."""
        costs = self._costs
        if self._side.stream is None or costs is None:
            return rest
        ahead_s = num_next * costs.copy_s
        chosen = cpu_share(
            counts,
            costs.expert_s,
            copy_s=costs.copy_s,
            queued_s=self._clock.backlog_s + ahead_s,
            start_s=self._cpu_start_s,
        )
        cpu_s = sum(costs.expert_s(counts[n]) for n in chosen)
        self._clock.pass_layer(
            own_s=(len(rest) - len(chosen)) * costs.copy_s,
            ahead_s=ahead_s,
            cpu_s=cpu_s + self._cpu_start_s if chosen else 0.0,
        )
        return [rest[n] for n in chosen]

    def _rows_ahead(self, layer: int) -> int:
        stream, costs = self._side.stream, self._costs
        if stream is None or costs is None:
            return 0
        return rows_ahead(
            self._tokens_each,
            len(self._layers[layer].cold_C),
            stream.num_slots,
            costs.expert_s,
            copy_s=costs.copy_s,
            start_s=self._cpu_start_s,
        )

    def _start_pool(self, parts: LayerParts, cpu_rows: Sequence[int], rows: HostRows) -> None:
        """Once its input has come; choices that are not the CPU's are taken out of its ids."""
        self._wait_for_stream()
        is_others_E = np.ones(self._num_experts, dtype=bool)
        is_others_E[parts.cold_C[cpu_rows]] = False
        x, ids, weights, out = rows.arrays
        ids[is_others_E[ids]] = -1
        self._pool.submit(parts.pool_layer, x, ids, weights, out)

    def _wait_for_stream(self) -> None:
        if self._written is not None:
            self._written.record()
            self._written.synchronize()


def make_prefill(
    store: ExpertStore,
    pool: ExpertPool,
    *,
    num_slots: int,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    top_k: int,
) -> PrefillExperts:
    """For a GPU: a ring of ``num_slots``, and both sides' times, which takes about a second."""
    activations = prefill_activations(dtype, store.dtype)
    stream = ExpertStream(store, num_slots, device) if num_slots > 0 else None
    layer = max(store.shape.moe_layers, key=lambda index: len(store[index].cpu_w13_CFH))
    experts, costs = store[layer].cpu_experts, None
    if experts is not None:
        copy_s = stream.seconds_per_expert(layer) if stream is not None else math.inf
        costs = measure_costs(pool, experts, activations, copy_s=copy_s)
    return PrefillExperts(
        *(store, pool, stream, costs),
        device=device,
        dtype=dtype,
        activations=activations,
        max_tokens=max_tokens,
        top_k=top_k,
    )


@dataclass(frozen=True, slots=True)
class PendingPrefill:
    """One layer under way; ``result`` must be called once, before the next launch."""

    _pool: ExpertPool
    _hot_TH: torch.Tensor
    _host_out_TH: torch.Tensor | None  # where the pool writes; None: it has nothing to do

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The result as the one part that there is."""
        return (self.result(),)

    def result(self) -> torch.Tensor:
        """Return the float32 sum ``[T, H]`` of both sides."""
        if self._host_out_TH is None:
            return self._hot_TH
        self._pool.wait()
        return read_host(self._host_out_TH, self._hot_TH, add=self._hot_TH)
