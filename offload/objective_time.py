"""How long the requests of an objective take, as predicted: pure."""

from offload.demand import Demand
from offload.machine_rates import MachineRates
from offload.objective import Objective
from offload.prediction import predict_decode
from offload.prefill_prediction import predict_prefill


def objective_s(
    objective: Objective, demand: Demand, rates: MachineRates, *, rows: int
) -> tuple[float, float]:
    """Seconds of ``rows`` such requests at once, and of reading the prompts before their answers.

    A prompt is read for the second figure even where the objective only writes.
    """
    tokens = objective.prompt_tokens or objective.behind
    prompts_s = total_s = 0.0
    if tokens:
        prompts_s = predict_prefill(demand, rates, num_tokens=tokens, prompts=rows).seconds
    if objective.prompt_tokens:
        total_s = prompts_s
    if objective.answer_tokens:
        step = predict_decode(demand, rates, rows=rows, depth=objective.depth)
        total_s += objective.answer_tokens * step.seconds
    return total_s, prompts_s
