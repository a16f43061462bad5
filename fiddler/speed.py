"""From a model and its plan to what a prediction of its speed needs, and to the machine's rates."""

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from fiddler._version import __version__
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.models.footprint import DTYPE_BYTES, expert_bytes, kv_bytes
from fiddler.models.manifest import layer_parts
from fiddler.models.stored import stored_bytes
from offload.calibration import Calibration, default_path
from offload.chances import LayerChances, blind_chances, law_chances, placed_chances
from offload.demand import Demand, decode_work, prefill_work
from offload.hardware import Hardware, probe
from offload.limits import decode_limit_s, prefill_limit_s
from offload.machine_facts import settings_of, this_machine
from offload.machine_rates import RATES, MachineRates
from offload.plan import GpuSide, Plan
from offload.prediction import Prediction, predict_decode
from offload.prefill_prediction import predict_prefill
from offload.reference_machines import ReferenceMachine, check_kernels, reference_for
from offload.routing_law import Law

PROMPT = 1024  # tokens
NO_GPU = "this machine has no GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class RatesHere:
    """Rates to predict with: this machine's, or those of the machine called ``name``.

    ``why_not_own``: where nobody has asked for that one.
    """

    rates: MachineRates
    name: str
    origin: str
    why_not_own: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What is predicted of ``rows`` requests at once: a step behind ``num_tokens``, and reading as
    many of each.

    Limits are the least seconds of either.
    """

    rates: RatesHere
    rows: int
    num_tokens: int
    decode: Prediction
    prefill: Prediction
    decode_limit_s: float
    prefill_limit_s: float

    @property
    def decode_rate(self) -> float:
        """Tokens a second of all requests."""
        return self.rows / self.decode.seconds

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.rows * self.num_tokens / self.prefill.seconds

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "machine": self.rates.name or "this machine",
            "origin": self.rates.origin,
            "why_not_this_machine": self.rates.why_not_own,
            "batch": self.rows,
            "num_tokens": self.num_tokens,
            **{
                name: {
                    "tokens_per_s": num_tokens / prediction.seconds,
                    "limit": num_tokens / limit_s,
                    "terms": [asdict(term) for term in prediction.terms],
                }
                for name, prediction, limit_s, num_tokens in (
                    ("decode", self.decode, self.decode_limit_s, self.rows),
                    ("prefill", self.prefill, self.prefill_limit_s, self.rows * self.num_tokens),
                )
            },
        }


def demand_of(
    config: ModelConfig,
    dtypes: Dtypes,
    plan: Plan,
    *,
    layers: tuple[LayerChances, ...] | None = None,
) -> Demand:
    """What ``config`` asks as ``plan`` has it; ``layers`` None: tokens choose as the plan expects.

    Layers of several kinds count as equal ones of the mean size.
    """
    per_token = plan.per_token
    bare = bare_demand(config, dtypes)
    return replace(
        bare,
        on_gpu=plan.gpu_side is GpuSide.CUDA,
        layers=planned_chances(config, plan) if layers is None else layers,
        staging_slots=plan.staging_slots,
        disk_share=per_token.disk_experts / max(per_token.cold_experts, 1),
        step_tokens=plan.step_tokens,
    )


def bare_demand(config: ModelConfig, dtypes: Dtypes) -> Demand:
    """What a token of ``config`` asks of a GPU beside routed experts, whose sizes it has."""
    width = DTYPE_BYTES[dtypes.compute]
    numel, shared = _layer_numels(config)
    sizes = [expert_bytes(config, dtypes.expert, layer) for layer in moe_layers(config)]
    mean_bytes = round(sum(sizes) / len(sizes))
    return Demand(
        on_gpu=True,
        num_layers=config.num_layers,
        layers=(),
        top_k=config.top_k,
        hidden=config.expert_sides[0],
        codes=dtypes.expert_kinds[0].codes,
        activations=dtypes.many,
        few=dtypes.few,
        expert_bytes=mean_bytes,
        expert_numel=config.expert_numel,
        layer_bytes=(numel - shared) * width,
        shared_bytes=shared * width,
        layer_numel=numel,
        head_bytes=config.vocab_size * config.hidden_size * width,
        vocab=config.vocab_size,
        kv_bytes=kv_bytes(config, dtypes.kv),
        attention_width=config.num_heads * config.head_dim,
        staging_slots=0,
        disk_share=0.0,
        disk_bytes=stored_bytes(config, mean_bytes),
        step_tokens=0,
    )


def planned_chances(config: ModelConfig, plan: Plan) -> tuple[LayerChances, ...]:
    """As the plan's popularity has it."""
    shares_LE = plan.popularity.shares()
    return placed_chances(shares_LE, plan.placement, moe_layers(config), config.top_k)


def drawn_chances(
    config: ModelConfig, plan: Plan, law: Law | None, hit_rate: float
) -> tuple[LayerChances, ...]:
    """Where experts are drawn by ``law`` (None: evenly, for all that is known) and hit so often."""
    chance_E = law_chances(law or Law(), config.num_experts, config.top_k)
    return blind_chances(chance_E, plan.placement, moe_layers(config), hit_rate)


def moe_layers(config: ModelConfig) -> list[int]:
    """Layers that have experts."""
    return [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]


def predict_speeds(demand: Demand, used: RatesHere, *, num_tokens: int, rows: int) -> Speeds:
    """Of ``rows`` requests at once that read ``num_tokens`` each, and then write."""
    peaks = used.rates.limits_for(on_gpu=demand.on_gpu)
    step = {"rows": rows, "depth": num_tokens}
    prompt = {"num_tokens": num_tokens, "prompts": rows}
    return Speeds(
        rates=used,
        rows=rows,
        num_tokens=num_tokens,
        decode=predict_decode(demand, used.rates, **step),
        prefill=predict_prefill(demand, used.rates, **prompt),
        decode_limit_s=decode_limit_s(decode_work(demand, **step), peaks),
        prefill_limit_s=prefill_limit_s(prefill_work(demand, **prompt), peaks),
    )


def request_of(plan: Plan, context: int | None, batch: int | None) -> tuple[int, int]:
    """Tokens of the requests that speeds are said of, and how many there are at once.

    As many tokens as the asked ``context`` has, unasked PROMPT; no more requests than the KV cache
    has room for.
    """
    num_tokens = min(context or PROMPT, plan.context_tokens)
    room = plan.num_pages * plan.page_size // num_tokens
    return num_tokens, min(batch or 1, max(1, room))


def own_rates(hardware: Hardware) -> tuple[MachineRates | None, str]:
    """What ``fiddler calibrate`` found here, or None and why there is nothing of this machine.

    ``hardware`` may have been looked at without its GPU.
    """
    whole = hardware if hardware.has_gpu else probe("auto")
    calibration = Calibration(default_path(), this_machine(whole, __version__))
    settings = settings_of(whole)
    rates = calibration.known(RATES, settings)
    if rates is None:
        return None, calibration.why_unknown(RATES, settings)
    try:
        check_kernels(rates)
    except ValueError as error:  # memory was short
        return None, str(error)
    return rates, ""


def rates_for(hardware: Hardware) -> RatesHere:
    """This machine's rates, or those of the shipped one that is most like ``hardware``."""
    rates, why_not = own_rates(hardware)
    if rates is not None and (rates.has_gpu or not hardware.has_gpu):
        return RatesHere(rates=rates, name="", origin="measured here")
    return rates_of(reference_for(hardware), why_not_own=why_not)


def gpu_rates_for(hardware: Hardware) -> RatesHere:
    """The same for what needs a GPU: without one here, those of a shipped machine."""
    if hardware.has_gpu:
        return rates_for(hardware)
    return rates_of(reference_for(hardware), why_not_own=NO_GPU)


def rates_of(machine: ReferenceMachine, *, why_not_own: str = "") -> RatesHere:
    """Those of a machine that has a name."""
    return RatesHere(
        rates=machine.rates, name=machine.name, origin=machine.origin, why_not_own=why_not_own
    )


def _layer_numels(config: ModelConfig) -> tuple[float, float]:
    """Dense weights of a layer, and those of them that are a shared expert's; means over layers."""
    every = shared = 0
    has_experts = [config.is_moe_layer(layer) for layer in range(config.num_layers)]
    for kind in set(has_experts):  # layers with experts are alike, and so are those without
        number = has_experts.count(kind)
        for field, parts in layer_parts(config, has_experts.index(kind)).items():
            size = number * sum(prod(part.shape) for part in parts)
            every += size
            shared += size if field.startswith("shared_") else 0
    return every / config.num_layers, shared / config.num_layers
