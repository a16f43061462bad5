"""Fields of several types in one array, and what a decode step's rows hold."""

import numpy as np
import torch

from fiddler.engine.decode_staging import Staging
from fiddler.engine.request import Request
from fiddler.engine.scheduler import Chunk
from fiddler.engine.staged_array import StagedArray, lay_out
from fiddler.sampling_params import SamplingParams

CPU = torch.device("cpu")


def test_fields_are_aligned_and_apart() -> None:
    fields, end = lay_out({"a": ("int32", 1), "b": ("int64", 9), "c": ("float32", 16)})
    assert [(f.first, f.end) for f in fields.values()] == [(0, 1), (16, 34), (48, 64)]
    assert end == 64


def test_numbers_come_over_as_they_are() -> None:
    array = StagedArray({"n": ("int32", 2), "seed": ("int64", 2), "t": ("float32", 3)}, CPU)
    array.sides[0]["n"][:] = [-1, 7]
    array.sides[0]["seed"][:] = [2**63 - 1, -(2**63)]
    array.sides[0]["t"][:] = [0.1, -np.inf, 1e-30]
    assert not array.device["seed"].any()
    array.send()
    assert array.device["n"].tolist() == [-1, 7]
    assert array.device["seed"].tolist() == [2**63 - 1, -(2**63)]
    assert torch.equal(array.device["t"], torch.tensor([0.1, -np.inf, 1e-30]))


def chunk(params: SamplingParams, seed: int, outputs: int) -> Chunk:
    request = Request(prompt_ids=[5, 6, 7], params=params, max_tokens=9, seed=seed)
    request.tokens += list(range(outputs))
    request.pages = [2]
    return Chunk(request, len(request.tokens) - 1, 1)


def test_a_step_brings_how_its_rows_draw() -> None:
    staging = Staging(4, 8, 16, CPU)
    draws = staging.draws()
    hot = SamplingParams(temperature=1.5, top_k=10**12, top_p=0.5, min_p=0.25)
    staging.fill([chunk(hot, 2**64 - 3, 2), chunk(SamplingParams(), 4, 0)])
    staging.send()
    assert draws.temperature_B.tolist() == [1.5, 0, 0, 0]
    assert draws.top_k_B[:2].tolist() == [2**31 - 1, 0]
    assert draws.top_p_B[:2].tolist() == [0.5, 1]
    assert draws.min_p_B[:2].tolist() == [0.25, 0]
    assert draws.seed_B[:2].tolist() == [-3, 4]
    assert draws.position_B[:2].tolist() == [5, 3]
    staging.fill([])
    staging.send()
    assert not draws.temperature_B.any()  # padding takes the largest logit
