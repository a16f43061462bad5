"""The device's part of one layer for steps that :mod:`offload.prefill` does not take.

Without a GPU torch plays the device, one expert after the other.

Shapes: T tokens, K top-k, H hidden, E experts, F = 2I, I expert width, P (token, expert) pairs, M
tokens of one expert.
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from offload.expert_store import ExpertStore


class Residents(Protocol):
    """The experts of a store that have a slot."""

    def products(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The float32 sum ``[T, H]`` over the choices that have a slot; at least one has."""

    def clear(self) -> None:
        """Let go of the slots."""


def residents_of(store: ExpertStore, device: torch.device) -> Residents:
    """Those of ``store``, computed on ``device``, which holds its slots."""
    if device.type != "cuda":
        return TorchResidents(store)
    from offload.kernel_residents import KernelResidents  # triton wants a GPU

    return KernelResidents(store, device)


class TorchResidents:
    """On the CPU."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store

    def products(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """Each expert over all its tokens; the order of sums is that of the slots."""
        experts = self._store[layer]
        slot_P = experts.slot_E[ids_TK.numpy().ravel()]
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32)
        for slot in np.unique(slot_P[slot_P >= 0]):
            pair_M = torch.from_numpy(np.flatnonzero(slot_P == slot))
            token_M = pair_M // ids_TK.shape[1]  # distinct ones
            y_MH = _gated_mlp(x_TH.index_select(0, token_M), *experts.gpu_weights(slot))
            out_TH.index_add_(0, token_M, y_MH * weights_TK.flatten()[pair_M].unsqueeze(1))
        return out_TH

    def clear(self) -> None:
        """Nothing is kept."""


def _gated_mlp(x_MH: torch.Tensor, w13_FH: torch.Tensor, w2_HI: torch.Tensor) -> torch.Tensor:
    gate_MI, up_MI = F.linear(x_MH, w13_FH.to(x_MH.dtype)).chunk(2, dim=-1)
    return F.linear(F.silu(gate_MI) * up_MI, w2_HI.to(x_MH.dtype))
