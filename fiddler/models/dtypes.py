"""Which number types a model runs in: a pure choice from what was asked and what is stored."""

from dataclasses import dataclass

from cpu_kernels.kernel_paths import Activations
from cpu_kernels.weight_kind import BF12, WeightKind, parse_kind
from fiddler.errors import ConfigError
from fiddler.models.config import KIND_JOINT

# bits of a number in the KV cache; each token and head of codes has besides a float32 scale, or for
# int4 a scale and a zero of 16 bits
KV_BITS = {"float32": 32, "bfloat16": 16, "fp8": 8, "int8": 8, "int4": 4}
KV_CODES = ("fp8", "int8", "int4")
KV_SCALE_BYTES = 4
FP8_CAPABILITY = (8, 9)  # of the first GPUs that convert fp8

FLOATS = {"float32": WeightKind("f32"), "bfloat16": WeightKind("bf16")}


@dataclass(frozen=True, slots=True)
class Dtypes:
    """``compute`` for dense weights and activations, ``expert`` for routed experts, ``kv``.

    ``few``: what the CPU rounds the activations of few tokens to before each product of an expert.

    ``expert`` may be a kind of packed weights, such as ``w4g128z``, or several joined by ``+``
    where layers differ; ``kv``, of the cache, int4, int8 or
    fp8 too.
    """

    compute: str
    expert: str
    kv: str
    few: Activations = "f32"

    def __str__(self) -> str:
        return self.weights + (f", KV {self.kv}" if self.kv != self.compute else "")

    @property
    def weights(self) -> str:
        """All but the cache's: ``float32, experts bfloat16``, or one type where both are alike."""
        return self.compute + (f", experts {self.expert}" if self.expert != self.compute else "")

    @property
    def expert_kinds(self) -> tuple[WeightKind, ...]:
        """How the kernels name them: one, unless layers differ."""
        if self.expert in FLOATS:
            return (FLOATS[self.expert],)
        return tuple(map(parse_kind, self.expert.split(KIND_JOINT)))

    @property
    def many(self) -> Activations:
        """What the CPU rounds the activations of many tokens to: bf16 where the device does too."""
        are_bf16 = all(kind.codes in ("bf16", "bf12") for kind in self.expert_kinds)
        return "bf16" if self.compute == "bfloat16" and are_bf16 else "f32"

    @property
    def expert_memory(self) -> str:
        """The type of the memory that experts lie in."""
        return self.expert if self.expert in FLOATS else "uint8"


def resolve_dtypes(
    asked: str,
    stored: str,
    *,
    has_gpu: bool,
    packed: str | None = None,
    kv: str = "auto",
    cpu_activations: str = "auto",
) -> Dtypes:
    """Choose for ``asked`` and a checkpoint whose experts are ``packed``, or stored as ``stored``.

    ``asked`` is auto, float32, bfloat16, or a kind of packed experts beside auto for the rest.

    Auto is bfloat16 on a GPU and float32 without one, where bfloat16 activations gain nothing.
    Experts stored in bfloat16 stay so even under float32: widening is exact, and half the bytes.
    Packed experts stay as they are (``packed`` names their kinds): another kind of them is refused.
    ``kv`` is what is asked of the cache; auto is the activations' type. ``cpu_activations`` is
    auto, f32 or int8, which rounded experts alone can be multiplied with; auto is int8 for them
    where activations are bfloat16: it takes half the time, and of normal numbers it rounds off 0.65
    % where four bits cost 10 %.
    """
    is_kind = asked not in ("auto", *FLOATS)
    compute = ("bfloat16" if has_gpu else "float32") if is_kind or asked == "auto" else asked
    kv = compute if kv == "auto" else kv
    if is_kind and packed is not None and asked != packed:
        raise ConfigError(
            f"the experts are stored as {packed}, from which no {asked} can be made",
            hint="leave out --dtype, or take the model that they were made from",
        )
    if packed is not None or is_kind:
        kinds = packed if packed is not None else asked
        if kinds == BF12.name:
            _refuse_int8(cpu_activations)
            return Dtypes(compute, kinds, kv)
        rounds = cpu_activations == "int8" or (cpu_activations, compute) == ("auto", "bfloat16")
        return Dtypes(compute, kinds, kv, "int8" if rounds else "f32")
    _refuse_int8(cpu_activations)
    if compute == "bfloat16" or stored == "bfloat16":
        return Dtypes(compute, "bfloat16", kv)
    return Dtypes(compute, "float32", kv)


def _refuse_int8(cpu_activations: str) -> None:
    if cpu_activations == "int8":
        raise ConfigError(
            "int8 activations are for rounded experts, and this model's are not",
            hint="leave out --cpu-activations, or round the experts with --dtype w4g128",
        )


def check_kv(dtypes: Dtypes, *, has_gpu: bool, capability: tuple[int, int] | None) -> None:
    """Raise :class:`ConfigError` for a cache that the GPU's kernels cannot read."""
    if not has_gpu:
        return
    if dtypes.kv == "bfloat16" != dtypes.compute:
        raise ConfigError(
            f"a GPU keeps no bfloat16 KV cache beside {dtypes.compute} activations",
            hint="use --kv-dtype auto, fp8, int8 or int4, or --dtype bfloat16",
        )
    if dtypes.kv == "fp8" and capability is not None and capability < FP8_CAPABILITY:
        have, need = (f"{major}.{minor}" for major, minor in (capability, FP8_CAPABILITY))
        raise ConfigError(
            f"an fp8 KV cache needs compute capability {need}, and this GPU has {have}",
            hint="use --kv-dtype int8, which is as small and more exact",
        )
