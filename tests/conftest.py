"""Without a GPU, Triton kernels run in its interpreter: the choice must precede its import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
