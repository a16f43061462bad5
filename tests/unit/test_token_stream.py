"""Another thread may end a stream at any moment; its last event must still be delivered."""

from collections import deque
from typing import Any

from fiddler.outputs import TokenEvent
from fiddler.stream import TokenStream

LAST = TokenEvent(text="x", token_id=1, finish_reason="length")


class EndedWhileLookedAt(deque[TokenEvent]):
    """Empty when first looked at; right after that look the last event arrives."""

    def __init__(self, sample: "PretendSample") -> None:
        super().__init__()
        self._sample = sample

    def __bool__(self) -> bool:
        had_events = len(self) > 0
        if not self._sample.is_done:
            self.append(LAST)
            self._sample.is_done = True
        return had_events


class PretendSample:
    """The part of a sample that a stream looks at."""

    def __init__(self) -> None:
        self.is_done = False
        self.error: Exception | None = None
        self.request = object()
        self.events = EndedWhileLookedAt(self)


def test_an_event_that_arrives_between_two_looks_is_delivered() -> None:
    samples: list[Any] = [PretendSample()]
    stream = TokenStream(
        samples,
        pump=lambda: None,
        cancel=lambda request, reason: None,
        abandon=lambda request: None,
    )
    assert list(stream) == [LAST]
