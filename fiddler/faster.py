"""Which settings would make a plan faster, or give its KV cache room for all requests.

Every figure is another plan's, made and predicted as if that had been asked for.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum, auto
from typing import Any

from fiddler.advice import Case, Planned, make
from fiddler.enough_ram import ram_for_all, without_bound
from fiddler.errors import FiddlerError
from fiddler.models.footprint import kv_bytes
from fiddler.planning import plan_s
from offload.layout import RAM_HEADROOM_DIVISOR, usable_vram_bytes
from offload.plan import GpuSide
from offload.units import GIB, gib_at_least, size_text

LEAST_CONTEXT = 1024  # that is proposed: nobody has less than 2,048 unasked (docs/planning.md)
LEAST_GAIN = 0.03  # of a proposal; a prediction says no less
MOST_SHOWN = 3
MORE_VRAM = 4 * GIB


class Kind(Enum):
    """What is given up for speed."""

    MEMORY = auto()
    REQUESTS = auto()
    CONTEXT = auto()
    KV = auto()
    EXPERTS = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Faster:
    """A way to go faster: an ``option`` or a part to buy, and its ``cost``; tokens a second.

    ``gain``: of the objective's time, 0.1 for 1.1 times as fast.
    """

    kind: Kind
    option: str
    cost: str
    decode: tuple[float, float]
    prefill: tuple[float, float]
    gain: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        before, after = (
            {"decode": decode, "prefill": prefill}
            for decode, prefill in zip(self.decode, self.prefill, strict=True)
        )
        fields = asdict(self)
        return {key: fields[key] for key in ("option", "cost", "gain")} | {
            "tokens_per_s_before": before,
            "tokens_per_s_after": after,
        }


Proposal = tuple[str, str, Case]  # option, cost, case


def ways_to_go_faster(made: Planned) -> list[Faster]:
    """The cheapest that help, in the order of what they cost: see :func:`cheapest`."""
    return cheapest(_tried(made))


def cheapest(ways: Iterable[Faster]) -> list[Faster]:
    """Of ``ways``, the cheapest first, those that gain LEAST_GAIN and more than all cheaper ones.

    MOST_SHOWN of them: the one that gains most, one of each other kind, and where that leaves room
    others.
    """
    adding = list(_adding(ways))
    kept = {len(adding) - 1} if adding else set()  # their places
    for may_repeat in (False, True):
        for place, way in enumerate(adding):
            is_new = all(adding[n].kind is not way.kind for n in kept)
            if (is_new or may_repeat) and len({*kept, place}) <= MOST_SHOWN:
                kept.add(place)
    return [adding[place] for place in sorted(kept)]


def _adding(ways: Iterable[Faster]) -> Iterator[Faster]:
    """Those that gain more than all before them; memory to buy is tried last, so more than all."""
    most = -math.inf
    for way in ways:
        if way.gain >= LEAST_GAIN and way.gain > most:
            most = way.gain
            yield way


def _tried(made: Planned) -> Iterator[Faster]:
    for kind, propose in PROPOSALS:
        for option, cost, case in propose(made):
            try:
                after = make(case)
            except FiddlerError:  # it does not fit, or this model or GPU cannot
                continue
            yield _faster(made, after, kind, option, cost)


def _faster(before: Planned, after: Planned, kind: Kind, option: str, cost: str) -> Faster:
    context = min(before.plan.context_tokens, after.plan.context_tokens)
    before_s, after_s = (
        plan_s(made.question, made.case.used, made.plan, context_tokens=context)[0]
        for made in (before, after)
    )
    return Faster(
        kind=kind,
        option=option,
        cost=cost,
        decode=(before.speeds.decode_rate, after.speeds.decode_rate),
        prefill=(before.speeds.prefill_rate, after.speeds.prefill_rate),
        gain=before_s / after_s - 1,
    )


def _one_request(made: Planned) -> Iterator[Proposal]:
    if made.case.settings.max_num_seqs is None:
        yield "--batch 1", "one request at a time", made.case.asking(max_num_seqs=1)


def _half_the_context(made: Planned) -> Iterator[Proposal]:
    half = made.plan.context_tokens // 2
    if half >= LEAST_CONTEXT:
        yield f"--context {half}", "half the context", made.case.asking(max_model_len=half)


def _smaller_kv(made: Planned) -> Iterator[Proposal]:
    model, now = made.case.model, made.question.dtypes.kv
    for kind, bits in (("fp8", 8), ("int8", 8), ("int4", 4)):
        if kv_bytes(model, kind) < kv_bytes(model, now):
            cost = f"KV in {bits} bits: fiddler eval"
            yield f"--kv-dtype {kind}", cost, made.case.asking(kv_cache_dtype=kind)


def _smaller_experts(made: Planned) -> Iterator[Proposal]:
    model, dtypes = made.case.model, made.question.dtypes
    (now, *_) = dtypes.expert_kinds
    if model.packed is not None:  # they are stored so
        return
    is_auto = made.case.settings.dtype == "auto"  # the rest stays what it is
    if is_auto and now.codes == "bf16" and model.dtype == "bfloat16":
        yield "--dtype bf12", "the same numbers in 12 bits", made.case.asking(dtype="bf12")
    for kind, bits in (("w8g128", 8), ("w4g128", 4)):
        if not now.is_packed or bits < now.bits:
            cost = f"experts in {bits} bits: fiddler eval"
            yield f"--dtype {kind}", cost, made.case.asking(dtype=kind)


def _free_vram(made: Planned) -> Iterator[Proposal]:
    more = made.plan.vram_budget_bytes + MORE_VRAM
    if made.plan.gpu_side is GpuSide.CUDA and more <= usable_vram_bytes(made.case.hardware):
        gib = gib_at_least(more)
        cost = f"{size_text(MORE_VRAM)} more of the card"
        yield f"--vram-gb {gib}", cost, made.case.asking(vram_gb=float(gib))


def _free_ram(made: Planned) -> Iterator[Proposal]:
    if made.plan.cached is None:
        return
    needed = ram_for_all(made)
    if needed <= made.case.hardware.ram_available_bytes:
        gib = gib_at_least(needed)
        yield f"--ram-gb {gib}", "RAM that is free", made.case.asking(ram_gb=float(gib))


def _bought_ram(made: Planned) -> Iterator[Proposal]:
    if made.plan.cached is None:
        return
    free, needed = made.case.hardware.ram_available_bytes, ram_for_all(made)
    if needed > free:
        available = needed + needed // (RAM_HEADROOM_DIVISOR - 1)
        more = math.ceil((available - free) / GIB)
        yield f"{more} GiB more RAM", "memory to buy", without_bound(made.case, more * GIB)


# --- room for all requests ---


def ways_to_have_room(made: Planned) -> list[str]:
    """Options with each of which the KV cache holds all requests that were asked for at once.

    As many tokens of each as now, or fewer with the context that is proposed; none if nobody waits.
    """
    asked, speeds = made.case.settings.max_num_seqs, made.speeds
    if asked is None or speeds.rows == asked:
        return []
    found = []
    for propose in (_all_their_context, _smaller_kv, _smaller_experts, _free_vram):
        for option, _, case in propose(made):
            try:
                after = make(case)
            except FiddlerError:
                continue
            if after.speeds.rows == asked:
                found.append(option)
                break  # the others of its kind cost more
    return found


def _all_their_context(made: Planned) -> Iterator[Proposal]:
    """What the cache gives each request; a little less where less context makes it smaller."""
    plan, asked = made.plan, made.case.settings.max_num_seqs
    assert asked is not None
    pages = plan.num_pages // asked
    for tokens in (pages * plan.page_size, pages * 15 // 16 * plan.page_size):
        if tokens >= LEAST_CONTEXT:
            yield f"--context {tokens}", "less context", made.case.asking(max_model_len=tokens)


# The cheapest first: memory that is there, settings that nothing is lost by but what they say, what
# rounds less before what rounds more, then memory to buy.
PROPOSALS: tuple[tuple[Kind, Callable[[Planned], Iterator[Proposal]]], ...] = (
    (Kind.MEMORY, _free_ram),
    (Kind.MEMORY, _free_vram),
    (Kind.REQUESTS, _one_request),
    (Kind.CONTEXT, _half_the_context),
    (Kind.KV, _smaller_kv),
    (Kind.EXPERTS, _smaller_experts),
    (Kind.MEMORY, _bought_ram),
)
