"""What a benchmark computes from counts and shapes, against brute force and by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.benchmark.cases import Case, make_cases
from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.predicted import NOTHING, CasePrediction
from fiddler.benchmark.report import as_csv, markdown
from fiddler.benchmark.tally import Tally
from fiddler.benchmark.watched import Watched, explain, how_far_off
from fiddler.benchmark.work import prompt_flops, seen_tokens
from fiddler.errors import ConfigError
from fiddler.models.registry import parse_config
from offload.machine_rates import MachineRates
from offload.placement import Placement
from offload.prediction import Prediction, Term, is_off
from offload.reference_machines import find_machine

PLACEMENT = Placement.of([{0, 1}, {2}])

CONFIG = parse_config(
    {
        "model_type": "qwen2_moe",
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 7,
        "moe_intermediate_size": 5,
        "shared_expert_intermediate_size": 6,
        "num_experts": 10,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "max_position_embeddings": 64,
        "dtype": "bfloat16",
    }
)


# --- tests ---


def test_cases_are_all_combinations_named_as_llama_bench_does() -> None:
    cases = make_cases([512, 0], [128], [(512, 64)], [0, 4096], [1, 4])
    assert [(case.name, case.n_parallel) for case in cases] == [
        (name, batch)
        for batch in (1, 4)
        for depth in ("", " @ d4096")
        for name in (f"pp512{depth}", f"tg128{depth}", f"pp512+tg64{depth}")
    ]
    assert [case.num_tokens for case in cases[-3:]] == [2048, 512, 2304]
    assert [case.prompt_end for case in cases[-3:]] == [4608, 4096, 4608]
    assert [case.length for case in cases[-3:]] == [4608, 4224, 4672]


def test_pages_are_counted_by_request() -> None:
    case = Case(n_prompt=17, n_gen=0, n_depth=16, n_parallel=3)
    assert case.num_pages(16) == 9


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to measure"):
        make_cases([0], [0], [], [0], [1])


# --- experts used ---


# by layer, a permutation for each token of which the first two are its experts
STEPS = st.lists(
    st.dictionaries(st.integers(0, 1), st.lists(st.permutations(range(4)), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)
Steps = list[dict[int, list[list[int]]]]


def tally_of(steps: Steps) -> Tally:
    is_resident_LE = np.array([[e in experts for e in range(4)] for experts in PLACEMENT.resident])
    tally = Tally(2, 4)
    for step in steps:
        ids = {layer: np.array(rows, np.int16)[:, :2] for layer, rows in step.items()}
        tally.add(ids, is_resident_LE)
    return tally


@given(STEPS)
def test_the_tally_counts_as_brute_force_does(steps: Steps) -> None:
    tally = tally_of(steps)
    hot = cold = hot_pairs = pairs = 0
    for step in steps:
        for layer, rows in step.items():
            ids_TK = np.array(rows)[:, :2]
            chosen = ids_TK.ravel().tolist()
            resident = PLACEMENT.resident[layer]
            hot += len(set(chosen) & resident)
            cold += len(set(chosen) - resident)
            hot_pairs += sum(expert in resident for expert in chosen)
            pairs += len(chosen)
    assert (tally.num_hot_reads, tally.num_reads) == (hot, hot + cold)
    assert tally.num_steps == len(steps)
    assert tally.hit_rate == pytest.approx(hot_pairs / pairs if pairs else 0.0)


@given(STEPS, st.integers(0, 8))
def test_no_placement_of_as_many_experts_meets_more_reads(steps: Steps, num_resident: int) -> None:
    """In hindsight; and what is found is at least what was reached."""
    tally = tally_of(steps)
    experts = [(layer, expert) for layer in range(2) for expert in range(4)]
    most = max(
        sum(int(tally.reads_PLE[:, layer, expert].sum()) for layer, expert in chosen)
        for chosen in itertools.combinations(experts, num_resident)
    )
    found = tally.best_hot_reads(num_resident)
    assert tally.num_hot_reads <= found <= max(most, tally.num_hot_reads)


def test_a_skew_is_found_and_luck_is_not() -> None:
    """Experts 0 and 1 in every step, and one of the others that no step shares with the next."""
    steps = [{0: np.array([[0, 1, 2 + n]])} for n in range(40)]
    tally, nowhere = Tally(1, 42), np.zeros((1, 42), dtype=bool)
    for step in steps:
        tally.add(step, nowhere)
    assert tally.best_hot_reads(2) == 80
    assert tally.best_hot_reads(22) == 80  # the 20 that even steps know do not come again
    assert tally.best_hot_reads(42) == 120


@given(STEPS, STEPS)
def test_tallies_add_up(first: Steps, second: Steps) -> None:
    total, expected = tally_of(first) + tally_of(second), tally_of(first + second)
    np.testing.assert_array_equal(total.counts_LE, expected.counts_LE)
    np.testing.assert_array_equal(total.reads_PLE.sum(0), expected.reads_PLE.sum(0))
    assert total.num_steps == expected.num_steps
    assert (total.num_hot, total.num_hot_reads) == (expected.num_hot, expected.num_hot_reads)


def test_entropy_is_the_mean_over_layers_with_experts() -> None:
    tally = Tally(3, 4)
    assert tally.entropy_bits == 0.0
    ids = {0: np.array([[0, 1], [2, 3]]), 2: np.array([[1], [1]])}
    tally.add(ids, np.zeros((3, 4), dtype=bool))
    assert tally.entropy_bits == pytest.approx((2.0 + 0.0) / 2)


# --- work ---


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.sets(st.integers(0, 2)))
def test_seen_tokens(start: int, count: int, window: int, layers: set[int]) -> None:
    config = replace(CONFIG, sliding_window=window, window_layers=frozenset(layers))
    expected = sum(
        min(position + 1, window) if layer in layers else position + 1
        for layer in range(3)
        for position in range(start, start + count)
    )
    assert seen_tokens(config, range(start, start + count)) == expected


def test_prompt_flops_by_hand() -> None:
    norms, qkv, out = 2 * 8, (8 + 2 * 4) * 8 + (8 + 2 * 4), 8 * 8
    shared_router, router = 8, 10 * 8
    moe_layer = norms + qkv + out + router + 3 * 8 * 6 + shared_router + 2 * (3 * 8 * 5)
    dense_layer = norms + qkv + out + 3 * 8 * 7
    per_token = 2 * moe_layer + dense_layer
    seen = 3 * (5 + 6 + 7)  # positions 4 to 6
    attention = 2 * 4 * 2 * seen  # query times key, and weight times value, of 4 heads of 2
    assert prompt_flops(CONFIG, 4, 7) == 2 * (3 * per_token + attention + 50 * 8)


# --- tables ---


def record(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "build_commit": "abc1234",
        "cpu_info": "Test CPU",
        "gpu_info": "",
        "model_type": "test bfloat16",
        "model_size": 3 << 30,
        "model_n_params": 1_610_000_000,
        "n_threads": 8,
        "type_k": "bfloat16",
        "type_v": "bfloat16",
        "n_parallel": 1,
        "n_prompt": 512,
        "n_gen": 0,
        "n_depth": 0,
        "median_ts": 1234.5678,
        "stddev_ts": 1.234,
        "samples_ns": [1, 2],
        "routing": "model",
        "n_gpu_experts": 0,
        "n_disk_experts": 0,
        "hit_rate": 0.0,
        "routing_entropy": 6.123,
        "cpu_gbps": None,
        "pcie_gbps": None,
        "gpu_gbps": None,
        "peak_vram_bytes": 0,
        "limit_ts": 5000.0,
        "ratio": 0.2469,
        "predicted_ts": None,
        "predicted_terms": None,
        "prediction_off": "",
        "peak_cpu_read_gbps": 100.04,
        "peak_joint_gbps": 120.0,
        "peak_pcie_gbps": 0.0,
        "peak_gpu_read_gbps": 0.0,
        "peak_gemm_tflops": 1.2345,
    }
    return fields | changes


def test_the_table_shows_what_applies() -> None:
    lines = markdown([record()]).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("model", "size", "params", "routing", "test", "t/s", "limit", "ratio", "entropy")
    ]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        *("test bfloat16", "3.0 GiB", "1.61 B", "model", "pp512", "1234.57 ± 1.23", "5000.00"),
        *("0.247", "6.12 bits"),
    ]
    assert len(set(map(len, lines[:3]))) == 1
    assert lines[4] == "limits from: CPU reads 100.0 GB/s, products 1.23 TFLOP/s"
    assert lines[5] == "build: abc1234; Test CPU, 8 threads"


def test_a_gpu_and_a_batch_bring_their_columns() -> None:
    gpu = {
        "gpu_info": "Test GPU",
        "n_gpu_experts": 99,
        "n_disk_experts": 7,
        "hit_rate": 0.25,
        "peak_vram_bytes": 1 << 34,
    }
    peaks = {"peak_pcie_gbps": 50.0, "peak_gpu_read_gbps": 3000.0, "peak_gemm_tflops": 612.0}
    shared = gpu | peaks
    decode = {"n_prompt": 0, "n_gen": 16, "n_depth": 64, "n_parallel": 4}
    decode |= {"cpu_gbps": 51.0, "pcie_gbps": 12.3, "gpu_gbps": 1234.5}
    lines = markdown([record(**shared), record(**shared, **decode)]).splitlines()
    for heading in (
        "batch",
        "GPU experts",
        "on disk",
        "hits",
        "CPU GB/s",
        "PCIe GB/s",
        "GPU GB/s",
        "VRAM",
    ):
        assert f" {heading} " in lines[0]
    assert "tg16 @ d64" in lines[3]
    assert "25.0%" in lines[3]
    assert " 51.00 |     12.30 | 1,234.50 |" in lines[3]
    assert "16.0 GiB" in lines[3]
    assert "PCIe alone 50.0, GPU reads 3,000, products 612 TFLOP/s" in lines[5]
    assert lines[6].endswith("Test CPU, 8 threads, Test GPU")


def test_csv_keeps_lists_and_leaves_empty_what_does_not_apply() -> None:
    head, row = as_csv([record()]).splitlines()
    cells = dict(zip(head.split(","), row.replace('"[1, 2]"', "lists").split(","), strict=True))
    assert cells["samples_ns"] == "lists"
    assert cells["cpu_gbps"] == ""


# --- predictions ---


def test_a_prediction_stands_beside_what_was_reached_and_what_is_wrong_below() -> None:
    head = markdown([record()]).splitlines()[0]
    assert "predicted" not in head
    lines = markdown([record(), record(predicted_ts=2345.6, prediction_off="pp512 is off")])
    head, _, first, second, _, off, *_ = lines.splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in (head, first, second)]
    at = cells[0].index("predicted")
    assert cells[0][at - 1 : at + 2] == ["t/s", "predicted", "limit"]
    assert [row[at] for row in cells[1:]] == ["", "2345.60"] and off == "pp512 is off"


STEP = Prediction(
    (
        Term("GPU dense", 2e-3, 2e-3),
        Term("cold experts, CPU", 10e-3, 10e-3),
        Term("cold experts, pulled", 0.0, 8e-3),
    )
)
PROMPT = Prediction((Term("cold experts, PCIe", 0.5, 0.5), Term("cold experts, CPU", 0.0, 0.3)))
OTHERS = "everything but the CPU's experts"
RATES = find_machine("h200-16core").rates  # PCIe brings 55.3 GB/s


def runs(case: Case, *seconds: float) -> Measurement:
    return Measurement(
        case=case,
        started="",
        samples_ns=[round(one * 1e9) for one in seconds],
        prompt=Tally(1, 1),
        decode=Tally(1, 1),
        peak_vram_bytes=0,
    )


@pytest.mark.parametrize(
    ("step_s", "cpu_s", "said"),
    [
        (22e-3, 20e-3, "the CPU's experts took 20 of a watched step's 22 ms, 10 foreseen"),
        (22e-3, 11e-3, f"{OTHERS} took 11 of a watched step's 22 ms, 2.85 foreseen"),
        (2.78, 0.02, f"{OTHERS} took 2,760 of a watched step's 2,780 ms, 2.85 foreseen"),
    ],
)
def test_the_worst_term_of_decoding_is_named(step_s: float, cpu_s: float, said: str) -> None:
    seen = {"step": Watched(num_steps=8, step_s=step_s, cpu_s=cpu_s, sent_bytes=0.0)}
    predicted = CasePrediction(prompt=NOTHING, step=STEP, num_steps=8)
    case = Case(n_prompt=0, n_gen=8, n_depth=0, n_parallel=2)
    times = step_s / STEP.seconds
    line = explain(runs(case, 8 * step_s), lambda rates: predicted, seen, RATES)
    assert line == f"tg8, batch 2, took {times:.2f} times as long as predicted: {said}"
    doubtful = explain(runs(case, 4 * step_s), lambda rates: predicted, seen, RATES)
    unknown = "which part is off cannot be told, as watching slowed the run 2.0 times"
    assert doubtful.endswith(f"predicted: {unknown}")


def test_a_slow_link_is_named() -> None:
    seen = {"prompt": Watched(num_steps=1, step_s=1.0, cpu_s=0.31, sent_bytes=0.5 * 55.3e9)}
    predicted = CasePrediction(prompt=PROMPT, step=NOTHING, num_steps=0)
    case = Case(n_prompt=512, n_gen=0, n_depth=0, n_parallel=1)
    said = "PCIe brought 27.6 GB/s, 55.3 when it was measured"
    line = explain(runs(case, 1.0), lambda rates: predicted, seen, RATES)
    assert line.endswith(f"2.00 times as long as predicted: {said}")


@pytest.mark.parametrize(
    ("measured_s", "sent_bytes", "said"),
    [
        (0.55, 0.0, "Python starts a kernel in 46 us, 25 when it was measured"),
        (0.55, 0.4 * 55.3e9, "Python starts a kernel in 46 us, 25 when it was measured"),
        (0.80, 0.4 * 55.3e9, "PCIe brought 27.6 GB/s, 55.3 when it was measured"),
        (0.80, 0.0, f"{OTHERS} took 800 of a watched step's 800 ms, 401 foreseen"),
    ],
)
def test_slow_python_is_named_where_it_explains_the_whole(
    measured_s: float, sent_bytes: float, said: str
) -> None:
    rates = replace(RATES, python_launch_s=25e-6)

    def predict(rates: MachineRates) -> CasePrediction:
        link_s, python_s = 0.4, 12_000 * rates.python_launch_s
        terms = (
            Term("cold experts, PCIe", link_s if sent_bytes else 0.0, link_s),
            Term("layers in Python", max(0.0, python_s - link_s), python_s),
            Term("GPU experts", 0.0 if sent_bytes else link_s, 0.1),
        )
        return CasePrediction(prompt=Prediction(terms), step=NOTHING, num_steps=0)

    case = Case(n_prompt=512, n_gen=0, n_depth=0, n_parallel=1)
    step = {"num_steps": 1, "step_s": measured_s, "cpu_s": 0.0, "sent_bytes": sent_bytes}
    seen = {"prompt": Watched(**step, launch_s=46e-6)}
    assert explain(runs(case, measured_s), predict, seen, rates).endswith(f"predicted: {said}")
    seen = {"prompt": Watched(**step)}
    assert "Python" not in explain(runs(case, measured_s), predict, seen, rates)


def test_a_quarter_is_what_is_borne() -> None:
    assert not is_off(1.24) and not is_off(0.76) and is_off(1.26) and is_off(0.74)
    case = Case(n_prompt=0, n_gen=8, n_depth=0, n_parallel=1)
    predicted = CasePrediction(prompt=NOTHING, step=STEP, num_steps=8)
    assert how_far_off(runs(case, 0.048, 0.192, 0.96), predicted) == pytest.approx(192 / 96)
    line = explain(runs(case, 0.048), lambda rates: predicted, {}, RATES)
    assert "took 0.50 times the time predicted: nothing was seen" in line
