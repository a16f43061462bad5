"""Prose of the invented world: filler sentences and short stories, all from a seeded generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from fiddler.builtin_text import words

_FILLER = (
    "The {adjective} {animal} {verb} {preposition} the {place}.",
    "There are {number} {things} {preposition} the {place}.",
    "{person} {verb} in the {place} all {time}.",
    "It was {a_weather} {time} in {town}.",
    "The {job} put {a_colour} {object} {preposition} the {place}.",
    "{person} and {person} {verb} {preposition} the {place}.",
    "The {place} is {adjective} and the {place} is {adjective}.",
    "Nobody {verb} in the {place}, because it was too {weather}.",
)
_OPENINGS = (
    "Once upon a time there was {a_adjective} {kind} named {name}.",
    "Once there lived {a_adjective} {kind} named {name} near the {home}.",
    "Long ago, {a_adjective} {kind} named {name} lived beside the {home}.",
)
# {friend}, {shade}, {craft}: drawn once for a story; the others of words.txt: anew at each place
_PLOTS = (
    (
        "{name} had a {shade} {thing} and loved it very much.",
        "One {time} the {thing} was gone.",
        "{name} looked in the {home}, but the {thing} was not there.",
        'Then a kind {friend} came and said, "I saw your {thing} near the {place}."',
        "They went there together and found the {shade} {thing} under a tree.",
        "{name} thanked the {friend}, and from that day they were friends.",
    ),
    (
        "One cold night a storm came over the {home}.",
        "{name} heard a small voice outside and opened the door.",
        "A wet {friend} stood in the rain.",
        '"Come in," said {name}, and put {a_thing} beside the fire.',
        "The {friend} was soon warm, and they talked until the storm was over.",
        "In the end both were {feeling}.",
    ),
    (
        "{name} wanted to see the {goal} behind the hills.",
        "So {name} took {a_thing} and some {food} and left the {home}.",
        "On the way {name} met a hungry {friend}.",
        "They shared the {food} and walked on together.",
        "At last they saw the {goal}, and it was more beautiful than they had thought.",
        "{name} was {feeling} and went home with a new friend.",
    ),
    (
        "{name}'s best friend was {a_friend}.",
        "The {friend} had a birthday, and {name} wanted to give it something.",
        "{name} worked for the {craft} at the {home} for three days.",
        "Then {name} bought {a_colour} {thing}.",
        "When the {friend} saw the {thing}, it danced with joy.",
        '"This is the best gift of all," said the {friend}.',
    ),
    (
        "Every {time} {name} went to the {home} with {a_thing}.",
        "One day the {thing} broke, and {name} was sad.",
        'The old {craft} saw this and asked, "Why do you cry?"',
        '"My {thing} is broken," said {name}.',
        "The {craft} worked all night, and in the morning the {thing} was as good as new.",
        "{name} was {feeling} and never forgot the {craft}.",
    ),
    (
        "{name} found {a_thing} full of seeds at the {home}.",
        "{name} put the seeds into the earth and gave them water every day.",
        'A proud {friend} laughed and said, "Nothing will grow there."',
        "But in the summer the garden was green and full of flowers.",
        "{name} gave {food} to everyone, even to the {friend}.",
        "The {friend} was sorry, and the next year it helped.",
    ),
)


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LETTER_WEIGHTS = (8, 2, 3, 4, 12, 2, 2, 4, 7, 1, 1, 4, 2, 7, 8, 2, 1, 6, 6, 9, 3, 1, 2, 1, 2, 1)


@dataclass(frozen=True, slots=True)
class Cast:
    """Who and what a story is about."""

    kind: str
    name: str
    thing: str
    place: str


class _Draw(dict[str, str]):
    """A mapping for ``format_map``: what it does not hold is drawn anew from the word lists."""

    def __init__(self, rng: Random, **fixed: str) -> None:
        super().__init__(**fixed)
        self.rng = rng

    def __missing__(self, field: str) -> str:
        if field.startswith("a_"):
            return with_article(self[field[2:]])
        if field == "number":
            return str(self.rng.randrange(2, 400))
        if field == "person":
            return person(self.rng)
        if field == "town":
            return town(self.rng)
        return self.rng.choice(words.BY_FIELD[field])


def with_article(noun: str) -> str:
    """Return ``noun`` behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def join_words(items: Sequence[str]) -> str:
    """Join as English does: "a", "a and b", "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def invented_word(rng: Random, syllables: int) -> str:
    """Return a lower-case word of ``syllables`` invented syllables."""
    parts = [rng.choice(words.ONSETS) + rng.choice(words.VOWELS) for _ in range(syllables)]
    return "".join(parts) + rng.choice(words.CODAS)


def open_word(rng: Random) -> str:
    """Return any lower-case word: a common one, an invented one, or mere letters."""
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(words.COMMON)
    if draw < 0.75:
        return invented_word(rng, rng.choice((1, 2, 2, 3)))
    return "".join(rng.choices(_LETTERS, _LETTER_WEIGHTS, k=rng.randrange(3, 9)))


def noun(rng: Random, known: Sequence[str]) -> str:
    """Return one of ``known``, or in one of five cases any word at all."""
    return open_word(rng) if rng.random() < 0.2 else rng.choice(known)


def person(rng: Random) -> str:
    """Return a name: a common one, or in four of ten cases an unheard one."""
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(words.NAMES)
    if draw < 0.7:
        return open_word(rng).capitalize()
    return invented_word(rng, rng.choice((1, 2, 2))).capitalize()


def town(rng: Random) -> str:
    """Return the name of a town: put together, or in four of ten cases an unheard one."""
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(words.TOWN_STARTS) + rng.choice(words.TOWN_ENDS)
    if draw < 0.7:
        return open_word(rng).capitalize()
    return invented_word(rng, 2).capitalize()


def filler_sentence(rng: Random) -> str:
    """Return one sentence that answers no question; some hold a number, to distract."""
    return rng.choice(_FILLER).format_map(_Draw(rng))


def filler(rng: Random, num_sentences: int) -> str:
    """Return ``num_sentences`` sentences of filler."""
    return " ".join(filler_sentence(rng) for _ in range(num_sentences))


def random_cast(rng: Random) -> Cast:
    """Return a hero, a thing and a place at random."""
    return Cast(
        kind=noun(rng, words.ANIMALS + words.JOBS),
        name=person(rng),
        thing=noun(rng, words.OBJECTS),
        place=noun(rng, words.PLACES),
    )


def story(rng: Random, cast: Cast) -> str:
    """Return a grammatical story of 8 or 9 sentences that names all of ``cast``."""
    drawn = _Draw(
        rng,
        kind=cast.kind,
        name=cast.name,
        thing=cast.thing,
        home=cast.place,
        goal=rng.choice([place for place in words.PLACES if place != cast.place]),
        friend=rng.choice([animal for animal in words.ANIMALS if animal != cast.kind]),
        shade=rng.choice([colour for colour in words.COLOURS if colour != "orange"]),
        craft=rng.choice([job for job in words.JOBS if job != cast.kind]),
        food=rng.choice(words.FOODS),
    )
    lines = [rng.choice(_OPENINGS), *rng.choice(_PLOTS)]
    if not any("{home}" in line for line in lines):
        lines.append("They still meet at the {home} today.")
    return " ".join(line.format_map(drawn) for line in [*lines, "The end."])
