"""How many bytes a model needs, from its configuration alone: what the planner plans with.

Shapes in the formulas: T tokens of the largest step, H hidden, D head dim, V vocabulary.
"""

from cpu_kernels.weight_kind import parse_kind
from fiddler.models.buckets import bucket_number
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import KV_BITS, KV_CODES, KV_SCALE_BYTES, Dtypes
from fiddler.models.manifest import dense_bytes, packed_shape
from offload.layout import MOST_CONTEXT
from offload.plan import Footprint

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # float16 in files only
FLOAT32 = 4
MIB = 1 << 20
# A stream of its own to capture in has a workspace of cuBLAS: 32 MiB on Hopper, 8 before.
GRAPH_FIXED_BYTES = 40 * MIB
GRAPH_BYTES = 8 * MIB  # of one graph with its intermediate results: about 1,000 launches

# Rows of prompt logits made at a time. Of 151,936 words each takes 2.7 MB, on a GPU the room of an
# expert in four bits; on a CPU 16 rows at a time take 2.1 times as long as 64.
LOGIT_ROWS, GPU_LOGIT_ROWS = 64, 16
DECODE_PROGRAMS = 1024  # split-KV parts in flight: four for each of 256 multiprocessors, at most


def footprint(
    config: ModelConfig,
    dtypes: Dtypes,
    *,
    max_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int | None = None,
    graph_rows: int = 0,
) -> Footprint:
    """Return what ``config`` needs in those types.

    A step has at most ``max_batched_tokens`` tokens of ``max_num_seqs`` requests. ``max_model_len``
    bounds the rotary tables (None: the longest context that is chosen unasked). ``graph_rows``: of
    the largest step that is kept as a CUDA graph; 0: there is no GPU.
    """
    width = DTYPE_BYTES[dtypes.compute]
    embedding = config.vocab_size * config.hidden_size * width
    dense = dense_bytes(config, width)
    moe_layers = tuple(i for i in range(config.num_layers) if config.is_moe_layer(i))
    sizes = tuple(expert_bytes(config, dtypes.expert, layer) for layer in moe_layers)
    positions = max_model_len or min(config.max_position, MOST_CONTEXT)
    return Footprint(
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
        moe_layers=moe_layers,
        expert_bytes=max(sizes),
        layer_bytes=sizes if len(set(sizes)) > 1 else (),
        dense_bytes=dense,
        dense_read_bytes=dense if config.tie_embeddings else dense - embedding,
        step_tokens=max_batched_tokens,
        kv_bytes_per_token=config.num_layers * kv_bytes(config, dtypes.kv),
        workspace_bytes=_rotary_bytes(config, positions)
        + workspace_bytes(
            config,
            width,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=max_num_seqs,
            on_gpu=graph_rows > 0,
        )
        # one expert, widened by torch; a GPU's kernels do so in registers
        + (config.expert_numel * width if dtypes.expert != dtypes.compute and not graph_rows else 0)
        + (_graph_bytes(config, width, graph_rows) if graph_rows else 0),
    )


def expert_bytes(config: ModelConfig, expert_dtype: str, layer: int) -> int:
    """Of one routed expert of a layer in memory: ``float32``, ``bfloat16`` or packed."""
    if expert_dtype in DTYPE_BYTES:
        return config.expert_numel * DTYPE_BYTES[expert_dtype]
    kind = config.mixed[layer] if config.mixed else parse_kind(expert_dtype)
    return packed_shape(config, kind).expert_bytes


def kv_bytes(config: ModelConfig, kv_dtype: str) -> int:
    """Of one token's key and value in one layer."""
    head = config.head_dim * KV_BITS[kv_dtype] // 8
    head += KV_SCALE_BYTES if kv_dtype in KV_CODES else 0
    return 2 * config.num_kv_heads * head


def workspace_bytes(
    config: ModelConfig,
    width: int,
    *,
    max_batched_tokens: int,
    max_num_seqs: int,
    on_gpu: bool = False,
) -> int:
    """Activations of the largest step, ``width`` bytes a number unless the formula says float32.

    The phases are summed though they follow each other: torch's allocator keeps the blocks of one
    phase while the next asks for other sizes.
    """
    per_token = (
        _stream_bytes(config, width)
        + _attention_bytes(config, width)
        + _ffn_bytes(config, width)
        + _expert_bytes(config, width, on_gpu=on_gpu)
    )
    rows = max(max_num_seqs, logit_rows(on_gpu=on_gpu))
    return (
        max_batched_tokens * per_token
        + _split_kv_bytes(config, max_num_seqs)
        + rows * _logit_row_bytes(config, width)
    )


def logit_rows(*, on_gpu: bool) -> int:
    """How many rows of a prompt's logits the engine makes at a time."""
    return GPU_LOGIT_ROWS if on_gpu else LOGIT_ROWS


def _graph_bytes(config: ModelConfig, width: int, rows: int) -> int:
    """Captured decode steps of up to ``rows`` requests: buffers that stay, and what holds them.

    Logits as computed, as float32, as given back, and scaled by the sampler.
    """
    logits = rows * config.vocab_size * (width + 3 * FLOAT32)
    return GRAPH_FIXED_BYTES + bucket_number(rows) * GRAPH_BYTES + logits


def _stream_bytes(config: ModelConfig, width: int) -> int:
    """Residual stream before and after an addition, and its normed copy."""
    return 3 * config.hidden_size * width


def _attention_bytes(config: ModelConfig, width: int) -> int:
    """Fused q, k and v; rotated q; attention's output; the output projection's."""
    heads = 3 * config.num_heads + 2 * config.num_kv_heads
    return (heads * config.head_dim + config.hidden_size) * width


def _ffn_bytes(config: ModelConfig, width: int) -> int:
    """Gate and up, their product and the result of the shared expert or dense layer."""
    inner = max(config.shared_size, config.dense_size if config.dense_layers else 0)
    return (3 * inner + config.hidden_size) * width if inner else 0


def _expert_bytes(config: ModelConfig, width: int, *, on_gpu: bool) -> int:
    """Router scores (logits and float32 softmax), the experts' part, and the float32 sums of both
    sides. GPUs, and CPU workers, compute all experts together: the product and the result of every
    choice. Torch in place of a GPU, for every token at one expert: the gathered rows, gate and up,
    their product and the result."""
    router = config.num_experts * (width + FLOAT32) + config.top_k * 2 * (8 + FLOAT32)
    hidden, inner = config.expert_sides
    one_expert = 3 * inner * width + 2 * hidden * width
    grouped = config.top_k * (inner + hidden) * width
    sums = 5 * hidden * FLOAT32  # scaled result, hot, cold, both, copy for the host
    return router + (grouped if on_gpu else max(one_expert, grouped)) + sums


def _split_kv_bytes(config: ModelConfig, max_num_seqs: int) -> int:
    """Float32 parts of split-KV attention, each with its log-sum-exp."""
    group = config.num_heads // config.num_kv_heads
    parts = DECODE_PROGRAMS + max_num_seqs * config.num_kv_heads
    return parts * group * (config.head_dim + 1) * FLOAT32


def _logit_row_bytes(config: ModelConfig, width: int) -> int:
    """Logits as computed, as float32, adjusted row by row, all of these, scaled by the sampler."""
    return config.vocab_size * (width + 4 * FLOAT32)


def _rotary_bytes(config: ModelConfig, positions: int) -> int:
    """Cosine and sine, float32 ``[positions, D/2]`` each."""
    return positions * config.head_dim * FLOAT32
