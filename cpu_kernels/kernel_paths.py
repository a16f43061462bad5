"""The variants of the expert kernels, by number: a number is what compiled code can be given."""

from dataclasses import dataclass
from typing import Literal

from cpu_kernels.weight_kind import KINDS, WeightKind

Activations = Literal["f32", "bf16", "int8"]


@dataclass(frozen=True, slots=True)
class KernelPath:
    """How weights are stored, and what hidden states are rounded to before a product."""

    kind: WeightKind
    activations: Activations

    @property
    def name(self) -> str:
        return f"{self.kind.name}/{self.activations}"


def _activations(kind: WeightKind) -> tuple[Activations, ...]:
    if kind.is_rounded:
        return ("f32", "int8")
    return ("f32",) if kind.codes == "f32" else ("f32", "bf16")


PATHS = tuple(KernelPath(kind, a) for kind in KINDS.values() for a in _activations(kind))


def path_number(kind: WeightKind, activations: Activations) -> int:
    """The place in PATHS; ValueError where no kernel has the two."""
    path = KernelPath(kind, activations)
    if path not in PATHS:
        possible = " or ".join(_activations(kind))
        raise ValueError(f"{kind.name} weights take activations in {possible}, not {activations}")
    return PATHS.index(path)
