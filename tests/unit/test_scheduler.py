"""The scheduler, driven by random arrivals, ends and cancellations over a pretend KV cache.

The pretend cache stores at each slot the whole text up to its token, so any page that is shared by
accident, copied too early or handed out twice shows up as a wrong text.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.engine.pages import PagePool
from fiddler.engine.prefix_cache import PrefixCache
from fiddler.engine.request import Request
from fiddler.engine.scheduler import Schedule, Scheduler
from fiddler.sampling_params import SamplingParams

PAGE = 4
NUM_PAGES = 12
CONTEXT = NUM_PAGES * PAGE


class PretendModel:
    """Executes schedules; the next token of a text is a function of the text alone."""

    def __init__(self, *, use_cache: bool, max_num_seqs: int, max_batched_tokens: int) -> None:
        self.pool = PagePool(NUM_PAGES)
        self.cache = PrefixCache(self.pool, PAGE) if use_cache else None
        self.max_batched_tokens = max(max_batched_tokens, max_num_seqs)
        self.max_num_seqs = max_num_seqs
        self.scheduler = Scheduler(
            self.pool,
            self.cache,
            page_size=PAGE,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
        )
        self.kv: list[list[tuple[int, ...] | None]] = [[None] * PAGE for _ in range(NUM_PAGES)]

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        self.check_budget(schedule)
        for source, target in schedule.page_copies:
            self.kv[target] = list(self.kv[source])
        for chunk in schedule.chunks:
            request = chunk.request
            for position in range(chunk.start, chunk.end):
                page = request.pages[position // PAGE]
                self.kv[page][position % PAGE] = tuple(request.tokens[: position + 1])
        for chunk in schedule.chunks:
            self.check_kv(chunk.request, chunk.end)
            is_last = chunk.is_last
            chunk.request.num_computed = chunk.end
            if is_last:
                self.emit(chunk.request)

    def emit(self, request: Request) -> None:
        request.tokens.append(next_token(request.tokens))
        if request.num_outputs == 1:
            self.scheduler.remember(request)
        if request.num_outputs >= request.max_tokens:
            request.finish_reason = "length"
            self.scheduler.finish(request)

    def check_kv(self, request: Request, end: int) -> None:
        for position in range(end):
            held = self.kv[request.pages[position // PAGE]][position % PAGE]
            assert held == tuple(request.tokens[: position + 1])

    def check_budget(self, schedule: Schedule) -> None:
        assert sum(c.num_tokens for c in schedule.chunks) <= self.max_batched_tokens
        assert len(self.scheduler.running) <= self.max_num_seqs
        assert all(c.num_tokens == 1 for c in schedule.decodes)
        waiting_decodes = [r for r in self.scheduler.running if r.num_to_compute == 1]
        scheduled = {c.request.id for c in schedule.chunks}
        assert all(r.id in scheduled for r in waiting_decodes), "a decode was skipped"


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 7 + len(tokens)) % 3


def generate_alone(prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


arrivals = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=30),  # prompt
        st.integers(1, 12),  # tokens to make
        st.integers(0, 6),  # steps before it arrives
        st.one_of(st.none(), st.integers(0, 10)),  # steps until it is cancelled
        st.integers(1, 3),  # n
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150)
@given(arrivals, st.booleans(), st.integers(1, 5), st.integers(1, 20))
def test_every_request_runs_as_if_alone_and_no_page_is_lost(
    arrivals: list[tuple[list[int], int, int, int | None, int]],
    use_cache: bool,
    max_num_seqs: int,
    max_batched_tokens: int,
) -> None:
    model = PretendModel(
        use_cache=use_cache, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens
    )
    everyone: list[Request] = []
    cancel_at: dict[int, list[Request]] = {}
    step = 0
    queue = sorted(arrivals, key=lambda a: a[2])
    while queue or model.scheduler.has_work:
        while queue and queue[0][2] <= step:
            prompt, num_tokens, _, cancel, n = queue.pop(0)
            group = make_group(prompt, min(num_tokens, CONTEXT - len(prompt)), n)
            everyone += group
            for request in group:
                model.scheduler.add(request)
            if cancel is not None:
                cancel_at.setdefault(step + cancel, []).append(group[0])
        for request in cancel_at.pop(step, []):
            if not request.is_finished:
                request.finish_reason = "cancelled"
            model.scheduler.finish(request)
        if model.scheduler.has_work:
            model.step()
        step += 1
        assert step < 5_000, "no progress"
    for request in everyone:
        alone = generate_alone(request.prompt_ids, request.max_tokens)
        whole = request.finish_reason == "length"
        assert request.output_ids == (alone if whole else alone[: request.num_outputs])
        assert request.pages == []
    if model.cache is not None:
        model.cache.clear()
    assert model.pool.num_free == NUM_PAGES


def make_group(prompt: list[int], max_tokens: int, n: int) -> list[Request]:
    group: list[Request] = []
    for index in range(n):
        leader = group[0] if group else None
        group.append(
            Request(
                prompt_ids=prompt,
                params=SamplingParams(),
                max_tokens=max_tokens,
                seed=0,
                leader=leader,
                index=index,
            )
        )
    return group


def test_samples_of_one_prompt_compute_it_once() -> None:
    model = PretendModel(use_cache=True, max_num_seqs=4, max_batched_tokens=64)
    group = make_group(list(range(10)), 3, 3)
    for request in group:
        model.scheduler.add(request)
    while model.scheduler.has_work:
        model.step()
    assert [request.num_cached for request in group] == [0, 9, 9]


def test_the_next_turn_computes_only_its_new_tokens() -> None:
    model = PretendModel(use_cache=True, max_num_seqs=4, max_batched_tokens=64)
    [first] = make_group([1, 2, 3, 4, 5, 6], 7, 1)
    model.scheduler.add(first)
    while model.scheduler.has_work:
        model.step()
    [second] = make_group([*first.tokens, 9, 9], 1, 1)
    model.scheduler.add(second)
    model.step()
    # the last sampled token was never run through the model; all others were
    assert second.num_cached == len(first.tokens) - 1


def finished(model: PretendModel, prompt: list[int], max_tokens: int = 1) -> Request:
    [request] = make_group(prompt, max_tokens, 1)
    model.scheduler.add(request)
    while model.scheduler.has_work:
        model.step()
    return request


def test_a_prompt_that_does_not_fit_yet_evicts_nothing() -> None:
    model = PretendModel(use_cache=True, max_num_seqs=4, max_batched_tokens=64)
    assert model.cache is not None
    finished(model, [0] * 8)
    [running] = make_group([1] * 20, 8, 1)
    model.scheduler.add(running)
    model.step()
    cached = model.cache.num_pages
    [too_long] = make_group([2] * 36, 1, 1)  # 9 pages; the other request holds 5 of the 12
    model.scheduler.add(too_long)
    model.step()
    assert too_long.pages == [] and model.cache.num_pages >= cached


def test_samples_that_wait_for_their_first_let_others_pass() -> None:
    model = PretendModel(use_cache=True, max_num_seqs=4, max_batched_tokens=4)
    group = make_group([1] * 12, 2, 2)
    [other] = make_group([2, 2], 2, 1)
    for request in (*group, other):
        model.scheduler.add(request)
    for _ in range(3):
        model.step()  # the first sample's prompt takes three steps of four tokens
    assert group[1].num_computed == 0
    model.step()
    assert other.num_computed > 0


def test_a_target_bounds_prompts_while_others_decode() -> None:
    pool = PagePool(40)
    scheduler = Scheduler(
        *(pool, None),
        page_size=PAGE,
        max_num_seqs=4,
        max_batched_tokens=64,
        tbt_target_s=0.03,
    )

    def step(seconds: float) -> list[int]:
        """Decodes, then the tokens of each prompt."""
        schedule = scheduler.schedule()
        for chunk in schedule.chunks:
            chunk.request.num_computed = chunk.end
            if chunk.is_last:
                chunk.request.tokens.append(1)
        scheduler.took(schedule, seconds)
        return [len(schedule.decodes), *(chunk.num_tokens for chunk in schedule.prefills)]

    [first] = make_group([1] * 50, 9, 1)
    scheduler.add(first)
    assert step(9.0) == [0, 50]  # nobody waits for a token
    [second] = make_group([2] * 62, 9, 1)
    scheduler.add(second)
    assert step(0.01) == [1, 16]
    assert step(0.01) == [1, 32]
    assert step(0.05) == [1, 14]
    assert step(0.05) == [2]
