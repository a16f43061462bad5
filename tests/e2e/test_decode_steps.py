"""Decode steps in buckets give the tokens of plain steps, here in Triton's interpreter."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from fiddler import LLM, SamplingParams
from fiddler.engine.decode_graph import DecodeSetup
from fiddler.engine.decode_steps import DecodeSteps
from fiddler.errors import WorkerError
from fiddler.models.buckets import bucket_for, largest_bucket
from offload.adaptive_placement import AdaptivePlacement
from offload.cold_share import ShareCosts
from offload.decode_experts import DecodeExperts
from offload.expert_store import ExpertStore
from offload.handoff import EagerHandOff
from tests.forward import random_texts
from tests.model.test_parity import folder_of, split_at_random
from tests.random_swaps import random_placement
from tests.tiny_models import MODEL_TYPES
from tests.workers import fail_worker, hold_layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels are compiled")
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def test_buckets() -> None:
    assert [bucket_for(n, 32) for n in (1, 2, 3, 9, 16, 17, 32, 33)] == [
        *(1, 2, 4, 16, 16, 32, 32),
        None,
    ]
    assert bucket_for(5, 4) is None
    assert [largest_bucket(n) for n in (1, 3, 16, 100)] == [1, 4, 16, 32]


@contextmanager
def loaded(model: str, share: float, *, cpu_threads: int = 1, **options: Any) -> Iterator[LLM]:
    folder: Path = folder_of(model)
    placement = split_at_random(folder, seed=1, share=share)
    with LLM(
        str(folder),
        device="cpu",
        dtype="float32",
        max_model_len=128,
        cpu_threads=cpu_threads,
        placement=placement,
        vram_gb=1,
        **options,
    ) as llm:
        yield llm


# sides without a start, which is all that counts for tiny experts: the device pulls about half
# of each expert
HALF = ShareCosts(
    cpu_bytes_per_s=1e9,
    link_bytes_per_s=1.1e9,
    cpu_start_s=0.0,
    link_start_s=0.0,
    unit=16,
)


def add_decode_steps(
    llm: LLM,
    share: ShareCosts | None = None,
    adaptive: AdaptivePlacement | None = None,
    renew_workers: Callable[[], None] = lambda: None,
) -> DecodeSteps:
    """As a GPU would have them, but for the graph."""
    from fiddler.models.triton_kernels import TritonKernels

    running = llm._running
    runner, experts = running.engine._runner, running.experts
    torch_kernels: Any = runner.decoder._kernels

    def make_experts() -> DecodeExperts:
        workers: Any = experts.pool.workers  # type: ignore[attr-defined]
        return DecodeExperts(
            experts,
            workers,
            EagerHandOff(workers, lambda: None),
            dtype=torch.float32,
            max_rows=4,
            share=share,
            adaptive=adaptive,
        )

    runner.decode_steps = DecodeSteps(
        DecodeSetup(
            decoder=runner.decoder,
            kernels=TritonKernels(
                torch_kernels._cos_SR,
                torch_kernels._sin_SR,
                torch_kernels._sm_scale,
                eps=torch_kernels._eps,
                num_experts=llm.model_config.num_experts,
                dtype=torch.float32,
            ),
            kv_caches=runner.kv_caches,
            dtype=torch.float32,
            make_experts=make_experts,
            renew_workers=renew_workers,
            workers_failed=lambda: experts.pool.workers.has_failed,  # type: ignore[attr-defined]
            settle=adaptive.settle if adaptive else lambda: None,
            page_size=16,
            max_num_seqs=4,
            pages_per_request=8,
            is_eager=True,
        )
    )
    return runner.decode_steps


def run(llm: LLM) -> list[tuple[list[int], int, int]]:
    """Requests that leave at different times, one over the end of a page."""
    prompts = random_texts([3, 15, 30], llm.model_config.vocab_size, seed=4)
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, routed_experts=n == 3)
        for n in (2, 4, 3)
    ]
    outputs = llm.generate(prompts, params)
    return [
        (o.outputs[0].token_ids, o.stats.expert_tokens_gpu, o.stats.expert_tokens_cpu)
        for o in outputs
    ]


@pytest.mark.parametrize(
    ("model", "share"),
    [
        ("qwen2_moe", 0.5),
        *(
            pytest.param(model, share, marks=pytest.mark.slow)
            for model in MODEL_TYPES
            for share in (0.0, 0.5, 1.0)
        ),
    ],
)
def test_tokens_and_counts_are_those_of_plain_steps(model: str, share: float) -> None:
    with loaded(model, share) as llm:
        wanted = run(llm)
        counts = llm.expert_counts()
        steps = add_decode_steps(llm)
        llm._running.engine.scheduler._cache.evict(10**6)  # type: ignore[union-attr]
        assert run(llm) == wanted
        assert sorted(steps._buckets) == [(rows, False) for rows in (1, 2, 4)]
        assert (torch.tensor(llm.expert_counts()) == 2 * torch.tensor(counts)).all()


def test_steps_follow_before_tokens_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a token that ends a request: that step counts for nothing."""
    followed: list[int] = []

    def start_next(self: DecodeSteps, step: Any, chunks: Any, *rest: Any) -> Any:
        followed.append(len(chunks))
        return put_behind(self, step, chunks, *rest)

    put_behind = DecodeSteps.start_next
    monkeypatch.setattr(DecodeSteps, "start_next", start_next)
    with loaded("qwen2_moe", 0.5) as llm:
        prompts = random_texts([15, 30], llm.model_config.vocab_size, seed=4)

        def tokens_and_counts(**params: Any) -> tuple[list[list[int]], list[list[int]]]:
            llm._running.engine.scheduler._cache.evict(10**6)  # type: ignore[union-attr]
            before = torch.tensor(llm.expert_counts())
            given = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, **params)
            found = [o.outputs[0].token_ids for o in llm.generate(prompts, given)]
            return found, (torch.tensor(llm.expert_counts()) - before).tolist()

        all_tokens, _ = wanted = tokens_and_counts()
        stop = all_tokens[0][3]
        assert stop not in all_tokens[0][:3]
        stopped = tokens_and_counts(stop_token_ids=[stop])
        assert not followed
        add_decode_steps(llm)
        assert tokens_and_counts() == wanted
        assert followed == [2] * 6
        followed.clear()
        assert tokens_and_counts(stop_token_ids=[stop]) == stopped
        assert 0 < len(followed) < 6
        followed.clear()
        with llm._running.engine.one_by_one():
            assert tokens_and_counts() == wanted and not followed


def test_draws_are_those_of_plain_steps() -> None:
    """Some rows are drawn by the step, some, with adjusted logits, behind it."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.2, "top_p": 0.8, "n": 2},
    ]
    params = [
        SamplingParams(seed=n, max_tokens=4, ignore_eos=True, **kind)
        for n, kind in enumerate(kinds)
    ]
    with loaded("mixtral", 0.5) as llm:
        prompts = random_texts([3, 15, 30], llm.model_config.vocab_size, seed=4)

        def texts() -> list[list[int]]:
            outputs = llm.generate(prompts, params)
            return [sample.token_ids for output in outputs for sample in output.outputs]

        wanted = texts()
        assert len({tuple(text) for text in wanted}) == 4
        steps = add_decode_steps(llm)
        assert texts() == wanted
        assert steps._buckets


def test_tokens_are_the_same_where_the_device_pulls_experts() -> None:
    with loaded("qwen2_moe", 0.5) as llm:
        wanted = run(llm)
        steps = add_decode_steps(llm, HALF)
        llm._running.engine.scheduler._cache.evict(10**6)  # type: ignore[union-attr]
        assert run(llm) == wanted
        pulled = steps._shared.experts.pulled  # type: ignore[union-attr]
        assert pulled is not None and pulled.layers
        for layer in pulled.layers:
            shares = [kept / (n * 40) for n, kept in enumerate(pulled.kept_rows(layer)) if n]
            assert pulled.pulls(layer, 4) and all(0.3 < share < 0.6 for share in shares)


@pytest.mark.parametrize("model", ["olmoe", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_tokens_are_the_same_whatever_moves(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(model, 0.5) as llm:
        wanted = [tokens for tokens, _, _ in run(llm)]

    def with_spares(*args: Any, **options: Any) -> ExpertStore:
        return ExpertStore(*args, **{**options, "has_spares": True})

    monkeypatch.setattr("fiddler.loading.experts.ExpertStore", with_spares)
    with loaded(model, 0.5) as llm:
        experts = llm._running.experts
        adaptive = random_placement()(experts.store, experts.device)
        add_decode_steps(llm, HALF, adaptive)
        for _ in range(2):  # prompts come in between, with experts elsewhere
            assert [tokens for tokens, _, _ in run(llm)] == wanted
            llm._running.engine.scheduler._cache.evict(10**6)  # type: ignore[union-attr]
        assert adaptive.num_swaps > 4 and adaptive.version >= 4


def test_a_step_that_does_not_fit_runs_plainly() -> None:
    with loaded("mixtral", 0.5) as llm:
        prompts = random_texts([5, 6, 7, 8, 9], llm.model_config.vocab_size)
        wanted = [out.outputs[0].token_ids for out in llm.generate(prompts, PARAMS)]
        steps = add_decode_steps(llm)
        found = [out.outputs[0].token_ids for out in llm.generate(prompts, PARAMS)]
        assert found == wanted and not steps._buckets


def test_a_worker_that_complains_ends_the_step_and_no_more() -> None:
    with loaded("mixtral", 0.0) as llm:
        prompt = random_texts([5], llm.model_config.vocab_size)[0]
        wanted = llm.generate(prompt, PARAMS).outputs[0].token_ids
        steps = add_decode_steps(llm)
        experts = llm._running.experts
        some: Any = next(iter(experts.pool_layers.values()))
        place_of = some.place_of.copy()
        stream = llm.stream(prompt, PARAMS)
        next(stream)  # the prompt and the first token
        some.place_of[:] = 99  # the workers find no such expert
        with pytest.raises(WorkerError, match="a CPU worker failed"):
            list(stream)
        assert not steps._buckets  # new ones for new workers
        some.place_of[:] = place_of
        assert llm.generate(prompt, PARAMS).outputs[0].token_ids == wanted


@contextmanager
def new_pools(experts: Any, **options: Any) -> Iterator[Callable[[], None]]:
    """What gives ``experts`` another pool at each call."""

    def renew() -> None:
        pool = ExpertPool(1, caller_works=False, **options)
        experts.replace_pool(pools.enter_context(pool))

    with ExitStack() as pools:
        yield renew


def test_a_worker_that_fails_between_requests_is_replaced() -> None:
    """The next prompt finds out, and the request after it has new workers."""
    with ExitStack() as pools, loaded("mixtral", 0.0) as llm:
        experts: Any = llm._running.experts
        renew_workers = pools.enter_context(new_pools(experts))
        prompt = random_texts([5], llm.model_config.vocab_size)[0]
        wanted = llm.generate(prompt, PARAMS).outputs[0].token_ids
        renew_workers()
        add_decode_steps(llm, renew_workers=renew_workers)
        left = experts.pool
        with left.workers.awake():
            fail_worker(left.workers, MemoryError("no room"))
        with pytest.raises(WorkerError, match=r"a CPU worker failed \(no room\)"):
            llm.generate(prompt, PARAMS)
        assert experts.pool is not left
        assert llm.generate(prompt, PARAMS).outputs[0].token_ids == wanted


def test_workers_of_a_model_without_a_gpu_are_replaced_too() -> None:
    with loaded("mixtral", 0.0, cpu_threads=2) as llm:
        experts: Any = llm._running.experts
        prompt = random_texts([5], llm.model_config.vocab_size)[0]
        wanted = llm.generate(prompt, PARAMS).outputs[0].token_ids
        for _ in range(2):
            left = experts.pool
            with left.workers.awake():
                fail_worker(left.workers, MemoryError("no room"))
            with pytest.raises(WorkerError, match=r"a CPU worker failed \(no room\)"):
                llm.generate(prompt, PARAMS)
            assert experts.pool is not left
            assert llm.generate(prompt, PARAMS).outputs[0].token_ids == wanted


def first_layer(experts: Any) -> Any:
    return next(iter(experts.pool_layers.values()))


@pytest.mark.parametrize("comes_back", [False, True])
def test_workers_that_stand_still_in_a_prompt_are_replaced(
    comes_back: bool, may_go: threading.Event
) -> None:
    """Nothing is fed by a device here; a worker that is late spoils nothing."""
    with loaded("mixtral", 0.0) as llm:
        experts: Any = llm._running.experts
        left = experts.pool
        if left.workers.caller_works:
            pytest.skip("the only core is the caller's")
        prompt = random_texts([5], llm.model_config.vocab_size)[0]
        wanted = llm.generate(prompt, PARAMS).outputs[0].token_ids
        left.workers._patience_s = 0.5
        hold_layer(first_layer(experts), may_go)
        with pytest.raises(WorkerError, match=r"the CPU workers stood still for 0\.5 seconds in"):
            llm.generate(prompt, PARAMS)
        assert experts.pool is not left
        if comes_back:
            may_go.set()
        assert llm.generate(prompt, PARAMS).outputs[0].token_ids == wanted


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("fails", r"a CPU worker failed \(no room\)"),
        ("fails awake", r"a CPU worker failed \(no room\)"),
        ("stands still", r"the CPU workers stood still for 0\.5 seconds in"),
    ],
)
def test_trouble_of_a_worker_ends_the_step_and_it_is_replaced(
    trouble: str, said: str, may_go: threading.Event
) -> None:
    """A failure when the next job wakes it, or while it waits for that; or the host for it."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    patience: dict[str, Any] = {"patience_s": 0.5} if trouble == "stands still" else {}
    with ExitStack() as pools, loaded("mixtral", 0.0) as llm:
        experts: Any = llm._running.experts
        renew_workers = pools.enter_context(new_pools(experts, **patience))
        prompt = random_texts([5], llm.model_config.vocab_size)[0]
        wanted = llm.generate(prompt, params).outputs[0].token_ids
        renew_workers()  # there was no thread if the only core is the caller's
        add_decode_steps(llm, renew_workers=renew_workers)
        for _ in range(2):
            stream = llm.stream(prompt, params)
            for _ in range(2):
                next(stream)
            left = experts.pool
            if trouble == "stands still":
                hold_layer(first_layer(experts), may_go)
            else:
                with left.workers.awake() if trouble == "fails awake" else nullcontext():
                    fail_worker(left.workers, MemoryError("no room"))
            with pytest.raises(WorkerError, match=said):
                list(stream)
            assert experts.pool is not left
            assert llm.generate(prompt, params).outputs[0].token_ids == wanted
