"""Which number types a model runs in: a pure choice from what was asked and what is stored."""

from dataclasses import dataclass

from cpu_kernels.weight_kind import WeightKind, parse_kind

FLOATS = {"float32": WeightKind("f32"), "bfloat16": WeightKind("bf16")}


@dataclass(frozen=True, slots=True)
class Dtypes:
    """``compute`` for dense weights, activations and KV; ``expert`` for routed experts.

    The latter may be a kind of packed weights, such as ``w4g128z``.
    """

    compute: str
    expert: str

    @property
    def expert_kind(self) -> WeightKind:
        """How the kernels name it."""
        return FLOATS[self.expert] if self.expert in FLOATS else parse_kind(self.expert)

    @property
    def expert_memory(self) -> str:
        """The type of the memory that experts lie in."""
        return self.expert if self.expert in FLOATS else "uint8"


def resolve_dtypes(
    asked: str, stored: str, *, has_gpu: bool, packed: WeightKind | None = None
) -> Dtypes:
    """Choose for ``asked`` in auto, float32, bfloat16 and a checkpoint stored as ``stored``.

    Auto is bfloat16 on a GPU and float32 without one, where bfloat16 activations gain nothing.
    Experts stored in bfloat16 stay so even under float32: widening is exact, and half the bytes.
    ``packed`` experts stay as they are.
    """
    compute = asked if asked != "auto" else ("bfloat16" if has_gpu else "float32")
    if packed is not None:
        return Dtypes(compute, packed.name)
    if compute == "bfloat16" or stored == "bfloat16":
        return Dtypes(compute, "bfloat16")
    return Dtypes(compute, "float32")
