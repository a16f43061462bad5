"""Stop strings: streaming equals cutting afterwards, however the text is split."""

from hypothesis import example, given
from hypothesis import strategies as st

from fiddler.text.stop import StopMatcher

letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)
chunked = st.lists(st.text("ab", max_size=4), max_size=8)


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Brute force: the first place where some stop ends, and the longest that ends there."""
    for end in range(len(text) + 1):
        for start in range(end):
            if text[start:end] in stops:
                return text[: end if include else start], text[start:end]
    return text, None


@given(chunks=chunked, stops=stop_lists, include=st.booleans())
@example(chunks=["a", "b", "a", "b", "b"], stops=["abb", "ba"], include=False)
def test_streaming_equals_cutting_afterwards(
    chunks: list[str], stops: list[str], include: bool
) -> None:
    matcher = StopMatcher(stops, include)
    shown, matched = "", None
    for chunk in chunks:
        text, matched = matcher.push(chunk)
        shown += text
        if matched:
            break
    assert (shown + matcher.flush(), matched) == cut("".join(chunks), stops, include)


@given(chunks=chunked, stops=stop_lists)
def test_only_what_may_still_become_a_stop_is_held_back(
    chunks: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    seen, shown = "", ""
    for chunk in chunks:
        seen += chunk
        text, matched = matcher.push(chunk)
        shown += text
        if matched:
            return
        held = seen.removeprefix(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
        longer = [seen[i:] for i in range(len(shown))]
        assert not any(stop.startswith(tail) for tail in longer for stop in stops)


@given(chunks=chunked, stops=stop_lists)
def test_a_match_is_told_at_once_and_ends_the_text(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = ""
    matched = None
    for chunk in chunks:
        seen += chunk
        was_matched = matched
        text, matched = matcher.push(chunk)
        assert (matched is not None) == (cut(seen, stops, False)[1] is not None)
        if was_matched:
            assert (text, matched) == ("", was_matched)
    assert not (matched and matcher.flush())
