"""A plan with what is predicted of it, and what more context would cost: another plan's figures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fiddler.config import EngineConfig
from fiddler.errors import FiddlerError
from fiddler.models.config import ModelConfig
from fiddler.planning import Question, Sizes, answer, ask
from fiddler.speed import RatesHere, Speeds, demand_of, predict_speeds, request_of
from offload.hardware import Hardware
from offload.plan import GpuSide, Plan

STEP = 1024  # tokens of context that a price is said of
PRICED = (8192, 4096, 2048, STEP)  # more tokens that are tried, so that parts of experts are seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a plan is asked of; ``used`` are the rates to predict with."""

    settings: EngineConfig
    model: ModelConfig
    hardware: Hardware
    name: str
    folder: Path | None
    used: RatesHere

    def asking(self, **changes: Any) -> Self:
        """The same with other settings."""
        return replace(self, settings=replace(self.settings, **changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A case with its plan and what is predicted of it."""

    case: Case
    question: Question
    plan: Plan
    speeds: Speeds

    @property
    def pulled_share(self) -> float | None:
        """The part of many cold experts that the GPU reads itself in a decode step.

        As the machine's rates have it; None where it reads none.
        """
        plan, dtypes = self.plan, self.question.dtypes
        if plan.gpu_side is not GpuSide.CUDA or plan.cached or not plan.memory.cpu_experts:
            return None
        (kind, *_) = dtypes.expert_kinds
        size = self.question.needs(plan.step_tokens).expert_bytes
        costs = self.case.used.rates.share_costs(kind.codes, dtypes.few, size)
        return costs.link_bytes_per_s / (costs.link_bytes_per_s + costs.cpu_bytes_per_s)

    @property
    def num_experts(self) -> int:
        """All routed ones."""
        return self.question.needs(self.plan.step_tokens).total_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What ``tokens`` more of context cost: room of experts on the GPU side, and decode speed."""

    tokens: int
    experts: float
    decode_tokens_per_s: float


def make(case: Case) -> Planned:
    """Raises as :func:`fiddler.planning.plan_model` does."""
    question = ask(case.settings, case.model, case.hardware, name=case.name, folder=case.folder)
    return _predicted(case, question, answer(question, lambda: case.used))


def _predicted(case: Case, question: Question, plan: Plan) -> Planned:
    demand = demand_of(case.model, question.dtypes, plan)
    settings = case.settings
    num_tokens, rows = request_of(plan, settings.max_model_len, settings.max_num_seqs)
    speeds = predict_speeds(demand, case.used, num_tokens=num_tokens, rows=rows)
    return Planned(case=case, question=question, plan=plan, speeds=speeds)


# --- what context costs ---


def price_of_context(made: Planned) -> Price | None:
    """Per STEP tokens, with steps and ring as they are; None where it takes no expert's room, for
    there is no GPU or it holds all, or no more can be had."""
    plan, case = made.plan, made.case
    is_bound = plan.gpu_side is GpuSide.CUDA and plan.placement.num_resident < made.num_experts
    if not is_bound or case.settings.placement is not None:
        return None
    for more in PRICED:
        if plan.context_tokens + more <= case.model.max_position:
            try:
                return _price(made, more)
            except FiddlerError:  # that many do not fit
                continue
    return None


def _price(made: Planned, more: int) -> Price:
    case = made.case.asking(max_model_len=made.plan.context_tokens + more)
    question = ask(case.settings, case.model, case.hardware, name=case.name, folder=case.folder)
    plan = made.plan
    longer = question.plan(Sizes(plan.step_tokens, plan.staging_slots, plan.kv_divisor))
    demand = demand_of(case.model, question.dtypes, longer)
    speeds = predict_speeds(
        demand, case.used, num_tokens=made.speeds.num_tokens, rows=made.speeds.rows
    )
    lost = made.plan.placement.num_resident - longer.placement.num_resident
    slower = made.speeds.decode_rate - speeds.decode_rate
    return Price(tokens=STEP, experts=lost * STEP / more, decode_tokens_per_s=slower * STEP / more)
