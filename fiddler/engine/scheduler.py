"""Decides what each step computes: running decodes first, then prompts in chunks. Pure.

A step has a budget of tokens. Decodes always come first, so a long prompt cannot stall them for
more than one chunk (Sarathi-Serve, OSDI'24); a target for their time bounds the chunk. When pages
run out, cached ones give way, then the youngest running request: it keeps its tokens, loses its KV,
and is computed again later.
"""

from collections import deque
from dataclasses import dataclass

from fiddler.engine.pages import PagePool
from fiddler.engine.prefix_cache import PrefixCache, PrefixMatch
from fiddler.engine.prompt_budget import PromptBudget
from fiddler.engine.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` tokens of a request to compute in this step, from ``start``."""

    request: Request
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether it ends with the request's last token, so that a new one can be sampled."""
        return self.end == len(self.request.tokens)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work: ``page_copies`` (source, target) first, then decodes, then prefills."""

    decodes: tuple[Chunk, ...]
    prefills: tuple[Chunk, ...]
    page_copies: tuple[tuple[int, int], ...]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks in batch order."""
        return self.decodes + self.prefills

    @property
    def next_decodes(self) -> "Schedule":
        """The step behind this one if it only decodes and every request goes on."""
        following = (Chunk(c.request, c.end, 1) for c in self.decodes)
        return Schedule(tuple(following), (), ())


class Scheduler:
    """Continuous batching over a page pool. Requests enter by ``add`` and leave by ``finish``."""

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache | None,
        *,
        page_size: int,
        max_num_seqs: int,
        max_batched_tokens: int,
        tbt_target_s: float | None = None,
    ) -> None:
        """``tbt_target_s``: seconds that a step with decodes should take at most; None: any."""
        self._pool = pool
        self._cache = cache
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_batched_tokens = max(max_batched_tokens, max_num_seqs)
        self._prompt_budget = PromptBudget(tbt_target_s)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._copies: list[tuple[int, int]] = []

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """Choose the next step's chunks; at least one if there is work."""
        self._copies = []
        decodes = self._schedule_decodes()
        room = self._max_batched_tokens - len(decodes)
        prefills = self._schedule_prefills(self._prompt_budget.most_tokens(len(decodes), room))
        assert decodes or prefills or not self.has_work, "the scheduler is stuck"
        return Schedule(tuple(decodes), tuple(prefills), tuple(self._copies))

    def may_follow(self, schedule: Schedule) -> bool:
        """Whether ``schedule.next_decodes`` can come next for all that is known before it ends.

        If so, its requests hold the pages that it needs.
        """
        if schedule.prefills or [c.request for c in schedule.decodes] != self.running:
            return False
        if self.waiting and len(self.running) < self._max_num_seqs:
            return False
        ends = [(c.request, self._num_pages(c.end)) for c in schedule.next_decodes.decodes]
        if not self._make_room(sum(max(0, pages - len(r.pages)) for r, pages in ends)):
            return False
        for request, num_pages in ends:
            while len(request.pages) < num_pages:
                request.pages.append(self._pool.allocate())
        return True

    def took(self, schedule: Schedule, seconds: float) -> None:
        """Learn how long a step has taken."""
        num_prompt_tokens = sum(chunk.num_tokens for chunk in schedule.prefills)
        self._prompt_budget.observe(len(schedule.decodes), num_prompt_tokens, seconds)

    def finish(self, request: Request) -> None:
        """Take a request out, keep its KV in the cache, give back its pages. Idempotent."""
        if request in self.running:
            self.running.remove(request)
            self.remember(request)
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def drop_all(self) -> list[Request]:
        """Take every request out without caching anything, as after a failed step."""
        dropped = [*self.running, *self.waiting]
        for request in self.running:
            self._release(request)
        self.running.clear()
        self.waiting.clear()
        return dropped

    def remember(self, request: Request) -> None:
        """Let other prompts use what is computed of ``request``."""
        if self._cache is not None:
            self._cache.insert(request.tokens[: request.num_computed], request.pages)

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in list(self.running):
            if request not in self.running or request.num_to_compute != 1:
                continue  # preempted for an older one, or still in its prompt
            if self._grow(request, len(request.tokens)):
                chunks.append(Chunk(request, request.num_computed, 1))
        return chunks

    def _schedule_prefills(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in self.running:
            if request.num_to_compute > 1 and budget > 0:
                chunks.append(_chunk(request, budget))
                budget -= chunks[-1].num_tokens
        for request in [r for r in self.waiting if not self._must_wait(r)]:
            if budget <= 0 or len(self.running) >= self._max_num_seqs or not self._admit(request):
                break
            self.waiting.remove(request)
            self.running.append(request)
            chunks.append(_chunk(request, budget))
            budget -= chunks[-1].num_tokens
        return chunks

    def _must_wait(self, request: Request) -> bool:
        leader = request.leader
        if leader is None or self._cache is None or not request.can_use_cache:
            return False
        return not leader.is_finished and leader.num_outputs == 0

    def _admit(self, request: Request) -> bool:
        """Give ``request`` pages for all its tokens, shared ones where the cache has them."""
        match = self._match(request)
        if self._take_pages(request, match):
            return True
        # the copy's source is one page more than the request itself needs
        return match.num_copied > 0 and self._take_pages(request, PrefixMatch(match.shared))

    def _take_pages(self, request: Request, match: PrefixMatch) -> bool:
        held = (*match.shared, match.copied_page) if match.num_copied else match.shared
        for page in held:
            self._pool.retain(page)
        num_new = self._num_pages(len(request.tokens)) - len(match.shared)
        # and one page for each running request, so that an admission preempts nobody at once
        if not self._make_room(num_new + len(self.running)):
            self._pool.release(held)
            return False
        request.pages = [*match.shared, *(self._pool.allocate() for _ in range(num_new))]
        request.num_computed = len(match.shared) * self._page_size + match.num_copied
        if request.num_outputs == 0:
            request.num_cached = request.num_computed
        if match.num_copied:
            self._copies.append((match.copied_page, request.pages[len(match.shared)]))
            self._pool.release([match.copied_page])
        return True

    def _match(self, request: Request) -> PrefixMatch:
        if self._cache is None or not request.can_use_cache:
            return PrefixMatch(())
        return self._cache.match(request.tokens[:-1])  # the last token's logits are needed

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Make ``request`` hold pages for ``num_tokens``; False if it had to give way itself."""
        while len(request.pages) < self._num_pages(num_tokens):
            if self._make_room(1):
                request.pages.append(self._pool.allocate())
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _make_room(self, num_pages: int) -> bool:
        missing = num_pages - self._pool.num_free
        if missing > 0 and self._cache is not None and self._cache.num_unheld >= missing:
            self._cache.evict(missing)  # not for a request that would not fit all the same
        return self._pool.num_free >= num_pages

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.restart()
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self._pool.release(request.pages)
        request.pages = []

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)


def _chunk(request: Request, budget: int) -> Chunk:
    return Chunk(request, request.num_computed, min(request.num_to_compute, budget))
