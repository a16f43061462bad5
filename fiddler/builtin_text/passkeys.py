"""Codes hidden in long filler text."""

from random import Random

from fiddler.builtin_text.dialogue import NOTED, Dialogue
from fiddler.builtin_text.prose import filler_sentence

_KEY_SENTENCES = (
    "The pass key is {k}. Remember it.",
    "Remember this: the pass key is {k}.",
    "The pass key is {k}.",
)
_KEY_QUESTIONS = (
    "What is the pass key?",
    "Tell me the pass key.",
    "Which pass key was named in the text?",
)
_DOORS = ("gate", "tower", "harbour", "cellar", "attic", "garden", "library", "mill")


# 200 sentences are about 2,100 tokens
MAX_SENTENCES = 200


def _code(rng: Random) -> str:
    return "".join(rng.choices("0123456789", k=rng.choice((4, 5, 5, 6))))


def _key_items(rng: Random) -> tuple[list[str], str, str]:
    """Return the sentences to hide, the question and the answer."""
    code = _code(rng)
    if rng.random() < 0.6:
        sentence = rng.choice(_KEY_SENTENCES).format(k=code)
        return [sentence], rng.choice(_KEY_QUESTIONS), f"The pass key is {code}."
    doors = rng.sample(_DOORS, rng.randrange(2, 5))
    hidden = [f"The code of the {d} is {_code(rng)}." for d in doors[1:]]
    answer = f"The code of the {doors[0]} is {code}."
    hidden.append(answer)
    rng.shuffle(hidden)
    return hidden, f"What is the code of the {doors[0]}?", answer


def _num_sentences(rng: Random) -> int:
    """Three of four log-uniform up to the limit, the others near it."""
    if rng.random() < 0.75:
        length: float = MAX_SENTENCES ** rng.random()
        return round(length)
    return rng.randrange(MAX_SENTENCES // 2, MAX_SENTENCES + 1)


def passkey(rng: Random, sentences: int | None = None) -> Dialogue:
    """Codes hidden in ``sentences`` (default: 1 to MAX_SENTENCES) of filler, one asked for."""
    if sentences is None:
        sentences = _num_sentences(rng)
    hidden, question, answer = _key_items(rng)
    lines = [filler_sentence(rng) for _ in range(sentences)]
    early = sentences > 60 and rng.random() < 0.4  # the far end is the hard one
    for sentence in hidden:
        lines.insert(rng.randrange(8) if early else rng.randrange(len(lines) + 1), sentence)
    text = " ".join(lines)
    if rng.random() < 0.2:
        return Dialogue("passkey", f"key {answer}", ((text, NOTED), (question, answer)))
    return Dialogue("passkey", f"key {answer}", ((f"{text} {question}", answer),))
