"""What a decode step needs to know, as one array: a single copy brings all of it to the device.

Rows beyond the requests in use are padding: token 0 at position 0, no slot to write to, no pages to
read, and the largest logit's id for a draw.

Shapes: B rows of a bucket.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fiddler.engine.draw_settings import draw_sizes, draws_of, write_draw
from fiddler.engine.scheduler import Chunk
from fiddler.engine.staged_array import Kind, StagedArray
from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig
from gpu_kernels.page_table import PageTable
from gpu_kernels.sampling_inputs import SamplingSettings

PADDING = {"tokens": 0, "positions": 0, "slots": -1, "last_page_len": 0, "temperature": 0.0}


def staged_sizes(num_rows: int, max_pages: int) -> dict[str, tuple[Kind, int]]:
    """The fields for B = ``num_rows`` requests with ``max_pages`` in all."""
    sizes = {
        "num_used": 1,
        "tokens": num_rows,
        "positions": num_rows,
        "slots": num_rows,
        "indptr": num_rows + 1,
        "last_page_len": num_rows,
        "indices": max_pages,
    }
    return {name: ("int32", size) for name, size in sizes.items()} | draw_sizes(num_rows)


class Staging:
    """The array of one bucket.

    Ordering: fill only while no step is under way that has :meth:`send` in it.
    """

    def __init__(self, num_rows: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self.num_rows, self._max_pages, self._page_size = num_rows, max_pages, page_size
        self._array = StagedArray(staged_sizes(num_rows, max_pages), device)
        self.fill([])

    @property
    def num_used(self) -> torch.Tensor:
        """How many rows are no padding, int32 ``[1]`` on the device."""
        return self._array.device["num_used"]

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there is room for these requests' pages."""
        return sum(self._num_pages(chunk) for chunk in chunks) <= self._max_pages

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Lay out one token each of at most B requests."""
        at = self._array.host
        num_used, num_pages = len(chunks), 0
        at["num_used"][0] = num_used
        for row, chunk in enumerate(chunks):
            request, position = chunk.request, chunk.start
            count = self._num_pages(chunk)
            pages = request.pages[:count]
            at["tokens"][row], at["positions"][row] = request.tokens[position], position
            offset = position % self._page_size
            at["slots"][row] = pages[-1] * self._page_size + offset
            at["last_page_len"][row] = offset + 1
            at["indices"][num_pages : num_pages + count] = pages
            num_pages += count
            at["indptr"][row + 1] = num_pages
            write_draw(at, row, request, chunk.end)
        for name, nothing in PADDING.items():
            at[name][num_used:] = nothing
        at["indptr"][num_used + 1 :] = num_pages

    def send(self) -> None:
        """Put the copy to the device on the current stream."""
        self._array.send()

    def draws(self) -> SamplingSettings:
        """How the rows draw their next tokens; what it holds changes with every send."""
        return draws_of(self._array.device)

    def batch(self) -> StepBatch:
        """The device's side as the decoder takes it; what it holds changes with every send."""
        at = self._array.device
        return StepBatch(
            tokens_T=at["tokens"],
            positions_T=at["positions"],
            slots_T=at["slots"],
            pages=PageTable(at["indptr"], at["indices"], at["last_page_len"], self._page_size),
            qo_indptr_B1=torch.arange(
                self.num_rows + 1, dtype=torch.int32, device=at["tokens"].device
            ),
            qo_lens=(1,) * self.num_rows,
            kv_lens=(),
            num_decodes=self.num_rows,
        )

    def _num_pages(self, chunk: Chunk) -> int:
        return -(-chunk.end // self._page_size)


class DrawnIds:
    """A step's expert ids for all layers, on the host and on the device; ordered as Staging."""

    def __init__(self, config: ModelConfig, num_rows: int, device: torch.device) -> None:
        shape = config.num_layers, num_rows, config.top_k
        self._host_LBK = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        # until something is drawn the rows hold distinct experts, as every kernel expects
        self._host_LBK[:] = torch.arange(config.top_k)
        self.device_LBK = self._host_LBK.to(device)

    def fill(self, drawn_LTK: np.ndarray) -> None:
        """Set the first rows."""
        self._host_LBK.numpy()[:, : drawn_LTK.shape[1]] = drawn_LTK

    def send(self) -> None:
        """Put the copy to the device on the current stream."""
        self.device_LBK.copy_(self._host_LBK, non_blocking=True)
