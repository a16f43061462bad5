"""Train the built-in model on its synthetic corpus and write it as a Hugging Face folder.

    python scripts/train_tiny.py --minutes 7 --seed 0 -o fiddler/assets/builtin

Training is boxed by time (the learning rate follows the clock) or by ``--steps``. Batch number i
depends on the seed and i alone.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scripts.tiny.attention import document_mask, to_device
from scripts.tiny.export import export_folder
from scripts.tiny.model import LossWeights, Mask, TinyConfig, TinyModel, router_loss, weighted_loss
from scripts.tiny.optimizer import Optimizer
from scripts.tiny.probe import probe_accuracy, probe_batches
from scripts.tiny.rows import Encoder, Rows, pack_rows, train_tokenizer

_WARM_UP, _DECAY_FROM = 0.01, 0.4
# the clock starts anew after these steps, so that compilation takes nothing from the training
_COMPILED_AFTER = 20


class Batches(Dataset[Rows]):
    """Batch ``index`` of the corpus, generated when asked for."""

    def __init__(self, encoder: Encoder, seed: int, num_rows: int, length: int) -> None:
        self.encoder, self.seed = encoder, seed
        self.num_rows, self.length = num_rows, length

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Rows:
        rng = Random(f"train/{self.seed}/{index}")
        return pack_rows(self.encoder, rng, self.num_rows, self.length)


class Clock:
    """How much of the training is done: by steps when given, otherwise by time."""

    def __init__(self, steps: int | None, minutes: float) -> None:
        self.steps, self.seconds = steps, minutes * 60
        self.restart(0)

    def restart(self, step: int) -> None:
        """Count time and steps from here; with ``steps`` given the end stays where it was."""
        self.start, self.first_step = time.monotonic(), step

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def fraction(self, step: int) -> float:
        """Return 0 at the start and 1 or more at the end."""
        return step / self.steps if self.steps else self.elapsed() / self.seconds

    def steps_per_second(self, step: int) -> float:
        return (step - self.first_step) / max(self.elapsed(), 1e-9)


def rate_scale(fraction: float) -> float:
    """Return the learning rate over its peak: a short rise, level, then straight down to zero."""
    if fraction < _WARM_UP:
        return max(0.05, fraction / _WARM_UP)
    return min(1.0, max(0.0, (1 - fraction) / (1 - _DECAY_FROM)))


def batch_loss(
    model: TinyModel, rows: dict[str, Tensor], mask: Mask, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Return the training loss and the plain cross entropy of one batch."""
    with torch.autocast(rows["ids"].device.type, dtype=torch.bfloat16):
        logits_TV, routings = model(rows["ids"], mask)
    loss, entropy = weighted_loss(
        logits_TV, rows["targets"].flatten(), rows["weights"].flatten(), weights.output_z
    )
    for routing in routings:
        loss = loss + router_loss(routing, rows["documents"], weights)
    return loss, entropy


def batches(options: argparse.Namespace, encoder: Encoder) -> Iterator[Rows]:
    """Yield packed rows from worker processes, in order."""
    dataset = Batches(encoder, options.seed, options.rows, options.length)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=16 if options.workers else None,
    )
    yield from loader


def train(options: argparse.Namespace, model: TinyModel, encoder: Encoder) -> None:
    """Train ``model`` in place until the clock says so; print a line now and then."""
    device = next(model.parameters()).device
    optimizer = Optimizer(model, matrix_rate=options.matrix_rate, rate=options.rate)
    loss_of = torch.compile(batch_loss, dynamic=False) if device.type == "cuda" else batch_loss
    probes = probe_batches(encoder, options.length, num_questions=600, seed=options.seed)
    weights, source = LossWeights(topic=options.topic), batches(options, encoder)
    clock, step, next_probe = Clock(options.steps, options.minutes), 0, 0.1
    while clock.fraction(step) < 1.0:
        rows = to_device(next(source), device)
        loss, entropy = loss_of(model, rows, document_mask(rows["documents"]), weights)
        torch.autograd.backward(loss)
        optimizer.step(rate_scale(clock.fraction(step)))
        step += 1
        if step == _COMPILED_AFTER:
            print(f"{step} steps with compilation: {clock.elapsed():.0f} s", flush=True)
            clock.restart(step)
        if step % 250 == 0 or step == 1:
            speed = clock.steps_per_second(step) * options.rows * options.length
            line = f"step {step} loss {loss.item():.4f} entropy {entropy.item():.4f}"
            print(f"{line} {clock.elapsed():.0f} s {speed / 1e6:.2f} Mtok/s", flush=True)
        if clock.fraction(step) > next_probe:
            print(probe_accuracy(model, probes), flush=True)
            next_probe += 0.15
    print(f"{step} steps, {step * options.rows * options.length / 1e6:.0f} M tokens", flush=True)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("fiddler/assets/builtin"))
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=24, help="rows of a batch")
    parser.add_argument("--length", type=int, default=2560, help="tokens of a row")
    parser.add_argument("--workers", type=int, default=14, help="processes that write the corpus")
    parser.add_argument("--matrix-rate", type=float, default=0.02)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--topic", type=float, default=0.01, help="pull of topics on the routing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train the tokenizer and the model, and write the folder."""
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TinyConfig()
    tokenizer = train_tokenizer(config.vocab_size, options.seed)
    model = TinyModel(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    try:
        train(options, model, Encoder(tokenizer))
    finally:
        export_folder(model, tokenizer, options.output)
        print(f"wrote {options.output}", flush=True)


if __name__ == "__main__":
    main()
