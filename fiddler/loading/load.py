"""From settings to a running engine: find the model, plan, load, connect.

Everything that can be refused is refused before the first weight is read.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from fiddler.config import PAGE_SIZE, EngineConfig
from fiddler.engine.engine import Engine
from fiddler.engine.pages import PagePool
from fiddler.engine.prefix_cache import PrefixCache
from fiddler.engine.runner import Runner
from fiddler.engine.scheduler import Scheduler
from fiddler.loading.ground import settle
from fiddler.loading.model_files import ModelFiles, Progress, find_model
from fiddler.loading.opened import open_weights
from fiddler.loading.vram import vram_meter
from fiddler.loading.weights import load_weights
from fiddler.models.dtypes import Dtypes
from fiddler.planning import loading_notes, plan_model
from fiddler.speed import RatesHere, rates_for
from fiddler.text.tokenizer import Tokenizer
from offload.executor import HybridExperts
from offload.hardware import Hardware, probe
from offload.plan import Plan

_log = logging.getLogger("fiddler.loading")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A running engine and what must be given back when it ends."""

    files: ModelFiles
    hardware: Hardware
    dtypes: Dtypes
    plan: Plan
    engine: Engine
    runner: Runner
    experts: HybridExperts
    pages: PagePool
    num_threads: int
    peak_vram_bytes: Callable[[], int]
    resources: ExitStack


def load_model(
    settings: EngineConfig,
    on_progress: Progress | None = None,
    *,
    check_plan: Callable[[Plan], None] | None = None,
) -> LoadedModel:
    """Load what ``settings`` ask for; on an error everything taken so far is given back.

    ``check_plan`` may refuse a plan, by raising, before the first weight is read.
    """
    files = find_model(settings, on_progress)
    with ExitStack() as reading, ExitStack() as resources:
        weights = open_weights(settings, files, reading)
        hardware = probe(settings.device)
        used = _rates(hardware)
        plan, dtypes = plan_model(
            settings, files.config, hardware, name=files.name, folder=files.folder, used=used
        )
        if check_plan is not None:
            check_plan(plan)
        for note in loading_notes(settings, files.config, dtypes, plan):
            _log.warning("%s", note)
        if plan.cached is not None:  # the files are read for as long as the model runs
            resources.enter_context(reading.pop_all())
        rates = None if used is None else used.rates
        ground = settle(
            settings=settings,
            config=files.config,
            hardware=hardware,
            plan=plan,
            dtypes=dtypes,
            rates=rates,
            resources=resources,
            on_progress=on_progress,
        )
        runner, experts = load_weights(ground, weights)
        pages = PagePool(plan.num_pages)
        return LoadedModel(
            files=files,
            hardware=hardware,
            dtypes=dtypes,
            plan=plan,
            engine=Engine(
                _scheduler(settings, pages, plan.step_tokens),
                runner,
                experts,
                eos_ids=frozenset(_eos_ids(files)),
                decode_token=_token_text(files.tokenizer),
            ),
            runner=runner,
            experts=experts,
            pages=pages,
            num_threads=ground.keeper.pool.num_threads,
            peak_vram_bytes=vram_meter(plan, ground.device),
            resources=resources.pop_all(),
        )


def _rates(hardware: Hardware) -> RatesHere | None:
    """Those of this machine, or of one like it; says so."""
    if not hardware.has_gpu:
        return None
    used = rates_for(hardware)
    if used.name:
        _log.info("%s: steps are divided by the rates of %s", used.why_not_own, used.name)
    return used


def _scheduler(settings: EngineConfig, pages: PagePool, num_tokens: int) -> Scheduler:
    return Scheduler(
        pages,
        PrefixCache(pages, PAGE_SIZE) if settings.prefix_caching else None,
        page_size=PAGE_SIZE,
        max_num_seqs=settings.num_seqs,
        max_batched_tokens=num_tokens,
        tbt_target_s=None if settings.tbt_target_ms is None else settings.tbt_target_ms / 1e3,
    )


def _eos_ids(files: ModelFiles) -> tuple[int, ...]:
    own = files.tokenizer.eos_token_ids if files.tokenizer is not None else ()
    return (*files.config.eos_token_ids, *own)


def _token_text(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    if tokenizer is None:
        return lambda token_id: ""
    return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)
