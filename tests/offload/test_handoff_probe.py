"""Which hand-off is chosen, and on a GPU that the ways which the probe names do work."""

import pytest
import torch

from fiddler.errors import ConfigError
from offload.cuda_driver import HostCallback, cuda_driver
from offload.handoff_probe import Probe, choose_way, probe

ALL = Probe(("kernel", "values", "hostfunc", "eager"), {})
REFUSED = "cuStreamWaitValue32_v2 failed: operation not supported (CUDA error 801)"
OLD = Probe(("hostfunc", "eager"), {"kernel": "kernels may not take long", "values": REFUSED})


def test_the_fastest_that_works_unless_forced() -> None:
    assert choose_way(ALL, None) == "kernel" and choose_way(OLD, None) == "hostfunc"
    assert choose_way(ALL, "hostfunc") == "hostfunc" and choose_way(ALL, "eager") == "eager"


def test_what_cannot_be_forced_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"FIDDLER_HANDOFF=values .* error 801"):
        choose_way(OLD, "values")
    with pytest.raises(
        ConfigError, match="must be one of kernel, values, hostfunc, eager, not 'magic'"
    ):
        choose_way(ALL, "magic")


@pytest.mark.gpu
def test_this_machine() -> None:
    found = probe()
    print(f"hand-off: {found}")
    assert "hostfunc" in found.works, found.problems
    assert "values" in found.works, found.problems
    assert ("kernel" in found.works) != cuda_driver().limits_kernels(0), found.problems


@pytest.mark.gpu
def test_all_operations_can_be_captured_and_replayed() -> None:
    driver = cuda_driver()
    words = torch.zeros(64, dtype=torch.int32, pin_memory=True)
    address = driver.device_address(words.data_ptr())
    calls: list[int] = []
    callback = HostCallback(calls.append)
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        stream = int(torch.cuda.current_stream().cuda_stream)
        driver.write_word(stream, address, 3)
        driver.wait_word(stream, address, 3)
        x += 1
        driver.call_host(stream, callback, 11)
    for _ in range(3):
        words.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert words[0] == 3
    assert x.item() == 3 and calls == [11] * 3
