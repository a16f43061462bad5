"""Settings of all tests.

Properties are tried on the same examples at every run, and take what time they take; a longer
search: ``pytest --hypothesis-profile=search``. Without a GPU, Triton kernels run in its
interpreter: the choice must precede its import.
"""

import os

import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("same")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
