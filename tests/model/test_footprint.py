"""The footprint against what is really allocated for tiny models of every architecture."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddler.engine.runner import kv_cache_shape
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes, resolve_dtypes
from fiddler.models.dummy import DummySource
from fiddler.models.footprint import DTYPE_BYTES, footprint, workspace_bytes
from fiddler.models.host_memory import host_bytes
from fiddler.models.kv_cache import new_kv_caches
from fiddler.models.registry import load_config
from fiddler.models.shapes import SHAPES, load_shape
from fiddler.models.weights import load_dense
from offload.expert_store import ExpertShape, ExpertStore
from offload.placement import Placement
from offload.plan import Footprint
from tests.tiny_models import MODEL_TYPES, shared_tiny


def needs(
    config: ModelConfig,
    dtype: str = "bfloat16",
    expert_dtype: str = "bfloat16",
    kv_dtype: str | None = None,
) -> Footprint:
    return footprint(
        config,
        Dtypes(compute=dtype, expert=expert_dtype, kv=kv_dtype or dtype),
        max_batched_tokens=64,
        max_num_seqs=4,
    )


def bytes_of(*tensors: torch.Tensor | None) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weights_and_pages_take_what_is_foretold(model_type: str, dtype: str) -> None:
    config = load_config(shared_tiny(model_type))
    expected = needs(config, dtype, dtype)
    torch_dtype = getattr(torch, dtype)

    dense = load_dense(DummySource(config, 0), config, device="cpu", dtype=torch_dtype)
    per_layer = [getattr(layer, name) for layer in dense.layers for name in layer.__slots__]
    whole = bytes_of(dense.embed_VH, dense.final_norm_H, dense.lm_head_VH, *per_layer)
    assert expected.dense_bytes == whole
    assert expected.dense_read_bytes == whole - bytes_of(dense.embed_VH)

    shape = ExpertShape(
        num_layers=config.num_layers,
        moe_layers=expected.moe_layers,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        expert_size=config.expert_size,
    )
    nobody = Placement.of([()] * config.num_layers)
    store = ExpertStore(shape, nobody, device=torch.device("cpu"), dtype=torch_dtype)
    assert expected.expert_bytes == bytes_of(*store.weights(expected.moe_layers[0], 0)) / (
        config.num_experts
    )

    for kv_dtype in (dtype, "int8", "fp8", "int4"):
        page = new_kv_caches(1, kv_cache_shape(config, 1, 16), kv_dtype, "cpu")[0]
        per_token = needs(config, dtype, dtype, kv_dtype).kv_bytes_per_token
        assert per_token * 16 == config.num_layers * bytes_of(page.pages, page.scales)


def test_layers_without_experts_are_left_out() -> None:
    config = load_config(shared_tiny("qwen2_moe"))
    assert needs(config).moe_layers == (0, 2)
    assert needs(config).total_experts == 2 * config.num_experts


def test_a_tied_embedding_is_read_and_counted_once() -> None:
    tied = needs(load_config(shared_tiny("qwen3_moe", tie_word_embeddings=True)))
    apart = needs(load_config(shared_tiny("qwen3_moe")))
    assert tied.dense_read_bytes == tied.dense_bytes == apart.dense_read_bytes
    config = load_config(shared_tiny("qwen3_moe"))
    assert tied.lookup_bytes == 0
    assert apart.lookup_bytes == 2 * config.vocab_size * config.hidden_size


@given(st.integers(1, 4096), st.integers(1, 64), st.sampled_from(sorted(DTYPE_BYTES)))
def test_a_larger_step_needs_more(num_tokens: int, num_seqs: int, dtype: str) -> None:
    config, width = load_shape("qwen2-57b-a14b"), DTYPE_BYTES[dtype]

    def workspace(tokens: int, seqs: int) -> int:
        return workspace_bytes(config, width, max_batched_tokens=tokens, max_num_seqs=seqs)

    here = workspace(num_tokens, num_seqs)
    assert workspace(num_tokens + 1, num_seqs) > here
    assert workspace(num_tokens, num_seqs + 1) >= here
    # the least that must be there at once: hidden states, one gate_up and one row of logits
    widest = max(2 * config.shared_size, 2 * config.expert_size)
    assert here > num_tokens * (config.hidden_size + widest) * width + num_seqs * config.vocab_size


def test_qwen3_30b_is_as_large_as_its_card_says() -> None:
    expected = needs(load_shape("qwen3-30b-a3b"))
    whole = expected.dense_bytes + expected.total_experts * expected.expert_bytes
    assert whole / 2 == pytest.approx(30.5e9, rel=0.005)


@given(
    st.sampled_from(["mixtral-8x7b", "qwen3-30b-a3b"]),
    st.sampled_from(["bfloat16", "bf12", "w8g128", "w4g128"]),
    st.integers(1, 4096),
)
def test_the_hosts_workspace_grows_with_the_step(shape: str, dtype: str, num_tokens: int) -> None:
    """And holds at least every choice's activations in the 16 bits that they are rounded to."""
    config = load_shape(shape)
    dtypes = resolve_dtypes(dtype, "bfloat16", has_gpu=True)
    least = num_tokens * (8 * config.hidden_size + 2 * config.top_k * config.expert_size)
    one, more = (
        host_bytes(config, dtypes, num_tokens=tokens, num_threads=8)
        for tokens in (num_tokens, num_tokens + 1)
    )
    assert least <= one < more


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpus_workspace_has_room_for_every_choice(shape: str) -> None:
    config = load_shape(shape)
    sizes = {"max_batched_tokens": 512, "max_num_seqs": 1}
    least = 2 * 512 * config.top_k * sum(config.expert_sides)
    assert workspace_bytes(config, 2, **sizes, on_gpu=True) >= least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "w4g128", "w8g128"])
def test_without_a_gpu_the_workspace_has_room_for_what_workers_write_to(
    shape: str, dtype: str
) -> None:
    config = load_shape(shape)
    dtypes = resolve_dtypes(dtype, "bfloat16", has_gpu=False)
    planned = footprint(config, dtypes, max_batched_tokens=2048, max_num_seqs=1)
    written = host_bytes(config, dtypes, num_tokens=2048, num_threads=8)
    assert planned.workspace_bytes >= written, (planned.workspace_bytes, written)
