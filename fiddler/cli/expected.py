"""Whether an answer took about as long as this machine's rates promise, and what it waits for."""

from functools import cached_property
from typing import TYPE_CHECKING

from fiddler.outputs import RunStats
from fiddler.speed import demand_of, drawn_chances, own_rates
from offload.machine_rates import MachineRates
from offload.prediction import Prediction, how_long, is_off, predict_decode

if TYPE_CHECKING:
    from fiddler.cli.session import ChatModel

LEAST_TOKENS = 32  # written, so that a moment in which others use the machine is not all of them
LEAST_STEP_S = 4e-3  # of a token: Python, which shows the text beside it, takes a millisecond


class Expected:
    """Of one loaded model's answers, by what ``fiddler calibrate`` has found here, if it has."""

    def __init__(self, model: "ChatModel") -> None:
        self._model = model

    @cached_property
    def _rates(self) -> MachineRates | None:
        rates, _ = own_rates(self._model.hardware)
        return rates

    def remark(self, stats: RunStats) -> str:
        """A line about an answer that was far off; nothing of others, or of short ones."""
        if stats.output_tokens < LEAST_TOKENS or not stats.decode_s or self._rates is None:
            return ""
        predicted = _step(self._model, stats, self._rates)
        times = 1 / stats.decode_tokens_per_s / predicted.seconds
        if predicted.seconds < LEAST_STEP_S or not is_off(times):
            return ""
        most = max(predicted.terms, key=lambda term: term.seconds)
        return (
            f"decode took {how_long(times)} ({1 / predicted.seconds:.3g} tok/s, "
            f"{most.seconds / predicted.seconds:.0%} of it {most.name}); "
            "fiddler bench says which part is off"
        )


def _step(model: "ChatModel", stats: RunStats, rates: MachineRates) -> Prediction:
    """A decode step in the middle of the answer, with the hits that it had."""
    config, plan = model.model_config, model.plan
    layers = drawn_chances(config, plan, None, stats.gpu_hit_rate)
    demand = demand_of(config, model.dtypes, plan, layers=layers)
    return predict_decode(
        demand, rates, rows=1, depth=stats.prompt_tokens + stats.output_tokens // 2
    )
