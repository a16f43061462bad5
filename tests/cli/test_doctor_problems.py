"""``fiddler doctor``: what keeps machines that we do not have from running, and what to do."""

from dataclasses import replace

import pytest
from doctor_machines import CPU_ONLY, GIB, NARROW, WITH_GPU, without

from fiddler.cli.doctor_checks import execution_path, find_problems
from fiddler.cli.doctor_facts import Facts


@pytest.mark.parametrize("facts", [CPU_ONLY, WITH_GPU])
def test_a_good_machine_has_no_problems(facts: Facts) -> None:
    assert find_problems(facts) == []


def test_the_path_follows_the_gpu() -> None:
    assert execution_path(CPU_ONLY).startswith("CPU only")
    assert execution_path(WITH_GPU).startswith("hybrid: RTX 4090")
    assert execution_path(without(WITH_GPU, "torch")).startswith("none")
    assert execution_path(CPU_ONLY).endswith("on 8 cores")
    assert execution_path(replace(CPU_ONLY, num_workers=5)).endswith("on 5 cores")


OLD_DRIVER = replace(WITH_GPU, gpu=None, driver="550.1", driver_cuda="12.4")


@pytest.mark.parametrize(
    ("facts", "what", "todo"),
    [
        (without(CPU_ONLY, "torch"), "torch is not installed", "pip install torch"),
        (without(CPU_ONLY, "numba"), "numba is not installed", "pip install numba"),
        (OLD_DRIVER, "driver knows CUDA 12.4, torch needs 13.0", "R580 or newer"),
        (replace(WITH_GPU, gpu=None, torch_cuda=None), "for the CPU only", "reinstall torch"),
        (replace(WITH_GPU, gpu=None), "sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (
            replace(WITH_GPU, packages=WITH_GPU.packages | {"triton": "3.9.0"}),
            "wants triton 3.7.1, 3.9.0 is installed",
            "pip install triton==3.7.1",
        ),
        (
            replace(WITH_GPU, gpu=replace(WITH_GPU.gpu, capability="7.5")),
            "compute capability 7.5",
            "--device cpu",
        ),
        (replace(CPU_ONLY, has_avx2=False), "no AVX2", "GPU"),
        (replace(CPU_ONLY, isa_refusal="cannot run it"), "cannot run it", "unset FIDDLER_ISA"),
        (replace(CPU_ONLY, cache_is_writable=False), "/cache cannot be written", "HF_HOME"),
        (replace(CPU_ONLY, cache_free_bytes=GIB), "1.1 GB free", "HF_HOME"),
        (replace(CPU_ONLY, failures={"torch": "OSError: bad"}), "look at torch: OSError", "repair"),
    ],
)
def test_each_problem_says_what_to_do(facts: Facts, what: str, todo: str) -> None:
    (problem,) = find_problems(facts)
    assert what in problem.what
    assert todo in problem.todo


def test_every_problem_has_an_effect() -> None:
    worst = replace(
        without(WITH_GPU, "torch"),
        link=NARROW,
        isa_refusal="cannot",
        has_avx2=False,
        huge_pages="never",
        cache_is_writable=False,
        cache_free_bytes=GIB,
    )
    found = find_problems(worst)
    assert len(found) == 7
    assert all(problem.effect and problem.todo for problem in found)


def test_the_worst_comes_first() -> None:
    facts = replace(without(CPU_ONLY, "torch"), cache_is_writable=False, has_avx2=False)
    assert [problem.is_fatal for problem in find_problems(facts)] == [True, False, False]
