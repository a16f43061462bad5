"""Predicted times: their parts add up, and move as the machine and the plan do."""

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.benchmark.predicted import predict_demands
from fiddler.config import EngineConfig
from fiddler.errors import FiddlerError
from fiddler.models.shapes import load_shape
from fiddler.planning import plan_model
from fiddler.speed import demand_of, drawn_chances
from offload.chances import distinct
from offload.demand import Demand, decode_work, prefill_work
from offload.limits import decode_limit_s, prefill_limit_s
from offload.machine_rates import MachineRates, to_json
from offload.prediction import predict_decode
from offload.prefill_prediction import predict_prefill
from offload.reference_machines import find_machine, reference_names
from offload.routing_law import Law
from scripts.bench.prediction import CASES, again, line_of

SHAPES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen2-57b-a14b", "olmoe-1b-7b")


@cache
def demand(
    shape: str,
    vram_gb: float,
    dtype: str = "auto",
    machine: str = "h200-16core",
    activations: str = "auto",
) -> Demand | None:
    """None: it does not fit there."""
    hardware = find_machine(machine).hardware
    config = load_shape(shape)
    settings = EngineConfig(
        model=shape,
        load_format="dummy",
        max_model_len=2048,
        vram_gb=vram_gb,
        dtype=dtype,
        cpu_activations=activations,
    )
    try:
        plan, dtypes = plan_model(settings, config, hardware, name=shape, folder=None)
    except FiddlerError:
        return None
    return demand_of(config, dtypes, plan)


def fitting(
    shape: str, vram_gb: float, dtype: str = "auto", *, activations: str = "auto"
) -> Demand:
    found = demand(shape, vram_gb, dtype, activations=activations)
    assert found is not None
    return found


H200 = find_machine("h200-16core").rates


@pytest.mark.parametrize(
    ("shape", "vram_gb", "dtype", "activations", "decode", "prompt_2048"),
    [
        ("mixtral-8x7b", 24, "auto", "f32", 7.9, 1686),
        ("qwen3-30b-a3b", 24, "auto", "f32", 52.6, 3245),
        ("qwen3-30b-a3b", 8, "w4g128", "int8", 109.2, 8782),
        ("mixtral-8x7b", 12, "w4g128", "f32", 23.1, 6716),
    ],
)
def test_what_was_measured_on_the_reference_is_predicted(
    shape: str, vram_gb: float, dtype: str, activations: str, decode: float, prompt_2048: float
) -> None:
    """docs/benchmarks.md; the rates are those of the same days."""
    asked = fitting(shape, vram_gb, dtype, activations=activations)
    found = 1 / predict_decode(asked, H200, rows=1, depth=32).seconds
    assert found == pytest.approx(decode, rel=0.15)
    found = 2048 / predict_prefill(asked, H200, num_tokens=2048).seconds
    assert found == pytest.approx(prompt_2048, rel=0.3)


@given(
    st.sampled_from(SHAPES),
    st.integers(5, 60),
    st.integers(1, 20),
    st.sampled_from(["auto", "w4g128"]),
)
def test_more_vram_never_predicts_slower_decode(
    shape: str, vram_gb: int, more: int, dtype: str
) -> None:
    small, large = demand(shape, vram_gb, dtype), demand(shape, vram_gb + more, dtype)
    if small is None or large is None:
        return
    slow, fast = (predict_decode(d, H200, rows=1, depth=1024).seconds for d in (small, large))
    assert fast <= slow * (1 + 1e-9)


@given(st.sampled_from(SHAPES), st.integers(6, 80), st.integers(1, 32), st.integers(1, 5000))
def test_terms_add_up_and_nothing_takes_less_than_none(
    shape: str, vram_gb: int, rows: int, tokens: int
) -> None:
    asked = demand(shape, vram_gb)
    if asked is None:
        return
    for found in (
        predict_decode(asked, H200, rows=rows, depth=100),
        predict_prefill(asked, H200, num_tokens=tokens),
    ):
        assert found.seconds == pytest.approx(sum(term.seconds for term in found.terms))
        assert all(0 <= term.seconds <= term.busy_s * (1 + 1e-9) for term in found.terms)
        assert len({term.name for term in found.terms}) == len(found.terms)


@given(st.sampled_from(SHAPES), st.integers(6, 80), st.integers(1, 8))
def test_decode_is_never_predicted_faster_than_its_limit(
    shape: str, vram_gb: int, rows: int
) -> None:
    asked = demand(shape, vram_gb)
    if asked is not None:
        limit_s = decode_limit_s(decode_work(asked, rows=rows, depth=1024), H200.peaks)
        assert predict_decode(asked, H200, rows=rows, depth=1024).seconds >= limit_s


@given(
    st.sampled_from(SHAPES),
    st.integers(6, 80),
    st.sampled_from(reference_names()),
    st.integers(1, 4096),
    st.integers(1, 3),
)
def test_a_prompt_is_never_predicted_faster_than_its_limit(
    shape: str, vram_gb: int, name: str, num_tokens: int, prompts: int
) -> None:
    asked, rates = demand(shape, vram_gb, machine=name), find_machine(name).rates
    if asked is not None:
        size = {"num_tokens": num_tokens, "prompts": prompts}
        limit_s = prefill_limit_s(prefill_work(asked, **size), rates.peaks)
        assert predict_prefill(asked, rates, **size).seconds >= limit_s


FASTER = {
    "hand_over_s": 1e-6,
    "launch_s": 1e-7,
    "beside_cpu_gbps": 110.0,
    "beside_pull_gbps": 60.0,
}


@pytest.mark.parametrize("name", FASTER)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_what_is_faster_never_predicts_slower_decode(name: str, shape: str) -> None:
    better = replace(H200, **{name: FASTER[name]})
    asked = fitting(shape, 24)
    before, after = (predict_decode(asked, r, rows=1, depth=512) for r in (H200, better))
    assert after.seconds <= before.seconds
    if name in ("hand_over_s", "launch_s"):
        assert after.seconds < before.seconds


def test_prompts_that_wait_for_python_take_as_long_as_its_launches() -> None:
    """All experts of a small kind are resident: nothing else takes long on a card like this."""
    asked = fitting("qwen3-30b-a3b", 80)
    slower = replace(H200, python_launch_s=2 * H200.python_launch_s)
    before, after = (predict_prefill(asked, r, num_tokens=64) for r in (H200, slower))
    python = before.term("layers in Python")
    assert python.seconds == python.busy_s > 0.9 * before.seconds
    assert after.seconds == pytest.approx(before.seconds + python.seconds)


def test_more_tokens_take_longer_and_each_of_them_less() -> None:
    asked = fitting("qwen3-30b-a3b", 24)
    times = [predict_prefill(asked, H200, num_tokens=n).seconds for n in (256, 512, 1024, 4096)]
    assert times == sorted(times)
    assert times[-1] / 4096 < times[0] / 256
    steps = [predict_decode(asked, H200, rows=n, depth=9).seconds for n in (1, 2, 4, 8)]
    assert steps == sorted(steps) and steps[-1] < 8 * steps[0]


def test_resident_experts_leave_nothing_to_hand_over() -> None:
    asked = fitting("olmoe-1b-7b", 40)
    found = predict_decode(asked, H200, rows=1, depth=9)
    for name in ("hand-over", "cold experts, CPU", "cold experts, pulled"):
        assert found.term(name).busy_s == 0
    assert found.term("hot experts").seconds > 0


def without_gpu(rates: MachineRates) -> MachineRates:
    return replace(rates, peaks=rates.peaks_for(on_gpu=False))


@pytest.mark.parametrize("dtype", ["auto", "float32", "w8g128", "w4g128"])
@pytest.mark.parametrize("name", reference_names())
def test_no_prompt_without_a_gpu_is_predicted_beyond_its_limit(name: str, dtype: str) -> None:
    """Torch multiplies in float32, and experts' kernels faster where the CPU can."""
    hardware, rates = find_machine(name).hardware.without_gpu(), find_machine(name).rates
    config = load_shape("olmoe-1b-7b")
    settings = EngineConfig(model="some", load_format="dummy", max_model_len=4096, dtype=dtype)
    plan, dtypes = plan_model(settings, config, hardware, name="some", folder=None)
    asked = demand_of(config, dtypes, plan)
    for num_tokens in (1, 64, 512, 4096):
        work = prefill_work(asked, num_tokens=num_tokens)
        limit_s = prefill_limit_s(work, rates.limits_for(on_gpu=False))
        assert limit_s <= predict_prefill(asked, rates, num_tokens=num_tokens).seconds


def test_dense_layers_without_a_gpu_take_what_torch_takes() -> None:
    hardware = find_machine("h200-16core").hardware.without_gpu()
    config = load_shape("olmoe-1b-7b")
    settings = EngineConfig(model="olmoe-1b-7b", load_format="dummy", max_model_len=2048)
    plan, dtypes = plan_model(settings, config, hardware, name="olmoe-1b-7b", folder=None)
    asked, cpu = demand_of(config, dtypes, plan), without_gpu(H200)
    plain, slow, fast = (
        predict_decode(
            asked, replace(cpu, row_gbps=part * cpu.peaks.cpu_read_gbps), rows=1, depth=9
        )
        for part in (0.0, 0.5, 3.0)
    )
    for name in ("dense", "head"):
        assert slow.term(name).seconds == pytest.approx(2 * plain.term(name).seconds)
        assert fast.term(name).seconds == plain.term(name).seconds > 0  # memory gives no more
    assert slow.term("experts") == plain.term("experts")


@pytest.mark.parametrize("name", reference_names())
def test_without_a_gpu_everything_is_the_cpus(name: str) -> None:
    rates = find_machine(name).rates
    config = load_shape("olmoe-1b-7b")
    hardware = find_machine(name).hardware.without_gpu()
    settings = EngineConfig(model="olmoe-1b-7b", load_format="dummy", max_model_len=512)
    plan, dtypes = plan_model(settings, config, hardware, name="olmoe", folder=None)
    asked = demand_of(config, dtypes, replace(plan, step_tokens=512))
    assert not asked.on_gpu
    for used in (rates, without_gpu(rates)):
        step = predict_decode(asked, used, rows=1, depth=100)
        limit_s = decode_limit_s(
            decode_work(asked, rows=1, depth=100), used.peaks_for(on_gpu=False)
        )
        assert limit_s < step.seconds < 5 * limit_s
        prompt = predict_prefill(asked, used, num_tokens=300)
        assert prompt.seconds > prefill_work(asked, num_tokens=300).flops / 10e12
    assert predict_prefill(asked, rates, num_tokens=300) == predict_prefill(
        asked, without_gpu(rates), num_tokens=300
    )


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bf12", "w8g128", "w4g128"])
def test_what_is_read_from_disk_is_what_is_stored(dtype: str, on_gpu: bool) -> None:
    """Whatever they become in memory, experts of a bfloat16 checkpoint are 16 bits there."""
    some = replace(fitting("olmoe-1b-7b", 8, dtype), disk_share=0.5, on_gpu=on_gpu)
    assert some.disk_bytes == 3 * 2048 * 1024 * 2
    halves = sum(distinct(layer.cold, 3) for layer in some.layers) / 2
    step, prompt = (
        predict_decode(some, H200, rows=3, depth=9),
        predict_prefill(some, H200, num_tokens=3),
    )
    for prediction in (step, prompt):
        assert prediction.term("disk").seconds == pytest.approx(halves * some.disk_bytes / 1.6e9)


def test_experts_on_disk_cost_their_bytes_and_graphs() -> None:
    asked = fitting("qwen3-30b-a3b", 24)
    some = replace(asked, disk_share=0.5, staging_slots=0)
    fast, slow = (predict_decode(d, H200, rows=1, depth=9) for d in (asked, some))
    cold_bytes = decode_work(asked, rows=1, depth=9).cold_bytes
    disk_s = slow.term("disk").seconds
    assert disk_s == pytest.approx(0.5 * cold_bytes / 1.6e9)
    assert slow.seconds > fast.seconds + disk_s
    assert predict_prefill(some, H200, num_tokens=512).term("cold experts, PCIe").busy_s < 0.01


@given(
    st.sampled_from(SHAPES),
    st.integers(1, 900),
    st.integers(0, 500),
    st.integers(1, 6),
    st.integers(1, 400),
    st.booleans(),
)
def test_prompts_take_as_long_as_their_steps(
    shape: str, num_tokens: int, depth: int, prompts: int, step_tokens: int, on_gpu: bool
) -> None:
    some = replace(fitting(shape, 24), step_tokens=step_tokens, on_gpu=on_gpu)
    size = {"num_tokens": num_tokens, "depth": depth, "prompts": prompts}
    found = predict_prefill(some, H200, **size)
    whole, left, seconds, begin = replace(some, step_tokens=10**6), num_tokens * prompts, 0.0, depth
    middle = depth + (num_tokens + 1) / 2
    while left:
        tokens = min(left, step_tokens)
        behind = begin if prompts == 1 else middle - (tokens + 1) / 2
        one: dict[str, Any] = {"num_tokens": tokens, "depth": behind}
        step = predict_prefill(whole, H200, **one)
        head_s = step.term("head").seconds
        seconds += step.seconds - head_s
        begin, left = begin + tokens, left - tokens
    assert found.seconds == pytest.approx(seconds + head_s, rel=1e-9)


def test_hits_save_what_they_promise() -> None:
    config = load_shape("qwen3-30b-a3b")
    hardware = find_machine("h200-16core").hardware
    settings = EngineConfig(model="q", load_format="dummy", max_model_len=512, vram_gb=24)
    plan, dtypes = plan_model(settings, config, hardware, name="q", folder=None)
    times = []
    for hit_rate in (0.2, 0.5, 0.9):
        layers = drawn_chances(config, plan, Law(skew=1.0), hit_rate)
        asked = demand_of(config, dtypes, plan, layers=layers)
        times.append(predict_decode(asked, H200, rows=1, depth=9).seconds)
    assert times == sorted(times, reverse=True)
    assert times[0] > 3 * times[2]


def test_a_benchmarks_file_is_predicted_again_as_it_was(tmp_path: Path) -> None:
    rows = []
    asked = fitting("qwen3-30b-a3b", 24)
    seen = {"step_s": 0.1, "cpu_s": 0.0, "launch_s": 3e-5}
    for case in CASES:
        predicted = predict_demands(case, H200, asked, asked)
        row = {
            "model": "some",
            "test": case.name,
            "case": asdict(case),
            "measured_ms": 100.0,
            "demand": asdict(asked),
            "watched": {"prompt" if case.n_prompt else "step": seen},
        }
        rows.append((row, predicted))
    path = tmp_path / "bench.json"
    record = {"rates": to_json(H200), "rows": [row for row, _ in rows]}
    path.write_text(json.dumps(record))
    for found, (_, predicted) in zip(again(path), rows, strict=True):
        assert found["predicted_ms"] == predicted.seconds * 1e3
        assert found["error"] == pytest.approx(predicted.seconds * 10 - 1)
        assert found["model"] in line_of(found)
