"""How requests draw, as fields of a staged array.

Shapes: R requests, a row each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch

from fiddler.engine.request import Request
from fiddler.engine.staged_array import Kind, StagedArray
from gpu_kernels.sampling_inputs import SamplingSettings

KINDS: dict[str, Kind] = {
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "min_p": "float32",
    "seed": "int64",
    "position": "int64",
}
MOST_TOP_K = 2**31 - 1  # of int32; no vocabulary is as large


def draw_sizes(num_rows: int) -> dict[str, tuple[Kind, int]]:
    """The fields of ``num_rows`` rows."""
    return {name: (kind, num_rows) for name, kind in KINDS.items()}


def write_draw(
    at: Mapping[str, npt.NDArray[Any]], row: int, request: Request, position: int
) -> None:
    """Set a row to how ``request`` draws the token that will stand at ``position``."""
    p = request.params
    at["temperature"][row] = p.temperature or 0.0
    at["top_k"][row] = min(p.top_k or 0, MOST_TOP_K)
    at["top_p"][row] = 1.0 if p.top_p is None else p.top_p
    at["min_p"][row] = p.min_p
    at["seed"][row], at["position"][row] = request.draw_seed, position


def draws_of(at: Mapping[str, torch.Tensor]) -> SamplingSettings:
    """The fields as the sampling kernel takes them."""
    return SamplingSettings(
        at["temperature"], at["top_k"], at["top_p"], at["min_p"], at["seed"], at["position"]
    )


def next_draws(requests: Sequence[Request], device: torch.device) -> SamplingSettings:
    """How each request draws its next token; the copy is put on the current stream."""
    array = StagedArray(draw_sizes(len(requests)), device)
    for row, request in enumerate(requests):
        write_draw(array.sides[0], row, request, len(request.tokens))
    array.send()
    return draws_of(array.device)
