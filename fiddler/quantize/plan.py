"""What a quantised checkpoint will consist of, known to the byte before a weight is read.

The layout is described in docs/quantized-checkpoints.md.
"""

from dataclasses import dataclass
from math import prod

from cpu_kernels.weight_kind import WeightKind
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import Parts, layer_parts, model_parts, packed_part
from fiddler.models.quantized import check_groups

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a file; ``expert`` is None for what is copied in bfloat16."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return "BF16" if self.expert is None else "U8"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (2 if self.expert is None else 1)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: tensors of one layer, or of none (``layer`` None)."""

    name: str
    layer: int | None
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def experts(self) -> list[int]:
        return [tensor.expert for tensor in self.tensors if tensor.expert is not None]


def plan_shards(
    config: ModelConfig, kind: WeightKind, shard_bytes: int = SHARD_BYTES
) -> tuple[Shard, ...]:
    """Files of at most ``shard_bytes``, or one tensor; each layer begins one.

    So an interrupted run repeats one layer at most. Raises as :func:`check_groups`.
    """
    check_groups(config, kind, "--scheme")
    groups: list[tuple[int | None, list[PlannedTensor]]] = [(None, _copied(model_parts(config)))]
    for layer in range(config.num_layers):
        tensors = _copied(layer_parts(config, layer))
        if config.is_moe_layer(layer):
            # first: their sizes are multiples of 64 bytes, so all of them are aligned
            tensors = [*_experts(config, kind, layer), *tensors]
        groups.append((layer, tensors))
    cut = [(layer, part) for layer, tensors in groups for part in _cut(tensors, shard_bytes)]
    return tuple(
        Shard(f"model-{number:05d}-of-{len(cut):05d}.safetensors", layer, tuple(tensors))
        for number, (layer, tensors) in enumerate(cut, start=1)
    )


def _experts(config: ModelConfig, kind: WeightKind, layer: int) -> list[PlannedTensor]:
    parts = (packed_part(config, kind, layer, e) for e in range(config.num_experts))
    return [PlannedTensor(part.name, part.shape, expert=e) for e, part in enumerate(parts)]


def _copied(fields: dict[str, Parts]) -> list[PlannedTensor]:
    return [PlannedTensor(part.name, part.shape) for parts in fields.values() for part in parts]


def _cut(tensors: list[PlannedTensor], most: int) -> list[list[PlannedTensor]]:
    """Runs of tensors of at most ``most`` bytes, or of one."""
    runs: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not runs or size + tensor.nbytes > most:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += tensor.nbytes
    return runs
