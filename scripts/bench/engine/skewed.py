"""What a profile gains where routing is skewed."""

import tempfile
from pathlib import Path

import numpy as np

from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.record import tokens_per_s
from fiddler.models.config import ModelConfig
from fiddler.models.shapes import load_shape
from offload.drawn_routes import DrawnRoutes
from offload.popularity import Popularity, Profile, save_profile
from offload.routing_law import Law
from scripts.bench.engine.shapes import decode, driver_of, loaded_shape
from scripts.bench.rows import Row, at_least

SHAPE = "qwen3-30b-a3b"
WRITTEN = 64
SKEW = Law(skew=1.2)
SKEWED = 90.0  # tokens a second
NUM_PROFILED = 512  # tokens


def skewed_rows(repetitions: int) -> list[Row]:
    """Decode with skewed routing, without a profile and with one of other tokens."""
    shape = SHAPE
    plain = skewed_run(repetitions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        counts_LE = counts_of(load_shape(shape))
        save_profile(
            Profile(
                model=shape,
                architecture=load_shape(shape).architecture,
                revision=None,
                corpus_sha256="",
                num_tokens=NUM_PROFILED,
                popularity=Popularity(counts_LE),
                created=plain.started,
            ),
            path,
        )
        profiled = skewed_run(repetitions, profile=str(path))
    speeds = [tokens_per_s(measured)[0] for measured in (plain, profiled)]
    missed = [1 - measured.decode.hit_rate for measured in (plain, profiled)]
    name = f"{shape}, decode, zipf:{SKEW.skew}, with a profile, {missed[1]:.0%} missed"
    gained = speeds[0] * missed[0] / missed[1]  # where cold bytes are all that takes time
    return [
        Row(
            name=name,
            value=speeds[1],
            unit="tok/s",
            limit=gained,
            ratio=speeds[1] / gained,
            target=SKEWED,
            met=speeds[1] >= SKEWED,
        ),
        at_least(
            f"{name}, of {missed[0]:.0%} missed without",
            *(speeds[1], "tok/s", speeds[0], speeds[1] / speeds[0], 1.0),
        ),
    ]


def skewed_run(repetitions: int, **options: object) -> Measurement:
    """One load; nothing of it is left when this returns."""
    case = decode(WRITTEN)
    with loaded_shape(SHAPE, [case], **options) as loaded:
        return driver_of(loaded, SKEW).measure(case, repetitions)


def counts_of(config: ModelConfig) -> np.ndarray:
    """How often tokens of another request choose each expert."""
    routes = DrawnRoutes(
        SKEW,
        seed=0,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
    )
    ids_LPK = routes.ids(10**6, 0, NUM_PROFILED).swapaxes(0, 1)
    return np.stack([np.bincount(ids.ravel(), minlength=config.num_experts) for ids in ids_LPK])
