"""Drawn expert ids in the decoder's hands.

Shapes: T tokens, L layers, K top-k.
"""

import numpy as np
import torch

from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig
from offload.drawn_routes import DrawnRoutes
from offload.routing_law import Law


class DrawnRouting:
    """Replaces the routers' ids by drawn ones; a request is known by its seed."""

    def __init__(self, law: Law, config: ModelConfig, *, seed: int) -> None:
        self._routes = DrawnRoutes(
            law,
            seed=seed,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
        )

    def prepare(self, num_requests: int, num_tokens: int) -> None:
        """Draw for the first tokens of requests 0, 1, ..., so that steps only look up."""
        for request in range(num_requests):
            self._routes.ids(request, 0, num_tokens)

    def plan(self, batch: StepBatch) -> None:
        """One copy to the device for all layers."""
        spans = zip(batch.seeds, batch.qo_lens, batch.kv_lens, strict=True)
        ids_TLK = np.concatenate([self._routes.ids(s, kv - qo, kv) for s, qo, kv in spans])
        ids_LTK = np.ascontiguousarray(ids_TLK.swapaxes(0, 1), dtype=np.int64)
        self._ids_LTK = torch.from_numpy(ids_LTK).to(batch.tokens_T.device)

    def choose(self, layer: int, ids_TK: torch.Tensor) -> torch.Tensor:
        """The drawn ids of the step's tokens."""
        return self._ids_LTK[layer]
