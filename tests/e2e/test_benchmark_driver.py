"""The benchmark's driver on tiny models: it computes what a user's requests would compute."""

from collections.abc import Iterator

import numpy as np
import pytest

from fiddler import LLM, SamplingParams
from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Driver
from fiddler.benchmark.requests import CaseRequests
from fiddler.benchmark.routing import DrawnRouting
from fiddler.benchmark.subject import Subject
from fiddler.benchmark.work import done_work, least_work
from offload.drawn_routes import DrawnRoutes
from offload.placement import Placement
from offload.routing_law import Law
from tests.e2e.conftest import OpenModel, open_folder
from tests.tiny_models import VOCAB_SIZE, shared_tiny

DEPTH, NEW = 21, 6
WRITE = Case(n_prompt=0, n_gen=NEW, n_depth=DEPTH, n_parallel=2)
READ = Case(n_prompt=37, n_gen=0, n_depth=DEPTH, n_parallel=3)
BOTH = Case(n_prompt=19, n_gen=NEW, n_depth=DEPTH, n_parallel=1)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Qwen2-MoE, whose middle layer has no experts, half of the others on the GPU side."""
    placement = Placement.of([range(4), [], range(4)])
    options = {"vram_gb": 1, "max_batched_tokens": 16, "placement": placement}
    with open_folder(shared_tiny("qwen2_moe"), prefix_caching=False, **options) as llm:
        yield llm


def driver(llm: LLM, law: Law | None = None, seed: int = 3) -> Driver:
    routing = None if law is None else DrawnRouting(law, llm.model_config, seed=seed)
    return Driver(llm._running, routing=routing, seed=seed)


@pytest.mark.parametrize(("case", "num_outputs"), [(WRITE, NEW), (BOTH, NEW + 1), (READ, 1)])
def test_what_is_written_behind_a_depth_is_what_a_user_would_get(
    llm: LLM, case: Case, num_outputs: int
) -> None:
    made = CaseRequests(case, llm._running.pages, vocab_size=VOCAB_SIZE, seed=3)
    run = driver(llm)._run
    run(made.filling(), case)
    for number in (0, 1):
        requests = made.of_run(number)
        done = run(requests, case)
        assert len(done.decode) == case.n_gen
        assert sum(len(step.hot_T) for step in done.prompt) == case.n_parallel * case.n_prompt
        for request in requests:
            params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True)
            expected = llm.generate(list(request.prompt_ids), params).outputs[0].token_ids
            assert request.output_ids == expected
    made.close()


def test_prompts_share_their_depth_and_differ_behind_it(llm: LLM) -> None:
    made = CaseRequests(READ, llm._running.pages, vocab_size=VOCAB_SIZE, seed=3)
    again = CaseRequests(READ, llm._running.pages, vocab_size=VOCAB_SIZE, seed=3)
    first, second, same, filling = made.of_run(0), made.of_run(1), again.of_run(0), made.filling()
    assert [r.prompt_ids for r in same] == [r.prompt_ids for r in first]
    for a, b, cached in zip(first, second, filling, strict=True):
        assert a.prompt_ids[:DEPTH] == b.prompt_ids[:DEPTH] == cached.prompt_ids
        assert a.prompt_ids[DEPTH:] != b.prompt_ids[DEPTH:]
        assert len(a.prompt_ids) == READ.length
        assert a.num_computed == DEPTH
    for request in (*first, *second, *same, *filling):
        llm._running.pages.release(request.pages)
    made.close()
    again.close()
    assert llm.num_free_pages == llm._running.pages.num_pages


@pytest.mark.parametrize("case", [WRITE, READ, BOTH])
def test_a_measurement_counts_its_runs_and_gives_everything_back(llm: LLM, case: Case) -> None:
    measured = driver(llm).measure(case, repetitions=2)
    config = llm.model_config
    assert len(measured.samples_ns) == 2
    assert min(measured.samples_ns) > 0
    routed = 2 * case.n_parallel * 2 * config.top_k  # in two runs and two layers
    assert measured.prompt.counts_LE.sum() == routed * case.n_prompt
    assert measured.decode.counts_LE.sum() == routed * case.n_gen
    assert 0 < (measured.prompt + measured.decode).hit_rate < 1
    assert llm.num_free_pages == llm._running.pages.num_pages
    assert not llm._running.engine.scheduler.has_work


def test_one_request_reads_as_many_cold_bytes_as_the_hit_rate_says(llm: LLM) -> None:
    case = Case(n_prompt=0, n_gen=NEW, n_depth=DEPTH, n_parallel=1)
    measured = driver(llm).measure(case, repetitions=3)
    subject, config = Subject.of(llm._running), llm.model_config
    work = done_work(subject, measured).decode
    hit_rate = measured.decode.hit_rate
    routed_bytes = NEW * 2 * config.top_k * config.expert_numel * 4  # float32 experts of 2 layers
    assert work.cold_bytes == pytest.approx(routed_bytes * (1 - hit_rate))
    assert work.hot_bytes == pytest.approx(routed_bytes * hit_rate)
    assert work.dense_bytes == NEW * llm.plan.per_token.dense
    kv_of_one = 2 * 3 * config.num_kv_heads * config.head_dim * 4
    assert work.kv_bytes == kv_of_one * sum(range(DEPTH + 1, DEPTH + NEW + 1))
    least = least_work(subject, measured)
    assert least.decode.cold_bytes <= work.cold_bytes
    assert least.decode.cold_bytes + least.decode.hot_bytes == pytest.approx(routed_bytes)
    assert least.prompt.cold_bytes == least.prompt.flops == 0


def test_subjects_know_their_size(llm: LLM) -> None:
    subject = Subject.of(llm._running)
    assert subject.weight_bytes == 4 * subject.num_params


@pytest.mark.parametrize("law", [Law(), Law(skew=1.2), Law(stay=0.8)])
def test_drawn_experts_are_those_that_run(llm: LLM, law: Law) -> None:
    """Prompts go in pieces of 16 beside another request, which must change nothing."""
    config = llm.model_config
    llm._running.runner.draw_experts = DrawnRouting(law, config, seed=5)
    params = [
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, routed_experts=True, seed=seed)
        for seed in (7, 8)
    ]
    outputs = llm.generate([list(range(40)), list(range(9))], params)
    llm._running.runner.draw_experts = None
    size = {"num_layers": 3, "num_experts": config.num_experts, "top_k": config.top_k}
    for seed, output in zip((7, 8), outputs, strict=True):
        routed_TLK = output.outputs[0].routed_experts
        assert isinstance(routed_TLK, np.ndarray)
        drawn_TLK = DrawnRoutes(law, seed=5, **size).ids(seed, 0, len(routed_TLK))
        np.testing.assert_array_equal(routed_TLK[:, [0, 2]], drawn_TLK[:, [0, 2]])


def test_drawn_routing_uses_all_experts_and_the_model_its_own(model: OpenModel) -> None:
    llm = model("mixtral", prefix_caching=False)
    case = Case(n_prompt=60, n_gen=0, n_depth=0, n_parallel=2)
    entropy = {
        name: driver(llm, law, seed=0).measure(case, 1).prompt.entropy_bits
        for name, law in (("uniform", Law()), ("skewed", Law(skew=3.0)), ("model", None))
    }
    assert llm._running.runner.draw_experts is None
    assert entropy["uniform"] > 2.95  # of 3 bits, 8 experts
    assert entropy["skewed"] < 2.2
    assert entropy["model"] not in (entropy["uniform"], entropy["skewed"])


def test_the_law_goes_on_from_run_to_run(llm: LLM) -> None:
    """The depth takes no choices; run r of a request takes those behind all runs before it."""
    law, config = Law(stay=0.6), llm.model_config
    measured = driver(llm, law).measure(BOTH, repetitions=2)
    size = {"num_layers": 3, "num_experts": config.num_experts, "top_k": config.top_k}
    drawn_PLK = DrawnRoutes(law, seed=3, **size).ids(0, BOTH.new_tokens, 3 * BOTH.new_tokens)
    tally = measured.prompt + measured.decode
    for layer in (0, 2):
        expected_E = np.bincount(drawn_PLK[:, layer].ravel(), minlength=config.num_experts)
        np.testing.assert_array_equal(tally.counts_LE[layer], expected_E)
