"""A model that needs no weights: it echoes, and does as some words of the message tell it.

Its streams end, and can be closed, exactly as those of ``fiddler.llm.LLM``.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from fiddler.config import EngineConfig
from fiddler.errors import PromptError
from fiddler.models.config import ModelConfig, WeightNames
from fiddler.outputs import RunStats, TokenEvent
from fiddler.sampling_params import SamplingParams
from offload.placement import Placement
from offload.plan import GpuSide

MARKDOWN = """# Title

Some *words* and `code`.

```python
x = 1

y = 2
```

- one
- two

| a | b |
|---|---|
| 1 | 2 |

The end.
"""


class FakeTokenizer:
    """Ids are code points."""

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


FULL = 3  # with this max_tokens the context ends as well


class FakeStream:
    """Events of ``words``; after ``close`` one last event says "cancelled"."""

    def __init__(
        self, words: list[str], delays_s: tuple[float, float], prompt_tokens: int, limit: int
    ) -> None:
        self.is_closed = False
        self._events = self._make(words, delays_s, prompt_tokens, limit)

    def __iter__(self) -> Iterator[TokenEvent]:
        return self._events

    def close(self) -> None:
        self.is_closed = True

    def _make(
        self, words: list[str], delays_s: tuple[float, float], prompt_tokens: int, limit: int
    ) -> Iterator[TokenEvent]:
        first_s, delay_s = delays_s
        time.sleep(first_s)
        for count, word in enumerate(words, 1):
            if self.is_closed:
                yield TokenEvent(
                    "", None, finish_reason="cancelled", stats=_stats(prompt_tokens, count)
                )
                return
            time.sleep(delay_s)
            reason = "length" if count == limit else "stop" if count == len(words) else None
            stats = _stats(prompt_tokens, count)
            if reason == "length" and limit == FULL:
                stats = replace(stats, prompt_tokens=FakeLLM.plan.context_tokens - count)
            yield TokenEvent(word, count, finish_reason=reason, stats=stats)
            if reason:
                return


class FakeLLM:
    """The part of ``LLM`` that the commands use; remembers what it was asked."""

    model_name = "fake"
    revision = None
    has_chat_template = True
    tokenizer = FakeTokenizer()
    model_config = ModelConfig(
        model_type="fake",
        vocab_size=0x110000,  # all code points
        hidden_size=8,
        num_layers=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        num_experts=4,
        top_k=2,
        expert_size=8,
        names=WeightNames(),
    )
    plan = SimpleNamespace(
        gpu_side=GpuSide.CUDA,
        memory=SimpleNamespace(cpu_experts=1000),
        placement=Placement.of([(0, 1), (2,)]),
        popularity_name="profile of 4,417 tokens",
        context_tokens=4096,
    )

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.config = EngineConfig(seed=options.get("seed", 0))
        self.asked: list[tuple[Any, SamplingParams, dict[str, Any]]] = []
        self.streams: list[FakeStream] = []
        self.is_closed = False

    def default_params(self) -> SamplingParams:
        return SamplingParams().with_defaults({"temperature": 0.6})

    def expert_counts(self) -> list[list[int]]:
        return [[8, 0, 1, 1], [2, 2, 3, 3]] if self.asked else [[0] * 4] * 2

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, chat_template_kwargs: dict[str, Any] | None = None
    ) -> list[int]:
        inside = "<think>\n" if "begun inside" in messages[-1]["content"] else ""
        said = " ".join(m["content"] for m in messages)
        if "no Unicode" in said:
            raise PromptError("the text is not valid Unicode", hint="check its encoding")
        padding = 9000 * said.count("too long") + 1500 * said.count("half full")
        return [0] * padding + self.tokenizer.encode(said + inside)

    def stream(self, prompt: str, sampling_params: SamplingParams | None = None) -> FakeStream:
        return self._start(prompt, prompt, sampling_params, {})

    def stream_chat(
        self,
        messages: list[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> FakeStream:
        if len(self.apply_chat_template(messages)) >= self.plan.context_tokens:
            raise PromptError("the prompt is too long", hint="shorten it")
        return self._start(
            messages, messages[-1]["content"], sampling_params, chat_template_kwargs or {}
        )

    def close(self) -> None:
        self.is_closed = True

    def _start(
        self, asked: Any, text: str, params: SamplingParams | None, kwargs: dict[str, Any]
    ) -> FakeStream:
        if "too long" in text:
            raise PromptError("the prompt has 9,000 tokens and the context 4,096")
        if "crash" in text:
            raise RuntimeError("the engine broke")
        params = params or self.default_params()
        self.asked.append((asked, params, kwargs))
        delay_s = 0.05 if "slow" in text else 0.0
        first_s = 60.0 if "stall" in text else 0.0
        stream = FakeStream(
            _words(text), (first_s, delay_s), len(text.split()), params.max_tokens or 10**9
        )
        self.streams.append(stream)
        return stream


def _words(text: str) -> list[str]:
    if "markdown" in text:
        return re.findall(r"\s*\S+|\s+$", MARKDOWN)
    if "slow" in text:
        return [f"word{number} " for number in range(400)]
    if "begun inside" in text:
        return ["ponder", "ing</th", "ink>\n\n", "decided"]
    if "ponder" in text:
        return ["<thi", "nk>", "hmm ", "well", "</think>", "\n\n", "decided"]
    if "be silent" in text:
        return [""]
    return ["You ", "said: ", *re.findall(r"\s*\S+", text)]


def _stats(prompt_tokens: int, output_tokens: int) -> RunStats:
    return RunStats(
        prompt_tokens=prompt_tokens,
        prompt_tokens_cached=prompt_tokens // 2,
        output_tokens=output_tokens,
        time_to_first_token_s=0.25,
        prefill_s=0.2,
        decode_s=output_tokens / 20,
        expert_tokens_gpu=7 * output_tokens,
        expert_tokens_cpu=3 * output_tokens,
        peak_vram_bytes=3 << 30,
    )
