"""What a model's experts are in its files, where that is not what they are in memory."""

from cpu_kernels.weight_kind import BF12
from fiddler.models.config import ModelConfig


def rounding_note(config: ModelConfig, expert_dtype: str) -> str:
    """What is to be said where bf12 is not lossless; "" where it is.

    Numbers of other types are rounded to bfloat16 before they are packed.
    """
    if config.packed is not None or expert_dtype != BF12.name or config.dtype == "bfloat16":
        return ""
    return f"the experts are stored in {config.dtype} and rounded to bfloat16 before packing"
