"""One step's tokens, as the decoder sees them: ragged requests over paged KV.

Shapes: T tokens of the step, B requests, L layers, K experts per token.
"""

from dataclasses import dataclass

import torch

from gpu_kernels.page_table import PageTable


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Requests side by side, those that decode (one token each) before those that prefill.

    ``pages`` covers each request's KV *including* this step's tokens; the step writes token t's
    key and value to ``slots_T[t] = page * page_size + offset`` before it attends. On a GPU requests
    without pages may pad the batch; their slots are -1. ``drawn_LTK`` are expert ids that replace
    the routers'; the routers' weights stay.
    """

    tokens_T: torch.Tensor  # int64 (or int32, on a GPU), as the next two
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    pages: PageTable
    qo_indptr_B1: torch.Tensor  # int32
    qo_lens: tuple[int, ...]  # tokens of each request in this step, on the host
    kv_lens: tuple[int, ...]  # tokens of each in the cache after it, on the host; GPUs need none
    num_decodes: int
    drawn_LTK: torch.Tensor | None = None  # int32

    def decode_pages(self) -> PageTable:
        """The page table of the decoding requests."""
        return self._slice(0, self.num_decodes)

    def prefill_pages(self) -> PageTable:
        """The page table of the prefilling requests; ``indptr`` keeps its offset into indices."""
        return self._slice(self.num_decodes, len(self.qo_lens))

    def _slice(self, first: int, last: int) -> PageTable:
        return PageTable(
            indptr_B1=self.pages.indptr_B1[first : last + 1],
            indices=self.pages.indices,
            last_page_len_B=self.pages.last_page_len_B[first:last],
            page_size=self.pages.page_size,
        )
