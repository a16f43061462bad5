"""Planned files: every tensor once, in files of their layer, of the sizes they will have."""

import pytest

from cpu_kernels.weight_kind import parse_kind
from fiddler.errors import QuantizeError
from fiddler.models.manifest import dense_bytes, packed_shape
from fiddler.models.quantized import check_groups
from fiddler.models.registry import parse_config
from fiddler.models.shapes import SHAPES, load_shape
from fiddler.quantize.plan import SHARD_BYTES, plan_shards


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("name", ["w4g128", "w8g32z-bf16"])
def test_known_models_are_covered(shape: str, name: str) -> None:
    config, kind = load_shape(shape), parse_kind(name)
    shards = plan_shards(config, kind)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    copied = sum(tensor.nbytes for tensor in tensors if tensor.expert is None)
    assert copied == dense_bytes(config, 2)
    moe_layers = config.num_layers - len(config.dense_layers)
    packed = [tensor for tensor in tensors if tensor.expert is not None]
    assert len(packed) == moe_layers * config.num_experts
    assert {tensor.nbytes for tensor in packed} == {packed_shape(config, kind).expert_bytes}
    assert all(shard.nbytes <= SHARD_BYTES for shard in shards)
    if name == "w4g128":
        assert sum(t.nbytes for t in packed) <= 0.27 * 2 * config.expert_numel * len(packed)


def test_a_layer_begins_a_file_and_goes_on_in_another() -> None:
    config = load_shape("mixtral-8x7b")
    kind = parse_kind("w8g128")
    whole = plan_shards(config, kind)
    assert [shard.layer for shard in whole] == [None, *range(32)]
    assert whole[0].name == "model-00001-of-00033.safetensors"
    cut = plan_shards(config, kind, shard_bytes=500_000_000)
    assert [t for shard in cut for t in shard.tensors] == [t for s in whole for t in s.tensors]
    for shard in cut:
        assert shard.nbytes <= 500_000_000 or len(shard.tensors) == 1
    assert whole[1].experts == list(range(8))


def test_names_follow_the_models_own() -> None:
    names = {
        shape: plan_shards(load_shape(shape), parse_kind("w4g64"))[1].tensors[0].name
        for shape in ("mixtral-8x7b", "qwen3-30b-a3b")
    }
    assert names == {
        "mixtral-8x7b": "model.layers.0.block_sparse_moe.experts.0.packed",
        "qwen3-30b-a3b": "model.layers.0.mlp.experts.0.packed",
    }


@pytest.mark.parametrize(
    ("sizes", "kind", "said", "hint"),
    [
        ((64, 96), "w4g64", "groups of 64 do not divide the expert width of 96", "w4g32"),
        ((192, 128), "w4g128", "groups of 128 do not divide the hidden size of 192", "32 or 64"),
        ((64, 40), "w8g32", "groups of 32 do not divide the expert width of 40", "no kind"),
    ],
)
def test_groups_that_do_not_divide_are_refused(
    sizes: tuple[int, int], kind: str, said: str, hint: str
) -> None:
    hidden, width = sizes
    raw = {"model_type": "qwen3_moe", "hidden_size": hidden, "moe_intermediate_size": width}
    with pytest.raises(QuantizeError, match=said) as caught:
        check_groups(parse_config(raw), parse_kind(kind), "--scheme")
    assert hint in caught.value.hint
