"""Drawn expert ids for the steps of an engine.

Shapes: T tokens, L layers, K top-k.
"""

import numpy as np
import numpy.typing as npt

from fiddler.engine.scheduler import Chunk
from fiddler.models.config import ModelConfig
from offload.drawn_routes import DrawnRoutes
from offload.routing_law import Law


class DrawnRouting:
    """Draws for whole steps, as ``Runner.draw_experts``; a request is known by its seed.

    Its token at a position takes the choices that the law draws for ``position + shift``.
    """

    def __init__(self, law: Law, config: ModelConfig, *, seed: int) -> None:
        self._routes = DrawnRoutes(
            law,
            seed=seed,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            top_k=config.top_k,
        )
        self.shift = 0

    def prepare(self, num_requests: int, num_tokens: int) -> None:
        """Draw the first choices of requests 0, 1, ..., so that steps only look up."""
        for request in range(num_requests):
            self._routes.ids(request, 0, num_tokens)

    def __call__(self, chunks: tuple[Chunk, ...]) -> npt.NDArray[np.int16]:
        """The ids of the chunks' tokens, ``[L, T, K]``."""
        ids, shift = self._routes.ids, self.shift
        drawn = [ids(c.request.seed, c.start + shift, c.end + shift) for c in chunks]
        return np.concatenate([ids_TLK.swapaxes(0, 1) for ids_TLK in drawn], axis=1)
