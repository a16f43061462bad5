"""What a test should take by the machine's rates, with the routing that its runs had."""

from dataclasses import asdict, dataclass
from typing import Any

from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.subject import Subject
from fiddler.speed import demand_of, drawn_chances
from offload.demand import Demand
from offload.machine_rates import MachineRates
from offload.prediction import Prediction, predict_decode
from offload.prefill_prediction import predict_prefill
from offload.routing_law import Law

NOTHING = Prediction(())


@dataclass(frozen=True, slots=True, kw_only=True)
class CasePrediction:
    """One run of a test: reading its prompts, and the mean of its ``num_steps`` that decode."""

    prompt: Prediction
    step: Prediction
    num_steps: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.prompt.seconds + self.num_steps * self.step.seconds

    def to_dict(self) -> dict[str, Any]:
        """The terms as JSON types; a decode step's are those of one step."""
        return {
            name: [asdict(term) for term in prediction.terms]
            for name, prediction in (("prompt", self.prompt), ("step", self.step))
        }


def predict_case(
    subject: Subject, measured: Measurement, rates: MachineRates, law: Law | None
) -> CasePrediction:
    """The same placement and hit rates as ``measured``; ``law`` None: tokens choose evenly."""
    case = measured.case

    def demand(hit_rate: float) -> Demand:
        layers = drawn_chances(subject.config, subject.plan, law, hit_rate)
        return demand_of(subject.config, subject.dtypes, subject.plan, layers=layers)

    return predict_demands(
        case, rates, demand(measured.prompt.hit_rate), demand(measured.decode.hit_rate)
    )


def predict_demands(
    case: Case, rates: MachineRates, of_prompt: Demand, of_step: Demand
) -> CasePrediction:
    """One run of ``case``, with the routing of its prompts and of its steps that decode."""
    prompt = step = NOTHING
    if case.n_prompt:
        num_tokens = case.n_parallel * case.n_prompt
        prompt = predict_prefill(of_prompt, rates, num_tokens=num_tokens, depth=case.n_depth)
    if case.n_gen:
        depth = case.prompt_end + case.n_gen // 2
        step = predict_decode(of_step, rates, rows=case.n_parallel, depth=depth)
    return CasePrediction(prompt=prompt, step=step, num_steps=case.n_gen)
