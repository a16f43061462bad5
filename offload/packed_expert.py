"""Weights of a packed expert as numbers, for torch: exact in float32.

Shapes: B bytes, F = 2I, H hidden, I expert width.
"""

import torch

from cpu_kernels.packed_layout import PackedShape, dequantise, unpack_expert


def dequantised(blob_B: torch.Tensor, shape: PackedShape) -> tuple[torch.Tensor, torch.Tensor]:
    """``(w13_FH, w2_HI)`` in float32 on the CPU, where ``blob_B`` lies; both are copies.

    It takes as long as 16 tokens do in the expert: the CPU plays a GPU for correctness, not speed.
    """
    gate, up, down = (
        torch.from_numpy(dequantise(shape.kind, *part))
        for part in unpack_expert(shape, blob_B.numpy())
    )
    return torch.cat((gate, up)), down
