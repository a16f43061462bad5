"""Facts that the user tells of himself, and questions about them later in the chat."""

from random import Random

from fiddler.builtin_text import words
from fiddler.builtin_text.dialogue import NOTED, Dialogue, reworded
from fiddler.builtin_text.facts import Facts, fill, random_facts
from fiddler.builtin_text.prose import person

# attribute -> (statements, questions, answer, answer when it was not told)
_OF_USER: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "name": (
        ("My name is {n}.", "I am {n}.", "Call me {n}.", "I'm {n}.", "Hi, I am {n}."),
        ("What is my name?", "Who am I?", "Do you know my name?", "What am I called?"),
        "Your name is {n}.",
        "You did not tell me your name.",
    ),
    "town": (
        ("I live in {town}.", "My home is in {town}.", "I am from {town}."),
        ("Where do I live?", "Where is my home?", "Where am I from?"),
        "You live in {town}.",
        "You did not tell me where you live.",
    ),
    "job": (
        ("I am {a_job}.", "I work as {a_job}.", "My job is {job}."),
        ("What is my job?", "What do I do for a living?", "What do I work as?"),
        "You are {a_job}.",
        "You did not tell me your job.",
    ),
    "thing": (
        ("I own {a_colour} {thing}.", "I have {a_colour} {thing}."),
        ("What do I own?", "What do I have?"),
        "You own {a_colour} {thing}.",
        "You did not tell me what you own.",
    ),
    "food": (
        ("I like {food}.", "My favourite food is {food}.", "I like to eat {food}."),
        ("What do I like?", "What is my favourite food?", "What do I like to eat?"),
        "You like {food}.",
        "You did not tell me what you like.",
    ),
    "sport": (
        ("I enjoy {sport}.", "My hobby is {sport}."),
        ("What do I enjoy?", "What is my hobby?"),
        "You enjoy {sport}.",
        "You did not tell me what you enjoy.",
    ),
    "age": (
        ("I am {age} years old.", "My age is {age}.", "I am {age}."),
        ("How old am I?", "What is my age?"),
        "You are {age} years old.",
        "You did not tell me your age.",
    ),
}


def about_user(rng: Random) -> Dialogue:
    """The user tells one to three things of himself and asks for one or two of them, or others."""
    name, facts = person(rng), random_facts(rng, rng.choice(words.JOBS))
    kinds = rng.sample(sorted(_OF_USER), rng.choice((0, 1, 1, 2, 3)))
    told = [fill(rng.choice(_OF_USER[kind][0]), name, facts) for kind in kinds]
    asked = [_question(rng, kinds, name, facts) for _ in range(rng.choice((1, 1, 2)))]
    key = f"user {' '.join(told)} {asked[-1][0]}"
    if rng.random() < 0.5:
        turns = [(reworded(rng, line), NOTED) for line in told]
    else:
        turns = [(" ".join(told), NOTED)] if told else []
    return Dialogue("user", key if told else "stranger", (*turns, *asked))


def _question(rng: Random, told: list[str], name: str, facts: Facts) -> tuple[str, str]:
    asked = rng.choice(told) if told and rng.random() < 0.8 else rng.choice(sorted(_OF_USER))
    _, questions, answer, unknown = _OF_USER[asked]
    return reworded(rng, rng.choice(questions)), fill(
        answer if asked in told else unknown, name, facts
    )
