"""What makes a machine slower than it could be, by its facts. Figures are measured ones: see
docs/benchmarks.md, docs/LOG.md and the modules named beside them."""

from fiddler.cli.doctor_facts import Facts
from fiddler.cli.doctor_problem import Mend, Problem
from fiddler.cli.errors import ISA_VARIABLE
from offload.units import size_text

LANE_GBPS = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}  # after the line's code
LEAST_LINK_SHARE, GOOD_LINK_SHARE = 0.6, 0.85  # of what the lanes carry: good ones 0.85 to 0.9
# A hand-over on one H200 (offload/handoff_probe.py); Python's is a layer's start and wait.
WAY_S = {"kernel": 6e-6, "values": 6e-6, "hostfunc": 3e-5, "eager": 1e-4}
PINNED_GAIN = 5.0  # copies from pinned memory: 55 GB/s, not 11
PAGES_GAIN = 1.03
VRAM_SHARE, VRAM_LEAST = 0.1, 2 << 30  # in use by others: a desktop takes less
RAM_SHARE = 0.5


def speed_problems(facts: Facts) -> list[Problem]:
    """Everything that costs speed and no more."""
    return [
        *(*_handoff(facts), *_link(facts), *_vram(facts), *_ram(facts)),
        *(*_isa(facts), *_nodes(facts), *_pages(facts), *_caches(facts)),
        *_rates(facts),
    ]


def link_gbps(generation: int, width: int) -> float:
    """What a PCIe link carries in one direction; 0.0 of an unknown generation."""
    return LANE_GBPS.get(generation, 0.0) * width


def _handoff(facts: Facts) -> list[Problem]:
    if not facts.handoff_problems:
        return []
    from offload.handoff_probe import TIME_LIMIT  # brings torch in, which has been tried by now

    effect = "each layer of a decode step waits longer for the CPU: 30 us by host functions, not 6"
    return [
        Problem(
            f"the hand-off by {way} does not work: {why}",
            "update the NVIDIA driver",
            effect,
            mend=_faster_way(facts.handoff, way),
        )
        for way, why in facts.handoff_problems.items()
        if why != TIME_LIMIT  # which no update lifts
    ]


def _faster_way(now: str | None, mended: str) -> Mend | None:
    """None where the way that is taken is as fast."""
    saved_s = WAY_S.get(now or "", 0.0) - WAY_S[mended]
    return Mend(hand_over_s=saved_s) if saved_s > 0 else None


def _link(facts: Facts) -> list[Problem]:
    """A link of fewer lanes or an older generation than it could have, or slower than it is."""
    if "PCIe" in facts.failures and facts.gpu is not None:
        limit = "no limit" if facts.memlock_bytes is None else size_text(facts.memlock_bytes)
        return [
            Problem(
                f"host memory cannot be pinned: {facts.failures['PCIe']} (memlock: {limit})",
                "ulimit -l unlimited; in a container --ulimit memlock=-1",
                "copies to the GPU are five times as slow (11 GB/s instead of 55), and models load "
                "only if the GPU holds them whole or their input embedding is their head",
                mend=Mend(link=PINNED_GAIN),
            )
        ]
    link = facts.link
    if link is None or not (link.generation and link.width):
        return []
    now = link_gbps(link.generation, link.width)
    most = link_gbps(link.max_generation or 0, link.max_width or 0)
    if now < 0.99 * most:
        what = (
            f"PCIe runs at generation {link.generation} x{link.width} under load, "
            f"generation {link.max_generation} x{link.max_width} is possible"
        )
        effect = f"prompts and pulled rows get at most {now:.0f} GB/s instead of {most:.0f}"
        todo = "put the card into a x16 slot of the CPU; check the BIOS"
        return [Problem(what, todo, effect, mend=Mend(link=most / now))]
    if link.copy_gbps < LEAST_LINK_SHARE * now:
        what = f"copies to the GPU reach {link.copy_gbps:.1f} of PCIe's {now:.0f} GB/s"
        todo = "stop other programs that copy; in a virtual machine, ask for its own root port"
        effect = "prompts are slower in proportion, decoding a little"
        gain = GOOD_LINK_SHARE * now / link.copy_gbps
        return [Problem(what, todo, effect, mend=Mend(link=gain))]
    return []


def _vram(facts: Facts) -> list[Problem]:
    gpu = facts.gpu
    if gpu is None:
        return []
    used = gpu.vram_total_bytes - gpu.vram_free_bytes
    if used < max(VRAM_LEAST, VRAM_SHARE * gpu.vram_total_bytes):
        return []
    what = f"{size_text(used)} of {size_text(gpu.vram_total_bytes)} of VRAM are in use by others"
    todo = "end them (nvidia-smi lists them), or choose another GPU by CUDA_VISIBLE_DEVICES"
    effect = "fewer experts fit on the GPU, and the CPU computes more"
    return [Problem(what, todo, effect, mend=Mend(vram_bytes=used))]


def _ram(facts: Facts) -> list[Problem]:
    total, free = facts.ram_total_bytes, facts.ram_available_bytes
    if total is None or free is None or free >= RAM_SHARE * total:
        return []
    what = f"{size_text(free)} of {size_text(total)} of RAM are free"
    effect = "experts that RAM does not hold are read from disk whenever a step needs them"
    return [Problem(what, "close other programs", effect, mend=Mend(ram_bytes=total - free))]


def _isa(facts: Facts) -> list[Problem]:
    if facts.is_lesser_isa:
        what = f"{ISA_VARIABLE}={facts.forced_isa} keeps kernels from what this CPU has"
        effect = (
            "experts on the CPU are slower, in prompts most: fiddler calibrate with and without it "
            "tells by how much"
        )
        todo = f"unset {ISA_VARIABLE}"
        return [Problem(what, todo, effect, mend=Mend(all_instructions=True))]
    if facts.has_avx2 is not False:
        return []
    return [Problem("the CPU has no AVX2", "give the GPU more", "its experts are slow")]


def _nodes(facts: Facts) -> list[Problem]:
    found = []
    if facts.memory_nodes and facts.allowed_nodes and facts.allowed_nodes < facts.memory_nodes:
        what = f"only {facts.allowed_nodes} of {facts.memory_nodes} memory nodes may be used"
        effect = "cold experts are read at the speed of those nodes' channels alone"
        todo = "start without numactl --membind; in a container set --cpuset-mems to all nodes"
        gain = facts.memory_nodes / facts.allowed_nodes
        found.append(Problem(what, todo, effect, mend=Mend(memory=gain)))
    if facts.gpu_node is not None and facts.cpu_nodes and facts.gpu_node not in facts.cpu_nodes:
        nodes = ", ".join(map(str, facts.cpu_nodes))
        what = f"the GPU is at NUMA node {facts.gpu_node}, the CPUs in use are at {nodes}"
        effect = "hand-offs and copies cross the link between sockets"
        todo = f"use CPUs of that node too: numactl --cpunodebind={facts.gpu_node} or none at all"
        found.append(Problem(what, todo, effect))
    return found


def _pages(facts: Facts) -> list[Problem]:
    if facts.huge_pages != "never":
        return []
    effect = "experts are read 3 % slower, and loading fills memory at half the speed"
    todo = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    what = "huge pages are switched off"
    return [Problem(what, todo, effect, mend=Mend(memory=PAGES_GAIN))]


def _caches(facts: Facts) -> list[Problem]:
    return [
        Problem(
            f"the cache of {name}, {cache.folder}, cannot be written",
            f"set {cache.variable} to a folder of yours",
            "every start makes them anew, which takes seconds",
        )
        for name, cache in facts.caches.items()
        if not cache.is_writable
    ]


def _rates(facts: Facts) -> list[Problem]:
    """Measurements that are kept but cannot be used, and those that a plan lacks."""
    todo = "fiddler calibrate, which measures for about a minute"
    found = [
        Problem(what, f"{todo} and replaces it", "it is measured anew, or done without")
        for what in facts.damaged
    ]
    if facts.why_not_own is None:
        return found
    what = f"speeds are not predicted by rates of this machine: {facts.why_not_own}"
    effect = f"plans are made by the rates of {facts.rates_of}, and may suit this machine less"
    return [*found, Problem(what, todo, effect)]
