"""Stop strings in a stream: what may be the start of one is held back until that is settled."""

from collections.abc import Sequence


class StopMatcher:
    """Cuts a stream at the stop string that is complete first.

    Of several that end at the same character the longest counts. How the text is split into pieces
    never matters: the emitted text is what cutting the whole text afterwards would give. With
    ``include`` the stop string itself is emitted too. Costs O(total length of the stops) a piece.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Return what may be shown now, and the stop string once it is complete.

        After a match every further text is dropped.
        """
        if self._matched is not None or not self._stops:
            return ("" if self._matched else text), self._matched
        text = self._held + text
        found = self._first_complete(text)
        if found is None:
            keep = len(text) - self._num_undecided(text)
            self._held = text[keep:]
            return text[:keep], None
        end, start, self._matched = found
        self._held = ""
        return text[: end if self._include else start], self._matched

    def flush(self) -> str:
        """Return what is held back; called once when the stream has ended without a match."""
        held, self._held = self._held, ""
        return held

    def _first_complete(self, text: str) -> tuple[int, int, str] | None:
        starts = ((text.find(stop), stop) for stop in self._stops)
        return min(((at + len(s), at, s) for at, s in starts if at >= 0), default=None)

    def _num_undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins some stop string."""
        for length in range(min(len(text), max(map(len, self._stops)) - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
