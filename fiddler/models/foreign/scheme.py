"""From the ``quantization_config`` of another program to the layout of its matrices.

What is not known is refused by name: a weight that is misread still answers, in nonsense.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fiddler.errors import CheckpointError
from fiddler.models.foreign.fp8 import GROUP as FP8_GROUP
from fiddler.models.foreign.fp8 import Fp8Blocks
from fiddler.models.foreign.int_words import CODES, Awq, Gptq, PackQuantized
from fiddler.models.foreign.layout import Layout
from fiddler.models.foreign.mxfp4 import GROUP as MXFP4_GROUP
from fiddler.models.foreign.mxfp4 import Mxfp4Packed, Mxfp4Stacked

Scheme = Mapping[str, Any]

READABLE = (
    "GPTQ and compressed-tensors in 4 or 8 bits, AWQ, fp8 in blocks of 128 x 128, or MXFP4; "
    "or the plain weights"
)
WHOLE_ROW = (-1, 0, None)  # how group sizes say that a row has one scale
SMALL_GROUPS, BLOCK = (32, 64), 128


def foreign_layout(scheme: Scheme) -> Layout:
    """The layout that a ``quantization_config`` asks for; CheckpointError if it is not known."""
    method = scheme.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise unreadable(f"quant_method {method}")
    if method not in PARSERS:
        raise unreadable(method or "unnamed scheme")
    return PARSERS[method](scheme)


def unreadable(what: str) -> CheckpointError:
    """The error for weights in a layout that is not read."""
    return CheckpointError(
        f"the weights are quantised ({what}), which fiddler cannot read",
        hint=f"take a repository with {READABLE}",
    )


def _gptq(scheme: Scheme) -> Layout:
    stored = scheme.get("checkpoint_format") or "gptq"
    if stored not in ("gptq", "gptq_v2"):
        raise unreadable(f"gptq, checkpoint_format {stored}")
    return Gptq(
        bits=_bits(scheme.get("bits"), "gptq"),
        group=_group(scheme.get("group_size"), "gptq"),
        has_zeros=not scheme.get("sym", True),
        zero_offset=1 if stored == "gptq" else 0,
    )


def _awq(scheme: Scheme) -> Layout:
    version = str(scheme.get("version") or "gemm").lower()
    if version != "gemm":
        raise unreadable(f"awq, version {version}")
    if scheme.get("zero_point") is False:
        raise unreadable("awq without zero points")
    bits = _bits(scheme.get("bits", scheme.get("w_bit")), "awq")
    if bits != 4:
        raise unreadable(f"awq, {bits} bits")
    group = scheme.get("group_size", scheme.get("q_group_size"))
    return Awq(bits=4, group=_group(group, "awq"), has_zeros=True)


def _fp8(scheme: Scheme) -> Layout:
    block, form = scheme.get("weight_block_size"), scheme.get("fmt", "e4m3")
    if form not in ("e4m3", "float8_e4m3fn"):
        raise unreadable(f"fp8, fmt {form}")
    return Fp8Blocks(block=_block(block, "fp8, weight_block_size"))


def _mxfp4(scheme: Scheme) -> Layout:
    return Mxfp4Stacked()


def _compressed_tensors(scheme: Scheme) -> Layout:
    """One scheme for all matrices, whatever their groups are called; which ones, the files say."""
    groups = scheme.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if not found:
        raise unreadable(f"compressed-tensors, config_groups {groups}")
    weights, form = found[0].get("weights"), _format(found[0], scheme)
    if any(g.get("weights") != weights or _format(g, scheme) != form for g in found):
        raise unreadable("compressed-tensors, several schemes in one model")
    if not isinstance(form, str):
        raise unreadable(f"compressed-tensors, format {form}")
    name = f"compressed-tensors, {form}"
    sparsity = scheme.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise unreadable(f"compressed-tensors, sparsity_config {sparsity}")
    if form not in FORMATS:
        raise unreadable(name)
    if not isinstance(weights, dict):
        raise unreadable(f"{name}, weights {weights}")
    return FORMATS[form](weights, name)


def _format(group: Scheme, scheme: Scheme) -> object:
    """A group's own, or that of all."""
    return group.get("format") or scheme.get("format")


def _packed(weights: Scheme, name: str) -> Layout:
    if weights.get("strategy") not in ("group", "channel"):
        raise unreadable(f"{name}, strategy {weights.get('strategy')}")
    return PackQuantized(
        bits=_bits(weights.get("num_bits"), name),
        group=_group(weights.get("group_size"), name),
        has_zeros=not weights.get("symmetric", True),
    )


def _floats(weights: Scheme, name: str) -> Layout:
    """fp8 with a scale for each row, or each block."""
    strategy = weights.get("strategy")
    if weights.get("num_bits") != 8 or strategy not in ("channel", "block"):
        raise unreadable(f"{name}, strategy {strategy}")
    block = (1, 0)
    if strategy == "block":
        block = _block(weights.get("block_structure"), f"{name}, block_structure")
    return Fp8Blocks(block=block, scale="weight_scale")


def _mxfp4_packed(weights: Scheme, name: str) -> Layout:
    if weights.get("group_size") != MXFP4_GROUP or not weights.get("symmetric", True):
        raise unreadable(f"{name}, group_size {weights.get('group_size')}")
    return Mxfp4Packed()


def _bits(bits: object, name: str) -> int:
    if not isinstance(bits, int) or bits not in CODES:
        raise unreadable(f"{name}, {bits} bits")
    return bits


def _group(group: object, name: str) -> int:
    """Columns that share a scale, 0 for all; the kernels' groups must divide them."""
    if group in WHOLE_ROW:
        return 0
    if isinstance(group, int) and (group in SMALL_GROUPS or (group > 0 and group % BLOCK == 0)):
        return group
    raise unreadable(f"{name}, groups of {group}")


def _block(block: object, name: str) -> tuple[int, int]:
    match block:
        case [int(rows), int(cols)] if rows > 0 and cols > 0 and cols % FP8_GROUP == 0:
            return rows, cols
    raise unreadable(f"{name} {block}")


PARSERS: dict[Any, Callable[[Scheme], Layout]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}
FORMATS: dict[str, Callable[[Scheme, str], Layout]] = {
    "pack-quantized": _packed,
    "float-quantized": _floats,
    "mxfp4-pack-quantized": _mxfp4_packed,
}
