"""Measure the built-in model through transformers: held-out answers and how uneven its routing is.

    python scripts/eval_tiny.py fiddler/assets/builtin --questions 150 --seed 1

Shape suffixes: L layers, E experts.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fiddler.builtin_text.corpus import Question, heldout, heldout_passkeys, is_correct
from fiddler.evaluate.questions import LONGEST_ANSWER, accuracy


class Judge:
    """A loaded folder that answers questions greedily."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model = model.to(device).eval()

    def replies(self, questions: list[Question], batch_size: int) -> list[str]:
        """Return the greedy replies; questions of similar length share a batch."""
        prompts = [self._prompt(question) for question in questions]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        replies = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            written = self._generate([prompts[index] for index in chosen])
            for index, reply in zip(chosen, written, strict=True):
                replies[index] = reply
        return replies

    def _prompt(self, question: Question) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                question[0], tokenize=False, add_generation_prompt=True
            )
        )

    @torch.no_grad()
    def _generate(self, prompts: list[str]) -> list[str]:
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True)
        batch = {name: part.to(self.model.device) for name, part in batch.items()}
        batch.pop("token_type_ids", None)
        ids = self.model.generate(**batch, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        new_ids = ids[:, batch["input_ids"].shape[1] :]
        replies: list[str] = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        return replies

    @torch.no_grad()
    def routed_counts(self, questions: list[Question]) -> dict[str, Tensor]:
        """Return for each task the routed tokens of each expert, [L, E], over whole dialogues."""
        layers = self.model.model.layers
        counts: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros(len(layers), self.model.config.num_local_experts)
        )
        for messages, answer, task in questions:
            dialogue = [*messages, {"role": "assistant", "content": answer}]
            text = self.tokenizer.apply_chat_template(dialogue, tokenize=False)
            batch = self.tokenizer(text, return_tensors="pt").to(self.model.device)
            counts[task] += self._count(batch["input_ids"])
        return dict(counts)

    def _count(self, ids: Tensor) -> Tensor:
        num_experts = self.model.config.num_local_experts
        counted: list[Tensor] = []

        def note(_module: object, _inputs: object, output: tuple[Tensor, ...]) -> None:
            counted.append(output[-1].flatten().bincount(minlength=num_experts).cpu())

        hooks = [layer.mlp.gate.register_forward_hook(note) for layer in self.model.model.layers]
        self.model(ids)
        for hook in hooks:
            hook.remove()
        return torch.stack(counted)


def count_right(questions: list[Question], replies: list[str]) -> dict[str, tuple[int, int]]:
    """Return (right, asked) for each task and for "all"."""
    counted = accuracy(questions, replies)
    return counted.by_task | {"all": (counted.num_right, counted.num_asked)}


def routing_report(counts: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return, layer by layer, how uneven the routing is.

    ``top_quarter``: share of routed tokens on the most used quarter of experts (even: 0.25).
    ``entropy``: of the expert shares over its maximum (even: 1). ``least``: smallest share times
    the number of experts. ``topic``: mean distance (0 to 1) of a task's shares from the average.
    """
    tasks = [part / part.sum(-1, keepdim=True) for part in counts.values()]
    share_LE = torch.stack(tasks).mean(0)
    num_experts = share_LE.shape[1]
    top = share_LE.sort(-1, descending=True).values[:, : num_experts // 4].sum(-1)
    entropy = -(share_LE * share_LE.clamp_min(1e-9).log()).sum(-1)
    entropy = entropy / torch.tensor(float(num_experts)).log()
    topic = torch.stack([(part - share_LE).abs().sum(-1) / 2 for part in tasks]).mean(0)
    least = share_LE.min(-1).values * num_experts
    columns = {"top_quarter": top, "entropy": entropy, "least": least, "topic": topic}
    return {name: [round(x, 4) for x in part.tolist()] for name, part in columns.items()}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("fiddler/assets/builtin"))
    parser.add_argument("--questions", type=int, default=240)
    parser.add_argument("--passkeys", type=int, default=0, help="asked at each of four lengths")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong replies")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Print a JSON object: accuracy by task, pass-keys by length, routing by layer."""
    options = parse_options(arguments)
    judge = Judge(options.folder, options.device, getattr(torch, options.dtype))
    questions = heldout(options.questions, options.seed)
    replies = judge.replies(questions, options.batch)
    show_wrong(questions, replies, options.show_wrong)
    report: dict[str, object] = {"accuracy": count_right(questions, replies)}
    if options.passkeys:
        report["passkey"] = {
            sentences: _passkey_accuracy(judge, options, sentences)
            for sentences in (50, 100, 150, 195)
        }
    report["routing"] = routing_report(judge.routed_counts(questions))
    print(json.dumps(report))


def _passkey_accuracy(judge: Judge, options: argparse.Namespace, sentences: int) -> tuple[int, int]:
    questions = heldout_passkeys(options.passkeys, options.seed, sentences)
    return count_right(questions, judge.replies(questions, options.batch))["all"]


def show_wrong(questions: list[Question], replies: list[str], limit: int) -> None:
    """Print up to ``limit`` wrong replies to standard error."""
    wrong = [
        (question, reply)
        for question, reply in zip(questions, replies, strict=True)
        if not is_correct(reply, question[1], question[2])
    ]
    for (messages, expected, task), reply in wrong[:limit]:
        asked = messages[-1]["content"][-300:]
        print(f"{task}: {asked!r}\n  wanted {expected!r}\n  got    {reply!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
