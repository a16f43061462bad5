"""Which experts a corpus uses: its windows run through a model, and their routes counted.

Shapes: T tokens, W held-out windows, L layers, E experts, K top-k.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fiddler.corpus import Corpus, Document, cut_windows, is_held_out
from fiddler.errors import ConfigError
from fiddler.held_out import Counts, ProfileResult, judge
from fiddler.models.config import ModelConfig
from fiddler.outputs import RequestOutput
from fiddler.sampling_params import SamplingParams
from offload.plan import Plan
from offload.popularity import Popularity, Profile

Routes = npt.NDArray[np.int16]  # [T, L, K]; -1 is no route
OnWindow = Callable[[list[int], Routes], None]  # a window's token ids and where they went
HELD_OUT_RANGE = (0.05, 0.5)
BATCH_WINDOWS = 16  # windows in flight: their routes take 1 kB a token, so not all at once


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


def profile_corpus(
    llm: ProfiledModel,
    corpus: Corpus,
    *,
    held_out: float = 0.2,
    on_progress: Callable[[int, int], None] | None = None,
    on_window: OnWindow | None = None,
) -> ProfileResult:
    """Run ``corpus`` through the model and count which experts its tokens are routed to.

    Evenly spread windows, ``held_out`` of all, are kept apart to judge the rest by.
    ``on_progress(done, total)`` counts tokens; ``on_window`` sees every window, in their order.
    Raises :class:`ProfileError` for a corpus that is too short, :class:`ConfigError` for a share
    outside 0.05 to 0.5.
    """
    check_held_out(held_out)
    config = llm.model_config
    shape = config.num_layers, config.num_experts
    documents = [_token_ids(llm, document) for document in corpus.documents]
    windows = cut_windows(documents, context=llm.plan.context_tokens, held_out=held_out)
    trained_LE = np.zeros(shape, dtype=np.int64)
    kept_apart: list[Counts] = []
    num_trained = 0
    for index, (ids, routes_TLK) in enumerate(_routed(llm, windows, on_progress)):
        counts_LE = count_routes([routes_TLK], *shape)
        if is_held_out(index, held_out):
            kept_apart.append(counts_LE)
        else:
            trained_LE += counts_LE
            num_trained += len(ids)
        if on_window is not None:
            on_window(ids, routes_TLK)
    profile = Profile(
        model=llm.model_name,
        architecture=config.architecture,
        revision=llm.revision,
        corpus_sha256=corpus.sha256,
        num_tokens=num_trained,
        popularity=Popularity(trained_LE),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return judge(
        profile,
        np.stack(kept_apart),
        moe_layers=_moe_layers(config),
        num_resident=llm.plan.placement.num_resident,
        held_out_tokens=sum(map(len, windows)) - num_trained,
    )


def check_held_out(share: float) -> None:
    """Raise :class:`ConfigError` unless both parts of a corpus would be large enough."""
    low, high = HELD_OUT_RANGE
    if not low <= share <= high:
        raise ConfigError(f"the held-out share must be between {low} and {high}, not {share}")


def count_routes(routes: Iterable[Routes], num_layers: int, num_experts: int) -> Counts:
    """Count ``[T, L, K]`` expert ids per layer and expert; -1 is no route."""
    counts = np.zeros(num_layers * num_experts, dtype=np.int64)
    layer_L1 = np.arange(num_layers)[:, None]
    for route_TLK in routes:
        flat_TLK = layer_L1 * num_experts + route_TLK
        counts += np.bincount(flat_TLK[route_TLK >= 0], minlength=len(counts))
    return counts.reshape(num_layers, num_experts)


def _routed(
    llm: ProfiledModel,
    windows: list[list[int]],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[list[int], Routes]]:
    """The windows in their order, each with its tokens' routes."""
    total = sum(map(len, windows))
    params = SamplingParams(max_tokens=1, temperature=0.0, routed_experts=True)
    for start in range(0, len(windows), BATCH_WINDOWS):
        batch = windows[start : start + BATCH_WINDOWS]
        for ids, output in zip(batch, llm.generate(batch, params), strict=True):
            routes_TLK = output.outputs[0].routed_experts
            assert isinstance(routes_TLK, np.ndarray) and len(routes_TLK) == len(ids)
            yield ids, routes_TLK
        if on_progress is not None:
            on_progress(sum(map(len, windows[: start + len(batch)])), total)


def _token_ids(llm: ProfiledModel, document: Document) -> list[int]:
    if isinstance(document, str):
        ids: list[int] = llm.tokenizer.encode(document)
        return ids
    return llm.apply_chat_template([dict(message) for message in document])


def _moe_layers(config: ModelConfig) -> tuple[int, ...]:
    return tuple(layer for layer in range(config.num_layers) if config.is_moe_layer(layer))
