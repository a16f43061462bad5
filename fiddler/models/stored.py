"""What a model's experts are in its files, where that is not what they are in memory."""

from cpu_kernels.weight_kind import BF12
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.models.footprint import DTYPE_BYTES


def stored_bytes(config: ModelConfig, expert_bytes: int) -> int:
    """Of one routed expert in its files; ``expert_bytes`` is what it takes in memory.

    Stored codes are counted as those that they become: but for MXFP4, whose take twice as many
    bits, they have as many.
    """
    if config.packed is not None:
        return expert_bytes
    return config.expert_numel * DTYPE_BYTES[config.dtype]


def packing_note(config: ModelConfig, dtypes: Dtypes) -> str:
    """What is to be said where experts stay on disk that are packed whenever they are read."""
    (kind, *_) = dtypes.expert_kinds
    if config.packed is not None or not kind.is_packed:
        return ""
    return (
        f"experts on disk are read in {config.dtype} and packed each time; "
        f"fiddler quantize --scheme {kind.name} keeps them packed"
    )


def narrowing_note(config: ModelConfig, dtypes: Dtypes, asked: str) -> str:
    """What is to be said where nobody asked for bfloat16, which a GPU takes by itself."""
    if asked != "auto" or dtypes.compute != "bfloat16" or config.dtype == "bfloat16":
        return ""
    return (
        f"what is stored in {config.dtype} is rounded to bfloat16 for the GPU; "
        "--dtype float32 keeps it"
    )


def rounding_note(config: ModelConfig, expert_dtype: str) -> str:
    """What is to be said where bf12 is not lossless; "" where it is.

    Numbers of other types are rounded to bfloat16 before they are packed.
    """
    if config.packed is not None or expert_dtype != BF12.name or config.dtype == "bfloat16":
        return ""
    return f"the experts are stored in {config.dtype} and rounded to bfloat16 before packing"
