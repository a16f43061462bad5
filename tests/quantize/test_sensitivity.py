"""Which layers get more bits: the choice and what it rests on."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cpu_kernels.packed_layout import dequantise
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler.errors import QuantizeError
from fiddler.models.checkpoint import SINGLE, Checkpoint
from fiddler.models.manifest import expert_parts, packed_shape
from fiddler.models.registry import load_config, parse_config
from fiddler.models.shapes import load_shape
from fiddler.models.weights import CheckpointSource
from fiddler.quantize.calibration import Calibration
from fiddler.quantize.measure import measure_losses, some_windows
from fiddler.quantize.sensitivity import Option, choose, choose_kinds, ladder, share_of
from fiddler.quantize.target import JOURNAL
from fiddler.rounding.grid import QUICK_SHRINKS
from fiddler.rounding.matrix import round_matrix
from tests.quantize.conftest import WINDOW, Quantize
from tests.quantize.test_run import Stop, changed, contents, stop_at
from tests.tiny_models import shared_tiny

# --- the choice ---

OPTIONS = st.lists(
    st.tuples(st.integers(1, 9), st.floats(0, 10)).map(lambda pair: Option(*pair)),
    min_size=1,
    max_size=4,
)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 50))
def test_no_choice_that_fits_loses_less(options_LK: list[list[Option]], budget: int) -> None:
    found = choose(options_LK, budget)
    every = itertools.product(*(range(len(options)) for options in options_LK))
    sums = [
        (
            sum(options[k].loss for options, k in zip(options_LK, way, strict=True)),
            sum(options[k].nbytes for options, k in zip(options_LK, way, strict=True)),
        )
        for way in every
    ]
    fitting = [pair for pair in sums if pair[1] <= budget]
    assert (found is None) == (not fitting)
    if found is not None:
        taken = [options[k] for options, k in zip(options_LK, found, strict=True)]
        assert sum(option.nbytes for option in taken) <= budget
        assert sum(option.loss for option in taken) == pytest.approx(min(fitting)[0])


def test_bytes_go_where_they_save_most() -> None:
    kinds = [Option(4, 8.0), Option(8, 1.0)]
    dull = [Option(4, 1.0), Option(8, 0.5)]
    assert choose([dull, kinds, dull], 16) == [0, 1, 0]
    assert choose([dull, kinds, dull], 12) == [0, 0, 0]
    assert choose([dull, kinds, dull], 11) is None
    assert choose([[Option(4, 1.0), Option(5, 1.0)]], 9) == [0]  # nothing is bought for nothing


def test_a_large_model_is_chosen_for_at_once() -> None:
    config = load_shape("qwen3-30b-a3b")
    kinds = ladder(config, parse_kind("w4g128z"))
    losses = {i: [9.0 + i, 8.9 + i, 8.7 + i, 0.1] for i in range(config.num_layers)}
    chosen = choose_kinds(config, kinds, losses, 0.3)
    sizes = [packed_shape(config, kind).expert_bytes for kind in chosen]
    share = sum(sizes) / (2 * config.expert_numel * len(chosen))
    assert 0.299 < share <= 0.3
    assert [kind.bits for kind in chosen] == sorted(kind.bits for kind in chosen)


@pytest.mark.parametrize(
    ("sides", "least", "names"),
    [
        ((256, 128), "w4g128", ["w4g128", "w4g64", "w4g32", "w8g128"]),
        ((256, 128), "w4g32z-bf16", ["w4g32z-bf16", "w8g128z-bf16"]),
        ((192, 64), "w4g64z", ["w4g64z", "w4g32z", "w8g64z"]),
        ((256, 128), "w8g128", ["w8g128", "w8g64", "w8g32"]),
    ],
)
def test_what_layers_may_have(sides: tuple[int, int], least: str, names: list[str]) -> None:
    hidden, width = sides
    raw = {"model_type": "qwen3_moe", "hidden_size": hidden, "moe_intermediate_size": width}
    config = parse_config(raw)
    kinds = ladder(config, parse_kind(least))
    assert [kind.name for kind in kinds] == names
    shares = [share_of(config, kind) for kind in kinds]
    assert shares == sorted(shares)


# --- what is measured ---


def losses_of(folder: Path, kinds: list[WeightKind], windows: torch.Tensor) -> dict[int, Any]:
    config = load_config(folder)
    with Checkpoint.open(folder) as checkpoint, torch.inference_mode():
        source = CheckpointSource(checkpoint)
        calibration = Calibration(source, config, windows)
        return measure_losses(config, source, kinds, calibration, lambda: None)


def random_windows() -> torch.Tensor:
    return torch.randint(0, 256, (4, WINDOW), generator=torch.Generator().manual_seed(1))


def test_a_loss_is_what_an_expert_answers_wrongly(tiny: Path) -> None:
    """Of the last layer, against a sum over tokens of what each of its experts gets wrong."""
    kind, config = parse_kind("w4g32"), load_config(tiny)
    last, losses = config.num_layers - 1, losses_of(tiny, [kind], random_windows())
    tensors = load_file(tiny / SINGLE)
    with Checkpoint.open(tiny) as checkpoint, torch.inference_mode():
        calibration = Calibration(CheckpointSource(checkpoint), config, random_windows())
        for layer in range(config.num_layers):
            inputs = calibration.enter(layer)
            assert inputs is not None
            out_TH, error_T = torch.zeros_like(inputs.x_TH), torch.zeros(len(inputs.x_TH))
            for expert in range(config.num_experts):
                gate, up, down = (tensors[p.name] for p in expert_parts(config, layer, expert))
                token_M, weight_M = inputs.of(expert)
                x_MH = inputs.x_TH[token_M]

                def rounded(w_NK: torch.Tensor, x_MK: torch.Tensor) -> torch.Tensor:
                    square_K = x_MK.square().mean(dim=0).numpy()
                    codes = round_matrix(w_NK.numpy(), kind, square_K, QUICK_SHRINKS[4])
                    return torch.from_numpy(dequantise(kind, *codes))

                act_MI = F.silu(x_MH @ gate.T) * (x_MH @ up.T)
                coarse_MI = F.silu(x_MH @ rounded(gate, x_MH).T) * (x_MH @ rounded(up, x_MH).T)
                y_MH = (act_MI @ down.T) * weight_M[:, None]
                coarse_MH = (coarse_MI @ rounded(down, coarse_MI).T) * weight_M[:, None]
                out_TH[token_M] += y_MH
                error_T[token_M] += (coarse_MH - y_MH).square().sum(dim=1)
            calibration.leave(out_TH)
        wanted = float((error_T / calibration._x_TH.square().sum(dim=1)).sum())
    assert losses[last] == [pytest.approx(wanted, rel=1e-3)]


def test_losses_fall_with_bits(tiny: Path) -> None:
    kinds = [parse_kind(name) for name in ("w4g64z", "w4g32z", "w8g64z")]
    for g64, g32, eight in losses_of(tiny, kinds, random_windows()).values():
        assert g64 > g32 > 10 * eight > 0


def test_layers_without_experts_have_no_loss() -> None:
    folder = shared_tiny("qwen2_moe", moe_intermediate_size=64)
    assert sorted(losses_of(folder, [parse_kind("w4g32")], random_windows())) == [0, 2]


def test_windows_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.quantize.measure.MOST_WINDOWS", 4)
    assert some_windows(torch.arange(10)[:, None]).flatten().tolist() == [0, 2, 5, 7]
    assert some_windows(torch.arange(3)[:, None]).flatten().tolist() == [0, 1, 2]


# Experts of 64 x 64: blocks are whole cache lines, so groups of 32 take no more than those of 64.
ONE_WIDE = 0.37  # room for one of three layers in 8 bits


def spiky(layer: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """In each group of a layer's experts one weight far above the others, which rounds those."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if f"layers.{layer}.mlp.experts" in name:
                tensor[:, ::32] *= 30

    return change


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_sensitive_layer_gets_the_bits(
    run: Quantize, tiny: Path, text: Path, tmp_path: Path, layer: int
) -> None:
    source = changed(tiny, tmp_path / "spiky", spiky(layer))
    made = run("w4g32", source=source, calibration=text, method="gptq", sensitivity=ONE_WIDE)
    others = [other for other in range(3) if other != layer]
    assert made.layers_of == {"w8g64": [layer], "w4g32": others}
    assert made.expert_bytes <= ONE_WIDE * made.bf16_expert_bytes


@pytest.mark.parametrize("share", [0.282, 0.3, 0.35, 0.42, 0.6])
def test_the_size_is_kept_and_used(run: Quantize, text: Path, share: float) -> None:
    made = run("w4g32", calibration=text, sensitivity=share)
    assert made.expert_bytes <= share * made.bf16_expert_bytes
    packed = [
        len(tensor)
        for path in made.folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith(".packed")
    ]
    assert sum(packed) == made.expert_bytes and len(packed) == 24
    if share == 0.282:
        assert made.layers_of == {"w4g32": [0, 1, 2]}
    if share == 0.6:
        assert made.layers_of == {"w8g64": [0, 1, 2]}


# --- interruptions and refusals ---


@pytest.mark.parametrize("number", [1, 12, 24, 25, 40, 48])
def test_a_resumed_run_makes_the_same_bytes(
    run: Quantize, tiny: Path, text: Path, tmp_path: Path, number: int
) -> None:
    """24 experts are measured, then 24 are quantised."""
    source = changed(tiny, tmp_path / "spiky", spiky(1))
    options: dict[str, Any] = {"method": "gptq", "calibration": text, "sensitivity": ONE_WIDE}
    options |= {"kind": "w4g32", "source": source}
    wanted = contents(run(**options, output=tmp_path / "whole").folder)
    seen: list[str] = []

    def on_progress(what: str, done: int, total: int) -> None:
        seen.append(what)
        if len(seen) == number:
            raise Stop

    with pytest.raises(Stop):
        run(**options, on_progress=on_progress)
    assert (json.loads((tmp_path / "out.partial" / JOURNAL).read_text())["chosen"] is None) == (
        number <= 24
    )
    seen.clear()
    made = run(**options, resume=True, on_progress=lambda what, *_: seen.append(what))
    assert ("measuring experts" in seen) == (number <= 24)
    assert contents(made.folder) == wanted


def test_another_size_does_not_go_on_with_it(run: Quantize, text: Path) -> None:
    with pytest.raises(Stop):
        run("w4g64", calibration=text, sensitivity=0.3, on_progress=stop_at(3))
    for other in (None, 0.31):
        with pytest.raises(QuantizeError, match="begun with another sensitivity"):
            run("w4g64", calibration=text, sensitivity=other, resume=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sensitivity": 0.3}, "measured on a text, and none was given"),
        ({"sensitivity": 0.3, "outliers": 5, "calibration": True}, "have no outliers"),
        ({"sensitivity": 0.28, "calibration": True}, r"w4g64 alone takes 0\.2812 .* than 0\.28\n"),
        ({"sensitivity": 1.0, "calibration": True}, "cannot take 1.0 of what they take"),
        ({"sensitivity": -1.0, "calibration": True}, "cannot take -1.0 of"),
        ({"sensitivity": float("nan"), "calibration": True}, "cannot take nan of"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Quantize, text: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    if "calibration" in options:
        options = options | {"calibration": text}
    with pytest.raises(QuantizeError, match=said):
        run("w4g64", **options)
    assert not list(tmp_path.iterdir())
