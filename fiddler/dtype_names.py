"""What may be asked for as a type of weights, and what is said of anything else."""

import difflib
import re

from cpu_kernels.weight_kind import BF12, PACKED_KINDS
from fiddler.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", *(kind.name for kind in PACKED_KINDS))
_OF_BITS = {
    **{bits: tuple(f"w{bits}g{group}" for group in (128, 64, 32)) for bits in "48"},
    **{"16": ("bfloat16",), "32": ("float32",)},
}


def check_dtype(name: object) -> None:
    """Raise ConfigError unless there is such a type; it names the nearest, not all of them."""
    if name in DTYPES:
        return
    near = " or ".join(map(repr, _near(str(name))))
    raise ConfigError(
        f"{name!r} is no type of weights; did you mean {near}?",
        hint="there are auto, float32, bfloat16, bf12, and those of docs/packed-experts.md: w4 or "
        "w8, then g32, g64 or g128, then z for zero points, then -bf16 for such scales",
    )


def _near(name: str) -> list[str]:
    """At most three: names that look alike, else those of as many bits, as q4_0 and int8 have."""
    # bf16 is no typo of bf12
    known = [dtype for dtype in DTYPES if dtype != BF12.name or "12" in name]
    alike = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)
    bits = re.search(r"4|8|16|32", name)
    return alike or list(_OF_BITS[bits[0] if bits else "16"])
