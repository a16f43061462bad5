"""The built-in model's held-out questions, asked as chats and answered greedily."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fiddler.builtin_text.corpus import Message, Question, is_correct
from fiddler.evaluate.figures import Accuracy
from fiddler.outputs import RequestOutput
from fiddler.sampling_params import SamplingParams

LONGEST_ANSWER = 200  # tokens; the longest right one, a story, has some 150
NUM_QUESTIONS = 156  # 12 of each task
SEED = 1

Progress = Callable[[int, int], None]  # questions: done, total


class AnsweringModel(Protocol):
    """What is used of :class:`fiddler.llm.LLM`."""

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]: ...
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams | None = None,
        *,
        on_progress: Progress | None = None,
    ) -> list[RequestOutput]: ...


def answer_questions(
    llm: AnsweringModel, questions: Sequence[Question], on_progress: Progress | None = None
) -> Accuracy:
    """Ask all ``questions`` as one batch and count right answers; what is right, ``is_correct``
    of :mod:`fiddler.builtin_text.corpus` says."""
    prompts = [llm.apply_chat_template(_copied(messages)) for messages, _, _ in questions]
    params = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0)
    outputs = llm.generate(prompts, params, on_progress=on_progress)
    return accuracy(questions, [output.text for output in outputs])


def accuracy(questions: Sequence[Question], replies: Sequence[str]) -> Accuracy:
    """Compare ``replies``, one to each question, with what was expected."""
    return Accuracy.of(
        (task, is_correct(reply, expected, task))
        for (_, expected, task), reply in zip(questions, replies, strict=True)
    )


def _copied(messages: list[Message]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]
