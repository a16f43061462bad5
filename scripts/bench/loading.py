"""How fast a model folder is loaded, beside plain reads of the same files by as many threads.

    python -m scripts.bench.loading FOLDER [--vram-gb X] [--threads N] [--rounds 3] [--json FILE]
    python -m scripts.bench.loading FOLDER --make olmoe-1b-7b [--layers 5] [--scheme w4g128]

The first form reads files and loads models in turn, first with nothing of the files in memory (as
far as the system lets go of them), then with all of it. Plain reads are by position, into a small
buffer that each thread has; the same past the page cache; and, as a loader has to, into new memory,
which the system zeroes first. A load is a process of its own; its rate is that of the experts. The
second form writes a folder of seeded weights first, with --scheme one of packed experts.
"""

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

STEP = 4 << 20  # of plain reads into a buffer
SHARD_BYTES = 3 << 29
BUILTIN = Path(__file__).parents[2] / "fiddler" / "assets" / "builtin"
GIGA = 1e9

LOAD = """
import json, sys, time
began = time.perf_counter()
from fiddler import LLM
seen = []
def note(what, done, total):
    if what == "experts":
        seen.append((time.perf_counter(), done, total))
with LLM(**json.loads(sys.argv[1]), on_progress=note) as llm:
    ready = time.perf_counter()
    took = seen[-1][0] - seen[0][0]
    print(json.dumps({"experts_gbps": seen[-1][2] / took / 1e9, "ready_s": ready - began}))
"""


def main() -> None:
    options = _options()
    if options.make:
        make(options.folder, options.make, options.layers, options.scheme)
    files = sorted(options.folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files, {size / GIGA:.1f} GB, {options.threads} threads")
    record = {"bytes": size, "threads": options.threads, "vram_gb": options.vram_gb}
    for state in ("cold", "warm"):
        rounds = [_round(options, files, state) for _ in range(options.rounds)]
        record[state] = best = {key: _best(key, rounds) for key in rounds[0]}
        fastest = max(best["buffer"], best["direct"])
        print(f"{state}: " + ", ".join(f"{key} {value:.2f}" for key, value in best.items()))
        print(
            f"{state}: loading is {best['experts_gbps'] / fastest:.2f} of the fastest plain read, "
            f"{best['experts_gbps'] / best['new memory']:.2f} of one into new memory"
        )
    if options.json:
        options.json.write_text(json.dumps(record))


def _round(options: argparse.Namespace, files: list[Path], state: str) -> dict[str, float]:
    """GB/s of plain reads and of a load, and the seconds until a model is ready."""
    found = {}
    for name, read in READS.items():
        _prepare(files, state)
        began = time.perf_counter()
        num_bytes = read(files, options.threads)
        found[name] = num_bytes / (time.perf_counter() - began) / GIGA
    _prepare(files, state)
    settings = {"model": str(options.folder), "vram_gb": options.vram_gb, "max_model_len": 1024}
    command = [sys.executable, "-c", LOAD, json.dumps(settings)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    loaded: dict[str, float] = json.loads(ran.stdout)
    return found | loaded


def _prepare(files: list[Path], state: str) -> None:
    """Bring the files into memory, or have the system let go of them."""
    if state == "warm":
        read_to_buffers(files, 4)
        return
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _best(key: str, rounds: list[dict[str, float]]) -> float:
    return (min if key == "ready_s" else max)(found[key] for found in rounds)


# --- plain reads ---


def read_to_buffers(files: list[Path], num_threads: int) -> int:
    """Each thread reads again and again into the same memory; returns the bytes."""
    return _read_all(files, num_threads, os.O_RDONLY, lambda: memoryview(mmap.mmap(-1, STEP)))


def read_directly(files: list[Path], num_threads: int) -> int:
    """Past the page cache; 0 where the file system does not do that."""
    with suppress(OSError):
        flags = os.O_RDONLY | os.O_DIRECT
        return _read_all(files, num_threads, flags, lambda: memoryview(mmap.mmap(-1, STEP)))
    return 0


def read_to_new_memory(files: list[Path], num_threads: int) -> int:
    """Into huge pages that are made by the reads."""
    from cpu_kernels.arena import Arena

    size = sum(file.stat().st_size for file in files) + STEP * len(files)
    memory = Arena(size).array(np.uint8, (size,)).data
    starts = iter(range(0, size, STEP))
    lock = threading.Lock()

    def next_part() -> memoryview:
        with lock:
            at = next(starts)
        return memory[at : at + STEP]

    return _read_all(files, num_threads, os.O_RDONLY, next_part, is_kept=True)


def _read_all(
    files: list[Path],
    num_threads: int,
    flags: int,
    room: Callable[[], memoryview],
    *,
    is_kept: bool = False,
) -> int:
    """Read all files in steps; ``is_kept``: each step has a room of its own, else each thread."""
    local = threading.local()
    opened = [(os.open(file, flags), file.stat().st_size) for file in files]

    def read(part: tuple[int, int]) -> int:
        fd, at = part
        if is_kept or not hasattr(local, "room"):
            local.room = room()
        return os.preadv(fd, [local.room], at)

    def parts() -> Iterator[tuple[int, int]]:
        for fd, size in opened:
            for at in range(0, size, STEP):
                yield fd, at

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            return sum(threads.map(read, parts()))
    finally:
        for fd, _ in opened:
            os.close(fd)


READS = {"buffer": read_to_buffers, "direct": read_directly, "new memory": read_to_new_memory}


# --- a folder to read ---


def make(folder: Path, shape: str, num_layers: int | None, scheme: str | None) -> None:
    """Write a checkpoint of a named shape, with fewer layers if asked, and seeded weights.

    With a ``scheme`` its experts are packed, in files like those of ``fiddler quantize``.
    """
    from fiddler.models.shapes import SHAPES

    folder.mkdir(parents=True, exist_ok=True)
    raw = dict(SHAPES[shape]) | ({"num_hidden_layers": num_layers} if num_layers else {})
    (folder / "config.json").write_text(json.dumps(raw))
    shutil.copy(BUILTIN / "tokenizer.json", folder)  # one that is there; nothing is generated
    weight_map = _write_packed(folder, raw, scheme) if scheme else _write_plain(folder)
    index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_plain(folder: Path) -> dict[str, str]:
    """All weights in bfloat16; returns the file of each."""
    import torch
    from safetensors.torch import save_file

    from fiddler.models.dummy import DummySource
    from fiddler.models.manifest import all_parts
    from fiddler.models.registry import load_config

    config = load_config(folder)
    source, shard, index = DummySource(config, 0), dict[str, torch.Tensor](), dict[str, str]()

    def save() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for part in all_parts(config):
        shard[part.name] = torch.empty(part.shape, dtype=torch.bfloat16)
        source.fill_(shard[part.name], part.name)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            save()
    save()
    return index


def _write_packed(folder: Path, raw: dict[str, Any], scheme: str) -> dict[str, str]:
    """Experts of ``scheme``, drawn and not rounded; returns the file of each weight."""
    import torch

    from cpu_kernels.weight_kind import parse_kind
    from fiddler.models.dummy import DummySource
    from fiddler.models.dummy_packed import dummy_packing
    from fiddler.models.quantized import quantization_config
    from fiddler.models.registry import load_config
    from fiddler.quantize.plan import PlannedTensor, Shard, plan_shards
    from fiddler.quantize.writing import write_shard

    config, kind = load_config(folder), parse_kind(scheme)
    source = DummySource(config, 0)
    fill_packed = dummy_packing(source, config, kind)

    def bits_of(shard: Shard, tensor: PlannedTensor) -> np.ndarray:
        if tensor.expert is None:
            plain = torch.empty(tensor.shape, dtype=torch.bfloat16)
            source.fill_(plain, tensor.name)
            return plain.view(torch.int16).numpy()
        assert shard.layer is not None
        packed_B = torch.empty(tensor.shape, dtype=torch.uint8)
        fill_packed(shard.layer, tensor.expert, packed_B)
        return packed_B.numpy()

    shards = plan_shards(config, kind)
    for shard in shards:
        contents = (bits_of(shard, tensor) for tensor in shard.tensors)
        write_shard(folder / shard.name, shard.tensors, contents)
    scheme_of = {"quantization_config": quantization_config(kind, {})}
    (folder / "config.json").write_text(json.dumps(raw | scheme_of))
    return {tensor.name: shard.name for shard in shards for tensor in shard.tensors}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", metavar="SHAPE")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scheme", metavar="KIND", help="of the folder that is made")
    parser.add_argument("--vram-gb", type=float)
    parser.add_argument("--threads", type=int, default=max(4, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
