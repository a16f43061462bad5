"""What offload needs of a pool of workers."""

from typing import Any, Protocol

import numpy as np

from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import Activations


class WorkerPool(Protocol):
    """The part of :class:`cpu_kernels.expert_pool.ExpertPool` that is used here."""

    def add_layer(
        self,
        experts: Experts,
        *,
        activations: Activations = "f32",
        place_of: np.ndarray | None = None,
        columns_from: int | None = None,
    ) -> Any: ...

    def bind(
        self,
        layer: Any,
        x_TH: np.ndarray,
        ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        out_TH: np.ndarray,
        kept_N: np.ndarray | None = None,
        /,
    ) -> None: ...

    def remove_layer(self, layer: Any) -> None: ...

    def submit(
        self,
        layer: Any,
        x_TH: np.ndarray,
        ids_TK: np.ndarray,
        weights_TK: np.ndarray,
        out_TH: np.ndarray,
        /,
    ) -> None: ...

    def wait(self) -> None: ...
