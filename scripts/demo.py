"""The main job on the built-in model: plan, answer, and compare with a plain reference run.

Half of the experts go to the GPU side, which the CPU plays where there is no GPU. Everything is
float32, so the tokens of the hybrid and of the reference have to be the same.
"""

import sys
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from fiddler import LLM, RequestOutput, SamplingParams
from fiddler.cli.plan_table import PlanFacts, print_plan
from fiddler.cli.stats_line import stats_line
from fiddler.config import EngineConfig
from fiddler.loading import find_model, open_weights
from fiddler.models.reference import reference_greedy
from fiddler.planning import plan_model
from offload.hardware import probe
from offload.units import GIB

QUESTIONS = ("What is 27 + 48?", "Tell me a short story about a cat.")
PARAMS = SamplingParams(temperature=0, max_tokens=128)
SETTINGS: dict[str, Any] = {
    "model": "builtin",
    "dtype": "float32",
    "max_model_len": 1024,
    "max_batched_tokens": 256,
    "max_num_seqs": 1,
}


def main() -> int:
    """Print the placement, the answers, their speed and the comparison; 1 if they differ."""
    console = Console()
    num_same = num_tokens = 0
    with LLM(**SETTINGS, vram_gb=vram_for_half_of_the_experts()) as llm:
        print_plan(facts_of(llm), console)
        for question in QUESTIONS:
            output = llm.chat([{"role": "user", "content": question}], PARAMS)
            console.print(f"\n> {question}", style="bold")
            console.print(output.text, markup=False)
            console.print(stats_line(output.stats), style="dim", soft_wrap=True)
            found, wanted = output.outputs[0].token_ids, reference_tokens(llm, output)
            num_same += sum(a == b for a, b in zip(found, wanted, strict=False))
            num_tokens += max(len(found), len(wanted))
    console.print(f"\nhybrid == reference: {num_same}/{num_tokens} tokens")
    return 0 if num_same == num_tokens else 1


def vram_for_half_of_the_experts() -> float:
    """GiB that hold everything else and half of the experts, on this machine's GPU or emulated."""
    settings = EngineConfig(**SETTINGS, vram_gb=4)
    files = find_model(settings)
    plan, _ = plan_model(settings, files.config, probe(), name=files.name, folder=files.folder)
    used = plan.memory
    fixed = used.context + used.margin + used.dense + used.workspace + used.kv
    return (fixed + used.gpu_experts // 2) / GIB


def facts_of(llm: LLM) -> PlanFacts:
    """What ``fiddler plan`` prints, of a loaded model."""
    return PlanFacts(
        name=llm.model_name,
        revision=llm.revision,
        missing_bytes=0,
        config=llm.model_config,
        dtypes=llm.dtypes,
        hardware=llm.hardware,
        plan=llm.plan,
    )


def reference_tokens(llm: LLM, output: RequestOutput) -> list[int]:
    """Greedy tokens of the plain reference for the same prompt."""
    with ExitStack() as reading:
        files = find_model(llm.config)
        source = open_weights(llm.config, files, reading).numbers
        return reference_greedy(
            source,
            files.config,
            output.prompt_token_ids,
            max_tokens=PARAMS.max_tokens or 0,
            eos_ids=files.tokenizer.eos_token_ids if files.tokenizer else (),
        )


if __name__ == "__main__":
    sys.exit(main())
