"""One way to a plan, for `fiddler plan` and for loading: settings and a model in, plan out.

On a GPU that does not hold everything, the largest step, the ring that cold experts pass through,
and the KV of an asked batch take their room from resident experts. How large they are is chosen: of
all candidates, those whose predicted time is least by the objective (:mod:`offload.objective`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Self

from fiddler.config import PAGE_SIZE, EngineConfig
from fiddler.errors import ConfigError
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes, check_kv, resolve_dtypes
from fiddler.models.quantized import check_groups
from fiddler.models.stored import narrowing_note, packing_note, rounding_note, stored_bytes
from fiddler.needs import needs_of
from fiddler.speed import RatesHere, demand_of, rates_for, request_of
from offload.hardware import Hardware
from offload.layout import Layout, lay_out
from offload.objective import parse_objective
from offload.objective_time import objective_s
from offload.plan import KV_DIVISOR, Budget, Chosen, Footprint, Plan
from offload.planner import plan as make_plan
from offload.popularity import Popularity, load_profile
from offload.prefill_split import LEAST_TOKENS
from offload.staging import slot_choices
from offload.units import gib_to_bytes

STEP_TOKENS = 2048  # of a step without a GPU
# On a GPU each step with a prompt brings every cold expert once, however many tokens it has: more
# are cheaper, but their activations take room from experts.
GPU_STEP_TOKENS = (4096, 2048, 1024, 512)

# Unasked, room for experts that change places takes at most 1/16 of that of residents: simulated,
# a slot of each layer gains 10 to 40 points of hits where use is skewed and unknown, and costs its
# own part of them where all are used alike.
SPARE_DIVISOR = 16

KV_CHOICES = (1, 2, 4, KV_DIVISOR)  # for a batch; 1: all requests, up to all the room of experts
SHIPPED_PROFILE = "profile.json"  # a model folder may bring its own


@dataclass(frozen=True, slots=True)
class Sizes:
    """What may be chosen; ``slots`` of the ring, None: by the size of experts.

    ``kv_divisor``: KV takes at most that part of what the fixed parts leave.
    """

    step_tokens: int
    slots: int | None = None
    kv_divisor: int = KV_DIVISOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that a plan follows from but what is chosen; ``needs(step_tokens)`` are the bytes."""

    settings: EngineConfig
    model: ModelConfig
    hardware: Hardware
    dtypes: Dtypes
    popularity: Popularity
    popularity_name: str
    needs: Callable[[int], Footprint]

    @property
    def is_batch(self) -> bool:
        """Whether several requests at once were asked for."""
        return (self.settings.max_num_seqs or 1) > 1

    def with_policy(self, policy: str) -> Self:
        """The same with that placement policy."""
        return replace(self, settings=replace(self.settings, placement_policy=policy))

    def layout(self, sizes: Sizes) -> Layout:
        """How ``sizes`` spend the budget."""
        return lay_out(self.needs(sizes.step_tokens), self.hardware, self._budget(sizes))

    def plan(self, sizes: Sizes) -> Plan:
        """The plan with ``sizes``; raises as the planner does."""
        needs = self.needs(sizes.step_tokens)
        made = make_plan(
            needs,
            self.hardware,
            self._budget(sizes),
            self.popularity,
            popularity_name=self.popularity_name,
            placement=self.settings.placement,
            stored_ratio=stored_bytes(self.model, needs.expert_bytes) / needs.expert_bytes,
        )
        notes = loading_notes(self.settings, self.model, self.dtypes, made)
        return replace(made, notes=(*made.notes, *notes))

    def _budget(self, sizes: Sizes) -> Budget:
        settings = self.settings
        given = settings.placement
        return Budget(
            max_context=self.model.max_position,
            vram_bytes=_bytes(settings.vram_gb),
            ram_bytes=_bytes(settings.ram_gb),
            context_tokens=settings.max_model_len,
            page_size=PAGE_SIZE,
            max_num_seqs=settings.num_seqs,
            gpu_experts=None if given is None else given.num_resident,
            spares_per_layer=int(settings.placement_policy == "adaptive"),
            staging_slots=sizes.slots,
            kv_divisor=sizes.kv_divisor,
            for_batch=partial(self._for_batch, sizes.step_tokens) if self.is_batch else None,
        )

    def _for_batch(self, step_tokens: int, batch: int) -> Footprint:
        settings = replace(self.settings, max_num_seqs=batch)
        if settings.max_batched_tokens is None:
            (step_tokens,) = _fillable(settings, [step_tokens])
        return needs_of(settings, self.model, self.hardware, self.dtypes, step_tokens)


def plan_model(
    settings: EngineConfig,
    model: ModelConfig,
    hardware: Hardware,
    *,
    name: str,
    folder: Path | None,
    used: RatesHere | None = None,
) -> tuple[Plan, Dtypes]:
    """Return where everything will live, or raise as the planner and the profile do.

    ``used``: the rates by which layouts are compared; None: this machine's, or those of one like
    it. Equal settings and rates give equal plans.
    """
    if settings.placement_policy == "adaptive" and not hardware.has_gpu:
        raise ConfigError(
            "experts change places on a GPU only, and there is none",
            hint="use --placement auto or static",
        )
    question = ask(settings, model, hardware, name=name, folder=folder)
    plan = answer(question, lambda: used or rates_for(hardware))
    if plan.cached is not None and settings.placement_policy == "adaptive":
        raise ConfigError(
            "experts change places between GPU and RAM only, and some are on disk",
            hint="use --placement auto or static, or a larger --vram-gb or --ram-gb",
        )
    return plan, question.dtypes


def ask(
    settings: EngineConfig,
    model: ModelConfig,
    hardware: Hardware,
    *,
    name: str,
    folder: Path | None,
) -> Question:
    """Resolve what ``settings`` leave open but for sizes; reads the profile."""
    dtypes = resolve_dtypes(
        settings.dtype,
        model.dtype,
        has_gpu=hardware.has_gpu,
        packed=model.packed_name,
        kv=settings.kv_cache_dtype,
        cpu_activations=settings.cpu_activations,
    )
    (kind, *_) = dtypes.expert_kinds
    if model.packed is None and kind.is_packed:
        check_groups(model, kind, "--dtype")
    check_kv(dtypes, has_gpu=hardware.has_gpu, capability=hardware.gpu_capability)
    popularity, popularity_name = find_popularity(settings.profile, model, name, folder)
    question = Question(
        settings=settings,
        model=model,
        hardware=hardware,
        dtypes=dtypes,
        popularity=popularity,
        popularity_name=popularity_name,
        needs=cache(partial(needs_of, settings, model, hardware, dtypes)),
    )
    if settings.placement_policy != "auto":
        return question
    adaptive, static = map(question.with_policy, ("adaptive", "static"))
    return adaptive if _is_worth_moving(adaptive) else static


def _is_worth_moving(question: Question) -> bool:
    """Whether experts should follow use: who is used is unknown, and room to move takes little."""
    is_known = question.settings.placement is not None or not question.popularity.is_uniform
    if is_known or not question.hardware.has_gpu:
        return False
    least_kv = (sizes for sizes in candidates(question) if sizes.kv_divisor == KV_DIVISOR)
    layout = next((layout for layout in map(question.layout, least_kv) if layout.fits), None)
    if layout is None or layout.num_disk_experts:
        return False
    has_spares = layout.spare_slots == len(question.needs(GPU_STEP_TOKENS[0]).moe_layers)
    return has_spares and SPARE_DIVISOR * layout.spare_bytes <= layout.gpu_expert_bytes


def loading_notes(
    settings: EngineConfig, model: ModelConfig, dtypes: Dtypes, plan: Plan
) -> tuple[str, ...]:
    """Of the plan's notes those that are said at loading too."""
    return (*_profile_notes(settings, plan), *_weight_notes(settings, model, dtypes, plan))


def _profile_notes(settings: EngineConfig, plan: Plan) -> tuple[str, ...]:
    """An asked profile that chose nothing must not look as if it had."""
    is_chosen = (plan.memory.gpu_experts and plan.memory.cpu_experts) or plan.cached is not None
    if settings.profile is None or is_chosen:
        return ()
    return ("the profile changes nothing: all experts are in one memory",)


def _weight_notes(
    settings: EngineConfig, model: ModelConfig, dtypes: Dtypes, plan: Plan
) -> tuple[str, ...]:
    """What a user should know of how the stored weights become those in memory."""
    if settings.load_format == "dummy":
        return ()
    notes = (
        narrowing_note(model, dtypes, settings.dtype),
        rounding_note(model, dtypes.expert),
        packing_note(model, dtypes) if plan.cached is not None else "",
    )
    return tuple(filter(None, notes))


def answer(question: Question, rates: Callable[[], RatesHere]) -> Plan:
    """The best plan; ``rates`` is asked where there is something to choose."""
    every = candidates(question)
    layouts = {sizes: question.layout(sizes) for sizes in every}
    fitting = {sizes: layout for sizes, layout in layouts.items() if layout.fits}
    if not fitting:
        return question.plan(every[-1])  # refuses, by what would need least
    if len(fitting) == 1 or not any(layout.num_cold for layout in fitting.values()):
        return question.plan(next(iter(fitting)))
    return _least(question, fitting, rates())


def candidates(question: Question) -> list[Sizes]:
    """What may be chosen, the largest steps first; what was asked for is the only one of its kind.

    A given placement takes its room itself: its ring has what is left. The last needs least.
    """
    settings, model = question.settings, question.model
    every = GPU_STEP_TOKENS if question.hardware.has_gpu else (STEP_TOKENS,)
    asked = settings.max_batched_tokens
    steps = (asked,) if asked is not None else _fillable(settings, every)
    if not question.hardware.has_gpu:
        return [Sizes(steps[0])]
    choices = slot_choices(model.num_experts, question.needs(steps[0]).expert_bytes)
    slots = (None,) if settings.placement is not None else choices[::-1]
    chooses_kv = question.is_batch and settings.max_model_len is not None
    divisors = KV_CHOICES if chooses_kv else (KV_DIVISOR,)
    return [Sizes(*chosen) for chosen in product(steps, slots, divisors)]


def _fillable(settings: EngineConfig, steps: Sequence[int]) -> tuple[int, ...]:
    """``steps``, descending, without room for more tokens than all requests may have together."""
    if settings.max_model_len is None:
        return tuple(steps)
    most = max(settings.max_model_len * settings.num_seqs, LEAST_TOKENS)
    return tuple(sorted({min(tokens, most) for tokens in steps}, reverse=True))


def _least(question: Question, layouts: dict[Sizes, Layout], used: RatesHere) -> Plan:
    """Of plans with those layouts the one of the least predicted time."""
    context = min(layout.context_tokens for layout in layouts.values())
    score = partial(plan_s, question, used, context_tokens=context)
    # equal layouts are tried once: a small room has slots for few
    tried = {(sizes.step_tokens, layout): sizes for sizes, layout in layouts.items()}
    best = min((question.plan(sizes) for sizes in tried.values()), key=score)
    objective = question.settings.objective
    chosen = Chosen(objective=objective, machine=used.name, num_layouts=len(tried))
    return replace(best, chosen=chosen)


def plan_s(
    question: Question, used: RatesHere, plan: Plan, *, context_tokens: int
) -> tuple[float, float]:
    """What is made least: seconds of the objective's request, and of equal ones its prompt's.

    Of each of those that the plan's KV has room for at once: others wait, and gain nothing there.
    ``context_tokens``: it is no longer than that.
    """
    asked = parse_objective(question.settings.objective).within(context_tokens)
    _, rows = request_of(plan, min(asked.length, context_tokens), question.settings.max_num_seqs)
    demand = demand_of(question.model, question.dtypes, plan)
    total_s, prompts_s = objective_s(asked, demand, used.rates, rows=rows)
    return total_s / rows, prompts_s / rows


def find_popularity(
    path: str | None, model: ModelConfig, name: str, folder: Path | None
) -> tuple[Popularity, str]:
    """The asked profile, or the one shipped with the model, or nothing known."""
    shipped = folder / SHIPPED_PROFILE if folder is not None else None
    if path is None and (shipped is None or not shipped.is_file()):
        return Popularity.uniform(model.num_layers, model.num_experts), "uniform"
    profile = load_profile(
        path or str(shipped),
        model=name,
        architecture=model.architecture,
        num_layers=model.num_layers,
        num_experts=model.num_experts,
    )
    return profile.popularity, profile.name_for(name)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else gib_to_bytes(gib)
