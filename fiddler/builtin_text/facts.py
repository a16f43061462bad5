"""Facts about invented people, stated in the prompt, and questions about them."""

from random import Random

from fiddler.builtin_text import words
from fiddler.builtin_text.dialogue import NOTED, Dialogue
from fiddler.builtin_text.prose import filler_sentence, noun, open_word, person, town, with_article

Facts = dict[str, str]

# what may follow the name of a person; two of them are sometimes joined by "and"
PREDICATES: dict[str, tuple[str, ...]] = {
    "town": ("lives in {town}",),
    "job": ("is {a_job}", "works as {a_job}"),
    "thing": ("owns {a_colour} {thing}", "has {a_colour} {thing}"),
    "food": ("likes {food}", "likes to eat {food}"),
    "sport": ("enjoys {sport}",),
    "age": ("is {age} years old",),
}
_OTHER_STATEMENTS: dict[str, tuple[str, ...]] = {
    "town": ("{n}'s home is in {town}.", "The home of {n} is {town}."),
    "job": ("{n}'s job: {job}.", "The job of {n} is {job}."),
    "thing": ("The {colour} {thing} belongs to {n}.",),
    "food": ("{n}'s favourite food is {food}.",),
    "sport": ("{n}'s hobby is {sport}.",),
    "age": ("The age of {n} is {age}.",),
}
# attribute -> (questions, answer, answer when it is not known); {n} is the person
ASKED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "town": (
        ("Where does {n} live?", "In which town does {n} live?", "Where is {n}'s home?"),
        "{n} lives in {town}.",
        "I do not know where {n} lives.",
    ),
    "job": (
        ("What is {n}'s job?", "What does {n} do for a living?", "What is the job of {n}?"),
        "{n} is {a_job}.",
        "I do not know the job of {n}.",
    ),
    "thing": (
        ("What does {n} own?", "What does {n} have?"),
        "{n} owns {a_colour} {thing}.",
        "I do not know what {n} owns.",
    ),
    "colour": (
        ("What colour is {n}'s {thing}?", "What is the colour of {n}'s {thing}?"),
        "{n}'s {thing} is {colour}.",
        "I do not know what {n} owns.",
    ),
    "food": (
        ("What food does {n} like?", "What does {n} like to eat?", "What does {n} like?"),
        "{n} likes {food}.",
        "I do not know what {n} likes.",
    ),
    "sport": (
        ("What does {n} enjoy?", "What is {n}'s hobby?"),
        "{n} enjoys {sport}.",
        "I do not know what {n} enjoys.",
    ),
    "age": (
        ("How old is {n}?", "What is the age of {n}?"),
        "{n} is {age} years old.",
        "I do not know how old {n} is.",
    ),
}
_REVERSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "town": (("Who lives in {town}?",), "{n} lives in {town}.", "I do not know who lives there."),
    "job": (
        ("Who is the {job}?", "Who works as {a_job}?"),
        "{n} is the {job}.",
        "I do not know who the {job} is.",
    ),
    "thing": (
        ("Who owns the {thing}?", "Who has {a_colour} {thing}?", "Who has the {thing}?"),
        "{n} owns the {thing}.",
        "I do not know who owns the {thing}.",
    ),
    "food": (("Who likes {food}?",), "{n} likes {food}.", "I do not know who likes {food}."),
    "sport": (("Who enjoys {sport}?",), "{n} enjoys {sport}.", "I do not know who enjoys {sport}."),
    "age": (
        ("Who is {age} years old?",),
        "{n} is {age} years old.",
        "I do not know who is so old.",
    ),
}
_TWO_STEPS: dict[str, tuple[str, str]] = {
    "town": ("Where does the {job} live?", "The {job} is {n}. {n} lives in {town}."),
    "thing": ("What does the {job} own?", "The {job} is {n}. {n} owns {a_colour} {thing}."),
    "food": ("What does the {job} like to eat?", "The {job} is {n}. {n} likes {food}."),
    "age": ("How old is the {job}?", "The {job} is {n}. {n} is {age} years old."),
    "sport": ("What does the {job} enjoy?", "The {job} is {n}. {n} enjoys {sport}."),
}


def random_facts(rng: Random, job: str) -> Facts:
    """Return one value for each attribute of a person."""
    return {
        "town": town(rng),
        "job": job,
        "colour": rng.choice(words.COLOURS),
        "thing": noun(rng, words.OBJECTS),
        "food": noun(rng, words.FOODS),
        "sport": rng.choice(words.SPORTS),
        "age": str(rng.randrange(5, 90)),
    }


def fill(text: str, name: str, facts: Facts) -> str:
    """Put the name and the facts into ``text``."""
    job, colour = with_article(facts["job"]), with_article(facts["colour"])
    return text.format(n=name, a_job=job, a_colour=colour, **facts)


class _World:
    """One to five people with some of their attributes stated, and questions about them."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        jobs = rng.sample(words.JOBS, 6)
        if rng.random() < 0.2:
            jobs[0] = open_word(rng)
        size = rng.choice((1, 2, 2, 3, 3, 4, 5))
        self.people: dict[str, Facts] = {}
        while len(self.people) < size:
            self.people[person(rng)] = random_facts(rng, jobs[len(self.people)])
        kinds = rng.sample(sorted(PREDICATES), rng.choice((1, 2, 2, 3, 4)))
        stated = {(n, k) for n in self.people for k in kinds if rng.random() < 0.9}
        self.stated = sorted(stated | {(next(iter(self.people)), kinds[0])})

    def statements(self) -> list[str]:
        """Return the stated facts as sentences in random order."""
        lines = []
        for name in self.people:
            lines += self._about(name, [kind for n, kind in self.stated if n == name])
        self.rng.shuffle(lines)
        if self.rng.random() < 0.15:
            lines.insert(self.rng.randrange(len(lines) + 1), filler_sentence(self.rng))
        return lines

    def _about(self, name: str, kinds: list[str]) -> list[str]:
        self.rng.shuffle(kinds)
        lines = []
        while kinds:
            kind = kinds.pop()
            if self.rng.random() < 0.4:
                text = self.rng.choice(_OTHER_STATEMENTS[kind])
            else:
                text = "{n} " + self.rng.choice(PREDICATES[kind])
                if kinds and self.rng.random() < 0.4:
                    text += " and " + self.rng.choice(PREDICATES[kinds.pop()])
                text += "."
            lines.append(fill(text, name, self.people[name]))
        return lines

    def question(self) -> tuple[str, str]:
        """Return a question and its answer; one in eight has no answer in the text."""
        draw = self.rng.random()
        if draw < 0.12:
            return self._unanswerable()
        name, kind = self.rng.choice(self.stated)
        facts = self.people[name]
        if draw < 0.45 and self._is_unique(kind, facts[kind]):
            questions, answer, _ = _REVERSED[kind]
        elif draw < 0.6 and kind in _TWO_STEPS and (name, "job") in self.stated:
            question, answer = _TWO_STEPS[kind]
            questions = (question,)
        else:
            asked = "colour" if kind == "thing" and self.rng.random() < 0.5 else kind
            questions, answer, _ = ASKED[asked]
        return fill(self.rng.choice(questions), name, facts), fill(answer, name, facts)

    def _is_unique(self, kind: str, value: str) -> bool:
        return sum(self.people[n][k] == value for n, k in self.stated if k == kind) == 1

    def _unanswerable(self) -> tuple[str, str]:
        facts = random_facts(self.rng, self.rng.choice(words.JOBS))
        if self.rng.random() < 0.3:
            kind, name = self.rng.choice(sorted(_REVERSED)), ""
            questions, _, unknown = _REVERSED[kind]
            known = any(self.people[n][k] == facts[k] for n, k in self.stated if k == kind)
        else:
            kind, name = self.rng.choice(sorted(ASKED)), person(self.rng)
            stated_kind = "thing" if kind == "colour" else kind
            unstated = [n for n in self.people if (n, stated_kind) not in self.stated]
            if unstated and self.rng.random() < 0.5:
                name = self.rng.choice(unstated)
            questions, _, unknown = ASKED[kind]
            known = (name, stated_kind) in self.stated
        if known:  # a stranger who happens to bear a known name, or a thing that someone has
            return self.question()
        return fill(self.rng.choice(questions), name, facts), fill(unknown, name, facts)


def facts(rng: Random) -> Dialogue:
    """Facts in the question, in turns before, or in the system prompt; up to 3 questions."""
    world = _World(rng)
    lines = world.statements()
    asked = list(dict.fromkeys(world.question() for _ in range(rng.choice((1, 1, 2, 3)))))
    text = " ".join(lines)
    key = f"facts {text} {asked[-1][0]}"
    draw = rng.random()
    if draw < 0.15:
        return Dialogue("facts", key, tuple(asked), system=text)
    if draw < 0.3:
        return Dialogue("facts", key, ((text, NOTED), *asked))
    if draw < 0.4:
        return Dialogue("facts", key, (*((line, NOTED) for line in lines), *asked))
    (question, answer), *rest = asked
    joined = f"{text} {question}" if rng.random() < 0.85 else f"{question} {text}"
    return Dialogue("facts", key, ((joined, answer), *rest))


def statements_only(rng: Random) -> str:
    """Return a passage of statements about invented people."""
    return " ".join(_World(rng).statements())


def ask_without_facts(rng: Random) -> Dialogue:
    """A question about a person of whom nothing was said."""
    kind = rng.choice(("town", "job", "thing", "food", "sport", "age"))
    name = person(rng)
    questions, _, unknown = ASKED[kind]
    turn = rng.choice(questions).format(n=name), unknown.format(n=name)
    return Dialogue("facts", f"nofacts {kind} {name}", (turn,))
