"""The pages of ``--html``: a profile's, a plan's, a benchmark's."""

from collections.abc import Sequence

from fiddler.held_out import ProfileResult
from fiddler.report.entropy import entropy_line
from fiddler.report.heatmap import Heatmap, heatmap_svg
from fiddler.report.memory_map import memory_map, memory_svg
from fiddler.report.page import Section, Table, page
from fiddler.report.roofline import GIGA, Point, Roof, roofline_svg
from offload.hardware import Hardware
from offload.placement import Placement
from offload.plan import Plan
from offload.planner import resident_shares
from offload.popularity import Popularity
from offload.units import size_text


def profile_page(result: ProfileResult) -> str:
    """Use of experts, and what a placement by it catches of unseen text."""
    profile = result.profile
    num_experts = profile.popularity.counts_LE.shape[1]
    total = len(result.moe_layers) * num_experts
    held_out = Popularity(result.held_out_LE)
    shown = heatmap(profile.popularity, result.placement, result.moe_layers, judged_by=held_out)
    rates = [result.present] if result.present.num_resident else []
    table = Table(
        ("experts on the GPU", "this profile", "at 95 %", "no profile", "best possible"),
        tuple(
            (
                f"{row.num_resident:,} of {total:,}",
                f"{row.profile:.1%}",
                f"{100 * row.low:.1f}-{row.high:.1%}",
                f"{row.uniform:.1%}",
                f"{row.best:.1%}",
            )
            for row in (*rates, *result.by_share)
        ),
    )
    return page(
        f"{profile.model}: use of its experts",
        [
            f"{profile.num_tokens:,} tokens counted, {result.held_out_tokens:,} kept apart to "
            "judge by.",
            entropy_line(profile.popularity, result.moe_layers),
        ],
        [
            Section("Use by layer", pictures=(heatmap_svg(shown, "Use of experts by layer"),)),
            Section(
                "Hit rates on unseen text",
                "Share of routes that meet an expert on the GPU, by how many are there. The "
                "interval is for texts like this one.",
                table=table,
            ),
        ],
    )


def plan_page(
    name: str,
    plan: Plan,
    hardware: Hardware,
    moe_layers: Sequence[int],
    num_experts: int,
    *,
    more_facts: Sequence[str] = (),
    more_notes: Sequence[str] = (),
    more: Sequence[Section] = (),
) -> str:
    """What lives where, and which experts; ``more`` sections stand before those."""
    memories = memory_map(plan, hardware)
    rows = [
        (part.name, memory.name, size_text(part.num_bytes))
        for memory in memories
        for part in memory.parts
        if part.num_bytes
    ]
    read = plan.per_token
    token = (
        ("experts on the GPU side", size_text(read.hot_experts)),
        ("experts elsewhere", size_text(read.cold_experts)),
        ("dense weights", size_text(read.dense)),
        (f"KV cache at {plan.context_tokens:,} tokens", size_text(read.kv)),
    )
    sections = [
        Section(
            "What lives where",
            pictures=(memory_svg(memories, "Memory by what fills it"),),
            table=Table(("part", "memory", "size"), tuple(rows)),
        ),
        Section("What one token reads", table=Table(("part", "bytes"), token)),
    ]
    if not plan.popularity.is_uniform:
        shown = heatmap(plan.popularity, plan.placement, tuple(moe_layers))
        picture = heatmap_svg(shown, "Use of experts by layer, and which are on the GPU")
        sections.append(Section(f"Use of experts: {plan.popularity_name}", pictures=(picture,)))
    return page(
        f"{name}: what would run where",
        [
            " and ".join(filter(None, (hardware.gpu_name, hardware.cpu_name))),
            f"{plan.placement.num_resident:,} of {len(moe_layers) * num_experts:,} experts on the "
            f"GPU side, expected to be met by {plan.expected_hit_rate:.1%} of routes "
            f"({plan.popularity_name}).",
            *(f"{fact}." for fact in more_facts),
            *(f"Note: {note}." for note in (*plan.notes, *more_notes)),
        ],
        [*sections[:1], *more, *sections[1:]],
    )


def bench_page(
    title: str,
    notes: Sequence[str],
    roofs: Sequence[Roof],
    points: Sequence[Point],
    table: Table,
) -> str:
    """Measured rates, and where they lie below what the machine could give."""
    picture = roofline_svg(roofs, points, "Operations a second by operations a byte")
    figures = tuple(
        (p.name, f"{p.intensity:,.3g}", f"{p.flops / GIGA:,.1f} GFLOP/s") for p in points
    )
    return page(
        title,
        notes,
        [
            Section(
                "Speed",
                "Tokens a second, beside the limit of this machine's bandwidths.",
                table=table,
            ),
            Section(
                "Roofline",
                "A point below a slope waits for that memory; one below a ceiling, for arithmetic. "
                "Beside a GPU, decoding is two points: experts in host memory, and all that lies "
                "on the GPU; a prompt whose experts stream to the GPU is one below host memory, "
                "which CPU and PCIe read together.",
                pictures=(picture,),
                table=Table(("point", "operations a byte", "reached"), figures),
            ),
        ],
    )


def heatmap(
    popularity: Popularity,
    placement: Placement,
    moe_layers: tuple[int, ...],
    judged_by: Popularity | None = None,
) -> Heatmap:
    """The picture's figures; hits are expected ones, or of the counts ``judged_by``."""
    if judged_by is None:
        hits_L = resident_shares(placement, popularity)
    else:
        hits_L = [
            float(row_E[sorted(experts)].sum() / max(1, row_E.sum()))
            for row_E, experts in zip(judged_by.counts_LE, placement.resident, strict=True)
        ]
    bits_L = popularity.entropy_bits()
    return Heatmap(
        layers=moe_layers,
        shares_ME=popularity.shares()[list(moe_layers)],
        residents_M=tuple(len(placement.resident[layer]) for layer in moe_layers),
        hits_M=tuple(hits_L[layer] for layer in moe_layers),
        bits_M=tuple(bits_L[layer] for layer in moe_layers),
    )
