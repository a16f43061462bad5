"""``config.json`` -> ``ModelConfig``: transformers' own reading is the oracle."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.errors import CheckpointError
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import layer_parts
from fiddler.models.registry import ARCHITECTURES, load_config, parse_config
from tests.tiny_models import MODEL_TYPES, make_tiny, shared_tiny, write_v4_spelling


def oracle_config(model_type: str, **fields: Any) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(model_type, **fields)


def saved(model_type: str, **fields: Any) -> dict[str, Any]:
    """Return what transformers writes into ``config.json``."""
    raw: dict[str, Any] = json.loads(oracle_config(model_type, **fields).to_json_string())
    return raw


def test_every_known_architecture_is_tested() -> None:
    assert set(MODEL_TYPES) == set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_absent_fields_have_the_oracles_defaults(model_type: str) -> None:
    assert parse_config({"model_type": model_type}) == parse_config(saved(model_type))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fields_agree_with_the_oracle(model_type: str) -> None:
    ours, theirs = parse_config({"model_type": model_type}), oracle_config(model_type)
    expert_size = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.num_heads, ours.num_kv_heads) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_experts, ours.top_k) == (theirs.num_experts, theirs.num_experts_per_tok)
    assert ours.expert_size == expert_size
    assert ours.shared_size == getattr(theirs, "shared_expert_intermediate_size", 0)
    assert ours.norm_topk == getattr(theirs, "norm_topk_prob", True)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "rope", [None, {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}]
)
def test_both_spellings_mean_the_same(model_type: str, rope: Any, tmp_path: Path) -> None:
    overrides = {} if rope is None else {"rope_parameters": rope}
    folder = make_tiny(model_type, tmp_path, dtype="bfloat16", **overrides)
    new = load_config(folder)
    write_v4_spelling(folder)
    assert "rope_parameters" not in (folder / "config.json").read_text()
    assert load_config(folder) == new
    assert new.dtype == "bfloat16"


def test_nulls_are_derived_from_the_rest() -> None:
    raw = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": None}
    config = parse_config({"model_type": "mixtral", "head_dim": None, **raw})
    assert (config.num_kv_heads, config.head_dim) == (6, 16)


def test_expert_count_has_two_spellings() -> None:
    for key in ("num_experts", "num_local_experts"):
        for model_type in MODEL_TYPES:
            assert parse_config({"model_type": model_type, key: 24}).num_experts == 24


@given(
    layers=st.integers(1, 9),
    used=st.booleans(),
    limit=st.integers(0, 12),
    window=st.integers(1, 99),
)
@settings(max_examples=50)
def test_qwen2_window_layers(layers: int, used: bool, limit: int, window: int) -> None:
    fields = {
        "num_hidden_layers": layers,
        "use_sliding_window": used,
        "max_window_layers": limit,
        "sliding_window": window,
    }
    kinds = oracle_config("qwen2_moe", **fields).layer_types
    windowed = frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    for raw in ({"model_type": "qwen2_moe", **fields}, saved("qwen2_moe", **fields)):
        config = parse_config(raw)
        assert config.window_layers == windowed
        assert config.sliding_window == (window if windowed else None)


@pytest.mark.parametrize(("used", "expected"), [(True, 7), (False, None)])
def test_qwen3_window_holds_in_all_layers(used: bool, expected: int | None) -> None:
    raw = saved("qwen3_moe", use_sliding_window=used, sliding_window=7, num_hidden_layers=3)
    config = parse_config(raw)
    assert config.sliding_window == expected
    assert config.window_layers == (frozenset(range(3)) if used else frozenset())


def test_mixtral_window() -> None:
    config = parse_config({"model_type": "mixtral", "sliding_window": 9, "num_hidden_layers": 2})
    assert (config.sliding_window, config.window_layers) == (9, frozenset({0, 1}))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(("step", "listed"), [(1, []), (2, []), (3, [2]), (1, [0, 4]), (9, [])])
def test_dense_layers_are_where_the_oracle_has_no_router(
    model_type: str, step: int, listed: list[int]
) -> None:
    import transformers

    fields = {"decoder_sparse_step": step, "mlp_only_layers": listed, "num_hidden_layers": 5}
    theirs = oracle_config(model_type, hidden_size=64, vocab_size=32, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    dense = {i for i, layer in enumerate(model.model.layers) if not hasattr(layer.mlp, "gate")}
    config = parse_config({"model_type": model_type, **fields})
    assert config.dense_layers == dense
    assert dense == {i for i in range(5) if "dense_down_HF" in layer_parts(config, i)}


def test_end_of_text_ids_of_both_files_count(tmp_path: Path) -> None:
    folder = make_tiny("olmoe", tmp_path, eos_token_id=[7, 9])
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 3]}')
    assert load_config(folder).eos_token_ids == (7, 9, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_absent_dtype_is_read_from_the_weights(dtype: str, tmp_path: Path) -> None:
    folder = make_tiny("mixtral", tmp_path, dtype=dtype, sharded=True)
    raw = json.loads((folder / "config.json").read_text())
    assert raw.pop("dtype") == dtype
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_config(folder).dtype == dtype


def test_yarn_raises_the_context() -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
    raw = {"model_type": "qwen3_moe", "max_position_embeddings": 1200, "rope_scaling": rope}
    assert parse_config(raw).max_position == 4000


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"vocab_size": None}, "vocab_size"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_experts_per_tok": 1000}, "num_experts_per_tok"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"dtype": "float8_e4m3fn"}, "dtype"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
    ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "hqq"),
]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("fields", "named"), BAD_FIELDS)
def test_what_we_do_not_compute_is_refused(
    model_type: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config({"model_type": model_type, **fields})


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("olmoe", {"sliding_window": 128}),
        ("qwen2_moe", {"layer_types": ["sliding_attention"], "num_hidden_layers": 1}),
        ("qwen2_moe", {"layer_types": ["chunked_attention"], "num_hidden_layers": 1}),
        ("qwen2_moe", {"layer_types": ["full_attention"], "num_hidden_layers": 2}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 0}),
        ("mixtral", {"sliding_window": 0}),
    ],
)
def test_windows_we_do_not_compute_are_refused(model_type: str, fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        parse_config({"model_type": model_type, **fields})


@pytest.mark.parametrize("raw", [{"model_type": "llama"}, {}, {"model_type": "../evil"}])
def test_an_unknown_architecture_lists_the_known_ones(raw: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="unknown architecture") as caught:
        parse_config(raw)
    assert all(name in caught.value.hint for name in ARCHITECTURES)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe{}"])
def test_a_damaged_config_file_is_one_sentence(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_reading_a_config_imports_no_torch() -> None:
    folder = shared_tiny("qwen3_moe")
    code = (
        "import sys; from fiddler.models.registry import load_config; "
        f"load_config({str(folder)!r}); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


def test_the_record_is_frozen() -> None:
    config: ModelConfig = parse_config({"model_type": "mixtral"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 3  # type: ignore[misc]
