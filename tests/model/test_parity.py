"""fiddler against ``transformers``, for every architecture and wherever the experts lie."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fiddler import LLM, Placement, SamplingParams
from fiddler.models.registry import load_config
from fiddler.outputs import RequestOutput
from tests.forward import Forward, random_texts, relative_error
from tests.tiny_models import MODEL_TYPES, load_oracle, shared_tiny

BUILTIN = Path(__file__).parents[2] / "fiddler" / "assets" / "builtin"
MODELS = (*MODEL_TYPES, "builtin")
RAGGED = [1, 7, 16, 33, 70]  # prompt lengths; 16 is one page
NUM_DECODES = 32

cpu_and_gpu = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def folder_of(model: str, dtype: str = "float32") -> Path:
    return BUILTIN if model == "builtin" else shared_tiny(model, dtype=dtype)


def split_at_random(folder: Path, seed: int, share: float = 0.5) -> Placement:
    config = load_config(folder)
    rng = random.Random(seed)
    return Placement.of(
        [e for e in range(config.num_experts) if rng.random() < share]
        if config.is_moe_layer(layer)
        else []
        for layer in range(config.num_layers)
    )


@contextmanager
def loaded(model: str, device: str, **options: Any) -> Iterator[LLM]:
    folder = folder_of(model, options.pop("stored", "float32"))
    share = options.pop("share", 0.5)
    if device == "cuda":
        options.setdefault("vram_gb", 8)
    with LLM(
        str(folder),
        device=device,
        max_model_len=256,
        placement=split_at_random(folder, seed=1, share=share),
        **options,
    ) as llm:
        yield llm


@cache
def oracle_logits(
    folder: Path, dtype: str, device: str, lengths: tuple[int, ...]
) -> list[torch.Tensor]:
    """Logits of whole texts, one at a time, without any cache."""
    oracle = load_oracle(folder, dtype).to(device)
    texts = random_texts(list(lengths), oracle.config.vocab_size)
    with torch.inference_mode():
        return [oracle(torch.tensor([t], device=device)).logits[0].float().cpu() for t in texts]


def our_logits(llm: LLM, prompt_lens: list[int], num_decodes: int) -> list[torch.Tensor]:
    texts = random_texts([n + num_decodes for n in prompt_lens], llm.model_config.vocab_size)
    return Forward(llm).logits(texts, prompt_lens)


@cpu_and_gpu
@pytest.mark.parametrize("model", MODELS)
def test_logits_of_a_ragged_batch_and_its_decode_steps(model: str, device: str) -> None:
    with loaded(model, device, dtype="float32") as llm:
        found = our_logits(llm, RAGGED, NUM_DECODES)
    lengths = tuple(n + NUM_DECODES for n in RAGGED)
    wanted = oracle_logits(folder_of(model), "float32", "cpu", lengths)
    print(f"{model} {device} float32: relative error {relative_error(found, wanted):.1e}")
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative_error([ours], [theirs]) < 1e-4
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@cpu_and_gpu
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_the_oracles(model: str, device: str) -> None:
    oracle = load_oracle(folder_of(model))
    prompts = random_texts([5, 40], oracle.config.vocab_size, seed=3)
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    with loaded(model, device, dtype="float32") as llm:
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        wanted = oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output.outputs[0].token_ids == wanted[0, len(prompt) :].tolist()


def outputs(model: str, device: str, share: float) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    with loaded(model, device, dtype="float32", share=share) as llm:
        return llm.generate(random_texts([3, 30], llm.model_config.vocab_size, seed=5), params)


@cache
def tokens_of_the_cpu(model: str) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in outputs(model, "cpu", 0.0)]


@cpu_and_gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_any_placement_gives_the_same_tokens(model: str, share: float, device: str) -> None:
    found = outputs(model, device, share)
    assert [out.outputs[0].token_ids for out in found] == tokens_of_the_cpu(model)
    hits = sum(out.stats.expert_tokens_gpu for out in found)
    misses = sum(out.stats.expert_tokens_cpu for out in found)
    assert (hits == 0) == (share == 0.0) and (misses == 0) == (share == 1.0)


@cpu_and_gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_bfloat16_is_no_further_from_float32_than_the_oracles(
    model: str, share: float, device: str
) -> None:
    """Both are measured against float32 on the same bfloat16 weights, over 600 positions."""
    lengths = tuple(n + NUM_DECODES for n in RAGGED * 2)
    folder = folder_of(model, "bfloat16")
    exact = oracle_logits(folder, "float32", "cpu", lengths)
    theirs = relative_error(oracle_logits(folder, "bfloat16", device, lengths), exact)
    with loaded(model, device, dtype="bfloat16", stored="bfloat16", share=share) as llm:
        ours = relative_error(our_logits(llm, RAGGED * 2, NUM_DECODES), exact)
    print(f"{model} {device} share {share}: ours {ours:.2e}, transformers {theirs:.2e}")
    assert ours <= 1.2 * theirs


@pytest.mark.parametrize("model", MODEL_TYPES)
def test_sliding_windows_match(model: str) -> None:
    """Only some architectures have them; the others must ignore the key as the oracle does."""
    if model == "olmoe":
        pytest.skip("OLMoE has no sliding window")
    windows: dict[str, Any] = {"sliding_window": 20}
    if model != "mixtral":
        windows |= {"use_sliding_window": True, "max_window_layers": 1}
    folder = shared_tiny(model, **windows)
    with LLM(str(folder), dtype="float32", device="cpu", max_model_len=256) as llm:
        assert llm.model_config.window_layers
        found = our_logits(llm, RAGGED, NUM_DECODES)
    lengths = tuple(n + NUM_DECODES for n in RAGGED)
    assert relative_error(found, oracle_logits(folder, "float32", "cpu", lengths)) < 1e-4


def test_the_files_decide_the_stored_dtype_not_the_config(tmp_path: Path) -> None:
    """Float32 experts under a config that says bfloat16 must not be rounded."""
    folder = tmp_path / "tiny"
    shutil.copytree(shared_tiny("mixtral"), folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    with LLM(folder, dtype="float32", device="cpu", max_model_len=256) as llm:
        found = our_logits(llm, RAGGED, 4)
    lengths = tuple(n + 4 for n in RAGGED)
    wanted = oracle_logits(shared_tiny("mixtral"), "float32", "cpu", lengths)
    assert relative_error(found, wanted) < 1e-5
