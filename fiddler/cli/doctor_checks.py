"""What the facts of a machine mean: which path would run, and what should be mended."""

from fiddler.cli.doctor_facts import Facts
from fiddler.cli.doctor_problem import Problem
from fiddler.cli.doctor_speed import speed_problems
from fiddler.cli.errors import ISA_VARIABLE
from offload.units import counted

__all__ = ["Problem", "execution_path", "find_problems"]

REQUIRED = ("torch", "numba", "numpy", "safetensors", "tokenizers", "huggingface_hub")
LEAST_CAPABILITY = (8, 0)  # bfloat16 in the tensor cores
LEAST_FREE_BYTES = 20 << 30  # the smallest supported checkpoints are above 13 GB
# The first driver branch that runs programs built for a CUDA version.
DRIVERS = {11: "R450", 12: "R525", 13: "R580"}
NOTHING_RUNS = "fiddler does not run"
CPU_ALONE = "the GPU is not used: the CPU computes everything"


def execution_path(facts: Facts) -> str:
    """Which parts would compute what."""
    if any(problem.is_fatal for problem in find_problems(facts)):
        return "none: see the problems"
    num_cores = facts.num_workers or facts.physical_cores
    experts = f"Numba on {counted(num_cores, 'core') if num_cores else 'some cores'}"
    if facts.gpu is not None:
        return f"hybrid: {facts.gpu.name} (Triton), experts that do not fit there by {experts}"
    return f"CPU only: attention by torch, experts by {experts}"


def find_problems(facts: Facts) -> list[Problem]:
    """Everything to be mended, the worst first."""
    found = [
        *(*_packages(facts), *_gpu(facts), *_triton(facts), *_machine(facts)),
        *(*speed_problems(facts), *_failures(facts)),
    ]
    return sorted(found, key=lambda problem: not problem.is_fatal)


def _packages(facts: Facts) -> list[Problem]:
    missing = [name for name in REQUIRED if facts.packages[name] is None]
    return [
        Problem(f"{name} is not installed", f"pip install {name}", NOTHING_RUNS, is_fatal=True)
        for name in missing
    ]


def _gpu(facts: Facts) -> list[Problem]:
    if facts.gpu is not None:
        version = tuple(int(part) for part in facts.gpu.capability.split("."))
        if version >= LEAST_CAPABILITY:
            return []
        what = f"{facts.gpu.name} has compute capability {facts.gpu.capability}, 8.0 is needed"
        return [Problem(what, "use --device cpu", "its kernels do not compile")]
    if facts.driver_cuda is None or facts.packages["torch"] is None:
        return []  # a machine without a GPU is in order
    if facts.torch_cuda is None:
        what = "there is an NVIDIA driver, but this torch is built for the CPU only"
        todo = "pip install --force-reinstall torch (the default build has CUDA)"
        return [Problem(what, todo, CPU_ALONE)]
    if _major(facts.driver_cuda) < _major(facts.torch_cuda):
        what = f"the driver knows CUDA {facts.driver_cuda}, torch needs {facts.torch_cuda}"
        driver = DRIVERS.get(_major(facts.torch_cuda), "the newest one")
        return [Problem(what, f"install NVIDIA driver {driver} or newer", CPU_ALONE)]
    return [Problem("torch sees no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES", CPU_ALONE)]


def _triton(facts: Facts) -> list[Problem]:
    installed, wanted = facts.packages["triton"], facts.triton_wanted
    if wanted and installed != wanted:
        what = f"torch {facts.packages['torch']} wants triton {wanted}, {installed} is installed"
        return [Problem(what, f"pip install triton=={wanted}", "GPU kernels may fail or be slow")]
    if installed is None and facts.gpu is not None:
        what = "triton is not installed"
        return [Problem(what, "pip install triton", NOTHING_RUNS, is_fatal=True)]
    return []


def _machine(facts: Facts) -> list[Problem]:
    found = []
    if facts.isa_refusal is not None:
        todo = f"unset {ISA_VARIABLE}"
        found.append(Problem(facts.isa_refusal, todo, NOTHING_RUNS, is_fatal=True))
    if facts.cache_is_writable is False:
        todo = "set HF_HOME to a folder of yours"
        what = f"{facts.cache} cannot be written"
        found.append(Problem(what, todo, "models cannot be downloaded"))
    if facts.cache_free_bytes is not None and facts.cache_free_bytes < LEAST_FREE_BYTES:
        free = f"{facts.cache_free_bytes / 1e9:.1f} GB"
        what = f"the cache's disk has {free} free, less than a model takes"
        todo = "free some, or set HF_HOME to a larger disk; the built-in model needs none"
        found.append(Problem(what, todo, "models cannot be downloaded"))
    return found


def _failures(facts: Facts) -> list[Problem]:
    """Looks that failed for another reason than a missing package."""
    absent = [name for name, version in facts.packages.items() if version is None]
    return [
        Problem(
            f"could not look at {look}: {error}",
            "repair or reinstall the package named there",
            is_fatal=look in ("torch", "numba"),
        )
        for look, error in facts.failures.items()
        if look != "PCIe" and not any(f"'{name}'" in error for name in absent)
    ]


def _major(version: str) -> int:
    return int(version.partition(".")[0])
