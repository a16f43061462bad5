"""How much memory the workers write to while they compute a layer: sizes alone.

P pairs (token, expert), H hidden, I expert width.
"""

from dataclasses import dataclass

from cpu_kernels.column_panels import SUMS_BYTES, most_blocks
from cpu_kernels.columns import BLOCK_BYTES
from cpu_kernels.dot_tile import x_bytes
from cpu_kernels.expert_job import ROOM
from cpu_kernels.kernel_paths import KernelPath
from cpu_kernels.lossless_panels import LOSSLESS_ROOM_BYTES
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.routes import COUNTS


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """What scratch depends on but for a step's tokens; ``columns_from`` 0: none go by columns."""

    path: KernelPath
    hidden: int
    width: int
    num_experts: int
    columns_from: int

    def rows(self) -> tuple[int, int, int]:
        """Bytes of a prepared row of x and of act, and elements of a float32 row of act."""
        kind = self.path.kind
        if not kind.is_packed:
            size = x_bytes(self.path)
            return self.hidden * size, self.width * size, 0
        group = kind.group
        x_groups, act_groups = -(-self.hidden // group), -(-self.width // group)
        if self.path.activations == "int8":
            return x_groups * (group + 8), act_groups * (group + 8), self.width
        return x_groups * group * 4, act_groups * group * 4, act_groups * group

    def columns(self) -> tuple[int, int, int]:
        """For columns: depths of blocks of x and of act, and bytes of each worker's own room."""
        if not self.path.kind.is_lossless:
            return self.hidden, self.width, SUMS_BYTES
        shape = PackedShape(self.path.kind, self.hidden, self.width)
        return shape.gate.padded_cols, shape.down.padded_cols, LOSSLESS_ROOM_BYTES


def worker_stride(num_experts: int, num_pairs: int) -> int:
    """Bytes of one worker's own: a Room, then its routes."""
    return ROOM.itemsize + 8 * routes_words(num_experts, num_pairs)


def scratch_sizes(
    layer: LayerSizes, *, num_tokens: int, num_pairs: int, num_threads: int
) -> dict[str, int]:
    """Bytes by the record's names, of a step in which every pair may be the workers'."""
    x_row_bytes, act_row_bytes, act_cols = layer.rows()
    sizes = {
        "workers": worker_stride(layer.num_experts, num_pairs) * num_threads,
        "x_rows": num_tokens * x_row_bytes,
        "act_rows": num_pairs * act_row_bytes,
        "act": num_pairs * act_cols * 4,
    }
    if not layer.columns_from:
        return sizes
    blocks = most_blocks(num_pairs, layer.num_experts, layer.columns_from)
    x_depth, act_depth, own_bytes = layer.columns()
    return sizes | {
        "x_blocks": blocks * x_depth * BLOCK_BYTES,
        "act_blocks": blocks * act_depth * BLOCK_BYTES,
        "column_sums": own_bytes * num_threads,
    }


def routes_words(num_experts: int, num_pairs: int) -> int:
    """int64 that a worker's routes take, whole cache lines; see :mod:`cpu_kernels.routes`."""
    words = COUNTS + 2 * num_experts + 1 + 2 * num_pairs
    return -(-words // 8) * 8
