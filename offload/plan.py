"""The planner's questions and answers as plain records: footprint, budget, plan."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from offload.expert_room import ExpertRoom, in_turn
from offload.placement import Placement
from offload.popularity import Popularity

# KV pages beyond the least take at most 1/10 of what the fixed parts leave, unless more is chosen;
# on a GPU that holds all experts, whatever those leave.
KV_DIVISOR = 10


class GpuSide(StrEnum):
    """What plays the GPU."""

    CUDA = "cuda"
    EMULATED = "emulated"  # no GPU, but a VRAM budget: the CPU computes that side as well
    NONE = "none"  # everything is on the CPU side


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a model needs, in bytes.

    ``moe_layers`` are the layers that have experts. ``dense_read_bytes`` is the part of
    ``dense_bytes`` that every token reads: all but the input embedding, if it is not the head too.
    ``workspace_bytes`` holds the activations of the largest step, which has ``step_tokens``.

    ``expert_bytes`` is one routed expert's, the largest one's where layers differ; then
    ``layer_bytes`` has one for each of ``moe_layers``. ``order``: in which experts get room on the
    GPU side, each by its layer's place among ``moe_layers``; (): layers in turn. ``host_bytes``:
    what the CPU's workers write to beside a GPU that does not hold all experts; without one
    ``workspace_bytes`` has it.
    """

    num_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    expert_bytes: int
    dense_bytes: int
    dense_read_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int
    step_tokens: int
    layer_bytes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    host_bytes: int = 0

    @property
    def lookup_bytes(self) -> int:
        """An embedding of which a token reads one row."""
        return self.dense_bytes - self.dense_read_bytes

    @property
    def expert_bytes_M(self) -> tuple[int, ...]:
        """Of one expert of each layer that has some."""
        return self.layer_bytes or (self.expert_bytes,) * len(self.moe_layers)

    @property
    def room(self) -> ExpertRoom:
        """All experts, in their order."""
        sizes_M = self.expert_bytes_M
        if self.order:
            return ExpertRoom([sizes_M[at] for at in self.order])
        return ExpertRoom(in_turn(sizes_M, self.total_experts))

    @property
    def total_experts(self) -> int:
        """Routed experts over all layers."""
        return len(self.moe_layers) * self.num_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be used; None means: choose.

    ``vram_bytes`` counts as the driver does, CUDA context included. ``context_tokens`` is what one
    request may hold; the KV pool grows beyond it towards ``max_num_seqs`` such requests as long as
    it takes at most ``1 / kv_divisor`` of what the fixed parts leave, or, on a GPU that holds all
    experts, what those leave. ``gpu_experts`` is how many experts the
    GPU side has to hold. ``spares_per_layer``: slots that are kept free on a GPU where not all
    experts fit, for experts that change places. ``staging_slots``: those that cold experts pass
    through; None: by their size.
    ``for_batch``: what the model needs with another number of requests; None: nobody asked for
    several.
    """

    max_context: int
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    context_tokens: int | None = None
    page_size: int = 16
    max_num_seqs: int = 1
    gpu_experts: int | None = None
    spares_per_layer: int = 0
    staging_slots: int | None = None
    kv_divisor: int = KV_DIVISOR
    for_batch: Callable[[int], Footprint] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBytes:
    """What takes how much. All but the last four is the GPU side's, and sums to its budget."""

    context: int  # the CUDA context
    margin: int  # kept free for late kernels and allocator holes
    dense: int
    kv: int
    workspace: int
    staging: int  # slots that cold experts pass through in prompts, and spare ones
    gpu_experts: int
    unused: int
    cpu_workspace: int  # what the CPU's workers write to, beside a GPU
    cpu_dense: int  # the input embedding, where a GPU reads it from RAM
    cpu_experts: int  # that RAM holds at a time
    disk_experts: int  # that it has no room for


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """Bytes that one decoded token reads: expected for experts, at full context for ``kv``."""

    hot_experts: int  # on the GPU side
    cold_experts: int  # on the CPU side
    disk_experts: int  # those of them that come from disk first, if RAM keeps the most used ones
    disk_reads: int  # what is read for these: stored experts may be larger or smaller
    dense: int
    kv: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Why steps and ring are as large as they are: of ``num_layouts`` the least predicted time.

    By the rates of ``machine``, for ``objective`` (see :mod:`offload.objective`).
    """

    objective: str
    machine: str
    num_layouts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where everything lives. ``num_pages`` KV pages hold ``page_size`` tokens each.

    ``cached`` are the experts that RAM begins with where it does not hold all cold ones at a time;
    the others are on disk until a step needs them. None: it holds them all.
    ``expected_hit_rate`` is the share of (token, expert) pairs that meet a resident expert if the
    future is like ``popularity``. ``staging_slots`` are those that cold experts pass through
    on a GPU, ``spare_slots`` those that are kept free. ``step_tokens``: of the largest step;
    ``kv_divisor``: the budget's; ``chosen`` None: there was nothing to choose.
    ``vram_budget_bytes`` is 0 without a GPU side; ``ram_needed_bytes`` counts what the GPU side
    does not hold, which without CUDA is everything.
    """

    gpu_side: GpuSide
    placement: Placement
    cached: Placement | None
    num_pages: int
    page_size: int
    context_tokens: int
    memory: MemoryBytes
    per_token: TokenBytes
    staging_slots: int
    spare_slots: int
    step_tokens: int
    kv_divisor: int
    vram_budget_bytes: int
    ram_needed_bytes: int
    ram_budget_bytes: int
    expected_hit_rate: float
    popularity_name: str
    popularity: Popularity = field(repr=False, compare=False)
    notes: tuple[str, ...] = ()
    chosen: Chosen | None = None

    def to_dict(self) -> dict[str, object]:
        """Everything as JSON types; placements become sorted expert ids per layer."""
        fields = asdict(self)
        del fields["popularity"]
        for name, placed in (("placement", self.placement), ("cached", self.cached)):
            fields[name] = placed and [sorted(layer) for layer in placed.resident]
        return {**fields, "gpu_side": self.gpu_side.value, "notes": list(self.notes)}
