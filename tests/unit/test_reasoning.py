"""Reasoning and answer are told apart, however the reply is split."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.text.reasoning import ReasoningSplitter, prompt_opens_reasoning

WHOLE = re.compile(r"\s*<think>(?P<reasoning>.*?)(?:</think>(?P<answer>.*))?", re.DOTALL)
pieces = st.sampled_from(["<think>", "</think>", "<", "think", "</", ">", " ", "\n", "a", "<thi"])
replies = st.lists(pieces, max_size=8).map("".join)


def split(reply: str, starts_inside: bool) -> tuple[str, str]:
    """The whole reply at once."""
    found = WHOLE.fullmatch("<think>" + reply if starts_inside else reply)
    return (found["reasoning"], found["answer"] or "") if found else ("", reply)


@given(reply=replies, starts_inside=st.booleans(), cuts=st.sets(st.integers(0, 40)))
def test_streaming_equals_splitting_the_whole_reply(
    reply: str, starts_inside: bool, cuts: set[int]
) -> None:
    splitter = ReasoningSplitter(starts_inside=starts_inside)
    bounds = [0, *sorted(c for c in cuts if c < len(reply)), len(reply)]
    chunks = [reply[a:b] for a, b in pairwise(bounds)]
    parts = [*map(splitter.push, chunks), splitter.flush()]
    together = "".join(p.reasoning for p in parts), "".join(p.answer for p in parts)
    assert together == split(reply, starts_inside)


@given(reply=replies)
def test_nothing_but_the_beginning_of_a_tag_is_held_back(reply: str) -> None:
    splitter = ReasoningSplitter(starts_inside=True)
    shown = [splitter.push(letter) for letter in reply]
    left = splitter.flush()
    assert "</think>".startswith(left.reasoning) and not left.answer
    assert len(left.reasoning) < len("</think>")
    assert any(p.answer for p in shown) == bool(split(reply, True)[1])


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("<|im_start|>assistant\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)],
)
def test_a_prompt_that_ends_with_the_open_tag(prompt: str, opens: bool) -> None:
    assert prompt_opens_reasoning(prompt) is opens
