"""Quantises a model folder into another: what is made, and what is told of it."""

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler.corpus import read_text_corpus
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.quantized import quantization_config
from fiddler.models.stored import rounding_note
from fiddler.models.weights import CheckpointSource, WeightSource
from fiddler.quantize.calibration import Calibration, cut_windows
from fiddler.quantize.expert import least_tokens
from fiddler.quantize.job import QuantizeJob, checked, identity
from fiddler.quantize.layers import Layers
from fiddler.quantize.measure import measure_losses, some_windows
from fiddler.quantize.outlier_size import outlier_note, with_outliers
from fiddler.quantize.plan import Shard, plan_shards
from fiddler.quantize.sensitivity import choose_kinds, ladder
from fiddler.quantize.target import Target
from fiddler.text.tokenizer import Tokenizer

__all__ = ["QuantizeJob", "QuantizedModel", "quantize"]

_log = logging.getLogger("fiddler.quantize")

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModel:
    """What was made. ``unfitted``: (layer, expert) of those that saw too little of the text.

    ``layers_of``: the layers of each kind of experts.
    """

    folder: Path
    nbytes: int
    expert_bytes: int
    bf16_expert_bytes: int
    num_experts: int
    calibration_tokens: int
    least_tokens: int
    unfitted: tuple[tuple[int, int], ...]
    layers_of: dict[str, list[int]]


def quantize(job: QuantizeJob, on_progress: Progress | None = None) -> QuantizedModel:
    """Make the folder; what can be refused is refused before the first weight is read.

    Raises :class:`QuantizeError`, :class:`fiddler.errors.NumericsError` for weights that are no
    numbers, and what reading a model and a text raise. ``on_progress`` counts experts.
    """
    raw, config = checked(job)
    _say_notes(job, config)
    planned = with_outliers(config, job.kind, job.outliers)
    shards = plan_shards(planned, job.kind)
    with Checkpoint.open(job.source) as checkpoint, torch.inference_mode():
        checkpoint.check(config)
        text = _read_text(job, config)
        made_of = identity(job, checkpoint.paths, text.sha256)
        with closing(Target.open(job.output, made_of, resume=job.resume)) as target:
            if target.has_name:
                return _tidied(job, planned, target, text)
            run = _Run(job, CheckpointSource(checkpoint), text, target, on_progress)
            run.begin(shards)
            if job.sensitivity is not None and text.windows is not None:
                planned, shards = run.choose(planned, shards, text.windows)
            return run.make(raw, config, planned, shards)


def _say_notes(job: QuantizeJob, config: ModelConfig) -> None:
    rounded = rounding_note(config, job.kind.name)
    for note in (rounded, outlier_note(config, job.kind, job.outliers)):
        if note:
            _log.warning("%s", note)


@dataclass(frozen=True, slots=True)
class _Text:
    """The calibration's windows and the hash of its file; None: there is none."""

    windows: Tensor | None
    sha256: str | None

    @property
    def num_tokens(self) -> int:
        return 0 if self.windows is None else self.windows.numel()


def _read_text(job: QuantizeJob, config: ModelConfig) -> _Text:
    if job.calibration is None:
        return _Text(None, None)
    corpus = read_text_corpus(job.calibration)
    (text,) = corpus.documents
    assert isinstance(text, str)
    token_ids = Tokenizer.from_folder(job.source).encode(text)
    return _Text(cut_windows(token_ids, max_position=config.max_position), corpus.sha256)


def _tidied(job: QuantizeJob, planned: ModelConfig, target: Target, text: _Text) -> QuantizedModel:
    """What an earlier run has made, without what that left beside it."""
    planned = _as_chosen(planned, job, target)
    target.clean_up()
    return _made(job, planned, target, plan_shards(planned, job.kind), text.num_tokens)


@dataclass(frozen=True, slots=True)
class _Run:
    """What a run reads and where it writes; its steps in their order."""

    job: QuantizeJob
    source: WeightSource
    text: _Text
    target: Target
    on_progress: Progress | None

    def begin(self, shards: tuple[Shard, ...]) -> None:
        self.target.check_space(shards)
        with self.target.writing(shards):
            self.target.begin()

    def choose(
        self, planned: ModelConfig, shards: tuple[Shard, ...], windows: Tensor
    ) -> tuple[ModelConfig, tuple[Shard, ...]]:
        """The model with each layer's kind, chosen now or when the run began, and its files."""
        if self.target.chosen is None:
            with self.target.writing(shards):
                self.target.choose(self._least_loss(planned, windows))
        planned = _as_chosen(planned, self.job, self.target)
        shards = plan_shards(planned, self.job.kind)
        self.target.check_space(shards)
        return planned, shards

    def make(
        self,
        raw: dict[str, Any],
        config: ModelConfig,
        planned: ModelConfig,
        shards: tuple[Shard, ...],
    ) -> QuantizedModel:
        """Write the files and give the folder its name; ``config`` is that of the source."""
        job, target = self.job, self.target
        layers = self._layers(config, planned, shards)
        with target.writing(shards):
            layers.run(shards, target)
            made = _made(job, planned, target, shards, self.text.num_tokens)
            outliers = layers.outliers if job.outliers else None
            record = _record(job, made, self.text.sha256)
            scheme = quantization_config(job.kind, record, outliers, planned.mixed)
            target.complete(job.source, shards, _config_json(raw, scheme))
        return made

    def _least_loss(self, config: ModelConfig, windows: Tensor) -> list[str]:
        """The name of each layer's kind."""
        assert self.job.sensitivity is not None
        moe_layers = [i for i in range(config.num_layers) if config.is_moe_layer(i)]
        kinds = ladder(config, self.job.kind)
        num_experts = len(moe_layers) * config.num_experts
        count = _counter("measuring experts", num_experts, self.on_progress)
        calibration = Calibration(self.source, config, some_windows(windows))
        losses = measure_losses(config, self.source, kinds, calibration, count)
        return [kind.name for kind in choose_kinds(config, kinds, losses, self.job.sensitivity)]

    def _layers(
        self, config: ModelConfig, planned: ModelConfig, shards: tuple[Shard, ...]
    ) -> Layers:
        job, windows = self.job, self.text.windows
        calibration = None if windows is None else Calibration(self.source, config, windows)
        num_experts = sum(len(shard.experts) for shard in shards)
        count = _counter("quantizing experts", num_experts, self.on_progress)
        return Layers(planned, self.source, job.kind, job.method, calibration, count)


def _as_chosen(config: ModelConfig, job: QuantizeJob, target: Target) -> ModelConfig:
    if target.chosen is None:
        return config
    mixed = tuple(map(parse_kind, target.chosen))
    return replace(config, packed=job.kind, mixed=mixed)


def _counter(what: str, total: int, on_progress: Progress | None) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(what, done, total)

    return count


def _made(
    job: QuantizeJob,
    config: ModelConfig,
    target: Target,
    shards: tuple[Shard, ...],
    calibration_tokens: int,
) -> QuantizedModel:
    experts = [t for shard in shards for t in shard.tensors if t.expert is not None]
    notes = [target.finished[shard.name] for shard in shards]
    return QuantizedModel(
        folder=target.folder,
        nbytes=sum(shard.nbytes for shard in shards),
        expert_bytes=sum(tensor.nbytes for tensor in experts),
        bf16_expert_bytes=2 * config.expert_numel * len(experts),
        num_experts=len(experts),
        calibration_tokens=calibration_tokens,
        least_tokens=least_tokens(config.hidden_size, config.expert_size),
        unfitted=tuple((note["layer"], e) for note in notes for e in note["unfitted"]),
        layers_of=_layers_of(config, job.kind),
    )


def _layers_of(config: ModelConfig, kind: WeightKind) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for layer in range(config.num_layers):
        if config.is_moe_layer(layer):
            found.setdefault(config.packed_kind(kind, layer).name, []).append(layer)
    return found


def _record(job: QuantizeJob, made: QuantizedModel, text_sha256: str | None) -> dict[str, Any]:
    asked = {} if job.sensitivity is None else {"sensitivity": job.sensitivity}
    return {
        "method": job.method,
        **asked,
        "calibration_tokens": made.calibration_tokens,
        "calibration_sha256": text_sha256,
        "unfitted_experts": len(made.unfitted),
    }


def _config_json(raw: dict[str, Any], scheme: dict[str, Any]) -> dict[str, Any]:
    raw = {key: value for key, value in raw.items() if key != "torch_dtype"}
    return raw | {"dtype": "bfloat16", "quantization_config": scheme}
