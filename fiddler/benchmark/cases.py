"""What a benchmark runs, in llama-bench's terms: pp512 reads a prompt, tg128 writes tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from fiddler.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``n_parallel`` requests: each reads ``n_prompt`` tokens, then writes ``n_gen``.

    One of the two may be 0. Before the clock runs, ``n_depth`` tokens of each are in the cache.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    n_parallel: int

    @property
    def name(self) -> str:
        """``pp512``, ``tg128`` or ``pp512+tg128``; ``tg128 @ d4096`` behind 4,096 tokens."""
        prompt = f"pp{self.n_prompt}" if self.n_prompt else ""
        answer = f"tg{self.n_gen}" if self.n_gen else ""
        name = "+".join(filter(None, (prompt, answer)))
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def new_tokens(self) -> int:
        """Tokens that each request computes by the clock."""
        return self.n_prompt + self.n_gen

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests that the clock measures."""
        return self.n_parallel * self.new_tokens

    @property
    def prompt_end(self) -> int:
        """Tokens of each request that are in the cache when it begins to write."""
        return self.n_depth + self.n_prompt

    @property
    def length(self) -> int:
        """Tokens of each request that are in the cache at the end."""
        return self.n_depth + self.new_tokens

    def num_pages(self, page_size: int) -> int:
        """KV pages that all requests hold."""
        return self.n_parallel * -(-self.length // page_size)


def make_cases(
    prompts: Sequence[int],
    gens: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
    parallel: Sequence[int],
) -> list[Case]:
    """Every combination, once; a length of 0 is no test. Raises ConfigError if none is left.

    ``pairs`` are of a prompt and an answer, measured together.
    """
    lengths = [*((n, 0) for n in prompts), *((0, n) for n in gens), *pairs]
    if not any(map(any, lengths)):
        raise ConfigError(
            "there is nothing to measure", hint="give a -p (prompt) or -n (answer) above 0"
        )
    cases = (
        Case(n_prompt=n_prompt, n_gen=n_gen, n_depth=depth, n_parallel=n_parallel)
        for n_parallel in parallel
        for depth in depths
        for n_prompt, n_gen in lengths
        if n_prompt or n_gen
    )
    return [*dict.fromkeys(cases)]
