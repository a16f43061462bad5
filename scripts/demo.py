"""The main job on the built-in model: plan, answer, and compare with a plain reference run.

Half of the experts go to the GPU side, which the CPU plays where there is no GPU. Everything is
float32, so the tokens of the hybrid and of the reference have to be the same.
"""

import sys
from contextlib import ExitStack

from rich.console import Console

from fiddler import LLM, RequestOutput, SamplingParams
from fiddler.cli.plan_table import PlanFacts, print_plan
from fiddler.cli.stats_line import stats_line
from fiddler.loading import find_model, open_source
from fiddler.models.reference import reference_greedy

QUESTION = "What is 27 + 48?"
VRAM_GB = 0.05  # emulated: the dense weights, the context and about half of the experts


def main() -> int:
    """Print the placement, the answer, its speed and the comparison; 1 if they differ."""
    console = Console()
    vram = {} if has_gpu() else {"vram_gb": VRAM_GB}
    with LLM("builtin", dtype="float32", max_model_len=1024, max_batched_tokens=256, **vram) as llm:
        print_plan(facts_of(llm), console)
        output = llm.chat([{"role": "user", "content": QUESTION}], SamplingParams(temperature=0))
        wanted = reference_tokens(llm, output)
    console.print()
    console.print(f"> {QUESTION}", style="bold")
    console.print(output.text)
    console.print(stats_line(output.stats), style="dim")
    found = output.outputs[0].token_ids
    same = sum(a == b for a, b in zip(found, wanted, strict=False))
    console.print(f"hybrid == reference: {same}/{max(len(found), len(wanted))} tokens")
    return 0 if found == wanted else 1


def has_gpu() -> bool:
    """Whether there is a GPU, whose memory need not be emulated."""
    import torch

    return torch.cuda.is_available()


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
        source = open_source(llm.config, files, reading)
        return reference_greedy(
            source,
            files.config,
            output.prompt_token_ids,
            max_tokens=SamplingParams().max_tokens or 512,
            eos_ids=files.tokenizer.eos_token_ids if files.tokenizer else (),
        )


if __name__ == "__main__":
    sys.exit(main())
