"""A simulation's verdicts as a person reads them."""

from typing import TYPE_CHECKING

from fiddler.cli.console import output_console
from fiddler.cli.profile_tables import rate_table

if TYPE_CHECKING:
    from offload.limits import Peaks
    from offload.simulation import Verdict

POLICIES = {
    "no profile": "experts placed evenly, and left there",
    "static": "placed by the profile, or by the routes before",
    "best static": "placed by these very routes: no static placement has more hits",
    "lru": "every miss comes over PCIe, in each layer for what was not used for longest",
    "adaptive": "--placement adaptive, decided by the engine's own code",
    "oracle": "knows the future: no policy has more hits",
}


def print_verdicts(found: "dict[str, list[Verdict]]", title: str, peaks: "Peaks") -> None:
    """A table for each budget, by what it is called, what the policies do, and what limits them."""
    console = output_console()
    console.print(title, style="bold")
    for label, verdicts in found.items():
        table = rate_table("policy", "hits", "cold/token", "copied/token", "limit, tok/s")
        for verdict in verdicts:
            table.add_row(
                verdict.policy,
                f"{verdict.hit_rate:.1%}",
                _size(verdict.cold_bytes),
                _size(verdict.moved_bytes),
                f"{verdict.tokens_per_s:,.1f}",
            )
        console.print(f"\n{label}\n")
        console.print(table)
    console.print()
    for name, meaning in POLICIES.items():
        console.print(f"{name}: {meaning}", soft_wrap=True)
    console.print(f"limit: {_rates(peaks)} (--gbps)", soft_wrap=True)


def _rates(peaks: "Peaks") -> str:
    return (
        f"host memory gives {peaks.joint_gbps:,g} GB/s, PCIe {peaks.pcie_gbps:,g}, "
        f"GPU memory {peaks.gpu_read_gbps:,g}"
    )


def _size(num_bytes: float) -> str:
    from offload.units import size_text

    return size_text(round(num_bytes)) if num_bytes else ""
