"""Decoding in CUDA graphs: the tokens of eager steps, whoever rings the workers, and survival.

Every test prints how it ran; run with ``-s`` to see it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fiddler import LLM, SamplingParams
from fiddler.engine.decode_steps import DecodeSteps
from fiddler.errors import WorkerError
from offload.adaptive_placement import AdaptivePlacement
from offload.cold_share import ShareCosts
from offload.handoff_probe import probe
from tests.forward import random_texts
from tests.model.test_parity import MODELS, folder_of, split_at_random
from tests.random_swaps import random_placement
from tests.tiny_models import MODEL_TYPES
from tests.workers import fail_worker, hold_layer

# alone: where processes take turns on a GPU, each hand-over waits for its process's turn
pytestmark = [pytest.mark.gpu, pytest.mark.alone]
WAYS = ("kernel", "values", "hostfunc")


def ways() -> list[str]:
    """All that work here: a GPU with a display may limit how long kernels run."""
    return ["enforce_eager", *(way for way in WAYS if way in probe().works)]


@contextmanager
def loaded(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    way: str = "",
    *,
    share: float = 0.5,
    dtype: str = "bfloat16",
    **options: Any,
) -> Iterator[LLM]:
    """``way``: "enforce_eager", or a value of FIDDLER_HANDOFF (nothing: the fastest)."""
    is_eager = way == "enforce_eager"
    if way in WAYS and way not in probe().works:
        pytest.skip(probe().problems[way])
    monkeypatch.setenv("FIDDLER_HANDOFF", way if way in WAYS else "")
    folder = folder_of(model, dtype)
    with LLM(
        str(folder),
        device="cuda",
        dtype=dtype,
        max_model_len=512,
        vram_gb=4,
        enforce_eager=is_eager,
        placement=split_at_random(folder, seed=1, share=share),
        **options,
    ) as llm:
        yield llm


def steps_of(llm: LLM) -> DecodeSteps:
    steps = llm._running.engine._runner.decode_steps
    assert steps is not None
    return steps


def describe(llm: LLM) -> str:
    buckets = steps_of(llm)._buckets
    return ", ".join(
        f"{rows} {'captured' if bucket._graph else 'eager'}"
        for (rows, _), bucket in buckets.items()
    )


def ragged(llm: LLM, params: list[SamplingParams]) -> list[tuple[list[int], int, int]]:
    """Prompts of several lengths, one of which ends with a page; they leave one by one."""
    lengths = [1, 16, 40, 7, 100][: len(params)]
    prompts = random_texts(lengths, llm.model_config.vocab_size, seed=len(params))
    outputs = llm.generate(prompts, params)
    return [
        (o.outputs[0].token_ids, o.stats.expert_tokens_gpu, o.stats.expert_tokens_cpu)
        for o in outputs
    ]


def greedy(num_requests: int) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0, max_tokens=20 + 7 * n, ignore_eos=True)
        for n in range(num_requests)
    ]


def seeded(num_requests: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            temperature=0.8,
            top_k=20 * (n % 2),
            top_p=1 - 0.1 * n,
            seed=n,
            max_tokens=24,
            ignore_eos=True,
        )
        for n in range(num_requests)
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_tokens_are_those_of_eager_steps(
    model: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for way in ways():
        with loaded(model, monkeypatch, way, share=share) as llm:
            found[way] = [
                ragged(llm, params)
                for num_requests in range(1, 6)
                for params in (greedy(num_requests), seeded(num_requests))
            ]
            counts = llm.expert_counts()
            print(f"{model} share {share} {way}: {describe(llm)}")
            found[way].append(counts)  # type: ignore[arg-type]
    for way in ways():
        assert found[way] == found["enforce_eager"], way


def test_float32_draws_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the graph draws beside rows whose logits are adjusted behind it."""
    prompts = random_texts([5, 33, 16], 264, seed=9)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.2, "top_p": 0.8, "n": 2},
    ]
    params = [
        SamplingParams(seed=n, max_tokens=24, ignore_eos=True, **kind)
        for n, kind in enumerate(kinds)
    ]

    def texts(llm: LLM) -> list[list[int]]:
        outputs = llm.generate(prompts, params)
        return [sample.token_ids for output in outputs for sample in output.outputs]

    with LLM(str(folder_of("mixtral")), device="cpu", dtype="float32", max_model_len=512) as llm:
        wanted = texts(llm)
    for way in ways():
        with loaded("mixtral", monkeypatch, way, dtype="float32") as llm:
            found = texts(llm)
            print(f"{way}: {describe(llm)}")
            assert found == wanted, way


@pytest.mark.parametrize("model", MODEL_TYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_float32_tokens_are_those_of_the_cpu(
    model: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_texts([5, 33, 16], 264, seed=9)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with LLM(str(folder_of(model)), device="cpu", dtype="float32", max_model_len=512) as llm:
        wanted = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    with loaded(model, monkeypatch, share=share, dtype="float32") as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, params)] == wanted
        print(f"{model} share {share}: {describe(llm)}")
        assert steps_of(llm)._buckets[4, False]._graph is not None


# Without starts, which are all that counts for tiny experts: the device pulls about half of each
# expert, or all.
PULLS = {
    "none": None,
    "half": ShareCosts(
        cpu_bytes_per_s=1e9,
        link_bytes_per_s=1.1e9,
        cpu_start_s=0.0,
        link_start_s=0.0,
        unit=16,
    ),
    "all": ShareCosts(
        cpu_bytes_per_s=1.0, link_bytes_per_s=1e12, cpu_start_s=1.0, link_start_s=0.0
    ),
}


def pulled_layers(llm: LLM) -> int:
    shared = steps_of(llm)._shared
    assert shared is not None
    pulled = shared.experts.pulled
    return 0 if pulled is None else len(pulled.layers)


@pytest.mark.parametrize("model", MODEL_TYPES)
def test_float32_tokens_are_those_without_pulled_experts(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for pulls, way in (
        ("none", ""),
        ("half", ""),
        ("half", "values"),
        ("all", ""),
        ("half", "enforce_eager"),
    ):
        monkeypatch.setattr("fiddler.loading.weights.cold_share", lambda _, p=pulls: PULLS[p])
        with loaded(model, monkeypatch, way, dtype="float32") as llm:
            found[pulls, way] = [ragged(llm, greedy(n)) for n in (1, 2, 4)]
            print(f"{model} {pulls} {way}: {pulled_layers(llm)} layers are pulled from")
            assert (pulled_layers(llm) > 0) == (pulls != "none")
    for key, tokens in found.items():
        assert tokens == found["none", ""], key


@pytest.mark.parametrize("model", MODELS)
def test_graphs_with_pulled_experts_give_the_tokens_of_eager_steps(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiddler.loading.weights.cold_share", lambda _: PULLS["half"])
    found = {}
    for way in ("enforce_eager", ""):
        with loaded(model, monkeypatch, way, share=0.3) as llm:
            found[way] = [ragged(llm, seeded(n)) for n in range(1, 6)]
            print(f"{model} {way}: {describe(llm)}, {pulled_layers(llm)} layers")
    assert found[""] == found["enforce_eager"]


@contextmanager
def moving(
    model: str, monkeypatch: pytest.MonkeyPatch, way: str, **options: Any
) -> Iterator[tuple[LLM, AdaptivePlacement]]:
    """Experts change places at random in every step; what moves them is given too."""
    made: list[AdaptivePlacement] = []

    def make(*args: Any) -> AdaptivePlacement:
        made.append(random_placement()(*args))
        return made[-1]

    monkeypatch.setattr("offload.adaptive_placement.AdaptivePlacement", make)
    with loaded(model, monkeypatch, way, placement_policy="adaptive", **options) as llm:
        yield llm, made[-1]


@pytest.mark.parametrize("model", MODEL_TYPES)
def test_float32_tokens_are_the_static_ones_whatever_moves(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(model, monkeypatch, dtype="float32") as llm:
        wanted = [ragged(llm, greedy(n)) for n in (1, 3, 5)]
    tokens = [[row[0] for row in rows] for rows in wanted]
    for way, pulls in (("", "none"), ("", "half"), ("enforce_eager", "half")):
        monkeypatch.setattr("fiddler.loading.weights.cold_share", lambda _, p=pulls: PULLS[p])
        with moving(model, monkeypatch, way, dtype="float32") as (llm, placement):
            found = [ragged(llm, greedy(n)) for n in (1, 3, 5)]
            print(f"{model} {way} {pulls}: {placement.num_swaps} swaps, {describe(llm)}")
            assert placement.num_swaps > 20
            assert [[row[0] for row in rows] for rows in found] == tokens


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_equal_requests_meet_equal_tables(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is where in which step does not depend on how steps run or how long they take."""
    found = {}
    for way in ("enforce_eager", ""):
        with moving(model, monkeypatch, way) as (llm, placement):
            found[way] = [ragged(llm, seeded(n)) for n in (1, 4)]
            print(f"{model} {way}: {placement.num_swaps} swaps")
    assert found[""] == found["enforce_eager"]


def test_use_decides_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real policy with a large budget; it may find nothing worth a move."""
    made: list[AdaptivePlacement] = []

    def make(*args: Any) -> AdaptivePlacement:
        made.append(AdaptivePlacement(*args, copy_share=10.0))
        return made[-1]

    monkeypatch.setattr("offload.adaptive_placement.AdaptivePlacement", make)
    params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    prompt = random_texts([9], 264)[0]
    for policy in ("static", "adaptive"):
        with loaded("qwen3_moe", monkeypatch, placement_policy=policy) as llm:
            stats = [llm.generate(prompt, params).stats for _ in range(2)]
            print(f"{policy}: GPU-resident {[f'{s.gpu_hit_rate:.3f}' for s in stats]}")
    assert len(made) == 1
    print(f"{made[0].num_swaps} swaps")


def test_requests_join_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts come in while others decode: buckets change and mixed steps come in between."""
    found = {}
    for way in ways():
        with loaded("qwen3_moe", monkeypatch, way, max_num_seqs=6) as llm:
            prompts = random_texts([3, 20, 37, 16, 50, 9], 264, seed=2)
            streams, tokens = [], []
            for n, prompt in enumerate(prompts):
                params = SamplingParams(temperature=0, max_tokens=10 + 9 * n, ignore_eos=True)
                streams.append(llm.stream(prompt, params))
                # the newest request's events run everybody's steps
                tokens.append([next(streams[-1]).token_id for _ in range(3)])
            for stream, some in zip(streams, tokens, strict=True):
                some += [event.token_id for event in stream]
            found[way] = tokens
            print(f"{way}: {describe(llm)}")
    assert all(found[way] == found["enforce_eager"] for way in ways())


@pytest.mark.parametrize("way", ["enforce_eager", *WAYS])
def test_a_worker_that_fails(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_texts([9], 264)[0]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with loaded("mixtral", monkeypatch, way, share=0.0) as llm:
        wanted = llm.generate(prompt, params).outputs[0].token_ids
        for _ in range(2):
            stream = llm.stream(prompt, params)
            for _ in range(3):
                next(stream)
            workers: Any = llm._running.experts.pool.workers  # type: ignore[attr-defined]
            with workers.awake():  # a step may be under way
                fail_worker(workers, MemoryError("no room"))
            with pytest.raises(WorkerError, match="a CPU worker failed"):
                list(stream)
            assert llm.generate(prompt, params).outputs[0].token_ids == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_worker_that_stands_still(
    way: str, comes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_texts([9], 264)[0]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    may_go = threading.Event()
    try:
        with loaded("mixtral", monkeypatch, way, share=0.0) as llm:
            wanted = llm.generate(prompt, params).outputs[0].token_ids
            steps_of(llm)._shared.experts._patience_s = 0.5  # type: ignore[union-attr]
            stream = llm.stream(prompt, params)
            for _ in range(3):
                next(stream)
            hold_layer(list(llm._running.experts.pool_layers.values())[1], may_go)
            if comes_back:
                threading.Timer(0.8, may_go.set).start()
            started = time.monotonic()
            with pytest.raises(WorkerError, match="stood still"):
                list(stream)
            print(f"{way}: noticed after {time.monotonic() - started:.2f} s")
            assert time.monotonic() - started < 5
            assert llm.generate(prompt, params).outputs[0].token_ids == wanted
    finally:
        may_go.set()


@pytest.mark.alone
@pytest.mark.parametrize("way", WAYS)
def test_three_hundred_steps_take_no_more_memory(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded("qwen3_moe", monkeypatch, way) as llm:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        prompts = random_texts([5, 30], 264)
        for _ in range(2):  # the second finds its prompts in the cache
            llm.generate(prompts, params)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
        started = time.perf_counter()
        for _ in range(3):
            llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        torch.cuda.synchronize()
        print(f"{way}: {300 / seconds:.0f} steps/s of the tiny model")
        assert torch.cuda.memory_allocated() <= before[0]
        assert torch.cuda.mem_get_info()[0] >= before[1] - 2**24  # what the driver loads late


def test_a_step_that_does_not_fit_a_graph_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_texts([4] * 40, 264)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with loaded("mixtral", monkeypatch, max_num_seqs=40) as llm:
        outputs = llm.generate(prompts, params)
        assert all(len(o.outputs[0].token_ids) == 4 for o in outputs)
        assert not steps_of(llm)._buckets
