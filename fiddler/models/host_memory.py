"""What a machine with a GPU needs of its RAM beside experts: what the CPU's workers write to."""

from cpu_kernels.column_panels import may_use_columns
from cpu_kernels.kernel_paths import Activations, KernelPath
from cpu_kernels.scratch import LayerSizes, scratch_sizes
from cpu_kernels.weight_kind import WeightKind
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes

WORD = 4  # of float32 and int32


def host_bytes(config: ModelConfig, dtypes: Dtypes, *, num_tokens: int, num_threads: int) -> int:
    """For the largest step, of which the workers may get every choice.

    Hidden states, ids, weights and results, and the scratch of whichever way takes most.
    """
    hidden, _ = config.expert_sides
    buffers = 2 * WORD * num_tokens * (hidden + config.top_k)
    ways = [(kind, rounds) for kind in dtypes.expert_kinds for rounds in (dtypes.few, dtypes.many)]
    return buffers + max(
        _scratch_bytes(config, kind, rounds, num_tokens, num_threads) for kind, rounds in ways
    )


def _scratch_bytes(
    config: ModelConfig, kind: WeightKind, rounds: Activations, num_tokens: int, num_threads: int
) -> int:
    path, (hidden, width) = KernelPath(kind, rounds), config.expert_sides
    columns_from = int(may_use_columns(path, hidden, width))  # 1: whoever has a token, at worst
    sizes = LayerSizes(path, hidden, width, config.num_experts, columns_from)
    num_pairs = num_tokens * config.top_k
    every = scratch_sizes(
        sizes, num_tokens=num_tokens, num_pairs=num_pairs, num_threads=num_threads
    )
    return sum(every.values())
