"""Quantises layer by layer, expert by expert, and writes what the plan says.

With a calibration the hidden states that reach a layer are those of the quantised layers before it.
A file that is finished already is read instead of made, where later layers depend on its experts.

Ordering: several threads quantise a layer's experts. Their results are taken in the order of the
experts, by this thread alone, so sums and files do not depend on timing.

T tokens of the calibration, M tokens of one expert, H hidden, I width, F = 2I.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpu_kernels.packed_layout import U8
from cpu_kernels.weight_kind import WeightKind
from fiddler.errors import QuantizeError
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import packed_shape
from fiddler.models.packing import lossless, stored_bits
from fiddler.models.safetensors_header import read_header
from fiddler.models.weights import WeightSource, load_expert_into
from fiddler.quantize.calibration import Calibration, ExpertInputs
from fiddler.quantize.expert import Method, PackedExpert, apply_expert, quantise_expert
from fiddler.quantize.outliers import largest_inputs
from fiddler.quantize.plan import PlannedTensor, Shard
from fiddler.quantize.target import Target
from fiddler.quantize.threads import Threads, num_workers, quantizing_threads
from fiddler.quantize.writing import write_shard

Contents = Iterator[npt.NDArray[Any]]


class Layers:
    """One run's way through the planned files."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kind: WeightKind,
        method: Method,
        calibration: Calibration | None,
        on_expert: Callable[[], None],
    ) -> None:
        self._config = config
        self._source = source
        self._kind = kind
        self._method: Method = method
        self._calibration = calibration
        self._on_expert = on_expert
        self._num_outliers = max(map(len, config.outliers), default=0)
        self.outliers: list[list[int]] = [[] for _ in range(config.num_layers)]

    def run(self, shards: tuple[Shard, ...], target: Target) -> None:
        """Make the files that ``target`` lacks, in order; :attr:`outliers` are known then."""
        with quantizing_threads(num_workers(self._config, self._method)) as threads:
            for layer, files in groupby(shards, key=lambda shard: shard.layer):
                seen = self._enter(layer)
                for shard in files:
                    if shard.name in target.finished:
                        self._replay(target.partial / shard.name, shard, seen, threads)
                    else:
                        self._write(target, shard, seen, threads)
                if self._calibration is not None and seen is not None:
                    self._calibration.leave(seen.out_TH)

    def _enter(self, layer: int | None) -> "_Seen | None":
        if self._calibration is None or layer is None:
            return None
        inputs = self._calibration.enter(layer)
        if inputs is None:
            return None
        if self._num_outliers:
            self.outliers[layer] = largest_inputs(inputs.x_TH, self._num_outliers)
        return _Seen(inputs)

    def _write(self, target: Target, shard: Shard, seen: "_Seen | None", threads: Threads) -> None:
        unfitted: list[int] = []
        contents = self._contents(shard, seen, threads, unfitted)
        write_shard(target.partial / shard.name, shard.tensors, contents)
        target.finish(shard, {"layer": shard.layer, "unfitted": unfitted})

    def _contents(
        self, shard: Shard, seen: "_Seen | None", threads: Threads, unfitted: list[int]
    ) -> Contents:
        """Each tensor of the plan: experts, then what is copied."""

        def make(expert: int) -> tuple[PackedExpert, Tensor | None]:
            assert shard.layer is not None
            return self._expert(shard.layer, expert, seen)

        experts = shard.experts
        for expert, (made, y_MH) in zip(experts, threads.in_order(make, experts), strict=True):
            if seen is not None and y_MH is not None:
                seen.add(expert, y_MH)
                if not made.is_fitted:
                    unfitted.append(expert)
            yield made.packed
            self._on_expert()
        for tensor in shard.tensors:
            if tensor.expert is None:
                yield self._copied(tensor)

    @torch.inference_mode()
    def _expert(
        self, layer: int, expert: int, seen: "_Seen | None"
    ) -> tuple[PackedExpert, Tensor | None]:
        hidden, width = self._config.hidden_size, self._config.expert_size
        kind = self._config.packed_kind(self._kind, layer)
        if kind.is_lossless:
            out_B = torch.empty(packed_shape(self._config, kind).expert_bytes, dtype=torch.uint8)
            lossless(self._config, stored_bits(self._source))(layer, expert, out_B)
            return PackedExpert(out_B.numpy(), is_fitted=False), None
        w13_FH, w2_HI = torch.empty(2 * width, hidden), torch.empty(hidden, width)
        load_expert_into(self._source, self._config, layer, expert, w13_FH, w2_HI)
        x_MH = None if seen is None else seen.inputs_of(expert)
        try:
            outliers = self.outliers[layer]
            made = quantise_expert(w13_FH, w2_HI, kind, self._method, x_MH, outliers)
        except ValueError as error:
            raise QuantizeError(f"expert {expert} of layer {layer}: {error}") from error
        if x_MH is None:
            return made, None
        return made, apply_expert(made.packed, packed_shape(self._config, kind), x_MH, outliers)

    def _replay(self, path: Path, shard: Shard, seen: "_Seen | None", threads: Threads) -> None:
        """Add what the packed experts of a finished file give."""
        entries = {} if seen is None else read_header(path)
        names = {tensor.expert: tensor.name for tensor in shard.tensors}
        layer = shard.layer or 0
        shape = packed_shape(self._config, self._config.packed_kind(self._kind, layer))

        @torch.inference_mode()
        def apply(expert: int) -> Tensor | None:
            if seen is None:
                return None
            entry = entries[names[expert]]
            packed: U8 = np.fromfile(path, np.uint8, entry.end - entry.begin, offset=entry.begin)
            return apply_expert(packed, shape, seen.inputs_of(expert), self.outliers[layer])

        experts = shard.experts
        for expert, y_MH in zip(experts, threads.in_order(apply, experts), strict=True):
            if seen is not None and y_MH is not None:
                seen.add(expert, y_MH)
            self._on_expert()

    def _copied(self, tensor: PlannedTensor) -> npt.NDArray[Any]:
        """The bits of bfloat16."""
        out = torch.empty(tensor.shape, dtype=torch.bfloat16)
        self._source.fill_(out, tensor.name)
        bits: npt.NDArray[Any] = out.view(torch.int16).numpy()
        return bits


class _Seen:
    """What a layer's experts see of the calibration, and the sum of what they answer."""

    def __init__(self, inputs: ExpertInputs) -> None:
        self._inputs = inputs
        self.out_TH = torch.zeros_like(inputs.x_TH)

    def inputs_of(self, expert: int) -> Tensor:
        return self._inputs.x_TH[self._inputs.of(expert)[0]]

    def add(self, expert: int, y_MH: Tensor) -> None:
        token_M, weight_M = self._inputs.of(expert)
        self.out_TH.index_add_(0, token_M, y_MH * weight_M[:, None])
