"""Kinds of expert weights: floats as they are, or packed in blocks of 16 rows.

A rounded weight is ``scale[n, k // group] * (code[n, k] - zero[n, k // group])``. ``bf12`` are
bfloat16 weights in 12 bits, without loss (:mod:`cpu_kernels.lossless`).
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

Codes = Literal["f32", "bf16", "bf12", "int8", "int4"]
Scales = Literal["f16", "bf16"]

BITS: dict[Codes, int] = {"f32": 32, "bf16": 16, "bf12": 12, "int8": 8, "int4": 4}
ROUNDED_CODES: tuple[Codes, ...] = ("int4", "int8")
PACKED_CODES: tuple[Codes, ...] = (*ROUNDED_CODES, "bf12")
GROUPS = (32, 64, 128)
SCALES: tuple[Scales, ...] = ("f16", "bf16")


@dataclass(frozen=True, slots=True)
class WeightKind:
    """How one model's expert weights are stored; ValueError for what no kernel knows."""

    codes: Codes
    # neighbours along k that share a scale, or that parts of a row are cut in; 0 for floats
    group: int = 0
    scales: Scales = "f16"
    has_zeros: bool = False  # a zero point per row and group; else it is half of the codes' range

    def __post_init__(self) -> None:
        if self.codes not in BITS:
            raise ValueError(f"codes must be one of {', '.join(BITS)}, not {self.codes!r}")
        if self.is_packed and self.group not in GROUPS:
            raise ValueError(f"{self.codes} weights need groups of 32, 64 or 128, not {self.group}")
        if self.is_packed and self.scales not in SCALES:
            raise ValueError(f"scales must be f16 or bf16, not {self.scales!r}")
        own = (self.group, self.scales, self.has_zeros)
        if self.is_lossless and own != (64, "bf16", False):
            raise ValueError("bf12 weights have groups of 64, bf16 scales and no zero points")
        if not self.is_packed and own != (0, "f16", False):
            raise ValueError(f"{self.codes} weights have no groups, scales or zero points")

    @property
    def bits(self) -> int:
        """Bits of one code, scales not counted."""
        return BITS[self.codes]

    @property
    def is_packed(self) -> bool:
        return self.codes in PACKED_CODES

    @property
    def is_rounded(self) -> bool:
        """Whether numbers are rounded to these weights: codes with scales."""
        return self.codes in ROUNDED_CODES

    @property
    def is_lossless(self) -> bool:
        """Whether these are bfloat16 numbers in fewer bits."""
        return self.codes == "bf12"

    @property
    def max_code(self) -> int:
        assert self.is_rounded, self
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric kind: 8 or 128."""
        assert self.is_rounded, self
        return 1 << (self.bits - 1)

    @property
    def name(self) -> str:
        """``bf16``; ``w4g128``; with zero points ``w4g128z``; with bf16 scales ``w4g128z-bf16``."""
        if not self.is_rounded:
            return self.codes
        zeros = "z" if self.has_zeros else ""
        scales = "-bf16" if self.scales == "bf16" else ""
        return f"w{self.bits}g{self.group}{zeros}{scales}"


ROUNDED_KINDS = tuple(
    WeightKind(codes, group, scales, has_zeros)
    for codes, group, has_zeros, scales in product(ROUNDED_CODES, GROUPS, (False, True), SCALES)
)
BF12 = WeightKind("bf12", 64, "bf16")  # a power of two for each row
PACKED_KINDS = (*ROUNDED_KINDS, BF12)
KINDS = {kind.name: kind for kind in (WeightKind("f32"), WeightKind("bf16"), *PACKED_KINDS)}


def parse_kind(name: str) -> WeightKind:
    """The kind called ``name``; ValueError with the known names if there is none."""
    if name not in KINDS:
        raise ValueError(f"no weights are called {name!r}: choose one of {', '.join(KINDS)}")
    return KINDS[name]
