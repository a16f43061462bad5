"""Every setting of an engine, resolved once; nothing below this reads the environment."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from fiddler.dtype_names import check_dtype
from fiddler.errors import ConfigError, named_arguments
from offload.objective import DEFAULT as DEFAULT_OBJECTIVE
from offload.objective import parse_objective
from offload.units import MOST_GIB

if TYPE_CHECKING:
    from offload.placement import Placement

PAGE_SIZE = 16  # tokens per KV page
MAX_NUM_SEQS = 16  # unasked
BUILTIN = "builtin"

CPU_ACTIVATIONS = ("auto", "f32", "int8")
KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8", "int8", "int4")
DEVICES = ("auto", "cuda", "cpu")
LOAD_FORMATS = ("auto", "dummy")
PLACEMENT_POLICIES = ("auto", "static", "adaptive")


@named_arguments("engine option")
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one :class:`fiddler.LLM`.

    ``model`` is ``builtin``, a folder, or ``ORG/NAME[@REVISION]``; with ``load_format="dummy"`` it
    may be a named shape and the weights are seeded normal numbers. ``vram_gb`` and ``ram_gb`` are
    GiB; VRAM is counted as the driver counts it, the CUDA context included. Without a GPU
    ``vram_gb`` sizes an emulated GPU side that the CPU computes. None means: choose.
    """

    model: str = BUILTIN
    revision: str | None = None
    token: str | None = None
    offline: bool = False
    load_format: str = "auto"
    dtype: str = "auto"  # a kind of packed experts: made while loading, the rest as by auto
    kv_cache_dtype: str = "auto"  # auto: that of the activations
    cpu_activations: str = "auto"  # of decode steps, before rounded experts on the CPU
    device: str = "auto"
    vram_gb: float | None = None
    ram_gb: float | None = None
    # tokens of context; None: as a tenth of the room holds, from 2,048 to 32,768 (offload.layout)
    max_model_len: int | None = None
    max_num_seqs: int | None = None  # requests at once; None: up to 16, planned for one
    max_batched_tokens: int | None = None  # tokens of one step; None: by the objective
    objective: str = DEFAULT_OBJECTIVE  # least time of: decode, prefill, mix or mix:P:N tokens
    tbt_target_ms: float | None = None  # longest step while requests decode; None: any
    prefix_caching: bool = True
    enforce_eager: bool = False  # no CUDA graphs, for finding out what goes wrong
    cpu_threads: int | None = None  # None: as many as the machine bears, measured once
    profile: str | None = (
        None  # path of a profile.json; None: the one shipped with the model, if any
    )
    placement: "Placement | None" = None  # exact placement instead of a planned one
    # "adaptive": experts change places while decoding on a GPU; "auto": so where that is likely to
    # help, which is without a profile, and with many experts in a layer
    placement_policy: str = "auto"
    seed: int = 0  # of dummy weights, and of requests that bring none

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ConfigError(f"model must be a name or a folder, not {self.model!r}")
        check_dtype(self.dtype)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("cpu_activations", self.cpu_activations, CPU_ACTIVATIONS)
        _one_of("device", self.device, DEVICES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("placement_policy", self.placement_policy, PLACEMENT_POLICIES)
        for name in ("vram_gb", "ram_gb"):
            check_gib(name, getattr(self, name))
        if not isinstance(self.objective, str):
            raise ConfigError(f"objective must be a word such as decode, not {self.objective!r}")
        parse_objective(self.objective)
        tbt = self.tbt_target_ms
        if tbt is not None and not (_is_number(tbt, Real) and 0 < tbt < float("inf")):
            raise ConfigError(f"tbt_target_ms must be more than 0 milliseconds, not {tbt!r}")
        for name in ("max_model_len", "max_num_seqs", "max_batched_tokens", "cpu_threads"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value, Integral) and value >= 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")

    @property
    def num_seqs(self) -> int:
        """The most requests that run at once."""
        return MAX_NUM_SEQS if self.max_num_seqs is None else self.max_num_seqs


def check_gib(name: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is None or a number of GiB."""
    if value is not None and not (_is_number(value, Real) and 0 <= value <= MOST_GIB):
        raise ConfigError(f"{name} must be 0 or more GiB, not {value!r}")


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(f"{name} must be one of {', '.join(valid)}, not {value!r}")
