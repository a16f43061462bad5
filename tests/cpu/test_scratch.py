"""The workers' scratch is as large as is foretold, which the planner counts."""

import numpy as np
import pytest
from expert_layers import FEW_PATHS, Rng, add_layer, random_step, random_weights, run_step

from cpu_kernels.expert_pool import LINE, ExpertPool
from cpu_kernels.scratch import scratch_sizes

HIDDEN, WIDTH, EXPERTS = 64, 32, 4


@pytest.mark.parametrize(
    ("name", "columns_from"),
    [*((name, None) for name in FEW_PATHS), ("bf16/bf16", 3), ("bf12/bf16", 3)],
)
def test_nothing_is_written_beyond_what_is_foretold(
    rng: Rng, name: str, columns_from: int | None
) -> None:
    """Rooms are twice as large as asked, so there is somewhere to look."""
    weights = random_weights(rng, name, num_experts=EXPERTS, hidden=HIDDEN, width=WIDTH)
    step = random_step(rng, num_tokens=70, hidden=HIDDEN, num_experts=EXPERTS)
    with ExpertPool(2) as pool:
        layer = add_layer(pool, weights, columns_from=columns_from)
        run_step(pool, layer, step)
    sizes = scratch_sizes(layer.sizes, num_tokens=70, num_pairs=step.ids_TS.size, num_threads=2)
    assert sizes.keys() == layer.scratch.keys()
    written = {at: np.flatnonzero(room) for at, room in layer.scratch.items()}
    assert any(found.size for found in written.values())
    for at, found in written.items():
        assert found.max(initial=0) < sizes[at] + LINE
    assert sum(sizes.values()) <= sum(room.size for room in layer.scratch.values())
