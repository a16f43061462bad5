"""Which experts a corpus uses, and how well a placement made from one part of it fits the rest.

Shapes: T tokens, L layers, E experts, K top-k.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fiddler.corpus import Corpus, Document, cut_windows, is_held_out
from fiddler.errors import ConfigError
from fiddler.models.config import ModelConfig
from fiddler.outputs import RequestOutput
from fiddler.sampling_params import SamplingParams
from offload.placement import Placement
from offload.plan import Plan
from offload.planner import place
from offload.popularity import Popularity, Profile, hit_rate

Counts = npt.NDArray[np.int64]
HELD_OUT_RANGE = (0.05, 0.5)
BATCH_WINDOWS = 16  # windows in flight: their routes take 1 kB a token, so not all at once
SHARES = (0.125, 0.25, 0.5)  # of all experts resident, for which hit rates are told


class ProfiledModel(Protocol):
    """What is used of :class:`fiddler.llm.LLM`."""

    @property
    def model_name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def tokenizer(self) -> Any: ...

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]: ...
    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HitRates:
    """Share of held-out routes that meet a resident expert when ``num_resident`` are resident.

    They are placed by the profile, without one, or by the held-out routes themselves: no placement
    does better than the last.
    """

    num_resident: int
    profile: float
    uniform: float
    best: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileResult:
    """A profile of the training part, judged on ``held_out_tokens`` that it never saw.

    ``placement`` and ``present`` belong to the VRAM budget that the model was loaded with;
    ``by_share`` tells the same for :data:`SHARES` of all experts.
    """

    profile: Profile
    moe_layers: tuple[int, ...]
    held_out_tokens: int
    held_out_LE: Counts
    placement: Placement
    present: HitRates
    by_share: tuple[HitRates, ...]


def profile_corpus(
    llm: ProfiledModel,
    corpus: Corpus,
    *,
    held_out: float = 0.2,
    on_progress: Callable[[int, int], None] | None = None,
) -> ProfileResult:
    """Run ``corpus`` through the model and count which experts its tokens are routed to.

    Evenly spread windows, ``held_out`` of all, are kept apart to judge the rest by.
    ``on_progress(done, total)`` counts tokens. Raises :class:`ProfileError` for a corpus that is
    too short, :class:`ConfigError` for a share outside 0.05 to 0.5.
    """
    check_held_out(held_out)
    documents = [_token_ids(llm, document) for document in corpus.documents]
    windows = cut_windows(documents, context=llm.plan.context_tokens, held_out=held_out)
    counts_2LE, tokens_2 = _count(llm, windows, held_out, on_progress)
    profile = Profile(
        model=llm.model_name,
        revision=llm.revision,
        corpus_sha256=corpus.sha256,
        num_tokens=tokens_2[0],
        popularity=Popularity(counts_2LE[0]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return judge(
        profile,
        counts_2LE[1],
        moe_layers=_moe_layers(llm.model_config),
        num_resident=llm.plan.placement.num_resident,
        held_out_tokens=tokens_2[1],
    )


def check_held_out(share: float) -> None:
    """Raise :class:`ConfigError` unless both parts of a corpus would be large enough."""
    low, high = HELD_OUT_RANGE
    if not low <= share <= high:
        raise ConfigError(f"the held-out share must be between {low} and {high}, not {share}")


def judge(
    profile: Profile,
    held_out_LE: Counts,
    *,
    moe_layers: tuple[int, ...],
    num_resident: int,
    held_out_tokens: int,
) -> ProfileResult:
    """Compare placements made with and without ``profile`` on routes that it has not seen."""
    num_layers, num_experts = profile.popularity.counts_LE.shape
    candidates = {
        "profile": profile.popularity,
        "uniform": Popularity.uniform(num_layers, num_experts),
        "best": Popularity(held_out_LE),
    }

    def rates(count: int) -> HitRates:
        placed = {name: place(p, moe_layers, count) for name, p in candidates.items()}
        hits = {name: hit_rate(placement, held_out_LE) for name, placement in placed.items()}
        return HitRates(num_resident=count, **hits)

    total = len(moe_layers) * num_experts
    return ProfileResult(
        profile=profile,
        moe_layers=moe_layers,
        held_out_tokens=held_out_tokens,
        held_out_LE=held_out_LE,
        placement=place(profile.popularity, moe_layers, num_resident),
        present=rates(num_resident),
        by_share=tuple(rates(round(total * share)) for share in SHARES),
    )


def count_routes(
    routes: Iterable[npt.NDArray[np.int16]], num_layers: int, num_experts: int
) -> Counts:
    """Count ``[T, L, K]`` expert ids per layer and expert; -1 is no route."""
    counts = np.zeros(num_layers * num_experts, dtype=np.int64)
    layer_L1 = np.arange(num_layers)[:, None]
    for route_TLK in routes:
        flat_TLK = layer_L1 * num_experts + route_TLK
        counts += np.bincount(flat_TLK[route_TLK >= 0], minlength=len(counts))
    return counts.reshape(num_layers, num_experts)


def _count(
    llm: ProfiledModel,
    windows: list[list[int]],
    held_out: float,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Counts, list[int]]:
    """Counts ``[2, L, E]`` and tokens of the training part and the held-out part."""
    config = llm.model_config
    shape = config.num_layers, config.num_experts
    counts_2LE = np.zeros((2, *shape), dtype=np.int64)
    tokens_2 = [0, 0]
    total = sum(map(len, windows))
    params = SamplingParams(max_tokens=1, temperature=0.0, routed_experts=True)
    for start in range(0, len(windows), BATCH_WINDOWS):
        batch = windows[start : start + BATCH_WINDOWS]
        for index, output in enumerate(llm.generate(batch, params), start=start):
            part = int(is_held_out(index, held_out))
            routes_TLK = output.outputs[0].routed_experts
            assert isinstance(routes_TLK, np.ndarray)
            counts_2LE[part] += count_routes([routes_TLK], *shape)
            tokens_2[part] += len(routes_TLK)
        if on_progress is not None:
            on_progress(sum(map(len, windows[: start + len(batch)])), total)
    return counts_2LE, tokens_2


def _token_ids(llm: ProfiledModel, document: Document) -> list[int]:
    if isinstance(document, str):
        ids: list[int] = llm.tokenizer.encode(document)
        return ids
    return llm.apply_chat_template([dict(message) for message in document])


def _moe_layers(config: ModelConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(config.num_layers) if config.is_moe_layer(layer))
