"""What ``config.json`` says of quantised weights. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from cpu_kernels.weight_kind import PACKED_KINDS, WeightKind
from fiddler.errors import CheckpointError, QuantizeError
from fiddler.models.config import ModelConfig
from fiddler.models.foreign.scheme import foreign_layout

QUANT_METHOD = "fiddler"
VERSION = 1  # of the layout in docs/quantized-checkpoints.md
BFLOAT16 = ("embeddings", "attention", "norms", "routers", "shared experts", "dense layers")


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a ``config.json``, empty if there is none."""
    scheme = raw.get("quantization_config")
    if scheme is None:
        return {}
    return scheme if isinstance(scheme, dict) else {"quant_method": scheme}


def quantised_experts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``ModelConfig`` about quantised experts; none for plain weights.

    Raises :class:`CheckpointError` for what is not known, or a later version of fiddler wrote.
    """
    scheme = quantization_of(raw)
    if not scheme:
        return {}
    if scheme.get("quant_method") == QUANT_METHOD:
        return {"packed": _own_kind(scheme)}
    layout = foreign_layout(scheme)
    stored = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    return {"packed": layout.kind(stored), "foreign": layout}


def _own_kind(scheme: Mapping[str, Any]) -> WeightKind:
    if scheme.get("version") != VERSION:
        raise CheckpointError(
            f"the weights are quantised in version {scheme.get('version')!r} of fiddler's layout,"
            f" this release reads {VERSION}",
            hint="upgrade fiddler, or quantise the model again",
        )
    experts = scheme.get("experts")
    name = experts.get("kind") if isinstance(experts, dict) else None
    found = next((kind for kind in PACKED_KINDS if kind.name == name), None)
    if found is None:
        raise CheckpointError(f"the config.json names no known kind of packed experts: {name!r}")
    return found


def check_groups(config: ModelConfig, kind: WeightKind, option: str) -> None:
    """Raise :class:`QuantizeError` for groups that do not divide the experts' sides.

    The hint names kinds that do, as values of ``option``.
    """
    sizes = {"hidden size": config.hidden_size, "expert width": config.expert_size}
    for what, size in sizes.items():
        if size % kind.group:
            raise QuantizeError(
                f"groups of {kind.group} do not divide the {what} of {size}",
                hint=_fitting(config, option),
            )


def _fitting(config: ModelConfig, option: str) -> str:
    sizes = config.hidden_size, config.expert_size
    groups = {kind.group for kind in PACKED_KINDS if not any(s % kind.group for s in sizes)}
    if not groups:
        return "no kind has groups that do"
    return f"take groups of {' or '.join(map(str, sorted(groups)))}: {option} w4g{max(groups)}"


def quantization_config(kind: WeightKind, made: dict[str, Any]) -> dict[str, Any]:
    """The record that :func:`quantised_experts` reads; ``made`` tells how, for people."""
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "experts": {"kind": kind.name},
        "bfloat16": list(BFLOAT16),
        "made": made,
    }
