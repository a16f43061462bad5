"""Log-probabilities against a float64 softmax sorted by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fiddler.engine.logprobs import token_logprobs

rows = st.lists(
    st.lists(st.integers(-240, 240).map(lambda i: i / 8), min_size=7, max_size=7),
    min_size=1,
    max_size=4,
)


def by_hand(row: list[float]) -> list[float]:
    highest = max(row)
    log_total = highest + math.log(math.fsum(math.exp(x - highest) for x in row))
    return [x - log_total for x in row]


@given(rows, st.integers(0, 9), st.data())
def test_values_ranks_and_tokens(
    logits: list[list[float]], num_top: int, data: st.DataObject
) -> None:
    chosen = [data.draw(st.integers(0, 6)) for _ in logits]
    found = token_logprobs(torch.tensor(logits), chosen, num_top, lambda t: f"<{t}>")
    assert len(found) == len(logits)
    for row, token, entries in zip(logits, chosen, found, strict=True):
        wanted = by_hand(row)
        assert token in entries
        # the token itself, and num_top more unless it is one of them
        assert min(num_top, 7) <= len(entries) <= min(num_top, 7) + 1
        for i, entry in entries.items():
            assert entry.logprob == pytest.approx(wanted[i], abs=1e-4)
            assert entry.decoded_token == f"<{i}>"
            num_larger = sum(x > row[i] for x in row)
            num_equal = sum(x == row[i] for x in row)
            assert num_larger < entry.rank <= num_larger + num_equal
        others = [x for i, x in enumerate(row) if i not in entries]
        if num_top and others:
            top = [row[i] for i, e in entries.items() if e.rank <= num_top]
            assert min(top) >= max(others)


def test_best_token_has_rank_one_and_nothing_asked_gives_the_token_alone() -> None:
    [entries] = token_logprobs(torch.tensor([[0.0, 3.0, 1.0]]), [1], 0, str)
    assert list(entries) == [1] and entries[1].rank == 1


def test_the_most_likely_come_first() -> None:
    [entries] = token_logprobs(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), [0], 3, str)
    assert list(entries) == [1, 3, 2, 0]
    assert [e.rank for e in entries.values()] == [1, 2, 3, 4]


def test_no_rows_are_no_error() -> None:
    assert token_logprobs(torch.zeros(0, 5), [], 3, str) == []
