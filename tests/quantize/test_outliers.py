"""Columns of 8 bits within matrices of 4: single experts, and models that have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cpu_kernels.packed_layout import PackedShape, dequantise, unpack_expert
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler.errors import CheckpointError, QuantizeError
from fiddler.models.config import ModelConfig
from fiddler.models.outliers import padded_size, places
from fiddler.models.registry import load_config, parse_config
from fiddler.quantize.expert import Method, apply_expert, quantise_expert
from fiddler.quantize.outliers import largest_inputs
from fiddler.rounding.matrix import round_matrix
from tests.forward import relative_error
from tests.quantize.conftest import Quantize
from tests.quantize.packed_runs import logits, oracle_logits
from tests.quantize.test_packed_model import as_numbers

HIDDEN, WIDTH, TOKENS = 256, 128, 400
KINDS = ["w4g32", "w4g32z", "w4g64z-bf16", "w4g128z", "w4g128"]


def expert(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Normal weights, and inputs of which 8 are a hundred times the others."""
    generator = torch.Generator().manual_seed(seed)
    w13_FH = torch.randn(2 * WIDTH, HIDDEN, generator=generator) / 16
    w2_HI = torch.randn(HIDDEN, WIDTH, generator=generator) / 11
    x_MH = torch.randn(TOKENS, HIDDEN, generator=generator)
    planted = sorted(torch.randperm(HIDDEN, generator=generator)[:8].tolist())
    x_MH[:, planted] *= 100
    return w13_FH, w2_HI, x_MH, planted


def size_of(kind: WeightKind, count: int) -> PackedShape:
    sides = (padded_size(size, count, kind.group) for size in (HIDDEN, WIDTH))
    return PackedShape(kind, *sides)


def test_columns_lie_in_whole_groups() -> None:
    assert places(6, [], 4) == [0, 1, 2, 3, 4, 5] and padded_size(6, 0, 4) == 6
    assert places(6, [1, 4], 4) == [0, 2, 3, 5, 1, 4, -1, -1, 1, 4, -1, -1]
    assert places(9, [1, 4], 4)[:8] == [0, 2, 3, 5, 6, 7, 8, -1]
    assert all(
        len(places(size, list(range(count)), 32)) == padded_size(size, count, 32)
        for size in (64, 100)
        for count in (0, 1, 32, 40)
    )


def test_the_largest_inputs_are_found() -> None:
    _, _, x_MH, planted = expert()
    assert largest_inputs(x_MH, 8) == planted
    assert largest_inputs(torch.zeros(3, 5), 2) == [0, 1]


@pytest.mark.parametrize("kind_name", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_their_columns_are_those_of_8_bits(kind_name: str, method: Method) -> None:
    """Both columns of an outlier added up; nothing else is read twice, and padding is 0."""
    w13_FH, w2_HI, x_MH, planted = expert()
    kind = parse_kind(kind_name)
    made = quantise_expert(w13_FH, w2_HI, kind, method, x_MH, planted)
    shape = size_of(kind, 8)
    assert made.packed.shape == (shape.expert_bytes,) and made.is_fitted
    place_P = np.array(places(HIDDEN, planted, kind.group))
    gate = dequantise(kind, *unpack_expert(shape, made.packed)[0])
    assert (gate[:, place_P < 0] == 0).all()
    folded = np.zeros((len(gate), HIDDEN))
    for column, place in enumerate(place_P):
        if place >= 0:
            folded[:, place] += gate[:, column]
    # rows are in the order of down's columns, so each is looked for among the weights
    stored = w13_FH[:WIDTH].numpy()
    is_row = np.abs(gate).max(axis=1) > 0
    nearest = ((folded[:, None, planted] - stored[None][:, :, planted]) ** 2).sum(-1).argmin(1)
    assert set(nearest[is_row]) == set(range(WIDTH))
    assert np.bincount(nearest[is_row]).max() == 2 and (is_row.sum() == WIDTH + 8)
    if method == "rtn":
        off = np.abs(folded[is_row] - stored[nearest[is_row]])
        step = np.abs(stored[:, planted]).max() / 100  # of 8 bits: at most 2.4 / 255 of the largest
        assert off[:, planted].max() < step < off.max()


@pytest.mark.parametrize("kind_name", ["w4g128z", "w4g128", "w4g32z"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_planted_outliers_are_five_times_more_exact(kind_name: str, method: Method) -> None:
    """Of gate's and up's products; ten times where weights are rounded alike without them."""
    w13_FH, w2_HI, x_MH, planted = expert()
    kind = parse_kind(kind_name)
    wanted = F.linear(x_MH, w13_FH)
    errors = []
    for outliers in ([], planted):
        made = quantise_expert(w13_FH, w2_HI, kind, method, x_MH, outliers)
        # down is left out: its inputs are products of two
        place_P = torch.tensor(places(HIDDEN, outliers, kind.group)).clamp(min=0)
        shape = size_of(kind, len(outliers))
        both = [dequantise(kind, *part) for part in unpack_expert(shape, made.packed)[:2]]
        found = F.linear(x_MH[:, place_P], torch.from_numpy(np.concatenate(both)))
        # rows may be ordered: compare sums of squares by the nearest row
        distance = torch.cdist(wanted.T, found.T).amin(dim=1)
        errors.append(float(distance.norm() / wanted.norm()))
    print(f"{kind_name} {method}: {errors[0]:.4f} without, {errors[1]:.4f} with 8-bit columns")
    assert errors[1] * 5 < errors[0]


@pytest.mark.parametrize("kind_name", ["w4g32z", "w4g128"])
def test_the_whole_expert_gains(kind_name: str) -> None:
    w13_FH, w2_HI, x_MH, planted = expert()
    kind = parse_kind(kind_name)
    gate, up = F.linear(x_MH, w13_FH).chunk(2, dim=-1)
    wanted = F.linear(F.silu(gate) * up, w2_HI)
    errors = []
    for outliers in ([], planted):
        made = quantise_expert(w13_FH, w2_HI, kind, "rtn", x_MH, outliers)
        found = apply_expert(made.packed, size_of(kind, len(outliers)), x_MH, outliers)
        assert found.shape == wanted.shape
        errors.append(float((found - wanted).norm() / wanted.norm()))
    print(f"{kind_name}: {errors}")
    assert errors[1] < 0.8 * errors[0]  # what is left is down, of which 8 of 128 columns count


def test_an_expert_that_saw_nothing_has_columns_too() -> None:
    w13_FH, w2_HI, x_MH, planted = expert()
    kind = parse_kind("w4g32")
    for tokens in (0, 3):
        made = quantise_expert(w13_FH, w2_HI, kind, "gptq", x_MH[:tokens], planted)
        assert not made.is_fitted and len(made.packed) == size_of(kind, 8).expert_bytes
    found = apply_expert(made.packed, size_of(kind, 8), x_MH, planted)
    gate, up = F.linear(x_MH, w13_FH).chunk(2, dim=-1)
    wanted = F.linear(F.silu(gate) * up, w2_HI)
    assert (found - wanted).norm() < 0.2 * wanted.norm()


# --- models ---


def folded_numbers(packed: Path, source: Path, folder: Path) -> Path:
    """The plain checkpoint that stands for ``packed``, by :func:`as_numbers` of folded experts."""
    return as_numbers(packed, source, folder, fold=fold)


def fold(config: ModelConfig, layer: int, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Columns and rows back to where they came from.

    A down column's input is a gate row: equal rows are one. Their order does not matter.
    """
    assert config.packed is not None
    gate, up, down = parts
    place = places(config.hidden_size, config.outliers[layer], config.packed.group)
    plain = [np.zeros((len(gate), config.hidden_size), np.float32) for _ in range(2)]
    for column, to in enumerate(place):
        if to >= 0:
            plain[0][:, to] += gate[:, column]
            plain[1][:, to] += up[:, column]
    num_outliers = len(config.outliers[layer])
    others = config.expert_size - num_outliers
    narrow = -(-others // config.packed.group) * config.packed.group
    wide = -(-num_outliers // config.packed.group) * config.packed.group
    rows = [*range(others), *range(narrow, narrow + num_outliers)]
    low = down[: config.hidden_size].copy()
    low[:, narrow : narrow + wide] += low[:, narrow + wide :]
    return [plain[0][rows], plain[1][rows], low[:, rows]]


@pytest.mark.parametrize("kind", ["w4g32z", "w4g32"])
def test_a_model_computes_with_them(
    run: Quantize, tiny: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    """As the oracle does with the numbers that the codes stand for."""
    packed = run(kind, method="gptq", calibration=text, outliers=5).folder
    config = load_config(packed)
    assert [len(layer) for layer in config.outliers] == [5, 5, 5]
    assert config.expert_sides == (64 + 64, 64 + 64)
    wanted = oracle_logits(folded_numbers(packed, tiny, tmp_path / "numbers"))
    assert relative_error(logits(packed), wanted) < 1e-4


def test_an_interrupted_run_ends_in_the_same_bytes(
    run: Quantize, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"method": "gptq", "calibration": text, "outliers": 5}
    with pytest.raises(KeyboardInterrupt):
        run(on_progress=stop, **options)
    resumed = run(resume=True, **options).folder
    whole = run(output=tmp_path / "whole", **options).folder
    for path in [*sorted(whole.glob("*.safetensors")), whole / "config.json"]:
        assert path.read_bytes() == (resumed / path.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"outliers": 5}, "outliers are the largest inputs of a text"),
        ({"outliers": 5, "kind": "w8g32", "calibration": True}, "all of w8g32 has 8"),
        ({"outliers": 64, "calibration": True}, "64 outliers are not fewer than the 64 inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Quantize, text: Path, options: dict[str, Any], said: str
) -> None:
    if "calibration" in options:
        options = options | {"calibration": text}
    with pytest.raises(QuantizeError, match=said):
        run(**options)


LAYERS = [[1, 5]] * 3


@pytest.mark.parametrize(
    ("outliers", "said"),
    [
        ([1, 2, 3], "experts.outliers = .* not a list of inputs for each layer"),
        ("abc", "experts.outliers = .* not a list of inputs for each layer"),
        ([[1.0, 5]] * 3, "names outliers that the model's layers do not have"),
        ([[True, 5]] * 3, "names outliers that the model's layers do not have"),
        ([[[1], 5]] * 3, "names outliers that the model's layers do not have"),
        ([[5, 5]] * 3, "names outliers that the model's layers do not have"),
        ([[1, 64], *LAYERS[1:]], "names outliers that the model's layers do not have"),
        ([[1], *LAYERS[1:]], "names outliers that the model's layers do not have"),
        (LAYERS[1:], "names outliers that the model's layers do not have"),
        ([], "names outliers that the model's layers do not have"),
    ],
)
def test_wrong_outliers_in_a_config_are_named(tiny: Path, outliers: Any, said: str) -> None:
    raw = json.loads((tiny / "config.json").read_text())
    experts = {"kind": "w4g32", "outliers": outliers}
    scheme = {"quant_method": "fiddler", "version": 1, "experts": experts}
    right = scheme | {"experts": experts | {"outliers": LAYERS}}
    parse_config(raw | {"quantization_config": right})
    with pytest.raises(CheckpointError, match=said):
        parse_config(raw | {"quantization_config": scheme})


def test_eight_bits_alone_are_as_exact_as_they_should_be() -> None:
    """A fixed zero point costs symmetric kinds 255 / 238 of a step."""
    w_NK = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    kind = WeightKind("int8", 128, has_zeros=True)
    for middle, most in ((None, 0.0062), (136, 0.0070)):
        found = dequantise(kind, *round_matrix(w_NK, kind, middle=middle))
        assert np.linalg.norm(found - w_NK) / np.linalg.norm(w_NK) < most


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_gpu_computes_with_them(run: Quantize, text: Path, enforce_eager: bool) -> None:
    packed = run("w4g32z", method="gptq", calibration=text, outliers=5).folder
    on_gpu = logits(packed, device="cuda", vram_gb=8, enforce_eager=enforce_eager)
    error = relative_error(on_gpu, logits(packed))
    print(f"eager {enforce_eager}: relative error {error:.1e}")
    assert error < 1e-4
