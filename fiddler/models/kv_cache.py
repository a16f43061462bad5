"""One layer's keys and values in pages, as numbers or as codes of eight bits with scales.

Shapes: T tokens, P pages, M key/value heads, D head dim, S tokens of a page, L cached tokens.
"""

from dataclasses import dataclass

import torch

from fiddler.models.dtypes import KV_CODES
from gpu_kernels.kv_quant import dequantise_kv, quantise_kv

STORED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class LayerKV:
    """``pages [P, 2 (keys, values), S, M, D]``; codes have ``scales [P, 2, M, S]``, float32."""

    pages: torch.Tensor
    scales: torch.Tensor | None = None

    def copy_page(self, source: int, target: int) -> None:
        """Make page ``target`` equal to page ``source``."""
        self.pages[target].copy_(self.pages[source])
        if self.scales is not None:
            self.scales[target].copy_(self.scales[source])

    def append(self, slots_T: torch.Tensor, k_TMD: torch.Tensor, v_TMD: torch.Tensor) -> None:
        """Write tokens to ``slots_T = page * S + offset``, rounded to what the pages hold."""
        page_size = self.pages.shape[2]
        page_T, offset_T = slots_T // page_size, slots_T % page_size
        for kind, x_TMD in enumerate((k_TMD, v_TMD)):
            if self.scales is not None:
                x_TMD, scale_TM = quantise_kv(x_TMD, self.pages.dtype)
                self.scales[page_T, kind, :, offset_T] = scale_TM
            self.pages[page_T, kind, offset_T] = x_TMD.to(self.pages.dtype)

    def gather(self, pages_P: torch.Tensor, kv_len: int, dtype: torch.dtype) -> torch.Tensor:
        """The first ``kv_len`` tokens of some pages as numbers, a new ``[2, L, M, D]``."""
        codes_2LMD = self.pages[pages_P].transpose(0, 1).flatten(1, 2)[:, :kv_len]
        if self.scales is None:
            return codes_2LMD.to(dtype)
        scales_2LM = self.scales[pages_P].permute(1, 0, 3, 2).flatten(1, 2)[:, :kv_len]
        return dequantise_kv(codes_2LMD, scales_2LM).to(dtype)


def new_kv_caches(
    num_layers: int, shape: tuple[int, ...], stored: str, device: torch.device | str
) -> list[LayerKV]:
    """Empty caches whose pages have ``shape`` and a type of :data:`STORED`."""
    # zeros, not empty: a masked key still enters the dot product, and NaN * 0 is NaN; as bytes
    # where they are fp8, which not every device can fill
    dtype = STORED[stored]
    bits = torch.uint8 if stored == "fp8" else dtype
    pages = [torch.zeros(shape, dtype=bits, device=device).view(dtype) for _ in range(num_layers)]
    if stored not in KV_CODES:
        return [LayerKV(layer) for layer in pages]
    num_pages, two, page_size, heads, _ = shape
    # in one piece: an allocator that rounds up to 2 MiB does so once
    scales_LP2MS = torch.zeros(num_layers, num_pages, two, heads, page_size, device=device)
    return [LayerKV(*both) for both in zip(pages, scales_LP2MS, strict=True)]
