"""The KV page pool: which of the pages are in use, and by how many holders. Pure bookkeeping."""

from collections import deque
from collections.abc import Iterable


class PagePool:
    """Reference-counted page ids ``0 .. num_pages - 1``; a page with no holder is free."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > 0
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be allocated right now."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a free page; the caller holds it."""
        page = self._free.popleft()
        self._holders[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Add a holder to a page in use."""
        assert self._holders[page] > 0, f"page {page} is free"
        self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder of each page; the last one frees it."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} was released twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def num_holders(self, page: int) -> int:
        """How many hold ``page`` (0: it is free)."""
        return self._holders[page]
