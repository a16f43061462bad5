"""What columns of 8 bits cost before they are made: groups are padded, so fewer may take more."""

from dataclasses import replace

from cpu_kernels.weight_kind import WeightKind
from fiddler.models.config import ModelConfig
from fiddler.models.outliers import whole_groups
from fiddler.quantize.sensitivity import ladder, share_of


def with_outliers(config: ModelConfig, kind: WeightKind, count: int) -> ModelConfig:
    """The model that will be, as far as sizes go: which inputs are outliers a text will tell."""
    if not count:
        return config
    some = tuple(range(count))
    layers = range(config.num_layers)
    outliers = tuple(some if config.is_moe_layer(layer) else () for layer in layers)
    return replace(config, packed=kind, outliers=outliers)


def outlier_note(config: ModelConfig, kind: WeightKind, count: int) -> str:
    """What is to be said of a number of outliers that takes more than a better choice; "" else."""
    if not count:
        return ""
    *narrow, wide = ladder(config, kind)
    asked, most = _share(config, kind, count), share_of(config, wide)
    same, *others = [_choice(config, one, count) for one in narrow]
    if asked < most and asked <= same[0]:
        return ""
    smallest = min([(most, f"--scheme {wide.name}"), *others])
    share, better = same if same[0] < min(asked, most) else smallest
    return (
        f"{count} outliers beside groups of {kind.group} take {asked:.3f} of the experts' size in"
        f" bfloat16; {better} takes {share:.3f}"
    )


def _choice(config: ModelConfig, kind: WeightKind, count: int) -> tuple[float, str]:
    """As many outliers in whole groups: their share of bfloat16, and the options for it."""
    whole = whole_groups(count, kind.group)
    if whole >= min(config.hidden_size, config.expert_size):
        return float("inf"), ""
    return _share(config, kind, whole), f"--scheme {kind.name} --outliers {whole}"


def _share(config: ModelConfig, kind: WeightKind, count: int) -> float:
    return share_of(with_outliers(config, kind, count), kind)
