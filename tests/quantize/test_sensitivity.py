"""Which layers get more bits: the choice, what it rests on, and models whose layers differ."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.packed_layout import dequantise
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler import LLM, SamplingParams
from fiddler.errors import CheckpointError, QuantizeError
from fiddler.models.checkpoint import SINGLE, Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import expert_parts, packed_shape
from fiddler.models.registry import load_config, parse_config
from fiddler.models.shapes import load_shape
from fiddler.models.weights import CheckpointSource
from fiddler.quantize.calibration import Calibration
from fiddler.quantize.measure import measure_losses, some_windows
from fiddler.quantize.run import QuantizeJob, quantize
from fiddler.quantize.sensitivity import Option, choose, choose_kinds, ladder, share_of
from fiddler.quantize.target import JOURNAL
from fiddler.rounding.grid import QUICK_SHRINKS
from fiddler.rounding.matrix import round_matrix
from offload.expert_stream import ExpertStream
from offload.prefill import PrefillExperts
from offload.prefill_costs import PrefillCosts
from tests.forward import Forward, random_texts, relative_error
from tests.model.test_parity import split_at_random
from tests.quantize.conftest import WINDOW, Quantize
from tests.quantize.test_packed_model import as_numbers
from tests.quantize.test_run import Stop, changed, contents, stop_at
from tests.tiny_models import load_oracle, shared_tiny

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


# --- models ---

KINDS = ("w8g32z", "w4g64z", "w4g32z")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model with a kind for each layer, and one with its weights as numbers."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(model_type: str) -> tuple[Path, Path]:
        if model_type not in made:
            source = shared_tiny(model_type, moe_intermediate_size=64)
            root = tmp_path_factory.mktemp(model_type)
            (root / "text.txt").write_text("".join(f"{i} is {i * i}; " for i in range(80)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fiddler.quantize.calibration.WINDOW", WINDOW)
                patch.setattr("fiddler.quantize.run.choose_kinds", given_kinds)
                job = QuantizeJob(
                    source=source,
                    output=root / "packed",
                    kind=parse_kind("w4g64z"),
                    method="rtn",
                    calibration=root / "text.txt",
                    sensitivity=0.5,
                )
                packed = quantize(job).folder
            made[model_type] = packed, as_numbers(packed, source, root / "numbers")
        return made[model_type]

    return of


def given_kinds(config: ModelConfig, *_: Any) -> list[WeightKind]:
    return [parse_kind(KINDS[layer % 3]) for layer in range(config.num_layers)]


def loaded(folder: Path, **options: Any) -> LLM:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_threads": 1}
    settings |= {"placement": split_at_random(folder, seed=1), "max_model_len": 128}
    return LLM(str(folder), **(settings | options))


def logits(folder: Path, **options: Any) -> list[torch.Tensor]:
    with loaded(folder, **options) as llm:
        return Forward(llm).logits(random_texts([9, 41], 256), [5, 33])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_a_model_computes_with_several_kinds(
    mixed: Callable[[str], tuple[Path, Path]], model_type: str
) -> None:
    packed, numbers = mixed(model_type)
    config = load_config(packed)
    assert config.packed_name is not None and "w8g32z" in config.packed_name
    oracle = load_oracle(numbers)
    with torch.inference_mode():
        wanted = [oracle(torch.tensor([t])).logits[0] for t in random_texts([9, 41], 256)]
    assert relative_error(logits(packed), wanted) < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tokens_equal_those_of_plain_weights(
    mixed: Callable[[str], tuple[Path, Path]], share: float
) -> None:
    packed, numbers = mixed("qwen3_moe")
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    prompts = random_texts([3, 30], 256, seed=5)
    found = []
    for folder, part in ((packed, share), (numbers, 0.0)):
        with loaded(folder, placement=split_at_random(folder, 1, part)) as llm:
            found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    assert found[0] == found[1]


def test_prompts_pass_through_the_ring_kind_by_kind(
    mixed: Callable[[str], tuple[Path, Path]],
) -> None:
    """In Triton's interpreter; the workers compute some, and what they cost differs by kind."""
    packed, _ = mixed("qwen3_moe")
    texts, cpu = random_texts([34, 8], 256), torch.device("cpu")
    with loaded(packed, placement=split_at_random(packed, 1, 0.4), max_batched_tokens=64) as llm:
        wanted = Forward(llm).logits(texts, [33, 5])
        hybrid, config = llm._running.experts, llm.model_config
        costs = {
            layer: PrefillCosts(
                copy_s=config.mixed[layer].bits / 4, expert_s=lambda count: 1.5, hand_over=None
            )
            for layer in hybrid.store.shape.moe_layers
        }
        with ExpertPool(1) as pool:
            hybrid._prefill = PrefillExperts(
                *(hybrid.store, pool, ExpertStream(hybrid.store, 2, cpu)),
                costs,
                llm._running.plan.popularity,
                device=cpu,
                dtype=torch.float32,
                activations="f32",
                max_tokens=64,
                top_k=config.top_k,
            )
            found = Forward(llm).logits(texts, [33, 5])
            record = hybrid._prefill.record
            hybrid._prefill.clear()
            hybrid._prefill = None
    assert record.cpu_experts and record.sent_experts
    assert relative_error(found, wanted) < 1e-5


def test_a_plan_counts_every_layers_bytes(mixed: Callable[[str], tuple[Path, Path]]) -> None:
    packed, _ = mixed("qwen3_moe")
    config = load_config(packed)
    with loaded(packed) as llm:
        memory = llm.plan.memory
        sizes = [packed_shape(config, kind).expert_bytes for kind in config.mixed]
        assert memory.gpu_experts + memory.cpu_experts == 8 * sum(sizes)
        resident = llm.plan.placement.resident
        assert memory.gpu_experts == sum(
            len(some) * size for some, size in zip(resident, sizes, strict=True)
        )
        assert llm.dtypes.expert == "w4g32z+w4g64z+w8g32z"


def test_experts_on_disk_are_of_several_kinds_too(
    mixed: Callable[[str], tuple[Path, Path]],
) -> None:
    packed, _ = mixed("qwen3_moe")
    with loaded(packed, placement=None) as llm:
        wanted, plan = Forward(llm).logits(random_texts([9, 20], 256), [5, 12]), llm.plan
    memory, kv = plan.memory, plan.memory.kv // plan.num_pages * (128 // plan.page_size)
    needed = memory.dense + memory.workspace + kv + memory.cpu_experts // 2
    options = {"placement": None, "ram_gb": needed / 2**30}
    with loaded(packed, **options) as llm:
        assert llm.plan.memory.disk_experts > 0
        found = Forward(llm).logits(random_texts([9, 20], 256), [5, 12])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_seeded_weights_are_of_the_stored_kinds(
    mixed: Callable[[str], tuple[Path, Path]],
) -> None:
    packed, _ = mixed("qwen2_moe")
    with loaded(packed, load_format="dummy") as llm:
        assert llm.dtypes.expert == load_config(packed).packed_name


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["w4g64z"], "does not name the kind of each layer's experts"),
        ("w4g64z", "does not name the kind of each layer's experts"),
        (["w4g64z", "w5g64z", "w4g64z"], "names no known kind of packed experts: 'w5g64z'"),
        (["w4g64z", "w8g64z", "w4g64z"], "shape"),
    ],
)
def test_wrong_kinds_in_a_config_are_named(
    mixed: Callable[[str], tuple[Path, Path]], tmp_path: Path, kinds: Any, said: str
) -> None:
    shutil.copytree(mixed("qwen3_moe")[0], tmp_path / "bad")
    path = tmp_path / "bad" / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"]["experts"]["kinds"] = kinds
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path / "bad", placement=None)


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
        ({"sensitivity": 0.28, "calibration": True}, r"w4g64 alone takes 0\.2812 .* than 0\.28$"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_gpu_computes_with_several_kinds(
    mixed: Callable[[str], tuple[Path, Path]], share: float, enforce_eager: bool
) -> None:
    """Prompts through the ring, whose banks hold one kind after another; decode steps in graphs."""
    packed, _ = mixed("qwen3_moe")
    texts = random_texts([9, 41, 70], 256)
    found = []
    for device, part in (("cpu", 0.0), ("cuda", share)):
        options: dict[str, Any] = {"placement": split_at_random(packed, 1, part)}
        if device == "cuda":
            options |= {"enforce_eager": enforce_eager, "vram_gb": 8}
        with loaded(packed, device=device, **options) as llm:
            found.append(Forward(llm).logits(texts, [5, 33, 64]))
    error = relative_error(found[1], found[0])
    print(f"share {share}, eager {enforce_eager}: relative error {error:.1e}")
    assert error < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["static", "adaptive"])
def test_a_gpu_generates_with_several_kinds(
    mixed: Callable[[str], tuple[Path, Path]], policy: str
) -> None:
    """In bfloat16, with pulled rows, and experts that change places: close to plain weights."""
    packed, numbers = mixed("qwen3_moe")
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, logprobs=1)
    prompts = random_texts([3, 60], 256, seed=5)
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "vram_gb": 8}
    found = []
    for folder in (packed, numbers):
        with loaded(folder, placement_policy=policy, **options) as llm:
            found.append([out.outputs[0].token_ids for out in llm.generate(prompts, params)])
    same = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(*found, strict=True)]
    print(f"{policy}: {same} of 32 tokens are those of plain weights")
    assert min(same) >= 1
