"""What the experts of each layer see of a text: a forward pass that stops in every layer.

Between two layers the hidden states of all windows wait, and the next layer's dense weights are
loaded for it alone. So however many layers there are, memory holds float32 ``3 T H`` (the residual
stream, the experts' inputs and the sum of their outputs: 3.2 GB with 131,072 tokens of 2,048), one
layer without its experts, and the keys and values of one window in one layer.

T tokens of all windows, W tokens of a window, H hidden, K top-k, M tokens of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.errors import NumericsError, QuantizeError
from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig
from fiddler.models.decoder import Decoder
from fiddler.models.kv_cache import new_kv_caches
from fiddler.models.manifest import model_parts
from fiddler.models.rope import rope_tables
from fiddler.models.torch_kernels import TorchKernels
from fiddler.models.weights import DenseWeights, WeightSource, load_layer
from gpu_kernels.page_table import PageTable
from offload.units import counted

WINDOW = 2048  # tokens, or the model's longest context if that is less
MOST_WINDOWS = 64
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """A layer's normed hidden states, and where its router sends them."""

    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[M]`` that chose the expert, and what its output counts for each, ``[M]``."""
        token_M, choice_M = (self.ids_TK == expert).nonzero(as_tuple=True)
        return token_M, self.weights_TK[token_M, choice_M]


def cut_windows(token_ids: Sequence[int], *, max_position: int) -> Tensor:
    """Whole windows, int64 ``[windows, W]``: all, or :data:`MOST_WINDOWS` spread over the text.

    Raises :class:`QuantizeError` for a text shorter than one.
    """
    size = min(WINDOW, max_position)
    count = len(token_ids) // size
    if count == 0:
        raise QuantizeError(
            f"the calibration text has {counted(len(token_ids), 'token')}, "
            f"less than one window of {size:,}",
            hint="give a longer text; some hundred thousand tokens calibrate well",
        )
    kept = min(count, MOST_WINDOWS)
    starts = [size * (i * count // kept) for i in range(kept)]
    return torch.tensor([token_ids[start : start + size] for start in starts])


class Calibration:
    """The hidden states of all windows on their way through the layers, in order."""

    def __init__(self, source: WeightSource, config: ModelConfig, windows: Tensor) -> None:
        """Embed the windows' tokens; ``windows`` as :func:`cut_windows` gives them."""
        self._source, self._config = source, config
        self._window = windows.shape[1]
        (embed,) = model_parts(config)["embed_VH"]
        embed_VH = source.tensor(embed.name, embed.shape)
        self._x_TH = F.embedding(windows.flatten(), embed_VH).float()
        self._recorder = _Recorder(*self._x_TH.shape)
        self._kernels = TorchKernels(
            *rope_tables(config, self._window), config.head_dim**-0.5, eps=config.rms_norm_eps
        )
        nothing = DenseWeights(
            embed_VH=embed_VH, layers=(), final_norm_H=embed_VH, lm_head_VH=embed_VH
        )
        self._decoder = Decoder(config, nothing, self._kernels, self._recorder)
        self._kernels.plan(_one_window(self._window))

    @torch.inference_mode()
    def enter(self, layer: int) -> ExpertInputs | None:
        """Run a layer up to its routed experts; None if it has none, and is then done."""
        weights = load_layer(self._source, self._config, layer, device="cpu", dtype=torch.float32)
        c = self._config
        pages = -(-self._window // PAGE_SIZE)
        shape = (pages, 2, PAGE_SIZE, c.num_kv_heads, c.head_dim)
        (kv_cache,) = new_kv_caches(1, shape, "float32", "cpu")
        for x_WH in torch.split(self._x_TH, self._window):
            y_WH = self._kernels.rms_norm(x_WH, weights.input_norm_H)
            _, after_WH = self._decoder.block(
                layer, weights, y_WH, x_WH, kv_cache, weights.input_norm_H
            )
            x_WH.copy_(after_WH)
        if not torch.isfinite(self._x_TH.sum()):
            raise NumericsError(f"the calibration text makes NaN or Inf in layer {layer}")
        return self._recorder.inputs()

    @torch.inference_mode()
    def leave(self, out_TH: Tensor) -> None:
        """Add what the routed experts of the layer give."""
        self._x_TH += out_TH

    @torch.inference_mode()
    def square_T(self) -> Tensor:
        """Of each token's residual stream, as it is now."""
        return self._x_TH.square().sum(dim=1)


class _Recorder:
    """An expert backend that keeps what it is asked, and answers zeros."""

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        self._x_TH = torch.empty(num_tokens, hidden_size)
        self._choices: list[tuple[Tensor, Tensor]] = []

    def launch(self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> "_NoResult":
        first = len(x_TH) * len(self._choices)  # all windows are of one size
        self._x_TH[first : first + len(x_TH)] = x_TH
        self._choices.append((ids_TK, weights_TK))
        return _NoResult(x_TH)

    def inputs(self) -> ExpertInputs | None:
        """What was asked since the last call, good until the next launch."""
        if not self._choices:
            return None
        ids_TK, weights_TK = (torch.cat(part) for part in zip(*self._choices, strict=True))
        self._choices.clear()
        return ExpertInputs(self._x_TH, ids_TK, weights_TK)


@dataclass(frozen=True, slots=True)
class _NoResult:
    _x_TH: Tensor

    late = None

    def parts(self) -> tuple[Tensor, ...]:
        return (torch.zeros_like(self._x_TH),)


def _one_window(size: int) -> StepBatch:
    """A prompt in the first pages, whatever its tokens."""
    position_W = torch.arange(size)
    num_pages = -(-size // PAGE_SIZE)
    return StepBatch(
        tokens_T=torch.zeros(size, dtype=torch.int64),
        positions_T=position_W,
        slots_T=position_W,
        pages=PageTable(
            indptr_B1=torch.tensor([0, num_pages], dtype=torch.int32),
            indices=torch.arange(num_pages, dtype=torch.int32),
            last_page_len_B=torch.tensor([(size - 1) % PAGE_SIZE + 1], dtype=torch.int32),
            page_size=PAGE_SIZE,
        ),
        qo_indptr_B1=torch.tensor([0, size], dtype=torch.int32),
        qo_lens=(size,),
        kv_lens=(size,),
        num_decodes=0,
    )
