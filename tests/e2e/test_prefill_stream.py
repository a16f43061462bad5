"""Prompts through residents, ring and CPU workers, in whole models.

Without a GPU one small case runs in Triton's interpreter; the rest needs CUDA.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from fiddler import LLM, SamplingParams
from fiddler.engine.request import Request
from offload import layout
from offload.expert_store import ExpertStore
from offload.expert_stream import ExpertStream
from offload.prefill import PrefillExperts
from offload.prefill_costs import PrefillCosts
from tests.forward import Forward, random_texts, relative_error
from tests.model.test_parity import split_at_random
from tests.tiny_models import shared_tiny

MODELS = ("mixtral", "qwen2_moe", "qwen3_moe")
LENGTHS = [150, 40, 1, 33]  # one ragged step, far beyond what the decode kernels take
WHOLE = {"intermediate_size": 64}  # whole tiles: such experts can be computed by columns
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
MIB = 1 << 20


@contextmanager
def loaded(
    model: str, share: float, *, stored: str = "float32", sizes: Any = None, **options: Any
) -> Iterator[LLM]:
    """``sizes``: fields of config.json."""
    folder = shared_tiny(model, dtype=stored, **(sizes or {}))
    settings = {"device": "cuda", "vram_gb": 8, "dtype": "float32", "max_model_len": 256}
    with LLM(
        str(folder), placement=split_at_random(folder, seed=1, share=share), **settings | options
    ) as llm:
        yield llm


def logits(llm: LLM) -> list[torch.Tensor]:
    texts = random_texts([n + 2 for n in LENGTHS], llm.model_config.vocab_size)
    return Forward(llm).logits(texts, LENGTHS)


@pytest.fixture(params=[1, 3, 8])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Slots; the tiny models have 8 experts a layer."""
    monkeypatch.setattr(layout, "wanted_slots", lambda expert_bytes: request.param)
    return int(request.param)


@pytest.mark.parametrize(
    ("dtype", "columns_from", "bound"),
    [("float32", None, 1e-5), ("bfloat16", None, 0.1), ("bfloat16", 1, 0.1)],
)
def test_a_prompt_gives_the_same_logits_without_a_gpu(
    dtype: str, columns_from: int | None, bound: float
) -> None:
    """In bfloat16, which the interpreter does not multiply rightly, all experts are the CPU's.

    Its rounding changes a choice of experts now and then.
    """
    is_exact = dtype == "float32"
    options = {"dtype": dtype, "device": "cpu", "vram_gb": 1, "max_batched_tokens": 64}
    with loaded("mixtral", 0.4 * is_exact, stored=dtype, sizes=WHOLE, **options) as llm:
        texts = random_texts([34, 8], llm.model_config.vocab_size)
        wanted = Forward(llm).logits(texts, [33, 5])
        hybrid, cpu = llm._running.experts, torch.device("cpu")
        store: ExpertStore = hybrid._store
        costs = PrefillCosts(copy_s=1.0, expert_s=lambda count: 1.5, columns_from=columns_from)
        with ExpertPool(1) as pool:
            hybrid._prefill = PrefillExperts(
                *(store, pool, ExpertStream(store, 2, cpu) if is_exact else None),
                dict.fromkeys(store.shape.moe_layers, costs),
                llm._running.plan.popularity,
                device=cpu,
                dtype=getattr(torch, dtype),
                activations="f32" if is_exact else "bf16",
                max_tokens=64,
                top_k=llm.model_config.top_k,
            )
            found = Forward(llm).logits(texts, [33, 5])
            hybrid._prefill.clear()
            hybrid._prefill = None
    assert relative_error(found, wanted) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_those_of_the_cpu(model: str, share: float, ring: int) -> None:
    with loaded(model, 0.0, device="cpu", vram_gb=None) as llm:
        wanted = logits(llm)
    with loaded(model, share) as llm:
        prefill = llm._running.experts._prefill
        assert prefill is not None
        assert (prefill._side.stream is None) == (share == 1.0)
        found, again = logits(llm), logits(llm)
    error = relative_error(found, wanted)
    print(f"{model} share {share} ring {ring}: relative error {error:.1e}")
    assert error < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_weights(model: str, dtype: str, ring: int) -> None:
    """Errors against float32 on the same weights: no more than where everything is resident."""
    with loaded(model, 0.0, stored="bfloat16", device="cpu", vram_gb=None) as llm:
        exact = logits(llm)
    errors = {}
    for share in (1.0, 0.5, 0.0):
        with loaded(model, share, stored="bfloat16", dtype=dtype) as llm:
            found, again = logits(llm), logits(llm)
        errors[share] = relative_error(found, exact)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    print(f"{model} {dtype} ring {ring}: relative errors by share {errors}")
    bound = 1e-4 if dtype == "float32" else 1.3 * errors[1.0]
    assert max(errors.values()) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("columns_from", [1, None])
def test_the_cpu_takes_a_share_and_says_the_same(columns_from: int | None) -> None:
    """Costs are set so that about half of the experts go to the workers."""
    with loaded("mixtral", 0.0, stored="bfloat16", sizes=WHOLE, dtype="bfloat16") as llm:
        experts = llm._running.experts
        prefill = experts._prefill
        assert prefill is not None
        everything_sent = logits(llm)
        even = PrefillCosts(copy_s=1.0, expert_s=lambda count: 1.0, columns_from=columns_from)
        prefill._costs = dict.fromkeys(prefill._costs, even)
        for parts in prefill._layers.values():
            experts.pool.remove_layer(parts.pool_layer)
        prefill.use_pool(prefill._pool)
        shared = logits(llm)
    error = relative_error(shared, everything_sent)
    print(f"half on the CPU, by columns from {columns_from}: {error:.1e} from all on the GPU")
    assert 0 < error < 5e-2


@pytest.mark.gpu
def test_chunks_of_a_long_prompt_and_decodes_beside_it() -> None:
    prompts = random_texts([180, 3, 60], 200, seed=9)
    with loaded("qwen3_moe", 0.0, device="cpu", vram_gb=None) as llm:
        wanted = [out.outputs[0].token_ids for out in llm.generate(prompts, PARAMS)]
    for size in (40, 64, 2048):
        with loaded("qwen3_moe", 0.3, max_batched_tokens=size) as llm:
            found = [out.outputs[0].token_ids for out in llm.generate(prompts, PARAMS)]
        assert found == wanted, size


@pytest.mark.gpu
def test_a_prompt_cancelled_between_its_chunks_leaves_nothing() -> None:
    prompt = random_texts([200], 200, seed=4)[0]
    with loaded("mixtral", 0.4, max_batched_tokens=64, prefix_caching=False) as llm:
        wanted = llm.generate(prompt, PARAMS).outputs[0].token_ids
        free, engine = llm.num_free_pages, llm._running.engine
        request = Request(prompt_ids=prompt, params=PARAMS, max_tokens=8, seed=0)
        engine.scheduler.add(request)
        engine.step()
        engine.cancel(request)
        assert llm.num_free_pages == free
        assert llm.generate(prompt, PARAMS).outputs[0].token_ids == wanted


@pytest.mark.gpu
def test_an_interrupt_within_a_chunk_leaves_a_working_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = random_texts([200], 200, seed=4)[0]
    with loaded("mixtral", 0.2) as llm:
        wanted = llm.generate(prompt, PARAMS).outputs[0].token_ids
        prefill = llm._running.experts._prefill
        assert prefill is not None
        launch = prefill.launch

        def interrupted(layer: int, *rest: Any) -> Any:
            pending = launch(layer, *rest)
            if layer == 1:
                raise KeyboardInterrupt
            return pending

        with monkeypatch.context() as patch:
            patch.setattr(prefill, "launch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                llm.generate([5, *prompt[1:]], PARAMS)
        assert llm.generate(prompt, PARAMS).outputs[0].token_ids == wanted


@pytest.mark.gpu
def test_cold_experts_are_pinned_and_copied_without_waiting() -> None:
    """torch takes registered memory for pinned: copies return at once and run at PCIe's speed."""
    options = {"load_format": "dummy", "vram_gb": 6.0, "max_model_len": 1024}
    with LLM("olmoe-1b-7b", **options) as llm:
        store = llm._running.experts._store
        layers = [store[i] for i in range(llm.model_config.num_layers)]
        cold = [at.cpu_w13_CFH for at in layers if len(at.cpu_w13_CFH)]
        assert cold and all(w.is_pinned() and w[-1].is_pinned() for w in cold)
        assert all(at.cpu_w2_CHI.is_pinned() for at in layers if len(at.cpu_w2_CHI))
        host = max(cold, key=len)
        plan = llm.plan.memory
        print(f"context {plan.context / MIB:.0f} MiB, unused {plan.unused / MIB:.0f} MiB")
        torch.cuda.set_per_process_memory_fraction(1.0)  # the test takes 472 MiB of its own
        there = torch.empty_like(host, device="cuda")
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            there.copy_(host, non_blocking=True)
            returned_s = time.perf_counter() - began
            torch.cuda.synchronize()
            done_s = time.perf_counter() - began
        size = host.numel() * host.element_size()
        print(
            f"{size / MIB:.0f} MiB: returned after {returned_s * 1e3:.2f} ms of {done_s * 1e3:.2f}"
        )
        print(f"{size / done_s / 1e9:.1f} GB/s")
        assert torch.equal(there.cpu(), host)
        assert returned_s < 0.3 * done_s
        memory = [at.cpu_w13_CFH.data_ptr() for at in layers if len(at.cpu_w13_CFH)]
        assert memory and store._pinned is not None and len(store._pinned._addresses) == len(memory)
        del cold, host, layers
    assert store._pinned._addresses == []


@pytest.mark.gpu
def test_a_second_start_divides_prompts_as_the_first() -> None:
    """A first start of these sizes measures, beside copies that keep the link busy."""
    found, prompt = [], random_texts([200], 200, seed=5)[0]
    for _ in range(3):
        with loaded("olmoe", 0.3, stored="bfloat16", dtype="bfloat16") as llm:
            began = time.perf_counter()
            tokens = llm.generate(prompt, PARAMS).outputs[0].token_ids
            prefill = llm._running.experts._prefill
            assert prefill is not None and prefill._costs is not None
            costs, record = next(iter(prefill._costs.values())), prefill.record
            print(f"{record}; {time.perf_counter() - began:.2f} s; from {costs.columns_from}")
            times = [costs.copy_s, *(costs.expert_s(n) for n in (1, 8, 32, 128, 512))]
            found.append((tokens, times, record.cpu_experts, record.sent_experts))
    assert found[0] == found[1] == found[2]


@pytest.mark.gpu
def test_the_link_is_busy_while_the_cpu_is_measured() -> None:
    """Copies go on, the ring is whole afterwards, and prompts give the same logits."""
    with loaded("mixtral", 0.0) as llm:
        prefill = llm._running.experts._prefill
        assert prefill is not None and prefill._side.stream is not None
        stream, wanted = prefill._side.stream, logits(llm)
        sends, send = [], stream.send

        def counted(layer: int, rows: Any) -> int:
            sends.append(time.perf_counter())
            return send(layer, rows)

        stream.send = counted  # type: ignore[method-assign]
        with stream.kept_busy(1):
            time.sleep(0.2)
        print(f"{len(sends)} banks of {stream.bank_size} sent in {sends[-1] - sends[0]:.3f} s")
        assert len(sends) > 20 and sends[-1] - sends[0] > 0.15
        assert len(stream._free) == len(stream._banks)
        assert all(torch.equal(a, b) for a, b in zip(logits(llm), wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.alone
def test_speed_and_costs_of_a_model_that_does_not_fit() -> None:
    """Prints what the division was based on, and what came of it; asserts the budget."""
    with LLM(
        "olmoe-1b-7b", load_format="dummy", vram_gb=5.0, max_model_len=2100, prefix_caching=False
    ) as llm:
        prefill = llm._running.experts._prefill
        assert prefill is not None and prefill._costs is not None
        costs, stream = next(iter(prefill._costs.values())), prefill._side.stream
        assert stream is not None
        times = {n: f"{costs.expert_s(n) * 1e3:.3f}" for n in (1, 8, 32, 128, 512)}
        print(f"copy {costs.copy_s * 1e3:.3f} ms, CPU ms {times}, from {costs.columns_from}")
        print(f"{stream.num_slots} slots in banks of {stream.bank_size}")
        for num_tokens in (64, 512, 2048):
            prompts = [[(i * 7919 + r) % 50_000 for i in range(num_tokens)] for r in range(3)]
            stats = [llm.generate(p, SamplingParams(max_tokens=1)).stats for p in prompts][-1]
            print(f"{stats.prefill_tokens_per_s:.0f} tok/s; {prefill.record}")
        free, total = torch.cuda.mem_get_info()
        assert total - free <= 5.0 * 2**30
