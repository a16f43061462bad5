"""One layer's keys and values in pages, as numbers or as codes of eight or four bits with scales.

Shapes: T tokens, P pages, M key/value heads, D head dim, C elements of a head as stored (D, or D/2
bytes of two codes), S tokens of a page, L cached tokens.
"""

from dataclasses import dataclass

import torch

from fiddler.models.dtypes import KV_CODES
from gpu_kernels.kv_quant import INT4, dequantise_kv, quantise_kv, scales_of, stored_size

STORED = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "int4": INT4,
}


@dataclass(frozen=True, slots=True)
class LayerKV:
    """``pages [P, 2 (keys, values), S, M, C]``; codes have scales (see gpu_kernels.kv_quant)."""

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
        codes_2LMC = self.pages[pages_P].transpose(0, 1).flatten(1, 2)[:, :kv_len]
        if self.scales is None:
            return codes_2LMC.to(dtype)
        scales_P2SM = self.scales[pages_P].transpose(2, 3)
        scales_2LM = scales_P2SM.transpose(0, 1).flatten(1, 2)[:, :kv_len]
        return dequantise_kv(codes_2LMC, scales_2LM).to(dtype)


def new_kv_caches(
    num_layers: int, shape: tuple[int, ...], stored: str, device: torch.device | str
) -> list[LayerKV]:
    """Empty caches of ``shape [P, 2, S, M, D]``, kept as a type of :data:`STORED`."""
    # zeros, not empty: a masked key still enters the dot product, and NaN * 0 is NaN; as bytes
    # where they are fp8, which not every device can fill
    dtype = STORED[stored]
    bits = torch.uint8 if stored == "fp8" else dtype
    shape = (*shape[:-1], stored_size(shape[-1], dtype))
    pages = [torch.zeros(shape, dtype=bits, device=device).view(dtype) for _ in range(num_layers)]
    if stored not in KV_CODES:
        return [LayerKV(layer) for layer in pages]
    # in one piece: an allocator that rounds up to 2 MiB does so once
    of_layer, scale_dtype = scales_of(shape, dtype)
    scales = torch.zeros(num_layers, *of_layer, dtype=scale_dtype, device=device)
    return [LayerKV(*both) for both in zip(pages, scales, strict=True)]
