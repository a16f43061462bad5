"""The memory of a run: that of one layer, however many there are.

What counts is memory of the process's own (RssAnon): pages of mapped files are the page cache's,
which gives them back when somebody needs them.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fiddler.models.checkpoint import SINGLE
from fiddler.models.manifest import all_parts
from fiddler.models.registry import load_config
from fiddler.quantize.plan import PlannedTensor
from fiddler.quantize.writing import write_shard

LAYERS, EXPERTS, HIDDEN, WIDTH = 8, 16, 512, 512
# Experts of a layer in float32, the widest that weights are held in: a quarter of the stored model.
# All packed experts together take as much, so those of earlier layers may not stay either.
LAYER = 4 * EXPERTS * 3 * HIDDEN * WIDTH

# Two workers on any machine: each holds an expert three times, and num_workers bounds how many.
CHILD = """
import json, sys, threading
from pathlib import Path
from cpu_kernels.weight_kind import parse_kind
from fiddler.quantize import layers
from fiddler.quantize.run import QuantizeJob, quantize

def own_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not ended.wait(0.001):
        seen.append(own_bytes())

def run(source, output, calibration=None, **options):
    kind = parse_kind(options.pop("kind"))
    paths = {"source": Path(source), "output": Path(output)}
    text = calibration and Path(calibration)
    quantize(QuantizeJob(**paths, kind=kind, calibration=text, **options))

layers.num_workers = lambda *_: 2
small, large = map(json.loads, sys.argv[1:])
run(**small)  # what is imported and compiled on the way is no memory of a model
seen, ended = [own_bytes()], threading.Event()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
run(**large)
ended.set()
watcher.join()
print(max(seen) - seen[0])
"""


@pytest.fixture(scope="module")
def model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded, 200 MB of experts; never whole in memory."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    raw = json.loads((folder / "config.json").read_text()) | {
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = [PlannedTensor(part.name, part.shape) for part in all_parts(load_config(folder))]
    write_shard(folder / SINGLE, tensors, _seeded(tensors))
    return folder


def _seeded(tensors: list[PlannedTensor]) -> Iterator[NDArray[np.int16]]:
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors:
        numbers = torch.randn(tensor.shape, generator=generator) * HIDDEN**-0.5
        yield numbers.bfloat16().view(torch.int16).numpy()


def peak(tiny: Path, model: Path, output: Path, **options: object) -> int:
    """Bytes that a run needs beyond those of the process before it."""
    jobs = (
        {"source": str(source), "output": str(output / source.name), **options, "kind": kind}
        for source, kind in ((tiny, "w4g32"), (model, "w4g128"))
    )
    arguments = [sys.executable, "-c", CHILD, *map(json.dumps, jobs)]
    # blocks that a thread has freed serve the others: what is held counts, not what malloc keeps
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, env=environment)
    return int(done.stdout)


def test_rounding_holds_less_than_a_layer(tiny: Path, model: Path, tmp_path: Path) -> None:
    """12 to 33 MB: four experts under way or waiting."""
    assert 0 < peak(tiny, model, tmp_path, method="rtn") < LAYER


def test_fitting_holds_less_than_two_layers(tiny: Path, model: Path, tmp_path: Path) -> None:
    """70 to 90 MB: with hidden states of a window, and for each worker what a Hessian needs."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} is not {i * i % 37}; " for i in range(60)))
    options = {"method": "gptq", "calibration": str(text)}
    assert 0 < peak(tiny, model, tmp_path, **options) < 2 * LAYER
