"""What the steps that a policy was played on would take: the planner's prediction, with the experts
that each of them has met in place of chances. Pure.

Shapes: S steps, M layers with experts, N kinds of layers in a step.
"""

from dataclasses import replace

import numpy as np

from offload.demand import Demand
from offload.limits import GIGA
from offload.machine_rates import MachineRates
from offload.policies import Played
from offload.prediction import Prediction, Sum, add_experts, gpu_experts_s, predict_decode


def predict_played(
    played: Played,
    demand: Demand,
    rates: MachineRates,
    *,
    rows: int,
    depth: int,
    is_all_resident: bool,
) -> Prediction:
    """The mean step of ``rows`` tokens, ``depth`` tokens into their requests.

    ``demand`` is of a GPU that has all but experts; where it has these too, nobody is asked for
    any. Copies beside the step count in full, each way at the same time: an upper bound.
    """
    num_steps, num_layers = played.reads_SM.shape
    total = Sum()
    total.add_all(
        predict_decode(replace(demand, layers=()), rates, rows=rows, depth=depth), weight=1.0
    )
    if not is_all_resident:
        total.add("hand-over", num_layers * rates.hand_over_s)
    # few kinds of layers make up thousands
    met_SM3 = np.stack([played.reads_SM, played.hits_SM, played.loaded_SM], axis=-1)
    kinds_N3, number_N = np.unique(met_SM3.reshape(-1, 3), axis=0, return_counts=True)
    for (reads, hits, loaded), number in zip(kinds_N3.tolist(), number_N.tolist(), strict=True):
        layer = Sum()
        if loaded:
            _add_loaded(layer, demand, rates, reads, loaded)
        else:
            add_experts(layer, demand, rates, rows=rows, num=reads, num_cold=reads - hits)
        total.add_all(layer.prediction(), weight=number / num_steps)
    if num_moved := int(played.moved_S.sum()):
        total.add("copies", _link_s(demand, rates, num_moved / 2) / num_steps)
    return total.prediction()


def _add_loaded(total: Sum, demand: Demand, rates: MachineRates, num: int, num_loaded: int) -> None:
    """The GPU computes those that it has while the others come, and then these."""
    link = {"experts over PCIe": _link_s(demand, rates, num_loaded)}
    total.add_slower(link, gpu_experts_s(demand, rates, num - num_loaded))
    total.add("hot experts", gpu_experts_s(demand, rates, num_loaded)["hot experts"])


def _link_s(demand: Demand, rates: MachineRates, num: float) -> float:
    return num * demand.expert_bytes / (rates.peaks.pcie_gbps * GIGA)
