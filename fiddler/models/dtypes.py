"""Which number types a model runs in: a pure choice from what was asked and what is stored."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dtypes:
    """``compute`` for dense weights, activations and KV; ``expert`` for routed experts."""

    compute: str
    expert: str


def resolve_dtypes(asked: str, stored: str, *, has_gpu: bool) -> Dtypes:
    """Choose for ``asked`` in auto, float32, bfloat16 and a checkpoint stored as ``stored``.

    Auto is bfloat16 on a GPU and float32 without one, where bfloat16 activations gain nothing.
    Experts stored in bfloat16 stay so even under float32: widening is exact, and half the bytes.
    """
    compute = asked if asked != "auto" else ("bfloat16" if has_gpu else "float32")
    if compute == "bfloat16" or stored == "bfloat16":
        return Dtypes(compute, "bfloat16")
    return Dtypes(compute, "float32")
