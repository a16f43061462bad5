"""All measurements of the GPU kernels, as one table and build/bench-gpu.json.

    python -m scripts.bench.gpu [--only attention_decode,cascade]

Each row is a ratio to a limit or a peer measured in the same run, with a cold L2 and shuffled
pages.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from scripts.bench.kernels.timing import measure_peaks
from scripts.bench.rows import Row, table, write

BENCHES = (
    *("attention_decode", "attention_prefill", "cascade", "peers"),
    *("small", "elementwise", "experts"),
)
OUTPUT = Path("build/bench-gpu.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHES), help="with commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: this measures one")
    peaks = measure_peaks()
    print(f"{torch.cuda.get_device_name()}: read {peaks.read_gbps:.0f} GB/s")
    rows: list[Row] = []
    for name in options.only.split(","):
        torch.manual_seed(0)
        rows += importlib.import_module(f"scripts.bench.kernels.{name}").rows()
        print(f"{name}: measured", file=sys.stderr)
        torch.cuda.empty_cache()
    print(table(rows))
    write(rows, OUTPUT)


if __name__ == "__main__":
    main()
