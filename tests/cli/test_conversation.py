"""A conversation is a value: operations give new ones and undo each other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.conversation import Conversation, alternates

texts = st.text(max_size=20)
turns = st.lists(st.tuples(texts, texts), max_size=5)


def talk(exchanges: list[tuple[str, str]], system: str = "") -> Conversation:
    conversation = Conversation(system=system)
    for question, answer in exchanges:
        conversation = conversation.ask(question).answered(answer, "stop")
    return conversation


@given(exchanges=turns, question=texts, answer=texts)
def test_undo_takes_back_one_exchange(
    exchanges: list[tuple[str, str]], question: str, answer: str
) -> None:
    before = talk(exchanges)
    assert before.ask(question).answered(answer, "stop").undone() == before


@given(exchanges=turns, count=st.integers(0, 7), system=texts)
def test_forgetting_keeps_the_latest(
    exchanges: list[tuple[str, str]], count: int, system: str
) -> None:
    assert talk(exchanges, system).without_oldest(count) == talk(exchanges[count:], system)


@given(exchanges=turns, question=texts, answer=texts)
def test_asking_again_brings_back_the_question(
    exchanges: list[tuple[str, str]], question: str, answer: str
) -> None:
    asked = talk(exchanges).ask(question)
    assert asked.answered(answer, "length").asked_again() == asked


@given(exchanges=turns, system=texts)
def test_the_model_sees_every_message_in_order(
    exchanges: list[tuple[str, str]], system: str
) -> None:
    seen = talk(exchanges, system).for_model()
    if system:
        assert seen.pop(0) == {"role": "system", "content": system}
    assert [message["content"] for message in seen] == [text for pair in exchanges for text in pair]
    assert alternates(talk(exchanges).messages)


def test_attachments_go_before_the_next_message_only() -> None:
    asked = Conversation().attach("file one").attach("file two").ask("what is this?")
    assert asked.messages[-1].content == "file one\n\nfile two\n\nwhat is this?"
    assert asked.attached == ()


def test_clear_keeps_the_system_prompt() -> None:
    conversation = talk([("a", "b")], system="be brief").attach("file")
    assert conversation.cleared() == Conversation(system="be brief")


def test_two_questions_in_a_row_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        Conversation().ask("a").ask("b")
