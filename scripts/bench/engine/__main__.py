"""The whole engine on named shapes: one table and build/bench-engine.json.

    python -m scripts.bench.engine [--repetitions 5]
            [--parts qwen,mixtral,qwen_bf12,mixtral_bf12,skew,hand_over,qwen_w4,mixtral_w4,
                placement]

Weights are seeded, one request at a time, short context; within 24 GiB, or as rows say. Speeds
stand beside the limit that this run's bandwidths set, and a target in the same unit.
"""

import argparse
import sys
from pathlib import Path

import torch

from scripts.bench.engine import packed, speeds
from scripts.bench.engine.hand_over import hand_over_rows
from scripts.bench.engine.packed import packed_rows
from scripts.bench.engine.placement import placement_rows
from scripts.bench.engine.skewed import skewed_rows
from scripts.bench.engine.speeds import shape_rows
from scripts.bench.rows import Row, table, write

OUTPUT = Path("build/bench-engine.json")

PARTS = {
    "qwen": lambda repetitions: shape_rows(speeds.QWEN, repetitions),
    "mixtral": lambda repetitions: shape_rows(speeds.MIXTRAL, repetitions),
    "qwen_bf12": lambda repetitions: shape_rows(speeds.QWEN, repetitions, "bf12"),
    "mixtral_bf12": lambda repetitions: shape_rows(speeds.MIXTRAL, repetitions, "bf12"),
    "skew": skewed_rows,
    "hand_over": hand_over_rows,
    "qwen_w4": lambda repetitions: packed_rows(packed.QWEN, repetitions),
    "mixtral_w4": lambda repetitions: packed_rows(packed.MIXTRAL, repetitions),
    "placement": placement_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: this measures one")
    rows: list[Row] = []
    for part in options.parts.split(","):
        rows += PARTS[part](options.repetitions)
        print(table(rows), flush=True)
        write(rows, OUTPUT)


if __name__ == "__main__":
    main()
