"""A simulation's verdicts as a person reads them."""

from typing import TYPE_CHECKING

from fiddler.cli.console import echo, output_console
from fiddler.cli.profile_tables import rate_table

if TYPE_CHECKING:
    from fiddler.speed import RatesHere
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
        table = rate_table("policy", "hits", "cold a token", "copied a token", "tok/s", "limit")
        for verdict in verdicts:
            table.add_row(
                verdict.policy,
                f"{verdict.hit_rate:.1%}",
                _size(verdict.cold_bytes),
                _size(verdict.moved_bytes),
                _rate(verdict.predicted_tokens_per_s),
                _rate(verdict.limit_tokens_per_s),
            )
        console.print(f"\n{label}\n")
        console.print(table)
    console.print()
    for name, meaning in POLICIES.items():
        echo(f"{name}: {meaning}")
    echo(f"limit: {_rates(peaks)}")


def print_prediction(used: "RatesHere | None", *, is_known: bool) -> None:
    """What tok/s are, and by whose rates; ``is_known``: what the model asks for is."""
    for line in _prediction_lines(used, is_known=is_known):
        echo(line)


def _prediction_lines(used: "RatesHere | None", *, is_known: bool) -> list[str]:
    from fiddler.speed import NO_GPU, PROMPT

    if used is None:
        return ["tok/s: not predicted from --gbps alone"]
    if not is_known:
        return [
            "tok/s: not predicted, as the trace is of an earlier release: make a new one with "
            "fiddler profile MODEL --trace"
        ]
    whose = f"the rates of {used.name}: {used.origin}" if used.name else "this machine's rates"
    lines = [f"tok/s: predicted as in fiddler plan, behind {PROMPT:,} tokens", f"- by {whose}"]
    if used.why_not_own:
        fix = "--hardware names another" if used.why_not_own == NO_GPU else "fiddler calibrate"
        lines.append(f"- {used.why_not_own}: {fix}")
    return lines


def _rate(tokens_per_s: float | None) -> str:
    from fiddler.cli.faster_table import rate

    return "" if tokens_per_s is None else rate(tokens_per_s)


def _rates(peaks: "Peaks") -> str:
    return (
        f"host memory gives {peaks.joint_gbps:,g} GB/s, PCIe {peaks.pcie_gbps:,g}, "
        f"GPU memory {peaks.gpu_read_gbps:,g}"
    )


def _size(num_bytes: float) -> str:
    from offload.units import size_text

    return size_text(round(num_bytes)) if num_bytes else ""
