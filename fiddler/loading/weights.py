"""Dense weights, experts and KV pages, each to its place, and the runner that uses them."""

import torch

from fiddler.config import PAGE_SIZE
from fiddler.engine.decode_setup import add_decode_steps
from fiddler.engine.runner import Runner
from fiddler.loading.experts import load_experts
from fiddler.loading.ground import Ground
from fiddler.loading.opened import OpenedWeights
from fiddler.models.config import ModelConfig
from fiddler.models.decoder import Decoder
from fiddler.models.footprint import expert_bytes
from fiddler.models.kernels import DeviceKernels
from fiddler.models.rope import rope_tables
from fiddler.models.torch_kernels import TorchKernels
from fiddler.models.weights import DenseWeights, load_dense, load_embedding_into
from fiddler.speed import moe_layers
from offload.cold_share import ShareCosts
from offload.executor import HybridExperts
from offload.host_table import HostTable
from offload.plan import Plan


def load_weights(ground: Ground, weights: OpenedWeights) -> tuple[Runner, HybridExperts]:
    """Read everything; ``ground.resources`` learns to drop it."""
    config, plan, device = ground.config, ground.plan, ground.device
    dense = _load_dense(ground, weights)
    experts = load_experts(ground, weights)
    kernels = _kernels(config, plan, device, ground.dtype)
    decoder = Decoder(config, dense, kernels, experts)

    def renew_failed_workers() -> None:
        if ground.keeper.has_failed:
            experts.renew_workers(ground.keeper)

    runner = Runner(
        decoder,
        num_pages=plan.num_pages,
        page_size=PAGE_SIZE,
        device=device,
        kv_dtype=ground.dtypes.kv,
        renew_failed_workers=renew_failed_workers,
    )
    ground.resources.callback(runner.clear)
    if ground.way is not None:
        add_decode_steps(
            runner,
            decoder,
            kernels,
            experts,
            ground.keeper,
            ground.way,
            dtype=ground.dtype,
            page_size=PAGE_SIZE,
            max_num_seqs=ground.settings.num_seqs,
            context_tokens=plan.context_tokens,
            share=cold_share(ground),
            is_adaptive=plan.spare_slots > 0,
        )
    return runner, experts


def _load_dense(ground: Ground, weights: OpenedWeights) -> DenseWeights:
    """On the device, but for an input embedding that the plan leaves in host memory."""
    source, config, dtype = weights.numbers, ground.config, ground.dtype
    embed_VH = None
    if ground.plan.memory.cpu_dense:
        table = HostTable(config.vocab_size, config.hidden_size, dtype)
        ground.resources.callback(table.release)
        embed_VH = table.rows_VH
        load_embedding_into(source, config, embed_VH)
        table.pin()  # before all that takes longer: it may be refused
    return load_dense(source, config, device=ground.device, dtype=dtype, embed_VH=embed_VH)


def cold_share(ground: Ground) -> ShareCosts | None:
    """How decode steps share cold experts; None: the CPU computes them all."""
    assert ground.rates is not None
    (kind, *_) = ground.dtypes.expert_kinds
    size = expert_bytes(ground.config, ground.dtypes.expert, moe_layers(ground.config)[0])
    return ground.rates.share_costs(kind.codes, ground.dtypes.few, size)


def _kernels(
    config: ModelConfig, plan: Plan, device: torch.device, dtype: torch.dtype
) -> DeviceKernels:
    cos_SR, sin_SR = (table.to(device) for table in rope_tables(config, plan.context_tokens))
    sm_scale = config.head_dim**-0.5
    if device.type == "cpu":
        return TorchKernels(cos_SR, sin_SR, sm_scale, eps=config.rms_norm_eps)
    from fiddler.models.triton_kernels import TritonKernels  # triton wants a GPU

    return TritonKernels(
        *(cos_SR, sin_SR, sm_scale),
        eps=config.rms_norm_eps,
        num_experts=config.num_experts,
        dtype=dtype,
    )
