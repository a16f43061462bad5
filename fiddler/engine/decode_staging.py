"""What a decode step needs to know as one array, what it tells as another: a copy for each.

Rows beyond the requests in use are padding: token 0 at position 0, no slot to write to, no pages to
read, and the largest logit's id for a draw.

Each array has two sides on the host, so one may be written or read while the other's step is under
way. A step whose tokens the one before it draws is given none: they are on the device by then.

Shapes: B rows of a bucket, L layers, K choices.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from fiddler.engine.draw_settings import draw_sizes, draws_of, write_draw
from fiddler.engine.scheduler import Chunk
from fiddler.engine.staged_array import Kind, StagedArray
from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig
from gpu_kernels.page_table import PageTable
from gpu_kernels.sampling_inputs import SamplingSettings

NUM_SIDES = 2  # a step under way, and the one behind it
PADDING = {"tokens": 0, "positions": 0, "slots": -1, "last_page_len": 0, "temperature": 0.0}


def staged_sizes(num_rows: int, max_pages: int) -> dict[str, tuple[Kind, int]]:
    """The fields for B = ``num_rows`` requests with ``max_pages`` in all."""
    sizes = {
        "num_used": 1,
        "positions": num_rows,
        "slots": num_rows,
        "indptr": num_rows + 1,
        "last_page_len": num_rows,
        "indices": max_pages,
    }
    fields: dict[str, tuple[Kind, int]] = {name: ("int32", size) for name, size in sizes.items()}
    return {**fields, **draw_sizes(num_rows), "tokens": ("int64", num_rows)}  # a copy may end there


class Staging:
    """What the steps of one bucket need to know.

    Ordering: fill a side only while no step is under way that was sent it.
    """

    def __init__(self, num_rows: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self.num_rows, self._max_pages, self._page_size = num_rows, max_pages, page_size
        self._array = StagedArray(staged_sizes(num_rows, max_pages), device, NUM_SIDES)
        self.fill([])

    @property
    def num_used(self) -> torch.Tensor:
        """How many rows are no padding, int32 ``[1]`` on the device."""
        return self._array.device["num_used"]

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there is room for these requests' pages."""
        return sum(self._num_pages(chunk) for chunk in chunks) <= self._max_pages

    def fill(self, chunks: Sequence[Chunk], side: int = 0) -> None:
        """Lay out one token each of at most B requests; whose token is to be drawn has none yet."""
        at = self._array.sides[side]
        num_used, num_pages = len(chunks), 0
        at["num_used"][0] = num_used
        for row, chunk in enumerate(chunks):
            request, position = chunk.request, chunk.start
            count = self._num_pages(chunk)
            pages = request.pages[:count]
            at["positions"][row] = position
            if position < len(request.tokens):
                at["tokens"][row] = request.tokens[position]
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

    def send(self, side: int = 0, *, is_next: bool = False) -> None:
        """Put the copy to the device on the current stream; ``is_next``: all but the tokens."""
        self._array.send(side, before="tokens" if is_next else None)

    def take_tokens(self, ids_B: torch.Tensor) -> None:
        """Make what was drawn the next step's tokens; a draw that failed counts as token 0."""
        torch.clamp(ids_B, min=0, out=self._array.device["tokens"])

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


class Results:
    """What the steps of one bucket tell: the ids that they draw, and the experts that they choose.

    Ordering: read a side when the copy that was put on the stream by :meth:`fetch` is done, and
    before another one is put there for it.
    """

    def __init__(self, record_shape: tuple[int, int, int], device: torch.device) -> None:
        """``record_shape``: ``[L, B, K]``."""
        self._shape = record_shape
        sizes: dict[str, tuple[Kind, int]] = {
            "ids": ("int64", record_shape[1]),
            "record": ("int32", prod(record_shape)),
        }
        self._array = StagedArray(sizes, device, NUM_SIDES)

    @property
    def ids_B(self) -> torch.Tensor:
        """Where steps write the ids, int64 on the device; -1: the logits are not finite."""
        return self._array.device["ids"]

    @property
    def record_LBK(self) -> torch.Tensor:
        """Where steps write their choices, int32 on the device."""
        return self._array.device["record"].view(self._shape)

    def fetch(self, side: int) -> None:
        """Put the copy to the host on the current stream."""
        self._array.fetch(side)

    def ids(self, side: int) -> list[int]:
        """What was drawn, padding too."""
        ids: list[int] = self._array.sides[side]["ids"].tolist()
        return ids

    def record(self, side: int) -> npt.NDArray[np.int32]:
        """What was chosen, ``[L, B, K]``, a view."""
        return self._array.sides[side]["record"].reshape(self._shape)


class DrawnIds:
    """A step's expert ids for all layers, on the host and on the device; ordered as Staging."""

    def __init__(self, config: ModelConfig, num_rows: int, device: torch.device) -> None:
        shape = NUM_SIDES, config.num_layers, num_rows, config.top_k
        self._sides_LBK = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        # until something is drawn the rows hold distinct experts, as every kernel expects
        self._sides_LBK[:] = torch.arange(config.top_k)
        self.device_LBK = self._sides_LBK[0].to(device)

    def fill(self, drawn_LTK: np.ndarray, side: int) -> None:
        """Set the first rows."""
        self._sides_LBK[side].numpy()[:, : drawn_LTK.shape[1]] = drawn_LTK

    def send(self, side: int) -> None:
        """Put the copy to the device on the current stream."""
        self.device_LBK.copy_(self._sides_LBK[side], non_blocking=True)
