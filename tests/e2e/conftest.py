"""Tiny models on the CPU, loaded once per set of options and closed at the end."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fiddler import LLM
from tests.tiny_models import shared_tiny

OpenModel = Callable[..., LLM]


def open_folder(folder: Path, **options: Any) -> LLM:
    """Load a folder in float32 with one worker thread."""
    settings = {"device": "cpu", "dtype": "float32", "cpu_threads": 1} | options
    return LLM(str(folder), **settings)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Closing a model collects garbage; what the oracle's imports left is none."""
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()
    with mock.patch.object(gc, "unfreeze"):  # which closing a model does too
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def model() -> Iterator[OpenModel]:
    """``model("mixtral", **options)``: a shared LLM; leave it as it was."""
    loaded: dict[str, LLM] = {}

    def open_model(model_type: str = "mixtral", **options: Any) -> LLM:
        key = f"{model_type} {sorted(options.items())}"
        if key not in loaded:
            loaded[key] = open_folder(shared_tiny(model_type), **options)
        return loaded[key]

    yield open_model
    for llm in loaded.values():
        llm.close()
