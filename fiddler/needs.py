"""From settings and a model to the bytes that a plan is made with."""

from dataclasses import replace

from fiddler.config import EngineConfig
from fiddler.models.buckets import largest_bucket
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.models.footprint import footprint
from fiddler.models.host_memory import host_bytes
from offload.hardware import Hardware
from offload.plan import Footprint


def needs_of(
    settings: EngineConfig, model: ModelConfig, hardware: Hardware, dtypes: Dtypes, tokens: int
) -> Footprint:
    """What ``model`` needs as ``settings`` ask for it, with steps of at most ``tokens``."""
    sizes = footprint(
        model,
        dtypes,
        max_batched_tokens=tokens,
        max_num_seqs=settings.num_seqs,
        max_model_len=settings.max_model_len,
        graph_rows=largest_bucket(settings.num_seqs) if hardware.has_gpu else 0,
    )
    if not hardware.has_gpu:
        return sizes
    num_threads = settings.cpu_threads or hardware.physical_cores
    host = host_bytes(model, dtypes, num_tokens=tokens, num_threads=num_threads)
    return replace(sizes, host_bytes=host)
