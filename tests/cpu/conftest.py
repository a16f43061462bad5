"""One pool for all tests of the expert kernels, and a fresh generator for each."""

from collections.abc import Iterator

import numpy as np
import pytest

from cpu_kernels.expert_pool import ExpertPool


@pytest.fixture(scope="session")
def pool() -> Iterator[ExpertPool]:
    with ExpertPool(2) as pool:
        yield pool


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)
