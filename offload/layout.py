"""How a budget is spent: KV pages and number of experts on the GPU side, with what is missing.

The order is: CUDA context, margin, dense weights, workspace, KV pages, then experts; where not all
of them fit on a GPU, the first of that room is for those that pass through it. RAM holds what the
workers write to, the input embedding and the other experts, or as many as it can at a time; then
the rest is on disk until a step needs it, and nothing passes through the GPU. Nothing here raises;
:mod:`offload.planner` refuses a layout that is short of memory.
"""

import math
from dataclasses import dataclass

from offload.expert_room import ExpertRoom, in_turn
from offload.hardware import Hardware
from offload.plan import Budget, Footprint, GpuSide
from offload.staging import DIVISOR, LEAST_SLOTS, least_slots, wanted_slots
from offload.units import MIB

LEAST_CONTEXT = 2048  # tokens that an unasked context has at least
MOST_CONTEXT = 32_768  # tokens that an unasked context has at most

# Safety margin, on a real GPU only. Kernels that the driver loads at first use grow the context, by
# 200 to 220 MiB on an H200:
MARGIN_FIXED_BYTES = 256 * MIB
# torch's allocator keeps cuBLAS's workspaces for the process,
MARGIN_POOL_BYTES = 64 * MIB
# rounds each large block up to 2 MiB, KV of every layer among them (one block for all of it does
# not fit into holes: a fourth model of a process found no 32 MiB in 175 that were free),
MARGIN_LAYER_BYTES = 2 * MIB
# and leaves holes in what is allocated in many pieces: 1/32 of dense weights and workspace.
MARGIN_DIVISOR = 32

# Of the RAM that is free, 1/20 stays free so that the machine does not swap. An asked RAM budget
# may use that too, but no more than is free: beyond it, a refusal names both figures. One above
# all the machine's RAM is refused even where the model would fit, for it cannot be meant.
RAM_HEADROOM_DIVISOR = 20

# An unasked VRAM budget leaves this to the desktop and to programs that start later.
VRAM_HEADROOM_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Bytes and counts of one way to spend a budget; ``*_missing`` is 0 where it fits."""

    side: GpuSide
    context_bytes: int
    margin_bytes: int
    kv_bytes: int
    num_pages: int
    context_tokens: int
    num_gpu_experts: int
    gpu_expert_bytes: int
    staging_slots: int  # for experts that pass through
    has_ring: bool  # the least slots for what passes through, or nothing is cold
    spare_slots: int  # for experts that change places
    spare_bytes: int
    num_ram_experts: int  # that RAM holds at a time
    num_disk_experts: int  # that it has no room for
    ram_workspace_bytes: int  # what workers write to, beside a GPU
    ram_dense_bytes: int  # of dense weights, beside a GPU
    ram_expert_bytes: int
    disk_expert_bytes: int
    expert_room: int  # VRAM that is left for experts; 0 without a GPU side
    vram_limit: int
    vram_needed: int  # without the experts
    is_vram_overdrawn: bool  # more was asked for than the GPU can give this process
    ram_limit: int
    ram_needed: int
    is_ram_overdrawn: bool  # more was asked for than the machine has

    @property
    def num_cold(self) -> int:
        """Experts that are not on the GPU side."""
        return self.num_ram_experts + self.num_disk_experts

    @property
    def vram_missing(self) -> int:
        """Bytes by which the GPU side's fixed parts and least KV exceed its budget."""
        return max(0, self.vram_needed - self.vram_limit)

    @property
    def expert_room_missing(self) -> int:
        """Bytes by which an asked number of experts exceeds the room that the GPU side has."""
        needed = self.gpu_expert_bytes + self.spare_bytes
        return 0 if self.side is GpuSide.NONE else max(0, needed - self.expert_room)

    @property
    def ram_missing(self) -> int:
        """Bytes by which the host's part exceeds the RAM."""
        return max(0, self.ram_needed - self.ram_limit)

    @property
    def fits(self) -> bool:
        """Whether nothing is missing and nothing was asked for that there is not."""
        overdrawn = self.is_vram_overdrawn or self.is_ram_overdrawn
        missing = self.vram_missing + self.expert_room_missing + self.ram_missing
        return not (overdrawn or missing)


def lay_out(footprint: Footprint, hardware: Hardware, budget: Budget) -> Layout:
    """Spend ``budget`` on ``footprint``; the result says what is missing, if anything.

    A GPU reads an embedding of which a token needs one row from RAM, unless it has room for all
    that anyone could want beside it, or RAM has none.
    """
    every = _lay_out(footprint, hardware, budget, 0)
    elsewhere = footprint.lookup_bytes if every.side is GpuSide.CUDA else 0
    if not elsewhere or _has_all(footprint, budget, every):
        return every
    apart = _lay_out(footprint, hardware, budget, elsewhere)
    return every if every.fits and not apart.fits else apart


def _has_all(footprint: Footprint, budget: Budget, layout: Layout) -> bool:
    """Whether the GPU holds every expert, and the KV of as many requests as there may be."""
    return not layout.num_cold and layout.num_pages >= _most_pages(budget)


def _lay_out(footprint: Footprint, hardware: Hardware, budget: Budget, ram_dense: int) -> Layout:
    """``ram_dense``: bytes of dense weights that a GPU reads from RAM."""
    side = gpu_side(hardware, budget)
    context = hardware.cuda_context_bytes if side is GpuSide.CUDA else 0
    margin = margin_bytes(footprint) if side is GpuSide.CUDA else 0
    dense = footprint.dense_bytes - ram_dense
    fixed = context + margin + dense + footprint.workspace_bytes
    size, experts = footprint.expert_bytes, footprint.room
    ram_limit = ram_limit_bytes(hardware, budget)
    vram_limit = vram_limit_bytes(hardware, budget)

    room = (ram_limit - experts.total if side is GpuSide.NONE else vram_limit) - fixed
    kv_reserve = _kv_reserve(footprint, budget, room)
    page_bytes = budget.page_size * footprint.kv_bytes_per_token
    num_pages = kv_reserve // page_bytes
    kv = num_pages * page_bytes
    # Experts get what the reserve leaves, not what its whole pages leave: with that, one more
    # byte of VRAM never costs an expert.
    free = 0 if side is GpuSide.NONE else max(0, room - kv_reserve)
    num_experts, num_staging, num_spare = _slots(footprint, budget, side, free, experts)
    if side is GpuSide.CUDA and num_experts == footprint.total_experts:
        num_pages += _more_pages(footprint, budget, free - experts.total, num_pages)
        kv = num_pages * page_bytes
    # of RAM, before any cold expert; without CUDA the GPU side is there too, which has a workspace
    # and all dense weights
    is_host = side is GpuSide.CUDA and num_experts < footprint.total_experts
    workspace = footprint.host_bytes if is_host else 0
    gpu_part = 0 if side is GpuSide.CUDA else fixed + kv + experts.bytes_of(num_experts)
    needed = workspace + ram_dense + gpu_part
    ram_room = max(0, ram_limit - needed)
    if num_staging + num_spare and ram_room < experts.total - experts.bytes_of(num_experts):
        num_experts = experts.fitting(free) if budget.gpu_experts is None else budget.gpu_experts
        num_staging = num_spare = 0
    num_cold = footprint.total_experts - num_experts
    on_gpu = experts.bytes_of(num_experts)
    cold = in_ram = experts.total - on_gpu
    num_in_ram = num_cold
    if cold > ram_room:  # whichever RAM holds at a time: as many as if all were of the largest
        num_in_ram = min(num_cold, max(ram_room // size, least_in_ram(footprint)))
        in_ram = min(cold, num_in_ram * size)

    return Layout(
        side=side,
        context_bytes=context,
        margin_bytes=margin,
        kv_bytes=kv,
        num_pages=num_pages,
        context_tokens=min(context_range(budget)[1], num_pages * budget.page_size),
        num_gpu_experts=num_experts,
        gpu_expert_bytes=on_gpu,
        staging_slots=num_staging,
        has_ring=not num_cold or num_staging >= min(LEAST_SLOTS, footprint.num_experts),
        spare_slots=num_spare,
        spare_bytes=spare_bytes(footprint, num_spare),
        num_ram_experts=num_in_ram,
        num_disk_experts=num_cold - num_in_ram,
        ram_workspace_bytes=workspace,
        ram_dense_bytes=ram_dense,
        ram_expert_bytes=in_ram,
        disk_expert_bytes=cold - in_ram,
        expert_room=free,
        vram_limit=vram_limit,
        vram_needed=0 if side is GpuSide.NONE else fixed + kv,
        is_vram_overdrawn=side is GpuSide.CUDA and vram_limit > usable_vram_bytes(hardware),
        ram_limit=ram_limit,
        ram_needed=needed + in_ram,
        is_ram_overdrawn=(budget.ram_bytes or 0) > hardware.ram_total_bytes,
    )


def least_in_ram(footprint: Footprint) -> int:
    """Experts that RAM has to hold at a time: those of one token in one layer."""
    return min(footprint.top_k, footprint.num_experts)


def context_range(budget: Budget) -> tuple[int, int]:
    """Least and most tokens that one request may hold."""
    if budget.context_tokens is not None:
        return budget.context_tokens, budget.context_tokens
    most = min(budget.max_context, MOST_CONTEXT)
    return min(LEAST_CONTEXT, most), most


def _kv_reserve(footprint: Footprint, budget: Budget, room: int) -> int:
    """Bytes set aside for KV pages when the fixed parts leave ``room`` bytes."""
    least, most = (math.ceil(tokens / budget.page_size) for tokens in context_range(budget))
    page_bytes = budget.page_size * footprint.kv_bytes_per_token
    share = min(room // budget.kv_divisor, most * budget.max_num_seqs * page_bytes)
    return max(share, least * page_bytes)


def _more_pages(footprint: Footprint, budget: Budget, room: int, num_pages: int) -> int:
    """KV pages that ``room`` bytes hold beside ``num_pages``, as many as requests may want."""
    page_bytes = budget.page_size * footprint.kv_bytes_per_token
    return max(0, min(room // page_bytes, _most_pages(budget) - num_pages))


def _most_pages(budget: Budget) -> int:
    """KV pages of as many requests as there may be, each of the longest context."""
    return math.ceil(context_range(budget)[1] / budget.page_size) * budget.max_num_seqs


def spare_bytes(footprint: Footprint, num_spare: int) -> int:
    """Of so many spare slots, each as large as its layer's experts."""
    return sum(in_turn(footprint.expert_bytes_M, num_spare))


def _slots(
    footprint: Footprint, budget: Budget, side: GpuSide, free: int, experts: ExpertRoom
) -> tuple[int, int, int]:
    """Slots for residents, for staging, and spare ones, out of ``free`` bytes.

    Staging slots hold any expert. Room for one more expert never makes them fewer. Those that were
    chosen come before residents; else they take a part of the room.
    """
    total, asked, size = footprint.total_experts, budget.gpu_experts, footprint.expert_bytes
    is_staged = side is GpuSide.CUDA and (free < experts.total if asked is None else asked < total)
    if not is_staged:
        return (experts.fitting(free) if asked is None else asked), 0, 0
    kept = 0 if asked else least_slots(footprint.num_experts, free // size)
    wanted = budget.spares_per_layer * len(footprint.moe_layers)
    spares = ExpertRoom(in_turn(footprint.expert_bytes_M, wanted))
    num_spare = spares.fitting(free - kept * size)
    free -= spares.bytes_of(num_spare)
    chosen = budget.staging_slots
    if asked is not None:
        left = max(0, free - experts.bytes_of(asked)) // size
    elif chosen is not None:
        left = free // size
    else:
        left = max(kept, free // size // DIVISOR)
    wanted = wanted_slots(size) if chosen is None else max(chosen, LEAST_SLOTS)
    num_staging = min(wanted, footprint.num_experts, left)
    num_experts = experts.fitting(free - num_staging * size) if asked is None else asked
    return num_experts, num_staging, num_spare


def gpu_side(hardware: Hardware, budget: Budget) -> GpuSide:
    """CUDA where there is a GPU; without one, a VRAM budget above 0 asks for an emulated side."""
    if hardware.has_gpu:
        return GpuSide.CUDA
    return GpuSide.EMULATED if budget.vram_bytes else GpuSide.NONE


def margin_bytes(footprint: Footprint) -> int:
    """The safety margin on a real GPU; see the constants above."""
    pieces = footprint.dense_read_bytes + footprint.workspace_bytes
    layers = footprint.num_layers * MARGIN_LAYER_BYTES
    return MARGIN_FIXED_BYTES + MARGIN_POOL_BYTES + layers + pieces // MARGIN_DIVISOR


def vram_limit_bytes(hardware: Hardware, budget: Budget) -> int:
    """The asked VRAM, or all that is free but some headroom; 0 without a GPU and a budget."""
    if budget.vram_bytes is not None:
        return budget.vram_bytes
    return max(0, usable_vram_bytes(hardware) - VRAM_HEADROOM_BYTES)


def usable_vram_bytes(hardware: Hardware) -> int:
    """What this process can have of the GPU: what is free, and the context it already holds."""
    return hardware.vram_free_bytes + hardware.cuda_context_bytes


def ram_limit_bytes(hardware: Hardware, budget: Budget) -> int:
    """The asked RAM, at most what is available; unasked, with some headroom."""
    available = hardware.ram_available_bytes
    if budget.ram_bytes is not None:
        return min(budget.ram_bytes, available)
    return available - available // RAM_HEADROOM_DIVISOR
