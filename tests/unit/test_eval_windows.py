"""Windows over a text: every token once, and with the context that was promised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import ConfigError, PromptError
from fiddler.evaluate.windows import Window, cut_windows


@given(st.data())
def test_every_token_is_scored_once_with_enough_before_it(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 60))
    stride = data.draw(st.integers(1, window - 1))
    num_start = data.draw(st.integers(0, 1))
    num_tokens = data.draw(st.integers(window - num_start, 300))
    windows = cut_windows(num_tokens, window=window, stride=stride, num_start=num_start)
    scored = [token for w in windows for token in range(w.first, w.end)]
    assert scored == list(range(1 - num_start, num_tokens))
    for w in windows:
        assert num_start + w.end - w.begin == window
        assert w.first < w.end <= num_tokens
    for w in windows[1:]:
        assert num_start + w.first - w.begin >= window - stride


def test_the_last_window_reaches_back_for_its_context() -> None:
    windows = cut_windows(11, window=6, stride=3, num_start=0)
    assert windows == [Window(0, 1, 6), Window(3, 6, 9), Window(5, 9, 11)]


def test_a_text_of_one_window() -> None:
    assert cut_windows(5, window=6, stride=3, num_start=1) == [Window(0, 0, 5)]


def test_what_cannot_be_cut() -> None:
    with pytest.raises(PromptError, match="has 5 tokens, less than one window of 6"):
        cut_windows(5, window=6, stride=3, num_start=0)
    with pytest.raises(PromptError, match="has 1 token, less than one window of 6"):
        cut_windows(1, window=6, stride=3, num_start=0)
    for stride in (0, 6, 7):
        with pytest.raises(ConfigError, match="the stride must be between 1 and 5"):
            cut_windows(50, window=6, stride=stride, num_start=0)
    with pytest.raises(ConfigError, match="a window of 1 predicts nothing"):
        cut_windows(50, window=1, stride=1, num_start=0)
