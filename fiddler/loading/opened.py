"""Where weights come from: a checkpoint, as it is stored, or a seed."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from cpu_kernels.weight_kind import WeightKind
from fiddler.config import EngineConfig
from fiddler.loading.model_files import ModelFiles
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.dummy import DummySource
from fiddler.models.dummy_packed import dummy_packing
from fiddler.models.foreign.source import ForeignSource
from fiddler.models.packing import FillPacked, lossless, rounding, stored, stored_bits
from fiddler.models.weights import CheckpointSource, WeightSource


@dataclass(frozen=True, slots=True)
class OpenedWeights:
    """``numbers`` are all weights but those of packed experts; ``packed`` gives those of a kind."""

    numbers: WeightSource
    packed: Callable[[WeightKind], FillPacked]


def open_weights(settings: EngineConfig, files: ModelFiles, reading: ExitStack) -> OpenedWeights:
    """Open the weights and check that all are there; a checkpoint stays mapped while loading."""
    config = files.config
    if settings.load_format == "dummy":
        dummy = DummySource(config, settings.seed)
        return OpenedWeights(dummy, partial(dummy_packing, dummy, config))
    assert files.folder is not None
    checkpoint = reading.enter_context(Checkpoint.open(files.folder))
    return _checkpoint(checkpoint, config)


def _checkpoint(checkpoint: Checkpoint, config: ModelConfig) -> OpenedWeights:
    if config.foreign is not None:
        foreign = ForeignSource(checkpoint, config, config.foreign)
        foreign.check()
        return OpenedWeights(foreign, foreign.packing)
    checkpoint.check(config)
    source = CheckpointSource(checkpoint)
    return OpenedWeights(source, partial(_packed, source, config))


def _packed(source: CheckpointSource, config: ModelConfig, kind: WeightKind) -> FillPacked:
    if config.packed is not None:
        return stored(source, config, kind)
    if kind.is_lossless:
        return lossless(config, stored_bits(source))
    return rounding(source, config, kind)
