"""The requests of one test: the tokens in the cache stay, those behind them are new each run."""

import numpy as np

from fiddler.benchmark.cases import Case
from fiddler.config import PAGE_SIZE
from fiddler.engine.pages import PagePool
from fiddler.engine.request import Request
from fiddler.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, ignore_eos=True).with_defaults({})


class CaseRequests:
    """Makes requests over KV pages that outlive them; give the pages back with ``close``.

    Request ``i`` of the batch has the seed ``i``, by which drawn routing knows it.
    """

    def __init__(self, case: Case, pool: PagePool, *, vocab_size: int, seed: int) -> None:
        self._case = case
        self._pool = pool
        self._vocab_size = vocab_size
        self._seed = seed % 2**64
        num_pages = -(-case.length // PAGE_SIZE)
        self._pages = [[pool.allocate() for _ in range(num_pages)] for _ in range(case.n_parallel)]

    def filling(self) -> list[Request]:
        """Requests that leave the tokens of ``n_depth`` in the cache; none without a depth."""
        if not self._case.n_depth:
            return []
        return [
            self._request(index, self._depth_tokens(index), num_computed=0, max_tokens=1)
            for index in range(self._case.n_parallel)
        ]

    def of_run(self, run: int) -> list[Request]:
        """Requests behind the cached tokens; to write, each step computes one token more.

        Who only writes begins with one drawn token, who reads first with what the model answers.
        """
        case = self._case
        return [
            self._request(
                index,
                self._depth_tokens(index) + self._tokens(case.n_prompt or 1, index, run + 1),
                num_computed=case.n_depth,
                max_tokens=case.n_gen + (1 if case.n_prompt else 0),
            )
            for index in range(case.n_parallel)
        ]

    def close(self) -> None:
        """Give back the pages."""
        for pages in self._pages:
            self._pool.release(pages)

    def _request(
        self, index: int, tokens: list[int], *, num_computed: int, max_tokens: int
    ) -> Request:
        request = Request(prompt_ids=tokens, params=GREEDY, max_tokens=max_tokens, seed=index)
        for page in self._pages[index]:
            self._pool.retain(page)  # the scheduler gives it back when the request ends
        request.pages = list(self._pages[index])
        request.num_computed = num_computed
        return request

    def _depth_tokens(self, index: int) -> list[int]:
        return self._tokens(self._case.n_depth, index, 0)

    def _tokens(self, count: int, index: int, part: int) -> list[int]:
        rng = np.random.default_rng([self._seed, index, part])
        drawn: list[int] = rng.integers(self._vocab_size, size=count).tolist()
        return drawn
