"""The one place where a command gets its model, and what that needs and leaves."""

import gc
import subprocess
import sys
import weakref
from typing import Any

from fiddler.cli.session import open_llm


def test_a_closed_model_is_freed_from_a_frozen_heap() -> None:
    llm: Any = open_llm(model="builtin")
    assert gc.get_freeze_count() > 100_000
    store = weakref.ref(llm._running.experts.store)
    llm.close()
    del llm
    assert store() is None and gc.get_freeze_count() == 0


def test_a_model_on_the_cpu_needs_no_triton() -> None:
    """Which exists on Linux only."""
    code = """
import sys
sys.modules["triton"] = None
from fiddler import LLM, SamplingParams
with LLM("builtin", device="cpu") as llm:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    print(len(llm.generate("Once", params).outputs[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "3", done.stderr
