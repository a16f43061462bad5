"""The page pool and the prefix cache against a plain model of what they must hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.engine.pages import PagePool
from fiddler.engine.prefix_cache import PrefixCache

PAGE = 4
texts = st.lists(st.integers(0, 2), min_size=1, max_size=20)


def store(pool: PagePool, cache: PrefixCache, tokens: list[int]) -> None:
    """Compute ``tokens`` as a request would: own pages, remembered, given back."""
    pages = [pool.allocate() for _ in range(-(-len(tokens) // PAGE))]
    cache.insert(tokens, pages)
    pool.release(pages)


def common(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@given(st.lists(texts, max_size=8), texts)
def test_match_is_the_longest_common_beginning(stored: list[list[int]], asked: list[int]) -> None:
    pool = PagePool(1000)
    cache = PrefixCache(pool, PAGE)
    for tokens in stored:
        store(pool, cache, tokens)
    match = cache.match(asked)
    best = max((common(asked, tokens) for tokens in stored), default=0)
    assert len(match.shared) * PAGE + match.num_copied == best


@given(st.lists(texts, min_size=1, max_size=8))
def test_matched_pages_are_those_that_were_written(stored: list[list[int]]) -> None:
    """Each page remembers what its owner wrote; a match must point at exactly those tokens."""
    pool, contents = PagePool(1000), {}
    cache = PrefixCache(pool, PAGE)
    for tokens in stored:
        pages = [pool.allocate() for _ in range(-(-len(tokens) // PAGE))]
        for i, page in enumerate(pages):
            contents[page] = tokens[i * PAGE : (i + 1) * PAGE]
        cache.insert(tokens, pages)
        pool.release(pages)
    for tokens in stored:
        match = cache.match(tokens)
        found = [t for page in match.shared for t in contents[page]]
        if match.num_copied:
            found += contents[match.copied_page][: match.num_copied]
        assert found == tokens


@given(st.lists(texts, max_size=10), st.integers(0, 60))
def test_eviction_frees_what_it_says_and_clear_frees_all(
    stored: list[list[int]], asked: int
) -> None:
    pool = PagePool(1000)
    cache = PrefixCache(pool, PAGE)
    for tokens in stored:
        store(pool, cache, tokens)
    held = pool.num_pages - pool.num_free
    assert held == cache.num_pages
    freed = cache.evict(asked)
    assert freed == min(asked, held)
    assert pool.num_free == pool.num_pages - held + freed
    cache.clear()
    assert pool.num_free == pool.num_pages and cache.num_pages == 0


def test_pages_in_use_are_not_evicted() -> None:
    pool = PagePool(10)
    cache = PrefixCache(pool, PAGE)
    store(pool, cache, list(range(8)))
    match = cache.match(list(range(8)))
    for page in match.shared:
        pool.retain(page)
    assert cache.evict(10) == 0
    pool.release(match.shared)
    assert cache.evict(10) == 2


def test_a_page_cannot_be_released_twice() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.release([page])
    with pytest.raises(AssertionError, match="twice"):
        pool.release([page])


def test_a_long_conversation_does_not_recurse() -> None:
    pool = PagePool(20_000)
    cache = PrefixCache(pool, PAGE)
    store(pool, cache, [i % 7 for i in range(60_000)])
    assert cache.evict(20_000) == 15_000
