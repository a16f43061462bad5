"""What a calibration measures, with made-up measurements; and a real one, which takes a while."""

import errno
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.precompile import precompile
from cpu_kernels.thread_count import measured_num_threads
from cpu_kernels.times import TimeTable
from offload.calibration import Calibration
from offload.hardware import Hardware, probe
from offload.limits import Peaks
from offload.machine_facts import Machine
from offload.machine_rates import (
    RATES,
    ExpertTimes,
    MachineRates,
    SharedRates,
    from_json,
    to_json,
)
from offload.measuring import (
    KERNELS,
    Setting,
    Step,
    disk_gbps,
    kernels_to_compile,
    machine_steps,
    measure_rates,
    why_no_disk,
)
from offload.share_rates import KERNELS as SHARED

PEAKS = Peaks(
    cpu_read_gbps=100.0, joint_gbps=150.0, pcie_gbps=50.0, gpu_read_gbps=3000.0, gemm_tflops=700.0
)
ONLY_CPU = replace(PEAKS, joint_gbps=100.0, pcie_gbps=0.0, gpu_read_gbps=0.0)


def times(kernel: str, expert_bytes: int, first_s: float) -> ExpertTimes:
    table = TimeTable(
        kernel=kernel,
        hidden=8,
        width=4,
        tokens=(1, 8, 64),
        rows_s=(first_s, 2 * first_s, 16 * first_s),
        columns_s=(3 * first_s, 3 * first_s, 4 * first_s) if kernel == "bf16/bf16" else None,
    )
    return ExpertTimes(expert_bytes=expert_bytes, table=table)


TIMES = (
    *(times("bf16/f32", 10_000, 1e-3), times("bf16/f32", 100_000, 8e-3)),
    *(times("bf16/bf16", 10_000, 1e-3), times("w8g128/f32", 5_000, 7e-4)),
    *(times("w4g128/f32", 2_500, 5e-4), times("w4g128/int8", 2_500, 3e-4)),
    times("w8g128/int8", 5_000, 5e-4),
)
RATES_HERE = MachineRates(
    num_threads=4,
    peaks=PEAKS,
    times=TIMES,
    call_s=1e-6,
    cpu_tflops=0.5,
    launch_s=2e-6,
    python_launch_s=3e-5,
    pull_gbps=45.0,
    beside_cpu_gbps=80.0,
    beside_pull_gbps=40.0,
    hand_over_s=2e-5,
    disk_gbps=1.5,
    shared=(SharedRates(kernel="bf16/f32", expert_bytes=10_000, cpu_gbps=80.0, link_gbps=30.0),),
)


def setting(tmp_path: Path, *, has_gpu: bool) -> Setting:
    hardware = Hardware(
        has_gpu=has_gpu,
        gpu_name="GPU" if has_gpu else "",
        vram_total_bytes=1,
        vram_free_bytes=1,
        cuda_context_bytes=0,
        ram_total_bytes=1,
        ram_available_bytes=1,
        physical_cores=1,
        cpu_name="CPU",
    )
    return Setting(hardware=hardware, num_threads=3, dtype="float32", folder=tmp_path)


def fake_steps() -> list[Step]:
    return [
        Step("peaks", lambda s: {"peaks": PEAKS if s.hardware.has_gpu else ONLY_CPU}),
        Step("experts", lambda s: {"times": TIMES, "call_s": 1e-6, "cpu_tflops": 0.5}),
        Step("pulls", lambda s: {"pull_gbps": 45.0}, on_gpu=True),
        Step("starts", lambda s: {"launch_s": 1e-6, "python_launch_s": 2e-5}, on_gpu=True),
    ]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_steps_are_taken_in_order_and_those_of_a_gpu_only_there(
    tmp_path: Path, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr("offload.measuring._give_back_vram", lambda: None)
    rates = measure_rates(
        setting(tmp_path, has_gpu=has_gpu), fake_steps(), lambda *step: told.append(step)
    )
    names = ["peaks", "experts", "pulls", "starts"][: 4 if has_gpu else 2]
    assert told == [(name, n, len(names)) for n, name in enumerate(names, start=1)]
    assert rates.num_threads == 3 and rates.has_gpu is has_gpu
    assert rates.pull_gbps == (45.0 if has_gpu else 0.0)


def test_rates_come_back_from_a_file_bit_for_bit(tmp_path: Path) -> None:
    known = Calibration(tmp_path / "calibration.json", Machine({}, {}))
    known.store(RATES, {}, RATES_HERE)
    assert known.known(RATES, {}) == RATES_HERE


@pytest.mark.parametrize(
    "damage",
    [
        {"peaks": {}},
        {"peaks": None},
        {"times": [{}]},
        {"times": 3},
        {"call_s": -1.0},
        {"call_s": float("nan")},
        {"call_s": "fast"},
        {"pull_gbps": 0.0},
        {"more": 1},
        {"shared": [{}]},
        {"shared": [{**asdict(RATES_HERE.shared[0]), "link_gbps": -1.0}]},
    ],
)
def test_what_are_no_rates_is_refused(damage: dict[str, Any]) -> None:
    record = json.loads(json.dumps(to_json(RATES_HERE)))
    assert from_json(record) == RATES_HERE
    with pytest.raises(ValueError, match=r"rates|times|GPU|products"):
        from_json(record | damage)


@given(st.integers(1, 500_000), st.integers(1, 500_000), st.integers(1, 200))
def test_larger_experts_take_longer(a: int, b: int, tokens: int) -> None:
    small, large = sorted((a, b))
    slow, fast = (
        RATES_HERE.expert_s("bf16", "f32", size)(tokens, False) for size in (large, small)
    )
    assert 0 < fast <= slow * (1 + 1e-12)


def test_other_kinds_are_taken_for_measured_ones_by_their_bytes() -> None:
    w4 = RATES_HERE.expert_s("int4", "f32", 5_000)
    assert w4(1, False) == pytest.approx(1e-3)
    f32 = RATES_HERE.expert_s("f32", "f32", 20_000)
    assert f32(1, False) == RATES_HERE.expert_s("bf16", "f32", 20_000)(1, False)
    with pytest.raises(ValueError, match="no kernel for int8"):
        replace(RATES_HERE, times=TIMES[:3]).expert_s("int8", "f32", 5_000)
    assert RATES_HERE.switch_over("bf16", "bf16", 9_000) is not None
    assert RATES_HERE.switch_over("bf16", "f32", 9_000) is None


def test_lossless_experts_are_taken_for_bf16_where_they_were_not_measured() -> None:
    """By their bytes with few tokens, by their number of weights with many."""
    bf16 = RATES_HERE.expert_s("bf16", "f32", 20_000)
    bf12 = RATES_HERE.expert_s("bf12", "f32", 15_000)
    assert bf12(1, False) == RATES_HERE.expert_s("bf16", "f32", 15_000)(1, False) < bf16(1, False)
    assert bf12(64, False) == bf16(64, False)
    own = tuple(
        replace(one, table=replace(one.table, kernel="bf12/f32", rows_s=tuple(r / 4 for r in rows)))
        for one in TIMES
        if one.table.kernel == "bf16/f32"
        for rows in [one.table.rows_s]
    )
    measured = replace(RATES_HERE, times=TIMES + own).expert_s("bf12", "f32", 20_000)
    assert measured(64, False) == pytest.approx(bf16(64, False) / 4)


def test_workers_are_slower_beside_a_gpu_where_memory_bounds_them() -> None:
    assert RATES_HERE.beside_s(1e-3, 100_000_000) == pytest.approx(100 / 80e3)
    assert RATES_HERE.beside_s(2e-3, 100_000_000) == 2e-3
    assert replace(RATES_HERE, beside_cpu_gbps=0.0).beside_s(1e-3, 100_000_000) == 1e-3


def test_a_disk_without_room_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.measuring.DISK_BYTES", 16 << 20)
    assert disk_gbps(tmp_path / "new") > 0
    (tmp_path / "file").write_text("")
    assert disk_gbps(tmp_path / "file" / "folder") == 0.0


def test_no_room_and_no_leave_to_write_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    said = f"not measured, {tmp_path / 'file' / 'folder'} cannot be written: Not a directory"
    assert why_no_disk(tmp_path / "file" / "folder") == said
    assert why_no_disk(tmp_path) == "no room to measure it"

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert why_no_disk(tmp_path) == "no room to measure it"


@pytest.mark.slow
def test_this_machine_is_calibrated_within_a_minute(tmp_path: Path) -> None:
    hardware = probe("cpu")
    started = time.perf_counter()
    precompile(kernels_to_compile())
    real = Setting(
        hardware=hardware,
        num_threads=measured_num_threads(),
        dtype="float32",
        folder=tmp_path,
    )
    rates = measure_rates(real, machine_steps(), lambda *step: None)
    assert time.perf_counter() - started < 60
    assert from_json(json.loads(json.dumps(to_json(rates)))) == rates
    kernels = {one.table.kernel for one in rates.times}
    assert kernels == {"/".join(kernel) for kernel in KERNELS}


@pytest.mark.gpu
@pytest.mark.alone
def test_what_decode_layers_run_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from offload.compile_ahead import compile_ahead
    from offload.gpu_rates import hand_over_s
    from offload.share_rates import share_rates

    compiled: list[str] = []
    compile_one = JITFunction._do_compile

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        compiled.append(self.__name__)
        return compile_one(self, *args, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", counting)
    free_bytes = probe().ram_available_bytes
    compile_ahead(free_bytes)
    ahead = compiled.copy()
    hand_over_s(measured_num_threads())
    share_rates(measured_num_threads(), free_bytes)
    assert ahead and compiled == ahead


@pytest.mark.gpu
@pytest.mark.alone
def test_a_gpu_is_calibrated_within_a_minute(tmp_path: Path) -> None:
    assert torch.cuda.is_available()
    told: list[tuple[str, float]] = []
    started = time.perf_counter()

    def on_step(title: str, number: int, of: int) -> None:
        told.append((title, time.perf_counter() - started))

    precompile(kernels_to_compile())
    real = Setting(
        hardware=probe(), num_threads=measured_num_threads(), dtype="bfloat16", folder=tmp_path
    )
    rates = measure_rates(real, machine_steps(), on_step)
    facts = f"{told}\n{replace(rates, times=())}"
    print(facts)
    assert time.perf_counter() - started < 90, facts  # Triton's first compilation included
    assert rates.has_gpu and rates.pull_gbps > 5 and rates.beside_pull_gbps > 1, facts
    assert rates.beside_cpu_gbps < 1.2 * rates.peaks.cpu_read_gbps, facts
    assert 5e-7 < rates.launch_s < 2e-5, facts
    assert 5e-6 < rates.python_launch_s < 2e-4, facts
    assert 2e-6 < rates.hand_over_s < 2e-4, facts
    assert {one.kernel for one in rates.shared} == {"/".join(kernel) for kernel in SHARED}
    for one in rates.shared:
        assert 5 < one.cpu_gbps + one.link_gbps < 1.2 * rates.peaks.joint_gbps, facts
        assert one.cpu_gbps < 1.2 * rates.peaks.cpu_read_gbps, facts
        assert one.link_gbps < 1.2 * rates.pull_gbps, facts
