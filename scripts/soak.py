"""Random requests for as long as you like, each compared with the same request run alone.

    python -m scripts.soak [--seconds 60] [--seed 0] [--device auto]

The built-in model, its weights as float32, runs with little room: requests queue, share prefixes,
bring several samples, are preempted, end early or are cancelled. On a GPU experts change places as
soon as their use differs at all, and some are pulled; without one most of them are on disk. Each
request is then run by itself in a second model, which has everything in place and no prefix cache.
The exit code is 1 if more tokens differ than rounding explains, or if memory grows.
"""

import argparse
import functools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from fiddler import LLM, SamplingParams
from fiddler.config import EngineConfig
from fiddler.models.registry import load_config
from fiddler.planning import plan_model
from fiddler.stream import TokenStream
from offload.adaptive import choose_swaps
from offload.adaptive_placement import AdaptivePlacement
from offload.cold_share import ShareCosts
from offload.expert_store import ExpertStore
from offload.hardware import probe

BUILTIN = Path(__file__).parents[1] / "fiddler" / "assets" / "builtin"
CONTEXT = 384
# One thread: the matrices are tiny, and more only wait for each other.
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": CONTEXT, "cpu_threads": 1}
MOST_STREAMS = 9
TIGHT = {"max_num_seqs": 5, "max_batched_tokens": 128}
# Sums that are added in another order decide a draw differently where two tokens are as good as
# equally likely: about one in a million.
TOKENS_PER_DIFFERENCE = 50_000
WARM_UP_REQUESTS = 40  # until buckets are captured and buffers have grown
MOST_GROWTH = 48 << 20  # bytes of the host's memory, after that: the heap is not exact
HALF = ShareCosts(cpu_bytes_per_s=1e9, link_bytes_per_s=1.1e9, cpu_start_s=0.0, link_start_s=0.0)


@dataclass(slots=True)
class Running:
    """One request under way, and the tokens of its samples so far."""

    prompt: list[int]
    params: SamplingParams
    stream: TokenStream
    tokens: list[list[int]] = field(default_factory=list)


class Soak:
    """Keeps ``llm`` busy with random requests; ``solo`` says what they should have given."""

    def __init__(self, llm: LLM, solo: LLM, seed: int) -> None:
        self._llm, self._solo, self._rng = llm, solo, random.Random(seed)
        self._prompts: list[list[int]] = [[1, 2, 3]]
        self._running: list[Running] = []
        self.num_requests = self.num_cancelled = self.num_tokens = 0
        self.differences: list[str] = []
        self.memory: list[tuple[int, int]] = []  # of host and device, after each request

    def act(self) -> None:
        """Start a request, advance one, or give one up."""
        rng = self._rng
        if not self._running or (len(self._running) < MOST_STREAMS and rng.random() < 0.2):
            self._start()
            return
        one = rng.choice(self._running)
        if rng.random() < 0.01:
            one.stream.close()
            self.num_cancelled += 1
            self._finish(one)
            return
        for event in (next(one.stream, None) for _ in range(rng.randint(1, 12))):
            if event is None:
                self._finish(one)
                return
            if event.token_id is not None:
                one.tokens[event.index].append(event.token_id)

    def end(self) -> None:
        """Run what is under way to its end."""
        while self._running:
            one = self._running[0]
            for event in one.stream:
                if event.token_id is not None:
                    one.tokens[event.index].append(event.token_id)
            self._finish(one)

    def _start(self) -> None:
        rng, vocab = self._rng, self._llm.model_config.vocab_size
        length = min(CONTEXT - 70, int(rng.lognormvariate(3.0, 1.2)) + 1)
        prompt = [rng.randrange(3, vocab) for _ in range(length)]
        if rng.random() < 0.5:  # go on where an earlier one was, or depart within it
            earlier = rng.choice(self._prompts)
            prompt = (earlier[: rng.randint(1, len(earlier))] + prompt)[: CONTEXT - 70]
        self._prompts = [*self._prompts[-20:], prompt]
        params = self._params()
        stream = self._llm.stream(prompt, params)
        self._running.append(Running(prompt, params, stream, [[] for _ in range(params.n)]))

    def _params(self) -> SamplingParams:
        rng = self._rng
        length: dict[str, Any] = {
            "max_tokens": rng.randint(1, 60),
            "ignore_eos": rng.random() < 0.8,
        }
        if rng.random() < 0.4:
            return SamplingParams(temperature=0, **length)
        return SamplingParams(
            temperature=rng.uniform(0.5, 1.5),
            seed=rng.randrange(1 << 30),
            top_k=rng.choice([0, 0, 5, 40]),
            top_p=rng.choice([1.0, 0.95, 0.7]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            n=rng.choice([1, 1, 2, 3]),
            **length,
        )

    def _finish(self, one: Running) -> None:
        self._running.remove(one)
        self.num_requests += 1
        alone = self._solo.generate(one.prompt, one.params)
        for sample, found in zip(alone.outputs, one.tokens, strict=True):
            wanted = sample.token_ids[: len(found)]
            self.num_tokens += len(found)
            if found != wanted:
                pairs = zip(found, wanted, strict=False)
                at = next((n for n, (a, b) in enumerate(pairs) if a != b), len(wanted))
                self.differences.append(f"request {self.num_requests}, token {at}: {one.params}")
        self.memory.append((_host_bytes(), _device_bytes()))

    @property
    def growth(self) -> tuple[int, int]:
        """Bytes by which memory has grown since it was warm, on the host and on the device."""
        later = self.memory[WARM_UP_REQUESTS:]
        if not later:
            return 0, 0
        return later[-1][0] - later[0][0], later[-1][1] - later[0][1]

    def verdict(self) -> str:
        """What went wrong, or nothing."""
        allowed = 1 + self.num_tokens // TOKENS_PER_DIFFERENCE
        if len(self.differences) > allowed:
            return f"{len(self.differences)} samples differ: " + "; ".join(self.differences[:5])
        host, device = self.growth
        if host > MOST_GROWTH or device > MOST_GROWTH:
            return f"memory has grown by {host >> 20} MiB on the host, {device >> 20} on the device"
        return ""


class RestlessPlacement(AdaptivePlacement):
    """Moves an expert at every chance."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        choose = functools.partial(choose_swaps, margin=1e-6)
        super().__init__(store, device, choose=choose, copy_share=1e9)


@contextmanager
def opened(folder: Path, device: str, seed: int) -> Iterator[Soak]:
    """A soak of the model in ``folder``, whose weights are float32."""
    with ExitStack() as stack:
        solo = stack.enter_context(LLM(folder, device="cpu", prefix_caching=False, **SETTINGS))
        tight: dict[str, Any] = {"device": device, **SETTINGS, **TIGHT}
        if probe(device).has_gpu:
            place = "offload.adaptive_placement.AdaptivePlacement"
            stack.enter_context(mock.patch(place, RestlessPlacement))
            shares = mock.patch("fiddler.loading.weights.cold_share", lambda _: HALF)
            stack.enter_context(shares)
            placement = solo.plan.placement.of(
                range(solo.model_config.num_experts // 2) for _ in solo.plan.placement.resident
            )
            tight |= {"placement": placement, "placement_policy": "adaptive", "vram_gb": 4}
            tight["cpu_threads"] = None
        else:
            tight["ram_gb"] = _least_ram_gb(folder, tight)
        yield Soak(stack.enter_context(LLM(folder, **tight)), solo, seed)


def float32_copy(source: Path, folder: Path) -> Path:
    """Decode graphs want experts of the type that is computed with."""
    shutil.copytree(source, folder)
    tensors = {name: t.float() for name, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float32"}))
    return folder


def _least_ram_gb(folder: Path, settings: dict[str, Any]) -> float:
    """That holds a layer's experts at a time, beside everything else, on the CPU."""
    asked = EngineConfig(model=str(folder), **settings)
    config = load_config(folder)
    plan, _ = plan_model(asked, config, probe("cpu"), name="soak", folder=folder)
    memory = plan.memory
    expert_bytes = memory.cpu_experts // (config.num_experts * config.num_layers)
    kv = memory.kv // plan.num_pages * (CONTEXT // plan.page_size)
    needed = memory.dense + memory.workspace + kv + config.num_experts * expert_bytes
    return (needed + 100) / 2**30


def _host_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _device_bytes() -> int:
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        opened(float32_copy(BUILTIN, Path(folder) / "model"), options.device, options.seed) as soak,
    ):
        ends = time.monotonic() + options.seconds
        while time.monotonic() < ends:
            soak.act()
        soak.end()
        verdict = soak.verdict()
    print(
        f"{soak.num_requests} requests ({soak.num_cancelled} cancelled), {soak.num_tokens} tokens, "
        f"{len(soak.differences)} samples differ; memory grew by "
        f"{soak.growth[0] / 2**20:.1f} MiB on the host, {soak.growth[1] / 2**20:.1f} on the device"
    )
    for line in soak.differences[:10]:
        print(line)
    print(verdict or "all is well")
    return 1 if verdict else 0


if __name__ == "__main__":
    sys.exit(main())
