"""``fiddler doctor``: what its table shows, within the columns of a terminal."""

import sys
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner
from doctor_machines import CPU_ONLY, WITH_GPU
from hypothesis import given
from hypothesis import strategies as st
from terminal import terminal

from fiddler.cli import cli
from fiddler.cli.doctor import facts_rows
from fiddler.cli.doctor_facts import Facts
from fiddler.cli.doctor_memory import Cache
from fiddler.wrapping import wrapped


def test_the_table_shows_pages_nodes_and_caches() -> None:
    full = replace(
        WITH_GPU,
        numa_nodes=2,
        gpu_node=1,
        huge_pages="madvise",
        memlock_bytes=64 << 10,
        caches={"CPU kernels": Cache("/c", 5 << 20, is_writable=True, variable="V")},
    )
    rows = facts_rows(full)
    assert rows["NUMA"] == "2 nodes, the GPU at node 1"
    assert rows["pages"] == "huge ones: madvise; 64.0 KiB may be locked"
    assert rows["caches"] == "CPU kernels 5.0 MiB in /c"


def test_the_table_leaves_out_what_is_unknown() -> None:
    bare = Facts(fiddler="0.1", python="3.11", system="Linux", packages=CPU_ONLY.packages)
    assert set(facts_rows(bare)) == {"fiddler", "packages", "CUDA", "GPU"}
    rows = facts_rows(WITH_GPU)
    assert rows["KV cache"] == "bfloat16, fp8, int8, int4"
    assert WITH_GPU.gpu is not None
    old = replace(WITH_GPU, gpu=replace(WITH_GPU.gpu, capability="8.6"))
    assert facts_rows(old)["KV cache"] == "bfloat16, int8, int4"
    assert rows["GPU"] == ("RTX 4090, 22.5 GiB of 24.0 GiB free, capability 8.9")
    assert rows["PCIe"] == "generation 4 x16 under load, at most 4 x16, copies at 26.5 GB/s"
    assert rows["CUDA"] == "driver 580.65 (up to CUDA 13.0), torch built for 13.0"
    forced = facts_rows(replace(CPU_ONLY, isa="kernels: avx2", forced_isa="avx2", num_workers=5))
    assert forced["ISA"] == "kernels: avx2, forced by FIDDLER_ISA"
    assert forced["workers"] == "5 (measured)"


texts = st.lists(st.text("abc-/.,", min_size=1, max_size=12), min_size=1).map(" ".join)


@given(label=st.text("xy: ", min_size=1, max_size=9), text=texts, width=st.integers(10, 80))
def test_lines_break_between_words(label: str, text: str, width: int) -> None:
    first, *others = wrapped(label, text, width)
    lines = [first.removeprefix(label), *(line.removeprefix(" " * len(label)) for line in others)]
    assert " ".join(lines) == text
    for line in lines:
        assert len(label) + len(line) <= width or " " not in line


def test_doctor_prints_a_table() -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    assert "RAM  " in result.stdout
    assert "path  " in result.stdout


def test_doctor_keeps_to_the_columns_of_a_terminal(tmp_path: Path) -> None:
    """But for paths, which are words however long they are."""
    with terminal([sys.executable, "-m", "fiddler", "doctor"], tmp_path, COLUMNS="50") as doctor:
        doctor.exit_code()
        lines = doctor.transcript.splitlines()
    assert any(line.startswith("packages ") for line in lines)
    for line in lines:
        assert len(line) <= 50 or len(line.split()) <= 2, line
