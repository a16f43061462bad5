"""Named shapes with seeded weights, loaded to be measured."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Driver, load
from fiddler.benchmark.routing import DrawnRouting
from fiddler.config import EngineConfig
from fiddler.loading import LoadedModel
from offload.routing_law import Law

VRAM_GB = 24.0


def decode(count: int, parallel: int = 1) -> Case:
    """Write ``count`` tokens of each request."""
    return Case(n_prompt=0, n_gen=count, n_depth=0, n_parallel=parallel)


def prompt(count: int) -> Case:
    """Read one prompt."""
    return Case(n_prompt=count, n_gen=0, n_depth=0, n_parallel=1)


@contextmanager
def loaded_shape(shape: str, cases: list[Case], **options: object) -> Iterator[LoadedModel]:
    """A shape with seeded weights that has room for ``cases``; experts stay, unless asked for."""
    settings = EngineConfig(
        model=shape,
        load_format="dummy",
        prefix_caching=False,
        max_model_len=max(case.length for case in cases),
        max_num_seqs=max(case.n_parallel for case in cases),
        **{"vram_gb": VRAM_GB, "placement_policy": "static", **options},  # type: ignore[arg-type]
    )
    loaded = load(settings, cases, None)
    with loaded.resources:
        yield loaded


def driver_of(loaded: LoadedModel, law: Law | None, num_experts: int | None = None) -> Driver:
    """Routes drawn by ``law`` among the first experts; None: the routers' own."""
    config = loaded.files.config
    if num_experts is not None:
        config = replace(config, num_experts=num_experts)
    routing = None if law is None else DrawnRouting(law, config, seed=0)
    return Driver(loaded, routing=routing, seed=0)
