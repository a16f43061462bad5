"""Decode attention beside FlashInfer where it is installed, else beside torch's SDPA and Flex.

Run: PYTHONPATH=. python -m scripts.bench.kernels.peers

Each runs as the replay of a CUDA graph, where a launch costs the host nothing. FlashInfer compiles
its kernels at its first call, which takes a minute or two and nvcc. SDPA and FlexAttention get
dense caches padded to the longest request, as they have no pages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from scripts.bench.kernels.paged_case import (
    HEAD_DIM,
    NUM_HEADS,
    PAGE_SIZE,
    SM_SCALE,
    DecodeCase,
    decode_case,
    zipf_lengths,
)
from scripts.bench.kernels.timing import graph_ms, relative_error
from scripts.bench.rows import Row, at_least, table

NUM_KV_HEADS = 4
TOTAL = 131_072
CASES = {
    "1 x 131072": [TOTAL],
    "16 x 8192": [TOTAL // 16] * 16,
    "64 x 2048": [TOTAL // 64] * 64,
    "16, Zipf": zipf_lengths(16, TOTAL),
    "64, Zipf": zipf_lengths(64, TOTAL),
    "one of 65536 and 63 of 256": [65_536] + [256] * 63,
}
WITHIN = 0.9
Peer = Callable[[DecodeCase, list[int]], Callable[[], torch.Tensor]]


def flashinfer(case: DecodeCase, kv_lens: list[int]) -> Callable[[], torch.Tensor]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        case.pages.indptr_B1,
        case.pages.indices,
        case.pages.last_page_len_B,
        NUM_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        PAGE_SIZE,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
        sm_scale=SM_SCALE,
    )
    return lambda: wrapper.run(case.q_BHD, case.kv_cache)


def _dense(case: DecodeCase, kv_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as ``[B, KV heads, longest, D]``."""
    shape = (len(kv_lens), NUM_KV_HEADS, max(kv_lens), HEAD_DIM)
    k_BKSD, v_BKSD = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    first = 0
    for request, kv_len in enumerate(kv_lens):
        num_pages = -(-kv_len // PAGE_SIZE)
        pages = case.pages.indices[first : first + num_pages].long()
        first += num_pages
        for dense, kind in ((k_BKSD, 0), (v_BKSD, 1)):
            tokens_SKD = case.kv_cache[pages, kind].flatten(0, 1)[:kv_len]
            dense[request, :, :kv_len] = tokens_SKD.transpose(0, 1)
    return k_BKSD, v_BKSD


def sdpa(case: DecodeCase, kv_lens: list[int]) -> Callable[[], torch.Tensor]:
    k_BKSD, v_BKSD = _dense(case, kv_lens)
    lens_B = torch.tensor(kv_lens, device="cuda")
    mask_B11S = (torch.arange(max(kv_lens), device="cuda") < lens_B[:, None])[:, None, None]
    mask = None if len(set(kv_lens)) == 1 else mask_B11S
    return lambda: F.scaled_dot_product_attention(
        case.q_BHD[:, :, None], k_BKSD, v_BKSD, attn_mask=mask, scale=SM_SCALE, enable_gqa=True
    )[:, :, 0]


def flex(case: DecodeCase, kv_lens: list[int]) -> Callable[[], torch.Tensor]:
    k_BKSD, v_BKSD = _dense(case, kv_lens)
    lens_B = torch.tensor(kv_lens, dtype=torch.int32, device="cuda")
    block_mask = create_block_mask(
        lambda b, h, q, s: s < lens_B[b], len(kv_lens), None, 1, max(kv_lens), device="cuda"
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        case.q_BHD[:, :, None],
        k_BKSD,
        v_BKSD,
        block_mask=block_mask,
        scale=SM_SCALE,
        enable_gqa=True,
    )[:, :, 0]


def peers() -> dict[str, Peer]:
    if importlib.util.find_spec("flashinfer") is not None:
        return {"FlashInfer": flashinfer}
    return {"SDPA": sdpa, "FlexAttention": flex}


def rows() -> list[Row]:
    found = []
    for name, kv_lens in CASES.items():
        case = decode_case(kv_lens, NUM_KV_HEADS)
        ours = case.runner()
        ours_ms = graph_ms(ours)
        for peer, prepare in peers().items():
            theirs = prepare(case, kv_lens)
            error = relative_error(ours(), theirs())
            assert error <= 5e-3, f"{peer}, {name}: they differ by {error:.1e}"
            theirs_ms = graph_ms(theirs)
            speeds = (case.num_bytes / ours_ms / 1e6, case.num_bytes / theirs_ms / 1e6)
            found.append(
                at_least(
                    f"decode attention, {name}, of {peer}'s speed",
                    speeds[0],
                    "GB/s",
                    speeds[1],
                    theirs_ms / ours_ms,
                    WITHIN,
                )
            )
    return found


def main() -> None:
    torch.manual_seed(0)
    print(table(rows()))


if __name__ == "__main__":
    main()
