"""Whether decode steps run as CUDA graphs here, and what they are then made of."""

import logging

import torch

from fiddler.engine.runner import Runner
from fiddler.models.buckets import largest_bucket
from fiddler.models.decoder import Decoder
from fiddler.models.kernels import DeviceKernels
from offload.cold_share import ShareCosts
from offload.executor import HybridExperts
from offload.handoff_probe import Way, choose_way, forced_way, probe
from offload.pool_keeper import PoolKeeper

_log = logging.getLogger("fiddler.decode")


def decode_way(*, has_gpu: bool, enforce_eager: bool) -> Way | None:
    """How the GPU will hand work to the CPU; None without a GPU.

    Raises ConfigError where the environment asks for a way that does not work.
    """
    if not has_gpu:
        return None
    return "eager" if enforce_eager else choose_way(probe(), forced_way())


def _stay() -> None:
    """Nothing moves."""


def add_decode_steps(
    runner: Runner,
    decoder: Decoder,
    kernels: DeviceKernels,
    experts: HybridExperts,
    keeper: PoolKeeper,
    way: Way,
    *,
    dtype: torch.dtype,
    page_size: int,
    max_num_seqs: int,
    context_tokens: int,
    share: ShareCosts | None,
    is_adaptive: bool,
) -> None:
    """Give ``runner`` what it decodes with on a GPU; says what that is, once.

    ``share``: how steps share cold experts; None: the CPU computes them all.
    """
    from fiddler.engine.decode_graph import DecodeSetup
    from fiddler.engine.decode_steps import DecodeSteps
    from fiddler.models.triton_kernels import TritonKernels
    from offload.adaptive_placement import AdaptivePlacement
    from offload.decode_experts import DecodeExperts, why_not
    from offload.handoff import make_hand_off

    assert isinstance(kernels, TritonKernels)
    reason = why_not(experts.store, dtype, experts.top_k)
    if reason:
        stay = ", and experts stay where they are" if is_adaptive else ""
        _log.warning("decode steps are divided on the host, which is slower%s: %s", stay, reason)
        return
    kind = "without CUDA graphs" if way == "eager" else "as CUDA graphs"
    _log.info("decode steps run %s, hand-off by %s", kind, way)
    adaptive = AdaptivePlacement(experts.store, experts.device) if is_adaptive else None

    def make_experts() -> DecodeExperts:
        workers = keeper.pool.workers
        return DecodeExperts(
            experts,
            workers,
            make_hand_off(way, workers),
            dtype=dtype,
            max_rows=largest_bucket(max_num_seqs),
            share=share,
            adaptive=adaptive,
        )

    runner.decode_steps = DecodeSteps(
        DecodeSetup(
            decoder=decoder,
            kernels=kernels,
            kv_caches=runner.kv_caches,
            dtype=dtype,
            make_experts=make_experts,
            renew_workers=lambda: experts.renew_workers(keeper),
            workers_failed=lambda: keeper.has_failed,
            settle=adaptive.settle if adaptive is not None else _stay,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            pages_per_request=-(-context_tokens // page_size),
            is_eager=way == "eager",
        )
    )
