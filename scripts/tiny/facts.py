"""Facts about invented people, stated in the prompt, and questions about them."""

from random import Random

from scripts.tiny import words
from scripts.tiny.dialogue import NOTED, Dialogue
from scripts.tiny.prose import filler_sentence, person, town, with_article


def _someone(rng: Random, job: str) -> dict[str, str]:
    return {
        "town": town(rng),
        "job": job,
        "colour": rng.choice(words.COLOURS),
        "thing": rng.choice(words.OBJECTS),
        "food": rng.choice(words.FOODS),
        "sport": rng.choice(words.SPORTS),
        "age": str(rng.randrange(5, 90)),
    }


_STATEMENTS: dict[str, tuple[str, ...]] = {
    "town": ("{n} lives in {town}.", "{n}'s home is in {town}.", "The home of {n} is {town}."),
    "job": ("{n} is {a_job}.", "{n} works as {a_job}.", "{n}'s job: {job}."),
    "thing": ("{n} owns {a_colour} {thing}.", "{n} has {a_colour} {thing}."),
    "food": ("{n} likes {food}.", "{n}'s favourite food is {food}."),
    "sport": ("{n} enjoys {sport}.", "{n}'s hobby is {sport}."),
    "age": ("{n} is {age} years old.", "The age of {n} is {age}."),
}
# attribute -> (questions, answer); {n} is the person
_ASKED: dict[str, tuple[tuple[str, ...], str]] = {
    "town": (("Where does {n} live?", "In which town does {n} live?"), "{n} lives in {town}."),
    "job": (("What is {n}'s job?", "What does {n} do for a living?"), "{n} is {a_job}."),
    "thing": (("What does {n} own?", "What does {n} have?"), "{n} owns {a_colour} {thing}."),
    "colour": (("What colour is {n}'s {thing}?",), "{n}'s {thing} is {colour}."),
    "food": (("What food does {n} like?", "What does {n} like to eat?"), "{n} likes {food}."),
    "sport": (("What does {n} enjoy?", "What is {n}'s hobby?"), "{n} enjoys {sport}."),
    "age": (("How old is {n}?",), "{n} is {age} years old."),
}
_UNKNOWN = {
    "town": "I do not know where {n} lives.",
    "job": "I do not know the job of {n}.",
    "thing": "I do not know what {n} owns.",
    "colour": "I do not know what {n} owns.",
    "food": "I do not know what {n} likes.",
    "sport": "I do not know what {n} enjoys.",
    "age": "I do not know how old {n} is.",
}
_REVERSED: dict[str, tuple[tuple[str, ...], str]] = {
    "town": (("Who lives in {town}?",), "{n} lives in {town}."),
    "job": (("Who is the {job}?", "Who works as {a_job}?"), "{n} is the {job}."),
    "thing": (("Who owns the {thing}?", "Who has {a_colour} {thing}?"), "{n} owns the {thing}."),
    "food": (("Who likes {food}?",), "{n} likes {food}."),
    "sport": (("Who enjoys {sport}?",), "{n} enjoys {sport}."),
}
_TWO_STEPS: dict[str, tuple[str, str]] = {
    "town": ("Where does the {job} live?", "The {job} is {n}. {n} lives in {town}."),
    "thing": ("What does the {job} own?", "The {job} is {n}. {n} owns {a_colour} {thing}."),
    "food": ("What does the {job} like to eat?", "The {job} is {n}. {n} likes {food}."),
    "age": ("How old is the {job}?", "The {job} is {n}. {n} is {age} years old."),
}


class _World:
    """Two to five people with some of their attributes stated, and questions about them."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        jobs = rng.sample(words.JOBS, 6)
        size = rng.choice((1, 2, 2, 3, 3, 4, 5))
        self.people: dict[str, dict[str, str]] = {}
        while len(self.people) < size:
            self.people[person(rng)] = _someone(rng, jobs[len(self.people)])
        kinds = rng.sample(sorted(_STATEMENTS), rng.choice((1, 2, 2, 3, 4)))
        self.stated = {(n, k) for n in self.people for k in kinds if rng.random() < 0.9}
        self.stated.add((next(iter(self.people)), kinds[0]))

    def fill(self, text: str, name: str, facts: dict[str, str]) -> str:
        job, colour = with_article(facts["job"]), with_article(facts["colour"])
        return text.format(n=name, a_job=job, a_colour=colour, **facts)

    def statements(self) -> str:
        lines = []
        for name, kind in sorted(self.stated):
            lines.append(self.fill(self.rng.choice(_STATEMENTS[kind]), name, self.people[name]))
        self.rng.shuffle(lines)
        if self.rng.random() < 0.15:
            lines.insert(self.rng.randrange(len(lines) + 1), filler_sentence(self.rng))
        return " ".join(lines)

    def question(self) -> tuple[str, str]:
        """Return a question and its answer; one in ten has no answer in the text."""
        draw = self.rng.random()
        if draw < 0.1:
            return self._unanswerable()
        name, kind = self.rng.choice(sorted(self.stated))
        facts = self.people[name]
        if draw < 0.35 and kind in _REVERSED and self._is_unique(kind, facts[kind]):
            questions, answer = _REVERSED[kind]
        elif draw < 0.55 and kind in _TWO_STEPS and (name, "job") in self.stated:
            question, answer = _TWO_STEPS[kind]
            questions = (question,)
        else:
            asked = "colour" if kind == "thing" and self.rng.random() < 0.5 else kind
            questions, answer = _ASKED[asked]
        return self.fill(self.rng.choice(questions), name, facts), self.fill(answer, name, facts)

    def _is_unique(self, kind: str, value: str) -> bool:
        return sum(self.people[n][k] == value for n, k in self.stated if k == kind) == 1

    def _unanswerable(self) -> tuple[str, str]:
        kind = self.rng.choice(sorted(_ASKED))
        name, facts = person(self.rng), _someone(self.rng, self.rng.choice(words.JOBS))
        known = "thing" if kind == "colour" else kind
        unstated = [n for n in self.people if (n, known) not in self.stated]
        if unstated and self.rng.random() < 0.5:
            name = self.rng.choice(unstated)
        if (name, known) in self.stated:  # a stranger who happens to bear a known name
            return self.question()
        question = self.fill(self.rng.choice(_ASKED[kind][0]), name, facts)
        return question, self.fill(_UNKNOWN[kind], name, facts)


def facts(rng: Random) -> Dialogue:
    """Statements about invented people (in the question, a turn before, or the system prompt)."""
    world = _World(rng)
    text = world.statements()
    asked = [world.question() for _ in range(rng.choice((1, 1, 2, 3)))]
    asked = list(dict.fromkeys(asked))
    key = f"facts {text} {asked[-1][0]}"
    draw = rng.random()
    if draw < 0.15:
        return Dialogue("facts", key, tuple(asked), system=text)
    if draw < 0.35:
        return Dialogue("facts", key, ((text, NOTED), *asked))
    (question, answer), *rest = asked
    joined = f"{text} {question}" if rng.random() < 0.8 else f"{question} {text}"
    return Dialogue("facts", key, ((joined, answer), *rest))


def statements_only(rng: Random) -> str:
    """Return a passage of statements about invented people."""
    return _World(rng).statements()


def ask_without_facts(rng: Random) -> Dialogue:
    """A question about a person of whom nothing was said."""
    kind = rng.choice(("town", "job", "thing", "food", "sport", "age"))
    name = person(rng)
    question = rng.choice(_ASKED[kind][0]).format(n=name)
    return Dialogue("facts", f"nofacts {kind} {name}", ((question, _UNKNOWN[kind].format(n=name)),))
