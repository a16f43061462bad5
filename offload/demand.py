"""What a planned model asks of a machine: numbers from which a speed can be predicted."""

from dataclasses import dataclass

from cpu_kernels.weight_kind import PACKED_CODES
from offload.chances import LayerChances, distinct
from offload.limits import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A model, where its experts live, and which of them tokens choose. Sizes are bytes.

    ``layers`` are those with experts, of ``num_layers`` in all. ``layer_bytes`` are the dense
    weights of a layer but the shared expert's ``shared_bytes``; ``layer_numel`` is the number of
    both. ``codes`` are those of the weights' kind, ``activations`` what the CPU rounds hidden
    states to for many tokens, ``few`` for those of decode steps. ``kv_bytes``: of a token in a
    layer. ``staging_slots``: those that experts pass through. ``disk_share``: of the choices that
    meet a cold expert, those whose expert is on disk, where it takes ``disk_bytes``.
    ``step_tokens``: of a prompt in one step, at most.
    """

    on_gpu: bool
    num_layers: int
    layers: tuple[LayerChances, ...]
    top_k: int
    hidden: int
    codes: str
    activations: str
    few: str
    expert_bytes: int
    expert_numel: int
    layer_bytes: float
    shared_bytes: float
    layer_numel: float
    head_bytes: int
    vocab: int
    kv_bytes: int
    attention_width: int  # query heads times their dimension
    staging_slots: int
    disk_share: float
    disk_bytes: int
    step_tokens: int

    @property
    def is_packed(self) -> bool:
        """Whether experts are of packed weights."""
        return self.codes in PACKED_CODES


def decode_work(demand: Demand, *, rows: int, depth: int) -> Work:
    """What one step must read and compute, for its limit."""
    keys = rows * depth
    return _work(demand, rows, keys, kv_bytes=demand.num_layers * demand.kv_bytes * keys)


def prefill_work(demand: Demand, *, num_tokens: int, depth: int = 0, prompts: int = 1) -> Work:
    """Of whole prompts, in one step; reading their own KV is little beside the arithmetic."""
    keys = prompts * num_tokens * (depth + (num_tokens + 1) / 2)
    return _work(demand, prompts * num_tokens, keys, kv_bytes=0.0)


def _work(demand: Demand, tokens: int, keys: float, *, kv_bytes: float) -> Work:
    """``keys``: those that all tokens look at, in a layer."""
    cold = sum(distinct(layer.cold, tokens) for layer in demand.layers)
    hot = sum(distinct(layer.hot, tokens) for layer in demand.layers)
    dense = demand.num_layers * (demand.layer_bytes + demand.shared_bytes) + demand.head_bytes
    numel = demand.num_layers * demand.layer_numel
    numel += len(demand.layers) * demand.top_k * demand.expert_numel
    attention = 2 * demand.num_layers * demand.attention_width * keys
    return Work(
        cold_bytes=cold * demand.expert_bytes,
        hot_bytes=hot * demand.expert_bytes,
        dense_bytes=dense,
        kv_bytes=kv_bytes,
        flops=2 * (tokens * numel + attention),
    )
