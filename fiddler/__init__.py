"""fiddler: Mixture-of-Experts models larger than the GPU, run by CPU and GPU together.

    from fiddler import LLM, SamplingParams

Importing this package loads neither torch nor any kernel; the names below do, when first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from fiddler._version import __version__

if TYPE_CHECKING:
    from fiddler.errors import FiddlerError, OutOfMemoryError
    from fiddler.llm import LLM
    from fiddler.outputs import CompletionOutput, RequestOutput, TokenEvent
    from fiddler.sampling_params import SamplingParams
    from offload.placement import Placement

# Read when torch is imported: after so many looks a thread of its that waits for the others
# sleeps. By itself it spins on for milliseconds while what it waits for wants its core: the
# built-in model wrote 7 to 19 tokens a second in each of two processes on two cores, 370 to 425
# with this; alone on the machine 690 and 590 to 650.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "CompletionOutput": "fiddler.outputs",
    "FiddlerError": "fiddler.errors",
    "LLM": "fiddler.llm",
    "OutOfMemoryError": "fiddler.errors",
    "Placement": "offload.placement",
    "RequestOutput": "fiddler.outputs",
    "SamplingParams": "fiddler.sampling_params",
    "TokenEvent": "fiddler.outputs",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "FiddlerError",
    "OutOfMemoryError",
    "Placement",
    "RequestOutput",
    "SamplingParams",
    "TokenEvent",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fiddler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # what completion in a shell offers
