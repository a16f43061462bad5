"""What experts that follow use cost where there is nothing to follow, and gain where there is."""

from fiddler.benchmark.record import tokens_per_s
from offload.routing_law import Law
from scripts.bench.engine.shapes import decode, driver_of, loaded_shape
from scripts.bench.rows import Row, at_least

SHAPE = "qwen3-30b-a3b"
WRITTEN = 512  # tokens in which an expert's use can be told from chance
LEAST_KEPT = 0.98
LAWS = (("uniform", Law(), LEAST_KEPT), ("zipf:1.2", Law(skew=1.2), 1.0))


def placement_rows(repetitions: int) -> list[Row]:
    """Decode without a profile, experts moving and not, by two laws."""
    static, adaptive = (speeds(policy, repetitions) for policy in ("static", "adaptive"))
    return [
        at_least(
            f"{SHAPE}, decode, {name}, experts that move, beside ones that stay",
            *(moving, "tok/s", staying, moving / staying, least),
        )
        for (name, _, least), moving, staying in zip(LAWS, adaptive, static, strict=True)
    ]


def speeds(policy: str, repetitions: int) -> list[float]:
    """Median tokens per second by each law; experts lie as the law before has left them."""
    case = decode(WRITTEN)
    with loaded_shape(SHAPE, [case], placement_policy=policy) as loaded:
        measured = [driver_of(loaded, law).measure(case, repetitions) for _, law, _ in LAWS]
    return [tokens_per_s(one)[0] for one in measured]
