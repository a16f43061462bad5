"""Keeps the KV of finished text, so that a prompt that begins the same way need not be computed.

A tree with one page per node: a node's tokens are those whose KV its page holds, a full page except
for leaves. A prompt shares the full pages it matches; of the first page that differs it can still
use the common beginning, by copying that page (so a chat turn computes its new tokens only).
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

from fiddler.engine.pages import PagePool


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """``shared`` pages are full; of ``copied_page``, ``num_copied`` tokens can be copied."""

    shared: tuple[int, ...]
    copied_page: int = -1
    num_copied: int = 0


@dataclass(slots=True, eq=False)
class _Node:
    tokens: tuple[int, ...]
    page: int
    parent: Optional["_Node"]
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    last_used: int = 0


class PrefixCache:
    """A tree of pages, each held once by the tree; the least recently used leaves give way."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self._root = _Node((), -1, None)
        self._clock = itertools.count(1)
        self.num_pages = 0

    def match(self, tokens: Sequence[int]) -> PrefixMatch:
        """Find the longest cached beginning of ``tokens``; retains nothing."""
        shared: list[int] = []
        node, now = self._root, next(self._clock)
        for chunk in _chunks(tokens, self._page_size):
            child = node.children.get(chunk) if len(chunk) == self._page_size else None
            if child is None:
                page, length = self._longest(node, chunk, now)
                return PrefixMatch(tuple(shared), page, length)
            child.last_used = now
            shared.append(child.page)
            node = child
        return PrefixMatch(tuple(shared))

    def insert(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remember that ``pages`` hold the KV of ``tokens``; the tree becomes a holder of new ones.

        The owner may go on appending to the last page: only the offsets named here are ever read.
        """
        node, now = self._root, next(self._clock)
        for chunk, page in zip(_chunks(tokens, self._page_size), pages, strict=False):
            child = self._child(node, chunk, page)
            if child is None:
                return  # a cached page already holds these tokens and more
            child.last_used = now
            node = child

    def evict(self, num_pages: int) -> int:
        """Free up to ``num_pages`` pages that nobody else holds; return how many."""
        leaves = [(n.last_used, id(n), n) for n in self._walk() if self._is_evictable(n)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < num_pages:
            node = heapq.heappop(leaves)[2]
            parent = node.parent
            assert parent is not None
            self._remove(node)
            freed += 1
            if parent is not self._root and self._is_evictable(parent):
                heapq.heappush(leaves, (parent.last_used, id(parent), parent))
        return freed

    @property
    def num_unheld(self) -> int:
        """Pages that only the tree holds: at most so many can be evicted."""
        return sum(self._pool.num_holders(node.page) == 1 for node in self._walk())

    def clear(self) -> None:
        """Forget everything."""
        for node in list(self._walk()):
            self._pool.release([node.page])
        self._root.children.clear()
        self.num_pages = 0

    def _longest(self, node: _Node, chunk: tuple[int, ...], now: int) -> tuple[int, int]:
        best, length = None, 0
        for child in node.children.values():
            common = _common_length(child.tokens, chunk)
            if common > length:
                best, length = child, common
        if best is None:
            return -1, 0
        best.last_used = now
        return best.page, length

    def _child(self, node: _Node, chunk: tuple[int, ...], page: int) -> _Node | None:
        for child in node.children.values():
            if child.tokens == chunk:
                return child
            if len(child.tokens) > len(chunk) and child.tokens[: len(chunk)] == chunk:
                return None
            if chunk[: len(child.tokens)] == child.tokens:  # a shorter leaf: this page is better
                self._remove(child)
                break
        child = _Node(chunk, page, node)
        self._pool.retain(page)
        self.num_pages += 1
        node.children[chunk] = child
        return child

    def _is_evictable(self, node: _Node) -> bool:
        return not node.children and self._pool.num_holders(node.page) == 1

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None and not node.children
        del node.parent.children[node.tokens]
        self._pool.release([node.page])
        self.num_pages -= 1

    def _walk(self) -> Iterator[_Node]:
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node


def _chunks(tokens: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(0, len(tokens), size)]


def _common_length(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
