"""How many experts the GPU keeps room for while they pass through; torch-free, for the planner."""

from offload.units import MIB

STAGING_BYTES = 512 * MIB  # 10 ms of PCIe 5: longer than a layer's attention and routing take
LEAST_SLOTS = 4  # of large experts: one in use, one or two under way, one ahead
MOST_SLOTS = 64
CHOICES = (LEAST_SLOTS, 16, MOST_SLOTS)
LEAST_BYTES = 128 * MIB  # of a ring that is chosen: less has never run, and each copy is a launch
# Slots are filled and used some at a time, in banks: as many as let the link go on while one is
# used. Of small experts there are fewer: each costs Python launches, and PCIe 5 takes 600 us for 32
# MiB.
NUM_BANKS, FEW_BANKS = 8, 4
BANK_BYTES = 32 * MIB
# Of the room for experts, at most this part beyond the least: what it takes, residents lose.
DIVISOR = 8


def wanted_slots(expert_bytes: int) -> int:
    """Slots of the ring where nobody chooses."""
    return max(LEAST_SLOTS, min(MOST_SLOTS, STAGING_BYTES // expert_bytes))


def slot_choices(num_experts: int, expert_bytes: int) -> tuple[int, ...]:
    """Numbers of slots to choose from, ascending, for a model whose layers have ``num_experts``.

    Those between them differ by less than a prediction says: a prompt's time by 3 % at most.
    """
    kept = [slots for slots in CHOICES[:-1] if slots * expert_bytes >= LEAST_BYTES]
    return tuple(sorted({min(slots, num_experts) for slots in (*kept, MOST_SLOTS)}))


def least_slots(num_experts: int, room: int) -> int:
    """Slots that come before any resident: without a ring the CPU computes whole prompts."""
    return min(LEAST_SLOTS, num_experts, room)


def bank_slots(num_slots: int, expert_bytes: int) -> int:
    """Slots that are filled, used and released together."""
    size = num_slots // NUM_BANKS
    if size * expert_bytes < BANK_BYTES:
        size = num_slots // FEW_BANKS
    return max(1, size)
