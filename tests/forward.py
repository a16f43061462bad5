"""Drives a loaded model's forward pass directly, token by token as a test wants it.

Teacher forcing: the texts are given, so the logits of two runs can be compared at every position.
"""

import torch

from fiddler import LLM
from fiddler.config import PAGE_SIZE
from fiddler.engine.request import Request
from fiddler.engine.scheduler import Chunk, Schedule
from fiddler.sampling_params import SamplingParams


class Forward:
    """Runs given texts through ``llm``'s decoder over its own KV pages, shuffled."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm._running.engine
        self._pool = llm._running.pages
        self._experts = llm._running.experts

    def logits(self, texts: list[list[int]], prompt_lens: list[int]) -> list[torch.Tensor]:
        """Prefill each prompt in one ragged step, then decode the rest side by side.

        Returns float32 ``[len(text), V]`` for each text.
        """
        requests = [self._request(text) for text in texts]
        rows: list[list[torch.Tensor]] = [[] for _ in texts]
        prefills = [Chunk(r, 0, n) for r, n in zip(requests, prompt_lens, strict=True)]
        self._run(Schedule((), tuple(prefills), ()), rows, requests)
        for step in range(max(len(t) - n for t, n in zip(texts, prompt_lens, strict=True))):
            decodes = [
                Chunk(r, n + step, 1)
                for r, n, t in zip(requests, prompt_lens, texts, strict=True)
                if n + step < len(t)
            ]
            self._run(Schedule(tuple(decodes), (), ()), rows, requests)
        for request in requests:
            self._pool.release(request.pages)
        return [torch.cat(parts).float().cpu() for parts in rows]

    def _run(
        self, schedule: Schedule, rows: list[list[torch.Tensor]], requests: list[Request]
    ) -> None:
        started = self._engine._start(schedule)
        hidden_TH = self._engine._runner.collect(started).hidden_TH
        start = 0
        for chunk in schedule.chunks:
            part_TH = hidden_TH[start : start + chunk.num_tokens]
            logits_TV = self._engine._runner.decoder.logits(part_TH)
            rows[requests.index(chunk.request)].append(logits_TV)
            start += chunk.num_tokens

    def _request(self, tokens: list[int]) -> Request:
        request = Request(prompt_ids=tokens, params=SamplingParams(), max_tokens=1, seed=0)
        pages = [self._pool.allocate() for _ in range(-(-len(tokens) // PAGE_SIZE))]
        request.pages = pages[::-1]
        return request


def random_texts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Seeded random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def relative_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Frobenius norm of the difference over that of ``wanted``; NaN if anything is NaN."""
    difference = sum(
        (f.double() - w.double()).square().sum() for f, w in zip(found, wanted, strict=True)
    )
    size = sum(w.double().square().sum() for w in wanted)
    return float((difference / size).sqrt())
