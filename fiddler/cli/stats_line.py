"""What a turn cost, in one line, and what a chat cost so far."""

from dataclasses import dataclass, replace
from typing import Self

from fiddler.outputs import RunStats
from offload.units import counted

SEPARATOR = " \N{MIDDLE DOT} "
GIB = 1 << 30


def stats_line(stats: RunStats) -> str:
    """``prompt 512 tok 210 tok/s . decode 148 tok 11.3 tok/s . TTFT 0.4 s . ...``, dots raised.

    What does not apply is left out: an unused cache, the hit rate where no expert has a GPU side,
    VRAM without a GPU.
    """
    cached = f" ({stats.prompt_tokens_cached:,} cached)" if stats.prompt_tokens_cached else ""
    parts = [
        f"prompt {stats.prompt_tokens:,} tok{cached}" + _rate(stats.prefill_tokens_per_s),
        f"decode {stats.output_tokens:,} tok" + _rate(stats.decode_tokens_per_s),
        f"TTFT {_seconds(stats.time_to_first_token_s)}",
    ]
    if stats.expert_tokens_gpu or (stats.expert_tokens_cpu and stats.peak_vram_bytes):
        parts.append(f"GPU-resident {100 * stats.gpu_hit_rate:.0f} %")
    if stats.peak_vram_bytes:
        parts.append(f"VRAM {stats.peak_vram_bytes / GIB:.1f} GiB")
    return SEPARATOR.join(parts)


def folded(line: str, width: int) -> list[str]:
    """Break ``line`` at its separators so that the pieces fit into ``width`` where possible."""
    lines: list[str] = []
    for part in line.split(SEPARATOR):
        if lines and len(lines[-1]) + len(SEPARATOR) + len(part) <= width:
            lines[-1] += SEPARATOR + part
        else:
            lines.append(part)
    return lines


def _rate(tokens_per_s: float) -> str:
    """Three digits that matter; nothing where there is no rate."""
    if tokens_per_s <= 0:
        return ""
    return f" {tokens_per_s:,.0f} tok/s" if tokens_per_s >= 100 else f" {tokens_per_s:.1f} tok/s"


def _seconds(time_s: float) -> str:
    return f"{time_s:.1f} s" if time_s >= 0.1 else f"{time_s * 1000:.0f} ms"


@dataclass(frozen=True, slots=True)
class Totals:
    """All turns of a chat, added up; times are seconds."""

    num_turns: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    output_tokens: int = 0
    busy_s: float = 0.0

    def plus(self, turn: RunStats) -> Self:
        """Return the totals with one more turn."""
        return replace(
            self,
            num_turns=self.num_turns + 1,
            prompt_tokens=self.prompt_tokens + turn.prompt_tokens,
            prompt_tokens_cached=self.prompt_tokens_cached + turn.prompt_tokens_cached,
            output_tokens=self.output_tokens + turn.output_tokens,
            busy_s=self.busy_s + turn.time_to_first_token_s + turn.decode_s,
        )

    def line(self) -> str:
        """The totals in the words of :func:`stats_line`."""
        cached = f" ({self.prompt_tokens_cached:,} cached)" if self.prompt_tokens_cached else ""
        prompt = f"prompt {self.prompt_tokens:,} tok{cached}"
        answers = f"decode {self.output_tokens:,} tok"
        return SEPARATOR.join(
            [counted(self.num_turns, "turn"), prompt, answers, f"{self.busy_s:.1f} s"]
        )
