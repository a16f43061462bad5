"""Checkpoints of other programs give what the oracle computes with the numbers they stand for."""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import parse_kind
from fiddler import SamplingParams
from fiddler.errors import CheckpointError, ConfigError, NumericsError, QuantizeError
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.foreign.source import ForeignSource
from fiddler.models.registry import load_config, parse_config
from fiddler.quantize.run import QuantizeJob, quantize
from tests.foreign import writers
from tests.forward import Forward, random_texts, relative_error
from tests.quantize.packed_runs import loaded
from tests.tiny_models import load_oracle, shared_tiny

WIDTH = {"mixtral": "intermediate_size", "olmoe": "intermediate_size"}
PROMPTS = [1, 7, 33]


def group_scheme(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def integers(bits: int, group: int | None, sym: bool) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    known = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy}
    return group_scheme("pack-quantized", **known, group_size=group, actorder=None)


def gptq_scheme(bits: int, group: int, sym: bool, **more: Any) -> dict[str, Any]:
    known = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym}
    return known | {"desc_act": False} | more


Case = tuple[dict[str, Any], Callable[[Any], writers.Written], str]
partial = functools.partial
CASES: dict[str, Case] = {
    "gptq": (gptq_scheme(4, 32, True), partial(writers.gptq, group=32), "w4g32"),
    "gptq-zeros": (
        gptq_scheme(4, 64, False, checkpoint_format="gptq"),
        partial(writers.gptq, group=64, sym=False),
        "w4g64z",
    ),
    "gptq-v2": (
        gptq_scheme(4, 32, False, checkpoint_format="gptq_v2"),
        partial(writers.gptq, group=32, sym=False, version=2),
        "w4g32z",
    ),
    "gptq-8": (gptq_scheme(8, 32, True), partial(writers.gptq, group=32, bits=8), "w8g32"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        partial(writers.awq, group=32),
        "w4g32z",
    ),
    "packed": (integers(4, 64, True), partial(writers.pack_quantized, group=64), "w4g64-bf16"),
    "packed-zeros": (
        integers(4, 32, False),
        partial(writers.pack_quantized, group=32, sym=False, dtype=torch.float16),
        "w4g32z",
    ),
    "packed-rows-8": (
        integers(8, None, True),
        partial(writers.pack_quantized, group=0, bits=8),
        "w8g128-bf16",
    ),
    "mxfp4-packed": (
        group_scheme("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
        writers.mxfp4_packed,
        "w8g32-bf16",
    ),
    "fp8": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        writers.fp8,
        "w8g128",
    ),
    "fp8-rows": (
        group_scheme("float-quantized", num_bits=8, type="float", strategy="channel"),
        partial(writers.fp8, block=(1, 0), name="weight_scale"),
        "w8g128",
    ),
}
VARIANTS = {"gptq", "gptq-v2", "gptq-8", "packed-rows-8", "fp8-rows"}  # test_layouts.py has them
ROUNDED = {"fp8", "fp8-rows"}  # on the way to int8; all others are exact


def tiny(model_type: str, case: str) -> Path:
    """Sides that groups of 64 divide, or of one and a half blocks for fp8."""
    width = WIDTH.get(model_type, "moe_intermediate_size")
    if case in ROUNDED:
        return shared_tiny(model_type, hidden_size=192, **{width: 160})
    own: dict[str, Any] = {
        "qwen2_moe": {"shared_expert_intermediate_size": 96},
        "qwen3_moe": {"head_dim": 32},
    }
    return shared_tiny(model_type, **{width: 64}, **own.get(model_type, {}))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    @functools.cache
    def of(case: str, model_type: str = "qwen3_moe") -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(f"{case}-{model_type}")
        scheme, writer, _ = CASES[case]
        return writers.write(tiny(model_type, case), folder, writer, scheme)

    return of


def our_logits(folder: Path, **options: Any) -> list[torch.Tensor]:
    with loaded(folder, **options) as llm:
        texts = random_texts([n + 4 for n in PROMPTS], llm.model_config.vocab_size)
        return Forward(llm).logits(texts, PROMPTS)


def oracle_logits(folder: Path) -> list[torch.Tensor]:
    oracle = load_oracle(folder)
    texts = random_texts([n + 4 for n in PROMPTS], oracle.config.vocab_size)
    with torch.inference_mode():
        return [oracle(torch.tensor([text])).logits[0] for text in texts]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in VARIANTS else c for c in CASES]
)
def test_logits_equal_the_oracles_on_the_same_numbers(written: Any, case: str) -> None:
    stored, plain = written(case)
    config = load_config(stored)
    assert config.packed == parse_kind(CASES[case][2])
    error = relative_error(our_logits(stored), oracle_logits(plain))
    print(f"{case}: relative error {error:.1e}")
    assert error < (0.03 if case in ROUNDED else 1e-4)


@pytest.mark.parametrize("case", ["gptq", "awq"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_every_architecture_is_read(written: Any, case: str, model_type: str) -> None:
    """Shared experts and dense layers too."""
    stored, plain = written(case, model_type)
    assert relative_error(our_logits(stored), oracle_logits(plain)) < 1e-4


@pytest.mark.parametrize("case", ["gptq-zeros", "awq", "packed-zeros", "fp8", "mxfp4-packed"])
def test_rows_may_be_read_in_pieces(
    written: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(case)[0]
    config = load_config(folder)
    assert config.packed is not None and config.foreign is not None
    shape = PackedShape(config.packed, config.hidden_size, config.expert_size)
    name = "model.layers.0.self_attn.k_proj.weight"
    whole: tuple[torch.Tensor, ...] = ()
    for chunk in (1 << 21, 16 * 64, 48 * 64):
        monkeypatch.setattr("fiddler.models.packing.CHUNK", chunk)
        monkeypatch.setattr("fiddler.models.foreign.source.CHUNK", chunk)
        with Checkpoint.open(folder) as checkpoint:
            source = ForeignSource(checkpoint, config, config.foreign)
            out_B = torch.zeros(shape.expert_bytes, dtype=torch.uint8)
            source.packing(config.packed)(1, 5, out_B)
            k_MH = source.tensor(name, (config.num_kv_heads * config.head_dim, config.hidden_size))
        whole = whole or (out_B, k_MH)
        assert torch.equal(out_B, whole[0]) and torch.equal(k_MH, whole[1])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_stacked_mxfp4_is_exact(tmp_path: Path, model_type: str) -> None:
    """As gpt-oss stores it, in the names of our architectures."""
    names = {"mixtral": ("w1", "w3", "w2")}.get(model_type, ("gate_proj", "up_proj", "down_proj"))
    source = tiny(model_type, "mxfp4")
    stored, plain = writers.write_stacked_mxfp4(source, tmp_path, names, num_experts=8)
    assert load_config(stored).packed == parse_kind("w8g32-bf16")
    assert relative_error(our_logits(stored), oracle_logits(plain)) < 1e-4


def test_the_plan_counts_what_experts_become(written: Any) -> None:
    with loaded(written("gptq-zeros")[0], vram_gb=1) as llm:
        memory = llm.plan.memory
        expert = PackedShape(parse_kind("w4g64z"), 64, 64).expert_bytes
        assert memory.gpu_experts + memory.cpu_experts == 24 * expert
        assert llm.dtypes.expert == "w4g64z"


def test_another_type_is_refused_and_seeded_weights_are_of_the_kind(written: Any) -> None:
    stored, _ = written("awq")
    with pytest.raises(ConfigError, match="stored as w4g32z, from which no w8g32"):
        loaded(stored, dtype="w8g32")
    with loaded(stored, load_format="dummy") as llm:
        params = SamplingParams(max_tokens=2, temperature=0)
        assert llm.dtypes.expert == "w4g32z" and llm.generate([5, 6], params)
    job = QuantizeJob(
        source=stored, output=stored.parent / "again", kind=parse_kind("w4g32"), method="rtn"
    )
    with pytest.raises(QuantizeError, match="quantised already"):
        quantize(job)


GPTQ, AWQ = gptq_scheme(4, 128, True), CASES["awq"][0]
UNKNOWN: dict[str, tuple[Any, str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "(bitsandbytes)"),
    "no name": ({"bits": 4}, "(unnamed scheme)"),
    "gguf": ("gguf", "(gguf)"),
    "3 bits": (GPTQ | {"bits": 3}, "(gptq, 3 bits)"),
    "groups of 16": (GPTQ | {"group_size": 16}, "(gptq, groups of 16)"),
    "list of bits": (GPTQ | {"bits": [4]}, "(gptq, [4] bits)"),
    "list of methods": ({"quant_method": ["gptq"]}, "(quant_method ['gptq'])"),
    "list of formats": (
        group_scheme("pack-quantized", num_bits=4) | {"format": ["x"]},
        "(compressed-tensors, format ['x'])",
    ),
    "sparsity": (
        group_scheme("pack-quantized", num_bits=4) | {"sparsity_config": "x"},
        "(compressed-tensors, sparsity_config x)",
    ),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "(gptq, checkpoint_format marlin)"),
    "gemv": (AWQ | {"version": "gemv"}, "(awq, version gemv)"),
    "fp8 tensors": ({"quant_method": "fp8"}, "(fp8, weight_block_size None)"),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        "(fp8, weight_block_size [64, 64])",
    ),
    "nvfp4": (
        group_scheme("nvfp4-pack-quantized", num_bits=4),
        "(compressed-tensors, nvfp4-pack-quantized)",
    ),
    "mixed": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
        },
        "(compressed-tensors, several schemes in one model)",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_scheme_is_named(written: Any, tmp_path: Path, name: str) -> None:
    scheme, said = UNKNOWN[name]
    raw = json.loads((written("awq")[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": scheme}))
    with pytest.raises(CheckpointError, match=re.escape(f"the weights are quantised {said}")):
        load_config(tmp_path)


JUNK: list[Any] = [None, True, -128, 4.0, "x", [], [4], [[4]], {}, {"x": [4]}]


def with_junk(value: Any, junk: Any) -> Iterator[tuple[str, Any]]:
    """``value`` with ``junk`` in one place, wherever that may be, and the place's name."""
    fields = value.items() if isinstance(value, dict) else enumerate(value)
    for key, old in fields:
        changed = value.copy()
        changed[key] = junk
        yield f".{key}", changed
        for place, inner in with_junk(old, junk) if isinstance(old, dict | list) else ():
            changed[key] = inner
            yield f".{key}{place}", changed


@pytest.mark.parametrize("junk", JUNK, ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_a_malformed_scheme_is_one_sentence(case: str, junk: Any) -> None:
    """Or means something; it never ends in an error of Python's."""
    scheme = CASES[case][0] | {"format": CASES[case][0].get("format"), "sparsity_config": {}}
    raw = json.loads((tiny("qwen3_moe", case) / "config.json").read_text())
    for place, changed in with_junk({"quantization_config": scheme}, junk):
        try:
            parse_config(raw | changed)
        except CheckpointError as error:
            assert "\n" not in str(error), place


EXPERT = "model.layers.1.mlp.experts.5.up_proj"


@pytest.mark.parametrize(
    ("case", "change", "error", "said"),
    [
        ("gptq", {"g_idx": lambda x: x.flip(0)}, CheckpointError, "desc_act"),
        ("gptq", {"qzeros": lambda x: x + 1}, CheckpointError, "sym = true"),
        ("gptq", {"scales": lambda x: x * float("nan")}, NumericsError, "holds NaN or Inf"),
        ("gptq", {"qweight": None}, CheckpointError, "has no tensor"),
        ("awq", {"qzeros": lambda x: x[:, :-1]}, CheckpointError, "has shape"),
        ("packed", {"weight_packed": lambda x: x.long()}, CheckpointError, "has dtype I64"),
        (
            "packed",
            {"weight_g_idx": lambda x: torch.arange(64, dtype=torch.int32)},
            CheckpointError,
            "actorder",
        ),
        ("fp8", {"weight_scale_inv": lambda x: x * float("inf")}, NumericsError, "NaN or Inf"),
        ("mxfp4-packed", {"weight_scale": lambda x: x * 0 + 255}, NumericsError, "NaN or Inf"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_right_is_one_sentence(
    written: Any, tmp_path: Path, case: str, change: Any, error: Any, said: str
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(written(case)[0], folder)
    tensors = load_file(folder / "model.safetensors")
    for suffix, of in change.items():
        old = tensors.pop(f"{EXPERT}.{suffix}", None)
        if of is not None:
            tensors[f"{EXPERT}.{suffix}"] = of(old).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(error, match=re.escape(EXPERT)) as info:
        loaded(folder)
    assert said in str(info.value)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_the_same_logits(written: Any, case: str) -> None:
    stored, _ = written(case)
    error = relative_error(our_logits(stored, device="cuda", vram_gb=8), our_logits(stored))
    print(f"{case}: relative error {error:.1e}")
    assert error < 1e-4
