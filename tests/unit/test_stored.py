"""What is said of stored numbers that a machine does not keep as they are."""

from dataclasses import replace

import pytest

from fiddler.models.dtypes import resolve_dtypes
from fiddler.models.shapes import load_shape
from fiddler.models.stored import narrowing_note, rounding_note

STORED = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "w4g128", "bf12"])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_who_did_not_ask_for_bfloat16_is_told_of_it(stored: str, asked: str, has_gpu: bool) -> None:
    config = replace(load_shape("olmoe-1b-7b"), dtype=stored)
    dtypes = resolve_dtypes(asked, stored, has_gpu=has_gpu)
    note = narrowing_note(config, dtypes, asked)
    assert bool(note) == (has_gpu and asked == "auto" and stored != "bfloat16")
    assert not note or f"stored in {stored} is rounded to bfloat16" in note
    assert bool(rounding_note(config, dtypes.expert)) == (asked == "bf12" and stored != "bfloat16")
