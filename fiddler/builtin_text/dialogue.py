"""What a task of the built-in model writes: a dialogue with its answers.

The ``key`` of a dialogue is its content alone, without the wording, so that a content held out in
one wording is held out in all.
"""

from dataclasses import dataclass
from random import Random

# the reply to a statement that asks nothing
NOTED = "I will remember that."


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns of one task; ``keywords`` is set where the answer is free text that must hold them."""

    task: str
    key: str
    turns: tuple[tuple[str, str], ...]
    system: str = ""
    keywords: tuple[str, ...] = ()


def reworded(rng: Random, text: str) -> str:
    """Vary the surface as people type: lower case, no full stop, a "please" or a greeting."""
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12 and text[-1] in ".?":
        text = text[:-1].rstrip()
    draw = rng.random()
    if draw < 0.04:
        text = f"Please {text[0].lower()}{text[1:]}"
    elif draw < 0.08:
        text = f"{rng.choice(('Hi', 'Hello', 'Hey'))}{rng.choice(',!')} {text}"
    return text
