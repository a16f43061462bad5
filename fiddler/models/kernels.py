"""The seam between the decoder and the device: what a set of kernels must offer.

Shapes: T tokens, V vocabulary, H hidden, I FFN width, N query heads, M key/value heads, D head
dim, E experts, K top-k.
"""

from typing import Protocol

import torch

from fiddler.models.batch import StepBatch
from fiddler.models.kv_cache import LayerKV
from gpu_kernels.host_words import Bell


class DeviceKernels(Protocol):
    """Everything the decoder runs besides the head, gates and routed experts."""

    def embedding(self, tokens_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        """Rows ``[T, H]`` of a table on the device, or in host memory that it reads."""
        ...

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        """RMSNorm of each row, with the model's epsilon."""
        ...

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(rms_norm(sum), sum)`` with sum = residual + x."""
        ...

    def add_parts(
        self,
        residual_TH: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        shared_TH: torch.Tensor | None,
        weight_H: torch.Tensor,
        late: Bell | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(rms_norm(sum), sum)`` with sum = residual + (parts + shared).

        The float32 ``parts`` and ``shared_TH`` are added in this order in float32; that sum is
        rounded to the residual's dtype. ``late``: what to wait for before the last part is read.
        """
        ...

    def norm_route(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        norm_H: torch.Tensor,
        router_EH: torch.Tensor,
        top_k: int,
        *,
        renormalise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """:meth:`add_rms_norm`'s two, then each token's expert ids ``[T, K]`` and weights.

        Weights are float32: the largest of a softmax of the router's logits, which are rounded to
        x's dtype, divided by their sum if ``renormalise``.
        """
        ...

    def linear(
        self, x_TK: torch.Tensor, weight_FK: torch.Tensor, bias_F: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``x @ weight.T + bias``, as torch's."""
        ...

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """``silu(first half) * second half`` along the last axis."""
        ...

    def plan(self, batch: StepBatch) -> None:
        """Prepare what all layers of one step share."""
        ...

    def attention(
        self,
        q_TND: torch.Tensor,
        k_TMD: torch.Tensor,
        v_TMD: torch.Tensor,
        kv_cache: LayerKV,
        *,
        window: int | None,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Norm and rotate q and k, append k and v to the cache, attend. Returns ``[T, N, D]``.

        ``head_norms`` are RMSNorm weights ``[D]`` for each head of q and of k. q may be changed.
        ``kv_cache`` is one layer's; ``window`` counts the tokens a query sees, itself included
        (None: all before it).
        """
        ...
