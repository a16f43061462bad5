"""Copying, reversing and spelling of words, mostly invented ones."""

from random import Random

from fiddler.builtin_text import words
from fiddler.builtin_text.dialogue import Dialogue, reworded
from fiddler.builtin_text.prose import filler_sentence, open_word, person

_COPY_FORMS = (
    "Repeat: {w}",
    "Repeat these words: {w}",
    "Copy this: {w}",
    "Say: {w}",
    "Repeat after me: {w}",
    "Write these words: {w}",
    'Say "{w}"',
    'Repeat "{w}".',
    "Say {w}",
)
_REVERSE_FORMS = (
    "Reverse the order of these words: {w}",
    "Say these words backwards: {w}",
    "Reverse these words: {w}",
    "Reverse: {w}",
    "Repeat in reverse order: {w}",
)
_SPELL_FORMS = (
    "Spell {w}.",
    "Spell the word {w}.",
    "How do you spell {w}?",
    "Can you spell {w}?",
    "Spell: {w}",
)
_MIRROR_FORMS = (
    "Spell {w} backwards.",
    "Reverse the letters of {w}.",
    "Spell the word {w} backwards.",
    "What is {w} spelled backwards?",
)


def _item(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.1:
        return str(rng.randrange(1000))
    if draw < 0.35:
        return open_word(rng)
    if draw < 0.45:
        return person(rng)
    return rng.choice(
        rng.choice((words.OBJECTS, words.ANIMALS, words.COLOURS, words.FOODS, words.ADJECTIVES))
    )


def copy(rng: Random) -> Dialogue:
    """Repeat a list of 1 to 12 items, a sentence, or one word several times."""
    draw = rng.random()
    if draw < 0.2:
        word, times = _item(rng), rng.randrange(2, 7)
        question = rng.choice(("Say {w} {n} times.", "Repeat the word {w} {n} times."))
        answer = " ".join([word] * times)
        turn = question.format(w=word, n=times), answer
        key = f"times {word} {times}"
    else:
        text = " ".join(_item(rng) for _ in range(rng.randrange(1, 13)))
        if draw < 0.4:
            text = filler_sentence(rng)
        turn = rng.choice(_COPY_FORMS).format(w=text), text
        key = f"copy {text}"
    return Dialogue("copy", key, (turn,))


def reverse(rng: Random) -> Dialogue:
    """Say 2 to 7 items in reverse order."""
    items = [_item(rng) for _ in range(rng.randrange(2, 8))]
    question = rng.choice(_REVERSE_FORMS).format(w=" ".join(items))
    return Dialogue("reverse", f"rev {items}", ((question, " ".join(reversed(items))),))


def _word(rng: Random) -> tuple[str, str]:
    """Return a word and its key: the listed words are few, so that only others are held out."""
    if rng.random() < 0.7:
        word = open_word(rng)
        key = "listed word" if word in words.COMMON else f"spell {word}"
        return word.capitalize() if rng.random() < 0.15 else word, key
    lists = (words.OBJECTS, words.ANIMALS, words.COLOURS, words.FOODS, words.ADJECTIVES)
    return rng.choice(rng.choice((*lists, words.JOBS, words.PLACES, words.NAMES))), "listed word"


def spell(rng: Random) -> Dialogue:
    """Letters of a word, forwards, or backwards for words of up to 6 letters."""
    word, key = _word(rng)
    if rng.random() < 0.4 and len(word) <= 6:
        question, letters = rng.choice(_MIRROR_FORMS), word[::-1]
    else:
        question, letters = rng.choice(_SPELL_FORMS), word
    turn = reworded(rng, question.format(w=word)), "-".join(letters)
    return Dialogue("spell", key, (turn,))
