"""The device's part of one layer for many tokens: its kernels, and the copies between them.

Experts are numbered through in the order in which they are computed: residents first, then banks of
the ring as they arrive. One grouping of the pairs serves them all, and a token's choices are added
up once, at the end, in their order.

Shapes: T tokens, K top-k, E experts, C a layer's cold experts (rows on the host), H hidden, I
expert width, P = T * K pairs.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gpu_kernels.expert_config import prefill_config
from gpu_kernels.expert_grouping import Grouping, group_pairs
from gpu_kernels.expert_weights import ExpertLayer
from gpu_kernels.grouped_gemm import GroupedWorkspace, grouped_experts, grouped_products
from gpu_kernels.host_memory import read_host
from gpu_kernels.sum_choices import sum_choices_of_tokens
from offload.expert_stream import ExpertStream
from offload.layer_experts import LayerExperts
from offload.slot_weights import resident_layer


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A layer's experts by where they lie; experts change places between steps only."""

    layer: int
    at: LayerExperts
    residents: ExpertLayer | None
    cold_C: np.ndarray  # the expert of each row, as it is now
    pool_layer: Any  # None: nothing is cold
    shares_E: np.ndarray  # how often each expert is expected to be chosen
    place_E: torch.Tensor | None  # the residents' slots on the device where nothing else is

    @classmethod
    def of(
        cls,
        layer: int,
        at: LayerExperts,
        pool_layer: Any,
        shares_E: np.ndarray,
        device: torch.device,
    ) -> "LayerParts":
        residents = resident_layer(at) if len(at.gpu_w13_SFH) else None
        place_E = torch.from_numpy(at.slot_E).to(device) if pool_layer is None else None
        return cls(layer, at, residents, at.expert_C, pool_layer, shares_E, place_E)

    def popular_rows(self, count: int) -> list[int]:
        """That many rows that are expected to be used most, ascending."""
        by_share_C = np.argsort(-self.shares_E[self.cold_C], kind="stable")
        return sorted(by_share_C[:count].tolist())

    @property
    def num_slots(self) -> int:
        """Of the residents, and one that is free where experts may change places."""
        return 0 if self.residents is None else self.residents.num_slots


@dataclass(frozen=True, slots=True)
class Sent:
    """A bank of the ring that was asked for, and the rows in it."""

    bank: int
    rows: Sequence[int]


class DeviceSide:
    """What all layers share on the device: the ring, if there is room for one, and scratch."""

    def __init__(
        self,
        stream: ExpertStream | None,
        *,
        num_experts: int,
        hidden_size: int,
        expert_size: int,
        num_pairs: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``dtype`` is that of the hidden states, ``num_pairs`` the most of a step."""
        self.stream = stream
        self.num_experts, self.dtype = num_experts, dtype
        self.workspace = GroupedWorkspace(
            torch.empty((num_pairs, expert_size), dtype=dtype, device=device),
            torch.empty((num_pairs, hidden_size), dtype=dtype, device=device),
        )
        # a table of the host's, read by a kernel: a copy would wait behind those of weights
        is_gpu = device.type == "cuda"
        self._host_place_E = torch.empty(num_experts, dtype=torch.int32, pin_memory=is_gpu)
        self._place_E = torch.empty(num_experts, dtype=torch.int32, device=device)

    def residents(
        self,
        parts: LayerParts,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """All of a layer's experts where nothing is cold, float32; the host waits for nothing."""
        assert parts.residents is not None and parts.place_E is not None
        return grouped_experts(
            *(x_TH, ids_TK, weights_TK, parts.place_E, parts.residents),
            workspace=self.workspace,
            config=prefill_config(parts.residents, ids_TK.numel(), self.dtype),
        )

    def upload(self, place_E: np.ndarray) -> torch.Tensor:
        """The table on the device; the one before must have been read (see the module's user)."""
        self._host_place_E.numpy()[:] = place_E
        return read_host(self._host_place_E, self._place_E)


@dataclass(slots=True)
class LayerWork:
    """One layer of one step. ``sent`` are its banks that were asked for before its routing.

    ``own_rows`` are sent too, then ``next_rows`` of ``next_layer``; those end up in ``ahead``.
    """

    side: DeviceSide
    parts: LayerParts
    counts_E: np.ndarray  # tokens of each expert
    sent: deque[Sent]
    own_rows: Sequence[int]
    next_layer: int | None
    next_rows: Sequence[int]
    ahead: deque[Sent] = field(default_factory=deque)
    _own: deque[list[int]] = field(init=False)
    _next: deque[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        size = 1 if self.side.stream is None else self.side.stream.bank_size
        self._own, self._next = (
            deque(list(rows[a : a + size]) for a in range(0, len(rows), size))
            for rows in (self.own_rows, self.next_rows)
        )

    def send(self) -> None:
        """Ask for copies until the ring is full: this layer's first."""
        stream = self.side.stream
        while stream is not None and stream.has_room and self._own:
            rows = self._own.popleft()
            self.sent.append(Sent(stream.send(self.parts.layer, rows), rows))
        while stream is not None and stream.has_room and self._next:
            assert self.next_layer is not None
            rows = self._next.popleft()
            self.ahead.append(Sent(stream.send(self.next_layer, rows), rows))

    def compute(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Give the device its kernels and the ring its banks; the device's part, float32."""
        stream, num_slots = self.side.stream, self.parts.num_slots
        place_E = self.side.upload(self._places())
        groups = group_pairs(ids_TK, place_E, num_slots + len(self.parts.cold_C))
        counts_C = self.counts_E[self.parts.cold_C].tolist()  # a bank's are few for numpy
        if self.parts.residents is not None:
            hot_pairs = int(self.counts_E.sum()) - sum(counts_C)
            self._products(x_TH, ids_TK, groups, self.parts.residents, 0, num_slots, hot_pairs)
        first = num_slots
        while self.sent:
            assert stream is not None
            item = self.sent.popleft()
            count, pairs = len(item.rows), sum([counts_C[row] for row in item.rows])
            bank = stream.arrive(item.bank)
            self._products(x_TH, ids_TK, groups, bank, first, count, pairs)
            stream.release(item.bank)
            first += count
            self.send()
        assert not self._own and not self._next, "more was to be sent ahead than the ring holds"
        out_TH = torch.empty(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        sum_choices_of_tokens(self.side.workspace.part_PH, ids_TK, weights_TK, place_E, out_TH)
        return out_TH

    def _places(self) -> np.ndarray:
        """Each expert's number among those of the device, -1 for the others."""
        place_E = self.parts.at.slot_E.copy()
        rows = [r for item in self.sent for r in item.rows] + [
            r for some in self._own for r in some
        ]
        first = self.parts.num_slots
        place_E[self.parts.cold_C[rows]] = np.arange(first, first + len(rows), dtype=np.int32)
        return place_E

    def _products(
        self,
        x_TH: torch.Tensor,
        ids_TK: torch.Tensor,
        groups: Grouping,
        experts: ExpertLayer,
        first: int,
        count: int,
        num_pairs: int,
    ) -> None:
        if num_pairs == 0:
            return
        # tiles for the step's average expert, so that few kinds are compiled
        pairs_each = ids_TK.numel() / self.side.num_experts
        config = prefill_config(experts, round(pairs_each * experts.num_slots), self.side.dtype)
        grouped_products(
            *(x_TH, ids_TK, groups, experts, self.side.workspace),
            config=config,
            first_slot=first,
            num_slots=count,
            max_pairs=num_pairs,
        )
