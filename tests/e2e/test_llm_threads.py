"""One model, several threads; and what is left when it is closed."""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fiddler import LLM, SamplingParams
from fiddler.errors import ConfigError, NumericsError
from tests.e2e.conftest import OpenModel, open_folder
from tests.forward import random_texts
from tests.tiny_models import VOCAB_SIZE, shared_tiny


def mixtral() -> Path:
    """Built at first use, not while tests are collected."""
    return shared_tiny("mixtral")


PROMPTS = random_texts([4, 30, 11, 50, 2, 23], VOCAB_SIZE, seed=51)


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 20, "ignore_eos": True} | fields)


def tokens(llm: LLM, prompt: list[int], settings: SamplingParams) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(prompt, settings).outputs]


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- several threads ---


def test_threads_get_the_results_they_would_get_alone(model: OpenModel) -> None:
    llm = model("mixtral", prefix_caching=False)
    settings = [params(seed=i, n=1 + i % 3) for i in range(len(PROMPTS))]
    wanted = [tokens(llm, p, s) for p, s in zip(PROMPTS, settings, strict=True)]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            found = pool.map(lambda p, s: tokens(llm, p, s), PROMPTS, settings)
            assert list(found) == wanted
    assert llm.num_free_pages == llm.plan.num_pages


def test_streams_of_several_threads_lose_no_event(model: OpenModel) -> None:
    """Another thread's step may end a stream between two looks at it."""
    llm = model("mixtral")
    settings = params(max_tokens=3)

    def count(prompt: list[int]) -> list[Any]:
        found = []
        for _ in range(12):
            events = list(llm.stream(prompt, settings))
            found.append((len(events), events[-1].finish_reason))
        return found

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for found in pool.map(count, PROMPTS):
            assert found == [(3, "length")] * 12


def test_a_short_request_does_not_wait_for_a_long_one(model: OpenModel) -> None:
    llm = model("mixtral")
    long = llm.stream(PROMPTS[0], params(max_tokens=400))
    is_over, may_end = threading.Event(), threading.Event()

    def run_long() -> None:
        for number, _ in enumerate(long):
            if number == 300:  # the short one may be kept waiting by a busy machine
                may_end.wait(60)
        is_over.set()

    thread = threading.Thread(target=run_long)
    thread.start()
    result = llm.generate(PROMPTS[1], params(max_tokens=5))
    assert result.stats.output_tokens == 5 and not is_over.is_set()
    may_end.set()
    long.close()
    thread.join()


def test_a_failed_step_reaches_every_thread(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = model("mixtral", prefix_caching=False)
    decoder = llm._running.engine._runner.decoder
    logits = decoder.logits
    all_running = threading.Event()

    def fail_once_all_run(hidden_RH: Any) -> Any:
        if len(hidden_RH) == 3:
            all_running.set()
        time.sleep(0.002)  # time for others to begin, on a busy machine too
        return logits(hidden_RH) * (float("nan") if all_running.is_set() else 1.0)

    monkeypatch.setattr(decoder, "logits", fail_once_all_run)

    def run(prompt: list[int]) -> str:
        with pytest.raises(NumericsError) as caught:
            llm.generate(prompt, params(max_tokens=400))
        return caught.value.message

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(run, PROMPTS[:3]))) == 1
    assert llm.num_free_pages == llm.plan.num_pages
    monkeypatch.undo()
    assert llm.generate(PROMPTS[0], params()).stats.output_tokens == 20


# --- the end ---


def test_closing_takes_all_threads_and_may_be_repeated() -> None:
    before = threading.active_count()
    llm = open_folder(mixtral(), cpu_threads=2)
    llm.generate([1, 2, 3], params())
    assert threading.active_count() > before
    llm.close()
    llm.close()
    assert threading.active_count() == before


def test_closing_takes_all_threads_where_a_request_cannot_be_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a device that failed in a step that ran ahead."""
    before = threading.active_count()
    llm = open_folder(mixtral(), cpu_threads=2)
    stream = llm.stream([1, 2, 3], params())
    next(stream)

    def fails(*_: Any) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(llm._running.engine, "cancel", fails)
    with pytest.raises(RuntimeError, match="device lost"):
        llm.close()
    assert threading.active_count() == before
    llm.close()
    stream.close()


def test_the_block_closes_after_an_error() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), open_folder(mixtral()):
        raise KeyError
    assert threading.active_count() == before


def test_a_closed_model_says_so() -> None:
    llm = open_folder(mixtral())
    llm.close()
    uses: list[Callable[[], object]] = [
        lambda: llm.generate("a"),
        lambda: llm.generate(["a", "b"]),
        lambda: llm.stream("a"),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
        lambda: llm.stream_chat([{"role": "user", "content": "a"}]),
        lambda: llm.num_free_pages,
        lambda: llm.expert_counts(),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="this LLM is closed"):
            use()
    # what is known of the model stays known
    assert llm.tokenizer.encode("a") and llm.plan.num_pages and llm.default_params()
    assert llm.model_name == mixtral().name and llm.revision is None


def test_a_forked_child_is_told_to_load_its_own_model() -> None:
    """It has none of the threads; closing there leaves the parent's alone."""
    with open_folder(mixtral()) as llm:
        before = llm.generate("a", params(seed=1)).outputs[0].token_ids
        child = os.fork()
        if child == 0:
            try:
                with llm, pytest.raises(ConfigError, match="belongs to the process that loaded it"):
                    llm.generate("a")
                os._exit(0)
            finally:
                os._exit(1)
        wait_until(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        assert os.waitpid(child, 0)[1] == 0
        assert llm.generate("a", params(seed=1)).outputs[0].token_ids == before


def test_closing_ends_another_threads_call(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_folder(mixtral(), prefix_caching=False)
    total = llm.num_free_pages
    decoder = llm._running.engine._runner.decoder
    logits = decoder.logits

    def slow_logits(hidden_RH: Any) -> Any:
        time.sleep(0.005)  # time to close it in, on a busy machine too
        return logits(hidden_RH)

    monkeypatch.setattr(decoder, "logits", slow_logits)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(llm.generate, PROMPTS, params(max_tokens=400))
        wait_until(lambda: llm.num_free_pages < total)
        llm.close()
        with pytest.raises(ConfigError, match="closed"):
            running.result(timeout=60)


def test_weights_and_cache_are_given_back() -> None:
    """Nothing but the model itself may hold them, so that closing frees GPU memory too."""
    import gc
    import weakref

    llm = open_folder(mixtral())
    stream = llm.stream(PROMPTS[0], params())
    next(stream)
    running = llm._running
    held = [
        weakref.ref(running.engine._runner.kv_caches[0].pages),
        weakref.ref(running.engine._runner.decoder._weights.embed_VH),
        weakref.ref(running.experts._store[0].cpu_w13_CFH),
    ]
    del running
    llm.close()
    gc.collect()
    assert [ref() is None for ref in held] == [True, True, True]
    stream.close()
