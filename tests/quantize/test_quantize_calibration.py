"""The pass that stops in every layer is the model: with its experts it ends at its logits."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fiddler.errors import NumericsError, QuantizeError
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.manifest import expert_parts
from fiddler.models.reference import reference_logits
from fiddler.models.registry import load_config
from fiddler.models.weights import CheckpointSource, load_dense
from fiddler.quantize import calibration
from fiddler.quantize.calibration import Calibration, ExpertInputs, cut_windows
from tests.quantize.conftest import WINDOW
from tests.tiny_models import MODEL_TYPES, shared_tiny


def moe(source: CheckpointSource, folder: Path, layer: int, inputs: ExpertInputs) -> torch.Tensor:
    config = load_config(folder)
    out_TH = torch.zeros_like(inputs.x_TH)
    for expert in range(config.num_experts):
        gate_IH, up_IH, down_HI = (
            source.tensor(part.name, part.shape).float()
            for part in expert_parts(config, layer, expert)
        )
        token_M, weight_M = inputs.of(expert)
        x_MH = inputs.x_TH[token_M]
        y_MH = (F.silu(x_MH @ gate_IH.T) * (x_MH @ up_IH.T)) @ down_HI.T
        out_TH[token_M] += weight_M[:, None] * y_MH
    return out_TH


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layer_by_layer_is_the_reference(model_type: str) -> None:
    folder = shared_tiny(model_type)
    config = load_config(folder)
    windows = torch.randint(0, 256, (3, WINDOW), generator=torch.Generator().manual_seed(1))
    with Checkpoint.open(folder) as checkpoint, torch.inference_mode():
        source = CheckpointSource(checkpoint)
        calibrated = Calibration(source, config, windows)
        for layer in range(config.num_layers):
            inputs = calibrated.enter(layer)
            assert (inputs is not None) == config.is_moe_layer(layer)
            if inputs is not None:
                calibrated.leave(moe(source, folder, layer, inputs))
        dense = load_dense(source, config, device="cpu", dtype=torch.float32)
        x_TH = calibrated._kernels.rms_norm(calibrated._x_TH, dense.final_norm_H)
        found_TV = F.linear(x_TH, dense.lm_head_VH)
        for window, ours_WV in zip(windows, found_TV.split(WINDOW), strict=True):
            wanted_WV = reference_logits(source, config, window.tolist())
            assert (ours_WV - wanted_WV).norm() < 1e-5 * wanted_WV.norm()


def test_inputs_of_an_expert_are_the_tokens_that_chose_it() -> None:
    ids_TK = torch.tensor([[0, 2], [1, 0], [2, 1]])
    weights_TK = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    inputs = ExpertInputs(torch.zeros(3, 4), ids_TK, weights_TK)
    assert [part.tolist() for part in inputs.of(0)] == [[0, 1], pytest.approx([0.7, 0.4])]
    assert inputs.of(3)[0].tolist() == []


def test_windows_are_whole_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(10 * WINDOW + 5))
    assert cut_windows(ids, max_position=4096).flatten().tolist() == ids[: 10 * WINDOW]
    assert cut_windows(ids, max_position=8).shape == (len(ids) // 8, 8)
    monkeypatch.setattr(calibration, "MOST_WINDOWS", 4)
    windows = cut_windows(ids, max_position=4096)
    assert [first // WINDOW for first in windows[:, 0].tolist()] == [0, 2, 5, 7]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(QuantizeError, match="has 31 tokens, less than one window of 32"):
        cut_windows([1] * (WINDOW - 1), max_position=4096)


def test_hidden_states_that_are_no_numbers_are_noticed() -> None:
    folder = shared_tiny("mixtral")
    with Checkpoint.open(folder) as checkpoint, torch.inference_mode():
        calibrated = Calibration(
            CheckpointSource(checkpoint), load_config(folder), torch.zeros(1, WINDOW).long()
        )
        calibrated.leave(torch.full((WINDOW, 64), float("inf")))
        with pytest.raises(NumericsError, match="NaN or Inf in layer 0"):
            calibrated.enter(0)
