"""What a step pays for workers that have nothing to do."""

from fiddler.benchmark.record import tokens_per_s
from fiddler.models.shapes import load_shape
from offload.placement import Placement
from offload.routing_law import Law
from scripts.bench.engine.shapes import decode, driver_of, loaded_shape
from scripts.bench.rows import Row, at_most

MOST_HAND_OVER_US = 25.0


def hand_over_rows(repetitions: int) -> list[Row]:
    """A step whose experts are all resident: in a graph that rings the workers, and in one not."""
    shape, case, seconds = "olmoe-1b-7b", decode(256), []
    config = load_shape(shape)
    most = config.num_experts - 1  # of a layer that has a cold expert, which nobody draws
    for num_resident in (config.num_experts, most):
        placement = Placement.of([range(num_resident)] * config.num_layers)
        with loaded_shape(shape, [case], placement=placement) as loaded:
            measured = driver_of(loaded, Law(), num_experts=most).measure(case, repetitions)
        assert measured.decode.hit_rate == 1
        seconds.append(1 / tokens_per_s(measured)[0])
    each_us = 1e6 * (seconds[1] - seconds[0]) / config.num_layers
    return [
        at_most(
            f"{shape}, hand-over without cold experts, each of {config.num_layers} layers",
            *(each_us, "us", MOST_HAND_OVER_US, each_us / MOST_HAND_OVER_US, 1.0),
        )
    ]
