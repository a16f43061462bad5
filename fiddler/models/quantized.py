"""What ``config.json`` says of quantised weights. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from cpu_kernels.weight_kind import PACKED_KINDS, ROUNDED_KINDS, WeightKind
from fiddler.errors import CheckpointError, QuantizeError
from fiddler.models.config import ModelConfig
from fiddler.models.fields import bad_value, integer
from fiddler.models.foreign.scheme import foreign_layout

QUANT_METHOD = "fiddler"
VERSION = 1  # of the layout in docs/quantized-checkpoints.md
BFLOAT16 = ("embeddings", "attention", "norms", "routers", "shared experts", "dense layers")


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a ``config.json``, empty if there is none."""
    scheme = raw.get("quantization_config")
    if scheme is None:
        return {}
    if isinstance(scheme, str):
        return {"quant_method": scheme}
    if not isinstance(scheme, dict):
        raise bad_value("quantization_config", scheme, "an object")
    return scheme


def quantised_experts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``ModelConfig`` about quantised experts; none for plain weights.

    Raises :class:`CheckpointError` for what is not known, or a later version of fiddler wrote.
    """
    scheme = quantization_of(raw)
    if not scheme:
        return {}
    if scheme.get("quant_method") == QUANT_METHOD:
        return _own_experts(scheme, raw)
    layout = foreign_layout(scheme)
    stored = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.")
    return {"packed": layout.kind(stored), "foreign": layout}


def _own_experts(scheme: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    if scheme.get("version") != VERSION:
        raise CheckpointError(
            f"the weights are quantised in version {scheme.get('version')!r} of fiddler's layout,"
            f" this release reads {VERSION}",
            hint="upgrade fiddler, or quantise the model again",
        )
    experts = scheme.get("experts")
    experts = experts if isinstance(experts, dict) else {}
    if "kinds" not in experts:
        return {"packed": _kind(experts.get("kind")), "outliers": _outliers(experts, raw)}
    names = experts["kinds"]
    if not isinstance(names, list) or len(names) != raw.get("num_hidden_layers"):
        raise CheckpointError("the config.json does not name the kind of each layer's experts")
    kinds = tuple(_kind(name) for name in names)
    return {"packed": kinds[0], "mixed": kinds}


def _kind(name: object) -> WeightKind:
    found = next((kind for kind in PACKED_KINDS if kind.name == name), None)
    if found is None:
        raise CheckpointError(f"the config.json names no known kind of packed experts: {name!r}")
    return found


def _outliers(experts: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Of each layer, as many of all that have experts; () if no columns are kept in 8 bits."""
    layers = experts.get("outliers")
    if layers is None:
        return ()
    if not isinstance(layers, list) or not all(isinstance(layer, list) for layer in layers):
        raise bad_value("experts.outliers", layers, "a list of inputs for each layer")
    hidden = range(integer(raw, "hidden_size"))
    sizes = set(map(len, layers)) - {0}
    is_right = len(layers) == raw.get("num_hidden_layers") and len(sizes) == 1
    if not is_right or not all(_are_inputs(layer, hidden) for layer in layers):
        raise CheckpointError("the config.json names outliers that the model's layers do not have")
    return tuple(tuple(layer) for layer in layers)


def _are_inputs(layer: list[Any], hidden: range) -> bool:
    """Whole numbers of inputs, each once."""
    are_known = all(type(i) is int and i in hidden for i in layer)
    return are_known and len(set(layer)) == len(layer)


def check_groups(config: ModelConfig, kind: WeightKind, option: str) -> None:
    """Raise :class:`QuantizeError` for groups of codes that do not divide the experts' sides.

    The hint names kinds that do, as values of ``option``.
    """
    sizes = {"hidden size": config.hidden_size, "expert width": config.expert_size}
    for what, size in sizes.items():
        if kind.is_rounded and size % kind.group:
            raise QuantizeError(
                f"groups of {kind.group} do not divide the {what} of {size}",
                hint=_fitting(config, option),
            )


def _fitting(config: ModelConfig, option: str) -> str:
    sizes = config.hidden_size, config.expert_size
    groups = {kind.group for kind in ROUNDED_KINDS if not any(s % kind.group for s in sizes)}
    if not groups:
        return "no kind has groups that do"
    return f"take groups of {' or '.join(map(str, sorted(groups)))}: {option} w4g{max(groups)}"


def quantization_config(
    kind: WeightKind,
    made: dict[str, Any],
    outliers: list[list[int]] | None = None,
    mixed: Sequence[WeightKind] = (),
) -> dict[str, Any]:
    """The record that :func:`quantised_experts` reads; ``made`` tells how, for people.

    ``outliers``: of each layer, the inputs whose columns have 8 bits. ``mixed``: each layer's kind,
    where they differ.
    """
    experts: dict[str, Any] = {"kind": kind.name}
    if mixed:
        experts = {"kinds": [one.name for one in mixed]}
    if outliers is not None:
        experts["outliers"] = outliers
    return {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "experts": experts,
        "bfloat16": list(BFLOAT16),
        "made": made,
    }
