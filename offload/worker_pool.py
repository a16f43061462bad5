"""What offload needs of a pool of workers."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import Activations


class FedWorkers(Protocol):
    """The part of :class:`cpu_kernels.threads.WorkerPool` that who feeds it needs."""

    @property
    def words(self) -> npt.NDArray[np.int64]: ...

    def awake(self) -> AbstractContextManager[None]: ...

    def ring(self, number: int, /) -> None: ...

    def wait(self) -> None: ...


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
