"""One finding of ``fiddler doctor``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mend:
    """What a machine gains once a finding is mended.

    ``link`` and ``memory``: so many times what PCIe carries and what the CPU reads of experts.
    ``hand_over_s``: less for each layer of a decode step. Bytes: more that are free.
    ``all_instructions``: kernels use all that the CPU has, and not what FIDDLER_ISA leaves.
    """

    link: float = 1.0
    memory: float = 1.0
    hand_over_s: float = 0.0
    vram_bytes: int = 0
    ram_bytes: int = 0
    all_instructions: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Tokens a second of one request of ``shape``, predicted by the rates of ``machine``.

    Written and read (a prompt of 1,024 tokens), each as it is and with the finding mended.
    """

    shape: str
    machine: str
    decode: float
    mended_decode: float
    prefill: float
    mended_prefill: float


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, what to do, and what it costs; fiddler cannot run if fatal.

    ``mend`` None: what it costs cannot be told in tokens a second, and ``effect`` says all.
    """

    what: str
    todo: str
    effect: str = ""
    is_fatal: bool = False
    mend: Mend | None = None
    cost: Cost | None = None
