"""Dividing the layers of one step: :mod:`offload.prefill_split` with this machine's times. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.prefill_split import cpu_share, rows_ahead

LINK_BYTES_PER_S = 50e9  # of hidden states, to the host and back
CPU_START_S = 2e-4  # Python around a layer of the pool, which waits for its input


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCosts:
    """``copy_s``: seconds of the link per expert. ``expert_s(tokens)``: of the CPU.

    ``columns_from``: from how many tokens on the CPU computes an expert by columns.
    """

    copy_s: float
    expert_s: Callable[[int], float]
    columns_from: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Of one layer of a step in which an expert has ``tokens_each`` on average.

    ``num_slots``: that experts pass through on their way to the device. ``state_bytes``: of the
    float32 hidden states that the CPU is sent, and gives back.
    """

    costs: PrefillCosts
    num_slots: int
    tokens_each: float
    state_bytes: int

    def rows_ahead(self, num_cold: int) -> int:
        """How many of the next layer's ``num_cold`` experts to send before its router has run."""
        return rows_ahead(
            self.tokens_each,
            num_cold,
            self.num_slots,
            self.costs.expert_s,
            copy_s=self.costs.copy_s,
            start_s=self._start_s,
            result_s=self._transfer_s,
        )

    def cpu_share(self, counts: Sequence[int], num_ahead: int, ahead_s: float) -> list[int]:
        """Which experts, with ``counts`` tokens, the CPU takes.

        Then ``num_ahead`` of the next layer are sent, which takes ``ahead_s``.
        """
        return cpu_share(
            counts,
            self.costs.expert_s,
            copy_s=self.costs.copy_s,
            ahead_s=ahead_s,
            start_s=self._start_s,
            result_s=self._transfer_s,
        )

    @property
    def _transfer_s(self) -> float:
        """The hidden states' way to the host, or what the CPU gives back: on the link too."""
        return self.state_bytes / LINK_BYTES_PER_S

    @property
    def _start_s(self) -> float:
        """What the CPU's side takes besides experts."""
        return CPU_START_S + 2 * self._transfer_s
