"""What each layer would lose in each kind of weights: the whole model once over a part of the text.

Every expert answers the tokens that the router sends it, first exactly and then with its weights
rounded to each kind. What a layer loses is the sum over these of the squared error of the answer,
weighted as the router does, in shares of the residual stream's square as it leaves the layer: the
norms of later layers see it so.

Ordering: threads work on experts side by side; sums are taken here, in the experts' order.

T tokens, M tokens of one expert, K kinds, H hidden, I width, F = 2I.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpu_kernels.weight_kind import WeightKind
from fiddler.errors import QuantizeError
from fiddler.models.config import ModelConfig
from fiddler.models.weights import WeightSource, load_expert_into
from fiddler.quantize.calibration import Calibration, ExpertInputs
from fiddler.quantize.expert import exact_and_rounded
from fiddler.quantize.threads import Threads, num_workers, quantizing_threads

# Of the calibration's windows. Losses of layers differ by factors; 32,768 tokens tell them apart.
MOST_WINDOWS = 16

Losses = dict[int, list[float]]  # of each layer that has experts, in each kind


def some_windows(windows: Tensor) -> Tensor:
    """At most :data:`MOST_WINDOWS`, spread over the text."""
    kept = min(len(windows), MOST_WINDOWS)
    return windows[[i * len(windows) // kept for i in range(kept)]]


def measure_losses(
    config: ModelConfig,
    source: WeightSource,
    kinds: Sequence[WeightKind],
    calibration: Calibration,
    on_expert: Callable[[], None],
) -> Losses:
    """Measure every layer. ``calibration`` is at its beginning, and at its end after.

    Raises :class:`QuantizeError` for weights that a kind's scales cannot hold.
    """
    losses: Losses = {}
    # all of them are rounded, however experts will be quantised
    with quantizing_threads(num_workers(config, "rtn")) as threads:
        for layer in range(config.num_layers):
            inputs = calibration.enter(layer)
            if inputs is not None:
                measured = _Layer(config, source, kinds, layer, inputs)
                out_TH, error_KT = measured.run(threads, on_expert)
                calibration.leave(out_TH)
                square_T = calibration.square_T().clamp_(min=torch.finfo(torch.float32).tiny)
                losses[layer] = (error_KT / square_T).double().sum(dim=1).tolist()
    return losses


class _Layer:
    """One layer, with what its experts see."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        kinds: Sequence[WeightKind],
        layer: int,
        inputs: ExpertInputs,
    ) -> None:
        self._config, self._source, self._kinds = config, source, kinds
        self._layer, self._inputs = layer, inputs

    def run(self, threads: Threads, on_expert: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """The exact sum of what the experts answer, and the squared errors of each token."""
        x_TH = self._inputs.x_TH
        out_TH = torch.zeros_like(x_TH)
        error_KT = torch.zeros(len(self._kinds), len(x_TH))
        experts = range(self._config.num_experts)
        for token_M, y_MH, error_KM in threads.in_order(self._expert, experts):
            out_TH.index_add_(0, token_M, y_MH)
            error_KT.index_add_(1, token_M, error_KM)
            on_expert()
        return out_TH, error_KT

    @torch.inference_mode()
    def _expert(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, width = self._config.hidden_size, self._config.expert_size
        w13_FH, w2_HI = torch.empty(2 * width, hidden), torch.empty(hidden, width)
        load_expert_into(self._source, self._config, self._layer, expert, w13_FH, w2_HI)
        token_M, weight_M = self._inputs.of(expert)
        x_MH = self._inputs.x_TH[token_M]
        try:
            y_MH, rounded = exact_and_rounded(w13_FH, w2_HI, self._kinds, x_MH)
        except ValueError as error:
            raise QuantizeError(f"expert {expert} of layer {self._layer}: {error}") from error
        errors = [(y - y_MH).square().sum(dim=1) for y in rounded]
        return token_M, y_MH * weight_M[:, None], torch.stack(errors) * weight_M.square()
