"""How the last step of many tokens was divided, and how far the CPU's side lagged behind."""

from dataclasses import dataclass


@dataclass(slots=True)
class StepRecord:
    """Sums over a step's layers; seconds are foreseen but ``cpu_wait_s``.

    ``cpu_wait_s``: how long Python waited for the workers once the device had all its kernels. The
    device may still be busy then, so only a wait beyond ``link_s`` held it up.
    """

    num_tokens: int
    cpu_experts: int = 0
    sent_experts: int = 0
    cpu_s: float = 0.0
    link_s: float = 0.0
    cpu_wait_s: float = 0.0

    def add_split(self, cpu_experts: int, cpu_s: float, sent_experts: int, link_s: float) -> None:
        """One layer: the CPU's experts and their seconds; those sent, and theirs."""
        self.cpu_experts += cpu_experts
        self.cpu_s += cpu_s
        self.sent_experts += sent_experts
        self.link_s += link_s

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens: {self.cpu_experts} experts on the CPU "
            f"({self.cpu_s * 1e3:.1f} ms foreseen, waited {self.cpu_wait_s * 1e3:.1f} ms), "
            f"{self.sent_experts} sent ({self.link_s * 1e3:.1f} ms foreseen)"
        )
